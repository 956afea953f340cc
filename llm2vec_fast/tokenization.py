"""Texts to token ids: each text once, many at a time, cut to length, with the number of prompt tokens in front."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from .errors import ModelLoadError, UserError
from .prompts import Prompted, Template

# A text is tokenised as far as this many characters first; only if they were too few tokens is more of it read. The
# tokens where it was cut may differ from the whole text's, so SPARE tokens must remain beyond those that are kept.
_CHARACTERS_PER_TOKEN = 16
_SPARE = 64
# How far the token count of a text may differ between standing alone and standing behind a prompt.
_BOUNDARY_SLACK = 16
_LOCK = threading.Lock()  # a tokenizer's settings are shared by all threads that use it
_WORD = re.compile(r"\S+")  # what str.split() calls a word
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class TokenizedTexts:
    """Token ids of some texts.

    Attributes:
        ids: one int64 array a text.
        skip: (N,) int64, leading tokens of each text that belong to its prompt.
        offsets: one (tokens, 2) int64 array a text, the characters [first, last) of the text that a token covers, equal
            to each other on tokens outside it; empty unless asked for.
    """

    ids: list[np.ndarray]
    skip: np.ndarray
    offsets: list[np.ndarray] = field(default_factory=list)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, tokens of each text."""
        return np.fromiter((len(ids) for ids in self.ids), np.int64, len(self.ids))


