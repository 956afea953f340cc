"""Adapters of every kind that peft makes: joined they are what peft merges, weight by weight, or they are refused."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraModel
from peft.tuners.lora import config as lora_configs
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from llm2vec_fast.errors import UserError
from llm2vec_fast.loading import locate, merged, put_on
from llm2vec_fast.loading.adapter_config import lora_config_of
from llm2vec_fast.loading.joinable import NotJoinableError, digests, merged_with_update
from llm2vec_fast.loading.lowrank import Update

PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
JOINED = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 40}},
    "regex": {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
    "layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["layers.1.self_attn.q_proj"]},
    "fan-in": {"fan_in_fan_out": True},
    "all-linear": {"target_modules": "all-linear"},
    "untrained": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}
REFUSED = {
    "lora_bias": {"lora_bias": True},
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "tokens-by-name": {"trainable_token_indices": {"embed_tokens": [5, 6]}},
    "modules_to_save": {"modules_to_save": ["embed_tokens"]},
    "saved-norm": {"modules_to_save": ["norm"]},
    "target_parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "alora": {"alora_invocation_tokens": [5]},
    "replication": {"layer_replication": [[0, 2], [1, 3]]},
}
for _name, _config in (("kasa_config", "KasaConfig"), ("velora_config", "VeloraConfig")):
    if hasattr(lora_configs, _config):  # releases of peft know ever more
        REFUSED[_name] = {_name: getattr(lora_configs, _config)()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama", attention_bias=True).save_pretrained(folder)
    return folder


@pytest.fixture
def made(base: Path, tmp_path: Path) -> Callable[[object], Path]:
    """An adapter by stock peft, every weight of it trained."""

    def made(config: object) -> Path:
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(AutoModel.from_pretrained(base), config)
            with torch.no_grad():
                for parameter in wrapped.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.2)
            wrapped.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return made


def stock(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=dtype), adapter)
    return model.merge_and_unload().state_dict()


def assert_is_all(update: Update, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """The products are what merging added to every weight of the model, but for one rounding to its dtype."""
    assert before.keys() == after.keys()
    for name, old in before.items():
        part = update.get(name.removesuffix(".weight"))
        if part is None:
            assert torch.equal(after[name], old), name
            continue
        exact, unit = old.double() + part.up.double() @ part.down.double(), torch.finfo(old.dtype).eps / 2
        slack = 2**-22 * (old.abs().double() + part.up.abs().double() @ part.down.abs().double())  # float32's sums
        assert ((after[name].double() - exact).abs() <= unit * after[name].abs().double() + slack).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", JOINED)
def test_what_is_joined_is_what_peft_merges(base: Path, made: Callable, kind: str, dtype: torch.dtype) -> None:
    adapter = made(LoraConfig(**{**PLAIN, **JOINED[kind]}))
    expected = stock(base, adapter, dtype)
    bare = AutoModel.from_pretrained(base, dtype=dtype)
    before = {name: x.clone() for name, x in bare.state_dict().items()}
    model, update = merged_with_update(bare, locate(adapter))
    assert update
    assert_is_all(update, before, expected)
    assert model.state_dict().keys() == expected.keys()
    for name, x in model.state_dict().items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("kind", REFUSED)
def test_what_products_do_not_hold_is_refused_by_name(base: Path, made: Callable, kind: str) -> None:
    adapter = made(LoraConfig(**{**PLAIN, **REFUSED[kind]}))
    said = "embed_tokens" if kind == "embedding" else next(iter(reversed(REFUSED[kind])))
    with pytest.raises(UserError, match=rf"{adapter}.*{said}.*: (merge it|save it again)"):
        merged_with_update(AutoModel.from_pretrained(base), locate(adapter))


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(**{**PLAIN, "r": 8}, init_r=4, target_r=2, total_step=10),
        IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    ],
    ids=["adalora", "ia3"],
)
def test_other_types_are_refused_by_name(base: Path, made: Callable, config: object) -> None:
    with pytest.raises(UserError, match=f"is of type {config.peft_type.value}"):
        merged_with_update(AutoModel.from_pretrained(base), locate(made(config)))


def test_a_bias_that_has_no_place_is_not_to_be_merged(base: Path, made: Callable) -> None:
    """peft cannot merge it: to be told to merge it first would not help."""
    adapter = made(LoraConfig(**{**PLAIN, "target_modules": ["o_proj", "gate_proj"]}, lora_bias=True))
    with pytest.raises(UserError, match=r"lora_bias=True.*cannot be merged into layers\.0\.self_attn\.o_proj.*again"):
        merged_with_update(tiny_model("llama"), locate(adapter))


def test_what_is_merged_is_not_merged_into_a_layer_that_shares_the_weight(tmp_path: Path) -> None:
    """As peft does, so that the embeddings move with an adapter of the output layer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=97, tie_word_embeddings=True, **shape)).save_pretrained(tmp_path / "base")
    bare = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    get_peft_model(bare, config).save_pretrained(tmp_path / "adapter")
    tied = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"adapter on lm_head cannot be merged .*model\.embed_tokens shares its weight"):
        merged(put_on(tied, locate(tmp_path / "adapter")))
    alone = merged(put_on(AutoModel.from_pretrained(tmp_path / "base"), locate(tmp_path / "adapter")))
    assert torch.equal(alone.embed_tokens.weight, tied.model.embed_tokens.weight)


