"""What a model is made of: the decoder, the adapters that are merged into it, the one on top, each where it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2vec_fast.adapters import adapter_source
from llm2vec_fast.errors import ModelLoadError

from .below import require_below
from .files import ADAPTER_CONFIG, ADAPTER_PATTERNS, CONFIG, SETTINGS_FILE, TOKENIZER_PATTERNS, WEIGHT_PATTERNS, Source
from .hub import HubOptions, locate


@dataclass(frozen=True)
class Stack:
    """The sources that a model is loaded from; loading reads these folders and nothing else.

    Attributes:
        named: what the user named as the model: the decoder's folder, or that of an adapter that names a base.
        decoder: the weights and the configuration.
        merged: adapters to merge into them, in this order.
        adapter: the one that is put on top, if there is one.
    """

    named: Source
    decoder: Source
    merged: tuple[Source, ...] = ()
    adapter: Source | None = None

    @property
    def tokenizer_sources(self) -> list[Source]:
        """Where the tokenizer may be, the first that has one counts: an adapter often comes without."""
        return [*reversed(self.merged), self.decoder]

    def settings(self) -> Mapping[str, Any]:
        """The encoder's saved settings: the adapter's own, else those of what was named as the model."""
        return (self.adapter or self.named).json(SETTINGS_FILE) or {}

    def files(self) -> dict[str, list[Path]]:
        """All files that decide the embeddings, by what they are of: "model", "tokenizer", "adapter"."""
        below = self.tokenizer_sources
        return {
            "model": _distinct(path for source in below for path in source.files(WEIGHT_PATTERNS)),
            "tokenizer": _distinct(path for source in below for path in source.files(TOKENIZER_PATTERNS)),
            "adapter": [] if self.adapter is None else self.adapter.files(ADAPTER_PATTERNS),
        }


def resolve(
    base: str | Path,
    adapter: str | Path | None = None,
    hub: HubOptions | None = None,
    *,
    code: bool = False,
    gguf_file: str | None = None,
) -> Stack:
    """Find all that ``base`` and ``adapter`` are made of, and fetch what is not here yet.

    Args:
        base: a model's or an adapter's folder or hub name, or a GGUF file. An adapter names its own base, which may
            be an adapter again.
        adapter: the one on top, or the name of one that comes with the library.
        hub, code, gguf_file: see `locate`.

    Raises:
        ModelLoadError: something is missing, it cannot be told which model is meant, or an adapter needs others below.
    """
    hub = hub or HubOptions()
    named = source = locate(base, hub, code=code, gguf_file=gguf_file)
    merged: list[Source] = []
    while source.is_adapter:
        _refuse_two_models(source)
        if any(source.place == other.place for other in merged):
            raise ModelLoadError(f"the adapter {source.name} names itself as its base: pass the base, and it apart")
        merged.insert(0, source)
        source = _base_of(source, hub, code)
    top = None
    if adapter is not None:
        place = adapter_source(adapter)
        top = locate(place, hub.of_adapter(place))
        if not top.is_adapter:
            raise ModelLoadError(f"the adapter {adapter} has no {ADAPTER_CONFIG}: pass the folder that holds it")
    adapters = [*merged, *([] if top is None else [top])]
    for place, each in enumerate(adapters):
        require_below(each, adapters[:place])
    return Stack(named, source, tuple(merged), top)


def _base_of(adapter: Source, hub: HubOptions, code: bool) -> Source:
    config = adapter.json(ADAPTER_CONFIG) or {}
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise ModelLoadError(
            f"{adapter.name}/{ADAPTER_CONFIG} names no base_model_name_or_path: pass the base, and this as the adapter"
        )
    if revision is not None and (not isinstance(revision, str) or Path(base).expanduser().exists()):
        revision = None
    return locate(base, hub.of_base(revision), code=code)


def _refuse_two_models(source: Source) -> None:
    if source.file(CONFIG) and source.files(("model*.safetensors",)):
        raise ModelLoadError(
            f"{source.name} holds a whole model ({CONFIG}) and an adapter ({ADAPTER_CONFIG}), and which of them is "
            "meant cannot be told: keep them in folders of their own"
        )


def _distinct(paths: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(paths))
