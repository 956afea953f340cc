"""The command line: one file a verb. Verbs parse, call and print; what is slow to import they import when run."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from llm2vec_fast.cli import train as training
from llm2vec_fast.cli.doctor import doctor
from llm2vec_fast.cli.embed import embed
from llm2vec_fast.cli.leaving import leave_group
from llm2vec_fast.cli.mine import mine
from llm2vec_fast.cli.search import search
from llm2vec_fast.cli.verify import verify
from llm2vec_fast.errors import UserError

DEBUG_VARIABLE = "LLM2VEC_FAST_DEBUG"
VERBS = (embed, search, verify, mine, doctor)


def main() -> None:
    """The `llm2vec-fast` command. An error of the user's making is one sentence on stderr, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a letter that the console has not is shown as its escape
            stream.reconfigure(errors="backslashreplace")
    try:
        _run()
    except SystemExit as end:
        leave_group(end.code)
        raise


def _run() -> None:
    """Raises SystemExit, however it ends."""
    try:
        application()(prog_name="llm2vec-fast")
    except UserError as error:
        _fail(str(error))
    except Exception as error:
        _fail(f"unexpected {type(error).__name__}: {error} (`llm2vec-fast --debug …` shows where)")


def application() -> typer.Typer:
    """The command line as a typer application."""
    app = typer.Typer(
        help="Turn decoder-only language models into text encoders, and embed whole corpora with them.",
        epilog="Try: llm2vec-fast embed --help",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for verb in VERBS:
        app.command()(verb)
    app.command(context_settings=training.CONTEXT)(training.train)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("llm2vec-fast"))
        raise typer.Exit


def _options(
    debug: Annotated[bool, typer.Option("--debug", help=f"Show an error's traceback; {DEBUG_VARIABLE}=1 does too.")] = (
        False
    ),
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


def _fail(sentence: str) -> None:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    print(f"llm2vec-fast: {sentence}", file=sys.stderr)
    sys.exit(1)
