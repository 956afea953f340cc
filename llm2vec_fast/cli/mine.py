"""`llm2vec-fast mine`: hard negatives for training pairs, found with an encoder."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from llm2vec_fast.cli import embed_options as option
from llm2vec_fast.cli.stopping import stop_on_signals

CHOICE = "What is a hard negative"


def mine(
    pairs: Annotated[
        list[str],
        typer.Argument(
            metavar="PAIRS",
            help="Files, folders and quoted globs with a query and its document a row: .jsonl, .json, .csv, .tsv, "
            ".parquet; all but .parquet also as .gz, .bz2, .xz, .zst.",
            show_default=False,
        ),
    ],
    model: option.Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="New jsonl or parquet file; FILE.mining stands beside it until the job is done.",
            rich_help_panel=option.WRITING,
            show_default=False,
        ),
    ],
    negatives: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most hard negatives of a row.", rich_help_panel=CHOICE)
    ] = 7,
    share: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="A negative's cosine is below this share of that of the row's own document.",
            rich_help_panel=CHOICE,
        ),
    ] = 0.95,
    skip: Annotated[
        int, typer.Option(min=0, metavar="N", help="Leave out the N nearest of those.", rich_help_panel=CHOICE)
    ] = 0,
    documents: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Further documents to search, files, folders and globs, .txt too; may be given several times.",
            rich_help_panel=option.READING,
        ),
    ] = None,
    text_column: option.TextColumn = "text",
    query_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column with the query.", rich_help_panel=option.READING)
    ] = "query",
    positive_column: Annotated[
        str,
        typer.Option(metavar="NAME", help="Column with its document, or a list.", rich_help_panel=option.READING),
    ] = "positive",
    id_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Texts of rows of the same id are no negatives for their queries; nor are those of the same query.",
            rich_help_panel=option.READING,
            show_default=False,
        ),
    ] = None,
    csv_delimiter: option.CsvDelimiter = None,
    csv_quote: option.CsvQuote = None,
    csv_escape: option.CsvEscape = None,
    revision: option.Revision = None,
    adapter: option.Adapter = None,
    adapter_revision: option.AdapterRevision = None,
    causal: option.Causal = False,
    pooling: option.Pooling = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Put before every query; pooling leaves it out.", rich_help_panel=option.MODEL
        ),
    ] = None,
    document_instruction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The same before documents.", rich_help_panel=option.MODEL)
    ] = None,
    max_length: option.MaxLength = None,
    doc_max_length: option.DocMaxLength = None,
    dtype: option.Dtype = "auto",
    device: option.Device = None,
    token_budget: option.TokenBudget = None,
) -> None:
    """Find hard negatives for training pairs, exactly; go on where it was stopped.

    Searched are the documents of all pairs, and further ones. The output has
    the columns of the input, and the negatives, nearest first: what
    `llm2vec-fast train contrastive` reads. Texts that rows share, and rows of
    one id, are never negatives of each other. Rows without a query or a
    document are left out, and listed in FILE.errors.jsonl.

    [bold]Examples[/bold]

    llm2vec-fast mine pairs.jsonl --model ./model --output mined.jsonl

    llm2vec-fast mine pairs.parquet -m ./model --adapter ./adapter \\
        -o mined.parquet --documents corpus.jsonl --negatives 4 \\
        --instruction "Given a question, find passages that answer it:"
    """
    from llm2vec_fast import mining
    from llm2vec_fast.bulk import encoding
    from llm2vec_fast.bulk.job import JobStoppedError
    from llm2vec_fast.bulk.progress import counted
    from llm2vec_fast.bulk.settings import EmbedSettings

    encoder = EmbedSettings(
        model=model,
        adapter=adapter,
        revision=revision,
        adapter_revision=adapter_revision,
        causal=causal,
        pooling=pooling,
        instruction=instruction,
        max_length=max_length,
        doc_max_length=doc_max_length,
        dtype=dtype,
        token_budget=token_budget,
        csv_delimiter=csv_delimiter,
        csv_quote=csv_quote,
        csv_escape=csv_escape,
        device=device,
    )
    settings = mining.MiningSettings(
        encoder, document_instruction, negatives, share, skip, query_column, positive_column, id_column, text_column
    )
    with stop_on_signals() as stop:
        try:
            outcome = mining.mine(
                pairs, output, settings, documents or (), load=encoding.load_encoder, stop=stop.event, notify=_say
            )
        except (mining.MiningStoppedError, JobStoppedError):
            _say(f"stopped; the same command goes on:\n  {shlex.join(['llm2vec-fast', *sys.argv[1:]])}")
            raise typer.Exit(stop.exit_code) from None
    without = f", {outcome.without:,} of them with none" if outcome.without else ""
    found = f"{counted(outcome.negatives, 'hard negative')} for {counted(outcome.rows, 'row')}"
    _say(f"done: {found}{without}: {output}")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
