"""How well words are labelled: accuracy, and F1 of entities where labels mark them."""

from __future__ import annotations

from collections.abc import Sequence

from llm2vec_fast.errors import UserError


def word_scores(predicted: Sequence[Sequence[str | None]], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of sentences' predicted labels, None for a word without one: it is wrong, and no part of an entity.

    Returns:
        ``accuracy``, the share of right words; where labels are of the kind B-PER, I-PER, O, also ``f1``, ``precision``
        and ``recall`` of whole entities as the CoNLL task counts them (with seqeval).

    Raises:
        UserError: seqeval is needed and not installed.
    """
    pairs = [pair for sentence in zip(predicted, labels, strict=True) for pair in zip(*sentence, strict=True)]
    scores = {"accuracy": sum(one == other for one, other in pairs) / max(1, len(pairs))}
    if not marks_entities({label for sentence in labels for label in sentence}):
        return scores
    try:
        from seqeval import metrics
    except ModuleNotFoundError as error:
        raise UserError("entity F1 needs the package seqeval: pip install 'llm2vec-fast[eval]'") from error
    given = [list(sentence) for sentence in labels], [[label or "O" for label in sentence] for sentence in predicted]
    for name in ("f1", "precision", "recall"):
        scores[name] = float(getattr(metrics, f"{name}_score")(*given, zero_division=0))
    return scores


def marks_entities(labels: set[str]) -> bool:
    """True for labels such as B-PER, I-PER and O."""
    inside = labels - {"O"}
    return bool(inside) and all(label[:2] in ("B-", "I-", "E-", "S-") for label in inside)
