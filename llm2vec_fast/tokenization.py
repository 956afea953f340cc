"""Texts to token ids: each text once, many at a time, cut to length, with the number of prompt tokens in front."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from .errors import ModelLoadError, UserError
from .prompts import Prompted, Template
from .tokenizer_state import own_backend

# A text is tokenised as far as this many characters first; only if they were too few tokens is more of it read. The
# tokens where it was cut may differ from the whole text's, so SPARE tokens must remain beyond those that are kept.
_CHARACTERS_PER_TOKEN = 16
_SPARE = 64
# How far the token count of a text may differ between standing alone and standing behind a prompt.
_BOUNDARY_SLACK = 16
_WORD = re.compile(r"\S+")  # what str.split() calls a word
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class TokenizedTexts:
    """Token ids of some texts.

    Attributes:
        ids: one int64 array a text.
        skip: (N,) int64, leading tokens of each text that belong to its prompt.
        lost: (N,) bool, whether the text was cut and no token of it is left, or not even its prompt is whole.
        offsets: one (tokens, 2) int64 array a text, the characters [first, last) of the text that a token covers, equal
            to each other on tokens outside it; empty unless asked for.
    """

    ids: list[np.ndarray]
    skip: np.ndarray
    lost: np.ndarray
    offsets: list[np.ndarray] = field(default_factory=list)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, tokens of each text."""
        return np.fromiter((len(ids) for ids in self.ids), np.int64, len(self.ids))


class TextTokenizer:
    """Tokenises as the model expects: template, instruction, document limit, then truncation of the whole.

    A document of more than ``doc_max_length`` tokens loses words at its end, its white space becoming single spaces, as
    in the paper's code; where not even one word fits (a language without spaces), it is cut after ``doc_max_length``
    tokens instead of becoming empty. Then the whole, prompt included, is cut to ``max_length`` tokens: what template
    and tokenizer put behind a text is kept, and the text gives way. As there, the document limit only applies where it
    is below ``max_length``. Padding, truncation and other state of the tokenizer object have no part in it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int, doc_max_length: int
    ) -> None:
        backend_of(tokenizer)
        for name, value in (("max_length", max_length), ("doc_max_length", doc_max_length)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive number of tokens")
        self.template = template
        self.max_length = max_length
        self.doc_max_length = doc_max_length
        self._backend = own_backend(tokenizer)

    def __call__(self, pairs: Sequence[tuple[str, str]], with_offsets: bool = False) -> TokenizedTexts:
        """Tokenise (instruction, text) pairs; an instruction of "" is none."""
        documents = [text for _, text in pairs]
        prompted, encodings = self._prompted(pairs, documents, with_offsets)
        if self.doc_max_length < self.max_length:
            self._shorten(pairs, documents, prompted, encodings, with_offsets)
        texts = list(zip(encodings, prompted, strict=True))
        cuts = [self._cut_of(encoding, p) for encoding, p in texts]
        starts = [_first_of_text(encoding, p) for encoding, p in texts]
        ids = [
            _pieced(np.array(encoding.ids, dtype=np.int64), cut) for encoding, cut in zip(encodings, cuts, strict=True)
        ]
        skip = np.array([min(start, len(row)) for start, row in zip(starts, ids, strict=True)], dtype=np.int64)
        lost = np.array(
            [
                cut is not None and cut[0] <= max(start, _added(encoding)[0])
                for cut, start, encoding in zip(cuts, starts, encodings, strict=True)
            ],
            dtype=bool,
        )
        if not with_offsets:
            return TokenizedTexts(ids, skip, lost)
        offsets = [
            _pieced(_offsets_in(text, document, p, encoding, len(self.template.closing)), cut)
            for (_, text), document, (encoding, p), cut in zip(pairs, documents, texts, cuts, strict=True)
        ]
        return TokenizedTexts(ids, skip, lost, offsets)

    def _prompted(
        self, pairs: Sequence[tuple[str, str]], documents: Sequence[str], with_offsets: bool
    ) -> tuple[list[Prompted], list[Encoding]]:
        """The documents with prompt and closing around them, of very long ones the beginning; and their tokens."""
        prompted: dict[int, Prompted] = {}

        def join(i: int, document: str) -> str:
            prompted[i] = self.template.join(pairs[i][0], document)
            return prompted[i].joined

        located = with_offsets or self.template != Template() or any(instruction for instruction, _ in pairs)
        encodings = self._encode_enough(documents, located, join)
        return [prompted[i] for i in range(len(pairs))], encodings

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
        again = self._prompted([pairs[i] for i, _ in changed], [text for _, text in changed], with_offsets)
        for (i, text), joined, encoding in zip(changed, *again, strict=True):
            documents[i], prompted[i], encodings[i] = text, joined, encoding

    def _reduce(self, documents: list[str]) -> list[str]:
        """Drop words until each document, alone, has at most ``doc_max_length`` tokens."""
        documents = list(documents)
        words: dict[int, list[str]] = {}
        pending = list(range(len(documents)))
        while pending:
            encodings = self._encode_enough([documents[i] for i in pending], True)
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
        self,
        texts: Sequence[str],
        with_offsets: bool,
        join: Callable[[int, str], str] | None = None,
    ) -> list[Encoding]:
        """Encode texts, very long ones only as far as their first ``max_length`` tokens need.

        Args:
            join: what to encode for the beginning of text number i; by default that alone, without special tokens.
        """
        special = join is not None
        join = join or (lambda _, text: text)
        reach = self.max_length * _CHARACTERS_PER_TOKEN
        encodings = self._encode([join(i, text[:reach]) for i, text in enumerate(texts)], with_offsets, special)
        enough = self.max_length + _SPARE + len(self.template.closing)
        for i, text in enumerate(texts):
            seen = reach
            while seen < len(text) and len(encodings[i]) < enough:
                seen *= 4
                (encodings[i],) = self._encode([join(i, text[:seen])], with_offsets, special)
        return encodings

    def _encode(self, texts: list[str], with_offsets: bool, add_special_tokens: bool = True) -> list[Encoding]:
        backend = self._backend
        encode = backend.encode_batch if with_offsets else getattr(backend, "encode_batch_fast", backend.encode_batch)
        try:
            return encode(texts, add_special_tokens=add_special_tokens)
        except TypeError:  # half of a surrogate pair is no character and has no UTF-8
            return encode([_SURROGATE.sub("\ufffd", t) for t in texts], add_special_tokens=add_special_tokens)

    def _cut_of(self, encoding: Encoding, prompted: Prompted) -> tuple[int, int] | None:
        """Tokens [0, first) and [second, end) are kept: what closes a text stays, the text gives way. None: all are."""
        count = len(encoding)
        if count <= self.max_length:
            return None
        last = count - _added(encoding)[1]
        if self.template.closing:
            last = min(last, _token_from(encoding, prompted, len(prompted.joined) - len(self.template.closing)))
        return max(0, self.max_length - (count - last)), max(last, count - self.max_length)


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The fast tokenizer's own object.

    Raises:
        ModelLoadError: it has none, with which nothing can be said of characters.
    """
    if getattr(tokenizer, "is_fast", False):
        return tokenizer.backend_tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelLoadError(
            f"a {type(tokenizer).__name__} is no tokenizer of transformers: pass AutoTokenizer.from_pretrained(...)"
        )
    raise ModelLoadError(
        f"{type(tokenizer).__name__} is a slow tokenizer without character positions: save a tokenizer.json for this "
        "model with a fast tokenizer class"
    )


