"""A vocabulary split over two processes gives the loss and gradients of one."""

import pytest
import torch
from cross_entropy_ranks import CASE, RULES, SPLITS, run
from numerics import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_error_within
from ranks import on_ranks

from llm2vec_fast.kernels.cross_entropy import linear_cross_entropy
from llm2vec_fast.kernels.dispatch import BackendUnavailableError


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(len(SPLITS), tmp_path_factory.mktemp("ranks"), run)


def whole(dtype, rule):
    """The same on one process, by the definition."""
    tensors = [x.requires_grad_() for x in CASE.tensors(dtype)]
    hidden, weight, bias = tensors
    out = linear_cross_entropy(
        hidden, weight, CASE.labels(), bias=bias, return_accuracy=True, return_log_probs=True, return_lse=True,
        backend="reference", **rule,
    )  # fmt: skip
    grads = torch.autograd.grad(out.loss.sum() + 0.1 * out.lse.square().sum(), tensors)
    named = dict(zip(("dhidden", "dweight", "dbias"), grads, strict=True))
    found = {"loss": out.loss, "accuracy": out.accuracy, "log_probs": out.log_probs, "lse": out.lse}
    return {name: x.detach() for name, x in found.items()} | named


@pytest.mark.parametrize(
    "number", range(len(RULES)), ids=[f"{number}-{'-'.join(rule)}" for number, rule in enumerate(RULES)]
)
@pytest.mark.parametrize(
    ("run", "dtype"), [("blocked", torch.float32), ("triton", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_two_processes_equal_one(ranks, run, dtype, number):
    plain, exact = whole(dtype, RULES[number]), whole(torch.float64, RULES[number])
    first, second = (found[f"{run}-{number}"] for found in ranks)
    for name in ("loss", "accuracy", "log_probs", "lse", "dhidden"):
        assert torch.equal(first[name], second[name]), f"the processes disagree on {name}"
    joined = {name: torch.cat([first[name], second[name]]) for name in ("dweight", "dbias")}
    for name in ("loss", "log_probs", "lse", "dhidden", "dweight", "dbias"):
        factor = GRADIENT_FACTOR if name.startswith("d") else OUTPUT_FACTOR
        assert_error_within(joined.get(name, first[name]), plain[name], exact[name], factor=factor, name=name)
    assert torch.equal(first["accuracy"], plain["accuracy"])


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_a_batch_without_labels_gives_zeros(ranks, backend):
    for found in ranks:
        assert not any(x.any() for x in found[f"{backend}-without-labels"].values())


def test_a_label_beyond_every_slice_is_named(ranks):
    for found in ranks:
        assert found["refused"].startswith("labels[3] is 333: labels are 0 … 332")


def test_class_weights_of_one_slice_alone_are_refused(ranks):
    for found in ranks:
        assert "class_weights has shape (130,)" in found["refused class weights"]


def test_the_definition_has_no_parallel_form():
    hidden, weight, _ = CASE.tensors(torch.float32)
    with pytest.raises(BackendUnavailableError, match="no 'reference' implementation for this call"):
        linear_cross_entropy(hidden, weight, CASE.labels(), group=object(), backend="reference")
