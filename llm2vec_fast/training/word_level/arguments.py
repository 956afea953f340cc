"""What the word-level stage can be told, beside all of transformers' TrainingArguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import TrainingArguments

from llm2vec_fast.errors import UserError
from llm2vec_fast.precision import DTYPES
from llm2vec_fast.training.settings.checks import (
    require_choice,
    require_output,
    require_positive,
    require_share,
    settle,
)

LABEL_FROM = ("same_token", "next_token")


@dataclass
class WordLevelArguments(TrainingArguments):
    """A linear head on a frozen encoder, a label a word; the defaults are near the paper's.

    Raises:
        UserError: a value is missing or out of range.
    """

    STAGE: ClassVar[str] = "word-level"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Encoder: a folder, a hub name or a GGUF file; it is not trained."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the encoder, if it is on the hub."}
    )
    peft_model_name_or_path: str | None = field(default=None, metadata={"help": "An adapter to put on it."})
    enable_bidirectional: bool = field(default=True, metadata={"help": "False reads causally, as a baseline."})
    train_file: list[str] = field(
        default_factory=list,
        metadata={"help": "Labelled sentences: CoNLL columns (txt, conll, tsv), or jsonl or parquet with lists."},
    )
    validation_file: list[str] = field(default_factory=list, metadata={"help": "Sentences to choose settings on."})
    test_file: list[str] = field(default_factory=list, metadata={"help": "Sentences to report scores on, at the end."})
    word_column: str = field(
        default="0", metadata={"help": "Where the word stands: a column's number from 0, or name."}
    )
    label_column: str = field(default="-1", metadata={"help": "Where its label stands; -1 is the last column."})
    retroactive_labels: str = field(
        default="same_token",
        metadata={
            "help": "same_token: a token's own output tells its label. next_token: the output before it does, as "
            "masked next-token prediction trains it."
        },
    )
    max_seq_length: int = field(default=512, metadata={"help": "Tokens of a sentence; words beyond are left out."})
    model_dtype: str = field(default="auto", metadata={"help": "dtype of the encoder: float32, bfloat16, or auto."})
    token_budget: int | None = field(default=None, metadata={"help": "Tokens of a forward pass of the encoder."})
    features_folder: str | None = field(
        default=None,
        metadata={
            "help": "Keep the words' outputs here, for other labels of the same sentences and both values of "
            "retroactive_labels; by default gone at the end."
        },
    )
    classifier_dropout: float = field(default=0.1, metadata={"help": "Dropout in front of the head."})

    per_device_train_batch_size: int = field(default=1024, metadata={"help": "Words of a step."})
    per_device_eval_batch_size: int = field(default=8192, metadata={"help": "Words of an evaluation step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "The largest learning rate."})
    num_train_epochs: float = field(default=10, metadata={"help": "Rounds through the words."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two lines of the log."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not of use here."})
    average_tokens_across_devices: bool = field(default=True, metadata={"help": "Every word counts the same."})

    def __post_init__(self) -> None:
        if self.model_name_or_path is None:
            raise UserError("model_name_or_path is not given: name the encoder")
        for name in ("train_file", "validation_file", "test_file"):
            given = getattr(self, name)
            setattr(self, name, [each for each in ([given] if isinstance(given, str) else given) if each])
        if not self.train_file:
            raise UserError("train_file is not given: name the labelled sentences to train on")
        require_choice("retroactive_labels", self.retroactive_labels, LABEL_FROM)
        require_choice("model_dtype", self.model_dtype, ("auto", *DTYPES))
        require_positive("max_seq_length", self.max_seq_length)
        require_positive("token_budget", self.token_budget)
        require_share("classifier_dropout", self.classifier_dropout)
        require_output(self)
        settle(self, self.STAGE, super().__post_init__)
