"""Without a GPU, Triton kernels are tested through Triton's interpreter, chosen before Triton is imported.

It does not change what backend="auto" picks: dispatch leaves the interpreter to tests that ask for backend="triton".
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
