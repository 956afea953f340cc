"""The encoder that comes out of a stage, as a folder that `LLM2Vec` loads."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer

from llm2vec_fast.bidirectional import decoder_of
from llm2vec_fast.loading import ADAPTER_WEIGHTS, SETTINGS_FILE, adapter_weights, origin_of
from llm2vec_fast.loading.lowrank import Update, joined, scales_of, update_of_weights
from llm2vec_fast.saving import OLD_FILES, write_json, written_beside
from llm2vec_fast.training.arguments import StageArguments
from llm2vec_fast.training.embedding import LOG_SCALE
from llm2vec_fast.training.models import StageModel


def save_encoder(trainer: Trainer, arguments: StageArguments, stage: StageModel) -> None:
    """Write what `LLM2Vec` loads, whole or not at all: all weights, or one adapter with all that the stages learned.

    Such an adapter holds what adapters merged before training added, too: it needs nothing but the base they all name.
    """
    # Sharded weights gather here, on every rank; DeepSpeed's by its engine.
    whole = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    weights = trainer.accelerator.get_state_dict(whole)
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with written_beside(arguments.output_dir, OLD_FILES) as folder:
        if isinstance(model, PeftModel):
            _save_adapter(model, weights, stage.merged, arguments.saved_rank, folder)
        else:
            decoder_of(model).save_pretrained(folder, state_dict=_of_decoder(model, weights))
        stage.tokenizer.save_pretrained(folder)
        write_json(folder / SETTINGS_FILE, arguments.encoder_settings())


def _save_adapter(
    model: PeftModel, weights: Mapping[str, Tensor], merged: Sequence[Update], rank: int | None, folder: Path
) -> None:
    """As an adapter of the decoder alone: that is what it is put on from now on."""
    adapter = {
        key.replace("base_model.model.model.", "base_model.model."): x.cpu()
        for key, x in adapter_weights(model, weights=weights).items()
    }
    config = copy.copy(model.active_peft_config)
    if merged or rank is not None:
        newest = update_of_weights(adapter, scales_of(model))
        base = config.base_model_name_or_path
        config, adapter = joined([*merged, newest], decoder_of(model), rank)
        config.base_model_name_or_path = base
    save_file(adapter, folder / ADAPTER_WEIGHTS)
    origin = origin_of(model)
    config.revision = origin.decoder.commit if origin else None
    config.inference_mode = True
    decoder = type(decoder_of(model))
    config.auto_mapping = {"base_model_class": decoder.__name__, "parent_library": decoder.__module__}
    config.save_pretrained(str(folder))


def _of_decoder(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's own weights, by its own names, out of those of the model around it."""
    decoder = decoder_of(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is decoder)
    names = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    return {name: x for name, x in names.items() if name != LOG_SCALE}
