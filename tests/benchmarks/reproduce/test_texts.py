"""Training texts: in the form in which word-level tasks give theirs, and none that a score is computed on."""

from pathlib import Path

import pytest

from benchmarks.fetch.sts_benchmark import Pair
from benchmarks.fetch.wikipedia import Section
from benchmarks.reproduce import texts
from benchmarks.reproduce.texts import as_words, normalised, paragraphs_and_sentences, single_sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I don't think France's team won (really)?", "I do n't think France 's team won ( really ) ?"),
        ("The U.S. fell 3.5% to $1,000-2.", "The U.S. fell 3.5 % to $ 1,000-2 ."),
        ("It’s well-known: AT&T/Bell rose", "It ’s well-known : AT&T/Bell rose"),
        ("EU rejects German call .", "EU rejects German call ."),
    ],
)
def test_words_and_marks_are_parted_as_in_treebanks(text: str, expected: str) -> None:
    assert as_words(text) == expected


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of which some are in an evaluation set, one of them written otherwise there."""
    scored = {"dev": "A man plays a flute.", "test": "Two dogs run over grass.", "train": "It rains on the roof."}
    conll = {"train": "They O\ndo O\nn't O\nknow O\nFrance LOC\n. O", "valid": "Rare NNP\nHendrix NNP", "test": "-X- O"}
    sections = [Section("Page", "", ["A man plays a flute. The river bends here again."])]
    given = [
        "They don't know France.", "two dogs run over grass", "It rains, on the roof!", "Nobody has scored this text.",
        "Nobody has scored this text.", "Rare Hendrix",
    ]  # fmt: skip
    for name, content in conll.items():
        (tmp_path / name).write_text(content.replace(" O", " X X O"))
    monkeypatch.setattr(texts.sts_benchmark, "pairs", lambda name: [Pair(scored[name], scored[name], 1.0)])
    monkeypatch.setattr(texts.conll2003, "file", lambda name: tmp_path / name)
    monkeypatch.setattr(texts.wikipedia, "sections", lambda: iter(sections))
    monkeypatch.setattr(texts.sentences, "sentences", lambda: given)


@pytest.mark.usefixtures("sources")
def test_no_text_that_is_scored_is_trained_on() -> None:
    whole = {normalised(text) for text in paragraphs_and_sentences()}
    assert whole == {
        normalised("A man plays a flute. The river bends here again."),
        normalised("Nobody has scored this text."),
    }
    assert sorted(single_sentences()) == ["Nobody has scored this text.", "The river bends here again."]
