"""The scores of one encoder: STS-B, and CoNLL's words by parts of speech, chunks and entities.

What can be chosen (how to pool, which output stands for a word) is chosen on STS-B dev and CoNLL valid.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fetch import conll2003, smollm2, sts_benchmark
from benchmarks.report import machine, write_json
from llm2vec_fast import LLM2Vec
from llm2vec_fast.evaluation import sts_spearman
from llm2vec_fast.loading import ADAPTER_WEIGHTS
from llm2vec_fast.training.word_level import WordLevelArguments, train_word_level

TASKS = {"pos": "accuracy", "chunk": "accuracy", "ner": "f1"}


@dataclass(frozen=True)
class Encoder:
    """A row of the table.

    Attributes:
        name: a short one, of files.
        title: the row's.
        stage: whose adapter it has, or None.
        bidirectional: False reads causally.
        poolings: what is tried on STS-B dev.
        labels_from: what is tried on CoNLL valid.
    """

    name: str
    title: str
    stage: str | None = None
    bidirectional: bool = True
    poolings: tuple[str, ...] = ("mean",)
    labels_from: tuple[str, ...] = ("same_token", "next_token")


ENCODERS = (
    Encoder("uni", "Uni: causal, untrained", None, False, ("mean", "weighted_mean"), ("same_token",)),
    Encoder("bi", "Bi: untrained", labels_from=("same_token",)),
    Encoder("mntp", "Bi + MNTP", "mntp"),
    Encoder("simcse", "Bi + MNTP + SimCSE", "simcse"),
    Encoder("contrastive", "+ contrastive on pairs", "contrastive"),
)


def sts_scores(encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Spearman × 100 on STS-B dev and test, with the pooling that is best on dev."""

    def measure() -> dict[str, Any]:
        found = {pooling: _sts(encoder, folder, pooling, "dev") for pooling in encoder.poolings}
        best = max(found, key=found.__getitem__)
        return {"pooling": best, "dev": found[best], "test": _sts(encoder, folder, best, "test")}

    return _once(folder / "scores" / f"{encoder.name}-sts.json", _adapter(encoder, folder), measure)


def word_scores(encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Accuracy or F1, × 100, on CoNLL valid and test by task, each with the output that is best on valid."""

    def measure() -> dict[str, Any]:
        return {task: _best_words(encoder, folder, task) for task in TASKS}

    return _once(folder / "scores" / f"{encoder.name}-words.json", _adapter(encoder, folder), measure)


def peer_score(folder: Path) -> dict[str, Any]:
    """Spearman × 100 of MiniLM-L6 on STS-B dev and test, for scale."""
    from benchmarks.reproduce.peer import MiniLM

    def measure() -> dict[str, Any]:
        peer = MiniLM()
        return {split: 100 * sts_spearman(peer, *_columns(split)) for split in ("dev", "test")}

    return _once(folder / "scores" / "minilm-sts.json", None, measure)


def load(encoder: Encoder, folder: Path, **options: Any) -> LLM2Vec:
    """The encoder, its adapter merged."""
    adapter = _adapter(encoder, folder)
    return LLM2Vec.from_pretrained(
        smollm2.fetch(), adapter, merge_peft=adapter is not None, enable_bidirectional=encoder.bidirectional, **options
    )


def _sts(encoder: Encoder, folder: Path, pooling: str, split: str) -> float:
    return 100 * sts_spearman(load(encoder, folder, pooling_mode=pooling), *_columns(split))


def _columns(split: str) -> tuple[list[str], list[str], list[float]]:
    first, second, scores = zip(*sts_benchmark.pairs(split), strict=True)
    return list(first), list(second), list(scores)


def _best_words(encoder: Encoder, folder: Path, task: str) -> dict[str, Any]:
    found = {label_from: _words(encoder, folder, task, label_from) for label_from in encoder.labels_from}
    best = max(found, key=lambda label_from: found[label_from]["valid"])
    return {"label_from": best, **found[best]}


def _words(encoder: Encoder, folder: Path, task: str, label_from: str) -> dict[str, float]:
    out, adapter = folder / "words" / f"{encoder.name}-{label_from}-{task}", _adapter(encoder, folder)
    shutil.rmtree(out, ignore_errors=True)  # of another adapter, perhaps
    train_word_level(
        WordLevelArguments(
            output_dir=str(out), model_name_or_path=str(smollm2.fetch()), enable_bidirectional=encoder.bidirectional,
            peft_model_name_or_path=None if adapter is None else str(adapter),
            train_file=[str(conll2003.file("train"))], validation_file=[str(conll2003.file("valid"))],
            test_file=[str(conll2003.file("test"))], label_column=str(conll2003.COLUMNS[task]),
            retroactive_labels=label_from, features_folder=str(folder / "features" / encoder.name),
            save_strategy="no", report_to="none", logging_steps=1000,
        )
    )  # fmt: skip
    results = {split: out / f"{name}_results.json" for split, name in (("valid", "validation"), ("test", "test"))}
    measure = TASKS[task]
    return {
        split: 100 * json.loads(path.read_text(encoding="utf-8"))[f"{path.stem.removesuffix('_results')}_{measure}"]
        for split, path in results.items()
    }


def _adapter(encoder: Encoder, folder: Path) -> Path | None:
    return None if encoder.stage is None else folder / encoder.stage


def _once(path: Path, adapter: Path | None, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured before of the same adapter, else measured now, and kept with where and when."""
    of = None if adapter is None else hashlib.sha256((adapter / ADAPTER_WEIGHTS).read_bytes()).hexdigest()
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("adapter") == of:
            return kept
    found = {**measure(), "adapter": of, "machine": machine()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found
