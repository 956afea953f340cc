"""Which texts are known to suit a row's query, against its definition written out over all pairs of rows."""

from __future__ import annotations

import random

from llm2vec_fast.data.pairs import known_positives


def test_a_text_suits_the_queries_of_its_rows_and_of_their_namesakes_and_no_others() -> None:
    """Few texts, which are queries here and documents there, and few names: every coincidence happens."""
    rng = random.Random(0)
    for _ in range(300):
        texts = [f"text {i}" for i in range(rng.randint(2, 14))]
        rows = [
            (rng.choice(texts), rng.choices(texts, k=rng.randint(1, 3)), rng.choice([None, None, "x", "y", "z"]))
            for _ in range(rng.randint(1, 12))
        ]
        known = known_positives(rows)
        for row, (query, _, name) in enumerate(rows):
            suits = {
                text
                for other, documents, namesake in rows
                if other == query or (name is not None and namesake == name)
                for text in (other, *documents)
            }
            found = {text for text in [*texts, "unheard of"] if known.of_text(text) in known.of_row(row)}
            assert found == suits, (rows, row)


def test_white_space_makes_no_other_text() -> None:
    known = known_positives([("a cat", ["it  sat"], None)])
    assert known.of_text(" it sat\n") in known.of_row(0)
    assert known.of_text("It sat") not in known.of_row(0)


def test_a_row_of_a_thousand_documents_of_its_own_has_one_id() -> None:
    """What a batch compares grows with what is shared alone."""
    many = [f"document {i}" for i in range(1000)]
    known = known_positives([("q", many, None), ("other", ["document 7", "mine"], None)])
    assert len(known.of_row(0)) == len(known.of_row(1)) == 2
    named = known_positives((f"q {i}", [text], "class") for i, text in enumerate(many))
    assert len(named.of_row(5)) == 1
