"""206 pages of the English Wikipedia, which the Python package gensim carries for its tests; wiki markup stripped."""

from __future__ import annotations

import bz2
import re
from collections.abc import Iterator
from typing import NamedTuple
from xml.etree import ElementTree

from benchmarks.fetch.packages import Package, fetch

PACKAGE = Package(
    "pip",
    "gensim",
    "4.4.0",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-*.bz2",
    "e3d93229fa6d1841c81af0be981d9fb012b51f379bb15db6b020c584b81fdf4a",
)
_REDIRECT = re.compile(r"\s*#redirect", re.IGNORECASE)
_NO_TEXT = re.compile(
    r"<(ref|math|gallery|table)\b[^>/]*>.*?</\1>|<ref[^>]*/>|\{\|.*?\n\|\}", re.DOTALL | re.IGNORECASE
)
_MEDIA = re.compile(r"\[\[(?:file|image|category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.IGNORECASE)
_TAILS = frozenset(
    {"see also", "references", "notes", "further reading", "external links", "bibliography", "footnotes"}
)
_SHORTEST = 60  # characters; shorter lines are captions, list items and left-overs of markup


class Section(NamedTuple):
    """A page's section: its title ("" for the opening) and its paragraphs, a string each."""

    page: str
    title: str
    paragraphs: list[str]


def sections() -> Iterator[Section]:
    """Every section with text, page by page, in the dump's order; reference lists and the like are left out.

    Raises:
        FetchError: see `fetch`.
    """
    import mwparserfromhell

    (dump,) = fetch(PACKAGE).iterdir()
    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if not page.tag.endswith("page"):
                continue
            namespace = page.tag.removesuffix("page")
            markup = page.findtext(f"{namespace}revision/{namespace}text") or ""
            title = page.findtext(f"{namespace}title") or ""
            page.clear()
            if _REDIRECT.match(markup) or ":" in title:
                continue
            code = mwparserfromhell.parse(_MEDIA.sub("", _NO_TEXT.sub("", markup)))
            for part in code.get_sections(flat=True):
                headings = [str(heading.title).strip() for heading in part.filter_headings()]
                if not headings or headings[0].lower() not in _TAILS:
                    paragraphs = list(_paragraphs(part))
                    if paragraphs:
                        yield Section(title, headings[0] if headings else "", paragraphs)


def _paragraphs(code: object) -> Iterator[str]:
    for line in code.strip_code(normalize=True, collapse=True).split("\n"):
        line = " ".join(line.replace("( ", "(").replace("()", "").split())
        if len(line) >= _SHORTEST and line[-1] in ".?!\"'”)" and "|" not in line:
            yield line
