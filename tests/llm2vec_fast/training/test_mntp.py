"""Masked next-token prediction: the original's loss and gradients, and runs that end, go on and fail as they should."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from reference_data import ARCHITECTURES, FOLDER, assert_matches
from safetensors.torch import load_file
from torch import nn
from training_runs import UNCLIPPED, assert_trained_alike
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig

from llm2vec_fast import LLM2Vec, accelerate, make_bidirectional
from llm2vec_fast.errors import UserError
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.training.arguments import MntpArguments
from llm2vec_fast.training.masking import IGNORED, mask_id_of, mask_tokens
from llm2vec_fast.training.mntp import MntpCollator, MntpTrainer, train_mntp
from llm2vec_fast.training.models import load_model
from llm2vec_fast.training.packing import filled
from llm2vec_fast.training.run import NonFiniteLossError

Settings = Callable[..., dict[str, object]]
Arguments = Callable[..., MntpArguments]


@pytest.fixture
def arguments(settings: Settings) -> Arguments:
    def arguments(output: str = "out", **changes: object) -> MntpArguments:
        return MntpArguments(**settings(output, **{"line_by_line": True, "mask_token_type": "eos", **changes}))

    return arguments


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("masking", ["default", "all_mask"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_logits_and_gradients_are_the_originals(architecture: str, masking: str, fused: bool) -> None:
    with np.load(FOLDER / f"{architecture}-mntp.npz") as file:
        found = {key.removeprefix(f"mntp|{masking}|"): file[key] for key in file.files if f"|{masking}|" in key}
    model = make_bidirectional(AutoModelForCausalLM.from_pretrained(FOLDER / architecture, dtype=torch.float32))
    if fused:
        assert "loss" in accelerate(model).swapped
    rows, length = found["input_ids"].shape
    layout = SequenceLayout.from_lengths([length] * rows)
    ids, labels = (torch.from_numpy(found[name]) for name in ("input_ids", "labels"))
    labels[:, 0] = IGNORED  # packed: the output before a sequence's first token is another sequence's
    batch = {"input_ids": ids.view(1, -1), "labels": labels.view(1, -1), "layout": layout}
    result = model(**batch)
    assert (result.logits is None) == fused
    result.loss.backward()
    assert_matches(result.loss.detach().numpy(), found["loss"])
    logits = model(**batch, output_logits=True).logits if fused else result.logits
    assert_matches(logits.detach().view(rows, length, -1)[:2].numpy(), found["logits"])
    gradients = {name.removeprefix("grad|"): x for name, x in found.items() if name.startswith("grad|")}
    assert gradients
    for name, expected in gradients.items():
        assert_matches(model.get_parameter(name).grad.numpy(), expected)


@pytest.mark.parametrize("masking", ["default", "all_mask"])
def test_hidden_tokens_have_the_shares_asked_for(masking: str) -> None:
    ids = torch.randint(5, 1000, (200_000,), generator=torch.Generator().manual_seed(0))
    special = torch.arange(len(ids)) % 10 == 0
    hidden, labels = mask_tokens(
        ids, special, 3, 1000, probability=0.2, masking=masking, generator=torch.Generator().manual_seed(1)
    )
    chosen = labels != IGNORED
    assert not chosen[special].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert chosen[~special].float().mean() == pytest.approx(0.2, abs=0.005)
    masked = (hidden[chosen] == 3).float().mean()
    kept = (hidden[chosen] == ids[chosen]).float().mean()
    assert masked == pytest.approx(1.0 if masking == "all_mask" else 0.8, abs=0.01)
    assert kept == pytest.approx(0.0 if masking == "all_mask" else 0.1, abs=0.01)


def test_what_is_hidden_does_not_depend_on_the_batch() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "llama")
    rows = [
        {"input_ids": list(range(10, 10 + length)), "special": [0] * length, "row": i, "seed": 100 + i}
        for i, length in enumerate((9, 4, 12))
    ]
    collate = MntpCollator(tokenizer, mask_token="eos", probability=0.5)
    together = collate(rows)
    assert together["input_ids"].shape == together["labels"].shape == (1, 25)
    assert together["position_ids"][0].tolist() == [*range(9), *range(4), *range(12)]
    alone = [collate([row]) for row in rows]
    for name in ("input_ids", "labels"):
        assert torch.equal(together[name], torch.cat([batch[name] for batch in alone], dim=1))
    assert (together["labels"][0, [0, 9, 13]] == IGNORED).all()


def test_a_mask_token_that_is_not_there_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "llama")
    with pytest.raises(UserError, match="mask_token_type=mask needs a token that this tokenizer does not have"):
        mask_id_of(tokenizer, "mask")


@pytest.mark.parametrize("rank", [4, 0], ids=["adapter", "all-weights"])
def test_training_lowers_the_loss_and_writes_an_encoder(
    arguments: Arguments, corpus: str, tmp_path: Path, rank: int
) -> None:
    output = tmp_path / "out"
    train_mntp(arguments(lora_r=rank, max_steps=12, validation_file=[corpus]))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in history if "loss" in line]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert all(
        line["train_tokens_per_second"] > 0 and line["peak_memory_mib"] > 0 for line in history if "loss" in line
    )
    scores = json.loads((output / "eval_results.json").read_text())
    assert 0 < scores["eval_accuracy"] <= 1
    assert scores["eval_loss"] < losses[0]
    files = {path.name for path in output.iterdir()}
    assert ("adapter_model.safetensors" if rank else "model.safetensors") in files
    trained = LLM2Vec.from_pretrained(*((FOLDER / "llama", output) if rank else (output,)), dtype="float32")
    untrained = LLM2Vec.from_pretrained(FOLDER / "llama", dtype="float32")
    texts = ["the cat sat", "rain fell over old walls"]
    assert (trained.encode(texts) - untrained.encode(texts)).abs().max() > 1e-3


def test_evaluation_does_not_depend_on_its_batches(
    settings: Settings,
    launch: Callable[..., subprocess.Popen[str]],
    finished: Callable[[subprocess.Popen[str]], None],
    corpus: str,
    tmp_path: Path,
) -> None:
    """Batches whose hidden tokens differ in number: the mean of their losses is another one.

    Two processes start over with the first texts where the last ones do not fill their batches: once in a part of the
    second one's, once in all of it.
    """
    found = []
    for processes, size in ((1, 60), (1, 7), (2, 8), (2, 29)):
        name = f"{processes}-by-{size}"
        options = settings(
            name, validation_file=[corpus], per_device_eval_batch_size=size, learning_rate=0.0, max_steps=1,
            line_by_line=True, mask_token_type="eos", save_strategy="no",
        )  # fmt: skip
        if processes > 1:
            finished(launch("mntp", options, processes))
        else:
            train_mntp(MntpArguments(**options))
        scores = json.loads((tmp_path / name / "eval_results.json").read_text())
        found.append([scores["eval_loss"], scores["eval_accuracy"]])
    assert found == [pytest.approx(found[0], rel=1e-5)] * len(found)


def test_a_model_whose_loss_is_left_alone_is_evaluated_from_its_logits(
    arguments: Arguments, corpus: str, tmp_path: Path
) -> None:
    """Cohere's output layer scales its logits."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "llama")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CohereConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "cohere")
    tokenizer.save_pretrained(tmp_path / "cohere")
    given = {"model_name_or_path": str(tmp_path / "cohere"), "learning_rate": 0.0, "save_strategy": "no"}
    given |= {"train_file": [corpus], "max_steps": 1, "per_device_train_batch_size": 60}
    train_mntp(arguments(validation_file=[corpus], **given))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    scores = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert scores["eval_loss"] == pytest.approx(history[0]["loss"], rel=1e-5)


