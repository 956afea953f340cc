"""SequenceLayout finds the same sequences however a batch is described, and refuses what it cannot describe."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm2vec_fast.kernels.layout import SequenceLayout


def _rows(layout):
    pairs = zip(layout.starts.tolist(), layout.lengths.tolist(), strict=True)
    return [list(range(start, start + length)) for start, length in pairs]


@given(st.lists(st.integers(0, 9), max_size=8))
def test_packed_descriptions_agree(lengths):
    layout = SequenceLayout.from_lengths(lengths)
    again = SequenceLayout.from_cu_seqlens(layout.cu_seqlens)
    assert _rows(again) == _rows(layout)
    assert layout.total == sum(lengths)
    assert layout.max_length == max(lengths, default=0)
    assert layout.padded_shape is None
    filled = [length for length in lengths if length]
    assert _rows(SequenceLayout.from_position_ids(layout.position_ids)) == _rows(SequenceLayout.from_lengths(filled))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6))
def test_a_padded_mask_gives_the_rows_of_its_real_tokens(texts):
    width = max(length + left + right for length, left, right in texts)
    mask = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, (length, left, _) in enumerate(texts):
        mask[row, left : left + length] = 1
    layout = SequenceLayout.from_attention_mask(mask)
    flat = mask.flatten().bool()
    assert layout.rows.tolist() == flat.nonzero().flatten().tolist()
    assert torch.equal(layout.sequence_ids >= 0, flat)
    assert layout.lengths.tolist() == [length for length, _, _ in texts]
    assert layout.padded_shape == mask.shape
    for (length, left, _), ids in zip(texts, layout.position_ids.view(mask.shape).tolist(), strict=True):
        assert ids[left : left + length] == list(range(length))


def test_a_dense_batch_is_a_mask_of_ones():
    dense, masked = SequenceLayout.from_shape(3, 5), SequenceLayout.from_attention_mask(torch.ones(3, 5))
    assert _rows(dense) == _rows(masked)
    assert (dense.total, dense.max_length, dense.padded_shape) == (15, 5, (3, 5))


def test_empty_batches():
    for layout in (
        SequenceLayout.from_lengths([]),
        SequenceLayout.from_attention_mask(torch.ones(0, 5)),
        SequenceLayout.from_shape(0, 5),
    ):
        assert (len(layout), layout.total, layout.max_length) == (0, 0, 0)
        assert layout.rows.tolist() == []
        assert layout.sequence_ids.tolist() == []
    assert SequenceLayout.from_attention_mask(torch.ones(3, 0)).lengths.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequenceLayout.from_lengths([3, -1]), "negative value -1"),
        (lambda: SequenceLayout.from_lengths(torch.ones(2, 2)), r"shape \(2, 2\)"),
        (lambda: SequenceLayout.from_lengths([1.5, 2]), "dtype torch.float32: pass token counts"),
        (lambda: SequenceLayout.from_cu_seqlens(torch.tensor([0, 2.5])), "dtype torch.float32: pass token counts"),
        (lambda: SequenceLayout.from_cu_seqlens(torch.tensor([1, 4])), "start at 0"),
        (lambda: SequenceLayout.from_cu_seqlens(torch.tensor([0, 4, 2])), "negative value -2"),
        (lambda: SequenceLayout.from_attention_mask(torch.tensor([[1, 1, 1], [1, 0, 1]])), "row 1 has padding between"),
        (lambda: SequenceLayout.from_attention_mask(torch.ones(2, 1, 3)), "2-D mask"),
        (lambda: SequenceLayout.from_position_ids(torch.tensor([[1, 2, 0]])), "starts at 1"),
        (lambda: SequenceLayout.from_position_ids(torch.zeros(2, 3)), r"\(2, 3\)"),
    ],
)
def test_what_it_cannot_describe_is_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()
