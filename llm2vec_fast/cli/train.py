"""`llm2vec-fast train`: one stage of the recipe, from a configuration and options."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm2vec_fast.errors import UserError

if TYPE_CHECKING:
    from llm2vec_fast.training.arguments import StageArguments


class Stage(str, Enum):
    """The steps of the recipe."""

    mntp = "mntp"
    simcse = "simcse"
    contrastive = "contrastive"
    word_level = "word-level"


_HOMES = {
    Stage.mntp: ("mntp", "MntpArguments", "train_mntp"),
    Stage.simcse: ("simcse", "SimcseArguments", "train_simcse"),
    Stage.contrastive: ("contrastive", "ContrastiveArguments", "train_contrastive"),
    Stage.word_level: ("word_level", "WordLevelArguments", "train_word_level"),
}

_SCORES = ("_accuracy", "_f1", "eval_loss")  # of evaluations, as their names end

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(
    context: typer.Context,
    stage: Annotated[
        Stage,
        typer.Argument(
            help="mntp: masked next-token prediction. simcse: a text finds itself under dropout. contrastive: a query "
            "finds its document. word-level: a linear head on a frozen encoder."
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Argument(
            help="A YAML file, or a ready one (llama-3-8b, mistral-7b, …); options, --key value, win over it."
        ),
    ] = None,
    options: Annotated[bool, typer.Option("--options", help="List the stage's settings, and train nothing.")] = False,
) -> None:
    """Train one stage of the recipe and write an encoder into output_dir.

    Every setting of transformers' TrainingArguments is one here, too. The same command goes on where a run ended.
    On several GPUs: torchrun --nproc-per-node N -m llm2vec_fast train …

    [bold]Examples[/bold]

    llm2vec-fast train mntp llama-3-8b --train_file wiki.txt

    llm2vec-fast train simcse llama-3-8b --train_file sentences.txt --learning_rate 1e-5

    llm2vec-fast train contrastive --options
    """
    try:
        kind, run = _stage(stage)
        from llm2vec_fast.training.config import read_arguments
    except ModuleNotFoundError as error:
        raise UserError(f"training needs the package {error.name}: pip install 'llm2vec-fast[train]'") from error

    if options:
        _print_options(kind, config)
        return
    overrides = list(context.args)
    if config is not None and str(config).startswith("--"):
        overrides, config = [str(config), *overrides], None
    arguments = read_arguments(kind, config, overrides)
    result = run(arguments)
    if arguments.process_index == 0:
        scores = [f"{name} {value:.4f}" for name, value in result.metrics.items() if name.endswith(_SCORES)]
        told = ", ".join([f"trained {result.global_step:,} steps", f"mean loss {result.training_loss:.4f}", *scores])
        print(f"{told}: {arguments.output_dir}")


def _stage(stage: Stage) -> tuple[type[StageArguments], Callable[[Any], Any]]:
    """A stage's arguments and what runs it; importing a stage takes seconds."""
    place, arguments, function = _HOMES[stage]
    module = import_module(f"llm2vec_fast.training.{place}")
    return getattr(module, arguments), getattr(module, function)


def _print_options(kind: type[StageArguments], config: Path | None) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from llm2vec_fast.training.config import own_options, ready_configs

    console = Console()
    for name, value, text in own_options(kind, config):
        console.print(Text.assemble((f"--{name}", "bold"), f" {value}"))
        console.print(Padding(Text(text), (0, 0, 0, 4)))
    ready = ", ".join(ready_configs(kind.STAGE)) or "none"
    console.print(Text(f"\nReady configurations: {ready}.\nBeside these, all of transformers' TrainingArguments."))
