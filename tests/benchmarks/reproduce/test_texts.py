"""Training texts in the form in which word-level tasks give their sentences."""

import pytest

from benchmarks.reproduce.texts import as_words


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
