"""What every stage shares: the run with its checkpoints, the log, and the stop where the loss is not finite."""

from __future__ import annotations

import json
import logging
import math
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from llm2vec_fast.errors import UserError
from llm2vec_fast.loading import ADAPTER_CONFIG, origin_of, write_below
from llm2vec_fast.training.arguments import StageArguments
from llm2vec_fast.training.checkpoints import complete, last_checkpoint, told_if_unwritable, whole_or_gone
from llm2vec_fast.training.config import write_arguments
from llm2vec_fast.training.models import StageModel
from llm2vec_fast.training.output import save_encoder
from llm2vec_fast.training.resuming import checkpoint_to_resume, is_done, is_sharded
from llm2vec_fast.training.sampling import EverySetOnce, without_repeats
from llm2vec_fast.training.settings.checks import tell_of_warmup

logger = logging.getLogger(__name__)

ROWS = "rows"  # the batch's sequences by their number, for messages


class NonFiniteLossError(UserError):
    """The loss is NaN or infinite: training on would destroy the weights."""


class StageTrainer(Trainer):
    """transformers' Trainer, which stops at a loss that is not finite, and whose checkpoints are whole.

    In training and in evaluation every row counts once, however many processes share the rows. A stage's evaluation
    step returns sums, (1,) each, by name, and in place of labels of how many items they are: see `means`.
    """

    unit = "sequences"  # what ``rows`` of a batch are the numbers of

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.neftune_noise_alpha = None  # it is in the model; transformers' own takes a packed batch for one sequence

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> LRScheduler:
        """See transformers' Trainer; tells where the learning rate will not become what was asked for."""
        tell_of_warmup(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As transformers makes it, but no row comes twice: accelerate would fill the last batches up with rows.

        Raises:
            UserError: ``dataloader_drop_last`` leaves no batch.
        """
        loader = without_repeats(self._drawing_apart(super().get_train_dataloader()))
        if not len(loader):
            raise UserError(
                f"dataloader_drop_last=True leaves no step: a batch takes {self.args.train_batch_size} {self.unit} in "
                f"each of {self.args.world_size} processes, and there are {len(self.train_dataset):,}; give more, a "
                "smaller per_device_train_batch_size, or dataloader_drop_last=False"
            )
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """See transformers' Trainer."""
        return self._drawing_apart(super().get_eval_dataloader(eval_dataset))

    def _drawing_apart(self, loader: DataLoader) -> DataLoader:
        """Workers that persist get their seed once a run, and again when it goes on: that must not move dropout's."""
        if self.args.dataloader_persistent_workers:
            inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
            inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _get_eval_sampler(self, eval_dataset: Dataset) -> EverySetOnce:
        sizes = getattr(eval_dataset, "sizes", None) or [len(eval_dataset)]
        return EverySetOnce(sizes, self.args.eval_batch_size * self.args.world_size)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers' Trainer."""
        self.gather_function = self.accelerator.gather  # its own would cut off what it takes for repeated rows
        return super().evaluation_loop(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass; ``rows`` names the batch's texts and does not go to the model.

        Raises:
            NonFiniteLossError: in every process, whichever of them has the loss. A checkpoint of the weights before
                this step is written first, unless there is one or they are not finite themselves.
        """
        rows = inputs.pop(ROWS, None)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self._everywhere(bool(torch.isfinite(loss))):
            kept = self._kept(model)
            own = "" if rows is None else f" on the {self.unit} {', '.join(map(str, rows.tolist()))}"
            place = own if not torch.isfinite(loss) else " here and is not finite in another process"
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}{place}: lower learning_rate="
                f"{self.args.learning_rate} or leave these out; {kept}"
            )
        return loss

    def _kept(self, model: nn.Module) -> str:
        """Save the weights where that is of use; what the same command will go on from."""
        folder = self._checkpoint_folder()
        there = last_checkpoint(folder.parent) == str(folder)
        weights = (x for x in model.parameters() if x.requires_grad)
        if not self._everywhere(all(bool(torch.isfinite(x.detach()).all()) for x in weights)):
            before = last_checkpoint(folder.parent)
            kept = f"{Path(before).name} is the last good checkpoint" if before else "there is no earlier checkpoint"
            return f"the weights before this step are not finite either and are not saved, {kept}"
        if not there:
            self._save_checkpoint(model, trial=None)
        return "the weights from before this step are saved"

    def _everywhere(self, here: bool) -> bool:
        """Whether it is so in every process; one that stopped alone would leave the others waiting or training on."""
        return bool(self.accelerator.gather(torch.tensor([int(here)], device=self.args.device)).min())

    def _checkpoint_folder(self) -> Path:
        return Path(self._get_output_dir(trial=None), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """A line of the log, with the memory that training took so far."""
        super().log({**logs, **(self._memory() if "loss" in logs else {})}, *args, **kwargs)

    def save_training_metrics(self, metrics: dict[str, float]) -> None:
        """What training came to, with the speed of the last line of the log and the peak of memory."""
        last = next((line for line in reversed(self.state.log_history) if "loss" in line), {})
        speed = {name: value for name, value in last.items() if name.endswith("_per_second")}
        self.save_metrics("train", {**metrics, **speed, **self._memory()})

    def _memory(self) -> dict[str, float]:
        return {"peak_memory_mib": round(peak_bytes(self.args.device) / 2**20)}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, state = self._checkpoint_folder(), self.state
        # transformers calls it when all else is written, and removes older checkpoints after that.
        state.save_to_json = lambda _: complete(folder, partial(TrainerState.save_to_json, state))
        try:
            with whole_or_gone(folder):
                super()._save_checkpoint(model, trial)
        finally:
            del state.save_to_json

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        origin = origin_of(self.model) if (folder / ADAPTER_CONFIG).exists() else None
        if origin is not None and origin.merged:  # it is None of a model that the caller made, too
            write_below(folder, origin.merged)  # the adapter alone lacks what they added

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # every process's part is there before the state completes the checkpoint

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and hasattr(self.lr_scheduler, "base_lrs"):
            self._take_learning_rate()

    def _take_learning_rate(self) -> None:
        """Go on at the learning rate that is asked for, where the checkpoint was made at another."""
        scheduler, asked = self.lr_scheduler, self.args.learning_rate
        if set(scheduler.base_lrs) == {asked}:
            return
        if self.is_world_process_zero():
            logger.warning("goes on at learning_rate=%g; the checkpoint was made at %g", asked, scheduler.base_lrs[0])
        for group, before in zip(self.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] *= asked / before if before else 1.0
            group["initial_lr"] = asked
        scheduler.base_lrs = [asked] * len(scheduler.base_lrs)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what the log tells


def means(batches: EvalPrediction) -> dict[str, float]:
    """Mean of each sum that an evaluation step returns, over all items of all batches and processes; NaN of none."""
    count = float(batches.label_ids.sum(dtype=np.float64)) or math.nan
    return {name: float(x.sum(dtype=np.float64)) / count for name, x in batches.predictions.items()}


def run(trainer: StageTrainer, arguments: StageArguments, stage: StageModel) -> TrainOutput:
    """Train, from the last whole checkpoint where there is one, and write the encoder.

    Raises:
        NonFiniteLossError: see `StageTrainer`.
        UserError: the output folder cannot be written, or is another run's.
    """
    folder = Path(arguments.output_dir)
    with told_if_unwritable(folder):
        last = checkpoint_to_resume(arguments)
        if trainer.is_world_process_zero():
            write_arguments(arguments, folder)
        _tell_of_sharding(trainer)
        result = trained(trainer, arguments, last)
        save_encoder(trainer, arguments, stage)  # first: with bf16_full_eval evaluation rounds the weights in place
        if arguments.validation_file:
            scores = trainer.evaluate()
            trainer.save_metrics("eval", scores)
            result = result._replace(metrics={**result.metrics, **scores})
    return result


def trained(trainer: StageTrainer, arguments: StageArguments, last: str | None) -> TrainOutput:
    """Train from a checkpoint on, or from the beginning; or take the run that the checkpoint is the end of."""
    if last is not None and is_done(arguments, last):
        return _trained_before(trainer, last)
    if last is not None and trainer.is_world_process_zero():
        logger.warning("goes on from %s", last)
    result = trainer.train(resume_from_checkpoint=last)
    if callable(getattr(trainer.optimizer, "eval", None)):
        trainer.optimizer.eval()  # a schedule-free one gives the weights that it came to, not those it steps from
    trainer.save_training_metrics(result.metrics)
    trainer.save_state()
    return result


def _trained_before(trainer: StageTrainer, last: str) -> TrainOutput:
    """What the run came to that a checkpoint is the end of: transformers would train another step, and tell of that."""
    trainer.state = TrainerState.load_from_json(str(Path(last, TRAINER_STATE_NAME)))
    if trainer.is_world_process_zero():
        logger.warning("%s is the end of this run: nothing is trained", last)
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    if is_sharded(trainer.args):
        _load_sharded(trainer, best or last)
    else:
        trainer._load_from_checkpoint(best or last)
    kept = Path(trainer.args.output_dir, "train_results.json")
    metrics = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    return TrainOutput(trainer.state.global_step, metrics.get("train_loss", math.nan), metrics)


class _Loaded(Exception):  # noqa: N818 - it is none
    """Weights are loaded, and no step is taken yet."""


class _StopOnceLoaded(TrainerCallback):
    def on_train_begin(self, *_: Any, **__: Any) -> None:
        raise _Loaded


def _load_sharded(trainer: StageTrainer, checkpoint: str) -> None:
    """Load weights in parts, which transformers does for training alone."""
    trainer.add_callback(_StopOnceLoaded)
    with suppress(_Loaded):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.remove_callback(_StopOnceLoaded)
    trainer.is_in_train = False


def _tell_of_sharding(trainer: StageTrainer) -> None:
    if (
        trainer.args.fsdp
        and trainer.is_world_process_zero()
        and trainer.accelerator.distributed_type != DistributedType.FSDP
    ):
        logger.warning(
            "fsdp shards nothing here: accelerate does so over two GPUs or more; each process has all weights"
        )


def peak_bytes(device: torch.device) -> int:
    """The most memory that training took so far: on the device, or of the process where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows, where there is no module resource
        return memory.peak_wset
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
