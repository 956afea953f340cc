"""What a training stage can be told: one dataclass a stage, on top of transformers' TrainingArguments."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainingArguments

from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.errors import UserError
from llm2vec_fast.kernels.pooling import POOLING_MODES
from llm2vec_fast.precision import DTYPES
from llm2vec_fast.training.masking import MASK_TOKENS, MASKINGS
from llm2vec_fast.training.settings.checks import (
    require_choice,
    require_output,
    require_positive,
    require_share,
    require_usable_run,
    settle,
)

# The projections that the paper adapts, all of Llama's; other families name them alike or fuse them.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Looked for where nothing was asked for, and not missed.
NEGATIVE_COLUMNS = ("negative",)

STEPS_HELP = (
    "Steps to train. num_train_epochs without it, or on the command line over a file with it, trains by epochs, as -1 "
    "does; where both are given in one place, steps count."
)


@dataclass
class StageArguments(TrainingArguments):
    """What every stage takes, beside transformers' TrainingArguments.

    Raises:
        UserError: a value is missing or out of range.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Decoder to train: a folder, a hub name or a GGUF file."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the decoder, if it is on the hub."}
    )
    peft_model_name_or_path: list[str] = field(
        default_factory=list,
        metadata={
            "help": 'Adapters of earlier stages, in order, merged into the weights before training; "" for none.'
        },
    )
    continue_adapter: bool = field(
        default=False, metadata={"help": "Train the last of these adapters on, instead of a new one."}
    )
    train_file: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts to train on: files, folders and globs of txt (one a line), jsonl, json, csv, tsv or "
            "parquet; but for the last as .gz, .bz2, .xz or .zst, too."
        },
    )
    validation_file: list[str] = field(default_factory=list, metadata={"help": "Texts to evaluate on."})
    csv_delimiter: str | None = field(
        default=None,
        metadata={"help": "What parts the fields of csv and tsv files; by default a tab in .tsv, else what fits."},
    )
    csv_quote: str | None = field(
        default=None,
        metadata={"help": 'What is around fields of csv and tsv files, or none; by default " in .csv, none in .tsv.'},
    )
    csv_escape: str | None = field(
        default=None,
        metadata={"help": "What stands before a quote inside a field; by default such a quote is doubled."},
    )
    max_seq_length: int = field(default=512, metadata={"help": "Tokens of a sequence; what is beyond is cut."})
    model_dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the frozen weights: float32, bfloat16, or auto (bfloat16 where it is fast)."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter; 0 trains all weights."})
    lora_alpha: int | None = field(default=None, metadata={"help": "The adapter's scale; by default twice its rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapter."})
    saved_rank: int | None = field(
        default=None,
        metadata={
            "help": "Cut the adapter that comes out to this rank. By default it has the sum of its own and of those "
            "merged before, and loses nothing."
        },
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS),
        metadata={
            "help": "Names of the layers that are adapted, or all-linear. Where a decoder lacks one of the default, "
            "all its linear layers are."
        },
    )

    remove_unused_columns: bool = field(default=False, metadata={"help": "Not of use here: batches are packed."})
    ddp_find_unused_parameters: bool = field(
        default=False, metadata={"help": "Every adapter takes part in every step."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "No use here: such a loss stops the run."})
    include_num_input_tokens_seen: str = field(default="all", metadata={"help": "Counts tokens for the speed shown."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})

    def __post_init__(self) -> None:
        for name in ("train_file", "validation_file", "peft_model_name_or_path"):
            given = getattr(self, name)
            setattr(self, name, [each for each in ([given] if isinstance(given, str) else given) if each])
        if self.model_name_or_path is None:
            raise UserError("model_name_or_path is not given: name the decoder to train")
        if not self.train_file:
            raise UserError("train_file is not given: name the texts to train on")
        require_output(self)
        if self.max_seq_length < 2:
            raise UserError(f"max_seq_length={self.max_seq_length} leaves nothing to predict: give at least 2")
        if self.continue_adapter and not (self.peft_model_name_or_path and self.lora_r):
            raise UserError("continue_adapter=True needs an adapter: give peft_model_name_or_path, and lora_r above 0")
        if self.lora_r < 0:
            raise UserError(f"lora_r={self.lora_r} is negative: give the adapter's rank, or 0 to train all weights")
        if self.lora_r and not self.lora_target_modules:
            raise UserError("lora_target_modules is empty: name the layers to adapt, or give lora_r=0")
        require_positive("saved_rank", self.saved_rank)
        require_positive("lora_alpha", self.lora_alpha)
        require_share("lora_dropout", self.lora_dropout)
        require_choice("model_dtype", self.model_dtype, ("auto", *DTYPES))
        settle(self, self.STAGE, super().__post_init__)
        if self.n_gpu > 1:  # transformers would cut batches along their first dimension, and a packed one has no such
            self._n_gpu = 1

    @property
    def csv(self) -> Csv:
        """How csv and tsv files are read."""
        return Csv(self.csv_delimiter, self.csv_quote, self.csv_escape)

    def listing(self, *, validation: bool, number: int = 0) -> Path:
        """The file that lists the rows left out of the training or validation files, or of one of them."""
        name = "validation" if validation else "train"
        return Path(self.output_dir) / f"{name}_errors{f'-{number}' if number else ''}.jsonl"

    @property
    def seed_of_data(self) -> int:
        """What decides the order of the data and what is drawn from them."""
        return self.seed if self.data_seed is None else self.data_seed

    def encoder_settings(self) -> dict[str, Any]:
        """What `LLM2Vec` is told of the encoder that comes out."""
        return {"pooling_mode": "mean", "max_length": 512, "doc_max_length": 400}


