"""What a suite is called where not every name is taken: among metrics, and in paths. Light."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from fleet.core.errors import SuiteError

_MOST = 200
"""Longest name, in bytes of UTF-8: MLflow takes 250 characters of a metric and a file system 255 bytes, with what
stands before and after a suite's name."""


def tracked_name(name: str) -> str:
    """What a suite's metrics are called: letters of any script, digits, `_`, `-`, `.`, `:` and spaces, as MLflow takes.

    Any other character is written as its code, `(` as `_x28_`; so is a `_` that would make it look as if it was. The
    `+` before a template's name is a dot. A name that is too long is cut, and ends with the beginning of its hash.
    """
    name = re.sub(r"_(?=x[0-9a-f]+_)", "_x5f_", name.replace("+", "."))
    return shortened(re.sub(r"[^\w.\- :]", lambda found: f"_x{ord(found[0]):x}_", name))


def shortened(name: str, most: int = _MOST) -> str:
    """A name of at most `most` bytes: as it is, or its beginning and the beginning of its hash."""
    data = name.encode()
    if len(data) <= most:
        return name
    return f"{data[: most - 17].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"


def check_distinct(names: Iterable[str]) -> None:
    """Refuse suites whose metrics would be one.

    Raises:
        SuiteError: It names two.
    """
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(tracked_name(name), name)) != name:
            raise SuiteError(
                f"suites {other} and {name}: MLflow would call both {tracked_name(name)}; give one another name"
            )
