"""LLM2Vec: a pretrained decoder as a text encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .bidirectional import decoder_of, make_bidirectional, require_packed_attention, runs_our_attention
from .engine.cores import usable_threads
from .engine.describe import describe
from .engine.locks import ModelLock, lock_of
from .engine.network import Network, device_of, hidden_states, pooled
from .engine.plan import default_token_budget
from .engine.prepare import prepare
from .engine.replica import Replica
from .engine.request import (
    OnBatch,
    OnProblem,
    Request,
    TokenEmbeddings,
    as_asked,
    checked_device,
    checked_width,
    one_of,
    warn_of_batch_size,
)
from .engine.stream import Task, encode_pairs, progress
from .features import left_padded, padding_token, unpacked
from .kernels.layout import SequenceLayout
from .kernels.pooling import POOLING_MODES
from .loading import CAUSAL, ENCODER_SETTINGS, load, placement
from .positions import within_positions
from .precision import choose_dtype
from .prompts import CHECKPOINTS, as_pairs, find_template
from .saving import OLD_FILES, merge, write_encoder, written_beside
from .tokenization import TextTokenizer, backend_of


class LLM2Vec(nn.Module):
    """A decoder that embeds texts. `from_pretrained` makes one, `encode` uses it.

    Args:
        model: a transformers decoder, bare, with a head or in a peft model. It keeps the direction its configuration
            states (``is_causal``); call `make_bidirectional` first, or use `from_pretrained`.
        tokenizer: its fast tokenizer. A padding token is not needed.
        pooling_mode: "mean", "weighted_mean", "mean_sqrt_len", "max", "eos_token", "last_token" or "bos_token".
        max_length: tokens of a text, prompt included; what is beyond is cut. A model with a table of fewer positions
            (GPT-2, OPT) cuts there, with a warning.
        doc_max_length: tokens of a text without its prompt; words beyond are dropped.
        skip_instruction: leave the prompt's tokens (instruction, chat opening, and the begin token before them) out of
            the pooling. A text without a prompt is pooled whole. "bos_token" pools the first token in any case.
        checkpoint: the name the model was published under, by which its chat template is found.
        token_budget: tokens of a forward pass; by default chosen from the device.
        accelerate: run fused operations while encoding.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        pooling_mode: str = "mean",
        max_length: int = 512,
        doc_max_length: int = 400,
        skip_instruction: bool = True,
        *,
        checkpoint: str | None = None,
        token_budget: int | None = None,
        accelerate: bool = True,
    ) -> None:
        super().__init__()
        decoder = decoder_of(model)
        self.training = model.training
        if pooling_mode not in POOLING_MODES:
            raise ValueError(f"pooling_mode={pooling_mode!r} is unknown: choose one of {', '.join(POOLING_MODES)}")
        if not runs_our_attention(decoder):  # any other would look across the texts of a packed batch
            make_bidirectional(model, enabled=not getattr(decoder.config, "is_causal", True))
        self.model = model
        self.tokenizer = tokenizer
        self.config = model.config
        self.pooling_mode = pooling_mode
        self.max_length = max_length
        self.doc_max_length = doc_max_length
        self.skip_instruction = skip_instruction
        self.checkpoint = checkpoint or str(getattr(decoder.config, "_name_or_path", ""))
        self._token_budget = token_budget
        self.accelerate = accelerate
        self._replica: Replica | None = None
        self.text_tokenizer()  # refuses unusable settings now, not at the first text

    @classmethod
    def from_pretrained(
        cls,
        base_model_name_or_path: str | Path,
        peft_model_name_or_path: str | Path | None = None,
        merge_peft: bool = False,
        enable_bidirectional: bool | None = None,
        *,
        pooling_mode: str | None = None,
        max_length: int | None = None,
        doc_max_length: int | None = None,
        skip_instruction: bool | None = None,
        dtype: str | torch.dtype | None = "auto",
        device: str | torch.device | None = None,
        token_budget: int | None = None,
        accelerate: bool = True,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> LLM2Vec:
        """Load a decoder as an encoder.

        Args:
            base_model_name_or_path: a model folder, hub name or GGUF file, or an adapter's folder or hub name (which
                names its base and is merged into it).
            peft_model_name_or_path: an adapter to put on top.
            merge_peft: merge it into the weights: faster to run, no longer separate.
            enable_bidirectional: False keeps the decoder causal. By default what the folder's llm2vec_config.json says,
                else True.
            pooling_mode, max_length, doc_max_length, skip_instruction: see the class. What is not given is read from
                the folder's llm2vec_config.json, else has the class's default.
            dtype: a dtype or its name; "auto" is bfloat16 where the device is fast in it, else float32.
            device: by default the accelerator if there is one, else the CPU.
            token_budget, accelerate: see the class.
            trust_remote_code: run code that comes with the checkpoint. Off unless asked for.
            kwargs: those of `loading.HubOptions` (revision, adapter_revision, token, cache_dir …) for every file that
                is read; ``gguf_file``, of the folder or repository; ``device_map``, one device or a way to spread the
                model over several; ``torch_dtype``, as ``dtype``. Others go to ``AutoModel.from_pretrained``.

        Raises:
            ModelLoadError: something is missing, damaged, or stored as pickle; the message says what.
            UnsupportedModelError: the architecture cannot attend both ways.
            UserError: there is no such device.
        """
        dtype = kwargs.pop("torch_dtype", dtype)
        device, spread = placement(device, kwargs.pop("device_map", None))
        loaded = load(
            base_model_name_or_path,
            peft_model_name_or_path,
            merge=merge_peft,
            dtype=choose_dtype(dtype, device).dtype,
            trust_remote_code=trust_remote_code,
            **kwargs,
            **spread,
        )
        saved = loaded.settings.pop(CAUSAL, True)
        make_bidirectional(loaded.model, enabled=saved if enable_bidirectional is None else enable_bidirectional)
        values = (pooling_mode, max_length, doc_max_length, skip_instruction)
        given = {name: value for name, value in zip(ENCODER_SETTINGS, values, strict=True) if value is not None}
        return cls(
            loaded.model if spread else loaded.model.to(device),
            loaded.tokenizer,
            **{**loaded.settings, **given},
            checkpoint=loaded.checkpoint,
            token_budget=token_budget,
            accelerate=accelerate,
        ).eval()

    @property
    def dimension(self) -> int:
        """Columns of an embedding."""
        return decoder_of(self.model).config.hidden_size

    @property
    def device(self) -> torch.device:
        """Where texts are embedded."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in; embeddings are float32 in any case."""
        return decoder_of(self.model).get_input_embeddings().weight.dtype

    @property
    def token_budget(self) -> int:
        """Tokens of a forward pass: what was asked for, else what suits the device."""
        return self._token_budget or default_token_budget(self.device)

    @token_budget.setter
    def token_budget(self, value: int | None) -> None:
        self._token_budget = value

    def train(self, mode: bool = True) -> LLM2Vec:
        """Switch between training and use of `forward`; `encode` needs no switch. Going into training frees memory."""
        if mode and not self.training:
            self._replica = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LLM2Vec:
        """Behind to(), float(), cuda() and the like: waits until no `encode` runs in another thread."""
        with self._lock.change("to()"):
            self._replica = None
            return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_replica": None}

    def forward(
        self, input_ids: Tensor | Mapping[str, Tensor], layout: SequenceLayout | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """Embed token ids, differentiably.

        Args:
            input_ids: (1, T) ids of N packed sequences, or (B, S) padded ones, with their ``layout``; or what
                `tokenize` returns: a mapping with ``input_ids`` (B, S), ``attention_mask`` and perhaps ``embed_mask``,
                whose ones mark, from the end of each text, the tokens to pool.
            layout: the sequences; by default every row of ``input_ids`` is one.
            skip: (N,) leading tokens of each sequence that pooling leaves out.

        Returns:
            (N, d), float32.
        """
        if isinstance(input_ids, Mapping):
            input_ids, layout, skip = unpacked(input_ids)
            skip = skip if self.skip_instruction else None
        elif layout is None:
            layout = SequenceLayout.from_shape(*input_ids.shape, device=input_ids.device)
        return self.pool(self.hidden_states(input_ids, layout), layout, skip)

    def hidden_states(self, input_ids: Tensor, layout: SequenceLayout) -> Tensor:
        """Last hidden state (rows, d) of ids (B, S), or of a packed (1, T)."""
        return hidden_states(self.model, input_ids, layout)

    def pool(self, hidden: Tensor, layout: SequenceLayout, skip: Tensor | None = None) -> Tensor:
        """Pool token rows (rows, d) into (N, d) by this encoder's mode."""
        return pooled(hidden, layout, self.pooling_mode, skip)

    def text_tokenizer(self) -> TextTokenizer:
        """What turns (instruction, text) pairs into ids, by the settings as they are now."""
        backend = backend_of(self.tokenizer)
        template = find_template(
            self.checkpoint,
            self.config.model_type,
            self.pooling_mode,
            self.tokenizer.eos_token,
            lambda token: backend.token_to_id(token) is not None,
        )
        max_length = within_positions(self.model, self.max_length)
        return TextTokenizer(self.tokenizer, template, max_length, self.doc_max_length)

    def tokenize(self, texts: Sequence[str | Sequence[str]]) -> dict[str, Tensor]:
        """Left-padded ids of strings or [instruction, text] pairs, for `forward`.

        Returns:
            ``input_ids``, ``attention_mask`` and ``embed_mask`` (ones on the text, zeros on its prompt), (B, S) int64.

        Raises:
            UserError: an instruction fills all of ``max_length``.
        """
        tokens = prepare(self.text_tokenizer(), as_pairs(texts), 0, offsets=False, skip_prompt=True)
        return left_padded(tokens, padding_token(self.tokenizer, decoder_of(self.model)))

    def encode(
        self,
        sentences: str | Sequence[str | Sequence[str]],
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        convert_to_numpy: bool = False,
        convert_to_tensor: bool = True,
        device: str | torch.device | None = None,
        *,
        instruction: str | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
        output: str = "embeddings",
        token_budget: int | None = None,
        on_batch: OnBatch | None = None,
        non_finite: str = "raise",
        on_problem: OnProblem | None = None,
    ) -> Tensor | np.ndarray | TokenEmbeddings | list[TokenEmbeddings]:
        """Embed texts. What a text's embedding is does not depend on the texts beside it.

        Any number of threads may call this on one encoder. It computes without dropout and without gradients whatever
        mode the model is in, and changes neither that nor anything else of the model: a model in training goes on as
        before. Changes of the encoder (`to`, a merging `save`) wait for calls that have begun. Where memory runs out on
        a forward pass, its texts go in smaller ones. In a forked process it sets PyTorch to one thread.

        Args:
            sentences: a text, texts, or [instruction, text] pairs.
            batch_size: not used, as a warning says: batches are made by ``token_budget``.
            show_progress_bar: show one on standard error.
            convert_to_numpy: return NumPy arrays instead of tensors.
            convert_to_tensor: False means NumPy arrays, too.
            device: move the model there first. One device: for several start a process each.
            instruction: put before every text of ``sentences``, which are then plain strings.
            normalize: give every embedding length 1.
            truncate_dim: keep the first columns only; before ``normalize``.
            output: "embeddings", or "tokens" for the embedding of every token behind the prompt, not pooled.
            token_budget: tokens of a forward pass; a longer text runs alone.
            on_batch: called after each forward pass with its rows, its tokens, and its tokens with padding.
            non_finite: what to do with a text whose embedding holds NaN or infinity, in float32 too: "raise", or
                "keep" its row as NaN.
            on_problem: called at the end with the place and the reason of each text that cannot be embedded: one not
                finite, one with a token that the model's embedding has no row for, one too long for the memory there
                is. Its row is NaN. Without it the first such text is an error.

        Returns:
            (N, d) float32 on the CPU, rows in the order of ``sentences``; (d,) for a single text. With
            output="tokens" a list of `TokenEmbeddings`, or one for a single text. A text of which no token is left to
            pool (an empty one behind an instruction) is a row of zeros.

        Raises:
            TypeError: an item is neither a string nor a pair of strings.
            UserError: an instruction fills all of ``max_length``; a text cannot be embedded (see ``on_problem``); the
                device is not there, or more than one; called again from ``on_batch`` with another device.
            NonFiniteEmbeddingError: see ``non_finite``.
        """
        single = isinstance(sentences, str)
        pairs = as_pairs([sentences] if single else sentences, instruction)
        if device is not None:
            self._move(device)
        request = Request(
            tokens=one_of("output", output, ("embeddings", "tokens")) == "tokens",
            skip_prompt=self.skip_instruction,
            normalize=normalize,
            width=checked_width(truncate_dim, self.dimension),
            token_budget=token_budget or self.token_budget,
            keep_non_finite=one_of("non_finite", non_finite, ("raise", "keep")) == "keep",
            as_arrays=convert_to_numpy or not convert_to_tensor,
        )
        if batch_size is not None:
            warn_of_batch_size(batch_size, request.token_budget)
        threads = usable_threads()
        with self._lock.use(), progress(len(pairs), show_progress_bar, on_batch) as report:
            replica = self._current_replica()
            with self._lock.one_at_a_time if replica.offloaded else nullcontext():
                rows = encode_pairs(self._task(replica, request, report, threads), pairs, on_problem)
        results = as_asked(rows, request)
        return results[0] if single else results

    def describe(self) -> dict[str, str | int]:
        """What the last bits of embeddings depend on beside the model, the texts, the settings and the device."""
        with self._lock.use():
            return describe(self._current_replica(), self.device)

    @property
    def _lock(self) -> ModelLock:
        return lock_of(decoder_of(self.model))

    def _move(self, device: str | torch.device) -> None:
        wanted = checked_device(device)
        if wanted.type != self.device.type or wanted.index not in (None, self.device.index):
            self.to(wanted)

    def _task(self, replica: Replica, request: Request, on_batch: OnBatch, threads: int) -> Task:
        """All that a call needs, as it is now: what other threads set meanwhile does not reach in."""
        network = Network(replica.model, self.model, self.pooling_mode)
        cores = threads if self.device.type == "cpu" and not replica.offloaded else 1
        return Task(network, self.text_tokenizer(), request, on_batch, self.tokenizer.convert_ids_to_tokens, cores)

    def _current_replica(self) -> Replica:
        """What `encode` runs, made at the first call and again where the model is no longer what it was."""
        require_packed_attention(self.model)
        with self._lock.making:
            replica = self._replica
            if replica is None or not replica.is_current(self.model, self.accelerate):
                replica = self._replica = Replica(self.model, self.accelerate, before=replica)
        replica.require_evaluation_mode()
        return replica

    def save(self, output_path: str | Path, merge_before_save: bool = False, save_config: bool = True) -> None:
        """Write the model, its tokenizer and llm2vec_config.json into a folder, whole or not at all.

        The folder loads again here with the same embeddings, and, without adapters apart, in plain
        ``AutoModel.from_pretrained`` with the same hidden states. An adapter that is not merged is saved alone, as one
        with those that were merged on loading; its folder loads here, on the base it names. That the rest of the
        weights is that base is compared with its files first.

        Args:
            output_path: the folder; other files in it stay. A chat template is not written.
            merge_before_save: merge the adapter into the weights first, for good.
            save_config: write the encoder's settings as llm2vec_config.json.

        Raises:
            SaveError: an adapter alone would load to something else: its base was edited, resized or merged with what
                no adapter can say, or is nowhere to be found; or it is switched off.
        """
        if merge_before_save:
            with self._lock.change("save()"):
                self.model = merge(self.model)
        with self._lock.use(), written_beside(output_path, OLD_FILES) as folder:
            settings = {name: getattr(self, name) for name in ENCODER_SETTINGS}
            published = self.checkpoint if self.checkpoint in CHECKPOINTS else None
            write_encoder(folder, self.model, self.tokenizer, published, settings if save_config else None)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """See transformers."""
        return self.model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """See transformers."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
