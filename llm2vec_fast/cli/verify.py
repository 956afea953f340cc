"""`llm2vec-fast verify`: whether a folder of embeddings is what was written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder that `llm2vec-fast embed` wrote.", show_default=False)
    ],
) -> None:
    """Read every byte of a folder of embeddings, and compare it with its checksums.

    Of every part: its size, footer, rows, type and SHA-256, and the rows that
    it left out. Nothing is changed: the embed command that made the folder
    makes damaged parts again.

    [bold]Examples[/bold]

    llm2vec-fast verify vectors

    [bold]Exit code[/bold]

    0  every part is as it was written, and the job is finished
    1  something is damaged or missing, or the job is not finished
    """
    from llm2vec_fast.bulk.progress import counted
    from llm2vec_fast.bulk.verify import verify as check

    report = check(folder, notify=lambda sentence: print(sentence, file=sys.stderr))
    for fault in report.faults:
        print(fault)
    left_out = f", {report.bad_rows:,} left out" if report.bad_rows else ""
    holds = f"{counted(report.parts, 'part')}, {counted(report.rows, 'row')}{left_out}"
    print(f"{folder}: {holds}, {report.bytes / 1e6:,.1f} MB")
    if report.faults:
        print(
            f"{counted(len(report.faults), 'fault')}: the embed command that made the folder makes damaged parts again"
        )
    elif not report.finished:
        print("every part is as it was written, but the job is not finished: its embed command goes on")
    else:
        print("every part is as it was written")
    if report.faults or not report.finished:
        raise typer.Exit(1)
