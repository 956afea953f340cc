"""Drawn training runs: a combination of settings, and the models, adapters and texts that it needs on disk."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pairwise import pairwise
from peft import LoraConfig, get_peft_model
from reference_data import FOLDER
from tiny_models import FAMILIES as CONFIGURATIONS
from tiny_models import SHAPE, WINDOW
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

Case = Mapping[str, Any]

NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "gemma2": {**CONFIGURATIONS["gemma2"], "final_logit_softcapping": 3.0},  # tied, two caps, a window in every other
    "qwen3": {"model_type": "qwen3"},
    "phi3": CONFIGURATIONS["phi3"],  # fused projections
    "gpt2": {"model_type": "gpt2", **NO_DROPOUT},  # Conv1D, learned positions, tied
    "gpt_neox": {"model_type": "gpt_neox", **NO_DROPOUT},  # fused, parallel residuals, another name of its decoder
}
MORE_FAMILIES: dict[str, dict[str, Any]] = {  # for wide draws
    **{name: CONFIGURATIONS[name] for name in ("mistral-window", "qwen2-window", "llama3-rope", "phi3-partial")},
    "gemma3": {**CONFIGURATIONS["gemma3"], "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"model_type": "cohere2", "logit_scale": 0.25, "sliding_window": WINDOW},
    "granite": {"model_type": "granite", "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "olmo2": {"model_type": "olmo2"},
    "starcoder2": {"model_type": "starcoder2", "sliding_window": None, **NO_DROPOUT},
    "glm": {"model_type": "glm", **NO_DROPOUT},
    "smollm3": {"model_type": "smollm3"},
}
BIASED = ("gpt2", "gpt_neox", "qwen2-window", "starcoder2", "glm")
ONE_LAYER = {"phi3": "qkv_proj", "phi3-partial": "qkv_proj", "gpt2": "c_attn", "gpt_neox": "query_key_value"}

# An adapter's configuration, by the name that a case has for it.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "pattern": {  # of the first two of a block's layers
        "r": 2, "lora_alpha": 4, "rank_pattern": {0: 3}, "alpha_pattern": {1: 7}, "use_rslora": True,
    },
}  # fmt: skip
# Merged below, and what is trained: a new adapter, one of KINDS, or all weights.
ADAPTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "new": ((), "new"),
    "all-weights": ((), "all"),
    "new-on-merged": (("plain",), "new"),
    "new-on-two-merged": (("rslora", "pattern"), "new"),
    "continued": ((), "pattern"),
    "continued-on-merged": (("rslora",), "pattern"),
    "all-weights-on-merged": (("pattern",), "all"),
    "new-on-an-adapters-folder": (("plain",), "new"),
}
STAGES = ("mntp", "mntp-joined", "simcse", "contrastive", "negatives", "word-level")
AXES: dict[str, tuple[Any, ...]] = {
    "stage": STAGES,
    "family": (*FAMILIES, *MORE_FAMILIES),
    "adapter": tuple(ADAPTERS),
    "checkpointing": ("", "reentrant", "non-reentrant"),
    "budget": (None, 20),
    "accumulation": (1, 2),
    "optim": ("adamw_torch", "sgd", "adafactor"),
    "clipped": (0.0, 0.05),
    "schedule": (("constant", 0), ("linear", 1), ("cosine", 0)),
    "decay": (0.0, 0.5),
    "loss": (0, 1, 2, 3, 4),  # of MNTP_LOSSES or EMBEDDING_LOSSES
    "pooling": ("mean", "weighted_mean", "last_token", "bos_token"),
    "targets": ("", "one", "all-linear"),
    "rank": (None, 64),  # of what is written, which is enough for all of it
    "interrupted": (False, True),  # after the first update, and gone on with
    "evaluated": ("", "evaluated", "best"),  # after every update; what comes out is of the highest loss
    "pairs": ("", "named", "two-files"),
    "long": (False, True),  # into another epoch
}
# What a plan leaves out of them, where it makes no difference or little.
_ALIKE = {name: values[:1] for name, values in AXES.items()}
_SOME_ADAPTERS = tuple(name for name in ADAPTERS if name != "new-on-merged")
PLANS: tuple[dict[str, tuple[Any, ...]], ...] = (
    {
        **AXES, "stage": ("mntp", "mntp-joined"), "family": ("llama", "gemma2", "gpt2", "gpt_neox"),
        "adapter": _SOME_ADAPTERS, **{name: _ALIKE[name] for name in ("budget", "pooling", "pairs")},
    },
    {
        **AXES, "stage": ("negatives", "contrastive", "simcse"), "adapter": _SOME_ADAPTERS[:-1],
        "family": ("llama", "gemma2", "qwen3", "phi3", "gpt_neox"),
    },
    {
        **AXES, "stage": ("word-level",), "family": ("llama", "gpt2"), "loss": (0, 1),
        "adapter": ("continued", "new-on-an-adapters-folder"), "evaluated": ("", "best"),
        **{name: _ALIKE[name] for name in ("checkpointing", "pooling", "pairs", "targets", "rank")},
    },
)  # fmt: skip
EMBEDDING_LOSSES = (
    {},
    {"symmetric": True, "learn_scale": True},
    {"matryoshka_dims": [8, 32], "matryoshka_weights": [1.0, 3.0], "query_negatives": True},
    {"symmetric": True, "query_negatives": True, "learn_scale": True, "false_negative_margin": 0.0},
    {"document_negatives": True, "query_negatives": True, "false_negative_margin": 0.1},
)
MNTP_LOSSES = (
    {},
    {"mlm_probability": 0.6},
    {"mlm_probability": 0.6, "label_smoothing_factor": 0.1},
    {"data_collator_type": "all_mask", "label_smoothing_factor": 0.3},
    {"data_collator_type": "all_mask", "mlm_probability": 0.4},
)
LEARNING_RATES = {"adamw_torch": 0.01, "sgd": 0.05, "adafactor": 0.01}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "old", "stone", "walls", "river")
LENGTH = 16  # tokens: some texts are cut


def planned() -> list[Case]:
    """Cases among which any two values of different settings meet, in the stages where they mean something."""
    cases = [case for axes in PLANS for case in pairwise(**axes)]
    return [settled({**case, "seed": i}) for i, case in enumerate(cases)]


def drawn(seed: int, **fixed: Any) -> Case:
    """A case at random, but for what is fixed, perhaps ``processes`` (2): any number of settings meet."""
    rng = random.Random(seed)
    return settled({**{name: rng.choice(values) for name, values in AXES.items()}, "seed": seed, **fixed})


def settled(case: Case) -> Case:
    """The case without what it cannot have."""
    changes: dict[str, Any] = {}
    if case["stage"] == "word-level":  # a linear head, and nothing of the encoder is trained
        changes |= {"checkpointing": "", "targets": "", "rank": None}
    elif case["family"] == "gpt2" and not case["targets"]:  # no torch Linear: the layers have to be named
        changes["targets"] = "one"
    if case["stage"] not in ("contrastive", "negatives"):
        changes["pairs"] = ""
    if case.get("processes") == 2:
        changes["interrupted"] = False
        cut = case["budget"] or case["accumulation"] > 1  # into pieces, after each of which gradients were exchanged
        if case["checkpointing"] == "reentrant" and cut and not case["stage"].startswith("mntp"):
            changes["checkpointing"] = "non-reentrant"
    if case["optim"] == "adafactor" and "all-weights" in case["adapter"] and case["family"] in BIASED:
        # The bias of keys has no gradient but noise, which this optimiser makes as large as any.
        changes["optim"] = "adamw_torch"
    return {**case, **changes}


def name_of(case: Case) -> str:
    """Such as mntp-llama-new-reentrant-budget20-accumulation2-sgd-clipped0.05-linear1-loss1-mean-seed8."""
    shown = {name: "".join(map(str, value)) if isinstance(value, tuple) else value for name, value in case.items()}
    values = [(name, value) for name, value in shown.items() if value]
    return "-".join(
        name if value is True else f"{name}{value}" if isinstance(value, int | float) else value
        for name, value in values
    )


class Materials:
    """Models and adapters on disk, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.decoder, self.adapter = cache(self._decoder), cache(self._adapter)
        self.tokenizer = AutoTokenizer.from_pretrained(FOLDER / "llama")

    def _decoder(self, family: str) -> Path:
        """A causal model of the family with the reference's tokenizer."""
        settings = {**SHAPE, "num_hidden_layers": 2, "initializer_range": 0.15, "vocab_size": len(self.tokenizer)}
        settings |= {**FAMILIES, **MORE_FAMILIES}[family]
        config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, x in model.named_parameters():
                if name.endswith("bias"):
                    x.normal_(std=0.2)
                elif x.ndim == 1:
                    x.normal_(mean=1.0, std=0.2)
        model.save_pretrained(self._folder / family)
        self.tokenizer.save_pretrained(self._folder / family)
        return self._folder / family

    def _adapter(self, family: str, kind: str) -> Path:
        """An adapter of the family's decoder as an earlier stage may have left it: its weights are not zero."""
        base = AutoModel.from_pretrained(self.decoder(family))
        settings = dict(KINDS[kind])
        layers = sorted({
            name.rsplit(".", 1)[-1] for name, x in base.named_modules() if isinstance(x, nn.Linear | Conv1D)
        })  # fmt: skip
        for pattern in ("rank_pattern", "alpha_pattern"):
            settings[pattern] = {layers[i]: value for i, value in settings.get(pattern, {}).items()}
        torch.manual_seed(len(kind))
        config = LoraConfig(target_modules=layers, init_lora_weights=False, **settings)
        wrapped = get_peft_model(base, config)
        with torch.no_grad():
            for x in wrapped.parameters():
                if x.requires_grad:
                    x.normal_(std=0.1)
        wrapped.save_pretrained(self._folder / f"{family}-{kind}")
        return self._folder / f"{family}-{kind}"

    def below(self, case: Case) -> list[Path]:
        return [self.adapter(case["family"], kind) for kind in ADAPTERS[case["adapter"]][0]]

    def trained(self, case: Case) -> Path | None:
        """The adapter that is trained on, if there is one."""
        kind = ADAPTERS[case["adapter"]][1]
        return self.adapter(case["family"], kind) if kind in KINDS else None