@pytest.mark.parametrize("field", dataclasses.fields(LoraConfig), ids=lambda field: field.name)
def test_every_setting_of_pefts_is_known_or_refused(field: dataclasses.Field) -> None:
    """Of a release to come, too: what is not listed is refused, whatever it is."""
    config = {"r": 4, "target_modules": ["q_proj"], field.name: {"unheard": "of"}}
    told = "is of type" if field.name == "peft_type" else field.name
    found = _read(config)
    if isinstance(found, str):
        assert told in found
    else:
        assert getattr(found, field.name) != {"unheard": "of"}  # of no effect: it does not reach peft


def _read(config: dict[str, object]) -> LoraConfig | str:
    try:
        return lora_config_of(config, "a/b")
    except UserError as error:
        return str(error)


def test_a_setting_that_nobody_has_heard_of_is_refused() -> None:
    with pytest.raises(UserError, match="asks for use_xlora=True"):
        lora_config_of({"r": 4, "target_modules": ["q_proj"], "use_xlora": True}, "a/b")


def _merges_otherwise(layer: Linear, adapter_names: list[str] | None = None) -> None:
    STOCK_MERGE(layer, adapter_names=adapter_names)
    layer.base_layer.weight.data[3] *= 1.02


def _moves_a_norm(model: LoraModel, *args: object, **kwargs: object) -> nn.Module:
    model.model.norm.weight.data[0] += 0.1
    return STOCK_UNLOAD(model, *args, **kwargs)


def _changes_the_base(layer: Linear, *args: object, **kwargs: object) -> None:
    STOCK_UPDATE(layer, *args, **kwargs)
    layer.base_layer.weight.data[0, 0] += 0.1


STOCK_MERGE, STOCK_UPDATE, STOCK_UNLOAD = Linear.merge, Linear.update_layer, LoraModel.merge_and_unload


@pytest.mark.parametrize(
    ("place", "method", "faulty", "message"),
    [
        (Linear, "merge", _merges_otherwise, "merging it does not add the product"),
        (LoraModel, "merge_and_unload", _moves_a_norm, r"it changes norm\.weight"),
        (Linear, "update_layer", _changes_the_base, r"putting it on changes layers\.0\.self_attn\.q_proj\.weight"),
    ],
    ids=["merges-otherwise", "changes-another-weight", "changes-the-base"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kind_to_come_is_found_by_what_it_does(
    base: Path, made: Callable, monkeypatch: pytest.MonkeyPatch, place: type, method: str, faulty: object, message: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    adapter, bare = made(LoraConfig(**PLAIN)), AutoModel.from_pretrained(base, dtype=dtype)
    monkeypatch.setattr(place, method, faulty)
    with pytest.raises(NotJoinableError, match=message):
        merged_with_update(bare, locate(adapter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool], ids=str)
def test_a_digest_tells_tensors_apart(dtype: torch.dtype) -> None:
    def digest(x: Tensor) -> object:
        model = nn.Module()
        model.register_buffer("x", x)
        return digests(model)["x"]

    whole = torch.randint(0, 2, (3, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    found = [digest(whole), digest(whole.T), digest(whole.flip(1)), digest(whole.reshape(-1)), digest(whole[0, 0])]
    for i in range(whole.numel()):
        changed = whole.clone()
        changed.view(-1)[i] = 1 - changed.view(-1)[i].int()
        found.append(digest(changed))
    assert digest(whole.clone()) == found[0]
    assert len(set(found)) == len(found)
    assert len({digest(torch.zeros(n, dtype=dtype)) for n in (0, 1, 2, 70_000)}) == 4
