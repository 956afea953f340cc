"""`llm2vec-fast embed`: a corpus becomes a folder of embeddings."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llm2vec_fast.cli import embed_options as option
from llm2vec_fast.cli.stopping import stop_on_signals

if TYPE_CHECKING:
    from llm2vec_fast.bulk.job import JobStoppedError, Outcome


def embed(
    inputs: option.Inputs,
    model: option.Model,
    output: option.Output,
    text_column: option.TextColumn = "text",
    id_column: option.IdColumn = None,
    csv_delimiter: option.CsvDelimiter = None,
    csv_quote: option.CsvQuote = None,
    csv_escape: option.CsvEscape = None,
    revision: option.Revision = None,
    adapter: option.Adapter = None,
    adapter_revision: option.AdapterRevision = None,
    causal: option.Causal = False,
    pooling: option.Pooling = None,
    instruction: option.Instruction = None,
    max_length: option.MaxLength = None,
    doc_max_length: option.DocMaxLength = None,
    normalize: option.Normalize = False,
    truncate_dim: option.TruncateDim = None,
    output_dtype: option.OutputDtype = "float32",
    keep_columns: option.KeepColumns = "",
    rows_per_shard: option.RowsPerShard = None,
    dtype: option.Dtype = "auto",
    device: option.Device = None,
    token_budget: option.TokenBudget = None,
) -> None:
    """Embed a corpus of any size into Parquet files; go on where it was stopped.

    The output folder gets part-00000.parquet, … (id, kept columns, embedding),
    _manifest.json (settings, hashes, checksums) and, for rows that cannot be
    embedded, _errors.jsonl (file, row, line, id, reason). The job may be stopped at
    any moment: the same command goes on after the last finished part, and makes
    damaged ones again. Other inputs or settings are refused in the same folder,
    but for --device and --token-budget, which decide no more than last bits.

    [bold]Examples[/bold]

    llm2vec-fast embed corpus.txt --model ./model --output vectors

    llm2vec-fast embed 'dumps/*.parquet' extra/ -m ./model -o vectors \\
        --text-column body --id-column key --keep-columns body \\
        --normalize --output-dtype float16

    [bold]Exit code[/bold]

    0  done; rows that were left out are in _errors.jsonl
    1  not done, nothing could be embedded, or a file is damaged in part
    2  the command line is wrong
    130, 143  stopped by Ctrl-C, by SIGTERM
    """
    from llm2vec_fast.bulk import encoding, job
    from llm2vec_fast.bulk.progress import counted
    from llm2vec_fast.bulk.settings import EmbedSettings

    settings = EmbedSettings(
        model=model,
        adapter=adapter,
        revision=revision,
        adapter_revision=adapter_revision,
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
        csv_delimiter=csv_delimiter,
        csv_quote=csv_quote,
        csv_escape=csv_escape,
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
        places = counted(outcome.damaged, "damaged place")
        _say(f"{places} in the input could not be read: see {output / '_errors.jsonl'}")
        raise typer.Exit(1)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _how_to_go_on(stopped: JobStoppedError) -> str:
    from llm2vec_fast.bulk.progress import counted

    verb = "is" if stopped.parts == 1 else "are"
    kept = f"{counted(stopped.parts, 'finished part')} ({counted(stopped.rows, 'row')}) {verb} kept"
    return f"stopped: {kept}; the same command goes on:\n  {shlex.join(['llm2vec-fast', *sys.argv[1:]])}"


def _summary(outcome: Outcome, output: Path) -> str:
    from llm2vec_fast.bulk.progress import counted, duration

    left_out = f", {outcome.bad_rows:,} left out ({output / '_errors.jsonl'} says why)" if outcome.bad_rows else ""
    rows, parts = counted(outcome.rows, "row"), counted(outcome.parts, "part")
    holds = f"{rows} × {outcome.dimension} in {parts} of {output}{left_out}"
    if outcome.already_finished:
        return f"already finished: {holds}"
    rate = outcome.tokens_now / outcome.seconds if outcome.seconds else 0.0
    return (
        f"done: {holds}; this run: {counted(outcome.rows_now, 'row')}, {outcome.tokens_now:,} tokens in "
        f"{duration(outcome.seconds)}, {rate:,.0f} tokens/s, {outcome.padding:.1%} padding"
    )
