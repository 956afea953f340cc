"""Who trains: this library, and stock transformers with peft in several settings, on the same adapter and optimiser."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize, pad

from benchmarks.train.batches import IGNORED, MNTP, padded, tokens_of, unpacked
from benchmarks.worker import forget_peak

RANK, LEARNING_RATE, SCALE = 16, 2e-4, 20.0
Step = Callable[[list[Tensor]], Tensor]  # one batch's texts to its loss, with gradients left behind


@dataclass(frozen=True)
class Contender:
    """How a model is trained.

    Attributes:
        kind: ours: by this library, packed, accelerated, no logits. stock: by transformers and peft, padded. products:
            the model's matrix products alone, forward and of their inputs' gradients: the limit for any of them.
        dtype: of the frozen weights; the adapter is float32, and stock code runs under bf16 autocast.
        exact: all in float32, to compare losses: in bfloat16 rounding moves those of a few short texts.
        attention: of stock code: sdpa, or eager, which is faster under dropout on a CPU.
        labelled_only: logits of the labelled tokens alone, by the stock model's own ``logits_to_keep``.
        checkpointing: activations are computed again in the backward pass, as the original's configurations ask for.
    """

    kind: str = "stock"
    dtype: str = "bfloat16"
    exact: bool = False
    attention: str = "sdpa"
    labelled_only: bool = False
    checkpointing: bool = False


def train(folder: str, given: list[str]) -> Callable[[], np.ndarray]:
    """Build a contender; each call is one step on the next batch (forward, backward, AdamW) and returns its loss."""
    stage, dropout, settings = json.loads(given[0])
    contender, batches = Contender(**settings), unpacked(given[1])
    if contender.exact:
        contender = replace(contender, dtype="float32")
    if contender.kind == "products":
        return _products(folder, stage, batches)
    model, step = (_ours if contender.kind == "ours" else _stock)(folder, stage, dropout, contender)
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


def described(stage: str, dropout: float, contender: Contender) -> str:
    """What `train` takes first."""
    return json.dumps([stage, dropout, asdict(contender)])


def _ours(folder: str, stage: str, dropout: float, contender: Contender) -> tuple[nn.Module, Step]:
    from llm2vec_fast.training.arguments import MntpArguments, SimcseArguments
    from llm2vec_fast.training.contrast import load_embedding_model
    from llm2vec_fast.training.models import load_model

    settings = {
        "model_name_or_path": folder, "train_file": ["-"], "output_dir": "-", "use_cpu": True, "lora_r": RANK,
        "lora_dropout": 0.0, "model_dtype": contender.dtype, "gradient_checkpointing": contender.checkpointing,
    }  # fmt: skip
    if stage == MNTP:
        model = load_model(MntpArguments(**settings), head=True).model
    else:
        model = load_embedding_model(SimcseArguments(**settings, attention_dropout=dropout))[0].model
    if contender.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, _mntp_packed(model) if stage == MNTP else _simcse_packed(model)


def _stock(folder: str, stage: str, dropout: float, contender: Contender) -> tuple[nn.Module, Step]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from llm2vec_fast.training.arguments import LORA_TARGETS

    kind = AutoModelForCausalLM if stage == MNTP else AutoModel
    torch.manual_seed(42)
    config = AutoConfig.from_pretrained(folder, **({} if stage == MNTP else {"attention_dropout": dropout}))
    config.is_causal = False
    dtype = getattr(torch, contender.dtype)
    model = kind.from_pretrained(folder, config=config, dtype=dtype, attn_implementation=contender.attention)
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=list(LORA_TARGETS))
    model = get_peft_model(model, adapter)
    if contender.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, _mntp_padded(model, contender) if stage == MNTP else _simcse_padded(model, contender)


def _products(folder: str, stage: str, batches: list[list[Tensor]]) -> Callable[[], np.ndarray]:
    """Of real tokens alone, in bfloat16; of MNTP's output layer those of the labelled ones."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    weights = [module.weight.detach() for module in model.layers.modules() if isinstance(module, nn.Linear)]
    head = [model.embed_tokens.weight.detach()] if stage == MNTP else []
    taken = 0

    @torch.no_grad()
    def run() -> np.ndarray:
        nonlocal taken
        batch = batches[taken % len(batches)]
        taken += 1
        labelled = sum(int((text[1] != IGNORED).sum()) for text in batch)
        for weight, rows in (*((x, tokens_of(stage, batch)) for x in weights), *((x, labelled) for x in head)):
            outputs = linear(torch.ones(rows, weight.shape[1], dtype=weight.dtype), weight)
            outputs @ weight
        return np.array(0.0)

    return run


def _mntp_packed(model: nn.Module) -> Step:
    from llm2vec_fast.kernels.layout import SequenceLayout

    def step(texts: list[Tensor]) -> Tensor:
        layout = SequenceLayout.from_lengths([text.shape[1] for text in texts])
        ids, labels = torch.cat(texts, dim=1)
        positions = layout.position_ids.view(1, -1)
        return model(input_ids=ids[None], labels=labels[None], position_ids=positions, layout=layout).loss

    return step


def _mntp_padded(model: nn.Module, contender: Contender) -> Step:
    def step(texts: list[Tensor]) -> Tensor:
        ids, labels, mask = padded(texts)
        given = {"labels": labels}
        if contender.labelled_only:
            shifted = pad(labels[:, 1:], (0, 1), value=IGNORED)
            kept = shifted != IGNORED
            given |= {"logits_to_keep": kept, "shift_labels": shifted[kept]}
        with torch.autocast("cpu", torch.bfloat16, enabled=not contender.exact):
            return model(input_ids=ids, attention_mask=mask, use_cache=False, **given).loss

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


def _simcse_padded(model: nn.Module, contender: Contender) -> Step:
    def view(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=not contender.exact):
            hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        return normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def step(texts: list[Tensor]) -> Tensor:
        ids, _, mask = padded(texts)
        scores = SCALE * view(ids, mask) @ view(ids, mask).T
        return cross_entropy(scores, torch.arange(len(scores)))

    return step
