"""Whatever way an encoder was made: what is saved loads to the same embeddings, or saving refuses in a sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from reference_data import FOLDER, PUBLISHED_BOUND, TEXTS
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from llm2vec_fast import LLM2Vec, make_bidirectional
from llm2vec_fast.saving import SaveError

BASE = FOLDER / "llama"
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.0.mlp.down_proj": 40}},
    "full-names": {"target_modules": ["layers.0.self_attn.q_proj", "layers.2.mlp.up_proj"]},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 40, 41, 42, 43, 44]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def scrambled(model: PeftModel, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "magnitude" not in name:
                weight.add_(torch.randn_like(weight) * (0.5 if "embed" in name or "token" in name else 0.1))
    return model.eval()


def stock(head: bool = False) -> torch.nn.Module:
    return (AutoModelForCausalLM if head else AutoModel).from_pretrained(BASE)


def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def config(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings})


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Callable[..., Path]:
    """Folders with adapters of stock peft, one for each kind and seed."""
    root = tmp_path_factory.mktemp("adapters")

    def made(kind: str = "plain", seed: int = 1, head: bool = False) -> Path:
        folder = root / f"{kind}-{seed}-{head}"
        if not folder.exists():
            scrambled(get_peft_model(stock(head), config(**KINDS[kind])), seed).save_pretrained(folder)
        return folder

    return made


def load(*sources, **options) -> LLM2Vec:
    return LLM2Vec.from_pretrained(*sources, **{"dtype": "float32", "device": "cpu", **options})


def assert_comes_back(encoder: LLM2Vec, folder: Path, merge: bool = False, **options) -> None:
    before = encoder.encode(TEXTS)
    encoder.save(folder, merge_before_save=merge)
    again = load(folder, **options)
    if not merge:
        assert torch.equal(encoder.encode(TEXTS), before)  # saving changed nothing
    elif encoder.dtype == torch.float32:
        assert_same(encoder.encode(TEXTS), before)
    assert_same(again.encode(TEXTS), encoder.encode(TEXTS))
    assert again.tokenizer.get_vocab() == encoder.tokenizer.get_vocab()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float((ours - theirs).abs().max()) <= PUBLISHED_BOUND * float(theirs.abs().max().clamp(min=1))


@pytest.mark.parametrize("way", ["apart", "merged", "merged-before-saving", "as-base"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter(tmp_path, adapters, kind, way):
    sources = [adapters(kind)] if way == "as-base" else [BASE, adapters(kind)]
    encoder = load(*sources, merge_peft=way == "merged")
    assert float((encoder.encode(TEXTS) - load(BASE).encode(TEXTS)).abs().max()) > 0.01
    assert_comes_back(encoder, tmp_path / "out", merge=way == "merged-before-saving")
    assert (tmp_path / "out" / "adapter_config.json").exists() == (way == "apart")


@pytest.mark.parametrize("second", ["plain", "rslora", "patterns", "full-names"])
@pytest.mark.parametrize("first", ["plain", "patterns"])
def test_an_adapter_on_a_merged_one_is_saved_with_it(tmp_path, adapters, first, second):
    encoder = load(adapters(first, 1), adapters(second, 2))
    assert_comes_back(encoder, tmp_path / "out")
    once_more = load(BASE, tmp_path / "out")  # it needs nothing but the model that both were made for
    assert_same(once_more.encode(TEXTS), encoder.encode(TEXTS))
    assert_comes_back(once_more, tmp_path / "again")


def test_three_on_top_of_each_other(tmp_path, adapters):
    load(adapters("plain", 1), adapters("rslora", 2)).save(tmp_path / "two")
    encoder = load(tmp_path / "two", adapters("patterns", 3))
    assert_comes_back(encoder, tmp_path / "three")


@pytest.mark.parametrize(("first", "second"), [("dora", "plain"), ("plain", "dora"), ("plain", "modules_to_save")])
def test_what_no_single_adapter_can_say_is_refused_and_can_be_merged(tmp_path, adapters, first, second):
    encoder = load(adapters(first, 1), adapters(second, 2))
    with pytest.raises(SaveError, match=r"is not plain LoRA and cannot be joined with another, .*merge_before_save"):
        encoder.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert_comes_back(encoder, tmp_path / "out", merge=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_each_dtype(tmp_path, adapters, dtype):
    assert_comes_back(load(BASE, dtype=dtype), tmp_path / "whole", dtype=dtype)
    assert_comes_back(load(BASE, adapters(), dtype=dtype), tmp_path / "merged", merge=True, dtype=dtype)
    encoder = load(BASE, adapters(), dtype=dtype)
    encoder.save(tmp_path / "apart")
    assert torch.equal(load(BASE, tmp_path / "apart", dtype=dtype).encode(TEXTS), encoder.encode(TEXTS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("below", [[], ["plain"]], ids=["one", "two"])
def test_what_16_bit_weights_round_off_is_no_more_after_saving(tmp_path, adapters, dtype, below):
    """Merging rounds: an adapter apart, the same one merged and a sum of two cannot have the same bits in 16 bit."""
    sources = [*(adapters(kind, 2) for kind in below or []), *([] if below else [BASE]), adapters("plain", 1)]
    exact, encoder = load(*sources).encode(TEXTS), load(*sources, dtype=dtype)
    encoder.save(tmp_path / "out")
    error = (encoder.encode(TEXTS) - exact).norm(dim=1)
    for again in (load(tmp_path / "out", dtype=dtype), load(BASE, tmp_path / "out", dtype=dtype)):
        assert bool(((again.encode(TEXTS) - exact).norm(dim=1) <= 2 * error).all())


def test_a_model_that_was_cast_after_loading_is_still_its_base(tmp_path, adapters):
    encoder = load(BASE, adapters(), dtype="bfloat16").float()
    encoder.save(tmp_path / "out")
    again = load(BASE, tmp_path / "out", dtype="bfloat16").float()
    assert torch.equal(again.encode(TEXTS), encoder.encode(TEXTS))


def test_a_causal_encoder_stays_causal(tmp_path, adapters):
    for name, encoder in {
        "loaded": load(BASE, enable_bidirectional=False),
        "adapter": load(BASE, adapters(), enable_bidirectional=False),
        "own": LLM2Vec(stock(), tokenizer()),
    }.items():
        assert_comes_back(encoder, tmp_path / name)


def test_gguf(tmp_path, adapters):
    pytest.importorskip("gguf")
    from tiny_gguf import write_gguf

    write_gguf(BASE, tmp_path / "tiny.gguf")
    encoder = load(tmp_path / "tiny.gguf", adapters())
    before = encoder.encode(TEXTS)
    encoder.save(tmp_path / "apart")
    assert_same(load(tmp_path / "apart").encode(TEXTS), before)
    encoder.save(tmp_path / "whole", merge_before_save=True)
    (tmp_path / "tiny.gguf").unlink()
    assert_same(load(tmp_path / "whole").encode(TEXTS), before)


@pytest.mark.parametrize("head", [False, True], ids=["decoder", "head"])
def test_a_model_of_the_users_own(tmp_path, head):
    assert_comes_back(LLM2Vec(make_bidirectional(stock(head)), tokenizer(), "weighted_mean"), tmp_path / "whole")
    peft = scrambled(get_peft_model(make_bidirectional(stock(head)), config()), 1)
    assert_comes_back(LLM2Vec(peft, tokenizer()), tmp_path / "adapter")
    assert_comes_back(LLM2Vec(peft, tokenizer()), tmp_path / "merged", merge=True)


def of_two_adapters(active: list[str]) -> LLM2Vec:
    peft = get_peft_model(make_bidirectional(stock()), config(), adapter_name="one")
    peft.add_adapter("two", config(r=2, target_modules=["v_proj", "q_proj"]))
    peft.base_model.set_adapter(["one", "two"])
    for name, weight in peft.named_parameters():
        weight.requires_grad_("lora_" in name)
    scrambled(peft, 1)
    peft.base_model.set_adapter(active)
    return LLM2Vec(peft, tokenizer())


@pytest.mark.parametrize("active", [["one"], ["two"], ["one", "two"]], ids="-".join)
@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merged"])
def test_of_several_adapters_those_that_are_active_come_back(tmp_path, active, merge):
    assert_comes_back(of_two_adapters(active), tmp_path / "out", merge=merge)


def test_a_scale_set_by_hand_comes_back(tmp_path, adapters):
    encoder = load(BASE, adapters())
    for module in encoder.model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.3)
    assert_comes_back(encoder, tmp_path / "out")


def test_an_adapter_without_a_peft_model_around_it_comes_back(tmp_path):
    """As transformers' own add_adapter puts it on."""
    model = inject_adapter_in_model(config(), make_bidirectional(stock()))
    model._hf_peft_config_loaded = True
    encoder = LLM2Vec(scrambled(model, 1), tokenizer())
    assert_comes_back(encoder, tmp_path / "apart")
    assert_comes_back(encoder, tmp_path / "merged", merge=True)


