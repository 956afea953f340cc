"""Whether a compiled kernel passes the gate, and how what it costs is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.codegen.compiling import Variant
from benchmarks.codegen.rows import SHARED_LIMIT, Row
from benchmarks.codegen.variants import Allowance, Recorded, allowance_for, families, variants_of

TITLE = """# What the kernels compile to

Compiled ahead of time, without a GPU: nothing here was timed. Written by `make codegen`.

wi/MF: warp instructions per MFLOP of the leanest inner loop (lower is better). limit: the pipe that bounds the loop.
overlap, serial: share of the tensor peak that the counts allow if all pipes overlap perfectly, or not at all.
"""
RECORDED = """## Other people's kernels

Recorded in an earlier study with Triton 3.9 and the same counting; not compiled here.

"""
TENSOR_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "MFMA"}
COMPILE_SECONDS = 20.0
SPILLS_GATED = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Entry:
    """A row that is kept: its family, the release of Triton, and a digest of all that decides it."""

    family: str
    triton: str
    digest: str
    row: Row


def problems(row: Row, variant: Variant, allowed: Allowance, most_instructions: int | None = None) -> list[str]:
    """Why a row fails the gate, in words; empty where it passes.

    ``most_instructions``: of a warp, for a MFLOP of the inner loop.
    """
    wrong = []
    loop = row.loop or {}
    if row.shared_bytes > SHARED_LIMIT[row.architecture]:
        wrong.append(f"needs {row.shared_bytes} bytes of shared memory, the chip has {SHARED_LIMIT[row.architecture]}")
    if row.compile_seconds > COMPILE_SECONDS:
        wrong.append(f"took {row.compile_seconds} s to compile")
    if row.architecture in SPILLS_GATED and row.spilled_bytes > allowed.spilled_bytes:
        wrong.append(f"spills {row.spilled_bytes} bytes, {allowed.spilled_bytes} are allowed")
    if loop.get("local", 0) > allowed.loop_spills:
        wrong.append(f"has {loop['local']} spills in its inner loop, {allowed.loop_spills} are allowed")
    if row.serialised:
        wrong.append("its wgmmas are serialised")
    tensor = allowed.tensor_instruction or TENSOR_INSTRUCTION[row.architecture]
    if variant.products == "tensor" and row.tensor_instruction != tensor:
        wrong.append(f"multiplies by {row.tensor_instruction or 'no tensor instruction'}, not {tensor}")
    if loop and row.stages > 1 and not loop.get("asynchronous") and not allowed.synchronous:
        wrong.append("copies nothing asynchronously in its loop")
    if most_instructions is not None and not (row.instructions_per_mflop or float("inf")) <= most_instructions:
        wrong.append(f"takes {row.instructions_per_mflop} instructions a MFLOP, {most_instructions} are allowed")
    wide = variant.wide if allowed.wide is None else allowed.wide
    if row.wide_share is not None and row.wide_share < wide:
        wrong.append(f"moves {row.wide_share:.0%} of its bytes 16 at a time, {wide:.0%} are asked for")
    return wrong


def table(rows: Iterable[Row]) -> str:
    """A Markdown table; wi/MF is warp instructions a MFLOP of the inner loop, then come shares of peak."""
    heads = (
        "kernel", "chip", "warps", "stages", "regs", "spill B", "smem KB", "blocks/SM", "tensor", "wi/MF", "limit",
        "overlap", "serial", "16 B accesses",
    )  # fmt: skip
    lines = [
        (
            row.name, row.architecture, row.warps, row.stages, row.registers, row.spilled_bytes,
            round(row.shared_bytes / 1024), row.blocks_per_sm,
            row.tensor_instruction + (" serialised" if row.serialised else ""),
            row.instructions_per_mflop, row.limit, row.overlapped, row.serial,
            None if row.accesses is None else f"{row.wide_accesses} of {row.accesses} ({row.wide_share:.0%} of bytes)",
        )
        for row in rows
    ]  # fmt: skip
    return _markdown(heads, lines)


def recorded_table(figures: Iterable[Recorded]) -> str:
    """A Markdown table of other people's figures."""
    heads = ("source (recorded)", "kernel", "chip", "configuration", "regs", "spilled accesses", "wi/MF", "note")
    lines = [
        (x.source, x.kernel, x.architecture, x.configuration, x.registers, x.spills, x.instructions_per_mflop, x.note)
        for x in figures
    ]
    return _markdown(heads, lines)


def page(entries: Iterable[Entry], figures: Iterable[Recorded]) -> str:
    """The results as a Markdown page, from all that is known."""
    entries = list(entries)
    parts = [TITLE]
    for release in dict.fromkeys(entry.triton for entry in entries):
        found = [entry for entry in entries if entry.triton == release]
        chips = Counter(entry.row.architecture for entry in found)
        counts = ", ".join(f"{count} of {_kernels(chip)} for {chip}" for chip, count in chips.items())
        parts.append(f"## Compiled by Triton {release}\n\nKernels: {counts}.\n")
        parts.append(_exceptions(found))
        parts.append(table(entry.row for entry in found) + "\n")
    parts.append(RECORDED + recorded_table(figures) + "\n")
    return "\n".join(filter(None, parts))


def _kernels(architecture: str) -> int:
    """How many there are."""
    return sum(len(variants_of(family, architecture, main_only=False)) for family in families())


def _exceptions(entries: list[Entry]) -> str:
    """What the gate lets pass by name, where it is made use of."""
    lines = []
    for entry in entries:
        row = entry.row
        allowed = allowance_for(entry.family, row.name, row.architecture, entry.triton)
        if allowed.reason:
            lines.append(
                (row.name, row.architecture, row.spilled_bytes, (row.loop or {}).get("local", 0), allowed.reason)
            )
    heads = ("exception from the gate", "chip", "spilled bytes", "of these instructions in the loop", "reason")
    return _markdown(heads, lines) + "\n" if lines else ""


def _markdown(heads: tuple[str, ...], lines: Iterable[tuple[Any, ...]]) -> str:
    text = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    text += ["| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |" for cells in lines]
    return "\n".join(text)
