"""Lengths of real texts in tokens: docstrings of Python's standard library, recorded so that a GPU run needs no model.

`python -m benchmarks.gpu.lengths` records them anew: a random thousand of the docstrings, tokenised by SmolLM2.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

RECORD = Path(__file__).with_name("lengths.json")
COUNT = 1024


def real_lengths(tokens: int, longest: int | None = None) -> list[int]:
    """The first recorded lengths that make up ``tokens``, the last one cut to fit; from the start again if need be.

    ``longest`` cuts every one.
    """
    recorded = json.loads(RECORD.read_text())["lengths"]
    chosen: list[int] = []
    left = tokens
    while left > 0:
        chosen.append(min(recorded[len(chosen) % len(recorded)], left, longest or left))
        left -= chosen[-1]
    return chosen


def record() -> dict:
    """What the file holds: where the lengths are from, and the lengths."""
    import platform

    from transformers import AutoTokenizer

    from benchmarks.fetch import docstrings, smollm2

    texts = random.Random(0).sample([text for _, text in docstrings.collect()], COUNT)
    lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(smollm2.fetch())(texts)["input_ids"]]
    source = f"docstrings of Python {platform.python_version()}'s standard library, tokens of SmolLM2-135M-Instruct"
    return {"source": source, "lengths": lengths}


def main() -> None:
    RECORD.write_text(json.dumps(record()) + "\n")
    print(f"{COUNT} lengths written to {RECORD}")


if __name__ == "__main__":
    main()
