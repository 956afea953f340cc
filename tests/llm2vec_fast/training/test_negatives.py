"""What in-batch negatives a query keeps, and what is told of those that it does not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from llm2vec_fast.training.arguments import ContrastiveArguments
from llm2vec_fast.training.contrast import ContrastiveTrainer, load_embedding_model
from llm2vec_fast.training.contrastive import PairCollator, train_contrastive
from llm2vec_fast.training.embedding import Embedded
from llm2vec_fast.training.negatives import share_left_out
from llm2vec_fast.training.pairs import Pairs

Settings = Callable[..., dict[str, object]]


@pytest.fixture
def given(settings: Settings) -> Settings:
    """Arguments of a short run."""
    return lambda **changes: settings(**{"warmup_steps": 0, "max_steps": 1, "save_strategy": "no", **changes})


def written(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("alone", [True, False])
def test_rows_that_share_documents_in_a_chain_are_negatives_but_of_their_neighbours(
    given: Settings, chain: str, alone: bool
) -> None:
    """Against a product, a mask by the texts themselves, and cross-entropy."""
    arguments = ContrastiveArguments(**given(train_file=[chain], scale=5.0))
    data, (stage, tokenizer) = Pairs([chain], arguments), load_embedding_model(arguments)
    trainer = ContrastiveTrainer(stage, arguments, [30], train_dataset=data)
    rows = [data[i] for i in (3, 4, 5, 6, 20, 21, 29, 0)]
    batch = PairCollator(tokenizer, alone)(rows)
    texts = [row["positive"][1] for row in rows]
    own = [json.loads(line)["positive"] for line in Path(chain).read_text().splitlines()]
    wrong = torch.tensor([[texts[j] in own[row["row"]] and i != j for j in range(8)] for i, row in enumerate(rows)])
    assert 0 < wrong.sum() < 8
    embedded = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    loss = trainer._loss(Embedded(embedded, None), 8, batch["ids"], batch["known"])
    cosines = normalize(embedded[:8].double()) @ normalize(embedded[8:].double()).T
    expected = cross_entropy((5.0 * cosines).masked_fill(wrong, -torch.inf), torch.arange(8))
    torch.testing.assert_close(loss.double(), expected)


def test_the_share_of_pairs_that_are_no_negatives_is_told(
    given: Settings, chain: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 29 other rows two are neighbours, and half of the time the document that is shared is drawn for one."""
    other = written(tmp_path / "other.jsonl", *({"query": f"cat {i}", "positive": f"sat {i}"} for i in range(30)))
    train_contrastive(ContrastiveArguments(**given(train_file=[other, chain])))
    told = [line for line in caplog.messages if "no negatives" in line]
    assert len(told) == 1
    share = re.fullmatch(rf"{chain}: ([\d.]+) % of the pairs of a query and another row's document belong .*", told[0])
    assert 1 < float(share[1]) < 6
    assert "teaches nothing" not in caplog.text


def test_steps_without_a_negative_are_told_once(
    given: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of one document: in training, and in evaluation."""
    file = written(tmp_path / "rows.jsonl", *({"query": f"cat {i}", "positive": "sat"} for i in range(16)))
    changes = {"max_steps": 3, "train_file": [file], "validation_file": [file]}
    train_contrastive(ContrastiveArguments(**given(**changes)))
    assert f"{file}: 100.0 % of the pairs" in caplog.text
    assert [line[:21] for line in caplog.messages if "teaches nothing" in line] == ["step 1 teaches nothin"]
    assert "eval_loss is 0: no batch of the validation files leaves a query a negative" in caplog.text


def test_the_share_is_that_of_all_ordered_pairs() -> None:
    assert share_left_out([1, 1, 2, 3]) == 2 / 12
    assert share_left_out([1, 2, 3], [[2], [], [1, 3]]) == 2 / 6
    assert share_left_out([1]) == share_left_out([]) == 0
