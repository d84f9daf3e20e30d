"""Identity: what makes two steps the same step.

A step's fingerprint is the sha256 of canonical JSON. Only literals that decide the result enter it, each picked by
name: placement (where, how many workers, which GPU) never does, so the same step has the same key on every cluster.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import cast

from pydantic import JsonValue as Json

KEY_DIGITS = 16
"""Hex digits of a fingerprint shown in a key; 64 bits tell apart more steps than any catalogue has."""


def canonical_json(value: object) -> str:
    """One text for one value: sorted keys, no spaces, finite numbers only.

    Raises:
        TypeError: for anything that is not plain JSON (a path, a callable, a set), so that a default `repr` never
            becomes part of an identity; for NaN and infinities too.
    """
    _check_plain(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _check_plain(value: object, where: str) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where}: {value!r} has no canonical JSON")
        return
    if isinstance(value, list | tuple):
        for index, item in enumerate(cast("Sequence[object]", value)):
            _check_plain(item, f"{where}[{index}]")
        return
    if isinstance(value, dict):
        for key, item in cast("Mapping[object, object]", value).items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is not a string")
            _check_plain(item, f"{where}.{key}")
        return
    raise TypeError(f"{where}: {type(value).__name__} has no canonical JSON")


def digest(value: object) -> str:
    """`sha256:<64 hex>` of a value's canonical JSON."""
    return "sha256:" + hashlib.sha256(canonical_json(value).encode()).hexdigest()


def fingerprint(
    kind: str, version: int, spec: Mapping[str, Json], inputs: Mapping[str, str], deps: Sequence[str]
) -> str:
    """64 hex digits naming one step.

    Args:
        kind: the step's kind (`survey`, `realign`, `fuse`, `score`).
        version: the kind's algorithm version, bumped by hand when the same spec would give other bytes.
        spec: the literals that decide the result.
        inputs: label -> content identity of each source (a digest or a pinned commit).
        deps: fingerprints of the steps it reads, in the order it reads them.
    """
    recipe = {
        "kind": kind,
        "version": version,
        "spec": dict(spec),
        "inputs": dict(inputs),
        "deps": list(deps),
    }
    return digest(recipe).removeprefix("sha256:")
