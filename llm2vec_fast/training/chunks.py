"""A batch cut into chunks: by rows, or by tokens, so that chunks of short and of long texts are equal work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from llm2vec_fast.kernels.layout import SequenceLayout

LAYOUT = "layout"  # of a packed input


def by_rows(x: Any, size: int) -> Iterator[Any]:
    """An input in chunks of ``size`` texts, in order; see `GradCache` for what an input may be.

    Raises:
        ValueError: see `count_rows`; or a layout is not that of a packed batch.
    """
    count = count_rows(x)
    yield from _cut(x, [slice(first, min(count, first + size)) for first in range(0, count, size)])


def by_tokens(x: Any, budget: int) -> Iterator[Any]:
    """An input in chunks of at most ``budget`` tokens, in order; a longer text is alone.

    Raises:
        ValueError: see `by_rows`; or the input does not tell how many tokens a text has.
    """
    count_rows(x)
    yield from _cut(x, list(_runs(_lengths(x), budget)))


def pieces(layout: SequenceLayout, budget: int | None) -> Iterator[tuple[SequenceLayout, slice, slice]]:
    """The sequences cut, in order, into packed batches of at most ``budget`` tokens; which texts and rows they are.

    A longer sequence is alone.
    """
    if budget is None or layout.total <= budget:
        yield layout, slice(0, len(layout)), slice(0, layout.total)
        return
    lengths = layout.lengths.tolist()
    yield from _packed_parts(layout, lengths, list(_runs(lengths, budget)))


def count_rows(x: Any) -> int:
    """Texts of an input: rows of a tensor, of a sequence or of a mapping's values, sequences of its layout.

    Raises:
        ValueError: there are none, or the tensors of a mapping differ in their number.
    """
    layout = _layout_of(x)
    if layout is not None:
        counts = {len(layout)}
    else:
        values = [value for value in x.values() if _has_rows(value)] if isinstance(x, Mapping) else [x]
        counts = {len(value) for value in values}
    if len(counts) != 1 or 0 in counts:
        found = f"parts of {sorted(counts)} rows" if counts else "nothing with rows"
        raise ValueError(f"an input of type {type(x).__name__} holds {found}: pass one number of rows, at least one")
    return counts.pop()


def _runs(lengths: Sequence[int], budget: int) -> Iterator[slice]:
    first, held = 0, 0
    for text, length in enumerate([*lengths, budget + 1]):
        if text > first and held + length > budget:
            yield slice(first, text)
            first, held = text, 0
        held += length


def _cut(x: Any, runs: list[slice]) -> Iterator[Any]:
    layout = _layout_of(x)
    if layout is not None:
        for part, texts, tokens in _packed_parts(layout, layout.lengths.tolist(), runs):
            yield {name: _part_of(value, layout, part, texts, tokens) for name, value in x.items()}
        return
    for rows in runs:
        if isinstance(x, Mapping):
            yield {name: value[rows] if _has_rows(value) else value for name, value in x.items()}
        else:
            yield x[rows]


def _packed_parts(
    layout: SequenceLayout, lengths: list[int], runs: list[slice]
) -> Iterator[tuple[SequenceLayout, slice, slice]]:
    ends = [0, *accumulate(lengths)]
    for texts in runs:
        part = SequenceLayout.from_lengths(lengths[texts], layout.device)
        yield part, texts, slice(ends[texts.start], ends[texts.stop])


def _part_of(value: Any, layout: SequenceLayout, part: SequenceLayout, texts: slice, tokens: slice) -> Any:
    if value is layout:
        return part
    if isinstance(value, Tensor) and value.shape[:2] == (1, layout.total):
        return value[:, tokens]
    return value[texts] if _has_rows(value) and len(value) == len(layout) else value


def _lengths(x: Any) -> list[int]:
    """Tokens of each text, as they are run: padding, too, is run where it is there."""
    layout = _layout_of(x)
    if layout is not None:
        return layout.lengths.tolist()
    ids = x.get("input_ids") if isinstance(x, Mapping) else x
    if isinstance(ids, Tensor) and ids.ndim >= 2:
        return [ids.shape[1]] * len(ids)
    if isinstance(ids, Sequence) and all(
        hasattr(text, "__len__") and not isinstance(text, str | Mapping) for text in ids
    ):
        return [len(text) for text in ids]
    raise ValueError(
        f"an input of type {type(x).__name__} does not tell how many tokens its texts have: pass input_ids, packed "
        "with their layout, padded, or one sequence a text; or give chunk_size"
    )


def _layout_of(x: Any) -> SequenceLayout | None:
    """A packed input's.

    Raises:
        ValueError: it is that of a padded batch.
    """
    layout = x.get(LAYOUT) if isinstance(x, Mapping) else None
    if not isinstance(layout, SequenceLayout):
        return None
    if layout.padded_shape is not None:
        raise ValueError(f"the layout is that of a padded batch {layout.padded_shape}: pass its attention_mask instead")
    return layout


def _has_rows(x: Any) -> bool:
    return (isinstance(x, Tensor) and x.ndim > 0) or (isinstance(x, Sequence) and not isinstance(x, str))
