"""Any decoder attends both ways, in every layout, as stock transformers does one text at a time."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, SHAPE, tiny_model
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, BloomConfig, MambaConfig, T5Config

from llm2vec_fast.acceleration import accelerate
from llm2vec_fast.bidirectional import UnsupportedModelError, make_bidirectional
from llm2vec_fast.kernels.layout import SequenceLayout

PUBLISHED_TOLERANCE = 1e-4
LENGTHS = (13, 1, 7, 24)


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, SHAPE["vocab_size"], (n,), generator=generator) for n in lengths]


def stock(family: str, is_causal: bool) -> list[Tensor]:
    """The definition: stock transformers, eager attention, one text at a time."""
    model = tiny_model(family)
    model.config.is_causal = is_causal
    with torch.no_grad():
        return [model(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in texts()]


def packed(model: torch.nn.Module, batch: list[Tensor]) -> list[Tensor]:
    layout = SequenceLayout.from_lengths([len(ids) for ids in batch])
    hidden = model(input_ids=torch.cat(batch)[None], layout=layout).last_hidden_state[0]
    return list(hidden.split([len(ids) for ids in batch]))


def packed_by_position_ids(model: torch.nn.Module, batch: list[Tensor]) -> list[Tensor]:
    positions = torch.cat([torch.arange(len(ids)) for ids in batch])
    hidden = model(input_ids=torch.cat(batch)[None], position_ids=positions[None]).last_hidden_state[0]
    return list(hidden.split([len(ids) for ids in batch]))


def padded(model: torch.nn.Module, batch: list[Tensor], side: str) -> list[Tensor]:
    width = max(len(ids) for ids in batch) + 2
    input_ids, mask = torch.zeros(2, len(batch), width, dtype=torch.long)
    for row, ids in enumerate(batch):
        where = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        input_ids[row, where], mask[row, where] = ids, 1
    hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
    return [hidden[row][mask[row].bool()] for row in range(len(batch))]


LAYOUTS = {
    "packed": packed,
    "packed-by-position-ids": packed_by_position_ids,
    "right-padded": lambda model, batch: padded(model, batch, "right"),
    "left-padded": lambda model, batch: padded(model, batch, "left"),
    "alone": lambda model, batch: [model(input_ids=ids[None]).last_hidden_state[0] for ids in batch],
}


@pytest.mark.parametrize("enabled", [True, False], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_stock_eager_one_text_at_a_time(family: str, layout: str, enabled: bool) -> None:
    model = make_bidirectional(tiny_model(family), enabled=enabled)
    with torch.no_grad():
        ours = LAYOUTS[layout](model, texts())
    for mine, theirs in zip(ours, stock(family, is_causal=not enabled), strict=True):
        assert (mine - theirs).abs().max() <= PUBLISHED_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_token_moves_the_first_only_when_bidirectional(family: str) -> None:
    ids = texts((4,))[0]
    changed = torch.cat([ids[:-1], (ids[-1:] + 1) % SHAPE["vocab_size"]])
    for enabled in (True, False):
        model = make_bidirectional(tiny_model(family), enabled=enabled)
        with torch.no_grad():
            first, other = (packed(model, [x])[0][0] for x in (ids, changed))
        assert torch.equal(first, other) is not enabled


def test_a_packed_text_does_not_see_its_neighbours() -> None:
    model, batch = make_bidirectional(tiny_model("llama")), texts()
    others = [batch[0], *texts((5, 9, 2))]
    with torch.no_grad():
        ours, alone = packed(model, others)[0], packed(model, batch[:1])[0]
    assert (ours - alone).abs().max() <= PUBLISHED_TOLERANCE


def test_a_saved_model_stays_bidirectional_in_stock_transformers(tmp_path) -> None:
    model = make_bidirectional(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    ids = texts((9,))
    with torch.no_grad():
        theirs = again(input_ids=ids[0][None], use_cache=False).last_hidden_state[0]
        assert (packed(model, ids)[0] - theirs).abs().max() <= PUBLISHED_TOLERANCE


def test_heads_and_peft_wrappers_are_seen_through() -> None:
    config = tiny_model("llama").config
    causal_lm = AutoModelForCausalLM.from_config(config)
    wrapped = get_peft_model(causal_lm, LoraConfig(target_modules=["q_proj"]))
    make_bidirectional(wrapped)
    ids = texts((6, 5))
    layout = SequenceLayout.from_lengths([6, 5])
    with torch.no_grad():
        logits = wrapped(input_ids=torch.cat(ids)[None], layout=layout).logits[0]
        alone = wrapped(input_ids=ids[0][None]).logits[0]
    assert (logits[:6] - alone).abs().max() <= PUBLISHED_TOLERANCE


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_clones_work_like_the_original(clone) -> None:
    model, batch = make_bidirectional(tiny_model("llama")), texts()
    with torch.no_grad():
        for mine, theirs in zip(packed(clone(model), batch), packed(model, batch), strict=True):
            assert torch.equal(mine, theirs)


IN_A_FRESH_PROCESS = """
import sys
import llm2vec_fast
assert "torch" not in sys.modules
import torch
model, input_ids, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(model(input_ids=input_ids).last_hidden_state, expected)
"""


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
def test_a_pickled_model_works_in_a_process_that_imported_the_package_alone(tmp_path, accelerated: bool) -> None:
    model, input_ids = make_bidirectional(tiny_model("llama")), texts((9,))[0][None]
    if accelerated:
        accelerate(model)
    with torch.no_grad():
        torch.save((model, input_ids, model(input_ids=input_ids).last_hidden_state), tmp_path / "model.pt")
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path / "model.pt")], check=True)


@pytest.mark.parametrize("use_cache", [None, False], ids=str)
def test_a_causal_head_allocates_no_cache_unless_asked_to(use_cache: bool | None) -> None:
    model = make_bidirectional(AutoModelForCausalLM.from_config(tiny_model("llama").config))
    assert model.config.use_cache
    assert model(input_ids=texts((5,))[0][None], use_cache=use_cache).past_key_values is None


def test_attention_dropout_acts_in_training_only() -> None:
    model = make_bidirectional(tiny_model("llama", attention_dropout=0.5))

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return torch.cat(packed(model, texts()))

    assert torch.equal(run(0), run(1))
    model.train()
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_bidirectional(tiny_model("llama")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.cat(packed(model, texts())).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4), "BloomModel"),
        (MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1), "MambaModel"),
        (T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4), "T5"),
    ],
    ids=["alibi", "state-space", "encoder-decoder"],
)
def test_a_model_that_would_stay_causal_is_refused_by_name(config, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        make_bidirectional(AutoModel.from_config(config))


@pytest.mark.parametrize(
    ("model_type", "layers", "named"),
    [
        ("gpt_oss", ["full_attention"] * 3, "GptOssAttention"),
        ("lfm2", ["conv", "full_attention", "conv"], "conv"),
        ("qwen3_next", ["linear_attention", "full_attention", "linear_attention"], "Qwen3NextModel"),
    ],
    ids=["sinks", "convolutions", "linear-attention"],
)
def test_layers_other_than_plain_attention_are_refused_by_name(model_type: str, layers: list[str], named: str) -> None:
    experts = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
    config = CONFIG_MAPPING[model_type](**SHAPE, **experts, layer_types=layers)
    with pytest.raises(UnsupportedModelError, match=named):
        make_bidirectional(AutoModel.from_config(config))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "padding between real tokens"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "2-D mask"),
        ({"layout": SequenceLayout.from_lengths([2])}, "2 rows"),
        ({"layout": SequenceLayout.from_lengths([3]), "attention_mask": torch.ones(1, 3)}, "both layout and"),
    ],
    ids=["hole", "4-D", "short-layout", "two-descriptions"],
)
def test_a_batch_that_cannot_be_described_is_refused(arguments: dict, says: str) -> None:
    model = make_bidirectional(tiny_model("llama"))
    with pytest.raises(ValueError, match=says):
        model(input_ids=torch.tensor([[5, 6, 7]]), **arguments)


def test_a_forward_pass_that_goes_round_the_hook_is_told_what_to_call() -> None:
    model = make_bidirectional(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"call model\(...\) and not model.forward\(...\)"):
        model.forward(input_ids=torch.tensor([[5, 6, 7]]))
