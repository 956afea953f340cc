"""The token that hides others, of tokenizers of several families."""

from __future__ import annotations

import pytest
from reference_data import FOLDER
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm2vec_fast.errors import UserError
from llm2vec_fast.training.masking import mask_id_of


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER / "llama")


def test_an_end_token_that_is_the_unknown_token_too_hides(tokenizer: PreTrainedTokenizerBase) -> None:
    """As GPT-2's <|endoftext|> is."""
    tokenizer.unk_token = tokenizer.eos_token
    assert mask_id_of(tokenizer, "eos") == tokenizer.eos_token_id


@pytest.mark.parametrize(("kind", "token"), [("eos", "eos_token"), ("mask", "mask_token")])
def test_a_token_that_is_not_there_is_refused(tokenizer: PreTrainedTokenizerBase, kind: str, token: str) -> None:
    setattr(tokenizer, token, None)
    with pytest.raises(UserError, match=f"mask_token_type={kind} needs a token that this tokenizer does not have"):
        mask_id_of(tokenizer, kind)


def test_a_blank_that_is_no_token_is_refused() -> None:
    words = Tokenizer(WordLevel({"cat": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="mask_token_type=blank needs a token"):
        mask_id_of(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"), "blank")
