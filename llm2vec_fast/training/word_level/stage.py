"""The word-level stage of LLM2Vec (arXiv:2404.05961, section 3): linear probes on frozen outputs.

The encoder is frozen, so its outputs are computed once, and not in every epoch; what is trained is the head alone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.errors import UserError
from llm2vec_fast.training.checkpoints import told_if_unwritable
from llm2vec_fast.training.config import write_arguments
from llm2vec_fast.training.resuming import checkpoint_to_resume
from llm2vec_fast.training.run import ROWS, StageTrainer, means, trained
from llm2vec_fast.training.sampling import NO_ROW
from llm2vec_fast.training.texts import notifier

from .arguments import LABEL_FROM, WordLevelArguments
from .classifier import Head, save_head
from .features import word_features
from .scores import word_scores
from .sentences import Sentence, read_sentences

_FEATURES = "features"  # a folder in the output folder while a run is under way


def train_word_level(arguments: WordLevelArguments, callbacks: Sequence[TrainerCallback] = ()) -> TrainOutput:
    """Train a head and write it into ``output_dir``, with its scores; `WordClassifier` loads it.

    An interrupted run goes on from its last checkpoint in ``output_dir``.

    Raises:
        UserError: the encoder, the sentences or the settings do not allow it; the message says what to do.
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint is kept.
    """
    with told_if_unwritable(Path(arguments.output_dir)):
        return _train(arguments, callbacks)


def _train(arguments: WordLevelArguments, callbacks: Sequence[TrainerCallback]) -> TrainOutput:
    last = checkpoint_to_resume(arguments)
    files = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    notify = notifier(arguments)
    sentences = {
        name: read_sentences(some, arguments.word_column, arguments.label_column, notify)
        for name, some in files.items()
        if some
    }
    labels = sorted({label for sentence in sentences["train"] for label in sentence.labels})
    for name, some in sentences.items():
        unknown = sorted({label for sentence in some for label in sentence.labels} - set(labels))
        if unknown:
            notify(f"{name}_file has labels that train_file has not: {', '.join(unknown[:10])}")
    words, encoder = _labelled_words(arguments, sentences, labels)
    for name, some in words.items():
        if some.left_out:
            notify(
                f"{some.left_out:,} of {len(some) + some.left_out:,} words of {name}_file have no token of their own: "
                f"they are white space or beyond max_seq_length={arguments.max_seq_length}. They are not trained on, "
                "and in scores they count as wrong"
            )
    set_seed(arguments.seed)  # the head's first weights are random
    trainer = WordLevelTrainer(
        Head(words["train"].dimension, len(labels), arguments.classifier_dropout),
        arguments,
        train_dataset=words["train"],
        eval_dataset=words.get("validation"),
        data_collator=_as_it_is,
        compute_loss_func=_loss,
        compute_metrics=_mean_loss,
        callbacks=list(callbacks),
    )
    folder = Path(arguments.output_dir)
    if trainer.is_world_process_zero():
        write_arguments(arguments, folder)
    result = trained(trainer, arguments, last)
    if trainer.is_world_process_zero():  # first: an evaluation that fails loses nothing
        head = trainer.accelerator.unwrap_model(trainer.model)
        save_head(head, labels, arguments.retroactive_labels, encoder, folder)
    for name in ("validation", "test"):
        if name in words:
            scores = trainer.scores(words[name], sentences[name], labels, name)
            trainer.save_metrics(name, scores)
            result = result._replace(metrics={**result.metrics, **scores})
    if trainer.is_world_process_zero() and arguments.features_folder is None:
        shutil.rmtree(_features_folder(arguments), ignore_errors=True)
    return result


class Words(torch.utils.data.Dataset):
    """Rows of features with the number of their label; those without features, cut from long sentences, left out.
    Of `NO_ROW` there is none."""

    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        self._features, self._labels = features, labels
        self.kept = np.flatnonzero(~np.isnan(features[:, 0]))
        self.dimension, self.left_out = features.shape[1], len(features) - len(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        numbers = np.asarray(indices, dtype=np.int64)
        rows = self.kept[numbers[numbers != NO_ROW]]
        features = torch.from_numpy(self._features[rows].astype(np.float32))
        return {"features": features, "labels": torch.from_numpy(self._labels[rows]), ROWS: torch.from_numpy(rows)}


class WordLevelTrainer(StageTrainer):
    """Predicts the numbers of labels instead of their scores."""

    unit = "words"
    _seen = 0  # words, by all processes since this run began

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass; see `StageTrainer`."""
        self._seen += len(inputs["labels"]) * self.args.world_size
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, Any], start_time: float | None = None, **kwargs: Any) -> None:
        """A line of the log, with the words trained on a second."""
        if "loss" in logs and start_time is not None:
            logs = {**logs, "train_words_per_second": round(self._seen / (time.time() - start_time), 3)}
        super().log(logs, start_time, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, dict[str, Tensor], Tensor]:
        """What the batch's labelled words lose, the rows of its words and their best labels; and how many are labelled.

        Rows and best labels are as many in every batch, the last of them -1.
        """
        inputs = self._prepare_inputs(inputs)
        labels, rows = inputs["labels"], inputs[ROWS]
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = model(inputs["features"])
        spare = self.args.eval_batch_size - len(labels)
        best, rows = (F.pad(x, (0, spare), value=-1) for x in (scores.argmax(1), rows))
        loss = F.cross_entropy(scores, labels, reduction="sum")
        return None, {"loss": loss[None], "best": best, "rows": rows}, (labels >= 0).sum()[None]

    def scores(self, words: Words, sentences: Sequence[Sentence], labels: Sequence[str], name: str) -> dict[str, float]:
        """Accuracy and, of entities, F1; words that were cut off count as wrong."""
        found = self.predict(words, metric_key_prefix=name).predictions
        best = np.full(sum(len(sentence.words) for sentence in sentences), -1)
        there = found["rows"] >= 0
        best[found["rows"][there]] = found["best"][there]
        names = np.array([*labels, None], dtype=object)[best]
        ends = np.cumsum([len(sentence.words) for sentence in sentences])[:-1]
        found = word_scores([list(part) for part in np.split(names, ends)], [s.labels for s in sentences])
        metrics = {f"{name}_{key}": value for key, value in found.items()}
        metrics[f"{name}_words_cut"] = len(best) - len(words)
        self.log(metrics)
        return metrics


