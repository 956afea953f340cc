"""What a stage trains on its batches, and by which loss, as stock code computes it from the texts of a drawn case.

Of a batch only the numbers of its rows, the hidden tokens and the drawn documents are taken over; that its tokens are
those of these rows is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from stock_training import (
    IGNORED,
    continued,
    decoder_in,
    hidden_token_loss,
    info_nce,
    load_stock,
    outputs_of,
    pooled,
)
from torch import Tensor, nn
from torch.nn import functional as F
from training_cases import ADAPTERS, LENGTH, MNTP_LOSSES, Case, Materials, pairs_of, sentences_of, texts_of
from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]


class StockStage:
    """A model of which some weights are trained; ``before`` are those that the run of the product began with."""

    head = False

    def __init__(self, case: Case, options: Mapping[str, Any], before: Batch, materials: Materials) -> None:
        self.case, self.options, self.materials = case, options, materials
        self.tokenizer = materials.tokenizer
        base = load_stock(materials.decoder(case["family"]), materials.below(case), head=self.head)
        self.model = self._with_adapter(base).train()
        self.parameters = {name: x for name, x in self.model.named_parameters() if x.requires_grad}
        names = {name for name in before if not name.endswith("log_scale")}
        assert names == self.parameters.keys()
        new = ADAPTERS[case["adapter"]][1] == "new"
        for name, x in self.parameters.items():
            if new and ".lora_A." in name:
                x.data.copy_(before[name])
            assert float((x - before[name]).detach().norm()) <= 1e-4 * float(x.detach().norm()), name

    def _with_adapter(self, base: nn.Module) -> nn.Module:
        kind = ADAPTERS[self.case["adapter"]][1]
        if kind == "all":
            return base
        if kind != "new":
            return continued(base, self.materials.trained(self.case))
        targets = self.options.get("lora_target_modules", ["all-linear"])
        alpha = self.options.get("lora_alpha", 2 * self.options["lora_r"])
        config = LoraConfig(
            r=self.options["lora_r"],
            lora_alpha=alpha,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
        )
        return get_peft_model(base, config)

    def ids_of(self, text: str, instruction: str = "", limit: int = LENGTH) -> tuple[Tensor, int]:
        """Tokens of a text behind its instruction, and how many of them are not the text's."""
        prompt = f"{instruction} " if instruction else ""
        found = self.tokenizer(prompt + text, truncation=True, max_length=limit, return_offsets_mapping=True)
        skip = sum(end <= len(prompt) for _, end in found["offset_mapping"]) if prompt else 0
        return torch.tensor(found["input_ids"]), skip

    def trained(self) -> tuple[PreTrainedModel, bool]:
        """The decoder with what was learned in its weights, and whether that is an adapter."""
        self.model.eval()
        if isinstance(self.model, PeftModel):
            return decoder_in(self.model.merge_and_unload()), True
        return decoder_in(self.model), False

    def vectors(self, model: nn.Module, texts: Sequence[tuple[Tensor, int]]) -> Tensor:
        """(N, d) embeddings of tokenised texts."""
        mode = self.options.get("pooling_mode", "mean")
        return torch.stack([pooled(outputs_of(model, ids), mode, skip) for ids, skip in texts])


