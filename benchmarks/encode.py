"""Encode real texts with one model, ours against what else a user has on the same CPU.

    python -m benchmarks.encode            # prints the table, writes results/encode.json and the README's rows

Every contender runs in a process of its own, so that its peak memory is its own, and they take turns, so that a machine
whose speed drifts drifts for all. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import linear

from benchmarks.fetch import docstrings, smollm2
from benchmarks.report import machine, markdown_table, update_readme, write_json
from benchmarks.worker import Worker

RESULTS = Path(__file__).parent / "results" / "encode.json"
MAX_LENGTH = 512
PADDED_BATCH = 32
SLOW = 5.0  # a contender that takes this many times as long as ours has one turn: no noise hides that
CONTENDERS = {
    "llm2vec-fast": "ours",
    "sentence-transformers, batches of 8": "sentence_transformers_8",
    "sentence-transformers, batches of 32": "sentence_transformers_32",
    "transformers sdpa, batches of 32 sorted by length": "padded_sorted",
    "transformers sdpa, batches of 32 as they come": "padded",
    "the model's matrix products alone": "products",
}


def ours(folder: str, texts: list[str]) -> Callable[[], np.ndarray]:
    """LLM2Vec.encode."""
    from llm2vec_fast import LLM2Vec

    encoder = LLM2Vec.from_pretrained(folder, dtype=torch.bfloat16, max_length=MAX_LENGTH, doc_max_length=MAX_LENGTH)
    return lambda: encoder.encode(texts, convert_to_numpy=True)


def sentence_transformers(folder: str, texts: list[str], batch_size: int) -> Callable[[], np.ndarray]:
    """SentenceTransformer.encode: sorts by length itself."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.bfloat16})
    model.max_seq_length = MAX_LENGTH
    return lambda: model.encode(texts, batch_size=batch_size, show_progress_bar=False).astype(np.float32)


def sentence_transformers_8(folder: str, texts: list[str]) -> Callable[[], np.ndarray]:
    return sentence_transformers(folder, texts, 8)


def sentence_transformers_32(folder: str, texts: list[str]) -> Callable[[], np.ndarray]:
    return sentence_transformers(folder, texts, 32)


def padded(folder: str, texts: list[str], by_length: bool = False) -> Callable[[], np.ndarray]:
    """Stock transformers as most examples use it: padded batches, mean over the mask."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def encode() -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i])) if by_length else range(len(texts))
        rows = np.empty((len(texts), model.config.hidden_size), np.float32)
        for first in range(0, len(texts), PADDED_BATCH):
            chosen = list(order)[first : first + PADDED_BATCH]
            batch = tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
            )
            hidden = model(**batch, use_cache=False).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            rows[chosen] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        return rows

    return encode


def padded_sorted(folder: str, texts: list[str]) -> Callable[[], np.ndarray]:
    return padded(folder, texts, by_length=True)


def products(folder: str, texts: list[str]) -> Callable[[], np.ndarray]:
    """The limit: the products of every layer, with F.linear, at the shapes of our batches, and nothing else."""
    from llm2vec_fast import LLM2Vec
    from llm2vec_fast.engine.plan import plan_batches

    encoder = LLM2Vec.from_pretrained(folder, dtype=torch.bfloat16, max_length=MAX_LENGTH, doc_max_length=MAX_LENGTH)
    lengths = token_counts(encoder, texts)
    totals = [int(lengths[batch].sum()) for batch in plan_batches(lengths, encoder.token_budget)]
    weights = [m.weight for m in encoder.model.modules() if isinstance(m, torch.nn.Linear)]
    widths = {w.shape[1] for w in weights}

    @torch.inference_mode()
    def run() -> np.ndarray:
        for total in totals:
            rows = {width: torch.ones(total, width, dtype=torch.bfloat16) for width in widths}
            for weight in weights:
                linear(rows[weight.shape[1]], weight)
        return np.empty((0, 0), np.float32)

    return run


def in_float32(folder: str, texts: list[str]) -> Callable[[], np.ndarray]:
    """What every contender approximates: stock transformers in float32, one text at a time."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.inference_mode()
    def encode() -> np.ndarray:
        batches = (tokenizer(text, truncation=True, max_length=MAX_LENGTH, return_tensors="pt") for text in texts)
        return np.stack([model(**batch, use_cache=False).last_hidden_state[0].mean(0).numpy() for batch in batches])

    return encode


def token_counts(encoder: object, texts: list[str]) -> np.ndarray:
    return np.array([min(MAX_LENGTH, len(ids)) for ids in encoder.tokenizer(texts)["input_ids"]])


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def sample(count: int) -> list[str]:
    texts = [text for _, text in docstrings.collect()]
    return random.Random(0).sample(texts, min(count, len(texts)))


