"""Search gives exactly the rows of highest cosine, with the model that the folder was made with."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_encoder import NOT_FINITE, FakeEncoder, embedding_of
from folders import embeddings, ids

from llm2vec_fast.bulk import search as module
from llm2vec_fast.bulk.job import JobStoppedError, Outcome
from llm2vec_fast.bulk.manifest import read_manifest, record_part, write_manifest
from llm2vec_fast.bulk.search import search
from llm2vec_fast.errors import ChangedError, InputError, NonFiniteEmbeddingError, OutputError
from llm2vec_fast.jobs import files

Run = Callable[..., Outcome]
QUESTIONS = ["alpha beta", "gamma", "delta delta beta"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """200 texts of few words, so that some are equal but for the order."""
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    drawn = np.random.default_rng(0).choice(words, (200, 3))
    path = tmp_path / "texts.txt"
    path.write_text("".join(" ".join(row) + "\n" for row in drawn))
    return path


def find(folder: Path, questions: list[str], **options: Any) -> list[list[module.Hit]]:
    return search(folder, questions, load=lambda settings: FakeEncoder(), **options)


@pytest.mark.parametrize("output_dtype", ["float32", "float16"])
@pytest.mark.parametrize("slice_bytes", [1 << 9, 1 << 25], ids=["many-slices", "one-slice"])
def test_hits_are_those_of_a_full_sort(
    run: Run, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slice_bytes: int, output_dtype: str
) -> None:
    monkeypatch.setattr(module, "SLICE_BYTES", slice_bytes)
    run(texts, rows_per_shard=37, output_dtype=output_dtype)
    stored = embeddings(tmp_path / "out").astype(np.float64)
    for question, hits in zip(QUESTIONS, find(tmp_path / "out", QUESTIONS, top_k=20), strict=True):
        query = embedding_of(question).astype(np.float64)
        cosines = stored @ query / np.linalg.norm(stored, axis=1) / np.linalg.norm(query)
        own = dict(zip(ids(tmp_path / "out"), cosines, strict=True))
        rounding = 16 * np.finfo(np.float32).eps  # of sums of 16 products in float32
        scores = [hit.score for hit in hits]
        assert len({hit.id for hit in hits}) == 20
        assert scores == sorted(scores, reverse=True)
        np.testing.assert_allclose(scores, [own[hit.id] for hit in hits], atol=rounding)
        np.testing.assert_allclose(scores, np.sort(cosines)[::-1][:20], atol=rounding)


def test_hits_show_the_columns_that_were_kept(run: Run, texts: Path, tmp_path: Path) -> None:
    run(texts, keep_columns=("text",))
    [[hit]] = find(tmp_path / "out", ["gamma"], top_k=1)
    assert set((hit.columns["text"] or "").split()) & {"gamma"}
    run(texts, output="bare")
    [[bare]] = find(tmp_path / "bare", ["gamma"], top_k=1)
    assert (bare.id, bare.columns) == (hit.id, {})


def test_fewer_rows_than_hits_asked_for(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alpha\nbeta\n")
    run(tmp_path / "a.txt")
    assert [hit.id for hit in find(tmp_path / "out", ["beta"], top_k=5)[0]] == ["a.txt:2", "a.txt:1"]


def test_the_questions_use_the_settings_of_the_folder_but_their_own_instruction(
    run: Run, texts: Path, tmp_path: Path
) -> None:
    run(texts, instruction="Document:", truncate_dim=4, pooling="last_token", max_length=77)
    encoder, seen = FakeEncoder(), []
    search(tmp_path / "out", ["gamma"], instruction="Query:", load=lambda settings: seen.append(settings) or encoder)
    assert encoder.instructions == {"Query:"}
    assert (seen[0].pooling, seen[0].max_length, seen[0].dtype) == ("last_token", 77, "float32")


def test_another_model_is_refused_and_a_moved_one_accepted(run: Run, texts: Path, tmp_path: Path, model: Path) -> None:
    run(texts)
    moved = model.rename(tmp_path / "moved")
    assert find(tmp_path / "out", ["gamma"], model=str(moved))
    (moved / "model.safetensors").write_text("other weights")
    with pytest.raises(ChangedError, match="was embedded with another model than"):
        find(tmp_path / "out", ["gamma"], model=str(moved))


def test_an_unfinished_folder_is_searched_as_far_as_it_goes(run: Run, texts: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    class Stopping(FakeEncoder):
        def encode(self, sentences: Any, **options: Any) -> np.ndarray:
            if self.calls == 2:
                stop.set()
            return super().encode(sentences, **options)

    with pytest.raises(JobStoppedError):
        run(texts, encoder=Stopping(), stop=stop)
    said: list[str] = []
    assert len(find(tmp_path / "out", ["gamma"], top_k=100, notify=said.append)[0]) == 20
    assert said[0] == f"{tmp_path / 'out'} is not finished: searching the 20 rows it holds so far"


@pytest.mark.parametrize("moment", range(4))
def test_a_job_that_ends_while_its_folder_is_read_hides_no_row(
    run: Run, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    folder = tmp_path / "out"
    run(texts, rows_per_shard=50)
    ended = read_manifest(folder)
    assert ended is not None
    write_manifest(folder, replace(ended, parts={}, state="unfinished"))
    for part in ended.parts.values():
        record_part(folder, part)
    looks = iter(range(100))

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def look(*arguments: Any, **options: Any) -> Any:
            if next(looks) == moment:
                write_manifest(folder, ended)
            return real(*arguments, **options)

        return look

    monkeypatch.setattr(Path, "exists", watched(Path.exists))
    monkeypatch.setattr(Path, "read_text", watched(Path.read_text))
    monkeypatch.setattr(files, "open", watched(open), raising=False)
    found = read_manifest(folder)
    assert found is not None
    assert found.total("rows") == 200


def test_what_cannot_be_searched_is_refused(run: Run, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no _manifest\.json"):
        find(tmp_path, ["gamma"])
    run(texts)
    with pytest.raises(InputError, match="a question is empty"):
        find(tmp_path / "out", ["gamma", " "])
    with pytest.raises(NonFiniteEmbeddingError, match="embedding of the question 'not-finite' is not finite"):
        find(tmp_path / "out", [NOT_FINITE])
    (tmp_path / "out" / "part-00001.parquet").write_bytes(b"broken")
    with pytest.raises(OutputError, match=r"part-00001\.parquet cannot be read"):
        find(tmp_path / "out", ["gamma"])


def test_a_folder_of_a_stranger_loads_nothing_but_what_is_here(
    run: Run, texts: Path, tmp_path: Path, model: Path
) -> None:
    """Neither a name on the hub, nor a relative path, nor a device; and what is loaded is said."""
    run(texts, device="cpu")
    path, seen, said = tmp_path / "out" / "_manifest.json", [], []

    def load(settings: Any) -> FakeEncoder:
        seen.append(settings)
        return FakeEncoder()

    search(tmp_path / "out", ["gamma"], load=load, notify=said.append)
    assert said == [f"the model is {model}, as {path} says"]
    assert (seen[0].model, seen[0].device) == (str(model), None)
    value = json.loads(path.read_text())
    for name in ("somebody/some-model", "model", str(tmp_path / "gone")):
        path.write_text(json.dumps(value | {"model": value["model"] | {"path": name}}))
        with pytest.raises(ChangedError, match=f"names the model {name}, which is not there: say where it is with"):
            search(tmp_path / "out", ["gamma"], load=load)
    assert len(seen) == 1
    assert search(tmp_path / "out", ["gamma"], load=load, model=str(model))
