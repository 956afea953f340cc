"""The adapter that comes with the library: small, safe to load, found by its name, and worth its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.fetch.smollm2 import FetchError
from benchmarks.reproduce.questions import missed
from llm2vec_fast import adapters

NAME = "smollm2-135m"
FOLDER = Path(adapters.__file__).parent / NAME


def test_it_is_small_in_half_precision_and_names_its_base() -> None:
    assert adapters.ready_adapters() == [NAME]
    weights = FOLDER / "adapter_model.safetensors"
    assert weights.stat().st_size <= 10_000_000
    assert {x.dtype for x in load_file(weights).values()} == {torch.float16}
    assert not [path for path in FOLDER.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".py")]
    config = json.loads((FOLDER / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(heading in card for heading in ("## Scores", "## Data", "## Settings"))


def test_a_name_is_a_folder_unless_there_is_one_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert adapters.adapter_source(NAME) == str(FOLDER)
    assert adapters.adapter_source("some/hub-name") == "some/hub-name"
    Path(NAME).mkdir()
    assert adapters.adapter_source(NAME) == NAME


@pytest.mark.real
def test_questions_find_the_functions_they_ask_for() -> None:
    """Among a tenth of the docstrings; `make reproduce` asks among all before it lets an adapter come here."""
    try:
        assert missed(NAME, every=10) == {}
    except FetchError as error:
        pytest.skip(str(error))
