"""A batch cut by texts or by tokens, in every form it may have, through GradCache."""

import pytest
import torch
from torch import nn

from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.training import GradCache

LENGTHS = [3, 1, 7, 2, 9, 4, 4, 12, 1, 1]


def _texts():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(50, (length,), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("kind", ["packed", "padded", "ragged", "lists"])
def test_chunks_by_tokens_hold_that_many_and_give_the_gradients_of_the_whole(kind):
    texts, sizes = _texts(), []
    table = nn.Embedding(50, 8)

    def means(texts):
        return torch.stack([table(text).mean(0) for text in texts])

    def encode(chunk):
        if kind == "packed":
            sizes.append(chunk["input_ids"].shape[1])
            assert chunk["name"] == "packed"
            layout = chunk["layout"]
            assert torch.equal(chunk["position_ids"][0], layout.position_ids)
            assert chunk["skip"].tolist() == [n % 2 for n in layout.lengths.tolist()]
            return means(chunk["input_ids"][0].split(layout.lengths.tolist()))
        if kind == "padded":
            sizes.append(chunk["input_ids"].numel())
            return means([ids[mask] for ids, mask in zip(chunk["input_ids"], chunk["attention_mask"], strict=True)])
        ids = chunk["input_ids"] if kind == "lists" else chunk
        sizes.append(sum(map(len, ids)))
        return means([torch.as_tensor(text) for text in ids])

    layout = SequenceLayout.from_lengths(LENGTHS)
    padded = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-1)
    x = {
        "packed": {
            "input_ids": torch.cat(texts)[None], "position_ids": layout.position_ids[None], "layout": layout,
            "skip": torch.tensor(LENGTHS) % 2, "name": "packed",
        },
        "padded": {"input_ids": padded.clamp(min=0), "attention_mask": padded >= 0},
        "ragged": texts,
        "lists": {"input_ids": [text.tolist() for text in texts]},
    }[kind]  # fmt: skip
    GradCache(encode, lambda rows: rows.square().sum(), token_budget=11, model=table)(x)
    found, table.weight.grad = table.weight.grad, None
    means(texts).square().sum().backward()
    torch.testing.assert_close(found, table.weight.grad)
    expected = [12] * len(LENGTHS) if kind == "padded" else [11, 11, 8, 12, 2]
    assert sizes == expected * 2


def test_packed_batches_are_cut_by_texts_too():
    texts, held = _texts(), []
    table = nn.Embedding(50, 8)

    def encode(chunk):
        held.append(chunk["layout"].lengths.tolist())
        return torch.stack([table(x).mean(0) for x in chunk["input_ids"][0].split(held[-1])])

    packed = {"input_ids": torch.cat(texts)[None], "layout": SequenceLayout.from_lengths(LENGTHS)}
    GradCache(encode, lambda rows: rows.square().sum(), 4, model=table)(packed)
    assert held[:3] == [LENGTHS[:4], LENGTHS[4:8], LENGTHS[8:]]
    found, table.weight.grad = table.weight.grad, None
    torch.stack([table(text).mean(0) for text in texts]).square().sum().backward()
    torch.testing.assert_close(found, table.weight.grad)
