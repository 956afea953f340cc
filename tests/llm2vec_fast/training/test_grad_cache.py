"""GradCache gives the gradients of the whole batch, in the memory of a chunk, on one process and on several."""

import itertools
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llm2vec_fast.kernels.contrastive import contrastive_loss
from llm2vec_fast.kernels.layout import SequenceLayout
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


def _scaled(queries, documents):
    return contrastive_loss(queries, documents, scale=5.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_disabled_it_is_the_loss_alone(mode):
    model, (queries, documents) = _model(0.3), _rows(9, 13)
    step = GradCache(model, _scaled, 4)
    torch.manual_seed(5)
    expected = step(queries, documents)
    before = _gradients(model)
    with mode():
        for value in (step, step.loss):
            torch.manual_seed(5)
            loss = value(queries, documents)
            assert torch.equal(loss, expected)
            assert not loss.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(_gradients(model), before, strict=True))


def test_a_loss_to_be_backpropagated_later_is_one_like_any_other():
    """Scaled, added to another, beside a second one of the same model, whose chunks were embedded in between."""
    cached, whole, scale = _model(0.3), _model(0.3), nn.Parameter(torch.tensor(1.5))
    other = nn.Parameter(torch.tensor(1.5))
    step = GradCache(cached, lambda q, d: contrastive_loss(q, d, scale=scale.exp()), 5)
    torch.manual_seed(5)
    losses = [step.loss(*_rows(12, 12, seed)) for seed in (1, 2)]
    after = torch.rand(3)
    (3 * losses[0] + 0.5 * losses[1] + cached[0].weight.square().sum()).backward()
    torch.manual_seed(5)
    expected = [
        contrastive_loss(*(torch.cat([whole(part) for part in x.split(5)]) for x in _rows(12, 12, seed)),
                         scale=other.exp())
        for seed in (1, 2)
    ]  # fmt: skip
    assert torch.equal(after, torch.rand(3))
    (3 * expected[0] + 0.5 * expected[1] + whole[0].weight.square().sum()).backward()
    assert [x.item() for x in losses] == [x.item() for x in expected]
    _assert_same([*_gradients(cached), scale.grad], [*_gradients(whole), other.grad])


def test_later_is_as_now():
    now, later = _model(0.3), _model(0.3)
    queries, documents = _rows(9, 13)
    torch.manual_seed(5)
    loss = GradCache(now, _scaled, 4)(queries, documents, factor=2.0)
    torch.manual_seed(5)
    deferred = GradCache(later, _scaled, 4).loss(queries, documents)
    torch.rand(100)
    (2.0 * deferred).backward(retain_graph=True)
    assert torch.equal(deferred.detach(), loss)
    assert all(torch.equal(x, y) for x, y in zip(_gradients(later), _gradients(now), strict=True))
    (2.0 * deferred).backward()  # again, since the graph was kept
    _assert_same(_gradients(later), [2 * x for x in _gradients(now)])


def test_a_gradient_scaler_takes_it():
    """A loss of 2¹⁶ times the size, whose gradients are divided again."""
    cached, whole, (queries, documents) = _model(), _model(), _rows(9, 13)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(GradCache(cached, _scaled, 4).loss(queries, documents)).backward()
    scaler.unscale_(torch.optim.SGD(cached.parameters(), 0.1))
    _scaled(whole(queries), whole(documents)).backward()
    _assert_same(_gradients(cached), _gradients(whole))


def test_both_passes_run_under_the_autocast_of_the_first():
    """The loss is backpropagated outside of it, as PyTorch asks for. Weights cast without a graph must not be kept."""
    dtypes = []

    def encode(rows):
        out = model(rows)
        dtypes.append(out.dtype)
        return out.float()

    for value in ("now", "later"):
        model, whole, (queries, documents) = _model(0.3), _model(0.3), _rows(9, 13)
        step = GradCache(encode, _scaled, 4, model=model)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            loss = step(queries, documents) if value == "now" else step.loss(queries, documents)
        if value == "later":
            loss.backward()
        assert set(dtypes) == {torch.bfloat16}
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            rows = [torch.cat([whole(part).float() for part in x.split(4)]) for x in (queries, documents)]
            expected = _scaled(*rows)
        expected.backward()
        assert torch.equal(loss.detach(), expected.detach())
        for x, y in zip(_gradients(model), _gradients(whole), strict=True):  # a weight's are summed in bfloat16 there
            assert float((x - y).norm()) <= 4 * torch.finfo(torch.bfloat16).eps * float(y.norm())


@pytest.mark.parametrize("widths", [(2, 5, 8), (8, 3)])
def test_a_matryoshka_loss_over_the_cache(widths):
    def nested(queries, documents):
        return sum(weight * _scaled(queries[:, :width], documents[:, :width]) for weight, width in enumerate(widths, 1))

    cached, later, whole, (queries, documents) = _model(), _model(), _model(), _rows(12, 17)
    loss = GradCache(cached, nested, 5)(queries, documents)
    GradCache(later, nested, 5).loss(queries, documents).backward()
    expected = nested(whole(queries), whole(documents))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    _assert_same(_gradients(cached), _gradients(whole))
    _assert_same(_gradients(later), _gradients(whole))