def _loss(scores: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy over the words of the batch, of all ranks and accumulated parts where their number is given;
    labels that training never saw, −100, are left out."""
    total = F.cross_entropy(scores, labels, reduction="sum")
    return total / ((labels >= 0).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def _mean_loss(batches: EvalPrediction) -> dict[str, float]:
    return means(EvalPrediction({"loss": batches.predictions["loss"]}, batches.label_ids))


def _labelled_words(
    arguments: WordLevelArguments, sentences: dict[str, list[Sentence]], labels: Sequence[str]
) -> tuple[dict[str, Words], dict[str, Any]]:
    """The words of each set, and what loads their encoder, which is gone when this returns."""
    given = {
        "base_model_name_or_path": _from_anywhere(arguments.model_name_or_path),
        "peft_model_name_or_path": _from_anywhere(arguments.peft_model_name_or_path),
        "revision": arguments.model_revision,
        "enable_bidirectional": arguments.enable_bidirectional,
        "max_length": arguments.max_seq_length,
        "doc_max_length": arguments.max_seq_length,
        "merge_peft": True,
    }
    number = {label: index for index, label in enumerate(labels)}
    folder = _features_folder(arguments)
    kept = LABEL_FROM if arguments.features_folder else (arguments.retroactive_labels,)  # both for the price of one
    words = {}
    with arguments.main_process_first(desc="embedding the words"):  # the others read what it has put on disk
        encoder = LLM2Vec.from_pretrained(
            **given, dtype=arguments.model_dtype, token_budget=arguments.token_budget,
            device="cpu" if arguments.use_cpu else None,
        )  # fmt: skip
        for name, some in sentences.items():
            found = word_features(encoder, [s.words for s in some], kept, folder / f"{name}.npy")
            known = [number.get(label, -100) for sentence in some for label in sentence.labels]
            words[name] = Words(found[arguments.retroactive_labels], np.array(known, dtype=np.int64))
    if not len(words["train"]):
        raise UserError(f"no word is within max_seq_length={arguments.max_seq_length}: give more")
    return words, given


def _from_anywhere(name: str | None) -> str | None:
    """A folder by its whole path, as the head names its encoder for whoever loads it; other names as they are."""
    return str(Path(name).expanduser().absolute()) if name and Path(name).expanduser().exists() else name


def _features_folder(arguments: WordLevelArguments) -> Path:
    return Path(arguments.features_folder or Path(arguments.output_dir) / _FEATURES)


def _as_it_is(words: dict[str, Tensor]) -> dict[str, Tensor]:
    return words
