"""Losses and gradients are as exact as plain PyTorch in the same dtype, whatever the shapes and the rule."""

import types

import numpy as np
import pytest
import torch
from contrastive_cases import Case, losses_and_gradients, three_ways
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_error_within
from triton.runtime import interpreter

from llm2vec_fast.kernels.contrastive import blocked, configurations, contrastive_loss, rule
from llm2vec_fast.kernels.contrastive import triton as triton_room

# The logarithm of an empty sum is −inf, of which numpy warns in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow encountered")
RULES = (
    {},
    {"similarity": "dot"},
    {"symmetric": True},
    {"query_negatives": True},
    {"false_negative_margin": -0.2},
    {"query_negatives": True, "document_negatives": True, "false_negative_margin": -0.25},
    {"symmetric": True, "query_negatives": True, "false_negative_margin": -0.3},
)
CASES = [
    *(Case(20, 37, 24, rule) for rule in RULES),
    *(Case(37, 20, 24, rule, shared=True) for rule in RULES),
    *(Case(20, 37, 24, rule, same=True) for rule in RULES),
    Case(40, 70, 24, RULES[-1], shared=True, same=True),
    *(Case(20, 37, 24, rule, known=3) for rule in RULES[::3]),
    Case(40, 70, 24, RULES[-1], shared=True, same=True, known=5),
    Case(6, 9, 8, {"symmetric": True}, known=100),
    Case(1, 1, 8),
    Case(1, 1, 8, {"symmetric": True, "query_negatives": True}),
    Case(1, 9, 5, {"symmetric": True}),
    Case(65, 65, 2),
    Case(16, 16, 100, scale=1000.0),
    Case(16, 40, 100, {"symmetric": True, "query_negatives": True}, scale=1e-3),
]
MANY_TILES = [
    Case(50, 100, 24),
    Case(50, 100, 24, {"symmetric": True}, same=True),
    Case(40, 70, 24, {"symmetric": True}, shared=True, known=2),
    Case(100, 50, 24, RULES[-1], shared=True),
    Case(36, 40, 24, {"query_negatives": True, "document_negatives": True}, shared=True, known=1),
]
GUIDED = [
    Case(20, 37, 24, guide=7),
    Case(37, 20, 24, {"symmetric": True, "query_negatives": True, "false_negative_margin": 0.1}, shared=True, guide=7),
    Case(40, 70, 24, {"query_negatives": True, "document_negatives": True}, same=True, guide=30, known=2),
]
BACKENDS = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend, dtypes in {
        "auto": (torch.float32, torch.bfloat16),  # on a CPU the plain rule's matrix at once
        "blocked": (torch.float32, torch.bfloat16),
        "triton": (torch.float32, torch.float16),  # Triton's interpreter gets bfloat16 products wrong
    }.items()
    for dtype in dtypes
]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short batches have several, panels and launches too."""
    config = configurations.Configuration(16, 32, 16, 4, 2)
    for name in ("sums", "weights", "product"):
        monkeypatch.setattr(configurations, name, lambda *_: config)
    monkeypatch.setattr(triton_room, "PANEL_ROWS", 48)
    monkeypatch.setattr(triton_room, "PANEL_COLUMNS", 64)
    monkeypatch.setattr(triton_room, "PARTIAL_BYTES", 4 * 32 * 2)
    monkeypatch.setattr(blocked, "PANEL_ROWS", 16)
    monkeypatch.setattr(blocked, "TILE_BYTES", 16 * 32 * 4)
    monkeypatch.setattr(rule, "BLOCK_BYTES", 16 * 24 * 4)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_losses_and_gradients_are_as_exact_as_pytorch(case, backend, dtype):
    for name, *results in three_ways(case, dtype, backend):
        factor = OUTPUT_FACTOR if name == "losses" else GRADIENT_FACTOR
        assert_error_within(*results, factor=factor, name=name)


@pytest.mark.parametrize("case", GUIDED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_a_guide(small_tiles, case, dtype):
    for name, *results in three_ways(case, dtype, "blocked"):
        factor = OUTPUT_FACTOR if name == "losses" else GRADIENT_FACTOR
        assert_error_within(*results, factor=factor, name=name)


@pytest.mark.parametrize("case", MANY_TILES, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, dtype) for backend in ("auto", "blocked") for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    + [("triton", torch.float32)],
)
def test_many_tiles(small_tiles, case, backend, dtype):
    for name, *results in three_ways(case, dtype, backend):
        factor = OUTPUT_FACTOR if name == "losses" else GRADIENT_FACTOR
        assert_error_within(*results, factor=factor, name=name)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.integers(8, 70),
    more=st.integers(0, 40),
    width=st.integers(8, 40),
    rule=st.fixed_dictionaries(
        {
            "similarity": st.sampled_from(["cos", "dot"]),
            "symmetric": st.booleans(),
            "query_negatives": st.booleans(),
            "document_negatives": st.booleans(),
            "false_negative_margin": st.none() | st.floats(-0.5, 0.5).map(lambda x: x + 0.000123),
        }
    ),
    shared=st.booleans(),
    same=st.booleans(),
    known=st.sampled_from([0, 2]),
)
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_generated_shapes_and_rules(backend, rows, more, width, rule, shared, same, known):
    rule = {**rule, "symmetric": rule["symmetric"] and not rule["document_negatives"]}
    case = Case(rows, rows + more, width, rule, shared, same, known=known, scale=5.0)
    for name, *results in three_ways(case, torch.float32, backend):
        factor = OUTPUT_FACTOR if name == "losses" else GRADIENT_FACTOR
        assert_error_within(*results, factor=factor, name=name)


@pytest.fixture
def symmetric_products(monkeypatch):
    """The interpreter multiplies by numpy, whose x·yᵀ differs in the last bits from its (y·xᵀ)ᵀ. On a GPU, where every
    element is summed up in one order, it does not. An entry between two queries is met from both sides."""
    in_order = types.SimpleNamespace(**vars(np))
    in_order.matmul = lambda a, b, dtype=None: np.einsum("ik,kj->ij", a, b, dtype=dtype, optimize=False)
    monkeypatch.setattr(interpreter, "np", in_order)


def test_large_dot_products_with_query_negatives(symmetric_products):
    case = Case(33, 66, 18, {"similarity": "dot", "query_negatives": True}, shared=True, scale=5.0)
    for name, *results in three_ways(case, torch.float32, "triton"):
        assert_error_within(*results, factor=OUTPUT_FACTOR if name == "losses" else GRADIENT_FACTOR, name=name)


@pytest.mark.parametrize("case", [Case(6, 9, 5, rule, shared=True, same=True, known=2) for rule in RULES], ids=str)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradcheck_in_float64(backend, case):
    queries, documents = (x.clone().requires_grad_() for x in case.inputs(torch.float64))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    arguments = {**case.settings, **case.targets(), "backend": backend, "reduction": "none"}
    assert torch.autograd.gradcheck(
        lambda q, d, s: contrastive_loss(q, d, scale=s, **arguments), (queries, documents, scale), fast_mode=True
    )


def test_the_reference_is_the_textbook_formula():
    queries, documents = Case(5, 8, 6).inputs(torch.float64)
    expected = []
    for i in range(5):
        cosines = torch.stack([torch.cosine_similarity(queries[i], d, dim=0) for d in documents])
        expected.append(-(20 * cosines[i]) + (20 * cosines).exp().sum().log())
    loss = contrastive_loss(queries, documents, backend="reference")
    torch.testing.assert_close(loss, torch.stack(expected).mean())


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
@pytest.mark.parametrize("directions", [("query_to_query",), ()], ids=["all-four", "without-queries"])
def test_all_directions_in_one_sum_as_in_sentence_transformers(backend, directions):
    losses = pytest.importorskip("sentence_transformers.losses")
    queries, documents = (x.requires_grad_() for x in Case(9, 9, 12).inputs(torch.float32))
    loss = losses.MultipleNegativesRankingLoss(
        torch.nn.Identity(), directions=("query_to_doc", "doc_to_query", "doc_to_doc", *directions)
    )
    expected = loss.compute_loss_from_embeddings([queries, documents], None)
    ours = contrastive_loss(
        queries, documents, query_negatives=bool(directions), document_negatives=True, backend=backend
    )
    torch.testing.assert_close(ours, expected)
    for x, y in zip(*(torch.autograd.grad(x, (queries, documents)) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_documents_of_one_id_are_never_negatives_of_each_other(backend):
    queries, documents = Case(4, 6, 8).inputs(torch.float32)
    documents[5], documents[3] = documents[0], documents[1]
    marked = contrastive_loss(
        queries, documents, ids=torch.tensor([7, 9, 2, 9, 4, 7]), reduction="none", backend=backend
    )
    rows = [(0, [1, 2, 3, 4]), (1, [0, 2, 4, 5]), (2, [0, 1, 3, 4, 5]), (3, [0, 2, 4, 5])]
    for i, negatives in rows:
        alone = contrastive_loss(queries[[i]], documents[[i, *negatives]], backend="reference")
        torch.testing.assert_close(marked[i], alone)


@pytest.mark.parametrize("rule", [{}, {"symmetric": True}, {"query_negatives": True}], ids=str)
@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_what_is_known_to_suit_a_query_is_none_of_its_negatives(backend, rule):
    """Written out with sets: rows 0 to 3 share documents in a chain, of which 4 and 5 are hard negatives."""
    queries, documents = Case(4, 6, 8).inputs(torch.float64)
    ids, more = [10, 20, 30, 40, 20, 50], [{20}, {30}, {40, -1}, {-1}]
    suits = [(known - {-1}) | {ids[i]} for i, known in enumerate(more)]
    cosines = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(documents).T
    between = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(queries).T
    expected = []
    for i in range(4):
        wrong = [cosines[i, j] for j in range(6) if ids[j] not in suits[i]]
        if "query_negatives" in rule:
            wrong += [between[i, j] for j in range(4) if not suits[i] & suits[j]]
        ways = [wrong]
        if "symmetric" in rule:
            ways.append([cosines[j, i] for j in range(4) if ids[i] not in suits[j]])
        ways = [torch.stack([cosines[i, i], *way]) for way in ways]
        expected.append(sum((20 * way).logsumexp(0) - 20 * way[0] for way in ways) / len(ways))
    assert all(len(way) > 1 for way in ways)  # the chain leaves negatives to every row
    known = torch.tensor([[*x, *[-1] * (2 - len(x))] for x in more])
    dtype = torch.float32 if backend == "triton" else torch.float64
    losses = contrastive_loss(
        queries.to(dtype), documents.to(dtype), ids=torch.tensor(ids), known=known, reduction="none", backend=backend,
        **rule,
    )  # fmt: skip
    torch.testing.assert_close(losses, torch.stack(expected).to(dtype))


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_a_guide_leaves_out_what_it_finds_closer_than_the_positive(backend):
    """GISTEmbed's rule with its absolute margin, written out."""
    case, margin = Case(9, 15, 12, guide=5), 0.1
    queries, documents = (torch.nn.functional.normalize(x) for x in case.inputs(torch.float64))
    by_queries, by_documents = (torch.nn.functional.normalize(x.double()) for x in case.targets()["guide"])
    limit = (by_queries * by_documents[:9]).sum(1, keepdim=True) - margin
    scores = 20 * torch.cat([queries @ documents.T, queries @ queries.T], dim=1)
    closer = torch.cat([by_queries @ by_documents.T, by_queries @ by_queries.T], dim=1) > limit
    closer[torch.arange(9), torch.arange(9)] = False
    closer[torch.arange(9), 15 + torch.arange(9)] = True  # the query itself
    assert 20 < closer.sum() < 200
    loss = contrastive_loss(
        queries, documents, query_negatives=True, guide=case.targets()["guide"], false_negative_margin=-margin,
        backend=backend,
    )  # fmt: skip
    expected = torch.nn.functional.cross_entropy(scores.masked_fill(closer, -torch.inf), torch.arange(9))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("given", [{"guide": 100}, {}, {"similarity": "dot"}], ids=str)
