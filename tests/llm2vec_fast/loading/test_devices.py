"""A device_map is obeyed or refused in a sentence."""

from __future__ import annotations

import pytest
import torch
from reference_data import FOLDER, TEXTS

from llm2vec_fast import LLM2Vec
from llm2vec_fast.errors import ModelLoadError, UserError


def load(**options) -> LLM2Vec:
    return LLM2Vec.from_pretrained(FOLDER / "llama", dtype="float32", **options)


@pytest.mark.parametrize(
    "given",
    ["cpu", torch.device("cpu"), {"": "cpu"}, "auto", "balanced", "balanced_low_0", "sequential"],
    ids=str,
)
def test_what_is_obeyed(given):
    encoder = load(device_map=given)
    assert torch.equal(encoder.encode(TEXTS).cpu(), load(device=encoder.device).encode(TEXTS).cpu())
    if given not in ("auto", "balanced", "balanced_low_0", "sequential"):
        assert encoder.device == torch.device("cpu")


@pytest.mark.parametrize("given", ["everywhere", "cpu and cuda", 3.5, ["cpu"], {"": "moon"}], ids=str)
def test_what_is_refused(given):
    with pytest.raises(UserError, match=r"is neither a device|is no device") as caught:
        load(device_map=given)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_none():
    with pytest.raises(UserError, match="'gpu' is no device: give cpu, cuda"):
        load(device="gpu")


def test_a_model_of_which_a_part_is_on_disk_is_refused(tmp_path):
    places = {"embed_tokens": "cpu", "norm": "cpu", "rotary_emb": "cpu", "layers": "disk"}
    with pytest.raises(ModelLoadError, match=r"its device_map leaves layers\.0\..* on disk"):
        load(device_map=places, offload_folder=str(tmp_path))
