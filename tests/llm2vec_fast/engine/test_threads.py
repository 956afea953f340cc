"""Many threads share an encoder, from its first call on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from reference_data import FOLDER, TEXTS
from torch.nn.functional import cosine_similarity

from llm2vec_fast import LLM2Vec
from llm2vec_fast.bidirectional import decoder_of
from llm2vec_fast.engine.cores import each_on_a_core
from llm2vec_fast.engine.locks import ModelLock, lock_of
from llm2vec_fast.engine.replica import Replica
from llm2vec_fast.errors import UserError

MANY = [f"{text} {number}" for number in range(150) for text in TEXTS]


def load(**settings: object) -> LLM2Vec:
    return LLM2Vec.from_pretrained(FOLDER / "llama", **{"dtype": "float32", "device": "cpu", **settings})


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return load().encode(TEXTS)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def in_new_thread(function: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result(timeout=60)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float(cosine_similarity(ours.double(), theirs.double(), dim=-1).min()) > 0.99999


def exit_code(child: int) -> int:
    """Of a forked process, which is ended where it hangs."""
    for _ in range(300):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_the_first_calls_come_from_many_threads(mode, expected, monkeypatch):
    """Nothing has warmed the encoder up: it is made ready, once, while all of them wait for it."""
    made = []
    monkeypatch.setattr("llm2vec_fast.encoder.Replica", lambda *x, **named: made.append(1) or Replica(*x, **named))
    encoder = load().train(mode)
    barrier = threading.Barrier(8, timeout=60)

    def encode(i: int) -> torch.Tensor:
        barrier.wait()
        return encoder.encode(TEXTS[i % len(TEXTS) :])

    with ThreadPoolExecutor(8) as executor:
        rows = list(executor.map(encode, range(8)))
    assert all(same(x, expected[i % len(TEXTS) :]) for i, x in enumerate(rows))
    assert same(encoder.encode(TEXTS), expected)
    assert {module.training for module in encoder.modules()} == {mode}
    assert made == [1]


def test_calls_go_on_while_another_thread_changes_the_encoder(expected, tmp_path):
    encoder, done, wrong = load(), threading.Event(), []

    def encode() -> None:
        while not done.is_set():
            try:
                if not same(encoder.encode(TEXTS), expected):
                    wrong.append("another vector")
            except Exception as error:
                wrong.append(repr(error))

    workers = [threading.Thread(target=encode) for _ in range(3)]
    for worker in workers:
        worker.start()
    for number in range(3):
        encoder.to(torch.float64)
        encoder.train()
        encoder.save(tmp_path / str(number))
        encoder.eval()
        encoder.to(torch.float32)
    done.set()
    for worker in workers:
        worker.join(timeout=60)
    assert not wrong


def test_moving_a_model_waits_for_the_encode_that_runs_on_it():
    encoder, running, release = load(), threading.Event(), threading.Event()

    def wait(*_: int) -> None:
        running.set()
        release.wait(60)

    with ThreadPoolExecutor(2) as executor:
        rows = executor.submit(encoder.encode, TEXTS, on_batch=wait)
        running.wait(60)
        moved = executor.submit(encoder.to, torch.float64)
        time.sleep(0.1)
        assert not moved.done()
        assert encoder.dtype == torch.float32
        release.set()
        assert moved.result(60).dtype == torch.float64
        assert rows.result(60).shape == (len(TEXTS), encoder.dimension)


def test_a_change_waits_for_uses_and_uses_for_the_change():
    lock, order = ModelLock(), []
    using, release = threading.Event(), threading.Event()

    def use() -> None:
        with lock.use():
            using.set()
            release.wait(60)
            order.append("used")

    def change() -> None:
        with lock.change("to()"), lock.use(), lock.change("to()"):
            order.append("changed")

    def use_again() -> None:
        with lock.use():
            order.append("used again")

    workers = []
    for function in (use, change, use_again):
        workers.append(threading.Thread(target=function))
        workers[-1].start()
        using.wait(60)
        time.sleep(0.05)
    assert order == []
    release.set()
    for worker in workers:
        worker.join(timeout=60)
    assert order == ["used", "changed", "used again"]


def test_a_callback_may_encode_but_not_move_the_model_it_runs_on(expected):
    encoder, rows = load(), []
    encoder.encode(TEXTS, on_batch=lambda *_: rows.append(encoder.encode(TEXTS)))
    assert same(rows[0], expected)
    with pytest.raises(UserError, match=r"to\(\) was called inside encode"):
        encoder.encode(TEXTS, on_batch=lambda *_: encoder.to(torch.float64))
    encoder.to(torch.float64)  # and nothing is held after that
    assert encoder.encode(TEXTS).shape == expected.shape


def test_the_number_of_threads_is_nobody_elses_business(threads):
    """Neither a caller's nor that of threads yet to come changes, however many calls overlap."""
    threads(3)
    encoder = load()
    with ThreadPoolExecutor(3) as executor:
        rows = list(executor.map(encoder.encode, [MANY] * 3))
        inside = list(executor.map(lambda _: torch.get_num_threads(), range(3)))
    assert (torch.get_num_threads(), in_new_thread(torch.get_num_threads), inside) == (3, 3, [3, 3, 3])
    assert torch.equal(rows[0], rows[1])


