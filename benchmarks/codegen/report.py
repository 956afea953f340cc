"""What a compiled kernel costs, whether it passes the gate, and how that is printed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.codegen import sass
from benchmarks.codegen.compiling import Variant, compile_for

# Per SM and clock: tensor FLOP, then lanes of each pipe; an SM issues four warp instructions.
RATES = {
    "sm_80": {"tensor": 2048, "mufu": 16, "fp32": 64, "integer": 64},
    "sm_90": {"tensor": 4096, "mufu": 16, "fp32": 128, "integer": 64},
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
REGISTER_FILE = 65536
COMPILE_SECONDS = 20.0
# Spilled bytes that the gate lets pass, by kernel and architecture. In each the accumulators fill the register file,
# and what is spilled is read and written outside the inner loop without masks, which the gate also checks.
SPILLS_ALLOWED = {
    ("attention-forward-D128-bfloat16", "sm_80"): 56,
    ("attention-dk-dv-D128-bfloat16", "sm_80"): 60,
    ("attention-dk-dv-D128-bfloat16", "sm_90"): 96,
}


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture. Loop figures are those of the leanest inner loop: the one without masks."""

    name: str
    architecture: str
    compile_seconds: float
    registers: int
    spilled_bytes: int
    serialised: bool
    shared_bytes: int
    warps: int
    stages: int
    blocks_per_sm: int | None
    tensor_instruction: str
    loop: dict[str, int] | None
    instructions_per_mflop: float | None
    limit: str | None
    overlapped: float | None
    serial: float | None


def measure(variant: Variant, architecture: str) -> Row:
    """Compile one kernel and read what came out."""
    began = _processor_seconds()
    compiled = compile_for(variant, architecture)
    seconds = _processor_seconds() - began
    common = {
        "name": variant.name,
        "architecture": architecture,
        "compile_seconds": round(seconds, 2),
        "shared_bytes": compiled.metadata.shared,
        "warps": variant.arguments["num_warps"],
        "stages": variant.arguments["num_stages"],
    }
    nothing = {
        "blocks_per_sm": None, "loop": None, "instructions_per_mflop": None, "limit": None, "overlapped": None,
        "serial": None,
    }  # fmt: skip
    if "amdgcn" in compiled.asm:
        return Row(**common, **nothing, **_amd(compiled.asm["amdgcn"]))
    told = sass.resources(compiled.asm["ptx"], architecture)
    said = {
        "registers": told.registers, "spilled_bytes": told.spilled_bytes, "serialised": told.serialised,
        "tensor_instruction": _ptx_tensor_instruction(compiled.asm["ptx"]),
    }  # fmt: skip
    if architecture not in RATES:
        return Row(**common, **said, **nothing)
    _, loops = sass.disassemble(compiled.asm["cubin"])
    blocks = _blocks_per_sm(told.registers, common["warps"], common["shared_bytes"], SHARED_LIMIT[architecture])
    return Row(**common, **said, blocks_per_sm=blocks, **_leanest(loops, architecture))


def problems(row: Row) -> list[str]:
    """Why a row fails the gate, in words; empty where it passes."""
    wrong = []
    if row.shared_bytes > SHARED_LIMIT[row.architecture]:
        wrong.append(f"needs {row.shared_bytes} bytes of shared memory, the chip has {SHARED_LIMIT[row.architecture]}")
    if row.compile_seconds > COMPILE_SECONDS:
        wrong.append(f"took {row.compile_seconds} s to compile")
    if row.architecture in RATES and row.spilled_bytes > SPILLS_ALLOWED.get((row.name, row.architecture), 0):
        wrong.append(f"spills {row.spilled_bytes} bytes")
    if row.loop is not None and row.loop.get("local"):
        wrong.append(f"has {row.loop['local']} spills in its inner loop")
    if row.serialised:
        wrong.append("its wgmmas are serialised")
    if row.architecture == "sm_90" and "float32" not in row.name and row.tensor_instruction != "wgmma":
        wrong.append(f"multiplies by {row.tensor_instruction or 'no tensor instruction'}, not wgmma")
    if row.loop is not None and row.stages > 1 and not row.loop.get("asynchronous"):
        wrong.append("copies nothing asynchronously in its loop")
    return wrong


def table(rows: Iterable[Row]) -> str:
    """A Markdown table; wi/MF is warp instructions a MFLOP of the inner loop, the last columns are shares of peak."""
    heads = (
        "kernel",
        "chip",
        "regs",
        "spill B",
        "smem KB",
        "blocks/SM",
        "tensor",
        "wi/MF",
        "limit",
        "overlap",
        "serial",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = (
            row.name, row.architecture, row.registers, row.spilled_bytes, round(row.shared_bytes / 1024),
            row.blocks_per_sm, row.tensor_instruction + (" serialised" if row.serialised else ""),
            row.instructions_per_mflop, row.limit, row.overlapped, row.serial,
        )  # fmt: skip
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def write_json(rows: Iterable[Row], path: Path) -> None:
    """Every figure of every row."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _processor_seconds() -> float:
    """Of this process and of those it waited for; the wall clock would count other programs' work as ours."""
    return sum(os.times()[:4])


def _leanest(loops: list[list[sass.Instruction]], architecture: str) -> dict[str, Any]:
    """The inner loop with the fewest instructions a FLOP, and the bounds that its counts imply."""
    multiplying = [(loop, sum(x.flops for x in loop)) for loop in loops]
    multiplying = [(loop, flops) for loop, flops in multiplying if flops]
    if not multiplying:
        return {"loop": None, "instructions_per_mflop": None, "limit": None, "overlapped": None, "serial": None}
    loop, flops = min(multiplying, key=lambda pair: len(pair[0]) / pair[1])
    counts = sass.pipes(loop)
    rates = RATES[architecture]
    clocks = {pipe: counts[pipe] * 32 / rates[pipe] for pipe in ("mufu", "fp32", "integer")}
    clocks["issue"] = len(loop) / 4
    clocks["tensor"] = flops / rates["tensor"]
    limit = max(clocks, key=clocks.__getitem__)
    in_a_row = sum(clocks[pipe] for pipe in ("mufu", "fp32", "integer", "tensor"))
    return {
        "loop": {"all": len(loop), **dict(counts)},
        "instructions_per_mflop": round(len(loop) / flops * 1e6),
        "limit": limit,
        "overlapped": round(clocks["tensor"] / clocks[limit], 2),
        "serial": round(clocks["tensor"] / in_a_row, 2),
    }


def _blocks_per_sm(registers: int, warps: int, shared: int, limit: int) -> int:
    by_registers = REGISTER_FILE // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = limit // max(1, shared + 1024)
    return min(by_registers, by_shared, 64 // warps)


def _ptx_tensor_instruction(ptx: str) -> str:
    return next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), "")


def _amd(text: str) -> dict[str, Any]:
    def figure(name: str) -> int:
        return max((int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)

    return {
        "registers": figure("vgpr_count"),
        "spilled_bytes": 4 * (figure("vgpr_spill_count") + figure("sgpr_spill_count")),
        "serialised": False,
        "tensor_instruction": "MFMA" if "v_mfma" in text else "",
    }
