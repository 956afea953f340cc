"""The options of `llm2vec-fast embed`: what each is called and means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

READING = "What is read"
MODEL = "Model"
WRITING = "What is written"
RUNNING = "Running"

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT",
        help="Files, folders (searched recursively) and quoted globs: .txt (a text a line), .jsonl, .json, .csv, "
        ".tsv, .parquet; all but .parquet also as .gz, .bz2, .xz, .zst.",
        show_default=False,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Model folder, GGUF file, or name on the Hugging Face hub.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="New folder, or that of the same job to go on with.",
        rich_help_panel=WRITING,
        show_default=False,
    ),
]
TextColumn = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Column or field with the text; OUTER.INNER is one inside another.",
        rich_help_panel=READING,
    ),
]
IdColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column or field with the id, kept as it is. Default: FILE:ROW, the first row is 1 (a header line is "
        "none), FILE is the path below the folder that all inputs share.",
        rich_help_panel=READING,
        show_default=False,
    ),
]
CsvDelimiter = Annotated[
    str | None,
    typer.Option(
        metavar="LETTER",
        help="What parts the fields of csv and tsv files. Default: a tab in .tsv, else what fits the header.",
        rich_help_panel=READING,
        show_default=False,
    ),
]
CsvQuote = Annotated[
    str | None,
    typer.Option(
        metavar="LETTER",
        help='What is around fields of csv and tsv files, or none. Default: " in .csv, none in .tsv.',
        rich_help_panel=READING,
        show_default=False,
    ),
]
CsvEscape = Annotated[
    str | None,
    typer.Option(
        metavar="LETTER",
        help="What stands before a quote inside a field, such as \\. Default: such a quote is doubled.",
        rich_help_panel=READING,
        show_default=False,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="ADAPTER",
        help="LoRA adapter to merge into the model: a folder, a hub name, or the name of one that comes with the "
        "library (smollm2-135m).",
        rich_help_panel=MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="REVISION",
        help="Branch, tag or commit of the model, if it is on the hub. Default: main.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
AdapterRevision = Annotated[
    str | None,
    typer.Option(
        metavar="REVISION",
        help="The same of the adapter. Default: that of the model.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
Causal = Annotated[
    bool,
    typer.Option("--causal", help="Keep the decoder's causal attention instead of both ways.", rich_help_panel=MODEL),
]
Pooling = Annotated[
    Literal["mean", "weighted_mean", "mean_sqrt_len", "max", "eos_token", "last_token", "bos_token"] | None,
    typer.Option(
        metavar="MODE",
        help="mean, weighted_mean, mean_sqrt_len, max, eos_token, last_token or bos_token. "
        "Default: the model folder's own, else mean.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
Instruction = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Put before every text; pooling leaves it out.", rich_help_panel=MODEL),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="TOKENS",
        help="Cut instruction and text together to this. Default: the model folder's own, else 512.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
DocMaxLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="TOKENS",
        help="Cut the text alone to this. Default: the model folder's own, else 400.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
Normalize = Annotated[
    bool, typer.Option("--normalize/--no-normalize", help="Scale embeddings to length 1.", rich_help_panel=WRITING)
]
TruncateDim = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Keep the first N dimensions (before normalising).", rich_help_panel=WRITING),
]
OutputDtype = Annotated[
    Literal["float32", "float16"], typer.Option(metavar="TYPE", help="float32 or float16.", rich_help_panel=WRITING)
]
KeepColumns = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="Columns to keep beside the embedding, of their types: NAME,NAME,… Keep the text, and search shows it.",
        rich_help_panel=WRITING,
        show_default=False,
    ),
]
RowsPerShard = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="ROWS",
        help="Rows of a part, which is what a stop can cost. Default: 1024 on a CPU, else 32768.",
        rich_help_panel=WRITING,
        show_default=False,
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        metavar="TYPE",
        help="auto, float32, bfloat16 or float16, to compute in. auto is bfloat16 where that is fast: see doctor.",
        rich_help_panel=RUNNING,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, … Default: an accelerator if there is one.",
        rich_help_panel=RUNNING,
    ),
]
TokenBudget = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="TOKENS",
        help="Tokens of a forward pass. Default: by the device.",
        rich_help_panel=RUNNING,
        show_default=False,
    ),
]
