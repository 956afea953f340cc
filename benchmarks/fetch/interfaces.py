"""What JavaScript's own functions and those of browsers and Node.js do, as their TypeScript declarations tell it.

TypeScript's library (Microsoft, Apache-2.0; its texts on browsers from MDN, CC0) and @types/node (MIT).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.fetch.packages import Package, fetch

PACKAGES = (
    Package(
        "npm",
        "typescript",
        "5.9.3",
        "package/lib/lib.*.d.ts",
        "98ab4ee6d21ca403d5e8c9e90d05b843144c0822e81c59b0697c1947bf701e0d",
    ),
    Package(
        "npm",
        "@types/node",
        "24.10.1",
        "node/*.d.ts",
        "91336d6f075a1606e0ee290c7682b7b85cb6f4043480d6bff8f359f94133731f",
    ),
)
_COMMENT = re.compile(r"^([ \t]*)/\*\*(.*?)\*/\s*([^\n]*)", re.DOTALL | re.MULTILINE)
_WORDS_BEFORE = r"(?:(?:export|default|declare|abstract|function|const|var|let|static|readonly|get|set) )*"
_OWNER = re.compile(
    rf"^([ \t]*){_WORDS_BEFORE}(?:interface|namespace|class|module) [\"']?(?:node:)?(\w[\w./]*)", re.MULTILINE
)
_NAME = re.compile(rf"{_WORDS_BEFORE}(?:(?:class|interface|type) )?(\w+)")
_EXAMPLE = re.compile(r"```.*?```|^[ \t]*@.*", re.DOTALL | re.MULTILINE)  # or the parameters and what follows them
_LINK = re.compile(r"\{@link(?:code)? ([^}|]*?)(?:\(\))?(?:\|[^}]*)?\}|\[([^\]]*)\]\([^)]*\)")
_MARKUP = re.compile(r"[`*]+|</?\w+>")
_SUBJECT = re.compile(  # of the texts on browsers: it repeats the name
    r"(?:The )?[\w.()'-]+ (?:static |read-only )*(?:property|method|event|interface)"
    r"(?: of the [\w ]+? (?:interface|API))?,? "
)


class Entry(NamedTuple):
    """A declared name and what is said of it.

    Attributes:
        owner: the interface, class or module that it belongs to, or "".
        name: of a function, property or type.
        text: its description in one paragraph, without examples and markup.
    """

    owner: str
    name: str
    text: str


def entries() -> Iterator[Entry]:
    """Every described name, file by file; one that is described twice in the same words comes once.

    Raises:
        FetchError: see `fetch`.
    """
    seen = set()
    for package in PACKAGES:
        for path in sorted(fetch(package).iterdir()):
            for entry in described(path.read_text(encoding="utf-8")):
                if entry not in seen:
                    seen.add(entry)
                    yield entry


def described(source: str) -> Iterator[Entry]:
    """The names of a declaration file that have a comment which says something."""
    owners = [(found.start(), len(found[1]), found[2]) for found in _OWNER.finditer(source)]
    for comment in _COMMENT.finditer(source):
        named, text = _NAME.match(comment[3]), _plain(comment[2])
        if named and text:
            around = (
                o for start, indent, o in reversed(owners) if start < comment.start() and indent < len(comment[1])
            )
            yield Entry(next(around, ""), named[1], text)


def _plain(comment: str) -> str:
    """The first paragraph that says something, without examples, links, marks and tags."""
    text = _EXAMPLE.sub("", re.sub(r"^[ \t]*\*[ \t]?", "", comment, flags=re.MULTILINE))
    for paragraph in re.split(r"\n\s*\n", text):
        linked = _LINK.sub(lambda found: found[1] or found[2] or "", paragraph)
        plain = " ".join(_MARKUP.sub("", linked).split())
        if plain and not plain.startswith("MDN Reference"):
            return _SUBJECT.sub("", plain, count=1)
    return ""
