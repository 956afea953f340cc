"""A tokenizer of our own beside the user's: no padding, no truncation, no chance, and no thread that changes it.

A fast tokenizer keeps in one shared object what its last call asked for, and starts with what its tokenizer.json says.
Both would decide on a text's tokens.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_PARTS = ("normalizer", "pre_tokenizer", "post_processor")
_LOCK = threading.Lock()
_owned: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple, Tokenizer]] = WeakKeyDictionary()


def own_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A backend that gives the tokens of a fast tokenizer's whole texts, whatever is done with that tokenizer.

    The two share the vocabulary. The same one comes back until something that decides on tokens changes, such as
    added tokens or ``add_eos_token``; nobody may change it.
    """
    mark = _mark(tokenizer)
    with _LOCK:
        known, own = _owned.get(tokenizer, (None, None))
        if known != mark:
            own = _made(tokenizer)
            _owned[tokenizer] = mark, own
        return own


def _mark(tokenizer: PreTrainedTokenizerBase) -> tuple:
    """What tells that tokens may have changed; the vocabulary itself is not read."""
    backend = tokenizer.backend_tokenizer
    parts = [getattr(backend, name) for name in _PARTS]
    return (
        id(backend),
        _splits_special(tokenizer),
        getattr(backend.model, "dropout", None),
        backend.get_vocab_size(with_added_tokens=False),
        repr(backend.get_added_tokens_decoder()),
        *(None if part is None else part.__getstate__() for part in parts),
    )


def _splits_special(tokenizer: PreTrainedTokenizerBase) -> bool:
    """The tokenizer's own setting; its backend has what the last call said."""
    return bool(getattr(tokenizer, "split_special_tokens", False))


def _made(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    own = Tokenizer(backend.model)
    for name in _PARTS:
        setattr(own, name, getattr(backend, name))
    own.add_tokens([token for _, token in sorted(added.items())])
    if getattr(own.model, "dropout", None) or own.get_added_tokens_decoder() != added:
        own = Tokenizer.from_str(backend.to_str())  # a vocabulary of its own, on which nothing is dropped by chance
        own.no_padding()
        own.no_truncation()
        if getattr(own.model, "dropout", None):
            own.model.dropout = None
    own.encode_special_tokens = _splits_special(tokenizer)
    return own