def check_room(tokens: TokenizedTexts, pairs: Sequence[tuple[str, str]], first: int, max_length: int) -> None:
    """Refuse a text of which no token is left because what is around it fills all of ``max_length``.

    Raises:
        UserError: the message names the text's position, counted from ``first``.
    """
    for i in np.flatnonzero(tokens.lost):
        filler = "its instruction fills" if pairs[i][0].strip() else "what the model's format puts around it fills"
        raise UserError(
            f"sentences[{first + i}]: {filler} all of max_length={max_length} tokens and none of its text is left: "
            f"{'shorten the instruction or ' if pairs[i][0].strip() else ''}raise max_length"
        )


def _pieced(rows: np.ndarray, cut: tuple[int, int] | None) -> np.ndarray:
    return rows if cut is None else np.concatenate([rows[: cut[0]], rows[cut[1] :]])


def _added(encoding: Encoding) -> tuple[int, int]:
    """How many special tokens the tokenizer put before and behind the string, whatever that holds."""
    owners = encoding.sequence_ids
    inside = [position for position, owner in enumerate(owners) if owner is not None]
    return (inside[0], len(owners) - inside[-1] - 1) if inside else (len(owners), 0)


def _first_of_text(encoding: Encoding, prompted: Prompted) -> int:
    """Index of the first token that covers a character of the text; 0 without a prompt, all tokens without a text."""
    return _token_from(encoding, prompted, prompted.boundary) if prompted.boundary else 0


def _token_from(encoding: Encoding, prompted: Prompted, first: int) -> int:
    """Index of the first token that covers a character of the joined string from ``first`` on; all tokens if none."""
    for character in range(first, len(prompted.joined)):
        token = encoding.char_to_token(character)
        if token is not None:
            return token
    return len(encoding)


def _offsets_in(text: str, document: str, prompted: Prompted, encoding: Encoding, closing: int) -> np.ndarray:
    """Character offsets (tokens, 2) in ``text``, of which ``document`` is what the limit left.

    Args:
        closing: characters behind the document in what was encoded.
    """
    end = len(prompted.joined) - closing - prompted.boundary
    offsets = (np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) - prompted.boundary).clip(0, end)
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
