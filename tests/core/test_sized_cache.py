"""A cache bounded by bytes. Values are texts here, and weigh what their lengths are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from fleet.core.sized_cache import SizedCache


def counting(limit_bytes: int) -> tuple[SizedCache[str, str], list[str]]:
    """A cache that doubles its keys, and the keys it had to compute, in order."""
    made: list[str] = []

    def make(key: str) -> str:
        made.append(key)
        return key * 2

    return SizedCache(make, len, limit_bytes), made


def asked(cache: Callable[[str], str], keys: str) -> list[str]:
    return [cache(key) for key in keys.split()]


def test_sized_cache_value_that_is_kept_is_computed_once() -> None:
    cache, made = counting(4)
    assert asked(cache, "a b a b") == ["aa", "bb", "aa", "bb"]
    assert made == ["a", "b"]


def test_sized_cache_over_its_bytes_drops_what_was_asked_for_longest_ago() -> None:
    cache, made = counting(4)
    asked(cache, "a b a c")  # 2 bytes each: c takes b's place, for a was asked for again
    asked(cache, "a c b")
    assert made == ["a", "b", "c", "b"]


def test_sized_cache_value_of_two_others_bytes_drops_both() -> None:
    cache, made = counting(4)
    asked(cache, "a b xy xy a b")
    assert made == ["a", "b", "xy", "a", "b"]


def test_sized_cache_value_larger_than_all_room_is_given_and_displaces_nothing() -> None:
    cache, made = counting(4)
    assert asked(cache, "a large large a") == ["aa", "largelarge", "largelarge", "aa"]
    assert made == ["a", "large", "large"]


def test_sized_cache_failure_is_passed_on_and_not_kept() -> None:
    answers = iter([ValueError("gone"), "there"])

    def make(key: str) -> str:
        answer = next(answers)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    cache = SizedCache(make, len, 10)
    with pytest.raises(ValueError, match="gone"):
        cache("a")
    assert asked(cache, "a a") == ["there", "there"]


def test_sized_cache_two_threads_at_one_new_key_get_one_value_that_is_weighed_once() -> None:
    both = Barrier(2, timeout=60)

    def make(key: str) -> list[str]:
        if key == "a":
            both.wait()  # both threads found nothing, and both compute
        return [key]

    cache = SizedCache(make, lambda value: 2, 4)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(cache, ["a", "a"])
    assert one is other
    b = cache("b")
    assert cache("a") is one and cache("b") is b  # a counted twice would have left no room for b


def test_sized_cache_keys_are_computed_side_by_side() -> None:
    both = Barrier(2, timeout=60)

    def make(key: str) -> str:
        both.wait()  # passes only if both are being computed at once
        return key

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(SizedCache(make, len, 10), ["a", "b"])] == ["a", "b"]
