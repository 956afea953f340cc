"""GradCache gives the gradients of the whole batch, in the memory of a chunk, on one process and on several."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llm2vec_fast.kernels.contrastive import contrastive_loss
from llm2vec_fast.training import GradCache

WIDTH = 12


def _model(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 8))


def _rows(queries, documents, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, WIDTH, generator=generator) for count in (queries, documents))


def _gradients(*modules):
    return [x.grad.clone() for module in modules for x in module.parameters()]


def _assert_same(found, expected):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("chunk", [1, 5, 20, 100])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_the_whole_batch(chunk, dropout):
    cached, whole = _model(dropout), _model(dropout)
    queries, documents = _rows(20, 33)
    torch.manual_seed(5)
    loss = GradCache(cached, contrastive_loss, chunk)(queries, documents)
    torch.manual_seed(5)  # chunk after chunk, as the cache embeds: the same elements are dropped
    embeddings = [torch.cat([whole(part) for part in x.split(chunk)]) for x in (queries, documents)]
    expected = contrastive_loss(*embeddings)
    expected.backward()
    assert torch.equal(loss, expected.detach())
    assert not loss.requires_grad
    _assert_same(_gradients(cached), _gradients(whole))


def test_random_numbers_go_on_as_though_each_chunk_were_embedded_once():
    model, (queries, documents) = _model(0.5), _rows(20, 20)
    torch.manual_seed(5)
    GradCache(model, contrastive_loss, 7)(queries, documents)
    after = torch.rand(3)
    torch.manual_seed(5)
    for x in (queries, documents):
        for part in x.split(7):
            model(part)
    assert torch.equal(after, torch.rand(3))


def test_the_loss_may_have_parameters_of_its_own():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(3.0))

        def forward(self, queries, documents):
            return contrastive_loss(queries, documents, scale=self.log_scale.exp())

    cached, whole, one, other = _model(), _model(), Scaled(), Scaled()
    queries, documents = _rows(12, 12)
    GradCache(cached, one, 5)(queries, documents)
    other(whole(queries), whole(documents)).backward()
    _assert_same(_gradients(cached, one), _gradients(whole, other))


def test_accumulated_steps_add_up():
    cached, whole = _model(), _model()
    step = GradCache(cached, contrastive_loss, 4)
    for seed in (1, 2, 3):
        queries, documents = _rows(9, 13, seed)
        loss = step(queries, documents, factor=1 / 3)
        expected = contrastive_loss(whole(queries), whole(documents))
        (expected / 3).backward()
        torch.testing.assert_close(loss, expected.detach())
    _assert_same(_gradients(cached), _gradients(whole))


def test_inputs_may_be_mappings_or_lists():
    model, whole, (queries, documents) = _model(), _model(), _rows(9, 13)

    def encode(features):
        rows = torch.stack([documents[int(text)] for text in features]) if isinstance(features, list) else None
        if rows is None:
            assert features["mode"] == "mean"
            rows = features["rows"] * features["mask"][:, None]
        return model(rows)

    mapping = {"rows": queries, "mask": torch.ones(9), "mode": "mean"}
    GradCache(encode, contrastive_loss, 4, model=model)(mapping, [str(i) for i in range(13)])
    contrastive_loss(whole(queries), whole(documents)).backward()
    _assert_same(_gradients(model), _gradients(whole))


class _SavedBytes:
    """The most bytes that the graph holds at once for the backward pass."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        return _Held(self, tensor)

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)


class _Held:
    def __init__(self, count, tensor):
        self.count, self.tensor, self.bytes = count, tensor, tensor.numel() * tensor.element_size()
        count.now += self.bytes
        count.most = max(count.most, count.now)

    def __del__(self):
        self.count.now -= self.bytes


def test_a_batch_of_4096_needs_the_graph_of_64():
    model = _model(0.1)
    with _SavedBytes() as small:
        contrastive_loss(*(model(x) for x in _rows(64, 64))).backward()
    with _SavedBytes() as cached:
        GradCache(model, partial(contrastive_loss, backend="blocked"), 64)(*_rows(4096, 4096))
    embeddings = 2 * 4096 * 8 * 4
    assert cached.most <= small.most + 2 * embeddings
    with _SavedBytes() as whole:
        contrastive_loss(*(model(x) for x in _rows(4096, 4096)), backend="blocked").backward()
    assert whole.most > 5 * cached.most


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(0, WIDTH), torch.ones(2, WIDTH)), "Tensor holds parts of \\[0\\] rows"),
        (({"a": torch.ones(2), "b": torch.ones(3)}, torch.ones(2, WIDTH)), "parts of \\[2, 3\\] rows"),
        (({"mode": "mean"}, torch.ones(2, WIDTH)), "nothing with rows"),
    ],
)
def test_inputs_without_one_number_of_rows_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        GradCache(_model(), contrastive_loss, 4)(*inputs)


def test_a_wrong_chunk_size_or_encoder_is_refused():
    with pytest.raises(ValueError, match="chunk_size=0 is not positive"):
        GradCache(_model(), contrastive_loss, 0)
    with pytest.raises(ValueError, match="shape \\(8,\\) for 4 rows"):
        GradCache(lambda x: x.new_ones(8), contrastive_loss, 4)(*_rows(4, 4))


def _rank(rank):
    model = DistributedDataParallel(_model())
    exchanged = []

    def count(_, bucket):
        exchanged.append(bucket.buffer().numel())
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / 2)

    model.register_comm_hook(None, count)
    step = GradCache(model, lambda q, d: 2 * contrastive_loss(q, d, group=dist.group.WORLD), 4)
    for seed in (1, 2):
        step(*(x[rank::2] for x in _rows(18, 26, seed)), factor=0.5, synchronise=seed == 2)
    return _gradients(model), exchanged


def test_two_ranks_of_distributed_data_parallel_get_the_gradients_of_one_process(tmp_path):
    found = on_ranks(2, tmp_path, _rank)
    whole = _model()
    for seed in (1, 2):
        # Row i of a rank belongs to document i of that rank: 9 queries and 13 documents on each.
        queries, documents = _rows(18, 26, seed)
        loss = contrastive_loss(whole(queries), whole(documents), positives=torch.arange(18))
        (loss / 2).backward()
    parameters = sum(x.numel() for x in whole.parameters())
    for gradients, exchanged in found:
        _assert_same(gradients, _gradients(whole))
        assert exchanged == [parameters]  # once, after two steps of six chunks each