class Mntp(StockStage):
    head = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._seen: set[int] = set()

    def loss(self, window: Sequence[Batch]) -> Tensor:
        if len(self._seen) == len(self._rows):  # another epoch
            self._seen.clear()
        smoothing = MNTP_LOSSES[self.case["loss"]].get("label_smoothing_factor", 0.0)
        return hidden_token_loss(self.model, self._texts(window, self._seen), smoothing)

    def evaluated(self, batches: Sequence[Sequence[Batch]]) -> Tensor:
        """Of all hidden tokens, not smoothed."""
        return hidden_token_loss(self.model, self._texts(chain.from_iterable(batches), set()))

    def _texts(self, batches: Iterable[Batch], seen: set[int]) -> list[tuple[Tensor, Tensor]]:
        return [text for batch in batches for text in self._texts_in(batch, seen)]

    def _texts_in(self, batch: Batch, seen: set[int]) -> list[tuple[Tensor, Tensor]]:
        """A batch's sequences, if they are the rows' tokens but for what is hidden."""
        (first,) = (batch["position_ids"][0] == 0).nonzero(as_tuple=True)
        ends = [*first[1:].tolist(), batch["input_ids"].shape[1]]
        found = []
        for row, start, end in zip(batch["rows"].tolist(), first.tolist(), ends, strict=True):
            assert row not in seen  # every one comes once an epoch
            seen.add(row)
            ids, labels = batch["input_ids"][0, start:end], batch["labels"][0, start:end]
            assert torch.equal(torch.where(labels == IGNORED, ids, labels), self._rows[row])
            found.append((ids, labels))
        return found

    @cached_property
    def _rows(self) -> list[Tensor]:
        texts = texts_of(self.case)
        if self.case["stage"] == "mntp":
            return [self.ids_of(text)[0] for text in texts]
        joined = [token for text in texts for token in self.tokenizer(text)["input_ids"]]
        return list(torch.tensor(joined[: len(joined) // LENGTH * LENGTH]).view(-1, LENGTH))


class Simcse(StockStage):
    def __init__(self, case: Case, options: Mapping[str, Any], before: Batch, materials: Materials) -> None:
        super().__init__(case, options, before, materials)
        learned = [name for name in before if name.endswith("log_scale")]
        assert bool(learned) == bool(options.get("learn_scale"))
        self._log_scale = nn.Parameter(torch.tensor([float(options["scale"])]).log())
        self.parameters |= dict.fromkeys(learned, self._log_scale)
        self._count = 10 * len(options["train_file"])

    def loss(self, window: Sequence[Batch]) -> Tensor:
        """Of all texts of an update at once."""
        batches = [self._rows_of(batch) for batch in window]
        queries, documents, negatives = (
            torch.cat([self.vectors(self.model, batch[i]) for batch in batches if batch[i]] or [torch.zeros(0, 32)])
            for i in range(3)
        )
        texts = [text for i in (3, 4) for batch in batches for text in batch[i]]
        rows = [row for batch in window for row in batch["rows"].tolist()]
        known = [self._answers(row) for row in rows]
        answers = torch.tensor([[text in some for text in texts] for some in known])
        related = torch.tensor([[bool(one & other) for other in known] for one in known])
        options = self.options
        widths = options.get("matryoshka_dims", [queries.shape[1]])
        weights = options.get("matryoshka_weights", [1.0] * len(widths))
        scale = self._log_scale.exp() if options.get("learn_scale") else options["scale"]
        losses = [
            weight * info_nce(
                queries[:, :width], torch.cat([documents, negatives])[:, :width], answers, related, scale,
                symmetric=options.get("symmetric", False), query_negatives=options.get("query_negatives", False),
                document_negatives=options.get("document_negatives", False),
                margin=options.get("false_negative_margin", float("inf")),
            )
            for width, weight in zip(widths, weights, strict=True)
        ]  # fmt: skip
        return torch.stack(losses).sum() / sum(weights)

    def evaluated(self, batches: Sequence[Sequence[Batch]]) -> Tensor:
        """The mean over all queries, each among the texts of its batch."""
        counts = [sum(len(part["rows"]) for part in batch) for batch in batches]
        return sum(n * self.loss(batch) for n, batch in zip(counts, batches, strict=True)) / sum(counts)

    def _answers(self, row: int) -> set[str]:
        """The texts that are known to answer the row's query: those of the rows of this query or of this name."""
        own, _ = self._texts_of(row)
        others = [self._texts_of(i)[0] for i in range(self._count)]
        alike = [x for x in others if _plain(x["query"]) == _plain(own["query"]) or x["name"] == own["name"]]
        return {_plain(text) for x in alike for text in (x["query"], *x["positive"])}

    def _rows_of(self, batch: Batch) -> tuple[list, list, list, list[str], list[str]]:
        """Tokens of queries, documents and negatives; the texts of the documents and of the negatives."""
        tokens, count = self._tokens(batch), len(batch["rows"])
        queries, documents, rest = tokens[:count], tokens[count : 2 * count], tokens[2 * count :]
        texts, negatives, others = [], [], []
        for row, query, document in zip(batch["rows"].tolist(), queries, documents, strict=True):
            found, (before_query, before_document) = self._texts_of(row)
            assert _same(query, self.ids_of(found["query"], before_query))
            texts.append(self._text_of(document, found["positive"], before_document))
            for _ in range(min(self.options.get("negatives", 0), len(found["negative"]))):
                negatives.append(rest.pop(0))
                others.append(self._text_of(negatives[-1], found["negative"], before_document))
        assert not rest
        return queries, documents, negatives, texts, others

    def _text_of(self, tokens: tuple[Tensor, int], texts: Sequence[str], before: str) -> str:
        return next(_plain(text) for text in texts if _same(tokens, self.ids_of(text, before)))

    def _tokens(self, batch: Batch) -> list[tuple[Tensor, int]]:
        parts = batch["input_ids"][0].split(batch["lengths"].tolist())
        return list(zip(parts, batch["skip"].tolist(), strict=True))

    @cached_property
    def _texts(self) -> list[str]:
        return texts_of(self.case)

    def _texts_of(self, row: int) -> tuple[dict[str, Any], tuple[str, str]]:
        """A row, and what goes before its query and before its documents."""
        text = self._texts[row]
        return {"query": text, "positive": [text], "negative": [], "name": row}, ("", "")


class Contrastive(Simcse):
    @cached_property
    def _pairs(self) -> list[list[dict[str, Any]]]:
        return pairs_of(self.case)

    def _texts_of(self, row: int) -> tuple[dict[str, Any], tuple[str, str]]:
        file, place = divmod(row, 10)
        before = (self.options.get(f"{kind}_instruction", [""] * 2)[file] for kind in ("query", "document"))
        return {"name": row, **self._pairs[file][place]}, tuple(before)


def _same(one: tuple[Tensor, int], other: tuple[Tensor, int]) -> bool:
    return torch.equal(one[0], other[0]) and one[1] == other[1]


def _plain(text: str) -> str:
    return " ".join(text.split())


class WordLevel:
    """A linear head on frozen outputs of the stock model."""

    def __init__(self, case: Case, options: Mapping[str, Any], before: Batch, materials: Materials) -> None:
        self.case, self.options = case, options
        below = [options["peft_model_name_or_path"]] if "peft_model_name_or_path" in options else []
        if case["adapter"] == "new-on-an-adapters-folder":
            below = materials.below(case)
        self._decoder, self._tokenizer = load_stock(materials.decoder(case["family"]), below), materials.tokenizer
        self.parameters = {name: nn.Parameter(x.clone()) for name, x in before.items()}
        assert self.parameters.keys() == {"linear.weight", "linear.bias"}
        words = [self._words(sentence) for sentence, _ in sentences_of(case)]
        self._features = torch.cat([features for features, _ in words])
        labels = [label for _, labels in sentences_of(case) for label in labels]
        self._names = sorted(set(labels))
        self._labels = torch.tensor([self._names.index(label) for label in labels])
        self.kept = torch.cat([kept for _, kept in words])
        self._seen: set[int] = set()

    @torch.no_grad()
    def _words(self, words: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Each word's mean over the tokens that end in it, or over the outputs before those; which words have one."""
        found = self._tokenizer(
            " ".join(words), truncation=True, max_length=LENGTH, return_offsets_mapping=True
        )  # fmt: skip
        hidden = outputs_of(self._decoder, torch.tensor(found["input_ids"]))
        if self.options["retroactive_labels"] == "next_token":
            hidden = torch.cat([hidden[:1], hidden[:-1]])
        rows, start = [], 0
        for word in words:
            stop = start + len(word)
            inside = torch.tensor([b > a and start < b <= stop for a, b in found["offset_mapping"]])
            rows.append(hidden[inside].mean(0))
            start = stop + 1
        features = torch.stack(rows)
        return features, ~features.isnan().any(1)

    def scores(self, features: Tensor) -> Tensor:
        return features @ self.parameters["linear.weight"].T + self.parameters["linear.bias"]

    def loss(self, window: Sequence[Batch]) -> Tensor:
        if len(self._seen) == int(self.kept.sum()):  # another epoch
            self._seen.clear()
        return self._loss(window, self._seen)

    def evaluated(self, batches: Sequence[Sequence[Batch]]) -> Tensor:
        return self._loss(list(chain.from_iterable(batches)), set())

    def _loss(self, batches: Sequence[Batch], seen: set[int]) -> Tensor:
        rows = torch.cat([batch["rows"] for batch in batches])
        assert bool(self.kept[rows].all())
        found, features = torch.cat([batch["features"] for batch in batches]), self._features[rows]
        assert float((found - features).norm()) <= 1e-4 * float(features.norm())
        assert len({*rows.tolist()} - seen) == len(rows)  # every one comes once an epoch
        seen.update(rows.tolist())
        return F.cross_entropy(self.scores(self._features[rows]), self._labels[rows])

    @torch.no_grad()
    def labels(self) -> list[str | None]:
        """The best label of each word, None of those that were cut off."""
        best = self.scores(self._features.nan_to_num()).argmax(1).tolist()
        return [self._names[i] if kept else None for i, kept in zip(best, self.kept.tolist(), strict=True)]


STOCK = {
    "mntp": Mntp,
    "mntp-joined": Mntp,
    "simcse": Simcse,
    "contrastive": Contrastive,
    "negatives": Contrastive,
    "word-level": WordLevel,
}
