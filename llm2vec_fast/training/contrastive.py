"""Supervised contrastive training: a query finds its document among those of the batch and hard negatives.

The third step of LLM2Vec (BehnamGhader et al., 2024, arXiv:2404.05961). Queries, documents and hard negatives ride in
one packed batch, of one data set at a time: telling data sets apart teaches nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from llm2vec_fast.kernels.contrastive import NO_ID
from llm2vec_fast.tokenization import TextTokenizer
from llm2vec_fast.training.arguments import ContrastiveArguments
from llm2vec_fast.training.contrast import IDS, KNOWN, QUERIES, ContrastiveTrainer, load_embedding_model
from llm2vec_fast.training.negatives import some_rows, tell_share_left_out
from llm2vec_fast.training.packing import pack
from llm2vec_fast.training.pairs import Pairs
from llm2vec_fast.training.run import ROWS, run
from llm2vec_fast.training.sampling import present
from llm2vec_fast.training.vocabulary import require_rows_for


class PairCollator:
    """Rows of `Pairs` to one packed batch: all queries, their documents, then all hard negatives."""

    def __init__(self, tokenizer: TextTokenizer, alone: bool = False) -> None:
        """``alone``: no other process adds to the batch, and ids that one row alone knows of are left out."""
        self._tokenizer, self._alone = tokenizer, alone

    def __call__(self, rows: Sequence[dict[str, Any] | None]) -> dict[str, Tensor]:
        """A batch of `ContrastiveTrainer`."""
        rows = present(rows)
        texts = [row["query"] for row in rows] + [row["positive"] for row in rows]
        ids = [row["ids"][0] for row in rows]
        for row in rows:
            texts += row["negatives"]
            ids += row["ids"][1:]
        known = [row["known"] for row in rows]
        if self._alone:
            times = Counter(chain(set(ids), *known))
            known = [[x for x in some if times[x] > 1] for some in known]
        return {
            **pack(self._tokenizer, texts),
            QUERIES: torch.tensor(len(rows)),
            IDS: torch.tensor(ids, dtype=torch.int64),
            **_known(known),
            ROWS: torch.tensor([row["row"] for row in rows]),
        }


def _known(known: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Ids in rows of one length, if there are any."""
    most = max(map(len, known), default=0)
    return {KNOWN: torch.tensor([[*some, *[NO_ID] * (most - len(some))] for some in known])} if most else {}


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
    if arguments.process_index == 0:
        _tell_share_left_out(arguments.train_file, pairs["train"])
    stage, tokenizer = load_embedding_model(arguments)
    for some in pairs.values():
        require_rows_for(some.texts(), tokenizer, stage.tokenizer, stage.model)
    trainer = ContrastiveTrainer(
        stage,
        arguments,
        pairs["train"].sizes,
        train_dataset=pairs["train"],
        eval_dataset=pairs.get("validation"),
        data_collator=PairCollator(tokenizer, arguments.world_size == 1),
        callbacks=callbacks,
    )
    return run(trainer, arguments, stage)


def _tell_share_left_out(files: Sequence[str], pairs: Pairs) -> None:
    first = 0
    for name, size in zip(files, pairs.sizes, strict=True):
        rows = [pairs[row] for row in some_rows(size, first)]
        tell_share_left_out(name, [row["ids"][0] for row in rows], [row["known"] for row in rows])
        first += size
