"""Many threads may use a model at a time; who changes it does so alone."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import UserError


class ModelLock:
    """Held by `use` while a model computes, and by `change` while its weights or its structure change.

    A change waits for uses that have begun, and uses that come later wait for it. A thread may use what it uses or
    changes already.
    """

    def __init__(self) -> None:
        self.making = threading.Lock()  # held while what many users share is made
        self.one_at_a_time = threading.RLock()  # held by uses of a model that bears only one
        self._condition = threading.Condition()
        self._users: Counter[int] = Counter()
        self._changer: int | None = None
        self._waiting = 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """Nobody changes the model meanwhile."""
        me = threading.get_ident()
        with self._condition:
            if not self._users[me] and self._changer != me:
                self._condition.wait_for(lambda: self._changer is None and not self._waiting)
            self._users[me] += 1
        try:
            yield
        finally:
            with self._condition:
                self._users[me] -= 1
                self._users += Counter()  # forgets threads at zero
                self._condition.notify_all()

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Nobody else uses or changes the model meanwhile.

        Raises:
            UserError: this very thread is using it, as a callback of `encode` does: it would wait for itself.
        """
        me = threading.get_ident()
        if self._changer == me:
            yield
            return
        with self._condition:
            if self._users[me]:
                raise UserError(f"{what} was called inside encode, by its on_batch: call it after encode has returned")
            self._waiting += 1
            try:
                self._condition.wait_for(lambda: self._changer is None and not +self._users)
                self._changer = me
            finally:
                self._waiting -= 1
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._changer = None
                self._condition.notify_all()


_locks: WeakKeyDictionary[nn.Module, ModelLock] = WeakKeyDictionary()
_registry_lock = threading.Lock()


def lock_of(model: nn.Module) -> ModelLock:
    """The lock of a model: one for all encoders that were made of it, none in its copies and pickles."""
    with _registry_lock:
        return _locks.setdefault(model, ModelLock())


def _after_fork() -> None:
    """A child process has none of the threads that held them."""
    global _registry_lock
    _locks.clear()
    _registry_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