def edit_a_row(encoder: LLM2Vec) -> None:
    encoder.model.get_base_model().get_input_embeddings().weight.data[200, 3] += 0.5


def resize(encoder: LLM2Vec) -> None:
    encoder.tokenizer.add_tokens(["<new>"])
    encoder.resize_token_embeddings(385)


@pytest.mark.parametrize("change", [edit_a_row, resize], ids=["edited", "resized"])
def test_weights_that_are_not_the_bases_any_more_are_not_said_to_be(tmp_path, adapters, change):
    encoder = load(BASE, adapters())
    change(encoder)
    with pytest.raises(SaveError, match=r"not those of .*llama \(embed_tokens\.weight differs\)") as caught:
        encoder.save(tmp_path / "out")
    assert "merge_before_save=True" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert_comes_back(encoder, tmp_path / "out", merge=True)


def test_resized_and_edited_models_without_an_adapter_come_back(tmp_path):
    encoder = load(BASE)
    resize(encoder)
    assert_comes_back(encoder, tmp_path / "out")
    assert_comes_back(load(tmp_path / "out"), tmp_path / "out")  # over itself


def test_a_base_that_is_gone_or_another_now_is_not_named(tmp_path, adapters):
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    encoder = load(base, adapters())
    (base / "model.safetensors").unlink()
    with pytest.raises(SaveError, match="merge_before_save=True"):
        encoder.save(tmp_path / "out")
    shutil.copyfile(FOLDER / "mistral" / "model.safetensors", base / "model.safetensors")
    with pytest.raises(SaveError, match="not those of"):
        encoder.save(tmp_path / "out")


