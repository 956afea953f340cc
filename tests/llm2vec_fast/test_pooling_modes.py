"""Every pooling mode is known wherever one is named, and an encoder pools as sentence-transformers does."""

from __future__ import annotations

from typing import Annotated, get_args, get_origin

import pytest
import torch
from reference_data import FOLDER
from torch import Tensor

from llm2vec_fast.bulk import manifest
from llm2vec_fast.cli import embed_options
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.kernels.pooling import POOLING_MODES

TEXTS = ["a first text", "another one, which has a few words more", "x"]


def choices(kind: object) -> set[str]:
    """The words of a Literal, inside whatever stands around it."""
    if get_origin(kind) is Annotated:
        return choices(get_args(kind)[0])
    return {word for part in get_args(kind) for word in ([part] if isinstance(part, str) else choices(part))}


def test_modes_are_the_same_everywhere() -> None:
    assert choices(manifest.Pooling) == set(POOLING_MODES)
    offered = choices(embed_options.Pooling)
    assert offered <= set(POOLING_MODES)
    assert {POOLING_MODES[mode] for mode in offered} == set(POOLING_MODES.values())
    assert all(f'"{mode}"' in LLM2Vec.__doc__ for mode in offered)


def largest(states: Tensor, mask: Tensor) -> Tensor:
    """sentence-transformers' "max"."""
    return states.masked_fill(mask[:, :, None] == 0, -1e9).amax(1)


def over_root(states: Tensor, mask: Tensor) -> Tensor:
    """sentence-transformers' "mean_sqrt_len_tokens"."""
    return (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize(("mode", "definition"), [("max", largest), ("mean_sqrt_len_tokens", over_root)])
def test_an_encoder_pools_as_sentence_transformers_does(mode, definition, tmp_path) -> None:
    encoder = LLM2Vec.from_pretrained(FOLDER / "llama", dtype="float32", device="cpu", pooling_mode=mode)
    batch = encoder.tokenize(TEXTS)
    with torch.no_grad():
        hidden = encoder.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    expected = definition(hidden, batch["attention_mask"])
    torch.testing.assert_close(torch.as_tensor(encoder.encode(TEXTS)), expected, rtol=1e-4, atol=1e-4)
    encoder.save(tmp_path / "saved")
    assert LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu").pooling_mode == mode
