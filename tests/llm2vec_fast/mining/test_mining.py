"""Hard negatives: as a plain search finds them, whatever stops the job; and what training reads of them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_encoder import NO_TOKEN, NOT_FINITE, FakeEncoder, embedding_of
from folders import flip_a_bit
from reference_data import FOLDER

from llm2vec_fast.bulk.settings import EmbedSettings
from llm2vec_fast.errors import ChangedError, InputError, OutputError, UserError
from llm2vec_fast.mining import MiningSettings, MiningStoppedError, Outcome, job, mine, search

TEXT = "one two three four five six seven eight nine ten eleven twelve"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    rng, words = np.random.default_rng(0), TEXT.split()
    texts = [" ".join(rng.choice(words, 5)) + f" {i}" for i in range(80)]
    return [{"query": f"{texts[i]} {texts[i + 40]}", "positive": texts[i], "source": i} for i in range(40)]


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Callable[..., Outcome]:
    """Mine the rows into tmp_path / ``output``; keyword arguments are settings."""

    def run(rows: list[dict[str, Any]], output: str = "out.jsonl", **options: Any) -> Outcome:
        given = {name: options.pop(name) for name in ("corpora", "stop", "notify") if name in options}
        load = options.pop("load", lambda settings: encoder)
        encoder = options.pop("encoder", None) or FakeEncoder()
        path = tmp_path / "pairs.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        of_encoder = EmbedSettings(
            str(model), rows_per_shard=10, device="cpu", instruction=options.pop("instruction", None)
        )
        return mine([str(path)], tmp_path / output, MiningSettings(of_encoder, **options), load=load, **given)

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def unit(text: str) -> np.ndarray:
    row = embedding_of(text).astype(np.float64)
    return row / np.linalg.norm(row)


def test_negatives_are_the_nearest_below_the_share(run, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain search, over several blocks of queries and slices of documents."""
    monkeypatch.setattr(job, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(search, "DOCUMENTS_AT_ONCE", 9)
    outcome = run(rows, negatives=4, share=0.8, skip=2)
    found = read(tmp_path / "out.jsonl")
    assert outcome.rows == len(found) == len(rows)
    assert outcome.negatives == sum(len(row["negative"]) for row in found) > 40
    for row, out in zip(rows, found, strict=True):
        assert {name: out[name] for name in row} == row
        own = unit(row["query"]) @ unit(row["positive"])
        scores = {other["positive"]: unit(row["query"]) @ unit(other["positive"]) for other in rows}
        nearest = sorted((t for t in scores if scores[t] < 0.8 * own), key=lambda t: -scores[t])
        assert out["negative"] == nearest[2:6]
        assert out["positive_score"] == pytest.approx(own, abs=1e-6)
        assert out["negative_score"] == pytest.approx([scores[t] for t in nearest[2:6]], abs=1e-6)
    assert not (tmp_path / "out.jsonl.mining").exists()


def test_what_suits_a_query_is_never_its_negative(run, tmp_path: Path) -> None:
    rows = [
        {"query": "one two", "positive": ["one two three", "two one"], "id": "a", "negative": "old"},
        {"query": "one two", "positive": ["one three"], "id": "b", "negative": "old"},
        {"query": "one four", "positive": ["one  two three"], "id": "c", "negative": "old"},
        {"query": "five", "positive": ["five one two"], "id": "d", "negative": "old"},
        {"query": "six", "positive": ["six one two"], "id": "d", "negative": "old"},
    ]
    run(rows, share=1.0, id_column="id")
    found = read(tmp_path / "out.jsonl")
    family = {"one two three", "two one", "one three", "one  two three"}
    for row in found[:2]:
        assert not family & set(row["negative"])
    assert not {"one two three", "one  two three"} & set(found[2]["negative"])
    for row in found[3:]:
        assert not {"five one two", "six one two"} & set(row["negative"])
    assert "old" not in {text for row in found for text in row["negative"]}


def test_rows_that_share_documents_in_a_chain_have_negatives(run, rows, tmp_path: Path) -> None:
    own = [[rows[i]["positive"], rows[(i + 1) % len(rows)]["positive"]] for i in range(len(rows))]
    chain = [{**row, "positive": texts} for row, texts in zip(rows, own, strict=True)]
    outcome = run(chain, share=1.0, negatives=40)
    assert outcome.negatives > 100
    for texts, row in zip(own, read(tmp_path / "out.jsonl"), strict=True):
        assert not set(texts) & set(row["negative"])


def test_rows_without_an_id_are_negatives_of_each_other(run, rows, tmp_path: Path) -> None:
    run([{**row, "id": None} for row in rows], share=1.0, id_column="id")
    assert sum(len(row["negative"]) for row in read(tmp_path / "out.jsonl")) > 40


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
def test_all_columns_come_out_as_they_were(run, rows, tmp_path: Path, output: str) -> None:
    more = {"day": "2024-01-02", "share": 0.12345678901234567, "number": 2**62 + 1, "lists": [[1], []], "no": None}
    run([{**row, **more} for row in rows], output)
    path = tmp_path / output
    found = read(path) if output.endswith("jsonl") else pq.read_table(path).to_pylist()
    assert [{name: out[name] for name in (*row, *more)} for row, out in zip(rows, found, strict=True)] == [
        {**row, **more} for row in rows
    ]


def test_rows_that_fit_no_parquet_file_are_refused_before_the_work(run, rows, tmp_path: Path) -> None:
    encoder = FakeEncoder()
    with pytest.raises(UserError, match="the column 'x' does not fit a parquet file"):
        run([{**row, "x": 1 if i else "one"} for i, row in enumerate(rows)], "out.parquet", encoder=encoder)
    assert encoder.calls == 0


def test_further_documents_are_searched(run, rows, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("\n".join(f"{row['query']} near" for row in rows) + "\n")
    run(rows, share=1.0, negatives=1)
    run(rows, "more.parquet", share=1.0, negatives=1, corpora=[str(tmp_path / "more.txt")])
    few, many = read(tmp_path / "out.jsonl"), pq.read_table(tmp_path / "more.parquet").to_pylist()
    gained = [b for a, b in zip(few, many, strict=True) if b["negative_score"] > a["negative_score"]]
    assert gained
    assert all(row["negative"][0].endswith("near") for row in gained)


def test_what_cannot_be_embedded_is_no_negative_and_has_none(run, rows, tmp_path: Path) -> None:
    bad = [{"query": NOT_FINITE, "positive": "one", "source": 0}, {"query": "two", "positive": NO_TOKEN, "source": 0}]
    outcome = run([*bad, *rows], share=1.0)
    found = read(tmp_path / "out.jsonl")
    assert found[0]["negative"] == []
    assert outcome.without >= 1
    texts = {text for row in found for text in row["negative"]}
    assert NOT_FINITE not in texts


def test_a_stopped_job_goes_on_to_the_same_result(run, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the search, after texts are embedded and some blocks are done: none of that is done again."""
    monkeypatch.setattr(job, "QUERIES_AT_ONCE", 7)
    run(rows, "whole.jsonl")
    stop, calls = threading.Event(), []

    def find(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[3])
        if len(calls) == 3:
            stop.set()
        return search.find_negatives(*args, **kwargs)

    monkeypatch.setattr(job, "find_negatives", find)
    with pytest.raises(MiningStoppedError):
        run(rows, stop=stop)
    assert not (tmp_path / "out.jsonl").exists()
    encoder = FakeEncoder()
    run(rows, encoder=encoder)
    assert encoder.calls == 0
    assert calls == [0, 7, 14, 14, 21, 28, 35]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_settings_or_pairs_do_not_go_on(run, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(job, "_search", lambda *args: stop_here())
        with pytest.raises(MiningStoppedError):
            run(rows)
    with pytest.raises(ChangedError, match=r"with something else: negatives 7 -> 3; go on with what it was, or give"):
        run(rows, negatives=3)
    with pytest.raises(ChangedError, match=r"with something else: instruction None -> find:; go on"):
        run(rows, instruction="find:")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ChangedError, match=r"with something else: other files or other contents; go on"):
        run(rows)


def stop_here() -> None:
    raise MiningStoppedError


@pytest.mark.parametrize("wrong", [{"query_column": "q"}, {"load": None}, {"stop": "now"}])
def test_a_job_that_came_to_nothing_leaves_nothing(run, rows, tmp_path: Path, wrong: dict) -> None:
    """So that the same command, put right, runs."""
    if "stop" in wrong:
        wrong = {"stop": threading.Event()}
        wrong["stop"].set()
    with pytest.raises(Exception, match=r"no column 'q'|not callable|^$|stopped"):
        run(rows, **wrong)
    assert not (tmp_path / "out.jsonl.mining").exists()
    assert run(rows, negatives=2).rows == len(rows)


@pytest.mark.parametrize(
    ("row", "options", "error", "message"),
    [
        ({"text": "a", "positive": "b"}, {}, UserError, "has no column 'query' .--query-column.: its"),
        ({"query": "a", "positive": None}, {}, UserError, "has no row with a text in 'query' and in 'positive'"),
        ({"query": "a", "positive": "b"}, {"id_column": "key"}, UserError, "has no column 'key'"),
        ({"query": "a", "positive": "b"}, {"share": 1.5}, UserError, "share=1.5 is not a share"),
        ({"query": "a", "positive": "b"}, {"negatives": 0}, UserError, "negatives=0 is not positive"),
        ({"query": "a", "positive": "b"}, {"output": "out.csv"}, OutputError, "end it in .jsonl or .parquet"),
        ({"query": "a", "positive": "b"}, {"corpora": ["none.txt"]}, InputError, "none.txt does not exist"),
    ],
)
def test_what_cannot_be_mined_is_refused(run, row: dict, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        run([row], **options)
    assert "\n" not in str(caught.value)


def test_a_finished_output_is_not_written_over(run, rows) -> None:
    run(rows)
    with pytest.raises(OutputError, match=r"out.jsonl exists already: delete it, or give another --output"):
        run(rows)


def stop_in_search(run, rows, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Stop the job in a block of the search; its texts are embedded."""
    monkeypatch.setattr(job, "QUERIES_AT_ONCE", 7)
    stop, find, calls = threading.Event(), job.find_negatives, []

    def stopping(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) > block:
            stop.set()
        return find(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(job, "find_negatives", stopping)
        with pytest.raises(MiningStoppedError):
            run(rows, stop=stop)


def test_a_result_that_was_damaged_is_found_again(run, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(rows, output="straight.jsonl")
    stop_in_search(run, rows, monkeypatch, 3)
    folder = tmp_path / "out.jsonl.mining"
    found = sorted(folder.glob("found-*.npz"))
    assert len(found) == 3
    flip_a_bit(found[0])
    found[1].write_bytes(bytes(found[1].stat().st_size))
    found[2].write_bytes(found[2].read_bytes()[:-9])
    run(rows)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_files_of_the_user_beside_the_work_stay(run, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out.jsonl.mining"
    folder.mkdir()
    (folder / "thesis.tmp").write_text("the user's")
    with pytest.raises(OutputError, match=r"out\.jsonl\.mining has other files \(thesis\.tmp, …\)"):
        run(rows)
    (folder / "thesis.tmp").unlink()
    stop_in_search(run, rows, monkeypatch, 1)
    own = [folder / "notes.tmp", folder / "queries" / "notes.tmp"]
    for path in own:
        path.write_text("the user's")
    run(rows)
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == own
    assert [path.read_text() for path in own] == ["the user's"] * 2


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_note_of_the_job_is_named(
    run, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    stop_in_search(run, rows, monkeypatch, 1)
    (tmp_path / "out.jsonl.mining" / "mining.json").write_text(content)
    with pytest.raises(OutputError, match=r"mining\.json is damaged .*: delete .*out\.jsonl\.mining and mine again"):
        run(rows)


def test_the_command_writes_what_training_reads(tmp_path: Path, rows) -> None:
    from llm2vec_fast.training.arguments import ContrastiveArguments
    from llm2vec_fast.training.pairs import Pairs

    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", FOLDER / "llama", "--output", tmp_path / "mined.jsonl", "--device", "cpu", "--share", "1"]
    options += ["--dtype", "float32", "--instruction", "find:"]
    command = [sys.executable, "-m", "llm2vec_fast", "mine", tmp_path / "pairs.jsonl", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "hard negatives for 40 rows" in done.stderr
    file = str(tmp_path / "mined.jsonl")
    pairs = Pairs(
        [file],
        ContrastiveArguments(model_name_or_path="m", train_file=[file], output_dir="-", use_cpu=True, negatives=3),
    )
    found = {row["query"]: row["negative"] for row in read(tmp_path / "mined.jsonl")}
    for i in range(len(pairs)):
        texts = [text for _, text in pairs[i]["negatives"]]
        assert len(texts) == min(3, len(found[pairs[i]["query"][1]]))
        assert set(texts) <= set(found[pairs[i]["query"][1]])


WITHOUT_EXTRA = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        extra = name.split(".")[0] in ("datasets", "pandas")
        return None if extra else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
import fake_encoder
fake_encoder.run_command_line()
"""


def test_mining_needs_nothing_of_the_training_extra(tmp_path: Path, model: Path, rows) -> None:
    """Nor does any time with nanoseconds, which pandas alone has."""
    times = pa.array(range(1, 41), pa.timestamp("ns"))
    pq.write_table(pa.Table.from_pylist(rows).append_column("at", times), tmp_path / "pairs.parquet")
    options = ["-m", model, "-o", tmp_path / "mined.jsonl", "--device", "cpu", "--share", "1"]
    command = [sys.executable, "-c", WITHOUT_EXTRA, "mine", tmp_path / "pairs.parquet", *options]
    places = os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parents[3])))
    environment = {**os.environ, "PYTHONPATH": places}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [row["at"] for row in read(tmp_path / "mined.jsonl")][:2] == [
        "1970-01-01T00:00:00.000000001", "1970-01-01T00:00:00.000000002",
    ]  # fmt: skip


def test_rows_left_out_are_said_and_listed(run, rows, tmp_path: Path) -> None:
    bad = [{"query": "a", "positive": 5}, {"query": "a", "positive": ["", None]}, {"query": None, "positive": "b"}]
    said: list[str] = []
    assert run([*bad, {"query": "c", "positive": ["d", ""]}, *rows], notify=said.append).rows == 41
    told = "pairs.jsonl:1 (the text in 'positive' is not a string but int '5'), pairs.jsonl:2 (the text in 'positive'"
    assert said[0].startswith(f"3 of 44 rows are left out: {told} is empty), pairs.jsonl:3 (the text in 'query' is")
    listed = [json.loads(line)["line"] for line in (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()]
    assert listed == [1, 2, 3]


def test_rows_left_out_are_listed_in_order_and_never_those_of_an_earlier_run(run, rows, tmp_path: Path) -> None:
    listing = tmp_path / "out.jsonl.errors.jsonl"
    lines = [json.dumps(row) for row in ({"query": None, "positive": "b"}, *rows)]
    (tmp_path / "pairs.jsonl").write_text("\n".join([lines[0], "", lines[0], *lines[1:]]))
    run([])
    assert [row["line"] for row in read(listing)] == [1, 2, 3]
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "pairs.jsonl").unlink()
    run(rows)
    assert not listing.exists()


def test_pairs_may_be_a_parquet_file_of_a_name_that_is_not_utf8(run, rows, tmp_path: Path) -> None:
    run(rows)
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet"))
    with open(name, "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    settings = MiningSettings(EmbedSettings(str(tmp_path / "model"), rows_per_shard=10, device="cpu"))
    mine([str(name)], tmp_path / "other.jsonl", settings, load=lambda settings: FakeEncoder())
    assert (tmp_path / "other.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_pairs_and_documents_may_be_folders_of_any_format(run, rows, tmp_path: Path, model: Path) -> None:
    run(rows, share=1.0, corpora=[])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text(json.dumps(rows[:20]))
    with gzip.open(tmp_path / "in" / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[20:])
    settings = MiningSettings(EmbedSettings(str(model), rows_per_shard=10, device="cpu"), share=1.0)
    for name, given in {"in/folder": str(tmp_path / "in"), "glob": str(tmp_path / "in" / "[ab].*")}.items():
        mine([given], tmp_path / f"{name}.jsonl", settings, load=lambda settings: FakeEncoder())
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
