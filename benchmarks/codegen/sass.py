"""Reads NVIDIA machine code: registers, spills, and what the inner loops hold."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
LABEL = re.compile(r"^(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
SERIALISED = "wgmma.mma_async instructions are serialized"
# Pipes by the first word of an instruction; what is not named here only takes an issue slot.
PIPES = {
    "mma": ("HGMMA", "HMMA", "IMMA", "QGMMA", "UTCHMMA"),
    "mufu": ("MUFU",),
    "fp32": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "FSET", "FADD2", "FMUL2", "FFMA2", "FMNMX3"),
    "integer": ("IADD", "IADD3", "IMAD", "LEA", "LOP3", "SHF", "ISETP", "SEL", "IMNMX", "VIADD", "PRMT", "F2FP", "MOV",
                "VIMNMX", "IABS", "PLOP3"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "SHFL"),
    "asynchronous": ("LDGSTS", "UTMALDG", "UBLKCP"),
    "global": ("LDG", "STG"),
    "local": ("LDL", "STL"),
    "barrier": ("BAR", "SYNCS", "WARPSYNC", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "MEMBAR"),
}  # fmt: skip
PIPE_OF = {word: pipe for pipe, words in PIPES.items() for word in words}


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    predicate: str | None
    name: str
    operands: str

    @property
    def word(self) -> str:
        return self.name.split(".")[0]

    @property
    def flops(self) -> int:
        """Operations of a matrix instruction, one warp's share; 0 for any other."""
        if self.word in ("HGMMA", "HMMA"):
            shape = re.search(r"\.(\d+)x(\d+)x(\d+)", self.name)
            if shape:  # a group of four warps issues it together
                m, n, k = map(int, shape.groups())
                return 2 * m * n * k // 4
            if ".16816" in self.name:
                return 2 * 16 * 8 * 16
            if ".1688" in self.name:
                return 2 * 16 * 8 * 8
        return 0

    @property
    def bytes(self) -> int:
        """What a load from or store to global memory moves for a thread; 0 for any other instruction."""
        if PIPE_OF.get(self.word) != "global":
            return 0
        width = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", self.name)
        return int(width[1]) // 8 if width else 4


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel."""

    registers: int
    spilled_bytes: int
    serialised: bool


def resources(ptx: str, architecture: str) -> Resources:
    """Assemble once more, to hear what Triton keeps to itself: spills, and whether wgmmas wait for each other."""
    capability = int(architecture.removeprefix("sm_"))
    target = f"{architecture}a" if capability >= 90 else architecture
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", str(source), "-o", f"{folder}/kernel"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    text = said.stdout + said.stderr
    spills = [int(size) for size in re.findall(r"(\d+) bytes spill", text)]
    registers = max(int(count) for count in re.findall(r"Used (\d+) registers", text))
    return Resources(registers, sum(spills), SERIALISED in text)


def disassemble(cubin: bytes) -> tuple[list[Instruction], list[list[Instruction]]]:
    """All instructions, and those of each innermost loop that multiplies matrices."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(listing)


def parse(listing: str) -> tuple[list[Instruction], list[list[Instruction]]]:
    """The same from nvdisasm's text."""
    blocks, successors = _control_flow(listing)
    loops = [
        body
        for body in _natural_loops(successors)
        if any(_is_mma(instruction) for i in body for instruction in blocks[i])
    ]
    inner = [body for body in loops if not any(other < body for other in loops)]
    return [x for block in blocks for x in block], [[x for i in sorted(body) for x in blocks[i]] for body in inner]


def pipes(instructions: list[Instruction]) -> Counter[str]:
    """How many instructions go to each pipe."""
    return Counter(PIPE_OF.get(x.word, "other") for x in instructions)


def _is_mma(instruction: Instruction) -> bool:
    return PIPE_OF.get(instruction.word) == "mma"


def _control_flow(listing: str) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks, and which follow which."""
    blocks: list[list[Instruction]] = [[]]
    start_of: dict[str, int] = {}
    for line in listing.splitlines():
        label = LABEL.match(line.strip())
        found = INSTRUCTION.search(line)
        if label:
            if blocks[-1]:
                blocks.append([])
            start_of[label[1]] = len(blocks) - 1
        elif found:
            blocks[-1].append(Instruction(*found.groups()))
            if found[2].split(".")[0] in ("BRA", "EXIT", "RET"):
                blocks.append([])
    successors: list[list[int]] = []
    for i, block in enumerate(blocks):
        last = block[-1] if block else None
        following = [i + 1] if i + 1 < len(blocks) else []
        target = TARGET.search(last.operands) if last and last.word == "BRA" else None
        if target:
            # `BRA.U !UP0, label` carries its condition among the operands.
            conditional = last.predicate or "P" in last.operands.split("`")[0]
            following = [start_of[target[1]], *(following if conditional else [])]
        elif last and last.word in ("EXIT", "RET") and not last.predicate:
            following = []
        successors.append(following)
    return blocks, successors


def _natural_loops(successors: list[list[int]]) -> list[set[int]]:
    """The natural loop of every back edge (one whose target dominates its source), merged by header."""
    count = len(successors)
    predecessors: list[list[int]] = [[] for _ in range(count)]
    for i, following in enumerate(successors):
        for j in following:
            predecessors[j].append(i)
    dominators = _dominators(predecessors)
    loops: dict[int, set[int]] = {}
    for tail, following in enumerate(successors):
        for header in following:
            if header not in dominators[tail]:
                continue
            body = loops.setdefault(header, {header})
            waiting = [tail]
            while waiting:
                node = waiting.pop()
                if node not in body:
                    body.add(node)
                    waiting += predecessors[node]
    return list(loops.values())


def _dominators(predecessors: list[list[int]]) -> list[set[int]]:
    """For every block reached from the first, the blocks that each path to it passes; unreached ones have none."""
    count = len(predecessors)
    dominators = [{0}] + [set(range(count)) for _ in range(count - 1)]
    changed = True
    while changed:
        changed = False
        for i in range(1, count):
            reached = [dominators[j] for j in predecessors[i]]
            new = {i} | (set.intersection(*reached) if reached else set())
            if new != dominators[i]:
                dominators[i], changed = new, True
    return dominators
