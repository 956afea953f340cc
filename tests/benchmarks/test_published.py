"""What the pages show is what the results beside them say."""

import json
import re
from pathlib import Path

import pytest

import benchmarks.train.__main__ as train
from benchmarks.report import README, RESULTS_PAGE, markdown_table
from benchmarks.reproduce import table

RESULTS = Path(table.RESULTS)
CARD = README.parent / "llm2vec_fast" / "adapters" / "smollm2-135m" / "README.md"


def shown(page: Path, name: str) -> str:
    return re.search(rf"<!-- bench:{name} -->\n(.*)\n<!-- /bench:{name} -->", page.read_text(), re.S)[1]


def test_the_table_of_the_recipe_is_that_of_its_scores() -> None:
    content = json.loads((RESULTS / "reproduce" / "scores.json").read_text())
    assert shown(README, "reproduce") == table.section(content)
    scores = markdown_table([{name: row[name] for name in ("", table.STS)} for row in table.rows(content["scores"])])
    assert scores in CARD.read_text()


def test_the_tables_of_training_steps_are_those_of_their_results() -> None:
    assert shown(RESULTS_PAGE, "train") == train.page(json.loads((RESULTS / "train.json").read_text()))


@pytest.mark.parametrize("stage", ["mntp", "simcse", "contrastive"])
def test_the_log_of_each_stage_is_whole(stage: str) -> None:
    steps = [json.loads(line)["step"] for line in (RESULTS / "reproduce" / f"{stage}.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert len(steps) > 20