@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_a_positive_that_is_there_twice_does_not_exceed_itself(backend, given):
    """By a margin of 0 it is a negative as before, however its products are rounded."""
    if backend == "triton" and "guide" in given:
        pytest.skip("not on Triton")
    case, twice = Case(64, 64, 24), torch.arange(64).repeat(2)
    queries, documents = case.inputs(torch.float32)
    settings = {"reduction": "none", "backend": backend, **given}
    if "guide" in given:
        by_queries, by_documents = Case(64, 64, 24, guide=given["guide"]).targets()["guide"]
        settings["guide"] = (by_queries, by_documents[twice])
    found = contrastive_loss(queries, documents[twice], false_negative_margin=0.0, **settings)
    assert (found > 0.69).all(), "the copy alone costs log 2"


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_negatives_above_the_margin_are_left_out(backend):
    queries = torch.tensor([[1.0, 0.0]])
    angles = torch.tensor([0.5, 0.3, 0.9, 2.0])  # the second is closer than the positive
    documents = torch.stack([angles.cos(), angles.sin()], dim=1)
    margin = 0.05
    kept = contrastive_loss(queries, documents[[0, 2, 3]], backend="reference")
    torch.testing.assert_close(
        contrastive_loss(queries, documents, false_negative_margin=margin, backend=backend), kept
    )
    everything = contrastive_loss(queries, documents, false_negative_margin=0.2, backend=backend)
    torch.testing.assert_close(everything, contrastive_loss(queries, documents, backend="reference"))


