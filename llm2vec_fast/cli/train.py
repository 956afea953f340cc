"""`llm2vec-fast train`: one stage of the recipe, from a configuration and options."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from llm2vec_fast.errors import UserError


class Stage(str, Enum):
    """The steps of the recipe."""

    mntp = "mntp"


CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(
    context: typer.Context,
    stage: Annotated[Stage, typer.Argument(help="mntp: masked next-token prediction.")],
    config: Annotated[
        Path | None,
        typer.Argument(
            help="A YAML file, or a ready one (llama-3-8b, mistral-7b, …); options, --key value, win over it."
        ),
    ] = None,
) -> None:
    """Train one stage of the recipe and write an encoder into output_dir.

    Every setting of transformers' TrainingArguments is one here, too. The same command goes on where a run ended.
    """
    try:
        from llm2vec_fast.training.arguments import MntpArguments
        from llm2vec_fast.training.config import read_arguments
        from llm2vec_fast.training.mntp import train_mntp
    except ModuleNotFoundError as error:
        raise UserError(f"training needs the package {error.name}: pip install 'llm2vec-fast[train]'") from error

    overrides = list(context.args)
    if config is not None and str(config).startswith("--"):
        overrides, config = [str(config), *overrides], None
    arguments = read_arguments(MntpArguments, config, overrides)
    result = train_mntp(arguments)
    if arguments.process_index == 0:
        print(f"trained {result.global_step:,} steps, mean loss {result.training_loss:.4f}: {arguments.output_dir}")
