"""A row that the encoder raises for is left out with the reason; what it raises for every row ends the job."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_encoder import FakeEncoder
from folders import embeddings, errors, ids, manifest

from llm2vec_fast.bulk.job import JobStoppedError, Outcome
from llm2vec_fast.errors import UserError

Run = Callable[..., Outcome]
TEXTS = [f"text number {number}" for number in range(50)]


class Refusing(FakeEncoder):
    """Raises for a batch with one of these texts, after the batches before it; for every text where there are none."""

    def __init__(self, *texts: str, error: Exception | None = None) -> None:
        super().__init__(batch_rows=4)
        self.texts = set(texts)
        self.error = error or UserError("token 99 is beyond the model's 97\nrows")

    def encode(self, sentences: Any, **options: Any) -> np.ndarray:
        bad = [place for place, text in enumerate(sentences) if text in self.texts or not self.texts]
        if bad:
            super().encode(sentences[: bad[0] // 4 * 4], **options)
            raise self.error
        return super().encode(sentences, **options)


class OutOfMemory(FakeEncoder):
    """Has room for batches of 600 tokens."""

    def __init__(self, budget: int | None, message: str) -> None:
        super().__init__()
        self.token_budget = budget or 1000
        self.message = message

    def encode(self, sentences: Any, **options: Any) -> np.ndarray:
        if self.token_budget > 600:
            raise RuntimeError(self.message)
        return super().encode(sentences, **options)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("bad", [(0,), (49,), (3, 4, 17), tuple(range(20, 30))], ids=str)
def test_rows_that_the_encoder_raises_for_are_left_out_with_the_reason(
    run: Run, lines: Path, tmp_path: Path, bad: tuple[int, ...]
) -> None:
    run(lines, output="straight")
    outcome = run(lines, encoder=Refusing(*(TEXTS[place] for place in bad)))
    assert (outcome.rows, outcome.bad_rows) == (50 - len(bad), len(bad))
    assert outcome.tokens == 3 * outcome.rows, "what came to nothing counts nowhere"
    assert {error["row"]: error["reason"] for error in errors(tmp_path / "out")} == {
        place + 1: "the encoder cannot embed it: UserError: token 99 is beyond the model's 97" for place in bad
    }
    good = [place for place in range(50) if place not in bad]
    assert ids(tmp_path / "out") == [f"lines.txt:{place + 1}" for place in good]
    np.testing.assert_array_equal(embeddings(tmp_path / "out"), embeddings(tmp_path / "straight")[good])


def test_what_the_encoder_raises_for_every_row_ends_the_job(run: Run, lines: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="token 99"):
        run(lines, encoder=Refusing())
    assert not errors(tmp_path / "out")
    assert run(lines).rows == 50


def test_an_encoder_that_breaks_down_does_not_turn_rows_into_errors(run: Run, lines: Path, tmp_path: Path) -> None:
    class BreakingDown(FakeEncoder):
        def encode(self, sentences: Any, **options: Any) -> np.ndarray:
            if self.calls == 2:
                raise RuntimeError("CUDA error: device-side assert triggered")
            return super().encode(sentences, **options)

    with pytest.raises(RuntimeError, match="device-side assert"):
        run(lines, encoder=BreakingDown())
    assert not errors(tmp_path / "out")


def test_a_stop_within_a_row_that_is_looked_for_is_a_stop(run: Run, lines: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    class Stopping(Refusing):
        def encode(self, sentences: Any, **options: Any) -> np.ndarray:
            if len(sentences) == 2:
                stop.set()
            return super().encode(sentences, **options)

    with pytest.raises(JobStoppedError):
        run(lines, encoder=Stopping(TEXTS[23]), stop=stop)
    assert not errors(tmp_path / "out")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
    ids=["cuda", "linux", "windows", "cublas"],
)
def test_the_remedy_for_memory_that_ran_out_works_in_the_same_folder(
    run: Run, lines: Path, tmp_path: Path, message: str
) -> None:
    def load(settings: Any) -> FakeEncoder:
        return OutOfMemory(settings.token_budget, message)

    run(lines, rows_per_shard=25, load=lambda settings: FakeEncoder())
    (tmp_path / "out" / "part-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"with 1000 tokens .* smaller --token-budget .* same --output takes it"):
        run(lines, rows_per_shard=25, load=load)
    said: list[str] = []
    assert run(lines, rows_per_shard=25, load=load, token_budget=256, notify=said.append).rows == 50
    assert "token budget 1000 -> 256: new parts may differ from finished ones in their last bits" in said
    found = manifest(tmp_path / "out")
    budgets = [found["environments"][part["environment"]]["token budget"] for part in found["parts"]]
    assert budgets == [1000, 256]


def test_another_processor_is_said(run: Run, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm2vec_fast.bulk import encoding

    run(lines)
    found = manifest(tmp_path / "out")["environments"]
    assert found[0]["device"] == "cpu"
    assert {"device name", "instruction set", "threads", "torch"} <= found[0].keys()
    (tmp_path / "out" / "part-00001.parquet").unlink()
    other = {**encoding.describe_device("cpu"), "threads": 96, "instruction set": "ZVECTOR"}
    monkeypatch.setattr(encoding, "describe_device", lambda device: other)
    said: list[str] = []
    run(lines, notify=said.append)
    assert "instruction set " in said[-1]
    assert "-> ZVECTOR; threads " in said[-1]
    assert said[-1].endswith("-> 96: new parts may differ from finished ones in their last bits")
