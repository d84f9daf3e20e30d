"""One thread that steps a vLLM engine, so that many callers share its batches. Imports no vllm: an engine is handed in.

    callers ──▶ the engine's thread: add requests, step, step, … ──▶ each caller's outputs, in its own order
       ▲                                │
       └────── room in the engine ◀─────┘

vLLM batches whatever requests it holds; its own `LLM.generate` holds one caller's at a time. Callers wait while the
engine has as many requests as it can use, so work of any length costs no memory there.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Request:
    token_ids: list[int]
    params: SamplingParams
    lora: LoRARequest | None
    output: Future[RequestOutput] = field(default_factory=Future["RequestOutput"])


class EngineThread:
    """Owns an engine: nothing else may touch it while this thread lives.

    An exception of the engine ends its use: every caller that waits gets it, and so does every later one.

    Args:
        engine: which engine.
        max_requests: how many requests the engine is given at once; the others wait with their callers.
    """

    def __init__(self, engine: LLMEngine, max_requests: int) -> None:
        self._engine = engine
        self._room = max_requests
        self._has_room = threading.Condition()
        self._thread = ThreadPoolExecutor(1, "engine")
        # Only the engine's thread touches these:
        self._names = itertools.count()
        self._requests: dict[str, _Request] = {}
        self._steps = False
        self._error: BaseException | None = None

    def call(self, function: Callable[[], _T]) -> _T:
        """What `function` gives, called in the engine's thread between two steps. What it raises is raised here."""
        return self._thread.submit(function).result()

    def generate(
        self, token_ids: Sequence[list[int]], params: Sequence[SamplingParams], lora: LoRARequest | None
    ) -> list[RequestOutput]:
        """The finished output of every prompt, in order. Any number of threads may call it at once."""
        requests = [_Request(ids, p, lora) for ids, p in zip(token_ids, params, strict=True)]
        rest = requests
        while rest:
            count = self._take_room(len(rest))
            self._thread.submit(self._add, rest[:count]).add_done_callback(self._go_on)
            rest = rest[count:]
        return [request.output.result() for request in requests]

    def close(self) -> None:
        """Ends the thread after what it holds; the engine is the caller's again."""
        self._thread.shutdown()

    def _take_room(self, wanted: int) -> int:
        """Room for at least one request, and for as many of those wanted as there is; waits for it."""
        with self._has_room:
            self._has_room.wait_for(lambda: self._room > 0)
            count = min(wanted, self._room)
            self._room -= count
            return count

    def _end(self, name: str) -> _Request:
        with self._has_room:
            self._room += 1
            self._has_room.notify_all()
        return self._requests.pop(name)

    def _add(self, requests: Sequence[_Request]) -> None:
        names = [str(next(self._names)) for _ in requests]
        self._requests.update(zip(names, requests, strict=True))
        if self._error is not None:
            raise self._error
        for name, request in zip(names, requests, strict=True):
            prompt: Any = {"prompt_token_ids": request.token_ids}
            self._engine.add_request(name, prompt, request.params, lora_request=request.lora)

    def _step(self) -> None:
        self._steps = False
        for output in self._engine.step():
            if output.finished:
                self._end(output.request_id).output.set_result(output)  # pyright: ignore[reportArgumentType]

    def _go_on(self, done: Future[None]) -> None:
        """After each job of the thread: an error goes to all who wait; else requests that are left get a step."""
        if (error := done.exception()) is not None:
            self._error = error
            for name in list(self._requests):
                self._end(name).output.set_exception(error)
        elif self._requests and not self._steps:
            self._steps = True
            self._thread.submit(self._step).add_done_callback(self._go_on)
