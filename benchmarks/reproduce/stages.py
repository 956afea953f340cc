"""The trained stages: each one command of llm2vec-fast, run as a user would, and gone on with where it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fetch import smollm2
from benchmarks.reproduce import pairs, texts

CONFIG = "smollm2-135m"
STAGES = ("mntp", "simcse", "contrastive")
ADAPTER = "adapter_model.safetensors"
_SECONDS = "seconds.json"  # of a stage, over all its runs


def write_texts(folder: Path) -> None:
    """The training files of every stage, written once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (("mntp", texts.paragraphs_and_sentences), ("simcse", texts.single_sentences)):
        path = folder / f"{name}.txt"
        if not path.exists():
            texts.write_lines(make(), path)
    if not (folder / "pairs").exists():
        unfinished = folder / "pairs.tmp"
        unfinished.mkdir(exist_ok=True)
        for name, found in pairs.data_sets().items():
            pairs.write(found, unfinished / f"{name}.jsonl")
        unfinished.rename(folder / "pairs")


def train_mntp(folder: Path) -> None:
    """Masked next-token prediction on paragraphs and sentences."""
    _train("mntp", folder, [str(folder / "mntp.txt")])


def train_simcse(folder: Path) -> None:
    """SimCSE on sentences, on top of it."""
    _train("simcse", folder, [str(folder / "simcse.txt")], before="mntp")


def train_contrastive(folder: Path) -> None:
    """Supervised contrastive training on mined pairs, on top of both."""
    _train("contrastive", folder, [str(path) for path in sorted((folder / "pairs").glob("*.jsonl"))], before="simcse")


def seconds_of(stage: str, folder: Path) -> float:
    """How long a stage took, all its runs together."""
    path = folder / stage / _SECONDS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else 0.0


def _train(stage: str, folder: Path, files: Sequence[str], before: str | None = None) -> None:
    if (folder / stage / ADAPTER).exists():
        return
    adapter = [] if before is None else ["--peft_model_name_or_path", str(folder / before)]
    command = [
        sys.executable, "-m", "llm2vec_fast", "train", stage, CONFIG, "--model_name_or_path", str(smollm2.fetch()),
        "--output_dir", str(folder / stage), "--report_to", "none", *adapter, "--train_file", *files,
    ]  # fmt: skip
    started = time.monotonic()
    try:
        subprocess.run(command, check=True)
    finally:
        spent = seconds_of(stage, folder) + time.monotonic() - started
        (folder / stage).mkdir(exist_ok=True)
        (folder / stage / _SECONDS).write_text(json.dumps(spent), encoding="utf-8")