def test_a_model_that_came_from_nowhere_names_no_base(tmp_path):
    model = AutoModel.from_config(stock().config)
    model.config._name_or_path = model.name_or_path = ""
    encoder = LLM2Vec(scrambled(get_peft_model(make_bidirectional(model), config()), 1), tokenizer())
    with pytest.raises(SaveError, match="not loaded from anywhere that could be named"):
        encoder.save(tmp_path / "out")
    assert_comes_back(encoder, tmp_path / "out", merge=True)


def test_an_adapter_that_is_switched_off_is_not_saved_as_if_on(tmp_path, adapters):
    encoder = load(BASE, adapters())
    encoder.model.base_model.disable_adapter_layers()
    for merge in (False, True):
        with pytest.raises(SaveError, match="is switched off"):
            encoder.save(tmp_path / "out", merge_before_save=merge)


def test_an_adapter_that_is_merged_in_place_is_not_saved_beside_a_base_without_it(tmp_path, adapters):
    encoder = load(BASE, adapters())
    encoder.model.merge_adapter()
    with pytest.raises(SaveError, match="merged but still in place"):
        encoder.save(tmp_path / "out")
    assert_comes_back(encoder, tmp_path / "out", merge=True)


def test_plain_peft_reads_a_saved_adapter(tmp_path, adapters):
    encoder = load(adapters("plain", 1), adapters("rslora", 2))
    encoder.save(tmp_path / "out")
    features = encoder.tokenize(TEXTS[:1])
    peft = PeftModel.from_pretrained(make_bidirectional(stock()), tmp_path / "out").eval()
    with torch.no_grad():
        theirs = peft(input_ids=features["input_ids"]).last_hidden_state
        ours = encoder.model(input_ids=features["input_ids"]).last_hidden_state
    assert_same(ours, theirs)


def test_the_template_of_a_checkpoint_comes_back_with_an_adapter(tmp_path, adapters):
    encoder = load(BASE, adapters())
    encoder.checkpoint = "meta-llama/Llama-2-7b-chat-hf"
    assert_comes_back(encoder, tmp_path / "out")
    assert load(tmp_path / "out").checkpoint == encoder.checkpoint


STAGES = st.lists(
    st.tuples(st.sampled_from(list(KINDS)), st.integers(1, 3), st.booleans()), max_size=3
)  # kind, seed, made under a head


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(stages=STAGES, merge=st.booleans(), finally_merge=st.booleans(), mode=st.sampled_from(["mean", "last_token"]))
def test_any_stages_come_back_or_are_refused(adapters, tmp_path_factory, stages, merge, finally_merge, mode):
    """Adapters of any kinds on top of each other, each saved with what was below it, in an order nobody planned."""
    root, base = tmp_path_factory.mktemp("stages"), BASE
    for number, stage in enumerate(stages):
        encoder = load(base, adapters(*stage), merge_peft=merge, pooling_mode=mode)
        expected, base = encoder.encode(TEXTS), root / str(number)
        try:
            encoder.save(base)
        except SaveError:
            encoder.save(base, merge_before_save=True)
        assert_same(load(base).encode(TEXTS), expected)
        assert load(base).pooling_mode == mode
    encoder = load(base, pooling_mode=mode)
    assert_comes_back(encoder, root / "last", merge=finally_merge)
