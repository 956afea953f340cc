"""Training as stock transformers, peft and PyTorch do it, text by text: what a run of ours has to equal.

Nothing of ours takes part. A text is alone in its forward pass, on eager attention under a mask that is written out; an
adapter is peft's own code; losses are written from their definitions, and one update follows from one loss, whatever
the batch was cut into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, get_scheduler
from transformers.optimization import Adafactor

IGNORED = -100


def load_stock(folder: Path, below: Sequence[Path] = (), *, head: bool = False) -> PreTrainedModel:
    """A model in float32 with eager attention, the adapters ``below`` merged into its decoder in order."""
    kind = AutoModelForCausalLM if head else AutoModel
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for adapter in below:
        PeftModel.from_pretrained(model.base_model, adapter).merge_and_unload()  # in place
    return model.requires_grad_()  # which peft took away


def continued(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """An adapter of the decoder alone on the model, perhaps with a head around it, to be trained on."""
    config = LoraConfig.from_pretrained(adapter)
    config.inference_mode, config.lora_dropout = False, 0.0
    wrapped = get_peft_model(model, config)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    weights = load_file(adapter / "adapter_model.safetensors")
    named = {key.replace("base_model.model.", f"base_model.model.{prefix}", 1): x for key, x in weights.items()}
    assert not set_peft_model_state_dict(wrapped, named).unexpected_keys
    return wrapped


def decoder_in(model: nn.Module) -> PreTrainedModel:
    """The decoder of a model, inside a head and an adapter."""
    return (model.get_base_model() if isinstance(model, PeftModel) else model).base_model


def open_masks(decoder: PreTrainedModel, length: int) -> Tensor | dict[str, Tensor]:
    """What lets every token of one text see every other, or those within the window of a layer that has one."""
    open_to_all = torch.zeros(1, 1, length, length)
    window, kinds = getattr(decoder.config, "sliding_window", None), getattr(decoder.config, "layer_types", None)
    if window is None or (kinds and "sliding_attention" not in kinds):
        return open_to_all
    place = torch.arange(length)
    near = open_to_all.masked_fill((place[:, None] - place).abs() > window, torch.finfo().min)
    return {"full_attention": open_to_all, "sliding_attention": near} if kinds else near


def outputs_of(model: nn.Module, ids: Tensor) -> Tensor:
    """(n,) tokens of one text → (n, d) hidden states, or (n, vocabulary) logits of a model with a head."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = base(input_ids=ids[None], attention_mask=open_masks(base.base_model, len(ids)), use_cache=False)
    return (found.logits if "logits" in found else found.last_hidden_state)[0]


def pooled(hidden: Tensor, mode: str, skip: int = 0) -> Tensor:
    """(n, d) → (d,); the first ``skip`` tokens are a prompt's and take no part."""
    if mode == "bos_token":
        return hidden[0]
    hidden = hidden[skip:]
    if mode == "last_token":
        return hidden[-1]
    weights = torch.arange(1, len(hidden) + 1) if mode == "weighted_mean" else torch.ones(len(hidden))
    return (hidden * (weights / weights.sum())[:, None]).sum(0)


def hidden_token_loss(model: nn.Module, texts: Sequence[tuple[Tensor, Tensor]], smoothing: float = 0.0) -> Tensor:
    """Masked next-token prediction: the mean over all hidden tokens, each predicted by the output before it.

    ``texts`` are (n,) ids as the model sees them and (n,) labels, −100 where nothing is hidden.
    """
    losses = [
        F.cross_entropy(outputs_of(model, ids)[:-1], labels[1:], reduction="sum", label_smoothing=smoothing)
        for ids, labels in texts
    ]
    count = sum(int((labels[1:] != IGNORED).sum()) for _, labels in texts)
    return torch.stack(losses).sum() / max(1, count)


def info_nce(
    queries: Tensor,
    documents: Tensor,
    answers: Tensor,
    related: Tensor,
    scale: Tensor | float,
    *,
    symmetric: bool = False,
    query_negatives: bool = False,
    document_negatives: bool = False,
    margin: float = float("inf"),
) -> Tensor:
    """The mean over queries of −log of the share of the own document in the sum of exp(scale · cosine).

    Args:
        queries: (N, d).
        documents: (M, d); document i < N is query i's own, the others are hard negatives.
        answers: (N, M) bool: document j is known to answer query i, and is no negative of it.
        related: (N, N) bool: a text is known to answer both queries; neither they nor their own documents are negatives
            of each other.
        scale: the inverse of the temperature.
        symmetric: the mean with the loss that finds document i's query among the queries.
        query_negatives: the other queries are negatives of a query, too.
        document_negatives: in the same sum are, too, the own document with all queries and with their own documents.
        margin: a pair whose cosine exceeds that of query and own document by more than this is no negative.
    """
    q, d = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    losses = []
    for i in range(len(q)):
        own, others = q[i] @ d[i], [j for j in range(len(q)) if j != i]
        rows = [q[i] @ d[j] for j in range(len(d)) if j != i and not answers[i, j]]
        columns = [q[j] @ d[i] for j in others if not answers[j, i]]
        if query_negatives:
            rows += [q[i] @ q[j] for j in others if not related[i, j]]
        if document_negatives:
            rows += [own, *columns] + [d[i] @ d[j] for j in others if not related[i, j]]
        for found in (rows, columns) if symmetric else (rows,):
            losses.append(_lost(own, [x for x in found if x.item() <= own.item() + margin], scale))
    return torch.stack(losses).mean()


def _lost(own: Tensor, others: list[Tensor], scale: Tensor | float) -> Tensor:
    scores = scale * torch.stack([own, *others])
    return scores.logsumexp(0) - scores[0]


@dataclass
class Update:
    """One step of an optimiser: the loss, the norm of its gradients, these as clipped, and the weights after it."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How weights follow from gradients, in the terms of transformers' TrainingArguments."""

    optim: str
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    lr_scheduler_type: str
    warmup_steps: int
    adam_epsilon: float


class StockOptimiser:
    """PyTorch's optimiser and transformers' schedule on some parameters, by name; biases and norms do not decay."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], recipe: Recipe, updates: int) -> None:
        self.parameters, self._recipe = dict(parameters), recipe
        decayed = [x for x in self.parameters.values() if x.ndim > 1]
        others = [x for x in self.parameters.values() if x.ndim < 2]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        if recipe.optim == "adamw_torch":
            self._optimiser = torch.optim.AdamW(groups, recipe.learning_rate, eps=recipe.adam_epsilon)
        elif recipe.optim == "sgd":
            self._optimiser = torch.optim.SGD(groups, recipe.learning_rate)
        else:
            fixed = {"scale_parameter": False, "relative_step": False}
            self._optimiser = Adafactor(groups, recipe.learning_rate, **fixed)
        self._schedule = get_scheduler(recipe.lr_scheduler_type, self._optimiser, recipe.warmup_steps, updates)

    def update(self, loss: Tensor) -> Update:
        """One step down the gradient of a loss."""
        self._optimiser.zero_grad()
        loss.backward()
        limit = self._recipe.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        gradients = {
            name: torch.zeros_like(x) if x.grad is None else x.grad.clone() for name, x in self.parameters.items()
        }
        self._optimiser.step()
        self._schedule.step()
        weights = {name: x.detach().clone() for name, x in self.parameters.items()}
        return Update(loss.item(), norm.item(), gradients, weights)
