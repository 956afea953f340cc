"""What each stage makes of each of transformers' TrainingArguments, as data.

`checks.judge` refuses and warns by it, and the training guide's tables show it (``python -m
llm2vec_fast.training.settings``). A new setting of transformers gets its line here once it was tried in every stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

MNTP, SIMCSE, CONTRASTIVE, WORD_LEVEL = STAGES = ("mntp", "simcse", "contrastive", "word-level")
# What `trainer.evaluate` of each stage returns that a best checkpoint can be chosen by.
METRICS = {MNTP: ("loss", "accuracy"), SIMCSE: ("loss",), CONTRASTIVE: ("loss",), WORD_LEVEL: ("loss",)}


class Kind(Enum):
    """What happens to a setting that is given."""

    HONOURED = "honoured"  # it does what transformers documents
    REFUSED = "refused"  # an error names it before anything is loaded
    NO_EFFECT = "no effect"  # a warning at the start says so


@dataclass(frozen=True)
class Verdict:
    """What a stage makes of a setting.

    Attributes:
        kind: see `Kind`.
        note: why, and what to do instead; or what to know of a setting that is honoured.
        passes: values beside the stage's default that are honoured all the same.
        needs: settings without any of which this one does nothing.
    """

    kind: Kind
    note: str = ""
    passes: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()


def _honoured(note: str = "", *needs: str) -> dict[str, Verdict]:
    return dict.fromkeys(STAGES, Verdict(Kind.HONOURED, note, needs=needs))


def _refused(note: str, *stages: str, passes: tuple[Any, ...] = ()) -> dict[str, Verdict]:
    return dict.fromkeys(stages or STAGES, Verdict(Kind.REFUSED, note, passes))


def _no_effect(note: str, *stages: str) -> dict[str, Verdict]:
    return dict.fromkeys(stages or STAGES, Verdict(Kind.NO_EFFECT, note))


_HEAD = "what trains is one linear layer on outputs that are computed once: leave it out"
_SAMPLER = "batches of one data set are drawn by a sampler of the stage's own: leave it out"
_WHOLE_BATCH = "the loss is of the batch of all processes in any case"
_SEVERAL = "with several processes"
_NEGATIVES = "a smaller batch has fewer negatives: give token_budget, which bounds memory at any batch size"
_REENTRANT = "over several processes use_reentrant does not go with token_budget or ddp_find_unused_parameters: refused"
_HUB = "nothing is pushed: upload output_dir when the run is done"
_EVALUATES = "validation_file"

VERDICTS: dict[str, dict[str, Verdict]] = {
    "output_dir": _honoured("required"),
    # How long, at which rate, by which optimizer
    "per_device_train_batch_size": _honoured("sequences, texts, queries or words of a step of one process"),
    "num_train_epochs": _honoured(),
    "max_steps": _honoured(),
    "learning_rate": _honoured("a run may go on at another"),
    "lr_scheduler_type": _honoured("those that watch a metric need validation_file and eval_strategy"),
    "lr_scheduler_kwargs": _honoured(),
    "warmup_steps": _honoured("below 1 a share of the run; a warning where the run ends before it does"),
    "warmup_ratio": _honoured("older transformers: sets warmup_steps"),
    "optim": _honoured("one whose package is missing is refused"),
    "optim_args": _honoured("a warning where the optimizer reads none of them"),
    "optim_target_modules": _honoured("a warning where the optimizer does not read it"),
    "weight_decay": _honoured("not on biases, norms and a learned scale"),
    "adam_beta1": _honoured("a warning where the optimizer does not read it"),
    "adam_beta2": _honoured("a warning where the optimizer does not read it"),
    "adam_epsilon": _honoured("a warning where the optimizer does not read it"),
    "max_grad_norm": _honoured(),
    "gradient_accumulation_steps": _honoured("simcse and contrastive join the batches, so that negatives meet"),
    "average_tokens_across_devices": {
        **_honoured(_SEVERAL),
        **_no_effect(_WHOLE_BATCH, SIMCSE, CONTRASTIVE),
    },
    "label_smoothing_factor": {
        **_honoured("in training, from all logits; eval_loss is without"),
        **_refused("a loss over documents has no classes to smooth: leave it out", SIMCSE, CONTRASTIVE),
        **_refused("the head is trained on the labels as they are: leave it out", WORD_LEVEL),
    },
    "neftune_noise_alpha": {
        **_honoured("each sequence by its own length, as if it were alone"),
        **_refused(_HEAD, WORD_LEVEL),
    },
    # Precision and memory
    "bf16": _honoured("autocast; model_dtype is the dtype of frozen weights"),
    "fp16": _honoured("autocast with a scaled loss; refused on a CPU, which has none"),
    "bf16_full_eval": {
        **_honoured("the evaluation after training", _EVALUATES),
        **_refused("the head is small and float32: leave it out", WORD_LEVEL),
    },
    "fp16_full_eval": {
        **_honoured("the evaluation after training; refused on a CPU", _EVALUATES),
        **_refused("the head is small and float32: leave it out", WORD_LEVEL),
    },
    "tf32": _honoured("refused where there is none"),
    "activation_checkpointing": {**_honoured(), **_refused(_HEAD, WORD_LEVEL)},
    "activation_checkpointing_kwargs": {
        **_honoured(_REENTRANT, "activation_checkpointing", "gradient_checkpointing"),
        **_refused(_HEAD, WORD_LEVEL),
    },
    "gradient_checkpointing": {
        **_honoured("the older name of activation_checkpointing"),
        **_refused(_HEAD, WORD_LEVEL),
    },
    "gradient_checkpointing_kwargs": {
        **_honoured(_REENTRANT, "activation_checkpointing", "gradient_checkpointing"),
        **_refused(_HEAD, WORD_LEVEL),
    },
    "torch_compile": _honoured("the operations are fused without it; a batch of a new size compiles again"),
    "torch_compile_backend": _honoured("switches torch_compile on"),
    "torch_compile_mode": _honoured("switches torch_compile on"),
    "use_liger_kernel": _refused("this library's own operations stand in those places: leave it out"),
    "liger_kernel_config": _refused("this library's own operations stand in those places: leave it out"),
    "use_cache": _refused("an encoder has no use for a cache: leave it out"),
    "torch_empty_cache_steps": _honoured("on a GPU"),
    "auto_find_batch_size": {
        **_honoured("trains from the start again, as transformers does"),
        **_refused(_NEGATIVES, SIMCSE, CONTRASTIVE),
    },
    # What is told
    "logging_strategy": _honoured(),
    "logging_steps": _honoured(),
    "logging_first_step": _honoured(),
    "logging_dir": _honoured("older transformers: where TensorBoard writes"),
    "log_on_each_node": _honoured(),
    "logging_nan_inf_filter": _no_effect("in training a loss that is not finite stops the run"),
    "include_num_input_tokens_seen": {
        **_honoured("there is no padding: all is non_padding"),
        **_no_effect("words are counted: see train_words_per_second", WORD_LEVEL),
    },
    "log_level": _honoured("of transformers' own messages"),
    "log_level_replica": _honoured("of transformers' own messages"),
    "disable_tqdm": _honoured(),
    "report_to": _honoured("one whose package is missing is refused"),
    "run_name": _honoured("", "report_to"),
    "project": _honoured("", "report_to"),
    "trackio_space_id": _honoured("", "report_to"),
    "trackio_bucket_id": _honoured("", "report_to"),
    "trackio_static_space_id": _honoured("", "report_to"),
    "skip_memory_metrics": _honoured("peak_memory_mib is told in any case"),
    "debug": _honoured(),
    # Evaluation
    "eval_strategy": _honoured("refused without validation_file"),
    "eval_steps": _honoured("", "eval_strategy"),
    "eval_delay": _honoured("", "eval_strategy"),
    "eval_on_start": _honoured("refused without validation_file"),
    "per_device_eval_batch_size": _honoured(),
    "eval_accumulation_steps": _honoured("", _EVALUATES),
    "prediction_loss_only": _no_effect("an evaluation holds no more than counts and losses, or a label a word"),
    "include_for_metrics": _refused("metrics are the stage's own and take no more: leave it out"),
    "batch_eval_metrics": _refused("metrics are summed over all batches: leave it out"),
    "eval_do_concat_batches": _refused("metrics are summed over all batches: leave it out"),
    "eval_use_gather_object": _refused("an evaluation gathers tensors alone: leave it out"),
    "label_names": _no_effect("batches are the stage's own"),
    # Checkpoints
    "save_strategy": _honoured("best needs validation_file, eval_strategy and metric_for_best_model"),
    "save_steps": _honoured(),
    "save_total_limit": _honoured(),
    "save_on_each_node": _honoured("checkpoints; the encoder is written by the first process"),
    "save_only_model": _honoured("no run goes on from such a checkpoint"),
    "enable_jit_checkpoint": _honoured("the signal ends the run with a checkpoint; the same command goes on"),
    "load_best_model_at_end": _honoured("refused without validation_file and eval_strategy"),
    "metric_for_best_model": _honoured("; ".join(f"{stage}: {', '.join(names)}" for stage, names in METRICS.items())),
    "greater_is_better": _honoured(),
    "resume_from_checkpoint": _honoured("by itself a run goes on from the last in output_dir"),
    "ignore_data_skip": _honoured(),
    "restore_callback_states_from_checkpoint": _honoured(),
    "push_to_hub": _refused("checkpoints would be pushed, and not the encoder: upload output_dir when the run is done"),
    "hub_model_id": _no_effect(_HUB),
    "hub_strategy": _no_effect(_HUB),
    "hub_token": _no_effect(_HUB),
    "hub_private_repo": _no_effect(_HUB),
    "hub_always_push": _no_effect(_HUB),
    "hub_revision": _no_effect(_HUB),
    # Data
    "seed": _honoured(),
    "data_seed": _honoured("order and draws of the data; seed without it"),
    "full_determinism": _honoured(),
    "dataloader_drop_last": {
        **_honoured("in training; an evaluation counts every row"),
        **_no_effect("batches are whole in training, and an evaluation counts every row", SIMCSE, CONTRASTIVE),
    },
    "dataloader_num_workers": _honoured(),
    "dataloader_pin_memory": _honoured("off on a CPU"),
    "dataloader_persistent_workers": _honoured("refused without dataloader_num_workers"),
    "dataloader_prefetch_factor": _honoured("refused without dataloader_num_workers"),
    "dataloader_multiprocessing_context": _honoured("refused without dataloader_num_workers"),
    "dataloader_in_order": _honoured("a run with False cannot be repeated", "dataloader_num_workers"),
    "remove_unused_columns": _refused("collators read columns that no model takes: leave it out"),
    "train_sampling_strategy": {
        **_honoured("without padding, grouping by length has no gain"),
        **_refused(_SAMPLER, SIMCSE, CONTRASTIVE),
        **_refused("words have no length: give random or sequential", WORD_LEVEL, passes=("sequential",)),
    },
    "length_column_name": _no_effect("lengths are counted in tokens"),
    # Machines
    "use_cpu": _honoured("set where there is no accelerator"),
    "local_rank": _honoured("a launcher sets it"),
    "accelerator_config": _honoured(
        "split_batches, dispatch_batches, even_batches=False and num_steps change batches and are refused"
    ),
    "parallelism_config": _refused(
        "a packed batch is one row, which only data parallelism and fsdp take whole: leave it out"
    ),
    "ddp_find_unused_parameters": _honoured(_SEVERAL),
    "ddp_bucket_cap_mb": _honoured(_SEVERAL),
    "ddp_broadcast_buffers": _honoured(_SEVERAL),
    "ddp_static_graph": _honoured(_SEVERAL),
    "ddp_backend": _honoured("refused with one process"),
    "ddp_timeout": _honoured(_SEVERAL),
    "fsdp": {**_honoured("refused with one process"), **_refused(_HEAD, WORD_LEVEL)},
    "fsdp_config": _honoured("", "fsdp"),
    "deepspeed": {**_honoured(), **_refused(_HEAD, WORD_LEVEL)},
    # What a stage does by itself
    "do_train": _honoured("a stage trains"),
    "do_eval": _honoured("a stage evaluates", _EVALUATES),
    "do_predict": _no_effect("test_file of word-level is what is predicted"),
}
