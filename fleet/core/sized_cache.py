"""A cache that is bounded by what its values weigh, not by how many there are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SizedCache(Generic[K, V]):
    """Keeps the values that were asked for last, up to a number of bytes; any number of threads may ask.

    Args:
        make: computes a key's value. Threads that ask for the same new key at once may each compute it. What it raises
            is passed on, and nothing is kept.
        num_bytes: what a value weighs, at least 0.
        limit_bytes: what all kept values may weigh together. A value that is heavier alone is given and not kept.
    """

    def __init__(self, make: Callable[[K], V], num_bytes: Callable[[V], int], limit_bytes: int) -> None:
        self._make = make
        self._num_bytes = num_bytes
        self._limit_bytes = limit_bytes
        self._values: OrderedDict[K, V] = OrderedDict()
        self._total_bytes = 0
        self._lock = Lock()

    def __call__(self, key: K) -> V:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = self._make(key)  # outside the lock: other keys need not wait for it
        with self._lock:
            if key not in self._values:
                self._keep(key, value)
            return self._values.get(key, value)

    def _keep(self, key: K, value: V) -> None:
        size = self._num_bytes(value)
        if size > self._limit_bytes:
            return
        self._values[key] = value
        self._total_bytes += size
        while self._total_bytes > self._limit_bytes:
            _, oldest = self._values.popitem(last=False)
            self._total_bytes -= self._num_bytes(oldest)
