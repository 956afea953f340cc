"""Unsupervised SimCSE (Gao et al., 2021, arXiv:2104.08821): a text finds itself, embedded under other dropout.

The second step of LLM2Vec. Both views of a text ride in one packed batch; which attention weights are dropped depends
on the sequence's place in it, so the views differ. Only a text's own tokens are pooled, never padding: there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from llm2vec_fast.data.pairs import identity
from llm2vec_fast.tokenization import TextTokenizer
from llm2vec_fast.training.arguments import SimcseArguments
from llm2vec_fast.training.contrast import IDS, QUERIES, ContrastiveTrainer, load_embedding_model
from llm2vec_fast.training.negatives import some_rows, tell_share_left_out
from llm2vec_fast.training.packing import pack
from llm2vec_fast.training.run import ROWS, run
from llm2vec_fast.training.sampling import present
from llm2vec_fast.training.texts import Numbered, read_texts_of
from llm2vec_fast.training.vocabulary import require_rows_for


class SimcseCollator:
    """Texts to one packed batch that holds each of them twice; equal texts are not negatives of each other."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, rows: Sequence[dict[str, Any] | None]) -> dict[str, Tensor]:
        """A row a text (``text``, ``row``) to a batch of `ContrastiveTrainer`, of N queries and N documents."""
        rows = present(rows)
        return {
            **pack(self._tokenizer, [("", row["text"]) for row in rows], views=2),
            QUERIES: torch.tensor(len(rows)),
            IDS: torch.tensor([identity(row["text"]) for row in rows], dtype=torch.int64),
            ROWS: torch.tensor([row["row"] for row in rows]),
        }


def train_simcse(arguments: SimcseArguments, callbacks: Sequence[TrainerCallback] = ()) -> TrainOutput:
    """Train an adapter (or all weights) and write an encoder into ``output_dir``, which `LLM2Vec` loads.

    An interrupted run goes on from its last checkpoint in ``output_dir``.

    Raises:
        UserError: the model, the texts or the settings do not allow it; the message says what to do.
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint is kept.
    """
    with arguments.main_process_first(desc="reading texts"):  # the others read what it has put on disk
        texts = {
            name: Numbered(read_texts_of(arguments, files, validation=name == "validation"))
            for name, files in (("train", arguments.train_file), ("validation", arguments.validation_file))
            if files
        }
    if arguments.process_index == 0:
        rows = some_rows(len(texts["train"]))
        tell_share_left_out(", ".join(arguments.train_file), [identity(texts["train"][row]["text"]) for row in rows])
    stage, tokenizer = load_embedding_model(arguments)
    for some in texts.values():
        require_rows_for(some.texts(), tokenizer, stage.tokenizer, stage.model)
    trainer = ContrastiveTrainer(
        stage,
        arguments,
        [len(texts["train"])],
        train_dataset=texts["train"],
        eval_dataset=texts.get("validation"),
        data_collator=SimcseCollator(tokenizer),
        callbacks=callbacks,
    )
    return run(trainer, arguments, stage)