def test_chunks_may_be_cut_by_a_function_of_ones_own():
    cached, whole, (queries, documents) = _model(), _model(), _rows(12, 17)
    sizes = []

    def uneven(x):
        parts = x.split([1, 3, len(x) - 4])
        sizes.append([len(part) for part in parts])
        return parts

    GradCache(cached, _scaled, uneven)(queries, documents)
    assert sizes == [[1, 3, 8], [1, 3, 13]]
    _scaled(whole(queries), whole(documents)).backward()
    _assert_same(_gradients(cached), _gradients(whole))
    with pytest.raises(ValueError, match="chunk_size made no chunk of an input of type Tensor"):
        GradCache(cached, _scaled, lambda x: [])(queries, documents)


def test_an_encoder_that_writes_into_its_features_finds_them_as_given():
    """As sentence-transformers' modules do: each adds what it computes to the mapping."""
    cached, whole, (queries, documents) = _model(), _model(), _rows(9, 13)

    def encode(features):
        assert set(features) == {"rows"}
        features["embedding"] = cached(features.pop("rows"))
        return features["embedding"]

    GradCache(encode, _scaled, 4, model=cached)({"rows": queries}, {"rows": documents})
    _scaled(whole(queries), whole(documents)).backward()
    _assert_same(_gradients(cached), _gradients(whole))


def test_embeddings_without_a_gradient_are_refused_by_number():
    model, frozen = _model(), _model().requires_grad_(False)
    step = GradCache(lambda x: (frozen if x.shape[1] > WIDTH else model)(x[:, :WIDTH]), _scaled, 4)
    queries, documents = _rows(9, 13)
    with pytest.raises(ValueError, match=r"embeddings of input 2 have no gradient: if all that encode runs .* frozen"):
        step(queries, torch.cat([documents, documents], 1))


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
    step = GradCache(model, partial(contrastive_loss, backend="blocked"), 64)
    with _SavedBytes() as cached:
        step(*_rows(4096, 4096))
    with _SavedBytes() as later:
        step.loss(*_rows(4096, 4096)).backward()
    embeddings = 2 * 4096 * 8 * 4
    assert cached.most <= small.most + 2 * embeddings
    assert later.most <= small.most + 2 * embeddings
    with _SavedBytes() as whole:
        contrastive_loss(*(model(x) for x in _rows(4096, 4096)), backend="blocked").backward()
    assert whole.most > 5 * cached.most


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(0, WIDTH), torch.ones(2, WIDTH)), "Tensor holds parts of \\[0\\] rows"),
        (({"a": torch.ones(2), "b": torch.ones(3)}, torch.ones(2, WIDTH)), "parts of \\[2, 3\\] rows"),
        (({"mode": "mean"}, torch.ones(2, WIDTH)), "nothing with rows"),
        (
            ({"input_ids": torch.ones(2, 3), "layout": SequenceLayout.from_shape(2, 3)}, torch.ones(2, WIDTH)),
            "padded batch \\(2, 3\\): pass its attention_mask",
        ),
    ],
)
def test_inputs_without_one_number_of_rows_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        GradCache(_model(), contrastive_loss, 4)(*inputs)


def test_a_wrong_chunk_size_or_encoder_is_refused():
    with pytest.raises(ValueError, match="chunk_size=0 is not positive"):
        GradCache(_model(), contrastive_loss, 0)
    with pytest.raises(ValueError, match="token_budget=-1 is not positive"):
        GradCache(_model(), contrastive_loss, token_budget=-1)
    for both in ({}, {"chunk_size": 4, "token_budget": 100}):
        with pytest.raises(ValueError, match="pass one of them"):
            GradCache(_model(), contrastive_loss, **both)
    with pytest.raises(ValueError, match="list does not tell how many tokens its texts have"):
        GradCache(_model(), contrastive_loss, token_budget=100)(["two texts", "without tokens"])
    with pytest.raises(ValueError, match="shape \\(8,\\) for 4 rows"):
        GradCache(lambda x: x.new_ones(8), contrastive_loss, 4)(*_rows(4, 4))


def _rank(rank):
    return [_two_steps(rank, kind) for kind in ("now", "later", "later, under no_sync")]


def _two_steps(rank, kind):
    model = DistributedDataParallel(_model())
    exchanged = []

    def count(_, bucket):
        exchanged.append(bucket.buffer().numel())
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / 2)

    model.register_comm_hook(None, count)
    step = GradCache(model, lambda q, d: 2 * contrastive_loss(q, d, group=dist.group.WORLD), 4)
    for seed in (1, 2):
        inputs = [x[rank::2] for x in _rows(18, 26, seed)]
        if kind == "now":
            step(*inputs, factor=0.5, synchronise=seed == 2)
        elif kind == "later":
            (step.loss(*inputs, synchronise=seed == 2) / 2).backward()
        else:
            with model.no_sync() if seed == 1 else nullcontext():
                (step.loss(*inputs) / 2).backward()
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
    for gradients, exchanged in itertools.chain(*found):
        _assert_same(gradients, _gradients(whole))
        assert exchanged == [parameters]  # once, after two steps of six chunks each
