"""What SimCSE and supervised contrastive training share: embeddings of a packed batch, and the loss across ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from llm2vec_fast.bidirectional import decoder_of
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.errors import UserError
from llm2vec_fast.kernels import contrastive_loss
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.tokenization import TextTokenizer
from llm2vec_fast.training.arguments import EmbeddingArguments
from llm2vec_fast.training.embedding import LOG_SCALE, Embedded, embedding_model
from llm2vec_fast.training.models import StageModel, load_model
from llm2vec_fast.training.run import ROWS, StageTrainer, means
from llm2vec_fast.training.sampling import NextEpoch, OneSetAtATime

logger = logging.getLogger(__name__)

SCALE_FILE = "scale.safetensors"
# Of a batch: its documents' ids, further ones known to suit each query, and how many of its texts are queries.
IDS, KNOWN, QUERIES = "ids", "known", "queries"


class ContrastiveTrainer(StageTrainer):
    """A batch is a number of queries, then their documents in the same order, then hard negatives, all packed.

    The documents of every rank are negatives for the queries of every rank. The loss that is logged and the gradients
    are those of one process with all of the batch.
    """

    args: EmbeddingArguments
    _scale: Tensor | None = None  # of the last batch, where it is learned
    _told = False  # of a loss of 0

    def __init__(
        self,
        stage: StageModel,
        arguments: EmbeddingArguments,
        sizes: Sequence[int],
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        """``sizes`` are the rows of each data set in ``train_dataset``; the rest goes to transformers' Trainer.

        Raises:
            UserError: no data set fills a batch.
        """
        batch = arguments.train_batch_size * arguments.world_size
        self._sampler = OneSetAtATime(sizes, batch, arguments.seed_of_data)
        if not len(self._sampler):
            raise UserError(
                f"a batch takes {batch:,} rows and the largest training file has {max(sizes):,}: give more, or a "
                "smaller per_device_train_batch_size"
            )
        for place in self._sampler.left_out if arguments.process_index == 0 else ():
            logger.warning(
                "%s has %d rows and a batch takes %d: none of them is trained on; join it with another file, or give a "
                "smaller per_device_train_batch_size", arguments.train_file[place], sizes[place], batch,
            )  # fmt: skip
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}  # of some processes, by their ranks
        told = [x for x in (self._sampler, kwargs["train_dataset"]) if hasattr(x, "epoch")]
        super().__init__(
            stage.model, arguments, callbacks=[NextEpoch(*told), *callbacks], compute_metrics=means, **kwargs
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, None]:
        """The contrastive loss of a batch, times the number of ranks: of gradients, ranks take the mean."""
        embedded, count = self._embedded(model, inputs)
        self._scale = None if embedded.scale is None else embedded.scale.detach()
        loss = self._loss(embedded, count, inputs[IDS], inputs.get(KNOWN)) * self.args.world_size
        return (loss, None) if return_outputs else loss

    def _embedded(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Embedded, int]:
        """A batch's embeddings, and how many of them are queries'."""
        layout = SequenceLayout.from_lengths(inputs["lengths"])
        embedded = model(input_ids=inputs["input_ids"], layout=layout, skip=inputs["skip"], embed=True)
        return embedded, int(inputs[QUERIES])

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """A line of the log, with the scale where it is learned."""
        learned = {"scale": round(float(self._scale), 4)} if "loss" in logs and self._scale is not None else {}
        if logs.get("eval_loss") == 0 and self.is_world_process_zero():
            logger.warning("eval_loss is 0: no batch of the validation files leaves a query a negative")
        super().log({**logs, **learned}, *args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """See transformers' Trainer: neither is the learned scale drawn towards zero, as no bias is."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(LOG_SCALE)]

    def _get_train_sampler(self, train_dataset: Any = None) -> OneSetAtATime:
        return self._sampler

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        weights = self.model.state_dict() if state_dict is None else state_dict
        scale = [x.cpu() for name, x in weights.items() if name.endswith(LOG_SCALE)]
        if scale and self.args.should_save:  # peft keeps the adapter alone
            save_file({LOG_SCALE: scale[0]}, Path(output_dir or self.args.output_dir, SCALE_FILE))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See transformers' Trainer; a checkpoint in parts, which is not `_save`'s, gets the learned scale, too."""
        super().save_model(output_dir, _internal_call)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        scale = getattr(decoder_of(self.model), LOG_SCALE, None)
        if scale is None or plugin is None or "SHARDED_STATE_DICT" not in str(plugin.state_dict_type):
            return
        whole = scale.full_tensor() if isinstance(scale, DTensor) else scale  # which takes every process
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({LOG_SCALE: whole.detach().cpu()}, folder / SCALE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_scale(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_scale(self.state.best_model_checkpoint)

    def _load_scale(self, checkpoint: str, model: nn.Module | None = None) -> None:
        scale = getattr(decoder_of(self.model if model is None else model), LOG_SCALE, None)
        if scale is None:
            return
        path = Path(checkpoint, SCALE_FILE)
        if not path.is_file():
            raise UserError(
                f"{checkpoint} has no {SCALE_FILE}, and learn_scale=True goes on from the scale in it: name a "
                "checkpoint that has one, or give learn_scale=False"
            )
        _write(scale, load_file(path)[LOG_SCALE])

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass; see `StageTrainer`. Returns the loss of all ranks' batch."""
        loss = super().training_step(model, inputs, *args, **kwargs) / self.args.world_size
        if not self._told and self.is_world_process_zero() and not loss:  # which others have waited for already
            self._told = True
            logger.warning(
                "step %d teaches nothing, its loss is 0: its batch leaves no query a negative, for documents known to "
                "suit a query and those above false_negative_margin are none; further such steps are not told",
                self.state.global_step + 1,
            )
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, dict[str, Tensor], Tensor]:
        """The loss of a batch of all processes times this one's queries, and their number."""
        inputs = self._prepare_inputs({name: x for name, x in inputs.items() if name != ROWS})
        with torch.no_grad(), self.compute_loss_context_manager():
            embedded, count = self._embedded(model, inputs)
            group = self._with_rows(count)
            loss = (
                self._loss(embedded, count, inputs[IDS], inputs.get(KNOWN), group)
                if count
                else embedded.rows.new_zeros(())
            )
        queries = torch.tensor([count], device=loss.device)
        return None, {"loss": loss * queries}, queries

    def _with_rows(self, count: int) -> dist.ProcessGroup | None:
        """The processes that have rows of an evaluation batch, of which this one has ``count``; None for all."""
        counts = self.accelerator.gather(torch.tensor([count], device=self.args.device))
        ranks = tuple(counts.nonzero().flatten().tolist())
        if len(ranks) == self.args.world_size:
            return None
        if ranks not in self._groups:
            self._groups[ranks] = dist.new_group(ranks)
        return self._groups[ranks]

    def _loss(
        self,
        embedded: Embedded,
        count: int,
        ids: Tensor,
        known: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """The mean over the Matryoshka widths by their weights; over the whole width if there are none. ``group`` are
        the processes that have rows of the batch, all by default."""
        group = group or (dist.group.WORLD if self.args.world_size > 1 else None)
        widths = self.args.matryoshka_dims or [embedded.rows.shape[1]]
        weights = self.args.matryoshka_weights or [1.0] * len(widths)
        losses = [
            contrastive_loss(
                embedded.rows[:count, :width], embedded.rows[count:, :width],
                scale=self.args.scale if embedded.scale is None else embedded.scale, ids=ids, known=known,
                symmetric=self.args.symmetric, query_negatives=self.args.query_negatives,
                document_negatives=self.args.document_negatives,
                false_negative_margin=self.args.false_negative_margin,
                group=group,
            )
            for width in widths
        ]  # fmt: skip
        return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)


