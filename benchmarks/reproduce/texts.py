"""The unlabelled texts of the first two stages; none of them is in a test set."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.fetch import conll2003, sentences, sts_benchmark, wikipedia

_END = re.compile(r"(?<=[a-z0-9)”\"]{2}[.?!])\s+(?=[A-Z“\"])")
_LETTERS = re.compile(r"[^a-z0-9]+")
_WORDS = range(4, 65)  # words of a sentence worth training on
_TOKENS = re.compile(  # words and marks as treebanks part them
    r"(?:[A-Za-z]\.){2,}|\w+?(?=n['’]t\b)|n['’]t\b|['’]\w+|\w+(?:[-.,/&]\w+)*|[^\w\s]"
)


def paragraphs_and_sentences() -> list[str]:
    """For masked next-token prediction: paragraphs of Wikipedia and single sentences, shuffled.

    Every other one is written as word-level tasks give their sentences, or words would be met in a form that the
    adapter never saw.
    """
    found = _shuffled([*_paragraphs(), *sentences.sentences()])
    return [as_words(text) if number % 2 else text for number, text in enumerate(found)]


def single_sentences() -> list[str]:
    """For SimCSE: sentences of both sources, shuffled."""
    found = [sentence for paragraph in _paragraphs() for sentence in split(paragraph)]
    return _shuffled(sentence for sentence in found + sentences.sentences() if len(sentence.split()) in _WORDS)


def split(paragraph: str) -> list[str]:
    """A paragraph's sentences: cut after a full stop, question or exclamation mark before a capital letter."""
    return _END.split(paragraph)


def as_words(text: str) -> str:
    """A text with a space before and after every word and mark, as in treebanks: "do n't", "France 's"."""
    return " ".join(_TOKENS.findall(text))


def normalised(text: str) -> str:
    """Words of letters and digits alone, in lower case: equal for texts that differ in punctuation."""
    return _LETTERS.sub(" ", text.lower()).strip()


def evaluation_texts() -> set[str]:
    """Every sentence that a score is computed on, normalised."""
    found = set()
    for name in ("train", "dev", "test"):
        for pair in sts_benchmark.pairs(name):
            found |= {normalised(pair.first), normalised(pair.second)}
    for name in ("train", "valid", "test"):
        blocks = conll2003.file(name).read_text(encoding="utf-8").split("\n\n")
        found |= {normalised(" ".join(line.split(" ")[0] for line in block.splitlines())) for block in blocks}
    return found


def write_lines(texts: Iterable[str], path: Path) -> None:
    """One text a line, beside first and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    beside.replace(path)


def _paragraphs() -> Iterable[str]:
    return (paragraph for section in wikipedia.sections() for paragraph in section.paragraphs)


def _shuffled(texts: Iterable[str]) -> list[str]:
    # Without spaces, too: "don't" is "do n't" in a treebank.
    scored, seen, kept = {_together(text) for text in evaluation_texts()}, set(), []
    for text in texts:
        key = normalised(text)
        if key and key not in seen and _together(key) not in scored:
            seen.add(key)
            kept.append(text)
    random.Random(0).shuffle(kept)
    return kept


def _together(text: str) -> str:
    return text.replace(" ", "")
