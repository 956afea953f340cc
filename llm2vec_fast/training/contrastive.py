"""Supervised contrastive training: a query finds its document among those of the batch and hard negatives.

The third step of LLM2Vec (BehnamGhader et al., 2024, arXiv:2404.05961). Queries, documents and hard negatives ride in
one packed batch, of one data set at a time: telling data sets apart teaches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from llm2vec_fast.tokenization import TextTokenizer
from llm2vec_fast.training.arguments import ContrastiveArguments
from llm2vec_fast.training.contrast import IDS, QUERIES, ContrastiveTrainer, load_embedding_model
from llm2vec_fast.training.packing import pack
from llm2vec_fast.training.pairs import Pairs
from llm2vec_fast.training.run import ROWS, run
from llm2vec_fast.training.sampling import present
from llm2vec_fast.training.vocabulary import require_rows_for


class PairCollator:
    """Rows of `Pairs` to one packed batch: all queries, their documents, then all hard negatives."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, rows: Sequence[dict[str, Any] | None]) -> dict[str, Tensor]:
        """A batch of `ContrastiveTrainer`."""
        rows = present(rows)
        texts = [row["query"] for row in rows] + [row["positive"] for row in rows]
        ids = [row["ids"][0] for row in rows]
        for row in rows:
            texts += row["negatives"]
            ids += row["ids"][1:]
        return {
            **pack(self._tokenizer, texts),
            QUERIES: torch.tensor(len(rows)),
            IDS: torch.tensor(ids, dtype=torch.int64),
            ROWS: torch.tensor([row["row"] for row in rows]),
        }


def train_contrastive(arguments: ContrastiveArguments, callbacks: Sequence[TrainerCallback] = ()) -> TrainOutput:
    """Train an adapter (or all weights) and write an encoder into ``output_dir``, which `LLM2Vec` loads.

    An interrupted run goes on from its last checkpoint in ``output_dir``.

    Raises:
        UserError: the model, the pairs or the settings do not allow it; the message says what to do.
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint is kept.
    """
    with arguments.main_process_first(desc="reading pairs"):  # the others read what it has put on disk
        pairs = {
            name: Pairs(files, arguments, validation=name == "validation")
            for name, files in (("train", arguments.train_file), ("validation", arguments.validation_file))
            if files
        }
    stage, tokenizer = load_embedding_model(arguments)
    for some in pairs.values():
        require_rows_for(some.texts(), tokenizer, stage.tokenizer, stage.model)
    trainer = ContrastiveTrainer(
        stage,
        arguments,
        pairs["train"].sizes,
        train_dataset=pairs["train"],
        eval_dataset=pairs.get("validation"),
        data_collator=PairCollator(tokenizer),
        callbacks=callbacks,
    )
    return run(trainer, arguments, stage)
