"""What every stage shares: the model with its adapter, the run with its checkpoints, the encoder that comes out."""

from __future__ import annotations

import copy
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from llm2vec_fast.acceleration import accelerate
from llm2vec_fast.bidirectional import decoder_of, make_bidirectional
from llm2vec_fast.errors import UserError
from llm2vec_fast.loading import ADAPTER_WEIGHTS, SETTINGS_FILE, best_device, load
from llm2vec_fast.precision import choose_dtype
from llm2vec_fast.saving import write_json, written_beside
from llm2vec_fast.training.arguments import StageArguments
from llm2vec_fast.training.config import write_arguments

ROWS = "rows"  # the batch's sequences by their number, for messages


class NonFiniteLossError(UserError):
    """The loss is NaN or infinite: training on would destroy the weights."""


def load_causal_model(arguments: StageArguments) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The decoder with its output layer, attending both ways, its weights frozen under a new adapter."""
    set_seed(arguments.seed)  # the adapter's first weights are random
    dtype = choose_dtype(arguments.model_dtype, best_device() if not arguments.use_cpu else torch.device("cpu")).dtype
    loaded = load(
        arguments.model_name_or_path,
        arguments.peft_model_name_or_path,
        merge=True,
        dtype=dtype if arguments.lora_r else torch.float32,  # 16-bit weights are too coarse to be trained themselves
        head=True,
    )
    model = make_bidirectional(loaded.model)
    if arguments.lora_r:
        model = get_peft_model(model, lora_config(arguments))
        if arguments.gradient_checkpointing:
            model.enable_input_require_grads()
    accelerate(model)  # the loss, above all: no logits
    return model, loaded.tokenizer


def lora_config(arguments: StageArguments) -> LoraConfig:
    """The adapter of a stage; peft keeps its weights in float32 on a 16-bit base."""
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha or 2 * arguments.lora_r,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules,
        bias="none",
    )


class StageTrainer(Trainer):
    """transformers' Trainer, which stops at a loss that is not finite, before it reaches the weights."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass; ``rows`` names the batch's texts and does not go to the model.

        Raises:
            NonFiniteLossError: a checkpoint of the weights before this step is written first.
        """
        rows = inputs.pop(ROWS, None)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            self._save_checkpoint(model, trial=None)
            texts = "" if rows is None else f" on the sequences {', '.join(map(str, rows.tolist()))}"
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}{texts}: lower learning_rate="
                f"{self.args.learning_rate} or leave these out; the weights from before this step are saved"
            )
        return loss

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """A line of the log, with the memory that training took so far."""
        memory = {"peak_memory_mib": round(peak_bytes(self.args.device) / 2**20)} if "loss" in logs else {}
        super().log({**logs, **memory}, *args, **kwargs)


def run(trainer: StageTrainer, arguments: StageArguments, tokenizer: PreTrainedTokenizerBase) -> TrainOutput:
    """Train, from the last checkpoint where there is one, and write the encoder.

    Raises:
        NonFiniteLossError: see `StageTrainer`.
        UserError: the output folder cannot be written.
    """
    folder = Path(arguments.output_dir)
    try:
        if trainer.is_world_process_zero():
            write_arguments(arguments, folder)
        last = arguments.resume_from_checkpoint or get_last_checkpoint(str(folder))
        result = trainer.train(resume_from_checkpoint=last)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        if arguments.validation_file:
            trainer.save_metrics("eval", trainer.evaluate())
        save_encoder(trainer, arguments, tokenizer)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}; make room and start again, training goes on from the last "
            "checkpoint"
        ) from error
    return result


def save_encoder(trainer: Trainer, arguments: StageArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what `LLM2Vec` loads: the adapter alone, or all weights where there is none; whole or not at all."""
    weights = trainer.accelerator.get_state_dict(trainer.model)  # sharded models gather here, on every rank
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with written_beside(arguments.output_dir) as folder:
        if isinstance(model, PeftModel):
            adapter = get_peft_model_state_dict(model, state_dict=weights)
            # As an adapter of the decoder alone: that is what it is put on from now on.
            save_file(
                {key.replace("base_model.model.model.", "base_model.model."): x.cpu() for key, x in adapter.items()},
                folder / ADAPTER_WEIGHTS,
            )
            config = copy.copy(model.active_peft_config)
            config.inference_mode = True
            config.save_pretrained(str(folder))
        else:
            decoder_of(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / SETTINGS_FILE, {"pooling_mode": "mean", "max_length": 512, "doc_max_length": 400})


def peak_bytes(device: torch.device) -> int:
    """The most memory that training took so far: on the device, or of the process where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
