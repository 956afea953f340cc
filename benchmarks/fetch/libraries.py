"""What the functions, classes and modules of some Python libraries do, as their docstrings tell it.

The libraries are read and never imported. They are written in Python alone, run on every Python that we support, and
are published under MIT, BSD, ISC or Apache-2.0 licences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.fetch.docstrings import NOT_LIBRARY, of_file
from benchmarks.fetch.packages import Package, fetch

_SHA256 = {
    ("anyio", "4.16.0"): "cc7783cc21b7bef491e29d808fed67f00e55904f1db72005a999eeb835f5288f",
    ("boltons", "26.2.0"): "2506baf97ce2ab4746dcaf3d8d058b26bf82a7afca9ce9e7b6ca833ce781cdeb",
    ("django", "5.2.19"): "4a9c7cc743c2b3e06b7111571964b94a9020dc27230fe77ad99fd0e0e54e150f",
    ("invoke", "3.0.3"): "b612ea8f7f857ecfa8013418c283f7f1d3da0479ef4d651ef3cf410371b3ab86",
    ("pexpect", "4.9.0"): "1ba8d4e30a56e6cf0e96181fd6bd0db55fafaf5c155b143b1b1125b77e8c2bd7",
    ("plumbum", "2.0.2"): "9160c460da6f32944064a055d9af8ef4182ca759081a4a0a376634905bb42ef3",
    ("robotframework", "7.5"): "db40c05cb188709e51873771f0fd0276f100f4bd9e8ad67ea48db968be71dcec",
    ("trio", "0.35.0"): "894e54c9205c7573fa2eebe42d598ba7f20fca9b4ae4dd7df0edf2d646a9d44c",
    ("twisted", "26.10.0"): "d95ab80cf67a6c7c7b2b3d513ef2e83a6751ebf47d32ad12c6ce84d9b20069b9",
    ("werkzeug", "3.1.9"): "96b347f29b8fc142e1e2e7e5bb9fa4d9e4566c97109ba9110d0cfb9f253eb4af",
}
PACKAGES = tuple(
    Package("pip", name, version, "*.py", sha256, in_folders=True) for (name, version), sha256 in _SHA256.items()
)
_NOT_READ = NOT_LIBRARY | {"testing", "_vendor", "vendor", "locale", "migrations", "examples", "conf"}
_LEAST_WORDS = 4  # of a summary that says something
_NO_PROSE = re.compile(r"[@:>.|]|\w+:\n|.*\n[-=~]{3}")  # fields, examples, tables, headings
_BRACED = re.compile(r"\b[A-Z]\{([^{}<]*)(?:<[^{}>]*>)?\}")  # epytext: "C{code}", "L{text<target>}"
_MARKUP = re.compile(r":[a-z]+(?::[a-z]+)?:(?=`)|\s<[\w.~]+>(?=`)|[`*|]+")


class Entry(NamedTuple):
    """What is said of a name.

    Attributes:
        owner: the class, module or package that it belongs to.
        name: of a function, class or module.
        summary: the first paragraph of its docstring, without markup.
        rest: what follows it, as it stands; "" if nothing does.
    """

    owner: str
    name: str
    summary: str
    rest: str


def entries() -> Iterator[Entry]:
    """Every public name with a description, file by file; one that begins like another does not come again.

    Raises:
        FetchError: see `fetch`.
    """
    seen = set()
    for package in PACKAGES:
        root = fetch(package)
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if not _NOT_READ.isdisjoint(parts):
                continue
            for place, docstring in of_file(path, ".".join(parts).removesuffix(".__init__")):
                owner, _, name = place.rpartition(".")
                first, _, rest = docstring.strip().partition("\n\n")
                summary = prose(first)
                if len(summary.split()) >= _LEAST_WORDS and summary not in seen and not name.startswith(("_", "test")):
                    seen.add(summary)
                    yield Entry(owner.rpartition(".")[2], name, summary, rest.strip())


def prose(paragraph: str) -> str:
    """A paragraph without the marks of reStructuredText, epytext and Markdown; "" for tables, fields and examples."""
    if _NO_PROSE.match(paragraph.lstrip()):
        return ""
    return " ".join(_MARKUP.sub("", _BRACED.sub(r"\1", paragraph)).split())
