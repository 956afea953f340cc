"""The last stage's adapter as it ships with the library: float16, with a model card."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.fetch.libraries import PACKAGES
from benchmarks.report import markdown_table
from benchmarks.reproduce.questions import missed
from benchmarks.reproduce.stages import ADAPTER, CONFIG, STAGES, seconds_of
from benchmarks.reproduce.table import STS, rows
from llm2vec_fast import adapters
from llm2vec_fast.saving import written_beside
from llm2vec_fast.training.config import ready_configs

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MOST_BYTES = 10_000_000
_KEPT = ("adapter_config.json", "llm2vec_config.json")

_CARD = """---
base_model: {base}
library_name: peft
license: apache-2.0
language: en
tags: [llm2vec, sentence-similarity, feature-extraction]
---

# SmolLM2-135M-Instruct as a text encoder

A LoRA adapter of rank {rank} (float16) that makes [{base}](https://huggingface.co/{base})
a text encoder, trained by `make reproduce` with the configurations `{config}` of llm2vec-fast, on two CPU cores:
attention both ways, masked next-token prediction, SimCSE, then contrastive training on pairs; one adapter holds all
three.

    encoder = LLM2Vec.from_pretrained("{base}", "{config}", merge_peft=True)

It reads English, up to 128 tokens as it was trained, and wants no instruction. It was trained in {hours:.1f} hours on
about 100,000 short texts: it shows the recipe, and does not compete with encoders trained on millions of pairs.

## Scores

STS-B, Spearman × 100, after each stage, with mean pooling (of the causal model: weighted mean, the better one on STS-B
dev); nothing of it was trained on:

{scores}

## Data

- Masked next-token prediction and SimCSE: paragraphs of 206 English Wikipedia pages (CC BY-SA) that come with gensim's
  tests, and the sentences of nlp-corpus (MIT); for the former every other text with a space around words and marks.
- Pairs: WordNet 3.1 (word and gloss, example and the same with a synonym), Wikipedia (titles of page and section with
  how the section begins, neighbouring sentences), and Python libraries (a function's name and its docstring, how one
  begins and what it goes on with): {libraries}
  (MIT, BSD, ISC, Apache-2.0).
- Left out: every text that equals one of STS-B or CoNLL-2003, and every pair with a whole sentence of theirs or of
  Python's own docstrings, which `make demo` searches; quotations that a library changed, or that were cut, stay.
- The kinds of pairs were chosen so that the demo's questions are answered: the demo is no test of this adapter.

## Settings

{settings}
"""


def release(folder: Path) -> None:
    """Put the adapter into the library's own package, if it finds what the demo asks for; else the old one stays.

    Either way it lies in the folder's ``release``, written beside first and then renamed.

    Raises:
        ValueError: it takes more than 10 MB.
        FetchError: the model that is asked cannot be had.
    """
    if not (folder / STAGES[-1] / ADAPTER).exists():
        return
    candidate, package = folder / "release", Path(adapters.__file__).parent / CONFIG
    _write(folder, candidate)
    wrong = missed(candidate)
    for question, hits in wrong.items():
        print(f"{question!r} finds {', '.join(hits)}: the library keeps its adapter; this one is in {candidate}")
    if not wrong:
        with written_beside(package) as unfinished:
            shutil.copytree(candidate, unfinished, dirs_exist_ok=True)


def _write(folder: Path, candidate: Path) -> None:
    """The last stage's adapter in float16, with its card."""
    trained = folder / STAGES[-1]
    weights = {name: x.to(torch.float16).contiguous() for name, x in load_file(trained / ADAPTER).items()}
    size = sum(x.nbytes for x in weights.values())
    if size > MOST_BYTES:
        raise ValueError(f"the adapter takes {size:,} bytes, over {MOST_BYTES:,}: lower saved_rank")
    with written_beside(candidate) as unfinished:
        save_file(weights, unfinished / ADAPTER)
        for name in _KEPT:
            shutil.copy(trained / name, unfinished)
        config = _named_base(unfinished / "adapter_config.json")
        (unfinished / "README.md").write_text(_card(folder, config["r"]), encoding="utf-8")


def _named_base(path: Path) -> dict[str, Any]:
    """The adapter's configuration, with the name its base was published under rather than a folder's."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": BASE, "target_modules": sorted(config["target_modules"])}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return config


def _card(folder: Path, rank: int) -> str:
    scores = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "scores").glob("*-sts.json")
    }
    settings = [f"    # {stage}\n{textwrap.indent(_settings(stage), ' ' * 4)}" for stage in STAGES]
    return _CARD.format(
        base=BASE, config=CONFIG, rank=rank, libraries=", ".join(package.name for package in PACKAGES),
        hours=sum(seconds_of(stage, folder) for stage in STAGES) / 3600,
        scores=markdown_table([{name: row[name] for name in ("", STS)} for row in rows(scores)]),
        settings="\n\n".join(settings),
    )  # fmt: skip


def _settings(stage: str) -> str:
    """What the stage's ready configuration says, without its comments and paths."""
    lines = ready_configs(stage)[CONFIG].read_text(encoding="utf-8").splitlines()
    unsaid = ("#", "model_name_or_path", "peft_model_name_or_path", "output_dir", "save_")
    return "\n".join(line.split(" #")[0] for line in lines if not line.startswith(unsaid))
