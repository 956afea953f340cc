"""What a bulk job needs of an encoder, and how it gets one from its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llm2vec_fast.adapters import adapter_source
from llm2vec_fast.bulk.isolation import OnBatch, OnProblem, RowByRow
from llm2vec_fast.bulk.settings import CPU_ROWS_PER_SHARD, GPU_ROWS_PER_SHARD, EmbedSettings
from llm2vec_fast.errors import UserError, is_out_of_memory
from llm2vec_fast.jobs.environment import Environment, describe_device, library_versions

if TYPE_CHECKING:
    import numpy as np

OPEN_CHOICES = ("dtype", "pooling", "max_length", "doc_max_length", "token_budget", "rows_per_shard")


class Encoder(Protocol):
    """The part of `LLM2Vec` that a bulk job uses."""

    @property
    def dimension(self) -> int: ...

    def encode(
        self,
        sentences: Sequence[str],
        *,
        instruction: str | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
        convert_to_numpy: bool = True,
        on_batch: OnBatch | None = None,
        on_problem: OnProblem | None = None,
    ) -> np.ndarray:
        """Embeddings (N, d) float32, a row a sentence in input order, NaN where ``on_problem`` is told of one."""
        ...


LoadEncoder = Callable[[EmbedSettings], Encoder]


def load_encoder(settings: EmbedSettings) -> Encoder:
    """The model of the settings, on its device.

    Raises:
        ModelLoadError: it cannot be loaded.
        UserError: the device is not there.
    """
    from llm2vec_fast import LLM2Vec

    _require_device(settings.device)
    options = {
        "pooling_mode": settings.pooling,
        "max_length": settings.max_length,
        "doc_max_length": settings.doc_max_length,
        "token_budget": settings.token_budget,
        "device": settings.device,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return LLM2Vec.from_pretrained(
        settings.model,
        settings.adapter,
        merge_peft=True,  # an adapter apart costs time in every layer, and here nobody trains it
        enable_bidirectional=False if settings.causal else None,
        dtype=settings.dtype,
        revision=settings.revision,
        adapter_revision=settings.adapter_revision,
        **given,
    )


def _require_device(device: str | None) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {device} cannot be used: {reason} (llm2vec-fast doctor lists those there are)"
        ) from error


def resolved_choices(encoder: Encoder, settings: EmbedSettings) -> dict[str, Any]:
    """What the open choices of the settings came to, as a manifest records it.

    Raises:
        UserError: more dimensions are asked for than the model has.
    """
    device = str(getattr(encoder, "device", "cpu"))
    if settings.truncate_dim is not None and settings.truncate_dim > encoder.dimension:
        raise UserError(
            f"truncate_dim {settings.truncate_dim} is more than the {encoder.dimension} dimensions of the model: "
            "give a smaller --truncate-dim"
        )
    rows = CPU_ROWS_PER_SHARD if device.startswith("cpu") else GPU_ROWS_PER_SHARD
    return {
        "dimension": settings.truncate_dim or encoder.dimension,
        "device": device,
        "dtype": str(getattr(encoder, "dtype", settings.dtype)).removeprefix("torch."),
        "pooling": getattr(encoder, "pooling_mode", settings.pooling),
        "max_length": getattr(encoder, "max_length", settings.max_length),
        "doc_max_length": getattr(encoder, "doc_max_length", settings.doc_max_length),
        "token_budget": getattr(encoder, "token_budget", settings.token_budget),
        "rows_per_shard": settings.rows_per_shard or rows,
    }


def with_choices(settings: EmbedSettings, resolved: dict[str, Any]) -> EmbedSettings:
    """The settings with open choices made as ``resolved`` has them: a job goes on as it began, on any machine."""
    left_open = {name for name in OPEN_CHOICES if getattr(settings, name) in (None, "auto")}
    return replace(settings, **{name: resolved[name] for name in left_open if resolved.get(name) is not None})


def placed(
    settings: EmbedSettings,
    model: str,
    adapter: str | None,
    revision: str | None = None,
    adapter_revision: str | None = None,
) -> EmbedSettings:
    """The settings with the model and the adapter where they are now: the places that were fingerprinted, or others.

    A hub repository may have moved on since. A revision is the one given, else for a name on the hub that of the
    settings; a folder has none.
    """
    return replace(
        settings,
        model=model,
        adapter=adapter,
        revision=revision or _of_hub(model, settings.revision),
        adapter_revision=adapter_revision or _of_hub(adapter, settings.adapter_revision),
    )


def _of_hub(name: str | None, revision: str | None) -> str | None:
    return None if name is None or Path(adapter_source(name)).expanduser().exists() else revision


def encode_texts(
    encoder: Encoder, settings: EmbedSettings, width: int, texts: Sequence[str], on_batch: OnBatch
) -> tuple[np.ndarray, dict[int, str]]:
    """`encode` with the job's settings.

    Returns:
        The embeddings (N, width), and the reason for each text that has none, by its place: as the encoder tells it, or
        as it raises for that text and for no other.

    Raises:
        UserError: memory ran out.
    """

    def encode(some: Sequence[str], on_batch: OnBatch, on_problem: OnProblem) -> np.ndarray:
        return encoder.encode(
            some,
            instruction=settings.instruction,
            normalize=settings.normalize,
            truncate_dim=settings.truncate_dim,
            convert_to_numpy=True,
            on_batch=on_batch,
            on_problem=on_problem,
        )

    try:
        return RowByRow(encode, on_batch).embed(texts, width)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"memory ran out with {settings.token_budget or 'the default number of'} tokens a forward pass: give a "
            "smaller --token-budget or another --device; the same --output takes it, and finished parts are kept"
        ) from error


def environment_of(encoder: Encoder, resolved: dict[str, Any]) -> Environment:
    """What the last bits of embeddings depend on that is not fixed for a job."""
    here = {**library_versions(), **describe_device(resolved["device"]), "token budget": resolved["token_budget"]}
    return {**here, **getattr(encoder, "describe", dict)()}