@pytest.mark.parametrize("backend", ["auto", "reference", "blocked", "triton"])
def test_without_a_negative_the_loss_and_its_gradients_are_zero(backend):
    case = Case(3, 3, 8, {"symmetric": True, "query_negatives": True})
    queries, documents = case.inputs(torch.float32)
    found = losses_and_gradients(case, queries, documents, backend, ids=torch.tensor([4, 4, 4]))
    assert all(not x.any() for x in (*found[:3], found[3][0]))


@pytest.mark.parametrize("backend", ["auto", "reference", "blocked", "triton"])
def test_a_row_of_zeros_has_no_gradient_and_breaks_nothing(backend):
    case = Case(4, 6, 8, {"symmetric": backend != "auto"})  # the plain rule has a way of its own
    queries, documents = case.inputs(torch.float32)
    queries[1] = documents[2] = documents[5] = 0
    losses, dqueries, ddocuments, dscale = losses_and_gradients(case, queries, documents, backend)
    assert all(x.isfinite().all() for x in (losses, dqueries, ddocuments, dscale))
    assert not dqueries[1].any()
    assert not ddocuments[[2, 5]].any()
    assert dqueries[0].any()


@pytest.mark.parametrize("size", [1e-30, 1e30], ids=str)
@pytest.mark.parametrize("backend", ["auto", "blocked", "triton"])
def test_cosines_of_huge_and_tiny_rows(backend, size):
    case = Case(20, 33, 16)
    queries, documents = case.inputs(torch.float32)
    expected = contrastive_loss(queries, documents, backend="reference")
    torch.testing.assert_close(contrastive_loss(queries * size, documents / size, backend=backend), expected)