@dataclass
class MntpArguments(StageArguments):
    """Masked next-token prediction; the defaults are the paper's for Llama."""

    STAGE: ClassVar[str] = "mntp"

    text_column: str = field(default="text", metadata={"help": "The column with the text; a.b is one inside another."})
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
        metadata={
            "help": "Each text a sequence of its own, which no other is seen from; else texts are joined and cut into "
            "max_seq_length, as the paper's are, and those of one piece attend to each other."
        },
    )

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Sequences of a step, packed into one row."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Sequences of an evaluation step."})
    max_steps: int = field(default=1000, metadata={"help": STEPS_HELP})

    def __post_init__(self) -> None:
        require_choice("data_collator_type", self.data_collator_type, MASKINGS)
        require_choice("mask_token_type", self.mask_token_type, MASK_TOKENS)
        require_share("mlm_probability", self.mlm_probability)
        if self.mlm_probability == 0:
            raise UserError("mlm_probability=0 hides no token: give a share above 0")
        super().__post_init__()


@dataclass
class EmbeddingArguments(StageArguments):
    """What the stages that compare embeddings share."""

    pooling_mode: str = field(default="mean", metadata={"help": "How a text's tokens become one embedding."})
    scale: float = field(default=20.0, metadata={"help": "Factor on the cosines, the inverse of the temperature."})
    learn_scale: bool = field(default=False, metadata={"help": "Train the scale, too; it starts at this value."})
    symmetric: bool = field(
        default=False, metadata={"help": "The mean with the loss that finds each document's query."}
    )
    query_negatives: bool = field(default=False, metadata={"help": "A query's negatives include the other queries."})
    document_negatives: bool = field(
        default=False, metadata={"help": "Its document's other queries and documents, too: with both, GTE's loss."}
    )
    false_negative_margin: float | None = field(
        default=None,
        metadata={"help": "Leave out negatives whose cosine exceeds the positive's by more; by default none."},
    )
    matryoshka_dims: list[int] = field(
        default_factory=list, metadata={"help": "Train the first so many dimensions, for each of these numbers."}
    )
    matryoshka_weights: list[float] = field(
        default_factory=list, metadata={"help": "What each of them counts in the mean; all the same by default."}
    )
    attention_dropout: float = field(default=0.0, metadata={"help": "Share of the attention weights dropped."})
    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Tokens whose activations are held at once; a larger batch is embedded in pieces, each of them "
            "twice. By default all."
        },
    )

    def __post_init__(self) -> None:
        require_choice("pooling_mode", self.pooling_mode, tuple(POOLING_MODES))
        require_share("attention_dropout", self.attention_dropout)
        if not 0 < self.scale < math.inf:
            raise UserError(f"scale={self.scale} is not a positive number: give the inverse of the temperature")
        require_positive("token_budget", self.token_budget)
        if self.symmetric and self.document_negatives:
            raise UserError(
                "symmetric and document_negatives are both true: give one, the second looks both ways itself"
            )
        if self.false_negative_margin is not None and math.isnan(self.false_negative_margin):
            raise UserError("false_negative_margin=nan is not a number: give a difference of cosines, or leave it out")
        if any(width < 1 for width in self.matryoshka_dims):
            raise UserError(f"matryoshka_dims={self.matryoshka_dims} has a number below 1: give numbers of dimensions")
        if self.matryoshka_weights and len(self.matryoshka_weights) != len(self.matryoshka_dims):
            raise UserError(
                f"matryoshka_weights has {len(self.matryoshka_weights)} numbers and matryoshka_dims "
                f"{len(self.matryoshka_dims)}: give one for each, or none"
            )
        if not all(0 < weight < math.inf for weight in self.matryoshka_weights):
            raise UserError(f"matryoshka_weights={self.matryoshka_weights} has one that is not positive: leave it out")
        require_usable_run(self)  # before numbers of it are multiplied
        self._join_accumulated()
        super().__post_init__()

    def encoder_settings(self) -> dict[str, Any]:
        """See `StageArguments`."""
        return {**super().encoder_settings(), "pooling_mode": self.pooling_mode}

    def _join_accumulated(self) -> None:
        """Batches that are accumulated are one batch: apart, texts would miss each other as negatives.

        Embedding it in pieces keeps the memory that was asked for.
        """
        if self.gradient_accumulation_steps > 1:
            if self.token_budget is None:
                self.token_budget = self.per_device_train_batch_size * self.max_seq_length
            self.per_device_train_batch_size *= self.gradient_accumulation_steps
            self.gradient_accumulation_steps = 1


