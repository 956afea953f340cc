"""Whether an adapter finds what the demo asks for, among all of Python's docstrings."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.fetch import smollm2
from benchmarks.fetch.docstrings import collect
from llm2vec_fast import LLM2Vec

# To each question, the modules that answer it.
QUESTIONS = {
    "read rows of a csv file": ("csv", "_csv"),
    "run a command in another process and read its output": ("subprocess",),
    "turn an object into json": ("json",),
    "turn an object into JSON": ("json",),
}


def missed(adapter: str | Path) -> dict[str, list[str]]:
    """The questions whose first hit is of another module, and the names of their first three hits.

    Args:
        adapter: a folder, or the name of an adapter that comes with the library.

    Raises:
        FetchError: the model cannot be had.
    """
    encoder = LLM2Vec.from_pretrained(smollm2.fetch(), str(adapter), merge_peft=True, doc_max_length=64, device="cpu")
    found = list(collect())  # all of them: among a few, a wrong one that scores higher may be missing
    documents = torch.as_tensor(encoder.encode([x.text for x in found], normalize=True))
    wrong = {}
    for question, expected in QUESTIONS.items():
        scores = documents @ torch.as_tensor(encoder.encode([question], normalize=True))[0]
        hits = [found[i].id for i in scores.topk(3).indices]
        if hits[0].split(".")[0] not in expected:
            wrong[question] = hits
    return wrong
