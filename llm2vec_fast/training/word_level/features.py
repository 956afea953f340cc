"""Outputs of a frozen encoder, one a word: computed once, kept on disk, mapped into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.engine.request import TokenEmbeddings

_AT_ONCE = 1024  # sentences that are embedded together; what they make is all that is held in memory


def word_features(
    encoder: LLM2Vec, sentences: Sequence[Sequence[str]], labels_from: Sequence[str], path: Path
) -> dict[str, np.ndarray]:
    """Rows a word, each the mean over its tokens, in the order of the words; all of ``labels_from`` in one pass.

    Args:
        encoder: frozen; sees each sentence's words joined by single spaces.
        sentences: words.
        labels_from: "same_token" takes a token's own output; "next_token" the one before it, and of a sentence's first
            token, before which there is none, its own.
        path: where the rows are kept, so that a run that goes on need not compute them again.

    Returns:
        For each of ``labels_from`` (words, d) float16 where the encoder runs in 16 bits, else float32; NaN for words
        beyond the encoder's limit.
    """
    key = _fingerprint(encoder, sentences, labels_from)
    stamp = path.with_suffix(".json")
    if not (path.exists() and stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == key):
        path.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        _write(encoder, sentences, labels_from, path)
        stamp.write_text(json.dumps(key), encoding="utf-8")
    return dict(zip(labels_from, np.load(path, mmap_mode="r"), strict=True))


def _write(encoder: LLM2Vec, sentences: Sequence[Sequence[str]], labels_from: Sequence[str], path: Path) -> None:
    shape = (len(labels_from), sum(map(len, sentences)), encoder.dimension)
    dtype = np.float16 if encoder.dtype.itemsize == 2 else np.float32
    kept = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    first = 0
    for words, text in _of_sentences(encoder, sentences):
        for rows, label_from in zip(kept, labels_from, strict=True):
            rows[first : first + len(words)] = _merged(words, text, label_from)
        first += len(words)
    kept.flush()


def embed_words(encoder: LLM2Vec, sentences: Sequence[Sequence[str]], label_from: str) -> list[np.ndarray]:
    """`word_features` of some sentences, an array each, in memory."""
    return [_merged(words, text, label_from) for words, text in _of_sentences(encoder, sentences)]


def _of_sentences(
    encoder: LLM2Vec, sentences: Sequence[Sequence[str]]
) -> Iterator[tuple[Sequence[str], TokenEmbeddings]]:
    for start in range(0, len(sentences), _AT_ONCE):
        some = sentences[start : start + _AT_ONCE]
        tokens = encoder.encode([" ".join(words) for words in some], output="tokens", convert_to_numpy=True)
        yield from zip(some, tokens, strict=True)


def _merged(words: Sequence[str], text: TokenEmbeddings, label_from: str) -> np.ndarray:
    """A token belongs to the word of its last character: the space before a word is often part of its first token.
    One that is nothing but that space belongs to none."""
    outputs = text.embeddings
    if label_from == "next_token" and len(outputs):
        outputs = np.concatenate([outputs[:1], outputs[:-1]])
    ends = np.cumsum([len(word) + 1 for word in words]) - 1  # each word's end in the joined sentence
    starts = ends - [len(word) for word in words]
    begin, end = text.offsets.T
    owner = np.searchsorted(ends, end)
    kept = (end > begin) & (end > starts[owner])
    total = np.zeros((len(words), outputs.shape[1]), np.float32)
    np.add.at(total, owner[kept], outputs[kept])
    count = np.bincount(owner[kept], minlength=len(words))[:, None]
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _fingerprint(encoder: LLM2Vec, sentences: Sequence[Sequence[str]], labels_from: Sequence[str]) -> dict[str, str]:
    digest = hashlib.sha256()
    for words in sentences:
        digest.update("\x1f".join(words).encode() + b"\x1e")
    weights = hashlib.sha256()
    for name, parameter in encoder.model.named_parameters():
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.double().sum().item()!r}".encode())
    causal = str(getattr(encoder.config, "is_causal", True))
    return {
        "texts": digest.hexdigest(), "weights": weights.hexdigest(), "causal": causal, "dtype": str(encoder.dtype),
        "max_length": str(encoder.max_length), "labels_from": " ".join(labels_from),
    }  # fmt: skip
