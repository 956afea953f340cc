"""What the user chose for a mining job."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llm2vec_fast.bulk.settings import COMPARED_BY_HASH, NOT_COMPARED, EmbedSettings
from llm2vec_fast.errors import UserError


@dataclass(frozen=True)
class MiningSettings:
    """Settings of a job.

    Attributes:
        encoder: the model and how it embeds; its instruction is put before queries, and its columns are not used.
        documents_instruction: put before documents.
        negatives: most hard negatives of a row.
        share: a negative's cosine is below this share of that of the row's own document, its least similar one if it
            has several.
        skip: so many of the nearest that remain are left out, as they may answer the query unnoticed.
        query_column, positive_column: where the pairs are; the second may hold lists.
        id_column: texts of rows of the same id are no negatives for their queries.
        text_column: of further documents.
    """

    encoder: EmbedSettings
    documents_instruction: str | None = None
    negatives: int = 7
    share: float = 0.95
    skip: int = 0
    query_column: str = "query"
    positive_column: str = "positive"
    id_column: str | None = None
    text_column: str = "text"

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise UserError(f"negatives={self.negatives} is not positive: give how many a row may get")
        if not 0 < self.share <= 1:
            raise UserError(f"share={self.share} is not a share: give a number above 0, at most 1")
        if self.skip < 0:
            raise UserError(f"skip={self.skip} is negative: give how many of the nearest to leave out")

    def as_json(self) -> dict[str, Any]:
        """What decides the result, for a job that goes on to be compared with; the model is compared by its files."""
        left_out = {*COMPARED_BY_HASH, *NOT_COMPARED}
        of_encoder = {k: v for k, v in self.encoder.as_json().items() if k not in left_out}
        return {**of_encoder, **{k: v for k, v in asdict(self).items() if k != "encoder"}}
