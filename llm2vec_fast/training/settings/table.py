"""The table of the training guide: what each stage makes of each of transformers' TrainingArguments."""

from __future__ import annotations

import os
from pathlib import Path

from llm2vec_fast.errors import UserError

from .verdicts import STAGES, VERDICTS, Verdict

BEGIN, END = "<!-- settings:begin -->", "<!-- settings:end -->"


def table() -> str:
    """Markdown, a row a setting, sorted by name."""
    rows = [("setting", *STAGES, "to know"), ("---",) * (len(STAGES) + 2)]
    rows += [(f"`{name}`", *(x.kind.value for x in of.values()), _notes(of)) for name, of in sorted(_ordered().items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_table(path: Path) -> None:
    """Put the table between the two marks of a file.

    Raises:
        UserError: the file has no marks.
    """
    text = path.read_text(encoding="utf-8")
    if not text.count(BEGIN) == text.count(END) == 1:
        raise UserError(f"{path} has no place for the table: write {BEGIN} and {END} where it goes")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(f"{before}{BEGIN}\n{table()}{END}{after}", encoding="utf-8")
    os.replace(beside, path)


def _ordered() -> dict[str, dict[str, Verdict]]:
    return {name: {stage: of[stage] for stage in STAGES} for name, of in VERDICTS.items()}


def _notes(of: dict[str, Verdict]) -> str:
    """What is said of a setting, with the stages that it is said of where they are not all."""
    said: dict[str, list[str]] = {}
    for stage, verdict in of.items():
        parts = [verdict.note] if verdict.note else []
        parts += [f"does nothing without {' or '.join(verdict.needs)}"] if verdict.needs else []
        if verdict.passes:
            parts.append(f"{', '.join(verdict.passes)} is honoured")
        said.setdefault("; ".join(parts), []).append(stage)
    return ". ".join(
        note if len(stages) == len(of) else f"{', '.join(stages)}: {note}" for note, stages in said.items() if note
    )
