"""A tile table names exactly the tiles that exist, longest sequence first, and is made once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.kernels.tiles import tile_table


def _table(layout, block):
    return tile_table(layout.starts, layout.lengths, block)


@given(lengths=st.lists(st.integers(0, 50), max_size=20), block=st.sampled_from([16, 32]))
def test_every_position_lies_in_exactly_one_tile(lengths, block):
    layout = SequenceLayout.from_lengths(lengths)
    table = _table(layout, block)
    covered = [
        (sequence, position)
        for sequence, first, start, length, _ in table.rows.tolist()
        for position in range(first, min(first + block, length))
        if (start, length) == (int(layout.starts[sequence]), lengths[sequence])
    ]
    assert sorted(covered) == [(i, position) for i, length in enumerate(lengths) for position in range(length)]
    assert table.count == sum(-(-length // block) for length in lengths)
    assert table.tokens == sum(lengths)


def test_a_skewed_batch_launches_no_idle_program_and_starts_the_longest_first():
    table = _table(SequenceLayout.from_lengths([16] * 500 + [8192]), 128)
    assert table.count == 64 + 500
    assert table.rows[:64, 0].tolist() == [500] * 64
    assert table.rows[:64, 1].tolist() == list(range(0, 8192, 128))


def test_it_is_made_once_a_layout():
    layout = SequenceLayout.from_lengths([3, 40])
    assert _table(layout, 16) is _table(layout, 16)


def test_other_starts_and_changed_lengths_give_another_table():
    packed = SequenceLayout.from_lengths([3, 40])
    _table(packed, 16)
    moved = tile_table(packed.starts + 7, packed.lengths, 16)
    assert moved.rows[:, 2].tolist() == [10, 10, 10, 7]
    packed.lengths[1] = 5
    assert _table(packed, 16).tokens == 8


def test_it_works_in_inference_mode():
    with torch.inference_mode():
        assert _table(SequenceLayout.from_lengths([3, 40]), 16).count == 4
