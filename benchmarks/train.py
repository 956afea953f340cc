"""A training step on a real model, ours against stock transformers and peft on the same CPU.

    python -m benchmarks.train                      # both stages; prints, writes results/train.json and the page's rows
    python -m benchmarks.train --stage mntp --rounds 5

Every contender trains in a process of its own, on the same batches (for MNTP with the same tokens hidden), with the
same adapter and optimiser, and ours takes turns with each peer. First the losses of so many steps on quarter batches
are compared; then whole batches are timed, after one that is not.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.fetch import sentences, smollm2
from benchmarks.report import machine, markdown_table, update_readme, write_json
from benchmarks.worker import Worker, forget_peak

RESULTS = Path(__file__).parent / "results" / "train.json"
RANK, LEARNING_RATE, DROPOUT, SCALE = 16, 2e-4, 0.3, 20.0
MNTP_BATCH, MNTP_LENGTH = 32, 128
SIMCSE_BATCH, SIMCSE_LENGTH = 32, 128  # of 64 sentences, twice each, a step of stock code takes 22 GiB
STAGES = ("mntp", "simcse")
CONTENDERS = {
    "llm2vec-fast": "ours",
    "transformers + peft, float32 weights under bf16 autocast": "stock_float32",
    "transformers + peft, bf16 weights": "stock_bfloat16",
}
OURS, *PEERS = CONTENDERS
Step = Callable[[list[Tensor]], Tensor]  # one batch's texts to its loss, with gradients left behind


def ours(folder: str, given: list[str]) -> Callable[[], np.ndarray]:
    """The library's own stages: packed, accelerated, no logits."""
    from llm2vec_fast.training.arguments import MntpArguments, SimcseArguments
    from llm2vec_fast.training.contrast import load_embedding_model
    from llm2vec_fast.training.models import load_model

    stage, batches = _batches(given)
    settings = {"model_name_or_path": folder, "train_file": ["-"], "output_dir": "-", "use_cpu": True,
                "lora_r": RANK, "lora_dropout": 0.0, "model_dtype": "bfloat16"}  # fmt: skip
    if stage == "mntp":
        model = load_model(MntpArguments(**settings), head=True).model
        return _training(model, batches, _mntp_packed(model))
    model = load_embedding_model(SimcseArguments(**settings, attention_dropout=DROPOUT))[0].model
    return _training(model, batches, _simcse_packed(model))


def stock_float32(folder: str, given: list[str]) -> Callable[[], np.ndarray]:
    """As the original trains: float32 weights under autocast, padded, all logits."""
    return _stock(folder, given, torch.float32)


def stock_bfloat16(folder: str, given: list[str]) -> Callable[[], np.ndarray]:
    """The leanest public setting: frozen weights in bfloat16, adapters in float32, under autocast."""
    return _stock(folder, given, torch.bfloat16)


def _stock(folder: str, given: list[str], dtype: torch.dtype) -> Callable[[], np.ndarray]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from llm2vec_fast.training.arguments import LORA_TARGETS

    stage, batches = _batches(given)
    kind = AutoModelForCausalLM if stage == "mntp" else AutoModel
    torch.manual_seed(42)
    dropout = {"attention_dropout": DROPOUT} if stage == "simcse" else {}
    config = AutoConfig.from_pretrained(folder, **dropout)
    config.is_causal = False
    model = kind.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="sdpa")
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=list(LORA_TARGETS))
    model = get_peft_model(model, adapter)
    return _training(model, batches, _mntp_padded(model) if stage == "mntp" else _simcse_padded(model))


def _mntp_packed(model: nn.Module) -> Step:
    from llm2vec_fast.kernels.layout import SequenceLayout

    def step(texts: list[Tensor]) -> Tensor:
        layout = SequenceLayout.from_lengths([text.shape[1] for text in texts])
        ids, labels = torch.cat(texts, dim=1)
        positions = layout.position_ids.view(1, -1)
        return model(input_ids=ids[None], labels=labels[None], position_ids=positions, layout=layout).loss

    return step


def _mntp_padded(model: nn.Module) -> Step:
    def step(texts: list[Tensor]) -> Tensor:
        (ids, labels), mask = _padded(texts, (0, -100))
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss

    return step


