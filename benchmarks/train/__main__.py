"""A training step on a real model, ours against stock transformers and peft on the same CPU.

    python -m benchmarks.train                      # all of it; prints, writes results/train.json and the page's rows
    python -m benchmarks.train --stage mntp --rounds 5

Every contender trains in a process of its own, on the same batches (for MNTP with the same tokens hidden), with the
same adapter and optimiser, and ours takes turns with each peer. First the losses of so many steps on quarter batches
are compared, without dropout, whose draws would differ, and SimCSE's in float32; then, in new processes, whole batches
are timed, after one that is not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.fetch import smollm2
from benchmarks.report import machine, markdown_table, update_readme, write_json
from benchmarks.train.batches import (
    BY_LENGTH,
    MNTP,
    MNTP_BATCH,
    MNTP_LENGTH,
    SIMCSE,
    SIMCSE_BATCH,
    STAGES,
    packed_up,
    small_batches,
    tokens_of,
    whole_batches,
)
from benchmarks.train.contenders import RANK, Contender, described, train
from benchmarks.worker import Worker

RESULTS = Path(__file__).parent.parent / "results" / "train.json"
DROPOUT = {MNTP: 0.0, SIMCSE: 0.3, BY_LENGTH: 0.3}  # of attention, in the steps that are timed
CHECKPOINTING = "activation checkpointing"
OURS, OURS_CHECKPOINTED = "llm2vec-fast", f"llm2vec-fast, {CHECKPOINTING}"
ORIGINAL = "transformers + peft, float32 weights under bf16 autocast"
SETTINGS = "transformers + peft, bf16 weights"
LABELLED = "the same, logits of the labelled tokens alone"
LIMIT = "the matrix products alone"
PLAIN_BF16 = Contender()
EAGER_BF16 = Contender(attention="eager")
_OURS = {OURS: Contender("ours"), OURS_CHECKPOINTED: Contender("ours", checkpointing=True)}
# Of each stage who takes turns with whom, and in how many of the steps that losses are compared for.
CONTENDERS = {
    MNTP: {
        **_OURS,
        ORIGINAL: Contender(dtype="float32"),
        SETTINGS: PLAIN_BF16,
        LABELLED: Contender(labelled_only=True),
        f"{LABELLED}, {CHECKPOINTING}": Contender(labelled_only=True, checkpointing=True),
        LIMIT: Contender("products"),
    },
    SIMCSE: {
        **_OURS,
        ORIGINAL: Contender(dtype="float32"),
        f"{SETTINGS}, eager attention": EAGER_BF16,
        f"the same, {CHECKPOINTING}": Contender(attention="eager", checkpointing=True),
        LIMIT: Contender("products"),
    },
    BY_LENGTH: {
        OURS: Contender("ours"),
        f"{SETTINGS}, eager attention": EAGER_BF16,
        LIMIT: Contender("products"),
    },
}
FEW = 10  # steps that show that losses agree, where nothing but memory or the batches are other ones
WHOLE_CURVES = (ORIGINAL, LABELLED)


def measure(folder: str, stage: str, steps: int, rounds: int) -> dict:
    """Ours beside each peer in turn (all at once may not fit in memory): losses of ``steps`` small steps of each, then
    ``rounds`` of turns, a whole step each."""
    small = packed_up(small_batches(folder, stage, steps))
    batches = whole_batches(folder, stage, rounds + 1)
    rows: dict[str, dict] = {}
    for peer, contender in CONTENDERS[stage].items():
        if contender.kind == "ours":
            continue
        ours = OURS_CHECKPOINTED if contender.checkpointing else OURS
        pair, losses = (ours, peer), {ours: [], peer: []}
        if peer != LIMIT:
            workers = {name: _worker(folder, stage, name, small, compared=True) for name in pair}
            losses = _losses(stage, workers, steps if peer in WHOLE_CURVES else min(steps, FEW))
        workers = {name: _worker(folder, stage, name, packed_up(batches)) for name in pair}
        found = _turns(workers, rounds)
        for name in pair:
            rows.setdefault(name, {"losses": losses[name], "beside": {}, **found[name]})
        rows[peer]["beside"] = {ours: found[ours]["seconds"]}
    return {"tokens": [tokens_of(stage, batch) for batch in batches[1:]], "contenders": rows}


def _worker(folder: str, stage: str, name: str, batches: str, compared: bool = False) -> Worker:
    """Where losses are ``compared`` without dropout, whose draws would differ, and for SimCSE in float32."""
    contender = CONTENDERS[stage][name]
    if compared:
        contender = replace(contender, exact=stage != MNTP)
    return Worker(train, folder, [described(stage, 0.0 if compared else DROPOUT[stage], contender), batches])


def _losses(stage: str, workers: dict[str, Worker], steps: int) -> dict[str, list[float]]:
    """Of each contender, which ends here."""
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
    longest = max(len(row["losses"]) for row in rows.values())
    table = []
    for name, row in rows.items():
        cells = {stage: name, "tokens/s": f"{tokens / sum(row['seconds']):.0f}", "time, × ours": "", "memory": "",
                 "ours of it": "", "loss": "", "apart from ours, median (most)": ""}  # fmt: skip
        memory = row["above_weights_mib"]
        if name != LIMIT:
            cells["memory"] = f"{memory:.0f} MiB"
        if len(row["losses"]) == longest > FEW:
            cells["loss"] = f"{statistics.mean(row['losses'][-FEW:]):.3f}"
        for ours, beside in row["beside"].items():
            ratios = [peer / own for peer, own in zip(row["seconds"], beside, strict=True)]
            cells["time, × ours"] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
            if row["losses"]:
                cells["ours of it"] = f"{rows[ours]['above_weights_mib'] / memory:.0%}"
                apart = np.abs(np.array(row["losses"]) - np.array(rows[ours]["losses"][: len(row["losses"])]))
                cells["apart from ours, median (most)"] = f"{np.median(apart):.4f} ({apart.max():.4f})"
        table.append(cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps against transformers and peft, one model, one run.")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--steps", type=int, default=50, help="steps whose losses are compared (default 50)")
    parser.add_argument("--rounds", type=int, default=6, help="turns that are timed (default 6)")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    given = parser.parse_args()
    folder = str(smollm2.fetch())
    for stage in given.stage:
        found = measure(folder, stage, given.steps, given.rounds)
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
        "sentences, each twice. Tokens: real ones, of all steps over their time. Time: median of the turns, and their "
        "range. Memory: above the weights, the most over all steps. Losses are of quarter batches, without dropout, "
        f"SimCSE's in float32; where whole curves are compared, the mean of the last {FEW} is shown."
    )


def _section(stage: str, found: dict) -> str:
    about = found["machine"]
    steps = {len(row["losses"]) for row in found["contenders"].values()} - {0}
    note = (
        f"{found['rounds']} turns; losses of {' or '.join(map(str, sorted(steps)))} steps. {about['processor']}, "
        f"{about['cores']} cores; torch {about['torch']}, transformers {about['transformers']}; {about['date']}."
    )
    return f"{markdown_table(summarise(stage, found))}\n\n{note}"


if __name__ == "__main__":
    main()
