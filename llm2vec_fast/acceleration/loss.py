"""Causal language models whose loss never writes its logits."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from .swapping import Acceleration, is_replaced, stock_class, subclass, swap

logger = logging.getLogger(__name__)

# What a head's code may name if it is hidden states → one product → perhaps softcap → the loss of the next token.
_KNOWN_NAMES = {
    "model", "last_hidden_state", "past_key_values", "cache", "hidden_states", "attentions", "slice_logits_to_keep",
    "slice", "isinstance", "int", "lm_head", "config", "final_logit_softcapping", "torch", "tanh", "loss_function",
    "vocab_size", "CausalLMOutputWithPast",
}  # fmt: skip
_NEEDED_NAMES = {"model", "lm_head", "loss_function"}
# What transformers calls a cache: past_key_values until 5.23, cache from 5.24.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_SHARDING = "torch.distributed.fsdp"  # its hooks give a layer its weight and take it away; they leave the output alone


class LossHead(nn.Linear):
    """An output layer that takes labels, too, and returns their loss in place of logits.

    It is called as any layer is: what shards its weight gathers it for the call.
    """

    def forward(self, hidden: Tensor, labels: Tensor | None = None, **settings: Any) -> Tensor | CrossEntropy:
        if labels is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden, self.weight, labels, bias=self.bias, **settings)


@dataclass
class CausalLossOutput(CausalLMOutputWithPast):
    """With scores of the labels.

    Attributes:
        accuracy: () float32, the share of labelled tokens that are predicted right.
        correct: (B, S) bool, whether an output predicts its label right; False where it has none.
        log_probs: (B, S) float32, the log-probability of each output's label, 0 where it has none; without gradient.
    """

    accuracy: Tensor | None = None
    correct: Tensor | None = None
    log_probs: Tensor | None = None


def fuse_loss(model: nn.Module, report: Acceleration) -> None:
    """Swap the causal language model, if its head is a product and its loss that of the next token."""
    heads = [m for m in model.modules() if isinstance(m, PreTrainedModel) and hasattr(m, "lm_head")]
    if not heads:
        report.left["loss"] = "the model has no language modelling head"
    for module in heads:
        problem = _problem(module)
        if problem is None:
            swap(module, with_our_loss, owner=report.owner)
            swap(module.lm_head, LossHead, owner=report.owner)
            report.count("loss")
        else:
            report.left["loss"] = f"{stock_class(module).__name__} {problem}"


def _problem(module: PreTrainedModel) -> str | None:
    names = set(inspect.unwrap(stock_class(module).forward).__code__.co_names)
    if is_replaced(module):
        return "has its forward method replaced on the instance"
    if not names >= _NEEDED_NAMES or not names <= _KNOWN_NAMES:
        return "makes its logits or its loss in a way of its own"
    return _obstacle(module)


@cache
def with_our_loss(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The same class; with labels it returns the loss and, unless ``output_logits=True``, no logits.

    ``output_scores=True`` adds what `CausalLossOutput` says of the labels.
    """

    @wraps(stock.forward)
    def forward(
        self: PreTrainedModel,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_logits: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        batch = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "inputs_embeds": inputs_embeds, "use_cache": use_cache, **kwargs,
        }  # fmt: skip
        if cache is not None:
            batch[_CACHE] = cache
        plain = isinstance(logits_to_keep, int) and logits_to_keep == 0
        obstacle = None if labels is None or output_logits or not plain else _obstacle(self)
        if obstacle is not None and not torch.compiler.is_compiling():
            _warn(f"{stock.__name__} {obstacle}: its loss is computed from all logits")
        if labels is None or output_logits or not plain or obstacle is not None:
            outputs = stock.forward(self, labels=labels, logits_to_keep=logits_to_keep, **batch)
            return with_scores(outputs, labels, **kwargs) if output_scores else outputs
        return _with_loss(self, labels, output_scores, **batch)

    return subclass(stock, forward)


def _obstacle(module: PreTrainedModel) -> str | None:
    """Why this is not the plain loss of the next token from a plain output layer, if it is not."""
    head = module.lm_head
    hooks = [*head._forward_hooks.values(), *head._forward_pre_hooks.values()]
    of_sharding = [getattr(hook, "__module__", "").startswith(_SHARDING) for hook in hooks]
    sharded = any(of_sharding)
    if type(head) not in (nn.Linear, LossHead) and not (sharded and isinstance(head, LossHead)):
        return f"has an output layer that is not a torch Linear but {type(head).__module__}.{type(head).__name__}"
    if type(head.weight) is not nn.Parameter and not sharded:
        return f"has an output layer whose weight is not a plain Parameter but {type(head.weight).__name__}"
    if not all(of_sharding) or is_replaced(head):
        return "has an output layer with hooks, or with its forward method replaced"
    if module.loss_function is not ForCausalLMLoss:
        return "has a loss function of its own"
    return None


@cache
def _warn(message: str) -> None:
    """Once for each message."""
    logger.warning(message)


@can_return_tuple
def _with_loss(module: PreTrainedModel, labels: Tensor, scores: bool, **batch: Any) -> CausalLMOutputWithPast:
    batch["use_cache"] = bool(batch["use_cache"])  # by default a configuration asks for one, of no use beside a loss
    outputs = module.model(**batch)
    result = _next_token_loss(module, outputs.last_hidden_state, labels, scores, **batch)
    carried = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
    carried[_CACHE] = getattr(outputs, _CACHE)
    if not scores:
        return CausalLMOutputWithPast(loss=result, **carried)
    correct, log_probs = (x.view(outputs.last_hidden_state.shape[:-1]) for x in (result.correct, result.log_probs))
    return CausalLossOutput(loss=result.loss, accuracy=result.accuracy, correct=correct, log_probs=log_probs, **carried)


def _next_token_loss(
    module: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor,
    scores: bool,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor | CrossEntropy:
    """hidden (B, S, d), labels (B, S) → the loss of transformers' ForCausalLMLoss, with its keywords."""
    result = module.lm_head(
        hidden.flatten(0, -2),
        _next_labels(labels, shift_labels, ignore_index).reshape(-1).to(hidden.device),
        ignore_index=ignore_index,
        softcap=getattr(module.config, "final_logit_softcapping", None),
        reduction="mean" if num_items_in_batch is None else "sum",
        return_accuracy=scores,
        return_log_probs=scores,
    )
    if num_items_in_batch is None:
        return result
    loss = result.loss if scores else result
    loss = loss / (num_items_in_batch.to(loss.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)
    return result._replace(loss=loss) if scores else loss


def _next_labels(labels: Tensor, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """(B, S) labels of tokens to those of the outputs that predict them, one position before."""
    return pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels


def with_scores(
    outputs: CausalLMOutputWithPast,
    labels: Tensor,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> CausalLossOutput:
    """A causal model's outputs with the scores of `CausalLossOutput`, from logits that are there; labels (B, S)."""
    logits = outputs.logits.detach()
    labels = _next_labels(labels, shift_labels, ignore_index).to(logits.device)
    wanted = labels != ignore_index
    correct = (logits.argmax(-1) == labels) & wanted
    rows, flat = logits.flatten(0, -2).float(), labels.reshape(-1)
    losses = cross_entropy(rows, flat, ignore_index=ignore_index, reduction="none")
    return CausalLossOutput(
        accuracy=correct.sum() / wanted.sum().clamp(min=1),
        correct=correct,
        log_probs=-losses.view(labels.shape),
        **outputs,
    )
