"""Masked next-token prediction: a hidden token is predicted from the output one position before it.

The first step of LLM2Vec (BehnamGhader et al., 2024, arXiv:2404.05961) once attention is open both ways. The model is
the stock causal one with its output layer: its own loss, which shifts labels by one, is this objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset as HubDataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from llm2vec_fast.acceleration.loss import with_scores
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.positions import within_positions
from llm2vec_fast.training.arguments import MntpArguments
from llm2vec_fast.training.masking import IGNORED, mask_id_of, mask_tokens
from llm2vec_fast.training.models import load_model
from llm2vec_fast.training.packing import filled
from llm2vec_fast.training.run import ROWS, StageTrainer, means, run
from llm2vec_fast.training.sampling import NO_ROW, DrawnAnew, NextEpoch, present
from llm2vec_fast.training.texts import notifier, read_texts_of, tokenise
from llm2vec_fast.training.vocabulary import embedding_rows


class MntpCollator:
    """Sequences to one packed batch with hidden tokens.

    Args:
        tokenizer: gives the id that hides a token, and the vocabulary.
        masking, mask_token, probability: see `MntpArguments`.
        rows: of the model's embedding, where the tokenizer may have more tokens.

    Raises:
        UserError: see `mask_id_of`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        masking: str = "default",
        mask_token: str = "blank",
        probability: float = 0.2,
        rows: int | None = None,
    ) -> None:
        self._mask_id = mask_id_of(tokenizer, mask_token, rows)
        self._vocabulary = len(tokenizer) if rows is None else min(len(tokenizer), rows)
        self._masking, self._probability = masking, probability

    def __call__(self, rows: Sequence[dict[str, Any] | None]) -> dict[str, Tensor]:
        """A row a sequence (``input_ids``, ``special``, ``row``, ``seed``) to one batch: ``input_ids``, ``labels`` and
        ``position_ids``, which restart with each sequence, all (1, T), and ``rows`` (N,); int64.

        Of no rows it holds one token without a label: each of several processes runs the model in every step.
        """
        rows = present(rows)
        masked = [self._masked(row) for row in rows] or [(torch.tensor([0]), torch.tensor([IGNORED]))]
        positions = SequenceLayout.from_lengths([len(ids) for ids, _ in masked]).position_ids
        return {
            "input_ids": torch.cat([ids for ids, _ in masked])[None],
            "labels": torch.cat([labels for _, labels in masked])[None],
            "position_ids": positions.view(1, -1),
            ROWS: torch.tensor([row["row"] for row in rows]),
        }

    def _masked(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        special = torch.tensor(row["special"], dtype=torch.bool)
        special[0] = True  # no output comes before a sequence's first token
        return mask_tokens(
            torch.tensor(row["input_ids"]), special, self._mask_id, self._vocabulary,
            probability=self._probability, masking=self._masking, generator=torch.Generator().manual_seed(row["seed"]),
        )  # fmt: skip


class Sequences(DrawnAnew):
    """Tokenised sequences, each with the seed of its hidden tokens: another one in every epoch.

    What is hidden then depends neither on batch mates nor on the process that makes the batch, and a run that goes on
    from a checkpoint hides what the uninterrupted one would have hidden.
    """

    def __init__(self, tokens: HubDataset, seed: int) -> None:
        super().__init__()
        self._tokens, self._seed = tokens, seed

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """A row of `MntpCollator`; None for `NO_ROW`."""
        if index == NO_ROW:
            return None
        return {**self._tokens[index], "row": index, "seed": hash((self._seed, self.epoch, index)) % 2**63}


class MntpTrainer(StageTrainer):
    """Evaluation adds the accuracy on hidden tokens, every one of which counts the same, as it does in the loss."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch; see transformers' Trainer. Where chance hid no token of a step, it is zero."""
        count = None if num_items_in_batch is None else num_items_in_batch.clamp(min=1)
        return super().compute_loss(model, filled(inputs), return_outputs, num_items_in_batch=count)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, dict[str, Tensor], Tensor]:
        """Sums over the batch's hidden tokens of what they lose, and of those predicted right; and their number."""
        inputs = self._prepare_inputs({name: x for name, x in inputs.items() if name != ROWS})
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, output_scores=True, use_cache=False)
        if "log_probs" not in outputs:  # a head that `accelerate` left alone
            outputs = with_scores(outputs, inputs["labels"])
        sums = {"loss": -outputs.log_probs.sum()[None], "accuracy": outputs.correct.float().sum()[None]}
        return None, sums, (inputs["labels"] != IGNORED).sum()[None]


def train_mntp(arguments: MntpArguments, callbacks: Sequence[TrainerCallback] = ()) -> TrainOutput:
    """Train an adapter (or all weights) and write an encoder into ``output_dir``, which `LLM2Vec` loads.

    An interrupted run goes on from its last checkpoint in ``output_dir``.

    Raises:
        UserError: the model, the texts or the settings do not allow it; the message says what to do.
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint is kept.
    """
    stage = load_model(arguments, head=True)
    length = within_positions(stage.model, arguments.max_seq_length)
    rows = embedding_rows(stage.model)
    collator = MntpCollator(
        stage.tokenizer, arguments.data_collator_type, arguments.mask_token_type, arguments.mlm_probability, rows
    )
    datasets = {
        name: Sequences(_tokens(name, stage.tokenizer, arguments, length, rows), arguments.seed_of_data)
        for name in ("train", "validation")
        if getattr(arguments, f"{name}_file")
    }
    trainer = MntpTrainer(
        stage.model,
        arguments,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("validation"),
        data_collator=collator,
        compute_metrics=means,
        callbacks=[NextEpoch(datasets["train"]), *callbacks],
    )
    return run(trainer, arguments, stage)


def _tokens(
    name: str, tokenizer: PreTrainedTokenizerBase, arguments: MntpArguments, length: int, rows: int
) -> HubDataset:
    files = getattr(arguments, f"{name}_file")
    with arguments.main_process_first(desc="tokenising"):  # the others read what it has put on disk
        texts = read_texts_of(arguments, files, validation=name == "validation")
        return tokenise(
            texts, tokenizer, length, line_by_line=arguments.line_by_line, rows=rows, name=f"{name}_file",
            notify=notifier(arguments),
        )  # fmt: skip