@dataclass
class SimcseArguments(EmbeddingArguments):
    """Unsupervised SimCSE: a text's positive is itself under other dropout; the defaults are the paper's."""

    STAGE: ClassVar[str] = "simcse"

    text_column: str = field(default="text", metadata={"help": "The column with the text; a.b is one inside another."})
    attention_dropout: float = field(default=0.3, metadata={"help": "Share of the attention weights dropped."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a text; what is beyond is cut."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Texts of a step; each is there twice."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Texts of an evaluation step."})
    learning_rate: float = field(default=3e-5, metadata={"help": "The largest learning rate."})
    max_steps: int = field(default=1000, metadata={"help": STEPS_HELP})


@dataclass
class ContrastiveArguments(EmbeddingArguments):
    """Supervised contrastive training on pairs; the defaults are the paper's."""

    STAGE: ClassVar[str] = "contrastive"

    train_file: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Pairs to train on: files, folders and globs of jsonl, json, csv, tsv or parquet; a batch holds "
            "rows of one of them."
        },
    )
    query_column: str = field(default="query", metadata={"help": "The column with the query."})
    positive_column: str = field(
        default="positive", metadata={"help": "The column with its document, or a list of them: one is drawn an epoch."}
    )
    negative_columns: list[str] = field(
        default_factory=lambda: list(NEGATIVE_COLUMNS),
        metadata={"help": "Columns with a hard negative or a list of them; by default negative, where there is one."},
    )
    negatives: int = field(default=1, metadata={"help": "Hard negatives of a query, drawn anew in every epoch."})
    id_column: str | None = field(
        default=None,
        metadata={
            "help": "Texts of rows of the same id are no negatives for their queries; nor are those of the same query."
        },
    )
    query_instruction: list[str] = field(
        default_factory=list, metadata={"help": "Put before queries, not pooled: one for all files or one for each."}
    )
    document_instruction: list[str] = field(
        default_factory=list, metadata={"help": "Put before documents, not pooled: one for all files or one for each."}
    )
    validation_query_instruction: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The same before queries of validation files; by default query_instruction, which needs one value "
            "or as many as there are validation files."
        },
    )
    validation_document_instruction: list[str] = field(
        default_factory=list, metadata={"help": "And before their documents; by default document_instruction."}
    )

    scale: float = field(default=50.0, metadata={"help": "Factor on the cosines, the inverse of the temperature."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Queries of a step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Queries of an evaluation step."})
    learning_rate: float = field(default=2e-4, metadata={"help": "The largest learning rate."})
    warmup_steps: float = field(
        default=0.3,
        metadata={"help": "Steps in which the learning rate rises to it, or below 1 a share of all: the paper's 300."},
    )
    max_steps: int = field(default=1000, metadata={"help": STEPS_HELP})

    def __post_init__(self) -> None:
        instructions = (f"{part}{kind}_instruction" for part in ("", "validation_") for kind in ("query", "document"))
        for name in ("negative_columns", *instructions):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if self.negatives < 0:
            raise UserError(f"negatives={self.negatives} is negative: give the hard negatives of a query, or 0")
        super().__post_init__()
