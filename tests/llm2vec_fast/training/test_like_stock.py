"""Runs of every stage under drawn settings are what stock transformers, peft and PyTorch make of the same texts.

A case is a combination of settings (`training_cases.AXES`): stage, family, adapter, checkpointing, pieces, optimiser
and more. The stage trains two or three updates; the same texts, tokenised by a stock call, go through the
stock model one by one (`stock_training`). Compared are the loss, the gradient of each parameter and the weights of each
update, then what was written: its weights in stock peft, and the vectors that `LLM2Vec` makes of it. Of the run itself
only three things are taken over: which rows form a batch, which tokens are hidden, and the new adapter's first weights.

By default the cases are a plan in which any two values of different settings meet. ``LIKE_STOCK_CASES=500`` draws as
many at random, with seeds from ``LIKE_STOCK_FIRST`` (0) on; one that fails is repeated by its name, or by its seed:
``LIKE_STOCK_FIRST=123 LIKE_STOCK_CASES=1``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import recorded_training
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from recorded_training import Record, recorded
from stock_training import (
    IGNORED,
    Recipe,
    StockOptimiser,
    Update,
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
from training_cases import (
    ADAPTERS,
    FAMILIES,
    LENGTH,
    MNTP_LOSSES,
    STAGES,
    Case,
    Materials,
    drawn,
    name_of,
    options_of,
    pairs_of,
    planned,
    sentences_of,
    texts_of,
)
from warm_processes import Ranks, WarmProcesses

from llm2vec_fast import LLM2Vec
from llm2vec_fast.training.word_level import WordClassifier

_COUNT, _FIRST = (int(os.environ.get(f"LIKE_STOCK_{name}", "0")) for name in ("CASES", "FIRST"))
_SEEDS = range(_FIRST, _FIRST + _COUNT)
CASES = [drawn(seed) for seed in _SEEDS] if _COUNT else planned()
TWO_PROCESSES = [
    drawn(seed, stage=STAGES[seed % 6], family=tuple(FAMILIES)[seed % 6], interrupted=False)
    for seed in _SEEDS or range(6)
]
# Where float32 rounds to in two ways of computing one thing; a wrong factor, mask or seed is off by 1e-2 and more.
TOLERANCE = 1e-4

Weights = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return Materials(tmp_path_factory.mktemp("materials"))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_run_is_the_stock_run(case: Case, materials: Materials, tmp_path: Path) -> None:
    stage, options = options_of(case, materials, tmp_path)
    check(case, options, [recorded(stage, options, case["interrupted"])], materials)


@pytest.mark.parametrize("case", TWO_PROCESSES, ids=name_of)
def test_a_run_of_two_processes_is_the_stock_run(
    case: Case, materials: Materials, warm: WarmProcesses, finished: Callable[[Ranks], str], tmp_path: Path
) -> None:
    """Each has half of a batch; the last rows may be too few for both."""
    stage, options = options_of(case, materials, tmp_path)
    options["per_device_train_batch_size"] //= 2
    options["use_cpu"] = torch.accelerator.is_available()  # on a machine without one nobody has to say so
    (tmp_path / "options.json").write_text(json.dumps(options))
    program = [recorded_training.__file__, stage, str(tmp_path / "options.json"), str(tmp_path / "record")]
    finished(warm.start(program, 2, tmp_path))
    records = [Record(**torch.load(tmp_path / f"record-{rank}.pt", weights_only=True)) for rank in range(2)]
    check(case, options, records, materials)


def check(case: Case, options: Mapping[str, Any], records: Sequence[Record], materials: Materials) -> None:
    """The records of all processes against the stock run, and the folder that was written."""
    record = records[0]
    assert len(record.losses) == len(record.weights) == len(record.batches) >= 1
    for other in records[1:]:
        for ours, others in zip(record.weights, other.weights, strict=True):
            assert all(torch.equal(x, others[name]) for name, x in ours.items()), "processes train apart"
    stock = STOCK[case["stage"]](case, options, record, materials)
    optimiser = StockOptimiser(stock.parameters, _recipe(options), len(record.losses))
    windows = [
        [batch for rank in records for batch in rank.batches[i] if len(batch["rows"])]
        for i in range(len(record.losses))
    ]
    start, updates = {name: x.detach().clone() for name, x in stock.parameters.items()}, []
    for i, window in enumerate(windows):
        expected = optimiser.update(stock.loss(window))
        updates.append(expected)
        found = Update(record.losses[i], record.norms[i], record.gradients[i], record.weights[i])
        assert_same_update(found, expected, start, f"update {i + 1}")
    assert any(x.norm for x in updates)  # a case of no gradient shows nothing
    if options["load_best_model_at_end"]:
        assert len(record.evaluated) == len(updates)
        best = updates[record.evaluated.index(max(record.evaluated))]
        for name, x in stock.parameters.items():
            x.data.copy_(best.weights[name])
    stock.check_output(Path(options["output_dir"]))


def assert_same_update(found: Update, expected: Update, start: Weights, place: str) -> None:
    """Loss, norm of the gradients, each gradient, and how far each weight has gone from where it started."""
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE), place
    assert found.norm == pytest.approx(expected.norm, rel=TOLERANCE), place
    assert_close(found.gradients, expected.gradients, f"gradient of {place}")
    assert_close(found.weights, expected.weights, f"weights of {place}", start)


def assert_close(found: Weights, expected: Weights, what: str, start: Weights | None = None) -> None:
    """Each within the tolerance of its own norm; where that is small, of a hundredth of the norm of all of them.

    With ``start`` it is the norm of the difference to that, and what rounds away in adding to it is allowed.
    """
    assert found.keys() == expected.keys()
    moved = {name: x - start[name] if start else x for name, x in expected.items()}
    total = float(torch.stack([x.norm() for x in moved.values()]).norm())
    for name, x in moved.items():
        apart, size = float((found[name] - expected[name]).norm()), max(float(x.norm()), total / 100)
        rounded = torch.finfo(torch.float32).eps * float(expected[name].norm()) if start else 0.0
        assert apart <= TOLERANCE * size + rounded, f"{what}: {name} is off by {apart:.1e} where its norm is {size:.1e}"


def _recipe(options: Mapping[str, Any]) -> Recipe:
    return Recipe(**{name: options[name] for name in Recipe.__dataclass_fields__})


class StockStage:
    """What the stock run of a case trains, and its loss."""

    head = False

    def __init__(self, case: Case, options: Mapping[str, Any], record: Record, materials: Materials) -> None:
        self.case, self.options, self.materials = case, options, materials
        self.tokenizer = materials.tokenizer
        base = load_stock(materials.decoder(case["family"]), materials.below(case), head=self.head)
        self.model = self._with_adapter(base).train()
        self.parameters = {name: x for name, x in self.model.named_parameters() if x.requires_grad}
        names = {name for name in record.before if not name.endswith("log_scale")}
        assert names == self.parameters.keys()
        new = ADAPTERS[case["adapter"]][1] == "new"
        for name, x in self.parameters.items():
            if new and ".lora_A." in name:
                x.data.copy_(record.before[name])
            assert float((x - record.before[name]).detach().norm()) <= TOLERANCE * float(x.detach().norm()), name

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

    def vectors(self, model: nn.Module, texts: Sequence[tuple[Tensor, int]]) -> Tensor:
        """(N, d) embeddings of tokenised texts."""
        mode = self.options.get("pooling_mode", "mean")
        return torch.stack([pooled(outputs_of(model, ids), mode, skip) for ids, skip in texts])

    def check_output(self, folder: Path) -> None:
        """Weights as stock peft reads them, and vectors."""
        self.model.eval()
        merged = self.model.merge_and_unload() if isinstance(self.model, PeftModel) else self.model
        expected = decoder_in(merged)
        base = self.materials.decoder(self.case["family"])
        below = [folder] if isinstance(self.model, PeftModel) else []
        written = load_stock(base if below else folder, below)
        assert_close(written.state_dict(), expected.state_dict(), "what was written", load_stock(base).state_dict())
        texts = texts_of(self.case)[:4]
        encoder = LLM2Vec.from_pretrained(folder, dtype="float32", device="cpu")  # an adapter names its base
        with torch.no_grad():
            rows = self.vectors(expected, [self.ids_of(text, limit=512) for text in texts])
        assert_close({"vectors": encoder.encode(texts)}, {"vectors": rows}, "the encoder")


class Mntp(StockStage):
    head = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._seen: set[int] = set()

    def loss(self, window: Sequence[Mapping[str, Tensor]]) -> Tensor:
        if len(self._seen) == len(self._rows):  # another epoch
            self._seen.clear()
        texts = [text for batch in window for text in self._texts(batch)]
        smoothing = MNTP_LOSSES[self.case["loss"]].get("label_smoothing_factor", 0.0)
        return hidden_token_loss(self.model, texts, smoothing)

    def _texts(self, batch: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """A batch's sequences, if they are the rows' tokens but for what is hidden."""
        (first,) = (batch["position_ids"][0] == 0).nonzero(as_tuple=True)
        ends = [*first[1:].tolist(), batch["input_ids"].shape[1]]
        found = []
        for row, start, end in zip(batch["rows"].tolist(), first.tolist(), ends, strict=True):
            assert row not in self._seen  # every one comes once an epoch
            self._seen.add(row)
            ids, labels = batch["input_ids"][0, start:end], batch["labels"][0, start:end]
            assert torch.equal(torch.where(labels == IGNORED, ids, labels), self._rows[row])
            found.append((ids, labels))
        return found

    @property
    def _rows(self) -> list[Tensor]:
        texts = texts_of(self.case)
        if self.case["stage"] == "mntp":
            return [self.ids_of(text)[0] for text in texts]
        joined = [token for text in texts for token in self.tokenizer(text)["input_ids"]]
        return list(torch.tensor(joined[: len(joined) // LENGTH * LENGTH]).view(-1, LENGTH))


class Simcse(StockStage):
    def __init__(self, case: Case, options: Mapping[str, Any], record: Record, materials: Materials) -> None:
        super().__init__(case, options, record, materials)
        learned = [name for name in record.before if name.endswith("log_scale")]
        assert bool(learned) == bool(options.get("learn_scale"))
        self._log_scale = nn.Parameter(torch.tensor([float(options["scale"])]).log())
        self.parameters |= dict.fromkeys(learned, self._log_scale)
        self._count = 10 * len(options["train_file"])

    def loss(self, window: Sequence[Mapping[str, Tensor]]) -> Tensor:
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

    def _answers(self, row: int) -> set[str]:
        """The texts that are known to answer the row's query: those of the rows of this query or of this name."""
        own, _ = self._texts_of(row)
        others = [self._texts_of(i)[0] for i in range(self._count)]
        alike = [x for x in others if _plain(x["query"]) == _plain(own["query"]) or x["name"] == own["name"]]
        return {_plain(text) for x in alike for text in (x["query"], *x["positive"])}

    def _rows_of(self, batch: Mapping[str, Tensor]) -> tuple[list, list, list, list[str], list[str]]:
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

    def _tokens(self, batch: Mapping[str, Tensor]) -> list[tuple[Tensor, int]]:
        parts = batch["input_ids"][0].split(batch["lengths"].tolist())
        return list(zip(parts, batch["skip"].tolist(), strict=True))

    def _texts_of(self, row: int) -> tuple[dict[str, Any], tuple[str, str]]:
        """A row, and what goes before its query and before its documents."""
        text = texts_of(self.case)[row]
        return {"query": text, "positive": [text], "negative": [], "name": row}, ("", "")


