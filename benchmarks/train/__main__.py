"""A training step on a real model, ours against stock transformers and peft on the same CPU.

    python -m benchmarks.train                      # all of it; prints, writes results/train.json and the page's rows
    python -m benchmarks.train --stage mntp --rounds 5

Every contender trains in a process of its own, on the same batches (for MNTP with the same tokens hidden), with the
same adapter and optimiser, and ours takes turns with each peer. First the losses of so many steps on quarter batches
are compared, without dropout, whose draws would differ; then, in new processes, whole batches are timed, after one that
is not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

import numpy as np

from benchmarks.fetch import smollm2
from benchmarks.report import machine, markdown_table, update_readme, write_json
from benchmarks.train.batches import (
    BY_LENGTH,
    MNTP,
    MNTP_BATCH,
    MNTP_LENGTH,
    SIMCSE_BATCH,
    STAGES,
    packed_up,
    small_batches,
    tokens_of,
    whole_batches,
)  # fmt: skip
from benchmarks.train.contenders import RANK, Contender, described, train
from benchmarks.worker import Worker

RESULTS = Path(__file__).parent.parent / "results" / "train.json"
DROPOUT = {MNTP: 0.0, "simcse": 0.3, BY_LENGTH: 0.3}  # of attention, in the steps that are timed
OURS, OURS_CHECKPOINTED = "llm2vec-fast", "llm2vec-fast, activation checkpointing"
AS_THE_ORIGINAL = "transformers + peft, float32 weights under bf16 autocast"
BEST, BEST_CHECKPOINTED = (
    "transformers + peft, best settings",
    "transformers + peft, the same, activation checkpointing",
)
CONTENDERS = {
    OURS: Contender(ours=True),
    OURS_CHECKPOINTED: Contender(ours=True, checkpointing=True),
    AS_THE_ORIGINAL: Contender(dtype="float32"),
    BEST: Contender(labelled_only=True),
    BEST_CHECKPOINTED: Contender(labelled_only=True, checkpointing=True),
}
FEW = 10  # steps that show that losses agree where nothing but memory or the batches are other ones
PAIRS = ((OURS, AS_THE_ORIGINAL), (OURS, BEST), (OURS_CHECKPOINTED, BEST_CHECKPOINTED))  # what takes turns


def measure(folder: str, stage: str, steps: int, rounds: int) -> dict:
    """Each pair in turn (all at once may not fit in memory): losses of ``steps`` small steps of each, then ``rounds``
    of turns, a whole step each."""
    small = packed_up(small_batches(folder, stage, steps))
    batches = whole_batches(folder, stage, rounds + 1)
    rows: dict[str, dict] = {}
    for pair in PAIRS:
        workers = {name: _worker(folder, stage, 0.0, name, small) for name in pair}
        losses = _losses(stage, workers, steps if OURS in pair else min(steps, FEW))
        workers = {name: _worker(folder, stage, DROPOUT[stage], name, packed_up(batches)) for name in pair}
        found = _turns(workers, rounds)
        for name in pair:
            rows.setdefault(name, {"losses": losses[name], "beside": {}, **found[name]})
        ours, peer = pair
        rows[peer]["beside"] = {ours: found[ours]["seconds"]}
    return {"tokens": [tokens_of(stage, batch) for batch in batches[1:]], "contenders": rows}


def _worker(folder: str, stage: str, dropout: float, name: str, batches: str) -> Worker:
    return Worker(train, folder, [described(stage, dropout, CONTENDERS[name]), batches])


def _losses(stage: str, workers: dict[str, Worker], steps: int) -> dict[str, list[float]]:
    losses: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(steps):
        for name, worker in workers.items():
            losses[name].append(float(worker.outputs()))
        print(f"{stage}: step {number + 1}/{steps}", *(f"{losses[name][-1]:.3f}" for name in workers), flush=True)
    for worker in workers.values():
        worker.stop()
    return losses


def _turns(workers: dict[str, Worker], rounds: int) -> dict[str, dict]:
    """Of each the seconds of whole steps, after one that is not timed, and the most memory of any of them in MiB."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for worker in workers.values():
        worker.outputs()
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds[name].append(worker.seconds())
    found = {}
    for name, worker in workers.items():
        peak = worker.peak_mib()
        found[name] = {"seconds": seconds[name], "peak_mib": peak, "above_weights_mib": peak - worker.loaded_mib}
        worker.stop()
    return found


def summarise(stage: str, found: dict) -> list[dict[str, str]]:
    """One table row a contender; each peer beside the one of ours that it took turns with."""
    rows, tokens = found["contenders"], sum(found["tokens"])
    table = []
    for name, row in rows.items():
        (ours, beside), *_ = [*row["beside"].items(), (name, row["seconds"])]
        ratios = [peer / own for peer, own in zip(row["seconds"], beside, strict=True)]
        apart = np.abs(np.array(row["losses"]) - np.array(rows[ours]["losses"][: len(row["losses"])]))
        memory, own = row["above_weights_mib"], rows[ours]["above_weights_mib"]
        steps = len(row["losses"])
        is_peer = bool(row["beside"])
        table.append(
            {
                stage: name,
                "tokens/s": f"{tokens / sum(row['seconds']):.0f}",
                "time, × ours": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})" * is_peer,
                "memory above the weights": f"{memory:.0f} MiB",
                "ours of it": f"{own / memory:.0%}" * is_peer,
                f"loss, last half of {steps} steps": f"{statistics.mean(row['losses'][steps // 2 :]):.3f}",
                "apart from ours, median (most)": f"{np.median(apart):.4f} ({apart.max():.4f})" * is_peer,
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps against transformers and peft, one model, one run.")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--steps", type=int, default=50, help="steps whose losses are compared (default 50)")
    parser.add_argument("--rounds", type=int, default=7, help="turns that are timed (default 7)")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    given = parser.parse_args()
    folder = str(smollm2.fetch())
    for stage in given.stage:
        steps = min(given.steps, FEW) if stage == BY_LENGTH else given.steps
        found = measure(folder, stage, steps, given.rounds)
        print(markdown_table(summarise(stage, found)), flush=True)
        if not given.dry:  # after each stage: nothing measured is lost
            about = {**machine(), "preloaded": Path(os.environ.get("LD_PRELOAD", "")).name}
            publish(stage, {"machine": about, "rounds": given.rounds, **found})


def publish(stage: str, found: dict) -> None:
    """Write the JSON file and the page's rows; stages that were measured in another run stay as they are."""
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    stages = {name: some for name in STAGES if (some := {**before, stage: found}.get(name))}
    write_json(RESULTS, stages)
    update_readme("train", page(stages))


def page(stages: dict[str, dict]) -> str:
    """What the page shows of what is in train.json."""
    return "\n\n".join([_about(), *(_section(name, some) for name, some in stages.items())])


def _about() -> str:
    return (
        f"SmolLM2-135M, LoRA r = {RANK}. MNTP: {MNTP_BATCH} sequences of {MNTP_LENGTH} tokens; SimCSE: {SIMCSE_BATCH} "
        "sentences, each twice, of their own lengths. Memory: the most over all batches. Best settings: weights in "
        "bfloat16, logits of the labelled tokens alone."
    )


def _section(stage: str, found: dict) -> str:
    about = found["machine"]
    note = (
        f"Time: medians of {found['rounds']} turns, and their range; losses without dropout, on quarter batches. "
        f"{about['processor']}, {about['cores']} cores; torch {about['torch']}, transformers {about['transformers']}; "
        f"{about['date']}."
    )
    return f"{markdown_table(summarise(stage, found))}\n\n{note}"


if __name__ == "__main__":
    main()
