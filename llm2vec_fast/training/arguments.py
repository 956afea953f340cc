"""What a training stage can be told: one dataclass a stage, on top of transformers' TrainingArguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import TrainingArguments

from llm2vec_fast.errors import UserError
from llm2vec_fast.training.masking import MASK_TOKENS, MASKINGS

# The projections that the paper adapts, all of Llama's; other families name them alike or fuse them.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class StageArguments(TrainingArguments):
    """What every stage takes, beside all of transformers' TrainingArguments.

    Raises:
        UserError: a value is missing or out of range.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Decoder to train: a folder, a hub name or a GGUF file."}
    )
    peft_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Adapter of an earlier stage, merged into the weights before training."}
    )
    train_file: list[str] = field(
        default_factory=list, metadata={"help": "Texts to train on: txt (one a line), jsonl, csv or parquet files."}
    )
    validation_file: list[str] = field(default_factory=list, metadata={"help": "Texts to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "The column with the text in jsonl, csv and parquet."})
    max_seq_length: int = field(default=512, metadata={"help": "Tokens of a sequence; what is beyond is cut."})
    model_dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the frozen weights: float32, bfloat16, or auto (bfloat16 where it is fast)."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter; 0 trains all weights."})
    lora_alpha: int | None = field(default=None, metadata={"help": "The adapter's scale; by default twice its rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapter."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS), metadata={"help": "Names of the layers that are adapted."}
    )

    remove_unused_columns: bool = field(default=False, metadata={"help": "Not of use here: batches are packed."})
    ddp_find_unused_parameters: bool = field(
        default=False, metadata={"help": "Every adapter takes part in every step."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "No use here: such a loss stops the run."})
    include_num_input_tokens_seen: str = field(default="all", metadata={"help": "Counts tokens for the speed shown."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})

    def __post_init__(self) -> None:
        if self.model_name_or_path is None:
            raise UserError("model_name_or_path is not given: name the decoder to train")
        if not self.train_file:
            raise UserError("train_file is not given: name the texts to train on")
        if self.max_seq_length < 2:
            raise UserError(f"max_seq_length={self.max_seq_length} leaves nothing to predict: give at least 2")
        if self.lora_r < 0:
            raise UserError(f"lora_r={self.lora_r} is negative: give the adapter's rank, or 0 to train all weights")
        require_share("lora_dropout", self.lora_dropout)
        super().__post_init__()


@dataclass
class MntpArguments(StageArguments):
    """Masked next-token prediction; the defaults are the paper's for Llama."""

    STAGE: ClassVar[str] = "mntp"

    mlm_probability: float = field(default=0.2, metadata={"help": "Share of the tokens that is hidden."})
    data_collator_type: str = field(
        default="default",
        metadata={"help": "default: of the hidden tokens 80 % masked, 10 % random, 10 % kept; all_mask: all masked."},
    )
    mask_token_type: str = field(
        default="blank", metadata={"help": "What hides a token: blank (the token _), eos, or mask (the tokenizer's)."}
    )
    line_by_line: bool = field(
        default=False,
        metadata={"help": "Each text a sequence of its own; else texts are joined and cut into max_seq_length."},
    )

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Sequences of a step, packed into one row."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Sequences of an evaluation step."})
    max_steps: int = field(default=1000, metadata={"help": "Steps to train; -1 goes by num_train_epochs."})

    def __post_init__(self) -> None:
        require_choice("data_collator_type", self.data_collator_type, MASKINGS)
        require_choice("mask_token_type", self.mask_token_type, MASK_TOKENS)
        require_share("mlm_probability", self.mlm_probability)
        if self.mlm_probability == 0:
            raise UserError("mlm_probability=0 hides no token: give a share above 0")
        super().__post_init__()


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name}={value} is unknown: choose one of {', '.join(choices)}")


def require_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"{name}={value} is not a share: give a number from 0 to below 1")
