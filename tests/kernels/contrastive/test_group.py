"""Across ranks, with unequal numbers of rows, loss and gradients are those of one process that has every row."""

import pytest
import torch
import torch.distributed as dist
from contrastive_cases import Case
from numerics import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_error_within
from ranks import on_ranks
from torch.nn.functional import pad

from llm2vec_fast.kernels.contrastive import contrastive_loss
from llm2vec_fast.kernels.contrastive import ranks as meeting

QUERIES = (5, 1, 12, 3)
DOCUMENTS = (9, 1, 12, 7)
WAYS = {"ring": meeting.Ring, "at-once": meeting.Gathering}
RULES = (
    {},
    {"symmetric": True},
    {"query_negatives": True},
    {"query_negatives": True, "document_negatives": True},
    {"symmetric": True, "query_negatives": True, "false_negative_margin": -0.2},
)
CASES = [
    *((rule, targets, torch.float32, "mean") for rule in RULES for targets in ((), ("positives", "ids", "known"))),
    ({"symmetric": True}, (), torch.bfloat16, "sum"),
    ({"similarity": "dot", "false_negative_margin": 0.0}, (), torch.float32, "mean"),
    ({"query_negatives": True, "document_negatives": True}, ("ids", "guide"), torch.float32, "mean"),
    ({**RULES[-1], "backend": "triton"}, ("positives", "ids"), torch.float32, "mean"),
]


def _rows(ranks, rule, dtype):
    case = Case(sum(QUERIES[:ranks]), sum(DOCUMENTS[:ranks]), 16, rule)
    queries, documents = case.inputs(dtype)
    return queries.split(QUERIES[:ranks]), documents.split(DOCUMENTS[:ranks])


def _targets(ranks, names):
    """For each rank: positives number its own documents, ids are shared; a query of rank r has r known ones."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for rank, (queries, documents) in enumerate(zip(QUERIES[:ranks], DOCUMENTS[:ranks], strict=True)):
        positives = torch.randint(documents, (queries,), generator=generator)
        ids = torch.randint(15, (documents,), generator=generator)
        known = torch.randint(15, (queries, rank), generator=generator) if rank else None
        guide = tuple(torch.randn(count, 5, generator=generator) for count in (queries, documents))
        given = (("positives", positives), ("ids", ids), ("known", known), ("guide", guide))
        found.append({name: x for name, x in given if name in names})
    return found


def _in_one_process(ranks, rule, names, dtype, reduction, compute):
    """Losses, their mean or sum, and its gradients, ``compute`` being the dtype to compute in."""
    queries, documents = _rows(ranks, rule, dtype)
    first = [sum(DOCUMENTS[:rank]) for rank in range(ranks)]
    given = _targets(ranks, names)
    positives = [
        (x["positives"] if "positives" in names else torch.arange(QUERIES[rank])) + first[rank]
        for rank, x in enumerate(given)
    ]
    targets = {"positives": torch.cat(positives)}
    if "ids" in names:
        targets["ids"] = torch.cat([x["ids"] for x in given])
    if "guide" in names:
        targets["guide"] = tuple(torch.cat(x) for x in zip(*(x["guide"] for x in given), strict=True))
    if "known" in names:
        most = ranks - 1
        known = [torch.full((QUERIES[0], 0), 0) if x["known"] is None else x["known"] for x in given]
        targets["known"] = torch.cat([pad(x, (0, most - x.shape[1]), value=-1) for x in known])
    tensors = [torch.cat(x).to(compute).requires_grad_() for x in (queries, documents)]
    scale = torch.tensor(20.0, dtype=torch.promote_types(compute, torch.float32), requires_grad=True)
    settings = {**targets, **rule, "backend": "reference"}
    losses = contrastive_loss(*tensors, scale=scale, reduction="none", **settings)
    loss = losses.sum() if reduction == "sum" else losses.mean()
    return losses, loss, *torch.autograd.grad(loss, (*tensors, scale))


def _rank(rank, ranks):
    if ranks > 1:
        with pytest.raises(ValueError, match="they must agree"):
            contrastive_loss(torch.ones(2, 3 + rank), torch.ones(2, 3 + rank), group=dist.group.WORLD)
    return {way: _found(rank, ranks, kind) for way, kind in WAYS.items()}


def _found(rank, ranks, kind):
    found = []
    for rule, names, dtype, reduction in CASES:
        queries, documents = (x[rank].clone().requires_grad_() for x in _rows(ranks, rule, dtype))
        scale = torch.tensor(20.0, requires_grad=True)
        # Rows, the float32 sums of their gradients, and those that others send, for the most rows on any rank.
        needed = ranks * max(DOCUMENTS[:ranks]) * queries.shape[1] * (dtype.itemsize + 2 * 4)
        meeting.GATHERED_BYTES = needed if kind is meeting.Gathering else needed - 1
        assert type(meeting.ranks_of(dist.group.WORLD, queries, documents)) is kind
        settings = {**_targets(ranks, names)[rank], **rule, "group": dist.group.WORLD}
        loss = contrastive_loss(queries, documents, scale=scale, reduction=reduction, **settings)
        gradients = torch.autograd.grad(loss, (queries, documents, scale))
        losses = contrastive_loss(queries, documents, reduction="none", **settings)
        found.append([x.detach() for x in (loss, *gradients, losses)])
    return found


@pytest.fixture(scope="module", params=[2, 4], ids=lambda ranks: f"{ranks}-ranks")
def spread(request, tmp_path_factory):
    """What every rank found, either way, for every case."""
    return request.param, on_ranks(request.param, tmp_path_factory.mktemp("ranks"), _rank, request.param)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i][:2])))
def test_ranks_together_equal_one_process(spread, number, way):
    ranks, found = spread
    case = CASES[number]
    plain = _in_one_process(ranks, *case, case[2])
    exact = _in_one_process(ranks, *case, torch.float64)
    loss, dqueries, ddocuments, dscale, losses = zip(*(x[way][number] for x in found), strict=True)
    assert all(torch.equal(x, loss[0]) for x in loss)
    rows = torch.cat(losses).double()
    total = rows.sum() if case[3] == "sum" else rows.mean()
    torch.testing.assert_close(loss[0].double(), total, rtol=len(rows) * torch.finfo(torch.float32).eps, atol=0)
    assert_error_within(torch.cat(losses), plain[0], exact[0], OUTPUT_FACTOR, "losses")
    assert_error_within(torch.cat(dqueries), plain[2], exact[2], GRADIENT_FACTOR, "dqueries")
    assert_error_within(torch.cat(ddocuments), plain[3], exact[3], GRADIENT_FACTOR, "ddocuments")
    # A sum that cancels: its rounding is that of the similarities in it, whose largest sum stands beside.
    size = torch.ones((), dtype=torch.float64) * (sum(QUERIES[:ranks]) if case[3] == "sum" else 1)
    ours, by_pytorch, true = (torch.stack([x.double(), size]) for x in (sum(dscale), plain[4], exact[4]))
    assert_error_within(ours.to(case[2]), by_pytorch.to(case[2]), true, GRADIENT_FACTOR, "dscale")
