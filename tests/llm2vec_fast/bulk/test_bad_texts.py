"""Texts that a real encoder cannot embed become error rows with its reason, and the job goes on to its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_encoder import FakeEncoder
from folders import errors, ids
from reference_data import FOLDER

from llm2vec_fast import LLM2Vec
from llm2vec_fast.bulk.job import Outcome
from llm2vec_fast.errors import UserError

Run = Callable[..., Outcome]


@pytest.fixture
def encoder() -> LLM2Vec:
    return LLM2Vec.from_pretrained(FOLDER / "llama", dtype="bfloat16", device="cpu")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{'<<new>>' if i == 12 else 'z' if i == 13 else 'text'} number {i}\n" for i in range(25)))
    return path


def test_each_bad_text_costs_its_own_row(run: Run, lines: Path, encoder: LLM2Vec, tmp_path: Path) -> None:
    token = encoder.tokenize(["z"])["input_ids"][0, -1]
    with torch.no_grad():
        encoder.model.get_input_embeddings().weight[token] = torch.nan
    encoder.tokenizer.add_tokens(["<<new>>"])
    outcome = run(lines, encoder=encoder)
    assert (outcome.rows, outcome.bad_rows) == (23, 2)
    reasons = {line["row"]: line["reason"] for line in errors(tmp_path / "out")}
    assert reasons.keys() == {13, 14}
    assert "token '<<new>>' has the id 384" in reasons[13]
    assert reasons[14] == "the embedding is not finite, in float32 too"
    assert len(ids(tmp_path / "out")) == 23


def test_memory_that_runs_out_ends_no_job(
    run: Run, tmp_path: Path, encoder: LLM2Vec, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.nn.functional.embedding

    def embedding(tokens: torch.Tensor, weight: torch.Tensor, *args: object) -> torch.Tensor:
        if tokens.numel() > 60:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.")
        return real(tokens, weight, *args)

    monkeypatch.setattr(torch.nn.functional, "embedding", embedding)
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{'a long text ' * (40 if i == 7 else 1)}{i}\n" for i in range(30)))
    outcome = run(path, encoder=encoder)
    assert (outcome.rows, outcome.bad_rows) == (29, 1)
    (line,) = errors(tmp_path / "out")
    assert line["row"] == 8
    assert "memory ran out on this text alone" in line["reason"]


def test_a_job_goes_on_with_another_token_budget(run: Run, lines: Path) -> None:
    """Sensible after memory ran out, and of no weight for the results."""
    with pytest.raises(UserError, match="give a smaller --token-budget or another --device; the same --output takes"):
        run(lines, token_budget=1000, encoder=FakeEncoder(broken=MemoryError()))
    assert run(lines, token_budget=64).rows == 25
