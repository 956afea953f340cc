"""The attention kernels' hand-picked configurations against their neighbours, each checked, then timed."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from benchmarks.gpu.contest import Contender, compete
from benchmarks.gpu.section import Context, NotAvailableError, Row
from benchmarks.gpu.sections.attention import WIDTH, Problem
from benchmarks.gpu.timing import Clock
from llm2vec_fast.kernels.attention import configurations
from llm2vec_fast.kernels.attention.configurations import Configuration
from llm2vec_fast.kernels.tiles import PADDED_TO

# What is timed to compare configurations of a kernel; the backward pass runs both of its kernels, one of them varied.
KERNELS = {"forward": "forward", "backward_keys": "backward", "backward_queries": "backward"}
HEAD_DIMS = (128, 64)
LENGTH, TOKENS = 4096, 8192
COMPILERS = 8
LEAST_SECONDS = 4.0
# The backward kernels read buffers in which every sequence is padded to so many rows: no larger tile may be tried.
BLOCKS = tuple(block for block in (16, 32, 64, 128, 256) if block <= PADDED_TO)


def rows(context: Context) -> Iterator[Row]:
    """A row a configuration, and for each kernel and head size the best one beside the chosen one."""
    head_dims = (16,) if context.smoke else HEAD_DIMS
    chosen = _in_process(_chosen, head_dims, context)
    candidates = {key: neighbours(config)[: 2 if context.smoke else None] for key, config in chosen.items()}
    broken = {} if context.smoke else _compile_beforehand(candidates, context)
    clock = Clock(context.smoke)
    for (kernel, head_dim), configs in candidates.items():
        found = []
        for row in _measure(kernel, head_dim, configs, broken, context, clock):
            found.append(row)
            yield row
        yield from _best(kernel, head_dim, chosen[kernel, head_dim], found)


def neighbours(config: Configuration) -> list[Configuration]:
    """The configuration itself, then those that differ from it in one choice, and in both block sizes traded."""
    others = [
        dataclasses.replace(config, **{name: value})
        for name, values in (("block_q", _beside(config.block_q)), ("block_k", _beside(config.block_k)))
        for value in values
    ]
    others += [dataclasses.replace(config, warps=warps) for warps in (4, 8) if warps != config.warps]
    others += [dataclasses.replace(config, stages=config.stages + step) for step in (-1, 1) if config.stages + step > 0]
    others += [
        dataclasses.replace(config, **{field.name: not getattr(config, field.name)})
        for field in dataclasses.fields(config)
        if field.name == "described"
    ]
    others.append(dataclasses.replace(config, block_q=config.block_k, block_k=config.block_q))
    return list(dict.fromkeys([config, *others]))


def using(kernel: str, config: Configuration) -> AbstractContextManager[None]:
    """Inside, ``kernel`` ("forward", …) is launched by ``config``."""
    return _replaced(kernel, lambda *_: config)


@contextmanager
def _replaced(kernel: str, choose: Callable[..., Configuration]) -> Iterator[None]:
    before = getattr(configurations, kernel)
    setattr(configurations, kernel, choose)
    try:
        yield
    finally:
        setattr(configurations, kernel, before)


def _beside(block: int) -> list[int]:
    return [x for x in (block // 2, block * 2) if x in BLOCKS]


def _chosen(head_dims: Sequence[int], context: Context) -> dict[tuple[str, int], Configuration]:
    """What the library launches each kernel with, seen in a launch."""
    seen: dict[tuple[str, int], Configuration] = {}
    for head_dim in head_dims:
        with ExitStack() as stack:
            for kernel in KERNELS:
                stack.enter_context(_watched(kernel, head_dim, seen))
            _run_small(head_dim, context)
    return {(kernel, head_dim): seen[kernel, head_dim] for kernel in KERNELS for head_dim in head_dims}


@contextmanager
def _watched(kernel: str, head_dim: int, seen: dict[tuple[str, int], Configuration]) -> Iterator[None]:
    choose = getattr(configurations, kernel)

    def watching(*arguments: Any) -> Configuration:
        seen[kernel, head_dim] = choose(*arguments)
        return seen[kernel, head_dim]

    with _replaced(kernel, watching):
        yield


def _run_small(head_dim: int, context: Context) -> None:
    """Forward and backward, with the strides and heads of the real thing, which decide what is compiled."""
    contender = _problem(head_dim, 16 if context.smoke else 256, context).makers()["ours, Triton"]()
    contender.gradients(contender.outputs())


def _problem(head_dim: int, tokens: int, context: Context) -> Problem:
    heads = 2 if context.smoke else WIDTH // head_dim
    return Problem([min(tokens, LENGTH)] * max(1, tokens // LENGTH), head_dim, heads, context)


def _compile_one(kernel: str, head_dim: int, config: Configuration, context: Context) -> str | None:
    """Compile a configuration into Triton's cache on disk; what is wrong with it, or None."""
    try:
        with using(kernel, config):
            _run_small(head_dim, context)
            if not context.smoke:
                torch.cuda.synchronize()
    except Exception as error:  # of whatever kind: too much shared memory, a compiler's assertion
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def _compile_beforehand(
    candidates: dict[tuple[str, int], list[Configuration]], context: Context
) -> dict[tuple[str, int, Configuration], str]:
    """Compile all candidates in several processes, for compiling takes longer than measuring; those that cannot be."""
    problems = {}
    pool = ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("fork"))
    jobs = {
        (kernel, head_dim, config): pool.submit(_compile_one, kernel, head_dim, config, context)
        for (kernel, head_dim), configs in candidates.items()
        for config in configs
    }
    for key, job in jobs.items():
        try:
            problem = job.result(timeout=max(context.left() - LEAST_SECONDS, 0.1))
        except TimeoutError:
            problem = "not compiled in time"
        except Exception as error:  # the process itself died
            problem = f"{type(error).__name__} while compiling"
        if problem is not None:
            problems[key] = problem
    pool.shutdown(wait=False, cancel_futures=True)
    return problems


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """This process must not use the device before it has forked those that compile."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def _measure(
    kernel: str,
    head_dim: int,
    configs: list[Configuration],
    broken: dict[tuple[str, int, Configuration], str],
    context: Context,
    clock: Clock,
) -> Iterator[Row]:
    torch.manual_seed(0)
    problem = _problem(head_dim, 16 if context.smoke else TOKENS, context)
    case = f"{kernel}, D{head_dim}"
    work = problem.work(case)
    work = dataclasses.replace(work, amount={KERNELS[kernel]: work.amount[KERNELS[kernel]]})
    for config in configs:
        name = describe(config)
        trouble = broken.get((kernel, head_dim, config))
        if context.left() < LEAST_SECONDS:
            trouble = "no time left"
        if trouble is not None:
            yield {"case": case, "contender": name, "verdict": "not run", "note": trouble}
            continue

        def make() -> Contender:
            try:
                contender = problem.makers()["ours, Triton"]()
                contender.gradients(contender.outputs())
            except Exception as error:
                raise NotAvailableError(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from None
            return contender

        with using(kernel, config):
            yield from compete(work, {name: make}, clock, context.smoke)


def describe(config: Configuration) -> str:
    """128×64, 8 warps, 2 stages, described."""
    words = [f"{config.block_q}×{config.block_k}", f"{config.warps} warps", f"{config.stages} stages"]
    fields = dataclasses.fields(config)
    return ", ".join(words + [field.name for field in fields if getattr(config, field.name) is True])


def _best(kernel: str, head_dim: int, chosen: Configuration, found: list[Row]) -> Iterator[Row]:
    timed = {row["contender"]: row["ms"] for row in found if row.get("ms") is not None}
    if not timed:
        return
    best = min(timed, key=timed.__getitem__)
    row: Row = {"case": f"{kernel}, D{head_dim}: best", "contender": best, "ms": timed[best], "verdict": "right"}
    if describe(chosen) in timed:
        row["note"] = f"chosen is {describe(chosen)}, {timed[describe(chosen)] / timed[best]:.2f} × the best's time"
    yield row
