"""What the report compiles: one module here is one family of kernels, and adding a file adds a family.

A family module has

    main_variants(architecture) -> list[Variant]    what most users run; the test-suite holds these to the gate
    all_variants(architecture) -> list[Variant]     every configuration that the dispatcher can choose, those included

and may have

    ALLOWANCES: dict[tuple[str, ...], Allowance]    what the gate lets pass, and why: by (variant's name, architecture),
                                                    or also a release of Triton such as "3.6", which then comes first
    MOST_INSTRUCTIONS: dict[tuple[str, str], int]   the most warp instructions a MFLOP that the gate lets pass, by
                                                    (variant's name, architecture): a goal that others set
    RECORDED: tuple[Recorded, ...]                  figures of other people's kernels, printed beside ours

Variants are made by the functions that a launch uses, so that what is compiled is what would run.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType

from benchmarks.codegen.compiling import Variant


@dataclass(frozen=True)
class Allowance:
    """A named exception from the gate: how much of what, and why it must be."""

    reason: str
    spilled_bytes: int = 0
    loop_spills: int = 0  # local loads and stores in the leanest inner loop
    synchronous: bool = False  # the loop may copy without asynchronous instructions
    tensor_instruction: str | None = None  # instead of the chip's own
    wide: float | None = None  # the share of bytes moved 16 at a time, instead of what the variant asks for


NOTHING = Allowance("")


@dataclass(frozen=True)
class Recorded:
    """What somebody else's kernel compiled to, as recorded in an earlier study; it is not compiled here."""

    source: str
    kernel: str
    architecture: str
    configuration: str
    instructions_per_mflop: int
    registers: int | None = None
    spills: int | None = None  # local loads and stores in the machine code, not bytes
    note: str = ""


def families() -> list[str]:
    """The names of the family modules."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__))


def family_module(name: str) -> ModuleType:
    """A family by name."""
    return importlib.import_module(f"{__name__}.{name}")


def variants_of(family: str, architecture: str, main_only: bool) -> list[Variant]:
    """A family's kernels for an architecture."""
    module = family_module(family)
    return module.main_variants(architecture) if main_only else module.all_variants(architecture)


def allowance_for(family: str, name: str, architecture: str, triton: str) -> Allowance:
    """What the gate lets a kernel pass with under a version of Triton; nothing unless the family says so."""
    known = getattr(family_module(family), "ALLOWANCES", {})
    release = ".".join(triton.split(".")[:2])
    return known.get((name, architecture, release)) or known.get((name, architecture), NOTHING)


def most_instructions_of(family: str, name: str, architecture: str) -> int | None:
    """The family's goal for a kernel's inner loop, where it has one."""
    return getattr(family_module(family), "MOST_INSTRUCTIONS", {}).get((name, architecture))


def recorded(names: list[str]) -> list[Recorded]:
    """Other people's figures, of the families named."""
    return [figure for name in names for figure in getattr(family_module(name), "RECORDED", ())]