def encoder_folder(parent: str) -> str:
    """The model as `save` writes it: bidirectional by its configuration, for every contender the same files."""
    from llm2vec_fast import LLM2Vec

    folder = f"{parent}/encoder"
    LLM2Vec.from_pretrained(smollm2.fetch(), dtype=torch.bfloat16).save(folder)
    return folder


def measure(folder: str, texts: list[str], rounds: int, chosen: list[str]) -> dict:
    """Outputs first, then ``rounds`` of turns; a slow contender has one."""
    reference = Worker(in_float32, folder, texts)
    exact = reference.outputs()
    reference.stop()
    workers = {name: Worker(globals()[CONTENDERS[name]], folder, texts) for name in chosen}
    outputs = {name: worker.outputs() for name, worker in workers.items()}  # also the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(rounds):
        for name, worker in workers.items():
            if number and seconds[name][0] > SLOW * seconds[chosen[0]][0]:
                continue
            seconds[name].append(worker.seconds())
            print(f"round {number + 1}/{rounds}  {name}: {seconds[name][-1]:.1f} s", flush=True)
    rows = {}
    for name, worker in workers.items():
        rows[name] = {"seconds": seconds[name], "peak_mib": worker.peak_mib(), "loaded_mib": worker.loaded_mib}
        if len(outputs[name]):
            ours_too, to_exact = cosines(outputs[name], outputs[chosen[0]]), cosines(outputs[name], exact)
            rows[name] |= {
                "cosine_to_ours": [float(np.median(ours_too)), float(ours_too.min())],
                "cosine_to_float32": [float(np.median(to_exact)), float(to_exact.min())],
            }
        worker.stop()
    return rows


def summarise(rows: dict, texts: int, tokens: int) -> list[dict[str, str]]:
    """One table row a contender, ratios taken round by round."""
    peers = {n: statistics.median(r["seconds"]) for n, r in rows.items() if n.startswith("sentence-transformers")}
    best, limit = min(peers, key=peers.get), list(rows)[-1]
    table = []
    for name, row in rows.items():
        times = row["seconds"]
        ratio = statistics.median(b / t for b, t in zip(rows[best]["seconds"], times, strict=False))
        share = statistics.median(b / t for b, t in zip(rows[limit]["seconds"], times, strict=False))
        median = statistics.median(times)
        table.append(
            {
                "": name,
                "texts/s": f"{texts / median:.1f}",
                "tokens/s": f"{tokens / median:.0f}",
                "× sentence-transformers": f"{ratio:.2f}",
                "of the limit": f"{share:.0%}",
                "peak memory": f"{row['peak_mib']:.0f} MiB",
                "cosine to ours, median (least)": _pair(row.get("cosine_to_ours")),
                "cosine to float32, median (least)": _pair(row.get("cosine_to_float32")),
            }
        )
    return table


def _pair(values: list[float] | None) -> str:
    return "" if values is None else f"{values[0]:.4f} ({values[1]:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Encoding speed against peers, one model, one run.")
    parser.add_argument("--texts", type=int, default=1024, help="how many docstrings, drawn once (default 1024)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default 3)")
    parser.add_argument("--quick", action="store_true", help="ours and the limit only; prints, writes nothing")
    arguments = parser.parse_args()
    texts = sample(arguments.texts)
    names = list(CONTENDERS)
    chosen = [names[0], names[2], names[-1]] if arguments.quick else names
    with tempfile.TemporaryDirectory() as parent:
        folder = encoder_folder(parent)
        rows = measure(folder, texts, arguments.rounds, chosen)
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    tokens = sum(min(MAX_LENGTH, len(i)) for i in ids)
    table = summarise(rows, len(texts), tokens)
    print(markdown_table(table))
    if not arguments.quick:
        about = machine()
        settings = {"texts": len(texts), "tokens": tokens, "rounds": arguments.rounds, "dtype": "bfloat16"}
        write_json(RESULTS, {"machine": about, "settings": settings, "contenders": rows})
        note = (
            f"SmolLM2-135M, bfloat16, {len(texts)} docstrings of {tokens / len(texts):.0f} tokens on average, medians "
            f"of {arguments.rounds} turns (one, where a turn takes over {SLOW:.0f} times ours). {about['processor']}, "
            f"{about['cores']} cores; torch {about['torch']}, transformers {about['transformers']}, "
            f"sentence-transformers {about['sentence-transformers']}; {about['date']}."
        )
        update_readme("encode", f"{note}\n\n{markdown_table(table)}")


if __name__ == "__main__":
    main()
