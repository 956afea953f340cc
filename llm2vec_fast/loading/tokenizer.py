"""The tokenizer of a model, and whether its tokens have a place in the model's embedding."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm2vec_fast.errors import ModelLoadError

from .configuration import names_old_rope, read_config
from .files import Source, one_line
from .gguf import gguf_arguments

_CONFIG = "tokenizer_config.json"
_MARKS = ("bos", "eos")
_HONOURED_BY = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")  # in transformers 4
_PROBED = 2048  # tokens beyond the embedding that are looked at one by one
_NAMED = 3


def load_tokenizer(sources: Sequence[Source], *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the first source that has one.

    Raises:
        ModelLoadError: none has, or it cannot be read.
    """
    problem: Exception | None = None
    for source in sources:
        where: dict[str, Any] = (
            gguf_arguments(source.place)
            if source.is_gguf
            else {"pretrained_model_name_or_path": str(source.place), "local_files_only": True}
        )
        if names_old_rope(source) and not trust_remote_code:
            where["config"] = read_config(source)[0]  # which the class of the tokenizer is chosen by
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=trust_remote_code)
        except Exception as error:  # the readers of damaged files raise anything
            problem = error
            continue
        add_stated_marks(tokenizer, source)
        return tokenizer
    assert problem is not None, sources
    raise ModelLoadError(f"the tokenizer of {sources[-1].name} cannot be loaded: {one_line(problem)}") from problem


def add_stated_marks(tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
    """Let a tokenizer add the begin and end tokens that its tokenizer_config.json asks for.

    transformers 4 made these two settings true for tokenizers of Llama's kind and passed over them for others;
    transformers 5 takes what tokenizer.json adds, whatever they say. Models such as e5-mistral were trained with the
    end token, on which they pool, though their tokenizer.json adds none.

    Raises:
        ModelLoadError: a token is asked for that the tokenizer does not have.
    """
    stated = source.json(_CONFIG) or {}
    asked = {kind: stated[f"add_{kind}_token"] for kind in _MARKS if isinstance(stated.get(f"add_{kind}_token"), bool)}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not asked or backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return
    probe = backend.encode("a")
    outside = [i for i, special in zip(probe.ids, probe.special_tokens_mask, strict=True) if special]
    tokens = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    added = {"bos": probe.ids[:1] == [tokens["bos"]], "eos": probe.ids[-1:] == [tokens["eos"]]}
    wanted = {**added, **asked}
    if wanted == added:
        return
    if str(stated.get("tokenizer_class")).removesuffix("Fast") not in _HONOURED_BY:
        for kind in _MARKS:
            if wanted[kind] and not added[kind]:
                warnings.warn(
                    f"{source.name}/{_CONFIG} says add_{kind}_token, but its tokenizer.json adds none and decides: "
                    "texts are embedded without it, as transformers does",
                    stacklevel=2,
                )
        return
    unknown = [kind for kind in _MARKS if wanted[kind] and tokens[kind] is None]
    if unknown or set(outside) - set(tokens.values()):
        reason = f"names no {unknown[0]}_token" if unknown else "adds others, too"
        raise ModelLoadError(
            f"{source.name}/{_CONFIG} says add_{unknown[0] if unknown else 'eos'}_token, and the tokenizer {reason}: "
            "correct the tokenizer's files"
        )
    backend.post_processor = _template(tokenizer, wanted)


def _template(tokenizer: PreTrainedTokenizerBase, wanted: Mapping[str, bool]) -> TemplateProcessing:
    names = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    tokens = {kind: names[kind] for kind in _MARKS if wanted[kind]}
    single = [tokens.get("bos"), "$A", tokens.get("eos")]
    pair = [*single, tokens.get("bos"), "$B:1", tokens.get("eos")]
    return TemplateProcessing(
        single=[part for part in single if part],
        pair=[part for part in pair if part],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens.values()],
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: nn.Module, source: str) -> None:
    """Find tokens that have no row in the model's embedding; a model with more rows than tokens is usual.

    A tokenizer that writes such a token into every text, or makes ordinary text into them, is another model's and is
    refused. Of added ones, which appear only where a text spells them out, a warning tells.

    Raises:
        ModelLoadError: the message names some of the tokens.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    beyond = {token: i for token, i in backend.get_vocab(with_added_tokens=True).items() if i >= rows}
    if not beyond:
        return
    made = sorted(_beyond([backend.encode(""), backend.encode("a")], rows))
    if not made:
        added = set(backend.get_added_tokens_decoder())
        ordinary = sorted(i for i in beyond.values() if i not in added)[:_PROBED]
        texts = [backend.decode([i], skip_special_tokens=False) for i in ordinary]
        made = sorted(_beyond(backend.encode_batch(texts, add_special_tokens=False), rows))
    if made:
        raise ModelLoadError(
            f"the tokenizer of {source} makes tokens that the model has no embedding for ({_listed(backend, made)}; "
            f"the model has {rows:,}): pass the model and its own tokenizer, or resize the embedding"
        )
    warnings.warn(
        f"{len(beyond)} tokens of the tokenizer of {source} have no embedding in the model, which has {rows:,} "
        f"({_listed(backend, sorted(beyond.values()))}): texts that hold them cannot be embedded",
        stacklevel=2,
    )


def _beyond(encodings: Sequence[Encoding], rows: int) -> set[int]:
    """The tokens of some texts that are beyond the embedding; padding is none of theirs."""
    return {i for e in encodings for i, seen in zip(e.ids, e.attention_mask, strict=True) if seen and i >= rows}


def _listed(backend: Tokenizer, ids: list[int]) -> str:
    names = ", ".join(f"{backend.id_to_token(i)!r} is {i}" for i in ids[:_NAMED])
    return names if len(ids) <= _NAMED else f"{names}, …"
