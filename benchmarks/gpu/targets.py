"""What the measurements were meant to show, and whether they do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.gpu.section import Row

OURS = "ours, Triton"
# FlashAttention-2 and -3 as their authors measured them on an H100 SXM: bfloat16, not causal, head_dim 128, 16k tokens.
FLASH_2 = {"forward": 370.0, "backward": 322.0}
FLASH_3 = {"forward": 648.0, "backward": 561.0}
ELEMENTWISE = ("rms_norm", "rotary", "swiglu", "pooling")


class Goal(NamedTuple):
    """A figure, what it should be, and both in words; ``reached`` is None where the figure was not measured."""

    name: str
    figure: float | None
    goal: float
    unit: str
    at_most: bool = False

    @property
    def reached(self) -> bool | None:
        if self.figure is None:
            return None
        return self.figure <= self.goal if self.at_most else self.figure >= self.goal


def goals(sections: dict[str, dict[str, Any]]) -> Iterator[Goal]:
    """Every target, with what the sections' rows say."""
    rows = {name: entry["rows"] for name, entry in sections.items()}
    attention = rows.get("attention", [])
    for which in ("forward", "backward"):
        rate = _figure(attention, "D128, 16384", OURS, which, "rate")
        yield Goal(f"attention {which}, D128, 16384, over FlashAttention-2", rate, FLASH_2[which], "TFLOP/s")
        yield Goal(f"attention {which}, D128, 16384, 70 % of FlashAttention-3", rate, 0.7 * FLASH_3[which], "TFLOP/s")
    for head_dim in (64, 128):
        for which in ("forward", "backward"):
            speed = _ratio(attention, f"D{head_dim}, real", "SDPA, padded", OURS, which)
            yield Goal(f"attention {which}, D{head_dim}, real lengths, against padded SDPA", speed, 2.0, "×")
    losses = rows.get("linear_cross_entropy", [])
    # With few rows labelled, leaving out the others is most of the gain.
    case = next((row["case"] for row in losses if row.get("pass") == "both" and "100%" in row["case"]), "")
    speed = _ratio(losses, case, "logits of every row", OURS, "both")
    memory = _ratio(losses, case, OURS, "logits of every row", "both", "peak extra MiB")
    yield Goal("cross-entropy, against logits written out", speed, 1.3, "×")
    yield Goal("its memory, against theirs", memory, 0.05, "×", at_most=True)
    contrastive = rows.get("contrastive_loss", [])
    case = next((row["case"] for row in contrastive if row["case"].startswith("N = 65536")), "")
    yield Goal(f"contrastive loss, {case}", _figure(contrastive, case, OURS, "both", "of peak"), 0.5, "of the product")
    for name in ELEMENTWISE:
        for which in ("forward", "backward"):
            shares = [row["of peak"] for row in rows.get(name, []) if _is(row, row["case"], OURS, which)]
            yield Goal(f"{name} {which}", next(iter(shares), None), 0.85, "of the copy")


def _is(row: Row, case: str, contender: str, which: str) -> bool:
    return (row["case"], row.get("contender"), row.get("pass")) == (case, contender, which)


def _figure(rows: list[Row], case: str, contender: str, which: str, figure: str) -> float | None:
    return next((row[figure] for row in rows if _is(row, case, contender, which)), None)


def _ratio(rows: list[Row], case: str, over: str, under: str, which: str, figure: str = "ms") -> float | None:
    above, below = (_figure(rows, case, contender, which, figure) for contender in (over, under))
    return above / below if above is not None and below else None
