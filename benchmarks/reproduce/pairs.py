"""Pairs to train on, mined from unlabelled texts: a data set a kind, each with hard negatives where it has them."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.fetch import docstrings, libraries, wikipedia, wordnet
from benchmarks.fetch.wordnet import Synset
from benchmarks.reproduce.texts import evaluation_texts, normalised, split, write_lines

_LEAST_WORDS = 4  # of an example or a gloss: shorter ones say little
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")  # of a name: "JSON", "Object", "file"
_LONGEST = 300  # characters of a docstring: about as many tokens as the demo reads
_MOST = 10_000  # pairs of a kind, lest the most frequent be all there is


class Pair(NamedTuple):
    """A text, one that means the same or answers it, and one that looks alike and does not."""

    query: str
    positive: str
    negative: str | None = None


def data_sets() -> dict[str, list[Pair]]:
    """The kinds of pairs by name, shuffled, without sentences that scores are computed on or the demo searches."""
    senses = list(wordnet.synsets())
    found = {
        "glosses": glosses(senses),
        "paraphrases": paraphrases(senses),
        "sections": sections(),
        "neighbours": neighbours(),
        "functions": functions(),
        "remarks": remarks(),
    }
    held_out = evaluation_texts() | searched_texts()
    kept = {name: [pair for pair in pairs if held_out.isdisjoint(_parts(*pair))] for name, pairs in found.items()}
    return {name: random.Random(0).sample(pairs, min(_MOST, len(pairs))) for name, pairs in kept.items()}


def glosses(senses: list[Synset]) -> Iterator[Pair]:
    """A word, or several that mean the same, and what they mean; the negative is a sibling's meaning."""
    siblings, rng = _siblings(senses), random.Random(0)
    for sense in senses:
        if len(sense.gloss.split()) < _LEAST_WORDS:
            continue
        others = [other.gloss for other in siblings[sense.parent] if other.gloss and other.key != sense.key]
        yield Pair(", ".join(sense.words[:3]), sense.gloss, rng.choice(others) if others else None)


def paraphrases(senses: list[Synset]) -> Iterator[Pair]:
    """A sentence and the same with a synonym in a word's place; in the negative a sibling's word stands there."""
    siblings, rng = _siblings(senses), random.Random(0)
    for sense in senses:
        for example in sense.examples:
            word = next((word for word in sense.words if _holds(example, word)), None)
            synonyms = [other for other in sense.words if other != word]
            if word is None or not synonyms or len(example.split()) < _LEAST_WORDS:
                continue
            others = [w for other in siblings[sense.parent] if other.key != sense.key for w in other.words[:1]]
            changed = _replaced(example, word, rng.choice(others)) if others else None
            yield Pair(example, _replaced(example, word, rng.choice(synonyms)), changed)


def sections() -> Iterator[Pair]:
    """A page's title with a section's, and how that section begins."""
    for section in wikipedia.sections():
        title = f"{section.page}: {section.title}" if section.title else section.page
        yield Pair(title, " ".join(split(section.paragraphs[0])[:3]))


def neighbours() -> Iterator[Pair]:
    """A sentence and the next of its paragraph."""
    for section in wikipedia.sections():
        for paragraph in section.paragraphs:
            sentences = [sentence for sentence in split(paragraph) if len(sentence.split()) >= _LEAST_WORDS]
            yield from (Pair(*two) for two in zip(sentences[::2], sentences[1::2], strict=False))


def functions() -> Iterator[Pair]:
    """What a function or class belongs to and is called, as words, and its docstring, which says more than that."""
    for entry in libraries.entries():
        name = f"{name_as_words(entry.owner)}: {name_as_words(entry.name)}"
        yield Pair(name, f"{entry.summary}\n\n{entry.rest}".strip()[:_LONGEST])


def remarks() -> Iterator[Pair]:
    """How a docstring begins, and what it goes on with."""
    for entry in libraries.entries():
        if len(entry.rest.split()) >= _LEAST_WORDS:
            yield Pair(entry.summary, entry.rest[:_LONGEST])


def name_as_words(name: str) -> str:
    """The words of a name in camel case or with underscores: "readFileSync" is "read file sync"."""
    return " ".join(_WORD.findall(name)).lower()


def searched_texts() -> set[str]:
    """What the demo searches, as `_parts` has it: libraries quote Python's own docstrings."""
    return {part for docstring in docstrings.collect() for part in _parts(docstring.text)}


def _parts(*texts: str | None) -> Iterator[str]:
    """Texts, and the paragraphs and sentences of each that are more than a few words, normalised."""
    for text in filter(None, texts):
        yield normalised(text)
        for prose in map(libraries.prose, text.split("\n\n")):
            yield from (normalised(part) for part in (prose, *split(prose)) if len(part.split()) >= _LEAST_WORDS)


def _siblings(senses: list[Synset]) -> dict[str | None, list[Synset]]:
    """Senses by what they are a kind of; those that are a kind of nothing have no siblings."""
    found: dict[str | None, list[Synset]] = defaultdict(list)
    for sense in senses:
        if sense.parent is not None:
            found[sense.parent].append(sense)
    return found


def _holds(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text) is not None


def _replaced(text: str, word: str, other: str) -> str:
    return re.sub(rf"\b{re.escape(word)}\b", lambda _: other, text, count=1)


def write(pairs: list[Pair], path: Path) -> None:
    """A JSON object a line, with the columns that `llm2vec-fast train contrastive` reads."""
    rows = ({name: text for name, text in pair._asdict().items() if text is not None} for pair in pairs)
    write_lines((json.dumps(row, ensure_ascii=False) for row in rows), path)