def texts_of(case: Case) -> list[str]:
    """Ten texts: one of a word, two that are equal but for white space, some too long."""
    rng = random.Random(case["seed"])
    found = [" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) + f" {i}" for i in range(8)]
    return [*found, "cat", found[0].replace(" ", "  ", 1)]


def pairs_of(case: Case) -> list[list[dict[str, Any]]]:
    """A file of ten rows, or two.

    Two rows share a query, two a document, two a name where rows have names; and one has a hard negative that is the
    document of another.
    """
    if case["pairs"] != "two-files":
        return [_rows_of_pairs(case)]
    return [_rows_of_pairs(case), _rows_of_pairs({**case, "seed": case["seed"] + 10**6})]


def _rows_of_pairs(case: Case) -> list[dict[str, Any]]:
    rng, texts = random.Random(case["seed"]), texts_of(case)
    rows = [
        {"query": text, "positive": [f"{rng.choice(WORDS)} {k} {text}" for k in range(rng.randint(1, 2))],
         "negative": [f"{rng.choice(WORDS)} {i} {k}" for k in range(rng.randint(1, 3))]}
        for i, text in enumerate(texts[:9])
    ]  # fmt: skip
    rows.append({"query": texts[1], "positive": ["another answer"], "negative": []})
    rows[3]["positive"] = [*rows[2]["positive"][:1], "a second one"]
    rows[5]["negative"] = rows[4]["positive"]
    if case["pairs"] == "named":
        rows = [{**row, "name": f"name {8 if i == 6 else i}"} for i, row in enumerate(rows)]
    return rows


def sentences_of(case: Case) -> list[tuple[list[str], list[str]]]:
    """Words with labels."""
    return [(text.split(), [f"L{len(word) % 4}" for word in text.split()]) for text in texts_of(case)]


def options_of(case: Case, materials: Materials, folder: Path) -> tuple[str, dict[str, Any]]:
    """The command of llm2vec-fast train, and its options; writes the file of texts."""
    stage = case["stage"]
    name, warmup = case["schedule"]
    options: dict[str, Any] = {
        "model_name_or_path": str(materials.decoder(case["family"])), "output_dir": str(folder / "out"),
        "max_seq_length": LENGTH, "model_dtype": "float32", "seed": case["seed"], "logging_steps": 1,
        "gradient_accumulation_steps": case["accumulation"],
        "per_device_train_batch_size": (16 if stage == "word-level" else 4) // case.get("processes", 1),
        "optim": case["optim"], "learning_rate": LEARNING_RATES[case["optim"]], "weight_decay": case["decay"],
        "max_grad_norm": case["clipped"], "lr_scheduler_type": name, "warmup_steps": warmup, "adam_epsilon": 1e-2,
        "save_strategy": "steps" if case["interrupted"] or case["evaluated"] == "best" else "no", "save_steps": 1,
        "use_cpu": True, "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    if case["adapter"] == "new-on-an-adapters-folder":
        options["model_name_or_path"] = str(materials.below(case)[0])
    options |= {**_data_options(case, folder), "load_best_model_at_end": case["evaluated"] == "best"}
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # that of the first update, mostly
    options |= {"max_steps": 4} if case["long"] else {"num_train_epochs": 1, "max_steps": -1}
    if stage == "word-level":
        return "word-level", {**options, **_word_options(case, materials)}
    options |= _adapter_options(case, materials)
    if case["checkpointing"]:
        options["gradient_checkpointing"] = True
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": case["checkpointing"] == "reentrant"}
    if stage.startswith("mntp"):
        options |= {"line_by_line": stage == "mntp", "mask_token_type": "eos"}
        return "mntp", {**options, **MNTP_LOSSES[case["loss"]]}
    options |= {"scale": 5.0, "attention_dropout": 0.0, "pooling_mode": case["pooling"]}
    options["max_steps"] = 3 if case["long"] else 2
    options |= {"token_budget": case["budget"], **EMBEDDING_LOSSES[case["loss"]]}
    if stage == "simcse":
        return "simcse", options
    options |= {"negatives": 0 if stage == "contrastive" else 2, "query_instruction": ["find it:"]}
    if case["pairs"] == "named":
        options["id_column"] = "name"
    if case["pairs"] == "two-files":
        options |= {"query_instruction": ["find it:", "what says"], "document_instruction": ["", "this:"]}
    return "contrastive", options


def _adapter_options(case: Case, materials: Materials) -> dict[str, Any]:
    below, trained = materials.below(case), ADAPTERS[case["adapter"]][1]
    options: dict[str, Any] = {"lora_r": 0 if trained == "all" else 4, "lora_dropout": 0.0}
    if case["rank"] and trained != "all":
        options |= {"saved_rank": case["rank"], "lora_alpha": 3}
    if case["targets"]:
        one = ONE_LAYER.get(case["family"], "q_proj")
        options["lora_target_modules"] = [one if case["targets"] == "one" else case["targets"]]
    if case["adapter"] == "new-on-an-adapters-folder":
        return options
    if trained in KINDS:
        below, options["continue_adapter"] = [*below, materials.trained(case)], True
    return {**options, "peft_model_name_or_path": [str(path) for path in below]}


def _data_options(case: Case, folder: Path) -> dict[str, Any]:
    """The files of texts, which are evaluated on as well."""
    if case["stage"] == "word-level":
        kind, files = "txt", [["\n".join(map(" ".join, zip(*pair, strict=True))) + "\n" for pair in sentences_of(case)]]
    elif case["stage"] in ("contrastive", "negatives"):
        kind, files = "jsonl", [[json.dumps(row) for row in rows] for rows in pairs_of(case)]
    else:
        kind, files = "txt", [texts_of(case)]
    paths = [str(folder / f"{i}.{kind}") for i in range(len(files))]
    for path, rows in zip(paths, files, strict=True):
        Path(path).write_text("\n".join(rows) + "\n")
    evaluation = {"validation_file": paths, "eval_strategy": "steps", "eval_steps": 1}
    return {"train_file": paths, **(evaluation if case["evaluated"] else {})}


def _word_options(case: Case, materials: Materials) -> dict[str, Any]:
    options = {"classifier_dropout": 0.0, "token_budget": case["budget"]}
    options |= {"retroactive_labels": ("same_token", "next_token")[case["loss"] % 2]}
    adapters = [path for path in (*materials.below(case), materials.trained(case)) if path]
    if adapters and case["adapter"] != "new-on-an-adapters-folder":
        options["peft_model_name_or_path"] = str(adapters[0])
    return options
