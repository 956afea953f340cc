"""Fused operations for bidirectional encoders. They know tensors, and nothing of models or files."""

if __name__ == "kernels":
    # The checkout's root is on sys.path, and transformers looks for an unrelated package of this name: it finds an old
    # one with nothing in it. Without this, every operation would be registered a second time under the bare name.
    __version__ = "0"
else:
    from .attention import attention
    from .contrastive import contrastive_loss
    from .cross_entropy import linear_cross_entropy
    from .layout import SequenceLayout
    from .linear import linear
    from .lora import lora_linear
    from .pooling import pool
    from .rms_norm import rms_norm
    from .rotary import rotary
    from .swiglu import swiglu

    __all__ = [
        "SequenceLayout",
        "attention",
        "contrastive_loss",
        "linear",
        "linear_cross_entropy",
        "lora_linear",
        "pool",
        "rms_norm",
        "rotary",
        "swiglu",
    ]
