"""A model folder that only needs to be hashed, and a job that embeds with the fake encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_encoder import FakeEncoder

from llm2vec_fast.bulk.job import Outcome, embed
from llm2vec_fast.bulk.settings import EmbedSettings


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Callable[..., Outcome]:
    """Embed the input files into tmp_path / "out" (or ``output``); keyword arguments are settings."""

    def run(*inputs: Path | str, output: str = "out", encoder: FakeEncoder | None = None, **options: Any) -> Outcome:
        job = {name: options.pop(name) for name in ("load", "stop", "notify") if name in options}
        load = job.pop("load", lambda settings: encoder or FakeEncoder())
        settings = EmbedSettings(**{"model": str(model), "rows_per_shard": 10, **options})
        return embed([str(path) for path in inputs], tmp_path / output, settings, load=load, **job)

    return run