@pytest.mark.parametrize("backend", ["auto", "blocked", "triton"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one-way", "symmetric"])
def test_logits_of_ten_thousand(backend, symmetric):
    more = symmetric or backend != "auto"
    case = Case(40, 70, 16, {"similarity": "dot", "symmetric": symmetric, "query_negatives": more}, scale=1.0)
    queries, documents = case.inputs(torch.float32)
    queries[:, 0], documents[:, 0] = 100, torch.where(documents[:, 0] > 0, 100, -100)
    for name, *results in three_ways(case, torch.float32, backend, (queries, documents)):
        if name == "dscale":  # a sum of logits: what is left of it is their rounding
            assert results[0].isfinite().all()
            continue
        factor = OUTPUT_FACTOR if name == "losses" else GRADIENT_FACTOR
        assert_error_within(*results, factor=factor, name=name)


@pytest.mark.parametrize("backend", ["auto", "blocked", "triton"])
def test_a_nearly_perfect_batch_keeps_its_small_loss(backend):
    queries = torch.eye(12)
    scale = 30.0
    loss = contrastive_loss(queries, queries, scale=scale, backend=backend)
    expected = torch.log1p(11 * torch.tensor(-scale, dtype=torch.float64).exp()).float()
    # Either logit is a rounding of ``scale`` off, and the loss by as much of itself.
    torch.testing.assert_close(loss, expected, rtol=2 * scale * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_two_runs_give_the_same_bits(small_tiles, backend):
    case = Case(70, 40, 24, RULES[-1], shared=True, known=3)
    first, second = (losses_and_gradients(case, *case.inputs(torch.float32), backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference", "blocked", "triton"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_what_is_asked_for_has_a_gradient(backend, wanted):
    case = Case(20, 33, 16, {"query_negatives": backend != "auto"})
    queries, documents = case.inputs(torch.float32)
    every = list(losses_and_gradients(case, queries, documents, backend)[1:])
    every[2] = every[2][0]
    tensors = [queries.clone(), documents.clone(), torch.tensor(20.0)]
    for i in wanted:
        tensors[i].requires_grad_()
    losses = contrastive_loss(
        tensors[0], tensors[1], scale=tensors[2], reduction="none", backend=backend, **case.settings
    )
    found = torch.autograd.grad(losses, [tensors[i] for i in wanted], 1 + torch.arange(20) / 20)
    for i, x in zip(wanted, found, strict=True):
        torch.testing.assert_close(x, every[i])


@pytest.mark.parametrize("backend", ["auto", "blocked"])
def test_reductions(backend):
    tensors = [x.requires_grad_() for x in Case(20, 33, 16).inputs(torch.bfloat16)]
    losses = contrastive_loss(*tensors, reduction="none", backend=backend)
    assert losses.dtype == torch.float32
    for reduction, expected in (("mean", losses.mean()), ("sum", losses.sum())):
        loss = contrastive_loss(*tensors, reduction=reduction, backend=backend)
        assert torch.equal(loss, expected)
        found, of_losses = (torch.autograd.grad(x, tensors, retain_graph=True) for x in (loss, expected))
        assert all(torch.equal(x, y) for x, y in zip(found, of_losses, strict=True))


def test_a_scale_above_the_bound_keeps_a_running_maximum():
    case = Case(40, 70, 24)
    queries, documents = case.inputs(torch.float32)
    documents[:40] = -queries  # every positive lies opposite: cosines of −1 at a scale of 300
    exact = contrastive_loss(queries.double(), documents.double(), scale=300.0, backend="reference")
    plain = contrastive_loss(queries, documents, scale=300.0, backend="reference")
    for scale in (300.0, torch.tensor(300.0)):
        for backend in ("auto", "blocked", "triton"):
            loss = contrastive_loss(queries, documents, scale=scale, backend=backend)
            assert_error_within(loss, plain, exact, name=backend)
