"""`llm2vec-fast search`: the rows of a folder of embeddings that are nearest to a question."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llm2vec_fast.bulk.search import Hit

SNIPPET_CHARACTERS = 200


def search(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder that `llm2vec-fast embed` wrote.", show_default=False)
    ],
    questions: Annotated[
        list[str],
        typer.Argument(metavar="QUESTION", help="One or more questions; the model is loaded once.", show_default=False),
    ],
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, metavar="K", help="Hits for each question.")] = 5,
    instruction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Put before every question; pooling leaves it out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a question, a line each.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Where the model is now. Default: where it was.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where the adapter is now. Default: where it was.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="REVISION", help="Of a --model on the hub. Default: the folder's.", show_default=False),
    ] = None,
    adapter_revision: Annotated[
        str | None,
        typer.Option(metavar="REVISION", help="Of an --adapter on the hub. Default: the folder's.", show_default=False),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, … Default: an accelerator if there is one.")
    ] = None,
) -> None:
    """Find the rows nearest to a question by cosine, exactly, over every row.

    Model, pooling and lengths are those that the folder was made with. Texts
    are shown if they were kept (embed --keep-columns text).

    [bold]Examples[/bold]

    llm2vec-fast search vectors "read rows of a csv file" "compress bytes"

    llm2vec-fast search vectors "how do I cancel?" --top-k 20 --json \\
        --instruction "Given a question, find passages that answer it:"
    """
    from llm2vec_fast.bulk import encoding
    from llm2vec_fast.bulk import search as bulk

    answers = bulk.search(
        folder,
        questions,
        top_k=top_k,
        instruction=instruction,
        model=model,
        adapter=adapter,
        revision=revision,
        adapter_revision=adapter_revision,
        device=device,
        load=encoding.load_encoder,
        notify=lambda sentence: print(sentence, file=sys.stderr),
    )
    show = _print_json if as_json else _print_table
    for question, hits in zip(questions, answers, strict=True):
        show(question, hits)


def _print_json(question: str, hits: list[Hit]) -> None:
    values = [{"rank": rank, "id": hit.id, "score": hit.score, **_named(hit)} for rank, hit in enumerate(hits, 1)]
    print(json.dumps({"question": question, "hits": values}, ensure_ascii=False))


def _named(hit: Hit) -> dict[str, dict[str, Any]]:
    return {"columns": hit.columns} if hit.columns else {}


def _print_table(question: str, hits: list[Hit]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(question), title_justify="left", box=None, pad_edge=False)
    table.add_column("score", justify="right")
    table.add_column("id", overflow="fold")
    names = list(hits[0].columns) if hits else []
    for name in names:
        table.add_column(name, overflow="fold")
    for hit in hits:
        values = [Text(_snippet(hit.columns[name])) for name in names]
        table.add_row(f"{hit.score:.4f}", Text(_flat(hit.id)), *values)
    console = Console()
    console.print(table)
    console.print()


def _flat(value: Any) -> str:
    """A value on one line."""
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "" if value is None else " ".join(shown.split())


def _snippet(value: Any) -> str:
    flat = _flat(value)
    return flat if len(flat) <= SNIPPET_CHARACTERS else flat[: SNIPPET_CHARACTERS - 1] + "…"