class Contrastive(Simcse):
    def _texts_of(self, row: int) -> tuple[dict[str, Any], tuple[str, str]]:
        file, place = divmod(row, 10)
        before = (self.options.get(f"{kind}_instruction", [""] * 2)[file] for kind in ("query", "document"))
        return {"name": row, **pairs_of(self.case)[file][place]}, tuple(before)


def _same(one: tuple[Tensor, int], other: tuple[Tensor, int]) -> bool:
    return torch.equal(one[0], other[0]) and one[1] == other[1]


def _plain(text: str) -> str:
    return " ".join(text.split())


class WordLevel:
    """A linear head on frozen outputs of the stock model."""

    def __init__(self, case: Case, options: Mapping[str, Any], record: Record, materials: Materials) -> None:
        self.case, self.options = case, options
        below = [options["peft_model_name_or_path"]] if "peft_model_name_or_path" in options else []
        if case["adapter"] == "new-on-an-adapters-folder":
            below = materials.below(case)
        self._decoder, self._tokenizer = load_stock(materials.decoder(case["family"]), below), materials.tokenizer
        self.parameters = {name: nn.Parameter(x.clone()) for name, x in record.before.items()}
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

    def loss(self, window: Sequence[Mapping[str, Tensor]]) -> Tensor:
        rows = torch.cat([batch["rows"] for batch in window])
        assert bool(self.kept[rows].all())
        assert_close({"": torch.cat([batch["features"] for batch in window])}, {"": self._features[rows]}, "features")
        if len(self._seen) == int(self.kept.sum()):  # another epoch
            self._seen.clear()
        assert len({*rows.tolist()} - self._seen) == len(rows)  # every one comes once an epoch
        self._seen.update(rows.tolist())
        return F.cross_entropy(self.scores(self._features[rows]), self._labels[rows])

    def check_output(self, folder: Path) -> None:
        classifier = WordClassifier.from_pretrained(folder, dtype="float32", device="cpu")
        found = classifier.predict([words for words, _ in sentences_of(self.case)])
        best = self.scores(self._features.nan_to_num()).argmax(1)
        expected = [self._names[i] if kept else None for i, kept in zip(best.tolist(), self.kept.tolist(), strict=True)]
        assert [label for sentence in found for label in sentence] == expected


STOCK = {
    "mntp": Mntp,
    "mntp-joined": Mntp,
    "simcse": Simcse,
    "contrastive": Contrastive,
    "negatives": Contrastive,
    "word-level": WordLevel,
}
