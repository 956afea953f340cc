"""What the user chose for a bulk job."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from llm2vec_fast.data.columns import Columns
from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.loading.hub import HubOptions

CPU_ROWS_PER_SHARD = 1024  # what a stop can cost: half a minute with a model of 135M on two cores, long with one of 7B
GPU_ROWS_PER_SHARD = 32768  # enough batches a part to keep an accelerator busy
COMPARED_BY_HASH = ("model", "adapter")
NOT_COMPARED = ("device", "token_budget")  # they change results within rounding only, which the job says


@dataclass(frozen=True)
class EmbedSettings:
    """Settings of a job; None leaves a choice to the model folder, the encoder or the device.

    ``dtype`` is what the model computes in ("auto", "float32", "bfloat16", "float16"), ``output_dtype`` what is
    written ("float32", "float16"), ``revision`` and ``adapter_revision`` say which commits of hub repositories are
    meant, ``token_budget`` the tokens of a forward pass, ``rows_per_shard`` the rows of a part; lengths are in tokens.
    """

    model: str
    adapter: str | None = None
    revision: str | None = None
    adapter_revision: str | None = None
    causal: bool = False
    pooling: str | None = None
    instruction: str | None = None
    normalize: bool = False
    truncate_dim: int | None = None
    max_length: int | None = None
    doc_max_length: int | None = None
    dtype: str = "auto"
    output_dtype: str = "float32"
    token_budget: int | None = None
    rows_per_shard: int | None = None
    text_column: str = "text"
    id_column: str | None = None
    keep_columns: tuple[str, ...] = ()
    csv_delimiter: str | None = None
    csv_quote: str | None = None
    csv_escape: str | None = None
    device: str | None = None

    @property
    def hub(self) -> HubOptions:
        return HubOptions(revision=self.revision, adapter_revision=self.adapter_revision)

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.id_column, self.keep_columns)

    @property
    def csv(self) -> Csv:
        """How csv and tsv files are read."""
        return Csv(self.csv_delimiter, self.csv_quote, self.csv_escape)

    def as_json(self) -> dict[str, Any]:
        """The settings as a manifest holds them."""
        return {**asdict(self), "keep_columns": list(self.keep_columns)}

    @classmethod
    def from_json(cls, recorded: dict[str, Any]) -> EmbedSettings:
        """The settings of a manifest."""
        known = {item.name: recorded[item.name] for item in fields(cls) if item.name in recorded}
        return cls(**{**known, "keep_columns": tuple(recorded.get("keep_columns", ()))})


def changed_settings(recorded: dict[str, Any], resolved: dict[str, Any], asked: EmbedSettings) -> list[str]:
    """What differs from the settings that a folder was started with, as "name old -> new".

    A choice once left open and now given as what it came to (``resolved``) is no change.
    """
    changes = []
    for name, new in asked.as_json().items():
        old = recorded.get(name)
        if name in COMPARED_BY_HASH + NOT_COMPARED or new in (old, resolved.get(name, old)):
            continue
        changes.append(f"{name} {_shown(old)} -> {_shown(new)}")
    return changes


def _shown(value: Any) -> str:
    return "default" if value is None else repr(value) if isinstance(value, list) else str(value)
