"""Word-level heads on a frozen encoder: the right output for each word, runs that go on, scores, and clear refusals."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from reference_data import FOLDER
from safetensors.torch import load_file

from llm2vec_fast import LLM2Vec
from llm2vec_fast.errors import UserError
from llm2vec_fast.training.run import NonFiniteLossError
from llm2vec_fast.training.word_level import WordClassifier, WordLevelArguments, stage, train_word_level
from llm2vec_fast.training.word_level.features import embed_words, word_features
from llm2vec_fast.training.word_level.scores import word_scores
from llm2vec_fast.training.word_level.sentences import read_sentences

Settings = Callable[..., dict[str, object]]
LABELS = {"cat": "B-ANIMAL", "river": "B-PLACE", "walls": "I-PLACE"}


def label(word: str) -> str:
    return LABELS.get(word, "O")


@pytest.fixture
def columns(tmp_path: Path, sentences: list[str]) -> str:
    """CoNLL columns: word, its length, its label."""
    blocks = ["\n".join(f"{word} {len(word)} {label(word)}" for word in text.split()) for text in sentences]
    path = tmp_path / "words.txt"
    path.write_text("-DOCSTART- -X- O\n\n" + "\n\n".join(blocks) + "\n")
    return str(path)


@pytest.fixture
def arguments(columns: str, settings: Settings) -> Callable[..., WordLevelArguments]:
    def arguments(output: str = "out", **changes: object) -> WordLevelArguments:
        given = settings(output, train_file=[columns], per_device_train_batch_size=32, max_seq_length=64)
        return WordLevelArguments(**{**given, "classifier_dropout": 0.0, **changes})

    return arguments


@pytest.fixture(scope="module")
def encoder() -> LLM2Vec:
    return LLM2Vec.from_pretrained(FOLDER / "llama", dtype="float32", device="cpu")


@pytest.mark.parametrize("label_from", ["same_token", "next_token"])
def test_a_words_features_are_the_mean_over_its_tokens(encoder: LLM2Vec, label_from: str) -> None:
    words = ["unbelievable", "cats,", "sat", "(quietly)"]
    (found,) = embed_words(encoder, [words], label_from)
    text = encoder.encode(" ".join(words), output="tokens", convert_to_numpy=True)
    offset = 1 if label_from == "next_token" else 0
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    for i, end in enumerate(ends):
        start = end - len(words[i])
        tokens = [t for t, (a, b) in enumerate(text.offsets) if b > a and start < b <= end]
        expected = text.embeddings[[max(t - offset, 0) for t in tokens]].mean(0)
        np.testing.assert_allclose(found[i], expected, rtol=1e-6, atol=1e-6)
    assert len(text.ids) > len(words)  # else nothing was merged


def test_words_beyond_the_limit_have_no_features() -> None:
    short = LLM2Vec.from_pretrained(FOLDER / "llama", dtype="float32", device="cpu", max_length=6, doc_max_length=6)
    (found,) = embed_words(short, [["cat"] * 20], "same_token")
    missing = np.isnan(found).any(1)
    assert missing.any()
    assert not missing[0]
    assert np.array_equal(np.sort(missing), missing)  # from some word on


def test_words_without_a_prediction_are_wrong() -> None:
    labels = [["B-PER", "O", "O", "B-LOC"]]
    found = word_scores([["B-PER", "O", None, None]], labels)
    assert found["accuracy"] == 0.5
    assert (found["precision"], found["recall"]) == (1.0, 0.5)
    assert word_scores([["DT", None]], [["DT", "O"]])["accuracy"] == 0.5


def test_features_are_kept_and_made_anew_when_anything_differs(encoder: LLM2Vec, tmp_path: Path) -> None:
    path = tmp_path / "words.npy"
    first = np.array(word_features(encoder, [["a", "cat"]], ["same_token"], path)["same_token"])
    stamp = path.stat().st_mtime_ns
    assert np.array_equal(word_features(encoder, [["a", "cat"]], ["same_token"], path)["same_token"], first)
    assert path.stat().st_mtime_ns == stamp
    other = word_features(encoder, [["a", "dog"]], ["same_token"], path)["same_token"]
    assert not np.array_equal(other, first)


def test_both_ways_of_labelling_take_one_pass(encoder: LLM2Vec, tmp_path: Path) -> None:
    sentences = [["unbelievable", "cats"], ["a", "dog", "sat"]]
    found = word_features(encoder, sentences, ["same_token", "next_token"], tmp_path / "words.npy")
    for label_from, rows in found.items():
        assert np.array_equal(rows, np.concatenate(embed_words(encoder, sentences, label_from)))


def test_kept_features_serve_both_ways_of_labelling(
    arguments: Callable[..., WordLevelArguments], tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    once = {"max_steps": 2, "save_strategy": "no", "features_folder": str(kept)}
    train_word_level(arguments("first", **once))
    stamp = (kept / "train.npy").stat().st_mtime_ns
    train_word_level(arguments("second", **once, retroactive_labels="next_token"))
    assert (kept / "train.npy").stat().st_mtime_ns == stamp
    train_word_level(arguments("alone", max_steps=2, save_strategy="no", retroactive_labels="next_token"))
    heads = {name: load_file(tmp_path / name / "head.safetensors")["linear.weight"] for name in ("second", "alone")}
    assert torch.equal(heads["second"], heads["alone"])
    first = load_file(tmp_path / "first" / "head.safetensors")["linear.weight"]
    assert not torch.equal(first, heads["second"])


def test_a_head_learns_is_scored_and_labels_words(
    arguments: Callable[..., WordLevelArguments], columns: str, tmp_path: Path
) -> None:
    train_word_level(arguments(test_file=[columns], max_steps=100, learning_rate=0.1, save_strategy="no"))
    scores = json.loads((tmp_path / "out" / "test_results.json").read_text())
    assert scores["test_words_cut"] == 0
    run = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert run["train_words_per_second"] > 0
    assert run["peak_memory_mib"] > 0
    assert not (tmp_path / "out" / "features").exists()
    sentences = read_sentences([columns], "0", "-1")
    labels = [sentence.labels for sentence in sentences]
    tagger = WordClassifier.from_pretrained(tmp_path / "out", dtype="float32", device="cpu")
    found = word_scores(tagger.predict([sentence.words for sentence in sentences]), labels)
    assert found == {name: scores[f"test_{name}"] for name in found}
    untaught = word_scores([["O"] * len(some) for some in labels], labels)
    assert found["accuracy"] > untaught["accuracy"]
    assert found["f1"] > untaught["f1"] == 0


def test_a_head_names_its_encoder_from_anywhere(
    arguments: Callable[..., WordLevelArguments], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FOLDER)
    train_word_level(arguments(model_name_or_path="llama", peft_model_name_or_path="llama-lora", max_steps=1))
    monkeypatch.chdir(tmp_path)
    assert WordClassifier.from_pretrained("out", dtype="float32", device="cpu").labels


def test_an_interrupted_run_goes_on_to_the_same_weights(
    arguments: Callable[..., WordLevelArguments], tmp_path: Path
) -> None:
    options = {"classifier_dropout": 0.5, "lr_scheduler_type": "constant"}
    train_word_level(arguments("whole", **options))
    train_word_level(arguments("cut", max_steps=2, **options))
    train_word_level(arguments("cut", **options))
    whole, cut = (load_file(tmp_path / name / "head.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_full_disk_and_a_loss_that_is_not_finite_are_told(
    arguments: Callable[..., WordLevelArguments], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        NonFiniteLossError, match=r"the loss is nan at step 2 on the words \d+, \d+.*not saved, there is no"
    ):
        train_word_level(arguments("broken", learning_rate=float("inf"), lr_scheduler_type="constant"))
    assert not (tmp_path / "broken" / "checkpoint-1").exists()  # from which the same command would go on

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stage, "save_head", full)
    with pytest.raises(UserError, match=r"full cannot be written: No space left on device; make room and start again"):
        train_word_level(arguments("full"))
    assert (tmp_path / "full" / "checkpoint-4").is_dir()


def test_tables_and_columns_hold_the_same_sentences(columns: str, tmp_path: Path) -> None:
    expected = read_sentences([columns], "0", "-1")
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"tokens": s.words, "tags": s.labels}) + "\n" for s in expected))
    assert read_sentences([str(path)], "tokens", "tags") == expected
    assert expected[0].labels == [label(word) for word in expected[0].words]
    assert read_sentences([columns], "0", "1")[0].labels == [str(len(word)) for word in expected[0].words]


def test_the_home_folder_may_be_a_tilde(
    arguments: Callable[..., WordLevelArguments], columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(columns).rename(tmp_path / "words.conll")
    monkeypatch.setenv("HOME", str(tmp_path))
    result = train_word_level(arguments(train_file=["~/words.conll"], max_steps=1, save_strategy="no"))
    assert result.global_step == 1


def test_texts_are_not_taken_for_labelled_words(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("the cat sat\nrain fell over old stone walls\n")
    with pytest.raises(
        UserError, match=r"line 2 of .*texts.txt has 6 columns where those before have 3: give one word"
    ):
        read_sentences([str(path)], "0", "-1")


def test_labels_that_training_never_saw_are_told(
    arguments: Callable[..., WordLevelArguments], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "test.txt").write_text("cat 3 B-CAT\nriver 5 B-PLACE\n")
    result = train_word_level(arguments(test_file=[str(tmp_path / "test.txt")], max_steps=1, save_strategy="no"))
    assert "test_file has labels that train_file has not: B-CAT" in caplog.text
    assert 0 <= result.metrics["test_accuracy"] <= 0.5


def test_of_universal_columns_only_words_are_read(tmp_path: Path) -> None:
    path = tmp_path / "words.conllu"
    path.write_text(
        "# sent_id = 1\n# text = au 10 000 #\n1-2\tau\t_\t_\n1\tà\tà\tADP\n2\tle\tle\tDET\n"
        "3\t10 000\t10 000\tNUM\n3.1\tx\tx\tX\n4\t#\t#\tSYM\n\n1\toui\toui\tINTJ\n"
    )
    assert read_sentences([str(path)], "1", "3") == [
        (["à", "le", "10 000", "#"], ["ADP", "DET", "NUM", "SYM"]),
        (["oui"], ["INTJ"]),
    ]


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        ("a DT\n", "3", r"line 1 of .* has 2 columns and no label_column=3"),
        ("\n\n", "-1", "there is no labelled sentence in"),
        ("a DT\n", "tag", "label_column='tag' is not a number"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path: Path, content: str, column: str, message: str) -> None:
    path = tmp_path / "words.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_sentences([str(path)], "0", column)


def test_a_row_without_a_label_a_word_is_named(tmp_path: Path) -> None:
    path = tmp_path / "words.jsonl"
    path.write_text('{"tokens": ["a", "cat"], "tags": ["DT"]}\n')
    with pytest.raises(UserError, match=r"line 1 of .* has not one label a word"):
        read_sentences([str(path)], "tokens", "tags")
    with pytest.raises(UserError, match=r"has no column 'ner' .label_column.: its columns are 'tokens', 'tags'"):
        read_sentences([str(path)], "tokens", "ner")


@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_that_stands_for_no_class_is_named(tmp_path: Path, number: int) -> None:
    tags = List(ClassLabel(names=["DT", "NN"]))
    rows = Dataset.from_dict(
        {"tokens": [["a", "cat"], ["the"]], "tags": [[0, 1], [0]]},
        Features({"tokens": List(Value("string")), "tags": tags}),
    )
    path = tmp_path / "words.parquet"
    rows.to_parquet(str(path))
    assert read_sentences([str(path)], "tokens", "tags")[0].labels == ["DT", "NN"]
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, table.schema.field(1), pa.array([[0, 1], [number]])), path)
    with pytest.raises(UserError, match=r"row 2 of .* has a label that is none of the 2 of its column"):
        read_sentences([str(path)], "tokens", "tags")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("words.txt", "Ma\u00f1ana NC\n".encode("latin-1"), "line 1 of .*words.txt: byte 0xf1 .* is not UTF-8"),
        ("words.jsonl", b'{"tokens": ["a"], "tags": \n', "line 1 of .*words.jsonl: the line is not JSON"),
        ("words.jsonl", b"", "words.jsonl is empty"),
        ("words.parquet", b"no table", "words.parquet is not a Parquet file that can be read: "),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_sentences([str(file)], *(("0", "1") if name.endswith("txt") else ("tokens", "tags")))
    assert str(file) in str(caught.value)


def test_entities_count_whole() -> None:
    labels = [["B-PER", "I-PER", "O", "B-LOC"]]
    scores = word_scores([["B-PER", "O", "O", "B-LOC"]], labels)
    assert scores == {"accuracy": 0.75, "f1": 0.5, "precision": 0.5, "recall": 0.5}
    assert word_scores([["DT", "NN"]], [["DT", "VB"]]) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("name", "content", "words", "labels"),
    [
        ("a.txt", "New York\tB-LOC\nOld Town\tB-LOC\n", ["New York", "Old Town"], ["B-LOC", "B-LOC"]),
        ("a.tsv", "a\tDT\r\nNew York\tNN\t\r\n", ["a", "New York"], ["DT", "NN"]),
        ("a.tsv", "a\t\tDT\ncat \tx\tNN\n", ["a", "cat"], ["DT", "NN"]),
        ("a.txt", "10\u00a0000 NUM\n\u3000 SYM\na\u2028b\fc X \n", ["10\u00a0000", "\u3000", "a\u2028b\fc"], None),
        ("a.txt", '" \'\'\n"a "\n# O\n', ['"', '"a', "#"], ["''", '"', "O"]),
        ("a.txt", "\ufeff-DOCSTART- O\n\na DT\n\ufeff-DOCSTART- O\n", ["a"], ["DT"]),
        ("a.txt", "NA null\nnan None\n007 1.50\n", ["NA", "nan", "007"], ["null", "None", "1.50"]),
        ("a.txt", "a DT\rcat NN\r", ["a", "cat"], ["DT", "NN"]),
    ],
)
def test_words_and_labels_are_what_the_file_says(
    tmp_path: Path, name: str, content: str, words: list[str], labels: list[str] | None
) -> None:
    (tmp_path / name).write_bytes(content.encode())
    (found,) = read_sentences([str(tmp_path / name)], "0", "-1")
    assert found.words == words
    assert labels is None or found.labels == labels


@pytest.mark.parametrize(
    ("words", "labels", "message"),
    [
        (["a", None], ["X", "Y"], "row 1 of .*: the word is null"),
        (["a", "b"], ["X", None], "row 1 of .*: the label is null"),
        (["a", ""], ["X", ""], "row 1 of .*: the label is empty"),
        ([1999, 5], ["X", "Y"], "row 1 of .*: the word is not a string but int '1999'"),
        ([1.5], ["X"], "row 1 of .*: the word is not a string but float '1.5'"),
        (["a"], [True], "row 1 of .*: the label is not a string but bool 'True'"),
        ([b"\xff"], ["X"], "row 1 of .*: byte 0xff at byte 0 of the word is not UTF-8"),
    ],
)
def test_what_is_no_word_or_label_is_not_made_one(
    tmp_path: Path, words: list[object], labels: list[object], message: str
) -> None:
    path = tmp_path / "words.parquet"
    pq.write_table(pa.table({"tokens": [words], "tags": [labels]}), path)
    with pytest.raises(UserError, match=message):
        read_sentences([str(path)], "tokens", "tags")


def test_words_of_bytes_and_labels_of_numbers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "words.parquet"
    pq.write_table(pa.table({"tokens": [["caf\u00e9".encode(), b"a"]], "tags": [[3, 0]]}), path)
    assert read_sentences([str(path)], "tokens", "tags") == [(["caf\u00e9", "a"], ["3", "0"])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "a\tDT\ncat\t\n", r"line 2 of .* has 1 columns where those before have 2"),
        ("a.tsv", "a\tx\tDT\n\tx\tNN\n", r"line 2 of .* has 2 columns where"),
        ("a.tsv", "a\tDT\tx\ncat\t\tx\n", r"line 2 of .* has nothing in label_column=1: give each word its label"),
        ("a.conllu", "1\ta\ta\tDT\n2 cat cat NN\n", r"line 2 of .* begins with '2 cat cat NN', which numbers no word"),
    ],
)
def test_a_line_that_lacks_a_field_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_sentences([str(tmp_path / name)], "0", "1")


def test_words_and_files_that_are_of_no_use_are_told(
    arguments: Callable[..., WordLevelArguments], columns: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "long.txt").write_text("cat NN\n\u00a0 SYM\n" + "mat NN\n" * 90)
    files = [columns, str(tmp_path / "empty.txt"), str(tmp_path / "long.txt")]
    train_word_level(arguments(train_file=files, max_steps=1, save_strategy="no"))
    assert "empty.txt holds no labelled sentence" in caplog.text
    assert re.search(r"\d+ of \d+ words of train_file have no token of their own: they are white space or", caplog.text)