def _simcse_packed(model: nn.Module) -> Step:
    from llm2vec_fast.kernels import contrastive_loss
    from llm2vec_fast.kernels.layout import SequenceLayout

    def step(texts: list[Tensor]) -> Tensor:
        layout = SequenceLayout.from_lengths([text.shape[1] for text in texts] * 2)
        ids = torch.cat(texts * 2, dim=1)[:1]
        positions = layout.position_ids.view(1, -1)
        rows = model(input_ids=ids, layout=layout, position_ids=positions, embed=True).rows
        return contrastive_loss(*rows.chunk(2), scale=SCALE)

    return step


def _simcse_padded(model: nn.Module) -> Step:
    from torch.nn.functional import cross_entropy, normalize

    def view(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        return normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def step(texts: list[Tensor]) -> Tensor:
        (ids, _), mask = _padded(texts, (0, -100))
        scores = SCALE * view(ids, mask) @ view(ids, mask).T
        return cross_entropy(scores, torch.arange(len(scores)))

    return step


def _training(model: nn.Module, batches: list[list[Tensor]], step: Step) -> Callable[[], np.ndarray]:
    """Each call is one step: forward, backward, AdamW; it returns the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    model.train()
    torch.manual_seed(0)
    forget_peak()
    taken = 0

    def run() -> np.ndarray:
        nonlocal taken
        loss = step(batches[taken % len(batches)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        taken += 1
        return np.array(loss.item())

    return run


def _padded(texts: list[Tensor], fill: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Rows of ids and of labels, padded on the right, and their mask."""
    width = max(text.shape[1] for text in texts)
    rows = [torch.full((len(texts), width), value) for value in fill]
    mask = torch.zeros(len(texts), width, dtype=torch.long)
    for i, text in enumerate(texts):
        for row, values in zip(rows, text, strict=True):
            row[i, : text.shape[1]] = values
        mask[i, : text.shape[1]] = 1
    return (rows[0], rows[1]), mask


def _batches(given: list[str]) -> tuple[str, list[list[Tensor]]]:
    """What `drawn` made: a stage, and a (2, tokens) tensor of ids and labels a text."""
    stage, batches = json.loads(given[0])
    return stage, [[torch.tensor(text) for text in batch] for batch in batches]


def drawn(folder: str, stage: str, steps: int, rounds: int) -> tuple[list[str], int]:
    """Batches of real texts, as the one string that goes to the contenders, and the mean tokens of the whole ones.

    First ``steps`` quarter batches, then ``rounds`` whole ones. For MNTP sentences are joined and cut to one length, as
    the original does; for SimCSE each keeps its own.
    """
    size = SIMCSE_BATCH if stage == "simcse" else MNTP_BATCH
    sizes = [size // 4] * steps + [size] * rounds
    texts = iter(_texts(folder, stage, sum(sizes)))
    batches = [[next(texts) for _ in range(count)] for count in sizes]
    views = 2 if stage == "simcse" else 1
    tokens = views * sum(text.shape[1] for batch in batches[steps:] for text in batch) // rounds
    return [json.dumps([stage, [[text.tolist() for text in batch] for batch in batches]])], tokens


def _texts(folder: str, stage: str, count: int) -> list[Tensor]:
    """``count`` texts, (2, tokens): ids and labels."""
    from transformers import AutoTokenizer

    from llm2vec_fast.training.masking import mask_id_of, mask_tokens

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = random.Random(0).sample(sentences.sentences(), 40_000)
    generator = torch.Generator().manual_seed(0)
    if stage == "simcse":
        needed = [text for text in texts if len(text.split()) > 3][:count]
        rows = [torch.tensor(ids[:SIMCSE_LENGTH]) for ids in tokenizer(needed)["input_ids"]]
        return [torch.stack([ids, torch.full_like(ids, -100)]) for ids in rows]
    joined = torch.tensor([i for ids in tokenizer(texts)["input_ids"] for i in ids])
    first = torch.zeros(MNTP_LENGTH, dtype=torch.bool)
    first[0] = True  # no output comes before it
    mask = mask_id_of(tokenizer, "blank"), len(tokenizer)
    return [
        torch.stack(mask_tokens(row, first, *mask, probability=0.2, masking="default", generator=generator))
        for row in joined[: count * MNTP_LENGTH].view(-1, MNTP_LENGTH)
    ]


def measure(folder: str, stage: str, steps: int, rounds: int) -> dict:
    """Ours beside one peer after the other (three at once may not fit in memory): losses of ``steps`` small steps of
    each, then ``rounds`` of turns, a whole step each."""
    given, tokens = drawn(folder, stage, steps, rounds + 1)
    rows: dict[str, dict] = {}
    for peer in PEERS:
        workers = {name: Worker(globals()[CONTENDERS[name]], folder, given) for name in (OURS, peer)}
        losses = _losses(stage, workers, steps)
        seconds = _turns(workers, rounds)
        for name, worker in workers.items():
            peak = worker.peak_mib()
            row = {"losses": losses[name], "seconds": seconds[name], "peak_mib": peak}
            rows.setdefault(name, {**row, "above_weights_mib": peak - worker.loaded_mib})
            worker.stop()
        rows[peer]["our_seconds"] = seconds[OURS]
    return {"tokens": tokens, "contenders": rows}


def _losses(stage: str, workers: dict[str, Worker], steps: int) -> dict[str, list[float]]:
    losses: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(steps):
        for name, worker in workers.items():
            losses[name].append(float(worker.outputs()))
        print(f"{stage}: step {number + 1}/{steps}", *(f"{losses[name][-1]:.3f}" for name in workers), flush=True)
    return losses


def _turns(workers: dict[str, Worker], rounds: int) -> dict[str, list[float]]:
    """Seconds of whole steps, after one that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for worker in workers.values():
        worker.outputs()
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds[name].append(worker.seconds())
    return seconds


def summarise(stage: str, found: dict) -> list[dict[str, str]]:
    """One table row a contender, ratios taken turn by turn."""
    rows = found["contenders"]
    first = rows[OURS]
    table = []
    for name, row in rows.items():
        beside = row.get("our_seconds", row["seconds"])
        ratio = statistics.median(a / b for a, b in zip(row["seconds"], beside, strict=True))
        steps = len(row["losses"])
        apart = np.abs(np.array(row["losses"]) - np.array(first["losses"]))
        table.append(
            {
                f"{stage}": name,
                "tokens/s": f"{found['tokens'] / statistics.median(row['seconds']):.0f}",
                "time, × ours": f"{ratio:.2f}",
                "memory above the weights": f"{row['above_weights_mib']:.0f} MiB",
                "× ours": f"{row['above_weights_mib'] / first['above_weights_mib']:.2f}",
                f"loss, last half of {steps} steps": _mean_and_error(row["losses"][steps // 2 :]),
                "apart from ours, median (most)": f"{np.median(apart):.4f} ({apart.max():.4f})",
            }
        )
    return table


def _mean_and_error(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses) / len(losses) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps against transformers and peft, one model, one run.")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--steps", type=int, default=50, help="steps whose losses are compared (default 50)")
    parser.add_argument("--rounds", type=int, default=7, help="turns that are timed (default 7)")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    given = parser.parse_args()
    folder = str(smollm2.fetch())
    for stage in given.stage:
        found = measure(folder, stage, given.steps, given.rounds)
        print(markdown_table(summarise(stage, found)), flush=True)
        if not given.dry:  # after each stage: nothing measured is lost
            publish(stage, {"machine": machine(), "steps": given.steps, "rounds": given.rounds, **found})


def publish(stage: str, found: dict) -> None:
    """Write the JSON file and the page's rows; stages that were measured in another run stay as they are."""
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    stages = {name: some for name in STAGES if (some := {**before, stage: found}.get(name))}
    write_json(RESULTS, stages)
    update_readme("train", "\n\n".join([_about(), *(_section(name, some) for name, some in stages.items())]))


def _about() -> str:
    return (
        f"SmolLM2-135M, LoRA r = {RANK}. MNTP: {MNTP_BATCH} sequences of {MNTP_LENGTH} tokens; SimCSE: {SIMCSE_BATCH} "
        "sentences, each twice, of their own lengths."
    )


def _section(stage: str, found: dict) -> str:
    about = found["machine"]
    note = (
        f"Medians of {found['rounds']} steps; losses of {found['steps']} steps on a quarter of such a batch. "
        f"{about['processor']}, {about['cores']} cores; torch {about['torch']}, transformers {about['transformers']}; "
        f"{about['date']}."
    )
    return f"{markdown_table(summarise(stage, found))}\n\n{note}"


if __name__ == "__main__":
    main()
