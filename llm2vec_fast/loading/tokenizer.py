"""The tokenizer of a model, and whether its tokens have a place in the model's embedding."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from tokenizers import Encoding, Tokenizer
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm2vec_fast.errors import ModelLoadError

from .files import Source, one_line
from .gguf import gguf_arguments

_PROBED = 2048  # tokens beyond the embedding that are looked at one by one
_NAMED = 3


def load_tokenizer(sources: Sequence[Source], *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the first source that has one.

    Raises:
        ModelLoadError: none has, or it cannot be read.
    """
    problem: Exception | None = None
    for source in sources:
        where = (
            gguf_arguments(source.place)
            if source.is_gguf
            else {"pretrained_model_name_or_path": str(source.place), "local_files_only": True}
        )
        try:
            return AutoTokenizer.from_pretrained(**where, trust_remote_code=trust_remote_code)
        except Exception as error:  # the readers of damaged files raise anything
            problem = error
    assert problem is not None, sources
    raise ModelLoadError(f"the tokenizer of {sources[-1].name} cannot be loaded: {one_line(problem)}") from problem


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
