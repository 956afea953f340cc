"""What a benchmark leaves behind: a table, a JSON file, and the README's rows, with machine, versions and date."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
RESULTS_PAGE = Path(__file__).parent / "results" / "README.md"
PACKAGES = ("torch", "triton", "transformers", "sentence-transformers")


def machine() -> dict[str, str | int]:
    """Processor, cores, versions, date."""
    about: dict[str, str | int] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    for package in PACKAGES:
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = "not installed"
    return about


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Rows that share their keys, as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *([row[name] for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(path: Path, content: dict) -> None:
    """Write beside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    beside.replace(path)


def update_readme(name: str, text: str) -> None:
    """Replace what stands between ``<!-- bench:name -->`` and ``<!-- /bench:name -->``, in either page.

    Raises:
        ValueError: neither has such markers.
    """
    first, last = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    for page in (README, RESULTS_PAGE):
        before = page.read_text()
        if first in before and last in before:
            pattern = f"{re.escape(first)}.*?{re.escape(last)}"
            page.write_text(re.sub(pattern, lambda _: f"{first}\n{text}\n{last}", before, flags=re.S))
            return
    raise ValueError(f"no page has the markers {first} and {last}: put them where the table belongs")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = {line.split(":", 1)[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
        family = f" (family {names['cpu family']}, model {names['model']})" if "cpu family" in names else ""
        return names["model name"] + family
    except (OSError, KeyError):
        return platform.processor() or platform.machine()
