"""Measuring in a process of its own: peaks don't mix, and nothing is warm that isn't meant to be."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def fresh(function: Callable[..., T], *args: object) -> T:
    """`function(*args)` in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
