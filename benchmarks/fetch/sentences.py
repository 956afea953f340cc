"""100,000 English sentences of many kinds (news, captions, reviews, law, lyrics), from the npm package nlp-corpus."""

from __future__ import annotations

import json

from benchmarks.fetch.packages import Package, fetch

PACKAGE = Package(
    "npm",
    "nlp-corpus",
    "4.4.0",
    "package/builds/*.json",
    "ee1c8a1a95131ea90c2275d56da86e407a38868ac7216c5427ffb0e28d5adf06",
)


def sentences() -> list[str]:
    """All of them, in the package's order, white space made single.

    Raises:
        FetchError: see `fetch`.
    """
    files = sorted(fetch(PACKAGE).iterdir(), key=lambda path: int(path.stem.removeprefix("doc-")))
    return [" ".join(text.split()) for path in files for text in json.loads(path.read_text(encoding="utf-8"))]