def _write(parameter: Tensor, values: Tensor) -> None:
    """Put values into a parameter, which may be sharded over processes."""
    values = values.to(parameter.device)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        parameter.copy_(values)


def load_embedding_model(arguments: EmbeddingArguments) -> tuple[StageModel, TextTokenizer]:
    """The decoder of a contrastive stage, which returns embeddings, and what makes its batches' tokens.

    Raises:
        UserError: see `load_model`; or the model is narrower than a Matryoshka width, or has no attention dropout.
    """
    stage = load_model(arguments, head=False)
    encoder = LLM2Vec(
        stage.model, stage.tokenizer, arguments.pooling_mode, arguments.max_seq_length, arguments.max_seq_length,
        checkpoint=stage.checkpoint,
    )  # fmt: skip
    _require_width(arguments.matryoshka_dims, encoder.dimension)
    _set_attention_dropout(decoder_of(stage.model), arguments.attention_dropout)
    scale = arguments.scale if arguments.learn_scale else None
    embedding_model(stage.model, arguments.pooling_mode, arguments.token_budget, scale)
    return stage, encoder.text_tokenizer()


def _require_width(widths: Sequence[int], dimension: int) -> None:
    for width in widths:
        if width > dimension:
            raise UserError(f"matryoshka_dims has {width} and the model has {dimension} dimensions: give no more")


def _set_attention_dropout(decoder: nn.Module, probability: float) -> None:
    """Of the layers as they are, not of the configuration: what is saved is not for training."""
    layers = [module for module in decoder.modules() if hasattr(module, "attention_dropout")]
    if probability and not layers:
        raise UserError(
            f"attention_dropout={probability} has no place in {type(decoder).__name__}: give 0 and raise lora_dropout"
        )
    for layer in layers:
        layer.attention_dropout = probability
