"""Train and measure everything; what is done is not done again.

python -m benchmarks.reproduce                        # all of it; the same command goes on after a stop
python -m benchmarks.reproduce --only mntp uni        # what these names are part of
python -m benchmarks.reproduce --skip words           # without the word-level tasks
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.fetch.packages import FetchError, cache_folder
from benchmarks.reproduce import measure, release, stages, table

TRAINED: dict[str, Callable[[Path], None]] = {
    "mntp": stages.train_mntp,
    "simcse": stages.train_simcse,
    "contrastive": stages.train_contrastive,
}
MEASURES = {"sts": measure.sts_scores, "words": measure.word_scores}


def steps() -> dict[str, Callable[[Path], object]]:
    """Everything there is to do, by name, in order: an encoder is measured as soon as it is trained."""
    found: dict[str, Callable[[Path], object]] = {"texts": stages.write_texts, "peer": measure.peer_score}
    for encoder in measure.ENCODERS:
        if encoder.stage is not None:
            found[f"train-{encoder.stage}"] = TRAINED[encoder.stage]
        for name, of_encoder in MEASURES.items():
            found[f"{name}-{encoder.name}"] = partial(of_encoder, encoder)
    found["release"] = release.release
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=cache_folder() / "reproduce", help="where all of it is kept")
    parser.add_argument("--only", nargs="+", default=[], help="steps, or parts of their names, to take")
    parser.add_argument("--skip", nargs="+", default=[], help="steps, or parts of their names, to leave out")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, step in steps().items():
        parts = {name, *name.split("-")}
        if (given.only and parts.isdisjoint(given.only)) or not parts.isdisjoint(given.skip):
            continue
        print(f"— {name}", flush=True)
        try:
            step(given.folder)
        except FetchError as error:
            parser.exit(1, f"{name}: {error}\n")
    table.publish(given.folder)


if __name__ == "__main__":
    main()
