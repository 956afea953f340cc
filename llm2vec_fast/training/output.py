"""The encoder that comes out of a stage, as a folder that `LLM2Vec` loads."""

from __future__ import annotations

from peft import PeftModel
from safetensors.torch import save_file
from transformers import Trainer

from llm2vec_fast.loading import ADAPTER_WEIGHTS, SETTINGS_FILE
from llm2vec_fast.saving import OLD_FILES, write_json, written_beside
from llm2vec_fast.training.arguments import StageArguments
from llm2vec_fast.training.models import StageModel
from llm2vec_fast.training.written import adapter_of, whole_model


def save_encoder(trainer: Trainer, arguments: StageArguments, stage: StageModel) -> None:
    """Write what `LLM2Vec` loads, whole or not at all: all weights, or one adapter with all that the stages learned.

    Such an adapter holds what adapters merged before training added, too: it needs nothing but the base they all name.
    """
    # Sharded weights gather here, on every rank; DeepSpeed's by its engine.
    engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    weights = trainer.accelerator.get_state_dict(engine)
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with written_beside(arguments.output_dir, OLD_FILES) as folder:
        if isinstance(model, PeftModel):
            config, adapter = adapter_of(model, stage.merged, arguments.saved_rank, weights)
            save_file(adapter, folder / ADAPTER_WEIGHTS)
            config.save_pretrained(str(folder))
        else:
            whole, own = whole_model(model, weights)
            whole.save_pretrained(folder, state_dict=own)
        stage.tokenizer.save_pretrained(folder)
        write_json(folder / SETTINGS_FILE, arguments.encoder_settings())
