"""The tables of the training guide: what each stage makes of each of transformers' TrainingArguments."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from llm2vec_fast.errors import UserError

from .verdicts import STAGES, VERDICTS, Kind, Verdict

BEGIN, END = "<!-- settings:begin -->", "<!-- settings:end -->"


def tables() -> str:
    """Markdown, every setting once: first those whose verdict depends on the stage, then the others by verdict."""
    groups: dict[Kind | None, list[str]] = {}
    for name in sorted(VERDICTS):
        kinds = {verdict.kind for verdict in VERDICTS[name].values()}
        groups.setdefault(kinds.pop() if len(kinds) == 1 else None, []).append(name)
    noted = [name for name in groups[Kind.HONOURED] if _notes(name)]
    plain = [_code(name) for name in groups[Kind.HONOURED] if not _notes(name)]
    by_stage = ((_code(name), *(VERDICTS[name][x].kind.value for x in STAGES), _notes(name)) for name in groups[None])
    return "\n".join(
        [
            "### Not the same in every stage\n",
            _table(("setting", *STAGES, "to know"), by_stage),
            "### Refused in every stage\n",
            _table(("setting", "why, and what to do"), _with_notes(groups[Kind.REFUSED])),
            "### No effect in any stage\n",
            _table(("setting", "why"), _with_notes(groups[Kind.NO_EFFECT])),
            "### Honoured in every stage\n",
            _table(("setting", "to know"), _with_notes(noted)),
            f"And these, with nothing to add to what transformers says: {', '.join(plain)}.\n",
        ]
    )


def write_tables(path: Path) -> None:
    """Put the tables between the two marks of a file.

    Raises:
        UserError: the file has no marks.
    """
    text = path.read_text(encoding="utf-8")
    if not text.count(BEGIN) == text.count(END) == 1:
        raise UserError(f"{path} has no place for the tables: write {BEGIN} and {END} where they go")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(f"{before}{BEGIN}\n{tables()}{END}{after}", encoding="utf-8")
    os.replace(beside, path)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ("---",) * len(head), *rows])


def _with_notes(names: list[str]) -> list[tuple[str, str]]:
    """Settings of one note in one row."""
    of_note: dict[str, list[str]] = {}
    for name in names:
        of_note.setdefault(_notes(name), []).append(_code(name))
    return [(", ".join(settings), note) for note, settings in of_note.items()]


def _code(name: str) -> str:
    return f"`{name}`"


def _notes(name: str) -> str:
    """What is said of a setting, with the stages that it is said of where they are not all."""
    said: dict[str, list[str]] = {}
    for stage in STAGES:
        said.setdefault(_note(VERDICTS[name][stage]), []).append(stage)
    return ". ".join(
        note if len(stages) == len(STAGES) else f"{', '.join(stages)}: {note}" for note, stages in said.items() if note
    )


def _note(verdict: Verdict) -> str:
    parts = [verdict.note] if verdict.note else []
    parts += [f"does nothing without {' or '.join(verdict.needs)}"] if verdict.needs else []
    parts += [f"{', '.join(verdict.passes)} is honoured"] if verdict.passes else []
    return "; ".join(parts)
