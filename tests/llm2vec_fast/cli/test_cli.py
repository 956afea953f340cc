"""The command line as a user meets it: a process with an exit code, stdout and stderr."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100", "TERMINAL_WIDTH": "100"}
ENVIRONMENT = {**os.environ, **PLAIN, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY)])}
Result = subprocess.CompletedProcess[str]


def real(*arguments: object, **extra: str) -> Result:
    """`python -m llm2vec_fast …`, with the real encoder."""
    return execute([sys.executable, "-m", "llm2vec_fast"], arguments, extra)


def fake(*arguments: object, **extra: str) -> Result:
    """The same with the fake encoder."""
    return execute([sys.executable, "-c", "import fake_encoder; fake_encoder.run_command_line()"], arguments, extra)


def execute(command: list[str], arguments: tuple[object, ...], extra: dict[str, str]) -> Result:
    words = [*command, *map(str, arguments)]
    return subprocess.run(words, env=ENVIRONMENT | extra, capture_output=True, text=True, errors="replace", timeout=300)


def assert_one_sentence(result: Result, *words: str, code: int = 1) -> None:
    """The command failed with one line on stderr that holds all the words, and no traceback."""
    assert result.returncode == code, result.stderr
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("llm2vec-fast: "), result.stderr
    assert all(word in sentence for word in words), sentence
    assert "Traceback" not in result.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def embed(tmp_path: Path, model: Path) -> Callable[..., Result]:
    """Embed a csv file of two rows with the fake encoder into tmp_path / "out"."""
    (tmp_path / "corpus.csv").write_text("id,text\n1,read a file\n2,compress bytes\n")

    def embed(*arguments: object) -> Result:
        return fake("embed", tmp_path / "corpus.csv", "--model", model, "--output", tmp_path / "out", *arguments)

    return embed


def test_help_names_every_verb() -> None:
    result = real("--help")
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in ("embed", "search", "doctor"))


@pytest.mark.parametrize("verb", ["embed", "search"])
def test_help_of_a_verb_has_examples_that_name_only_its_options(verb: str) -> None:
    result = real(verb, "--help")
    assert result.returncode == 0
    _, after = result.stdout.split("Examples")
    examples, options = after.split("Arguments")
    used = {word for word in examples.split() if word.startswith("--")}
    assert used
    assert used <= set(options.split())
    assert "[bold]" not in result.stdout


def test_help_needs_nothing_heavy() -> None:
    code = "import sys, llm2vec_fast.cli; print([m for m in ('torch', 'numpy', 'pyarrow', 'rich') if m in sys.modules])"
    result = execute([sys.executable, "-c", code], (), {})
    assert result.stdout.strip() == "[]"


def test_embed_then_search(embed: Callable[..., Result], tmp_path: Path) -> None:
    done = embed("--id-column", "id", "--keep-columns", "text")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "done: 2 rows × 16 in 1 part of" in done.stderr
    again = embed("--id-column", "id", "--keep-columns", "text")
    assert (again.returncode, again.stderr.startswith("already finished: 2 rows")) == (0, True)
    found = fake("search", tmp_path / "out", "compress", "read", "--top-k", 1)
    assert found.returncode == 0, found.stderr
    assert found.stdout.index("compress bytes") < found.stdout.index("read a file")
    as_json = fake("search", tmp_path / "out", "compress", "read", "--top-k", 1, "--json")
    answers = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert [answer["question"] for answer in answers] == ["compress", "read"]
    assert [(hit["id"], hit["columns"]) for answer in answers for hit in answer["hits"]] == [
        ("2", {"text": "compress bytes"}),
        ("1", {"text": "read a file"}),
    ]


def test_markup_in_a_text_is_shown_as_it_is(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("[bold]x[/bold] [/nonsense]\n")
    fake("embed", tmp_path / "a.txt", "-m", model, "-o", tmp_path / "out", "--keep-columns", "text")
    assert "[bold]x[/bold] [/nonsense]" in fake("search", tmp_path / "out", "[red]x").stdout


def test_a_changed_setting_is_one_sentence(embed: Callable[..., Result]) -> None:
    embed()
    assert_one_sentence(embed("--normalize"), "was started with something else: normalize False -> True")


def test_a_missing_column_is_one_sentence(embed: Callable[..., Result]) -> None:
    assert_one_sentence(embed("--text-column", "body"), "corpus.csv has no column 'body'", "'id', 'text'")


def test_rows_left_out_are_counted_and_the_job_has_done_its_work(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\nnot \xff utf-8\n")
    result = fake("embed", tmp_path / "a.txt", "-m", model, "-o", tmp_path / "out")
    assert result.returncode == 0
    assert "2 left out" in result.stderr
    assert "_errors.jsonl" in result.stderr


def test_a_damaged_file_ends_in_exit_code_1_though_the_rest_is_embedded(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("good\n")
    (tmp_path / "b.txt.gz").write_bytes(b"\x1f\x8b\x08 not gzip")
    result = fake("embed", tmp_path / "a.txt", tmp_path / "b.txt.gz", "-m", model, "-o", tmp_path / "out")
    assert result.returncode == 1
    assert "done: 1 row " in result.stderr
    assert "1 damaged place in the input could not be read" in result.stderr


@pytest.mark.parametrize(
    "arguments", [("embed",), ("embed", "a.txt"), ("embed", "a.txt", "-m", "m", "-o", "o", "--pooling", "median")]
)
def test_a_wrong_command_line_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert real(*arguments).returncode == 2


def test_an_unexpected_error_is_a_sentence_and_with_debug_a_traceback(
    embed: Callable[..., Result], tmp_path: Path
) -> None:
    embed()
    corpus, model, out = tmp_path / "corpus.csv", tmp_path / "model", tmp_path / "new"
    quiet = fake("embed", corpus, "-m", model, "-o", out, FAKE_BROKEN="kaput")
    assert_one_sentence(quiet, "unexpected RuntimeError: kaput", "--debug")
    loud = fake("--debug", "embed", corpus, "-m", model, "-o", out, FAKE_BROKEN="kaput")
    assert "Traceback" in loud.stderr


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "does not exist"),
        ({}, "no config.json"),
        ({"config.json": "{ not json", "model.safetensors": ""}, "config.json"),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors": "not weights"}, "cannot be loaded"),
        ({"config.json": '{"model_type": "llama"}', "pytorch_model.bin": pickle.dumps({})}, "only as pickle"),
    ],
    ids=["no-folder", "empty-folder", "broken-config", "broken-weights", "pickle-only"],
)
def test_a_model_that_cannot_be_loaded_is_one_sentence(
    invoke: Callable[..., Result], tmp_path: Path, files: dict[str, str | bytes] | None, words: str
) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    if files is not None:
        (tmp_path / "broken").mkdir()
        for name, content in files.items():
            (tmp_path / "broken" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    result = invoke("embed", tmp_path / "a.txt", "-m", tmp_path / "broken", "-o", tmp_path / "out")
    assert_one_sentence(result, str(tmp_path / "broken"), words)


def test_doctor_tells_versions_devices_and_choices_with_reasons(invoke: Callable[..., Result]) -> None:
    report = json.loads(invoke("doctor", "--json").stdout)
    assert report["versions"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert "threads" in report["devices"]["cpu"]
    assert report["backends"]["attention on cpu"]["chosen"] == "blocked"
    assert report["backends"]["attention on cpu"]["why"]
    assert report["dtype auto"]["cpu"]["chosen"] in ("float32", "bfloat16")
    assert report["dtype auto"]["cpu"]["why"]
    as_table = invoke("doctor")
    assert as_table.returncode == 0
    assert report["dtype auto"]["cpu"]["why"].split()[0] in as_table.stdout


def test_doctor_shows_a_backend_chosen_by_the_environment(
    invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM2VEC_FAST_BACKEND", "reference")
    report = json.loads(invoke("doctor", "--json").stdout)
    assert report["backends"]["attention on cpu"] == {
        "chosen": "reference",
        "why": "asked for by LLM2VEC_FAST_BACKEND",
    }


def test_doctor_runs_as_a_command_of_its_own() -> None:
    result = real("doctor")
    assert result.returncode == 0, result.stderr
    assert "backends" in result.stdout


def test_a_device_that_is_not_there_is_one_sentence(invoke: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    checkpoint = REPOSITORY / "tests" / "data" / "reference" / "llama"
    result = invoke("embed", tmp_path / "a.txt", "-m", checkpoint, "-o", tmp_path / "out", "--device", "warp:9")
    assert_one_sentence(result, "device warp:9 cannot be used", "doctor")


@pytest.mark.parametrize("console", ["ascii", "cp1252"])
def test_what_a_console_cannot_show_is_escaped(tmp_path: Path, model: Path, console: str) -> None:
    """A file name with a byte of latin-1, an id with half a character, letters that the console has not."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    Path(path).write_text('{"text": "a 猫", "id": "b"}\n{"text": 5, "id": "c"}\n{"text": "a", "id": "\\ud83d"}\n{')
    done = fake("embed", path, "-m", model, "-o", tmp_path / "out", "--id-column", "id", "--keep-columns", "text",
                PYTHONIOENCODING=console)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "done: 1 row " in done.stderr
    found = fake("search", tmp_path / "out", "猫", PYTHONIOENCODING=console)
    assert (found.returncode, "\\u732b" in found.stdout) == (0, True), found.stderr
    as_json = fake("search", tmp_path / "out", "猫", "--json", PYTHONIOENCODING=console)
    assert json.loads(as_json.stdout)["hits"][0]["columns"] == {"text": "a 猫"}
    missing = fake("embed", f"{path}.gone", "-m", model, "-o", tmp_path / "other", PYTHONIOENCODING=console)
    assert_one_sentence(missing, "caf\\xe9.jsonl.gone does not exist")


def test_the_options_of_reading_are_the_same_in_all_commands() -> None:
    from llm2vec_fast.training.arguments import ContrastiveArguments, SimcseArguments

    shown = {verb: real(verb, "--help").stdout for verb in ("embed", "mine")}
    for name in ("text_column", "csv_delimiter", "csv_quote", "csv_escape"):
        assert f"--{name.replace('_', '-')}" in shown["embed"]
        assert f"--{name.replace('_', '-')}" in shown["mine"]
        assert name in SimcseArguments.__dataclass_fields__
    for name in ("query_column", "positive_column", "id_column", "csv_delimiter", "csv_quote", "csv_escape"):
        assert f"--{name.replace('_', '-')}" in shown["mine"]
        assert name in ContrastiveArguments.__dataclass_fields__