class TextTokenizer:
    """Tokenises as the model expects: template, instruction, document limit, then truncation of the whole.

    A document of more than ``doc_max_length`` tokens loses words at its end, its white space becoming single spaces, as
    in the paper's code; where not even one word fits (a language without spaces), it is cut after ``doc_max_length``
    tokens instead of becoming empty. Then the whole, prompt included, is cut to ``max_length`` tokens. As there, the
    document limit only applies where it is below ``max_length``.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int, doc_max_length: int
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelLoadError(
                f"{type(tokenizer).__name__} is a slow tokenizer without character positions: save a tokenizer.json"
                " for this model with a fast tokenizer class"
            )
        for name, value in (("max_length", max_length), ("doc_max_length", doc_max_length)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive number of tokens")
        self.template = template
        self.max_length = max_length
        self.doc_max_length = doc_max_length
        self._tokenizer = tokenizer
        sequence = tokenizer.backend_tokenizer.encode("a").sequence_ids
        inside = [position for position, owner in enumerate(sequence) if owner is not None] or [len(sequence)]
        self._leading, self._trailing = inside[0], len(sequence) - inside[-1] - 1

    def __call__(self, pairs: Sequence[tuple[str, str]], with_offsets: bool = False) -> TokenizedTexts:
        """Tokenise (instruction, text) pairs; an instruction of "" is none."""
        prompted = [self.template.join(instruction, text) for instruction, text in pairs]
        encodings = self._encode_enough([p.joined for p in prompted], with_offsets or any(p.boundary for p in prompted))
        documents = [text for _, text in pairs]
        if self.doc_max_length < self.max_length:
            self._shorten(pairs, documents, prompted, encodings, with_offsets)
        ids = [self._truncated(np.array(encoding.ids, dtype=np.int64)) for encoding in encodings]
        starts = [_first_of_text(e, p) for e, p in zip(encodings, prompted, strict=True)]
        skip = np.array([min(start, len(row)) for start, row in zip(starts, ids, strict=True)], dtype=np.int64)
        if not with_offsets:
            return TokenizedTexts(ids, skip)
        offsets = [
            self._truncated(_offsets_in(text, document, p, encoding))
            for (_, text), document, p, encoding in zip(pairs, documents, prompted, encodings, strict=True)
        ]
        return TokenizedTexts(ids, skip, offsets)

    def _shorten(
        self,
        pairs: Sequence[tuple[str, str]],
        documents: list[str],
        prompted: list[Prompted],
        encodings: list[Encoding],
        with_offsets: bool,
    ) -> None:
        """Replace, in the three lists, every document that has more than ``doc_max_length`` tokens."""
        limit = self.doc_max_length - _BOUNDARY_SLACK
        long = [
            i
            for i, (p, e) in enumerate(zip(prompted, encodings, strict=True))
            if len(e) > limit and len(e) - _first_of_text(e, p) > limit
        ]
        reduced = self._reduce([documents[i] for i in long])
        changed = [(i, text) for i, text in zip(long, reduced, strict=True) if text != documents[i]]
        for i, text in changed:
            documents[i] = text
            prompted[i] = self.template.join(pairs[i][0], text)
        need_offsets = with_offsets or any(prompted[i].boundary for i, _ in changed)
        again = self._encode_enough([prompted[i].joined for i, _ in changed], need_offsets)
        for (i, _), encoding in zip(changed, again, strict=True):
            encodings[i] = encoding

    def _reduce(self, documents: list[str]) -> list[str]:
        """Drop words until each document, alone, has at most ``doc_max_length`` tokens."""
        documents = list(documents)
        words: dict[int, list[str]] = {}
        pending = list(range(len(documents)))
        while pending:
            encodings = self._encode_enough([documents[i] for i in pending], True, add_special_tokens=False)
            still = []
            for i, encoding in zip(pending, encodings, strict=True):
                count = min(len(encoding), self.max_length)
                if count <= self.doc_max_length:
                    continue
                still.append(i)
                have = words.setdefault(i, documents[i].split())
                keep = int(len(have) * (self.doc_max_length / count))
                words[i] = have[:keep]
                documents[i] = " ".join(words[i]) if keep else self._cut(documents[i], encoding)
            pending = still
        return documents

    def _cut(self, document: str, encoding: Encoding) -> str:
        """The longest beginning that ends with a token and has at most ``doc_max_length`` tokens of its own."""
        keep = self.doc_max_length
        while True:
            cut = document[: encoding.offsets[keep - 1][1]]
            (again,) = self._encode([cut], False, add_special_tokens=False)
            if len(again) <= self.doc_max_length or keep == 1:
                return cut
            keep = max(1, keep - (len(again) - self.doc_max_length))

    def _encode_enough(
        self, texts: Sequence[str], with_offsets: bool, add_special_tokens: bool = True
    ) -> list[Encoding]:
        """Encode texts, very long ones only as far as their first ``max_length`` tokens need."""
        reach = self.max_length * _CHARACTERS_PER_TOKEN
        encodings = self._encode([text[:reach] for text in texts], with_offsets, add_special_tokens)
        enough = self.max_length + _SPARE + self._leading + self._trailing
        for i, text in enumerate(texts):
            seen = reach
            while seen < len(text) and len(encodings[i]) < enough:
                seen *= 4
                (encodings[i],) = self._encode([text[:seen]], with_offsets, add_special_tokens)
        return encodings

    def _encode(self, texts: list[str], with_offsets: bool, add_special_tokens: bool = True) -> list[Encoding]:
        backend = self._tokenizer.backend_tokenizer
        encode = backend.encode_batch if with_offsets else getattr(backend, "encode_batch_fast", backend.encode_batch)
        with _LOCK:  # calls of the tokenizer itself leave these set, and change them while others read
            if backend.truncation is not None:
                backend.no_truncation()
            if backend.padding is not None:
                backend.no_padding()
            try:
                return encode(texts, add_special_tokens=add_special_tokens)
            except TypeError:  # half of a surrogate pair is no character and has no UTF-8
                return encode([_SURROGATE.sub("\ufffd", t) for t in texts], add_special_tokens=add_special_tokens)

    def _truncated(self, rows: np.ndarray) -> np.ndarray:
        """The first rows, and those of special tokens that every text ends with, ``max_length`` in all."""
        if len(rows) <= self.max_length:
            return rows
        kept = max(0, self.max_length - self._trailing)
        return np.concatenate([rows[:kept], rows[len(rows) - self._trailing :][: self.max_length - kept]])


def check_room(tokens: TokenizedTexts, pairs: Sequence[tuple[str, str]], first: int, max_length: int) -> None:
    """Refuse a text of which no token is left because its prompt fills all of ``max_length``.

    Raises:
        UserError: the message names the text's position, counted from ``first``.
    """
    lost = np.flatnonzero((tokens.skip >= tokens.lengths) & (tokens.lengths >= max_length))
    for i in lost:
        if pairs[i][1].strip():
            raise UserError(
                f"sentences[{first + i}]: its instruction fills all of max_length={max_length} tokens and none of its "
                "text is left: shorten the instruction or raise max_length"
            )


def _first_of_text(encoding: Encoding, prompted: Prompted) -> int:
    """Index of the first token that covers a character of the text; 0 without a prompt, all tokens without a text."""
    if prompted.boundary == 0:
        return 0
    for character in range(prompted.boundary, len(prompted.joined)):
        token = encoding.char_to_token(character)
        if token is not None:
            return token
    return len(encoding)


def _offsets_in(text: str, document: str, prompted: Prompted, encoding: Encoding) -> np.ndarray:
    """Character offsets (tokens, 2) in ``text``, of which ``document`` is what the limit left and the model saw."""
    offsets = (np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) - prompted.boundary).clip(0, len(document))
    if text.startswith(document):
        return offsets
    first = _positions_of_words(text, document)
    covered = offsets[:, 1] > offsets[:, 0]
    mapped = np.zeros_like(offsets)
    mapped[:, 0] = first[offsets[:, 0].clip(max=len(document) - 1)]
    mapped[:, 1] = np.where(covered, first[offsets[:, 1] - 1] + 1, mapped[:, 0])
    return mapped


def _positions_of_words(text: str, document: str) -> np.ndarray:
    """(len(document),) where each character of ``document``, the first words of ``text``, stands in ``text``."""
    positions = np.empty(len(document), dtype=np.int64)
    filled = 0
    for match in _WORD.finditer(text):
        end = min(filled + match.end() - match.start(), len(document))
        positions[filled:end] = np.arange(match.start(), match.start() + end - filled)
        if end < len(document):
            positions[end] = match.end()  # the space behind a word
        filled = end + 1
        if filled >= len(document):
            break
    return positions
