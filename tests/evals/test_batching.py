"""The engine's thread with a toy engine; with the real one in tests/test_replicas.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from evals.batching import EngineThread


class ToyEngine:
    """Ends every request after as many steps as its first token says; each step takes all requests on."""

    def __init__(self) -> None:
        self.requests: dict[str, list[int]] = {}
        self.left: dict[str, int] = {}
        self.most_at_once = 0
        self.num_steps = 0
        self.threads: set[str] = set()
        self.fail_at_step: int | None = None
        self.gate = threading.Event()
        self.gate.set()

    def add_request(self, name: str, prompt: dict[str, list[int]], params: object, lora_request: object) -> None:
        if prompt["prompt_token_ids"] == [-1]:
            raise ValueError("a bad request")
        self.requests[name] = prompt["prompt_token_ids"]
        self.left[name] = prompt["prompt_token_ids"][0]
        self.most_at_once = max(self.most_at_once, len(self.left))

    def step(self) -> list[Any]:
        self.gate.wait()
        self.threads.add(threading.current_thread().name)
        self.num_steps += 1
        if self.num_steps == self.fail_at_step:
            raise RuntimeError("the engine broke")
        self.left = {name: left - 1 for name, left in self.left.items()}
        done = [name for name, left in self.left.items() if not left]
        for name in done:
            del self.left[name]
        return [SimpleNamespace(request_id=n, finished=True, prompt_token_ids=self.requests[n]) for n in done]


@pytest.fixture
def engine() -> ToyEngine:
    return ToyEngine()


@pytest.fixture
def thread(engine: ToyEngine) -> Iterator[EngineThread]:
    thread = EngineThread(engine, 4)  # type: ignore[arg-type]
    yield thread
    thread.close()


def ask(thread: EngineThread, *lengths: int) -> list[list[int]]:
    outputs = thread.generate([[n] for n in lengths], [None] * len(lengths), None)  # type: ignore[list-item]
    return [list(output.prompt_token_ids or []) for output in outputs]


def test_outputs_come_in_the_order_of_their_prompts(thread: EngineThread) -> None:
    assert ask(thread, 3, 1, 2) == [[3], [1], [2]]
    assert ask(thread) == []


def test_callers_share_steps_and_the_engine_is_touched_by_one_thread(engine: ToyEngine, thread: EngineThread) -> None:
    engine.gate.clear()
    with ThreadPoolExecutor(2) as callers:
        both = [callers.submit(ask, thread, 5, 5), callers.submit(ask, thread, 5, 5)]
        time.sleep(0.1)
        engine.gate.set()
        assert [b.result() for b in both] == [[[5], [5]]] * 2
    assert engine.num_steps < 20
    assert engine.threads == {"engine_0"}


def test_engine_never_holds_more_than_it_was_given_room_for(engine: ToyEngine, thread: EngineThread) -> None:
    with ThreadPoolExecutor(3) as callers:
        lengths = [1 + i % 3 for i in range(50)]
        for found in callers.map(lambda _: ask(thread, *lengths), range(3)):
            assert found == [[n] for n in lengths]
    assert engine.most_at_once == 4


def test_call_runs_between_steps_and_raises_where_it_was_asked(engine: ToyEngine, thread: EngineThread) -> None:
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0)
    assert thread.call(lambda: threading.current_thread().name) == "engine_0"
    assert ask(thread, 2) == [[2]]


def test_step_that_raises_fails_who_waits_and_who_comes_later(engine: ToyEngine, thread: EngineThread) -> None:
    engine.fail_at_step = 2
    with ThreadPoolExecutor(2) as callers:
        for waiting in [callers.submit(ask, thread, 9), callers.submit(ask, thread, 9)]:
            with pytest.raises(RuntimeError, match="the engine broke"):
                waiting.result(timeout=10)
    with pytest.raises(RuntimeError, match="the engine broke"):
        ask(thread, 1)


def test_request_that_is_refused_fails_its_caller(thread: EngineThread) -> None:
    with pytest.raises(ValueError, match="a bad request"):
        ask(thread, 2, -1)
