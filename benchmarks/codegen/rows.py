"""What a compiled kernel costs, read from its machine code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
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
    tensor_instruction: str
    blocks_per_sm: int | None = None
    loop: dict[str, int] | None = None
    instructions_per_mflop: float | None = None
    limit: str | None = None
    overlapped: float | None = None
    serial: float | None = None
    accesses: int | None = None  # loads and stores of global memory, of a kernel without products
    wide_accesses: int | None = None  # of these, the ones that move 16 bytes a thread
    wide_share: float | None = None  # of the bytes moved


def measure(variant: Variant, architecture: str) -> Row:
    """Compile one kernel and read what came out."""
    began = _processor_seconds()
    compiled = compile_for(variant, architecture)
    seconds = _processor_seconds() - began
    figures: dict[str, Any] = {
        "name": variant.name,
        "architecture": architecture,
        "compile_seconds": round(seconds, 2),
        "shared_bytes": compiled.metadata.shared,
        "warps": variant.arguments["num_warps"],
        "stages": variant.arguments["num_stages"],
    }
    if "amdgcn" in compiled.asm:
        return Row(**figures, **_amd(compiled.asm["amdgcn"], variant))
    told = sass.resources(compiled.asm["ptx"], architecture)
    figures |= {
        "registers": told.registers, "spilled_bytes": told.spilled_bytes, "serialised": told.serialised,
        "tensor_instruction": _ptx_tensor_instruction(compiled.asm["ptx"]),
    }  # fmt: skip
    instructions, loops = sass.disassemble(compiled.asm["cubin"])
    if variant.products == "none":
        return Row(**figures, **_accesses([x.bytes for x in instructions]))
    if architecture in RATES:
        limit = SHARED_LIMIT[architecture]
        figures["blocks_per_sm"] = _blocks_per_sm(told.registers, figures["warps"], figures["shared_bytes"], limit)
        figures |= _leanest(loops, architecture)
    return Row(**figures)


def _processor_seconds() -> float:
    """Of this process and of those it waited for; the wall clock would count other programs' work as ours."""
    return sum(os.times()[:4])


def _leanest(loops: list[list[sass.Instruction]], architecture: str) -> dict[str, Any]:
    """The inner loop with the fewest instructions a FLOP, and the bounds that its counts imply."""
    multiplying = [(loop, sum(x.flops for x in loop)) for loop in loops]
    multiplying = [(loop, flops) for loop, flops in multiplying if flops]
    if not multiplying:
        return {}
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


def _accesses(sizes: Iterable[int]) -> dict[str, Any]:
    """How many loads and stores of global memory move 16 bytes a thread, from the bytes each moves."""
    sizes = [size for size in sizes if size]
    wide = [size for size in sizes if size >= 16]
    share = round(sum(wide) / sum(sizes), 3) if sizes else 0.0
    return {"accesses": len(sizes), "wide_accesses": len(wide), "wide_share": share}


def _blocks_per_sm(registers: int, warps: int, shared: int, limit: int) -> int:
    by_registers = REGISTER_FILE // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = limit // max(1, shared + 1024)
    return min(by_registers, by_shared, 64 // warps)


def _ptx_tensor_instruction(ptx: str) -> str:
    return next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), "")


def _amd(text: str, variant: Variant) -> dict[str, Any]:
    def figure(name: str) -> int:
        return max((int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)

    figures = {
        "registers": figure("vgpr_count"),
        "spilled_bytes": 4 * (figure("vgpr_spill_count") + figure("sgpr_spill_count")),
        "serialised": False,
        "tensor_instruction": "MFMA" if "v_mfma" in text else "",
    }
    if variant.products != "none":
        return figures
    words = re.findall(r"\b(?:global|buffer|flat)_(?:load|store)_(\w+)", text)
    bits = {
        "ubyte": 1,
        "sbyte": 1,
        "byte": 1,
        "ushort": 2,
        "sshort": 2,
        "short": 2,
        "dwordx2": 8,
        "dwordx3": 12,
        "dwordx4": 16,
    }
    return figures | _accesses([bits.get(word, 4) for word in words])
