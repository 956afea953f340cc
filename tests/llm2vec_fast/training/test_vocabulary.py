"""Tokenizers with more tokens than the model has rows: none of these is drawn, hides others, or stops a run midway."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_data import FOLDER
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from llm2vec_fast.errors import UserError
from llm2vec_fast.prompts import Template
from llm2vec_fast.tokenization import TextTokenizer
from llm2vec_fast.training.arguments import ContrastiveArguments, MntpArguments, SimcseArguments
from llm2vec_fast.training.contrastive import train_contrastive
from llm2vec_fast.training.masking import IGNORED, mask_id_of
from llm2vec_fast.training.mntp import MntpCollator, train_mntp
from llm2vec_fast.training.simcse import train_simcse
from llm2vec_fast.training.vocabulary import require_rows_for

Settings = Callable[..., dict[str, Any]]
ROWS = 384  # of the model's embedding


def larger() -> PreTrainedTokenizerBase:
    """The model's tokenizer with tokens that have no row."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "llama")
    assert len(tokenizer) == ROWS
    tokenizer.add_tokens([f"<x{i}>" for i in range(200)])
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with such a tokenizer."""
    folder = tmp_path_factory.mktemp("larger")
    AutoModelForCausalLM.from_pretrained(FOLDER / "llama", dtype=torch.float32).save_pretrained(folder)
    larger().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("rows", "below"), [(None, 585), (ROWS, ROWS), (1000, 585)])
def test_random_tokens_are_those_of_tokenizer_and_model(rows: int | None, below: int) -> None:
    collate = MntpCollator(larger(), mask_token="eos", probability=0.99, rows=rows)
    row = {"input_ids": [5] * 40_000, "special": [0] * 40_000, "row": 0, "seed": 1}
    batch = collate([row])
    drawn = batch["input_ids"][(batch["labels"] != IGNORED) & (batch["input_ids"] != 5)].unique()
    assert drawn.min() == 0  # special tokens too, as transformers' collator
    assert below - 3 <= int(drawn.max()) < below


def test_a_mask_token_without_a_row_is_refused_before_texts_are_read(model: str, settings: Settings) -> None:
    assert mask_id_of(larger(), "mask") == 584
    given = settings(model_name_or_path=model, mask_token_type="mask", train_file=["nowhere.txt"])
    with pytest.raises(UserError, match=r"mask_token_type=mask is the token '<mask>' with the id 584, beyond the 384 "):
        train_mntp(MntpArguments(**given))


@pytest.mark.parametrize("stage", ["lines", "joined", "simcse", "negative", "instruction", "validation"])
def test_a_text_with_a_token_without_a_row_is_named_before_training(
    model: str, settings: Settings, tmp_path: Path, stage: str
) -> None:
    texts = ["the cat sat on a mat"] * 30
    good, bad, pairs = (tmp_path / name for name in ("good.txt", "bad.txt", "pairs.jsonl"))
    good.write_text("\n".join(texts))
    bad.write_text("\n".join([*texts, "rain <x3> fell"]))
    negatives = ["the rain <x3> fell" if stage == "negative" and i == 29 else "rain" for i in range(30)]
    pairs.write_text("".join(f"{json.dumps({'query': 'q', 'positive': 'd', 'negative': x})}\n" for x in negatives))
    given = settings(model_name_or_path=model, train_file=[str(bad)], save_strategy="no")
    if stage == "simcse":
        run = partial(train_simcse, SimcseArguments(**given))
    elif stage in ("negative", "instruction"):
        instruction = {"query_instruction": ["<x3>:"] if stage == "instruction" else []}
        run = partial(train_contrastive, ContrastiveArguments(**{**given, "train_file": [str(pairs)]}, **instruction))
    else:
        files = {"train_file": [str(good)], "validation_file": [str(bad)]} if stage == "validation" else {}
        options = {"line_by_line": stage != "joined", "mask_token_type": "eos"}
        run = partial(train_mntp, MntpArguments(**{**given, **files}, **options))
    with pytest.raises(UserError, match=r"'.*<x3>.*' holds the token '<x3>' with the id 387, beyond the 384 rows"):
        run()


def test_tokens_without_a_row_that_no_text_holds_are_no_obstacle(model: str, settings: Settings) -> None:
    given = {"mask_token_type": "eos", "mlm_probability": 0.9, "line_by_line": True, "save_strategy": "no"}
    assert train_mntp(MntpArguments(**settings(model_name_or_path=model, **given))).global_step == 4


@pytest.mark.parametrize(
    ("token", "whole"),
    [
        (AddedToken("[PAD9]", special=True, normalized=False), False),
        (AddedToken("[PAD9]", normalized=True), True),
        (AddedToken("[a b]", special=True, normalized=False), True),
    ],
    ids=["special", "normalized", "space"],
)
def test_only_texts_that_may_hold_a_token_without_a_row_are_tokenised(token: AddedToken, whole: bool) -> None:
    """Padding added to a tokenizer must not cost a pass over a large corpus, nor go unseen at its end."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "llama")
    tokenizer.add_tokens([token], special_tokens=token.special)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "llama", dtype=torch.float32)
    own, seen = TextTokenizer(tokenizer, Template(), 16, 16), []

    def counted(pairs: Sequence[tuple[str, str]]) -> Any:
        seen.extend(pairs)
        return own(pairs)

    counted.template = own.template
    texts = [("", f"text {i}") for i in range(5000)]
    require_rows_for(texts, counted, tokenizer, model)
    assert len(seen) == (5000 if whole else 1024)
    for place in (0, 4999):
        bad = [*texts[:place], ("", f"the {token.content} cat"), *texts[place + 1 :]]
        with pytest.raises(UserError, match=r"the text 'the \[.*\] cat' holds the token '\[.*\]' with the id 384"):
            require_rows_for(bad, counted, tokenizer, model)


def test_what_the_tokenizer_puts_around_every_text_needs_a_row_too() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "llama")
    tokenizer.add_special_tokens({"cls_token": "[C]"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("[C] $A", special_tokens=[("[C]", 384)])
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "llama", dtype=torch.float32)
    with pytest.raises(UserError, match=r"the text 'a cat' holds the token '\[C\]' with the id 384"):
        require_rows_for([("", "a cat")], TextTokenizer(tokenizer, Template(), 16, 16), tokenizer, model)
