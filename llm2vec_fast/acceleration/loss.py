"""Causal language models whose loss never writes its logits."""

from __future__ import annotations

import inspect
import logging
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..kernels.cross_entropy import linear_cross_entropy
from .swapping import Acceleration, is_replaced, subclass, swap

logger = logging.getLogger(__name__)

# What a head's code may name if it is hidden states → one product → perhaps softcap → the loss of the next token.
_KNOWN_NAMES = {
    "model", "last_hidden_state", "past_key_values", "hidden_states", "attentions", "slice_logits_to_keep", "slice",
    "isinstance", "int", "lm_head", "config", "final_logit_softcapping", "torch", "tanh", "loss_function", "vocab_size",
    "CausalLMOutputWithPast",
}  # fmt: skip
_NEEDED_NAMES = {"model", "lm_head", "loss_function"}


def fuse_loss(model: nn.Module, report: Acceleration) -> None:
    """Swap the causal language model, if its head is a product and its loss that of the next token."""
    heads = [m for m in model.modules() if isinstance(m, PreTrainedModel) and hasattr(m, "lm_head")]
    if not heads:
        report.left["loss"] = "the model has no language modelling head"
    for module in heads:
        problem = _problem(module)
        if problem is None:
            swap(module, with_our_loss(type(module)))
            report.count("loss")
        else:
            report.left["loss"] = f"{type(module).__name__} {problem}"


def _problem(module: PreTrainedModel) -> str | None:
    names = set(inspect.unwrap(type(module).forward).__code__.co_names)
    if is_replaced(module):
        return "has its forward method replaced on the instance"
    if not names >= _NEEDED_NAMES or not names <= _KNOWN_NAMES:
        return "makes its logits or its loss in a way of its own"
    return _obstacle(module)


@cache
def with_our_loss(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The same class; with labels it returns the loss and, unless ``output_logits=True``, no logits."""

    @wraps(stock.forward)
    def forward(
        self: PreTrainedModel,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        batch = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache, **kwargs,
        }  # fmt: skip
        plain = isinstance(logits_to_keep, int) and logits_to_keep == 0
        obstacle = None if labels is None or output_logits or not plain else _obstacle(self)
        if obstacle is not None and not torch.compiler.is_compiling():
            _warn(f"{stock.__name__} {obstacle}: its loss is computed from all logits")
        if labels is None or output_logits or not plain or obstacle is not None:
            return stock.forward(self, labels=labels, logits_to_keep=logits_to_keep, **batch)
        return _with_loss(self, labels, **batch)

    return subclass(stock, forward, with_our_loss)


def _obstacle(module: PreTrainedModel) -> str | None:
    """Why this is not the plain loss of the next token from a plain output layer, if it is not."""
    head = module.lm_head
    if type(head) is not nn.Linear:
        return f"has an output layer that is not a torch Linear but {type(head).__module__}.{type(head).__name__}"
    if type(head.weight) is not nn.Parameter:
        return f"has an output layer whose weight is not a plain Parameter but {type(head.weight).__name__}"
    if head._forward_hooks or head._forward_pre_hooks or is_replaced(head):
        return "has an output layer with hooks, or with its forward method replaced"
    if module.loss_function is not ForCausalLMLoss:
        return "has a loss function of its own"
    return None


@cache
def _warn(message: str) -> None:
    """Once for each message."""
    logger.warning(message)


@can_return_tuple
def _with_loss(module: PreTrainedModel, labels: Tensor, **batch: Any) -> CausalLMOutputWithPast:
    batch["use_cache"] = bool(batch["use_cache"])  # by default a configuration asks for one, of no use beside a loss
    outputs = module.model(**batch)
    loss = _next_token_loss(module, outputs.last_hidden_state, labels, **batch)
    return CausalLMOutputWithPast(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _next_token_loss(
    module: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """hidden (B, S, d), labels (B, S) → the loss of transformers' ForCausalLMLoss, with its keywords."""
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = linear_cross_entropy(
        hidden.flatten(0, -2),
        module.lm_head.weight,
        shift_labels.reshape(-1).to(hidden.device),
        bias=module.lm_head.bias,
        ignore_index=ignore_index,
        softcap=getattr(module.config, "final_logit_softcapping", None),
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)
