"""The blocked path needs memory in proportion to the tokens, forward and backward: never a text's length squared."""

import pytest
import torch
from attention_cases import Case
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from llm2vec_fast.kernels.attention import attention

HEADS, HEAD_DIM = 2, 16
LENGTH = 4096


def peak_bytes(run) -> int:
    """The most that ``run`` had allocated at once beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.experimental_event_tree()
    allocations = []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, size in sorted(allocations):
        held += size
        peak = max(peak, held)
    return peak


def peak_of(length: int, training: bool, **settings) -> int:
    case = Case((length,), HEADS, 1, HEAD_DIM)
    layout = case.sequence_layout()
    tensors = [x.contiguous().requires_grad_(training) for x in case.inputs(torch.float32)]

    def run():
        out = attention(*tensors, layout, backend="blocked", **settings)
        if training:
            torch.autograd.grad(out, tensors, out.detach())

    run()  # what is made once, a layout's groups, is not counted
    return peak_bytes(run)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("rule", [{}, {"window": 300}, {"causal": True, "softcap": 5.0}], ids=str)
def test_twice_the_length_takes_twice_the_memory(rule, training):
    short, long = (peak_of(length, training, **rule) for length in (LENGTH, 2 * LENGTH))
    scores = 4 * HEADS * LENGTH**2
    assert short < scores / 2
    assert long <= 2.1 * short


def test_dropout_keeps_to_that_too():
    short, long = (peak_of(length, True, dropout_p=0.3, seed=1) for length in (1024, 2048))
    assert long <= 2.1 * short
