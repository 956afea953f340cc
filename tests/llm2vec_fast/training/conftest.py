"""Small corpora, and the command line in processes of its own, for tests of the stages."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from reference_data import FOLDER
from training_cases import Materials
from warm_processes import Ranks, WarmProcesses

TEXT = "the cat sat on a mat while rain fell over old stone walls near our quiet river"


@pytest.fixture
def sentences() -> list[str]:
    """60 texts of 3 to 13 words, no two alike."""
    rng, words = np.random.default_rng(0), TEXT.split()
    return [" ".join(rng.choice(words, rng.integers(3, 14))) + f" {i}" for i in range(60)]


@pytest.fixture
def corpus(tmp_path: Path, sentences: list[str]) -> str:
    """The file that holds them, one a line."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(sentences) + "\n")
    return str(path)


@pytest.fixture
def files(corpus: str, sentences: list[str], tmp_path: Path) -> dict[str, str]:
    """What each stage reads."""
    pairs, words = tmp_path / "pairs.jsonl", tmp_path / "words.txt"
    couples = zip(sentences[::2], sentences[1::2], strict=True)
    rows = [{"query": a, "positive": b, "negative": [f"{a} x", f"{a} y"]} for a, b in couples]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words.write_text("\n\n".join("\n".join(f"{word} L{len(word)}" for word in text.split()) for text in sentences))
    return {"mntp": corpus, "simcse": corpus, "contrastive": str(pairs), "word-level": str(words)}


@pytest.fixture
def chain(tmp_path: Path, sentences: list[str]) -> str:
    """30 pairs, each with a document of its own and that of the next."""
    path = tmp_path / "chain.jsonl"
    rows = [{"query": sentences[i], "positive": [sentences[30 + i], sentences[30 + (i + 1) % 30]]} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(corpus: str, tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Arguments of a short run on a tiny model: what a test changes, and the rest."""

    def settings(output: str = "out", **changes: object) -> dict[str, object]:
        return {
            "model_name_or_path": str(FOLDER / "llama"),
            "train_file": [corpus],
            "output_dir": str(tmp_path / output),
            "max_seq_length": 24,
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "model_dtype": "float32",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            **changes,
        }

    return settings


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Materials]:
    """Models and adapters of drawn cases."""
    gc.freeze()  # accelerate collects garbage after every run: not what was imported, which takes longer than a step
    yield Materials(tmp_path_factory.mktemp("materials"))
    gc.unfreeze()


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmProcesses]:
    """What `launch` forks from."""
    processes = WarmProcesses()
    yield processes
    processes.close()


@pytest.fixture
def launch(warm: WarmProcesses, tmp_path: Path) -> Callable[..., Ranks | subprocess.Popen[str]]:
    """Start `llm2vec-fast train STAGE --key=value …` in so many processes; lists are given as several values.

    ``cold`` starts Python, and torchrun for several processes, as a user does.
    """

    def launch(
        stage: str,
        options: dict[str, object],
        processes: int = 1,
        program: tuple[str, ...] = ("-m", "llm2vec_fast"),
        cold: bool = False,
    ) -> Ranks | subprocess.Popen[str]:
        words = []
        for name, value in options.items():
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        command = [*program, "train", stage, *words]
        if not cold:
            return warm.start(command, processes, tmp_path)
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start = [sys.executable, *(several if processes > 1 else []), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(start, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return launch


@pytest.fixture
def finished() -> Callable[[Ranks | subprocess.Popen[str]], str]:
    """Wait for processes that ought to end well: what they printed."""

    def finished(process: Ranks | subprocess.Popen[str]) -> str:
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        return printed

    return finished