def test_an_encoder_says_what_its_bits_depend_on(threads):
    threads(3)
    told = load(dtype="float32").describe()
    assert told["threads"] == 3
    assert "float32 weights run plain" in told["packed weights"]
    assert "accelerate is off" in load(accelerate=False).describe()["packed weights"]


def test_each_task_has_one_core_and_all_end_with_the_call(threads):
    threads(2)
    running = []

    def work(i: int) -> int:
        running.append(i)
        time.sleep(0.02)
        if i == 3:
            raise ZeroDivisionError
        running.remove(i)
        return torch.get_num_threads()

    assert list(each_on_a_core(work, [0, 1, 2], 2)) == [1, 1, 1]
    with pytest.raises(ZeroDivisionError):
        list(each_on_a_core(work, range(20), 2))
    assert running == [3]


def test_plans_and_bits_of_many_texts_are_the_same_on_any_number_of_threads(threads):
    encoder, plans, rows = load(), [], []
    for count in (1, 2, 4):
        threads(count)
        plans.append([])
        rows.append(encoder.encode(MANY, token_budget=200, on_batch=lambda *counts: plans[-1].append(counts)))
    assert len(plans[0]) > 4
    assert plans[0] == plans[1] == plans[2]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_cores_and_locks_of_its_own():
    """It has none of its parent's threads; what waits for them waits forever."""
    encoder = load()
    lock = lock_of(decoder_of(encoder.model))
    assert list(each_on_a_core(str, range(3), 2)) == ["0", "1", "2"]
    with ThreadPoolExecutor(1) as other:
        using, release = threading.Event(), threading.Event()

        def use() -> None:
            with lock.use():
                using.set()
                release.wait(60)

        other.submit(use)
        using.wait(60)
        child = os.fork()
        if child == 0:
            with lock_of(decoder_of(encoder.model)).change("to()"):
                os._exit(0 if list(each_on_a_core(str, range(3), 2)) == ["0", "1", "2"] else 1)
        release.set()
    assert exit_code(child) == 0


def test_saving_into_a_folder_needs_no_other_thread(tmp_path: Path):
    encoder = load()
    encoder.encode(TEXTS)
    encoder.save(tmp_path / "saved", merge_before_save=True)
    assert (tmp_path / "saved" / "config.json").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_encodes(threads, expected):
    """As a worker of multiprocessing does on Linux, with the encoder of its parent, whose threads it does not have."""
    threads(2)
    encoder = load()
    encoder.encode(TEXTS)
    child = os.fork()
    if child == 0:
        os._exit(0 if same(encoder.encode(TEXTS), expected) and torch.get_num_threads() == 1 else 1)
    assert exit_code(child) == 0
    assert torch.get_num_threads() == 2
