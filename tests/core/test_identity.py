from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fleet.core.identity import canonical_json, fingerprint

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_canonical_json_key_order_ignored(value: dict[str, object]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, {"f": len}, {"p": {1, 2}}, object()])
def test_canonical_json_not_plain_refused(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other",
    [
        ("fuse", 1, {"a": 1}, {"m": "x"}, ["d"]),
        ("score", 2, {"a": 1}, {"m": "x"}, ["d"]),
        ("score", 1, {"a": 2}, {"m": "x"}, ["d"]),
        ("score", 1, {"a": 1}, {"m": "y"}, ["d"]),
        ("score", 1, {"a": 1}, {"m": "x"}, ["e"]),
    ],
)
def test_fingerprint_each_part_changed_differs(
    other: tuple[str, int, dict[str, int], dict[str, str], list[str]],
) -> None:
    assert fingerprint("score", 1, {"a": 1}, {"m": "x"}, ["d"]) != fingerprint(*other)  # type: ignore[arg-type]
