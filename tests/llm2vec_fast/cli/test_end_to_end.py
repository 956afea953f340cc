"""The command line with the real encoder on a tiny checkpoint gives what LLM2Vec.encode gives."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from folders import embeddings, errors, flip_a_bit, ids, manifest, parts

from llm2vec_fast import LLM2Vec

Result = subprocess.CompletedProcess[str]
Command = Callable[..., Result]
CHECKPOINTS = Path(__file__).parents[2] / "data" / "reference"
TEXTS = [f"{'a long tail of words ' * (number % 9)}and the number {number}" for number in range(60)]


@pytest.fixture
def command(invoke: Command) -> Command:
    """A command that must succeed."""

    def command(*arguments: object) -> Result:
        result = invoke(*arguments)
        assert result.returncode == 0, result.stderr
        return result

    return command


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"key": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)))
    return path


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        (["--causal", "--pooling", "last_token"], {"enable_bidirectional": False, "pooling_mode": "last_token"}),
        (["--adapter", CHECKPOINTS / "llama-lora"], {"peft_model_name_or_path": CHECKPOINTS / "llama-lora"}),
        (["--doc-max-length", "5", "--max-length", "9"], {"doc_max_length": 5, "max_length": 9}),
    ],
    ids=["default", "causal-last", "adapter", "short"],
)
def test_embed_writes_what_encode_returns(
    command: Command, corpus: Path, tmp_path: Path, options: list[object], settings: dict[str, object]
) -> None:
    out = tmp_path / "out"
    job = ["--model", CHECKPOINTS / "llama", "--output", out, "--dtype", "float32", "--id-column", "key"]
    common = ["--instruction", "Find it: ", "--normalize", "--rows-per-shard", "25"]
    command("embed", corpus, *job, *common, *options)
    encoder = LLM2Vec.from_pretrained(CHECKPOINTS / "llama", dtype="float32", merge_peft=True, **settings)
    expected = encoder.encode(TEXTS, instruction="Find it: ", normalize=True, convert_to_numpy=True)
    assert ids(out) == list(range(60))
    np.testing.assert_allclose(embeddings(out), expected, atol=1e-4)  # the bound of the reference arrays


def test_search_finds_a_text_by_itself_with_the_settings_of_the_folder(
    command: Command, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = ["--model", CHECKPOINTS / "mistral", "--output", out, "--adapter", CHECKPOINTS / "mistral-lora"]
    command("embed", corpus, *job, "--pooling", "weighted_mean", "--keep-columns", "text", "--dtype", "float32")
    found = command("search", out, TEXTS[17], TEXTS[42], "--top-k", "2", "--json")
    answers = [json.loads(line)["hits"] for line in found.stdout.splitlines()]
    assert [hits[0]["id"] for hits in answers] == ["corpus.jsonl:18", "corpus.jsonl:43"]
    assert [hits[0]["columns"]["text"] for hits in answers] == [TEXTS[17], TEXTS[42]]
    assert all(hits[0]["score"] > 1 - 1e-4 > hits[1]["score"] for hits in answers)


def test_a_job_that_lost_its_last_parts_ends_with_the_same_bits(command: Command, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = ["embed", corpus, "--model", CHECKPOINTS / "llama", "--output", out, "--rows-per-shard", "10"]
    command(*job)
    before = parts(out)
    for name in ("part-00002.parquet", "part-00005.parquet"):
        (out / name).unlink()
    assert "20 rows, " in command(*job).stderr
    assert parts(out) == before
    assert manifest(out)["resolved"]["dtype"] in ("float32", "bfloat16")


def test_verify_tells_of_a_flipped_bit_and_of_an_unfinished_job(
    command: Command, invoke: Command, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = ["embed", corpus, "--model", CHECKPOINTS / "llama", "--output", out, "--rows-per-shard", "20"]
    command(*job)
    assert command("verify", out).stdout.endswith("every part is as it was written\n")
    flip_a_bit(out / "part-00001.parquet")
    told = invoke("verify", out)
    assert (told.returncode, told.stderr) == (1, "")
    assert "part-00001.parquet has another SHA-256 than when it was written\n" in told.stdout
    assert "part-00000" not in told.stdout
    command(*job)
    assert "3 parts, 60 rows" in command("verify", out).stdout
    path = out / "_manifest.json"
    path.write_text(path.read_text().replace('"finished"', '"unfinished"'))
    assert (told := invoke("verify", out)).returncode == 1
    assert "the job is not finished: its embed command goes on" in told.stdout


def test_a_text_of_a_million_characters_and_odd_ones_are_embedded(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    texts = ["x" * 1_000_000, "word " * 200_000, "\x00", "🙂" * 1000, "<s></s>", "\u202e\u0301"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command("embed", path, "--model", CHECKPOINTS / "llama", "--output", tmp_path / "out")
    assert errors(tmp_path / "out") == []
    assert np.isfinite(embeddings(tmp_path / "out")).all()
    assert len(ids(tmp_path / "out")) == len(texts)