def test_what_was_merged_before_comes_out_too(arguments: Arguments, tmp_path: Path) -> None:
    """An adapter as the base, and one on top that learns nothing: what comes out is the first."""
    given = {"model_name_or_path": str(tmp_path / "first"), "learning_rate": 0.0}
    copytree(FOLDER / "llama-lora", tmp_path / "first")
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(FOLDER / "llama")
    (tmp_path / "first" / "adapter_config.json").write_text(json.dumps(config))
    train_mntp(arguments(max_steps=1, **given))
    before, after = (
        LLM2Vec.from_pretrained(FOLDER / "llama", path, dtype="float32", device="cpu").encode("rain fell")
        for path in (tmp_path / "first", tmp_path / "out")
    )
    assert_matches(after.numpy(), before.numpy())
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["r"] == config["r"] + 16
    assert saved["base_model_name_or_path"] == str(FOLDER / "llama")
    assert saved["auto_mapping"]["base_model_class"] == "LlamaModel"


def test_an_interrupted_run_goes_on_to_the_same_weights(arguments: Arguments, tmp_path: Path) -> None:
    train_mntp(arguments("whole"))
    train_mntp(arguments("cut", max_steps=4, save_steps=2))
    for path in ("checkpoint-4", "adapter_model.safetensors", "trainer_state.json"):
        remove(tmp_path / "cut" / path)
    train_mntp(arguments("cut"))
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    history = json.loads((tmp_path / "cut" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4]


def test_two_processes_train_as_one_on_the_joined_batch(
    settings: Settings,
    launch: Callable[..., subprocess.Popen[str]],
    finished: Callable[[subprocess.Popen[str]], None],
    tmp_path: Path,
) -> None:
    """Batches whose hidden tokens differ in number: only a loss divided by the number of all of them agrees."""
    for name, processes in (("one", 1), ("two", 2)):
        options = settings(
            name, mask_token_type="eos", line_by_line=True, max_steps=3, save_strategy="no", learning_rate=0.02,
            per_device_train_batch_size=8 // processes, **UNCLIPPED,
        )  # fmt: skip
        finished(launch("mntp", options, processes, cold=True))
    assert_trained_alike(tmp_path / "one", tmp_path / "two")


def remove(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    else:
        path.unlink()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_texts(arguments: Arguments, tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(FOLDER / "llama", dtype=torch.float32)
    broken.model.norm.weight.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(FOLDER / "llama").save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 1 on the sequences \d+, \d+.*learning_rate"):
        train_mntp(arguments(model_name_or_path=str(tmp_path / "broken")))
    assert (tmp_path / "out" / "checkpoint-0").is_dir()


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One beyond the weights leaves the checkpoint of this step as it is; one of broken weights writes none of them."""

    def fails(trainer: MntpTrainer, model: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        loss = compute(trainer, model, *args, **kwargs)
        if trainer.state.global_step < 3 - (breaking == "loss"):
            return loss
        if breaking == "weights":
            next(x for x in model.parameters() if x.requires_grad).data.fill_(float("nan"))
        return loss * float("nan")

    compute = MntpTrainer.compute_loss
    monkeypatch.setattr(MntpTrainer, "compute_loss", fails)
    for breaking, message in (
        ("loss", "nan at step 3 on the sequences .* the weights from before this step are saved"),
        ("weights", "nan at step 4 on the sequences .* not saved, checkpoint-2 is the last good checkpoint"),
    ):
        with pytest.raises(NonFiniteLossError, match=message):
            train_mntp(arguments(breaking, save_total_limit=1))
        assert [path.name for path in (tmp_path / breaking).glob("checkpoint-*")] == ["checkpoint-2"]


def test_every_process_stops_where_one_has_a_loss_that_is_not_finite(
    settings: Settings, launch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The second process has a text that breaks the loss: the first must neither wait nor save what became of it."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "llama", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "llama")
    model.model.embed_tokens.weight.data[tokenizer.convert_tokens_to_ids("z")] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    (tmp_path / "texts.txt").write_text("the cat sat\n" * 15 + "z z z z z z\n")
    options = settings(
        model_name_or_path=str(tmp_path / "broken"), train_file=str(tmp_path / "texts.txt"), mask_token_type="eos",
        line_by_line=True, per_device_train_batch_size=1, max_steps=8, mlm_probability=0.5, save_steps=100,
        seed=0,
    )  # fmt: skip
    process = launch("mntp", options, processes=2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "the loss is nan at step" in errors
    assert "is not finite in another process" in errors
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    weights = load_file(checkpoint / "adapter_model.safetensors")
    assert all(bool(x.isfinite().all()) for x in weights.values())


def test_a_step_that_hides_no_token_is_a_step_without_loss(arguments: Arguments, tmp_path: Path) -> None:
    """One short text a step: most of them hide nothing."""
    train_mntp(arguments(per_device_train_batch_size=1, mlm_probability=0.02, save_strategy="no"))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in history if "loss" in line]
    assert len(losses) == 4
    assert 0 in losses


def test_texts_too_short_to_join_are_refused(arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a\n")
    with pytest.raises(UserError, match="no text of train_file is long enough: 24 tokens are needed"):
        train_mntp(arguments(train_file=[str(tmp_path / "short.txt")], line_by_line=False))


def test_tokens_of_no_text_fill_a_batch_on_a_cpu_and_change_neither_loss_nor_gradients(
    arguments: Arguments,
) -> None:
    stage = load_model(arguments(lora_dropout=0.0), head=True)
    rows = [
        {"input_ids": list(range(10, 10 + length)), "special": [0] * length, "seed": i, "row": i}
        for i, length in enumerate((9, 40, 21))
    ]
    batch = MntpCollator(stage.tokenizer, mask_token="eos", probability=0.5)(rows)
    batch.pop("rows")
    found = []
    for given in (batch, filled(batch)):
        loss = stage.model(**given, use_cache=False).loss
        gradients = torch.autograd.grad(loss, [x for x in stage.model.parameters() if x.requires_grad])
        found.append([loss.detach(), *gradients])
    assert given["input_ids"].shape == (1, 128)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
