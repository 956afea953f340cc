"""The table, the learning curves, and the JSON file they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import markdown_table, update_readme, write_json
from benchmarks.reproduce.measure import ENCODERS, TASKS
from benchmarks.reproduce.stages import CONFIG, STAGES, seconds_of
from benchmarks.reproduce.texts import write_lines

RESULTS = Path(__file__).parent.parent / "results"
STS = "STS-B test"  # a column
_WORDS = {"pos": "POS", "chunk": "chunks", "ner": "NER"}  # columns, by task
_PEER = "MiniLM-L6, for scale"


def publish(folder: Path) -> None:
    """Write what is measured so far into benchmarks/results and the README: scores, curves, and each stage's log."""
    scores = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "scores").glob("*.json")}
    if not scores:  # what was published stays
        return
    minutes = {stage: round(seconds_of(stage, folder) / 60, 1) for stage in STAGES}
    logs = {stage: log for stage in STAGES if (log := _log(folder / stage))}
    for stage, log in logs.items():
        write_lines(map(json.dumps, log), RESULTS / "reproduce" / f"{stage}.jsonl")
    curves = {stage: [(line["step"], line["loss"]) for line in log if "loss" in line] for stage, log in logs.items()}
    latest = max((kept["machine"] for kept in scores.values()), key=lambda about: about["date"])
    content = {"machine": latest, "configuration": CONFIG, "scores": scores, "minutes": minutes}
    write_json(RESULTS / "reproduce" / "scores.json", content)
    if curves:
        plot(curves, RESULTS / "reproduce" / "learning-curves.png")
    update_readme("reproduce", section(content))


def section(content: dict[str, Any]) -> str:
    """What the README shows of what is in scores.json."""
    about, minutes = content["machine"], content["minutes"]
    note = (
        f"STS-B: Spearman × 100. CoNLL-2003, by a linear head on frozen outputs: accuracy of POS and chunks, F1 of "
        f"NER, in percent. {about['processor']}, "
        f"{about['cores']} cores, PyTorch {about['torch']}, transformers {about['transformers']}, {about['date']}; "
        + ", ".join(f"{stage} {spent:.0f} min" for stage, spent in minutes.items() if spent)
        + "."
    )
    return f"{markdown_table(rows(content['scores']))}\n\n{note}"


def rows(scores: dict[str, Any]) -> list[dict[str, str]]:
    """A row an encoder; what is not measured yet is a dash."""
    found = []
    for encoder in ENCODERS:
        words = scores.get(f"{encoder.name}-words", {})
        found.append(
            {"": encoder.title, STS: _shown(scores.get(f"{encoder.name}-sts"))}
            | {_WORDS[task]: _shown(words.get(task)) for task in TASKS}
        )
    peer = {"": _PEER, STS: _shown(scores.get("minilm-sts"))}
    return [*found, peer | {_WORDS[task]: "–" for task in TASKS}]


def _log(stage: Path) -> list[dict[str, Any]]:
    """What a stage's trainer logged, a line of it each."""
    path = stage / "trainer_state.json"
    return json.loads(path.read_text(encoding="utf-8"))["log_history"] if path.exists() else []


def plot(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """The loss of each stage by its steps, side by side."""
    import matplotlib

    matplotlib.use("agg")  # no screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3), squeeze=False, layout="constrained")
    for axis, (stage, points) in zip(axes[0], curves.items(), strict=True):
        axis.plot(*zip(*points, strict=True), linewidth=1.2)
        axis.set(title=stage, xlabel="step", ylabel="loss")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _shown(scores: dict[str, float] | None) -> str:
    return "–" if scores is None else f"{scores['test']:.1f}"
