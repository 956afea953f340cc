"""Whether an adapter finds what the demo asks for, among all of Python's docstrings."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from benchmarks.fetch import smollm2
from benchmarks.fetch.docstrings import collect
from llm2vec_fast import LLM2Vec

# To each question, which docstrings answer it: a pattern of where they stand.
_TO_JSON = r"json|json\.dumps?|json\.encoder(\..+)?"
QUESTIONS = {
    "read rows of a csv file": r"_?csv(\..+)?",
    "run a command in another process and read its output": r"subprocess(\..+)?",
    "turn an object into json": _TO_JSON,
    "turn an object into JSON": _TO_JSON,
}


def missed(adapter: str | Path, every: int = 1) -> dict[str, list[str]]:
    """The questions whose first hit does not answer them, and the names of their first three hits.

    Args:
        adapter: a folder, or the name of an adapter that comes with the library.
        every: ask among one docstring of so many, and all those that answer. Among fewer, a wrong one that scores
            higher may be missing.

    Raises:
        FetchError: the model cannot be had.
    """
    encoder = LLM2Vec.from_pretrained(smollm2.fetch(), str(adapter), merge_peft=True, doc_max_length=64, device="cpu")
    found = [x for i, x in enumerate(collect()) if i % every == 0 or _answers(x.id)]
    documents = torch.as_tensor(encoder.encode([x.text for x in found], normalize=True))
    wrong = {}
    for question, expected in QUESTIONS.items():
        scores = documents @ torch.as_tensor(encoder.encode([question], normalize=True))[0]
        hits = [found[i].id for i in scores.topk(3).indices]
        if not re.fullmatch(expected, hits[0]):
            wrong[question] = hits
    return wrong


def _answers(name: str) -> bool:
    return any(re.fullmatch(expected, name) for expected in QUESTIONS.values())
