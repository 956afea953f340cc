"""Swap parts of a Hugging Face model for faster ones, on the instance, and back.

RMSNorm, rotary embedding, gated MLPs and attention run our operations, in training and in use, on every device; a
causal language model given labels returns its loss without ever writing its logits. LoRA layers train on little more
than the product of the layer they adapt. On a CPU, linear layers in use run on packed weights, with the activation and
the gate folded into the products.

A swapped module keeps its parameters, its state dict and its place; only its class changes, so that copies, pickles and
adapters go on working. What a module computes is compared with our formula first: names alone are not trusted.
"""

from __future__ import annotations

import logging
import threading

from torch import nn

from .attention import restore_attention, swap_attention
from .gated_mlp import fuse_gated_mlps
from .linear import pack_linears
from .lora import fuse_lora
from .loss import fuse_loss
from .norm import fuse_norms
from .rotary import fuse_rotary
from .swapping import ACCELERATION, Acceleration, unswap

__all__ = ["Acceleration", "accelerate", "restore"]

logger = logging.getLogger(__name__)
_LOCK = threading.RLock()  # classes change one model at a time, whichever threads ask


def accelerate(
    model: nn.Module,
    attention: bool = True,
    norm: bool = True,
    rotary: bool = True,
    swiglu: bool = True,
    loss: bool = True,
    *,
    linear: bool = True,
    lora: bool = True,
    owner: str = ACCELERATION,
) -> Acceleration:
    """Make a model's training and use faster and leaner, in place; `restore` undoes it.

    Called again it does the same anew, with the parts asked for then. No other thread may run the model meanwhile.

    Outputs and gradients stay as exact as the stock model's, before or after an adapter is put on, under activation
    checkpointing and torch.compile. What `save_pretrained` writes has the same keys.

    Args:
        model: a transformers model, bare, with a head, or inside a peft model.
        attention: run our attention, causal or both ways as the model does already. It takes 2-D attention masks and
            packed batches, and no cache: `restore` the model before it generates.
        norm, rotary, swiglu: run our RMSNorm, rotary embedding, and gated MLPs. The addition before a norm stays where
            it is, in the code of each family's decoder layer, which no swap of modules reaches.
        loss: with ``labels``, the forward pass returns the loss and no logits; ``output_logits=True`` asks for both,
            which costs what it did.
        linear: on a CPU, in evaluation mode without gradients, run linear layers on packed weights. They are copies:
            they take the memory of the layers' weights once more, unless those lie in a file that can be read again,
            and are left out where they would exceed a quarter of the machine's (or container's) memory. After writing
            to a few elements of a weight through ``.data``, which leaves no trace, call this again.
        lora: where one plain adapter of peft lies on a frozen linear layer, run both in one operation, in training and
            in use, the adapter's products in the layer's dtype as under autocast; without it they run in the adapter's
            own.
        owner: who asks. What one owner swapped no other's `restore` takes away.

    Returns:
        What was swapped, and what was left alone and why; the same is logged.
    """
    parts = {
        pack_linears: linear, fuse_gated_mlps: swiglu, fuse_norms: norm, fuse_rotary: rotary, swap_attention: attention,
        fuse_loss: loss, fuse_lora: lora,
    }  # fmt: skip
    report = Acceleration(owner=owner)
    with _LOCK:
        restore(model, owner=owner)
        for swap_part, wanted in parts.items():
            if wanted:
                swap_part(model, report)
    for part, wanted in {"swiglu": swiglu, "norm": norm, "rotary": rotary}.items():
        if wanted and part not in report.swapped:
            report.left.setdefault(part, "no module here computes it in a form that is known")
    logger.info("accelerated %s: %s", type(model).__name__, report)
    return report


def restore(model: nn.Module, *, owner: str = ACCELERATION) -> None:
    """Undo the owner's `accelerate`: its swaps go, and packed weights that no other owner uses are freed."""
    with _LOCK:
        for module in model.modules():
            restore_attention(module, owner)
            unswap(module, owner)
