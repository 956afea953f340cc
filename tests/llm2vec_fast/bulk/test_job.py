"""A corpus becomes a folder of embeddings, whatever interrupts it and whatever rows it holds."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_encoder import DIMENSION, NO_TOKEN, NOT_FINITE, TOO_LARGE, FakeEncoder, embedding_of
from folders import embeddings, errors, ids, manifest, parts, table

from llm2vec_fast.bulk import corpus, sink
from llm2vec_fast.bulk.job import JobStoppedError, Outcome
from llm2vec_fast.errors import ChangedError, InputError, JobRunningError, OutputError, UserError

Run = Callable[..., Outcome]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """105 texts, a line each."""
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"text number {number}\n" for number in range(105)))
    return path


class StopAfter(FakeEncoder):
    """Asks the job to stop in the middle of its n-th part."""

    def __init__(self, calls: int, stop: threading.Event) -> None:
        super().__init__(batch_rows=3)
        self.stop, self.calls_left = stop, calls

    def encode(self, sentences: Any, **options: Any) -> np.ndarray:
        self.calls_left -= 1
        if not self.calls_left:
            self.stop.set()
        return super().encode(sentences, **options)


def stop_in_part(run: Run, number: int, *inputs: Path, **options: Any) -> JobStoppedError:
    stop = threading.Event()
    with pytest.raises(JobStoppedError) as stopped:
        run(*inputs, load=lambda settings: StopAfter(number, stop), stop=stop, **options)
    return stopped.value


def never_load(settings: object) -> FakeEncoder:
    raise AssertionError("the model was loaded")


def test_every_text_gets_its_embedding_under_a_unique_id(run: Run, lines: Path, tmp_path: Path) -> None:
    outcome = run(lines)
    assert outcome.rows == 105
    assert sorted(parts(tmp_path / "out")) == [f"part-{number:05d}.parquet" for number in range(11)]
    assert ids(tmp_path / "out") == [f"lines.txt:{row}" for row in range(1, 106)]
    expected = np.stack([embedding_of(f"text number {number}") for number in range(105)])
    np.testing.assert_array_equal(embeddings(tmp_path / "out"), expected)
    assert table(tmp_path / "out").schema.field("embedding").type == pa.list_(pa.float32(), DIMENSION)


def test_the_manifest_describes_model_inputs_and_parts(run: Run, lines: Path, tmp_path: Path, model: Path) -> None:
    run(lines)
    found = manifest(tmp_path / "out")
    assert (found["state"], found["rows"], found["tokens"]) == ("finished", 105, 315)
    assert found["resolved"]["dimension"] == DIMENSION
    assert found["inputs"][0]["bytes"] == lines.stat().st_size
    weights = next(file for file in found["model"]["files"] if file["path"].endswith(".safetensors"))
    assert weights["sha256"] == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    for part in found["parts"]:
        assert hashlib.sha256((tmp_path / "out" / part["name"]).read_bytes()).hexdigest() == part["sha256"]
        assert part["first_row"] == 10 * part["index"]
        assert part["tokens"] == 3 * part["rows"]


def test_settings_reach_the_encoder_and_the_output(run: Run, lines: Path, tmp_path: Path) -> None:
    encoder = FakeEncoder()
    run(lines, encoder=encoder, instruction="Find:", normalize=True, truncate_dim=4, output_dtype="float16")
    assert encoder.instructions == {"Find:"}
    assert table(tmp_path / "out").schema.field("embedding").type == pa.list_(pa.float16(), 4)
    lengths = np.linalg.norm(embeddings(tmp_path / "out").astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=2 * float(np.finfo(np.float16).eps))


def test_ids_and_kept_columns_come_from_the_input(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"body": "a", "key": 7, "meta": {"x": 1}}\n{"body": "b", "key": "k", "meta": null}\n')
    run(path, text_column="body", id_column="key", keep_columns=("body", "meta"))
    found = table(tmp_path / "out").drop_columns("embedding").to_pylist()
    assert found == [{"id": "7", "body": "a", "meta": '{"x": 1}'}, {"id": "k", "body": "b", "meta": None}]


def test_a_corpus_of_several_files_has_ids_that_name_them(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("one\ntwo\n")
    (folder / "sub" / "a.txt").write_text("three\n")
    pq.write_table(pa.table({"text": ["four"]}), folder / "z.parquet")
    run(folder)
    assert ids(tmp_path / "out") == ["a.txt:1", "a.txt:2", "sub/a.txt:1", "z.parquet:1"]


@pytest.mark.parametrize("stopped_in", [1, 2, 5, 11])
def test_a_stopped_job_goes_on_to_the_same_bits(run: Run, lines: Path, tmp_path: Path, stopped_in: int) -> None:
    run(lines, output="straight")
    stopped = stop_in_part(run, stopped_in, lines)
    assert stopped.parts == stopped_in - 1
    assert len(parts(tmp_path / "out")) == stopped_in - 1
    encoder = FakeEncoder()
    outcome = run(lines, encoder=encoder)
    assert encoder.calls == 11 - (stopped_in - 1), "finished parts were embedded again"
    assert (outcome.rows, outcome.rows_now) == (105, 105 - 10 * (stopped_in - 1))
    assert parts(tmp_path / "out") == parts(tmp_path / "straight")


def test_a_part_that_is_lost_is_made_again_alone(run: Run, lines: Path, tmp_path: Path) -> None:
    run(lines)
    before = parts(tmp_path / "out")
    (tmp_path / "out" / "part-00003.parquet").unlink()
    (tmp_path / "out" / "part-00007.parquet").write_bytes(b"cut short")
    encoder = FakeEncoder()
    run(lines, encoder=encoder)
    assert encoder.calls == 2
    assert parts(tmp_path / "out") == before


def test_a_finished_job_says_so_without_loading_the_model(run: Run, lines: Path, tmp_path: Path) -> None:
    first = run(lines)
    again = run(lines, load=never_load)
    assert (again.already_finished, again.rows, again.tokens) == (True, first.rows, first.tokens)


@pytest.mark.parametrize(
    ("option", "value", "change"),
    [
        ("pooling", "last_token", "pooling default -> last_token"),
        ("normalize", True, "normalize False -> True"),
        ("instruction", "Find:", "instruction default -> Find:"),
        ("truncate_dim", 8, "truncate_dim default -> 8"),
        ("output_dtype", "float16", "output_dtype float32 -> float16"),
        ("rows_per_shard", 11, "rows_per_shard 10 -> 11"),
        ("keep_columns", ("text",), r"keep_columns \[\] -> \['text'\]"),
        ("causal", True, "causal False -> True"),
        ("max_length", 100, "max_length default -> 100"),
    ],
)
def test_changed_settings_are_refused(run: Run, lines: Path, option: str, value: Any, change: str) -> None:
    stop_in_part(run, 3, lines)
    with pytest.raises(ChangedError, match=f"was started with something else: {change};.* new --output"):
        run(lines, **{option: value}, load=never_load)


def test_a_default_spelt_out_is_no_change(run: Run, lines: Path) -> None:
    stop_in_part(run, 3, lines)
    assert run(lines, pooling="mean", max_length=512).rows == 105


def test_another_model_tokenizer_or_adapter_is_refused(run: Run, lines: Path, model: Path, tmp_path: Path) -> None:
    stop_in_part(run, 3, lines)
    adapter = model.parent / "adapter"
    adapter.mkdir()
    for name, content in {"adapter_config.json": "{}", "adapter_model.safetensors": "weights"}.items():
        (adapter / name).write_text(content)
    with pytest.raises(ChangedError, match="adapter none -> "):
        run(lines, adapter=str(adapter), load=never_load)
    (model / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(ChangedError, match=r"something else: tokenizer .*sha256 .* -> .*sha256 "):
        run(lines, load=never_load)
    (model / "model.safetensors").write_text("other weights")
    with pytest.raises(ChangedError, match=r"something else: model .* -> .*tokenizer .* -> "):
        run(lines, load=never_load)


def test_a_model_that_moved_is_the_same_model(run: Run, lines: Path, model: Path, tmp_path: Path) -> None:
    stop_in_part(run, 3, lines)
    model.rename(tmp_path / "elsewhere")
    assert run(lines, model=str(tmp_path / "elsewhere")).rows == 105


def test_a_library_updated_in_between_is_mentioned(run: Run, lines: Path, tmp_path: Path) -> None:
    stop_in_part(run, 3, lines)
    path = tmp_path / "out" / "_manifest.json"
    path.write_text(path.read_text().replace(f'"numpy": "{np.__version__}"', '"numpy": "1.0"'))
    said: list[str] = []
    run(lines, notify=said.append)
    assert said[1] == f"numpy 1.0 -> {np.__version__}: new parts may differ from finished ones in their last bits"


def test_changed_inputs_are_refused(run: Run, lines: Path, tmp_path: Path) -> None:
    stop_in_part(run, 3, lines)
    size = lines.stat().st_size
    other = tmp_path / "more.txt"
    other.write_text("more\n")
    with pytest.raises(ChangedError, match=r"more\.txt: not there -> given"):
        run(lines, other)
    os.utime(lines, ns=(0, 0))
    with pytest.raises(ChangedError, match=r"lines\.txt: modified .* -> 1970-01-01"):
        run(lines)
    lines.write_text(lines.read_text() + "one more\n")
    with pytest.raises(ChangedError, match=rf"lines\.txt: {size} -> {size + 9} bytes"):
        run(lines)


def test_two_jobs_never_write_one_folder(run: Run, lines: Path) -> None:
    class Meddler(FakeEncoder):
        def encode(self, sentences: Any, **options: Any) -> np.ndarray:
            with pytest.raises(JobRunningError, match=rf"another job \(process {os.getpid()} on .*\) is writing .*out"):
                run(lines)
            return super().encode(sentences, **options)

    assert run(lines, encoder=Meddler()).rows == 105


def test_a_lock_left_by_a_dead_process_is_taken_over(run: Run, lines: Path, tmp_path: Path) -> None:
    stop_in_part(run, 3, lines)
    (tmp_path / "out" / ".job" / "lock").write_text("")
    (tmp_path / "out" / ".job" / "lock.json").write_text('{"pid": 1, "host": "elsewhere"}')
    assert run(lines).rows == 105


def test_a_folder_with_other_files_is_refused(run: Run, lines: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.docx").write_text("years of work")
    with pytest.raises(OutputError, match=r"out has other files \(thesis\.docx, …\)"):
        run(lines)


BAD_ROWS = {
    2: ('{"text": null}', "the text is null"),
    3: ('{"text": 3}', "the text is not a string but int '3'"),
    4: ('{"text": ["a"]}', "the text is not a string but list \"['a']\""),
    5: ('{"text": ""}', "the text is empty"),
    6: ('{"text": " \\n"}', "the text is empty"),
    7: ('{"text": "\\ud800"}', "the text holds half a surrogate pair (U+D800), which is not text"),
    8: ('{"body": "a"}', "the row has no field 'text', only 'body'"),
    9: ("{", "the line is not JSON: Expecting property name enclosed in double quotes at character 2"),
    10: (f'{{"text": "{NOT_FINITE}"}}', "the embedding is not finite, in float32 too"),
    11: (f'{{"text": "{NO_TOKEN}"}}', "the model has no token of the text to pool"),
}


def test_bad_rows_are_named_with_place_and_reason_and_the_rest_is_embedded(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    rows = ['{"text": "good"}', *(row for row, _ in BAD_ROWS.values()), '{"text": "also good"}']
    path.write_text("\n".join(rows) + "\n")
    outcome = run(path, rows_per_shard=4)
    assert (outcome.rows, outcome.bad_rows) == (2, len(BAD_ROWS))
    assert ids(tmp_path / "out") == ["corpus.jsonl:1", "corpus.jsonl:12"]
    assert np.isfinite(embeddings(tmp_path / "out")).all()
    found = errors(tmp_path / "out")
    assert {error["row"]: error["reason"] for error in found} == {row: why for row, (_, why) in BAD_ROWS.items()}
    assert {(error["file"], error["id"]) for error in found} == {
        ("corpus.jsonl", f"corpus.jsonl:{n}") for n in BAD_ROWS
    }


def test_a_bad_id_is_a_bad_row(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a", "key": null}\n{"text": "b", "key": [1]}\n{"text": "c", "key": 1}\n')
    run(path, id_column="key")
    assert [error["row"] for error in errors(tmp_path / "out")] == [1, 2]
    assert ids(tmp_path / "out") == [1]


def test_an_embedding_too_large_for_float16_is_left_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"good\n{TOO_LARGE}\n")
    run(tmp_path / "a.txt", output_dtype="float16")
    assert [error["reason"] for error in errors(tmp_path / "out")] == [
        "the embedding is too large for float16: use --output-dtype float32, or --normalize"
    ]


@pytest.mark.parametrize("stopped_in", range(1, 8))
def test_errors_are_listed_once_however_often_the_job_is_stopped(run: Run, tmp_path: Path, stopped_in: int) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("".join("\n" if number % 4 == 0 else f"text {number}\n" for number in range(70)))
    run(path, output="straight")
    stop_in_part(run, stopped_in, path)
    with open(
        tmp_path / "out" / "_errors.jsonl", "a"
    ) as file:  # a part whose errors were written but that was not done
        file.write(json.dumps({"part": stopped_in - 1, "file": "lines.txt", "row": 1, "id": "x", "reason": "r"}))
        file.write('\n{"part": ')
    run(path)
    assert errors(tmp_path / "out") == errors(tmp_path / "straight")
    assert [error["row"] for error in errors(tmp_path / "out")] == [row + 1 for row in range(70) if row % 4 == 0]


def test_one_text_of_a_million_characters_is_no_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short\n" + "long " * 200_000 + "\n")
    assert run(tmp_path / "a.txt").rows == 2


def test_a_shard_of_long_texts_ends_early_and_still_resumes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "SHARD_BYTES", 100)
    (tmp_path / "a.txt").write_text("".join(f"{number} {'x' * 60}\n" for number in range(9)))
    run(tmp_path / "a.txt", output="straight")
    assert [part["rows"] for part in manifest(tmp_path / "straight")["parts"]] == [2, 2, 2, 2, 1]
    stop_in_part(run, 3, tmp_path / "a.txt")
    run(tmp_path / "a.txt")
    assert parts(tmp_path / "out") == parts(tmp_path / "straight")


@pytest.mark.parametrize("content", ["", "\n\n\n"], ids=["no-bytes", "only-blank-lines"])
def test_nothing_to_embed_is_an_error(run: Run, tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(
        InputError, match=r"nothing to embed: .*a\.txt is empty|no row could be embedded: 3 rows left out"
    ):
        run(tmp_path / "a.txt")


def test_a_file_with_a_header_only_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n")
    with pytest.raises(InputError, match="no row could be embedded: the input files hold no rows"):
        run(tmp_path / "a.csv")


def test_an_empty_file_among_others_is_mentioned_and_skipped(run: Run, lines: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.parquet").write_bytes(b"")
    said: list[str] = []
    assert run(tmp_path / "empty.parquet", lines, notify=said.append).rows == 105
    assert f"{tmp_path / 'empty.parquet'} is empty (0 bytes): skipped" in said


def test_a_compressed_file_that_is_cut_short_gives_what_it_holds(run: Run, lines: Path, tmp_path: Path) -> None:
    whole = gzip.compress("".join(f"{os.urandom(40).hex()}\n" for _ in range(1000)).encode())
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    outcome = run(tmp_path / "cut.txt.gz", lines, rows_per_shard=100)
    assert outcome.damaged == 1
    assert 105 < outcome.rows < 1000
    [error] = errors(tmp_path / "out")
    assert error["file"] == "cut.txt.gz"
    assert f"from row {outcome.rows - 105 + 1} on the file cannot be read" in error["reason"]


def test_a_file_damaged_from_its_start_is_named_even_as_the_last_thing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    (tmp_path / "b.txt.gz").write_bytes(b"not gzip at all")
    outcome = run(tmp_path / "a.txt", tmp_path / "b.txt.gz", rows_per_shard=1)
    assert (outcome.rows, outcome.damaged) == (1, 1)
    assert [error["file"] for error in errors(tmp_path / "out")] == ["b.txt.gz"]


def test_a_utf16_file_is_refused_with_the_remedy(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-16")
    with pytest.raises(InputError, match=r"a\.txt is UTF-16: convert it to UTF-8"):
        run(tmp_path / "a.txt")


def test_every_file_is_looked_at_before_the_work_begins(run: Run, lines: Path, tmp_path: Path) -> None:
    (tmp_path / "late.csv").write_text("id,body\n1,a\n")
    with pytest.raises(InputError, match=r"late\.csv has no column 'text'"):
        run(lines, tmp_path / "late.csv", load=never_load)


def test_a_file_that_changes_while_the_job_runs_ends_it(run: Run, lines: Path, tmp_path: Path) -> None:
    late = tmp_path / "zz.txt"
    late.write_text("text\n")

    class Slow(FakeEncoder):
        def encode(self, sentences: Any, **options: Any) -> np.ndarray:
            late.write_text("another text\n")
            return super().encode(sentences, **options)

    with pytest.raises(ChangedError, match=r"zz\.txt changed while the job ran"):
        run(lines, late, encoder=Slow())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_finished_parts_and_the_job_goes_on_later(
    run: Run, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    run(lines, output="straight")
    write, calls = pq.write_table, []

    def full(table: pa.Table, where: Any, **options: Any) -> None:
        calls.append(table)
        if len(calls) > 4:
            where.write(b"half a part")
            raise OSError(code, os.strerror(code))
        write(table, where, **options)

    monkeypatch.setattr(sink.pq, "write_table", full)
    with pytest.raises(OutputError, match=r"no space left to write part-00004\.parquet .* finished parts are kept"):
        run(lines)
    monkeypatch.setattr(sink.pq, "write_table", write)
    assert len(parts(tmp_path / "out")) == 4
    assert not list((tmp_path / "out").glob("*.tmp"))
    run(lines)
    assert parts(tmp_path / "out") == parts(tmp_path / "straight")


def test_more_dimensions_than_the_model_has_are_refused(run: Run, lines: Path) -> None:
    with pytest.raises(UserError, match="truncate_dim 17 is more than the 16 dimensions of the model"):
        run(lines, truncate_dim=17)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keep_columns": ("id",)}, "'id' cannot be kept, the output has one of its own: rename it, or make it the id"),
        ({"keep_columns": ("embedding",)}, "'embedding' cannot be kept, the output has one of its own: rename it$"),
        ({"keep_columns": ("id",), "id_column": "id"}, "'id' is the id, which the output has in any case: leave it"),
        ({"keep_columns": ("text", "text")}, "--keep-columns names 'text' 2 times: name it once"),
    ],
)
def test_a_column_that_the_output_cannot_have_is_refused(run: Run, lines: Path, options: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        run(lines, **options)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}'])
def test_a_damaged_manifest_is_refused(run: Run, lines: Path, tmp_path: Path, content: str) -> None:
    run(lines)
    (tmp_path / "out" / "_manifest.json").write_text(content)
    with pytest.raises(OutputError, match=r"_manifest\.json is damaged"):
        run(lines)


def test_a_manifest_of_a_later_format_is_refused(run: Run, lines: Path, tmp_path: Path) -> None:
    run(lines)
    value = manifest(tmp_path / "out") | {"format_version": 99}
    (tmp_path / "out" / "_manifest.json").write_text(json.dumps(value))
    with pytest.raises(OutputError, match="version 99"):
        run(lines)
