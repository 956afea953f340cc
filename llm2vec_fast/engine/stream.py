"""The loop behind `LLM2Vec.encode`: tokens of the next texts are made while the model runs on these; rows in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tqdm.auto import tqdm

from ..errors import NonFiniteEmbeddingError, UserError
from ..tokenization import TextTokenizer, TokenizedTexts
from .executor import Executor
from .network import Network, spare_rows
from .plan import even_count, plan_batches
from .prepare import Pairs, one_ahead, prepare, take_out_unknown
from .request import OnBatch, OnProblem, Request, Row

# Texts tokenised and planned together: enough that texts of near-equal length meet in a batch, few enough that the
# first forward pass starts soon.
CPU_TEXTS_PER_CHUNK = 1024
GPU_TEXTS_PER_CHUNK = 8192
NOT_FINITE = "the embedding is not finite, in float32 too"


@dataclass(frozen=True)
class Task:
    """One call of `encode_pairs`.

    Attributes:
        name_of: a token, by its id.
        cores: how many forward passes may run at a time.
    """

    network: Network
    tokenizer: TextTokenizer
    request: Request
    on_batch: OnBatch
    name_of: Callable[[int], str]
    cores: int


def encode_pairs(task: Task, pairs: Pairs, on_problem: OnProblem | None) -> list[Row]:
    """A result for each (instruction, text) pair, in order.

    Rows that are not finite are computed once more in float32, each weight converted as it is read.

    Raises:
        UserError: a prompt fills all of max_length; or, without ``on_problem``, a text cannot be embedded.
        NonFiniteEmbeddingError: without it, a result is not finite, in float32 either.
    """
    problems: dict[int, str] = {}

    def report(place: int, reason: str) -> None:
        if on_problem is None:
            raise UserError(f"sentences[{place}]: {reason}")
        problems[place] = reason

    rows = list(_run(task, pairs, report))
    broken = [i for i, row in enumerate(rows) if i not in problems and not np.isfinite(row.values).all()]
    if broken:
        broken = _once_more(task, pairs, rows, broken)
    if broken and on_problem is None and not task.request.keep_non_finite:
        raise NonFiniteEmbeddingError(
            f"{len(broken)} of {len(rows)} embeddings hold NaN or infinity, in float32 too, the first that of "
            f"sentences[{broken[0]}]: check the model's weights, or pass non_finite='keep' to get such rows as NaN"
        )
    for i in broken:
        rows[i] = replace(rows[i], values=np.full_like(rows[i].values, np.nan))
    if on_problem is not None:
        for place, reason in sorted({**problems, **dict.fromkeys(broken, NOT_FINITE)}.items()):
            on_problem(place, reason)
    return rows


@contextmanager
def progress(total: int, shown: bool, on_batch: OnBatch | None) -> Iterator[OnBatch]:
    """What to call after each forward pass: it moves a progress bar and tells the caller."""
    with tqdm(total=total, unit="text", desc="embedding", disable=not shown) as bar:

        def report(rows: int, tokens: int, padded_tokens: int) -> None:
            bar.update(rows)
            if on_batch is not None:
                on_batch(rows, tokens, padded_tokens)

        yield report


def _once_more(task: Task, pairs: Pairs, rows: list[Row], broken: Sequence[int]) -> list[int]:
    """Replace rows by what float32 makes of them; which of them are not finite in it either.

    Whatever goes wrong in it (weights in a form that only computes in its own dtype, no memory) costs these rows alone.
    """
    network = task.network.in_float32()
    if network is None:
        return list(broken)
    left = []
    again = replace(task, network=network, on_batch=lambda *_: None, cores=1)
    for some in np.array_split(np.array(broken), -(-len(broken) // CPU_TEXTS_PER_CHUNK)):
        try:
            found = list(_run(again, [pairs[i] for i in some], lambda place, reason: None))
        except (RuntimeError, ValueError, TypeError, MemoryError, AttributeError, NotImplementedError):
            left += some.tolist()
            continue
        for i, row in zip(some.tolist(), found, strict=True):
            rows[i] = row
            if not np.isfinite(row.values).all():
                left.append(i)
    return left


def _run(task: Task, pairs: Pairs, report: OnProblem) -> Iterator[Row]:
    request, network, tokenizer = task.request, task.network, task.tokenizer
    size = CPU_TEXTS_PER_CHUNK if network.device.type == "cpu" else GPU_TEXTS_PER_CHUNK
    chunks = [range(first, min(first + size, len(pairs))) for first in range(0, len(pairs), size)]

    def prepared(chunk: range) -> TokenizedTexts:
        some = pairs[chunk.start : chunk.stop]
        return prepare(tokenizer, some, chunk.start, offsets=request.tokens, skip_prompt=request.skip_prompt)

    with closing(one_ahead(prepared, chunks)) as coming:
        for chunk, tokens in zip(chunks, coming, strict=True):
            yield from _rows(task, tokens, partial(_report_from, report, chunk.start))


def _report_from(report: OnProblem, first: int, place: int, reason: str) -> None:
    report(first + place, reason)


def _rows(task: Task, tokens: TokenizedTexts, report: OnProblem) -> Iterator[Row]:
    unknown = take_out_unknown(tokens, task.network.vocabulary, task.name_of)
    for place, reason in unknown.items():
        report(place, reason)
    values = _embed(task, tokens, report)
    for place in unknown:
        values[place] = _nothing(task, 0)
    if not task.request.tokens:
        yield from map(Row, values)
        return
    for rows, offsets, ids, skip in zip(values, tokens.offsets, tokens.ids, tokens.skip, strict=True):
        yield Row(rows[skip:], offsets[skip:], ids[skip:])


def _embed(task: Task, tokens: TokenizedTexts, report: OnProblem) -> list[np.ndarray]:
    """Each text's embedding, or all its token rows; brought to the CPU after the last batch, so a GPU never waits."""
    request, network, on_batch = task.request, task.network, task.on_batch
    lengths, device = tokens.lengths, network.device
    values = [np.zeros((0, request.width) if request.tokens else request.width, np.float32)] * len(lengths)
    some = np.flatnonzero(lengths)  # a text without a token needs no forward pass
    if len(some) < len(lengths):
        on_batch(len(lengths) - len(some), 0, 0)
    count = even_count(int(lengths.sum()), request.token_budget) if device.type == "cpu" else None
    batches = [some[planned] for planned in plan_batches(lengths[some], request.token_budget, count)]

    def tell(batch: np.ndarray) -> None:
        total = int(lengths[batch].sum())
        on_batch(len(batch), total, total + spare_rows(total, device))

    executor = Executor(partial(network.embed, tokens, request), lengths, device, task.cores, at_once=request.tokens)
    for batch, result in executor.run(batches, tell):
        if result is None:
            (text,) = batch.tolist()
            values[text] = _nothing(task, int(lengths[text]))
            report(text, _too_long(int(lengths[text])))
            continue
        rows = result.numpy()
        by_text = np.split(rows, lengths[batch].cumsum()[:-1]) if request.tokens else rows
        for text, row in zip(batch.tolist(), by_text, strict=True):
            values[text] = row
    return values


def _nothing(task: Task, tokens: int) -> np.ndarray:
    """What stands for a text that cannot be embedded."""
    width = task.request.width
    return np.full((tokens, width) if task.request.tokens else width, np.nan, np.float32)


def _too_long(tokens: int) -> str:
    return (
        f"memory ran out on this text alone, {tokens:,} tokens: lower max_length, or take a device with more memory "
        "or a narrower dtype"
    )
