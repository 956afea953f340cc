"""`llm2vec-fast embed`: a corpus becomes a folder of embeddings."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llm2vec_fast.cli.stopping import stop_on_signals

if TYPE_CHECKING:
    from llm2vec_fast.bulk.job import JobStoppedError, Outcome

READING = "What is read"
MODEL = "Model"
WRITING = "What is written"
RUNNING = "Running"


def embed(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="Files, folders (searched recursively) and quoted globs: .txt (a text a line), .jsonl, .csv, .tsv, "
            ".parquet; all but .parquet also as .gz, .bz2, .xz.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Model folder, GGUF file, or name on the Hugging Face hub.",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="New folder, or that of the same job to go on with.",
            rich_help_panel=WRITING,
            show_default=False,
        ),
    ],
    text_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column or field with the text.", rich_help_panel=READING)
    ] = "text",
    id_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column or field with the id. Default: FILE:ROW, the first row is 1 (a header line is none), FILE "
            "is the path below the folder that all inputs share.",
            rich_help_panel=READING,
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="LoRA adapter to merge into the model.", rich_help_panel=MODEL),
    ] = None,
    causal: Annotated[
        bool,
        typer.Option(
            "--causal", help="Keep the decoder's causal attention instead of both ways.", rich_help_panel=MODEL
        ),
    ] = False,
    pooling: Annotated[
        Literal["mean", "weighted_mean", "eos_token", "last_token", "bos_token"] | None,
        typer.Option(
            metavar="MODE",
            help="mean, weighted_mean, eos_token, last_token or bos_token. Default: the model folder's own, else mean.",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Put before every text; pooling leaves it out.", rich_help_panel=MODEL),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Cut instruction and text together to this. Default: the model folder's own, else 512.",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    doc_max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Cut the text alone to this. Default: the model folder's own, else 400.",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize/--no-normalize", help="Scale embeddings to length 1.", rich_help_panel=WRITING)
    ] = False,
    truncate_dim: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Keep the first N dimensions (before normalising).", rich_help_panel=WRITING
        ),
    ] = None,
    output_dtype: Annotated[
        Literal["float32", "float16"], typer.Option(metavar="TYPE", help="float32 or float16.", rich_help_panel=WRITING)
    ] = "float32",
    keep_columns: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Columns to keep beside the embedding, as strings: NAME,NAME,… Keep the text, and search shows it.",
            rich_help_panel=WRITING,
            show_default=False,
        ),
    ] = "",
    rows_per_shard: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="ROWS",
            help="Rows of a part, which is what a stop can cost. Default: 4096 on a CPU, else 32768.",
            rich_help_panel=WRITING,
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            metavar="TYPE",
            help="auto, float32, bfloat16 or float16, to compute in. auto is bfloat16 where that is fast: see doctor.",
            rich_help_panel=RUNNING,
        ),
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="cpu, cuda, cuda:1, … Default: an accelerator if there is one.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Tokens of a forward pass. Default: by the device.",
            rich_help_panel=RUNNING,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Embed a corpus of any size into Parquet files; go on where it was stopped.

    The output folder gets part-00000.parquet, … (id, kept columns, embedding),
    manifest.json (settings, hashes, checksums) and, for rows that cannot be
    embedded, errors.jsonl (file, row, id, reason). The job may be stopped at
    any moment: the same command goes on after the last finished part. Other
    inputs or settings are refused in the same folder.

    [bold]Examples[/bold]

    llm2vec-fast embed corpus.txt --model ./model --output vectors

    llm2vec-fast embed 'dumps/*.parquet' extra/ -m ./model -o vectors \\
        --text-column body --id-column key --keep-columns body \\
        --normalize --output-dtype float16

    [bold]Exit code[/bold]

    0  done; rows that were left out are in errors.jsonl
    1  not done, nothing could be embedded, or a file is damaged in part
    2  the command line is wrong
    130, 143  stopped by Ctrl-C, by SIGTERM
    """
    from llm2vec_fast.bulk import encoding, job
    from llm2vec_fast.bulk.settings import EmbedSettings

    settings = EmbedSettings(
        model=model,
        adapter=adapter,
        causal=causal,
        pooling=pooling,
        instruction=instruction,
        normalize=normalize,
        truncate_dim=truncate_dim,
        max_length=max_length,
        doc_max_length=doc_max_length,
        dtype=dtype,
        output_dtype=output_dtype,
        token_budget=token_budget,
        rows_per_shard=rows_per_shard,
        text_column=text_column,
        id_column=id_column,
        keep_columns=tuple(name.strip() for name in keep_columns.split(",") if name.strip()),
        device=device,
    )
    with stop_on_signals() as stop:
        try:
            outcome = job.embed(inputs, output, settings, load=encoding.load_encoder, stop=stop.event, notify=_say)
        except job.JobStoppedError as stopped:
            _say(_how_to_go_on(stopped))
            raise typer.Exit(stop.exit_code) from None
    _say(_summary(outcome, output))
    if outcome.damaged:
        _say(f"{outcome.damaged:,} damaged places in the input could not be read: {output / 'errors.jsonl'} names them")
        raise typer.Exit(1)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _how_to_go_on(stopped: JobStoppedError) -> str:
    kept = f"{stopped.parts:,} finished parts ({stopped.rows:,} rows) are kept"
    return f"stopped: {kept}; the same command goes on:\n  {shlex.join(['llm2vec-fast', *sys.argv[1:]])}"


def _summary(outcome: Outcome, output: Path) -> str:
    from llm2vec_fast.bulk.progress import duration

    left_out = f", {outcome.bad_rows:,} left out ({output / 'errors.jsonl'} says why)" if outcome.bad_rows else ""
    holds = f"{outcome.rows:,} rows × {outcome.dimension} in {outcome.parts:,} parts of {output}{left_out}"
    if outcome.already_finished:
        return f"already finished: {holds}"
    rate = outcome.tokens_now / outcome.seconds if outcome.seconds else 0.0
    return (
        f"done: {holds}; this run: {outcome.rows_now:,} rows, {outcome.tokens_now:,} tokens in "
        f"{duration(outcome.seconds)}, {rate:,.0f} tokens/s, {outcome.padding:.1%} padding"
    )
