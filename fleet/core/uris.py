"""Addresses in a manifest: a relative path means relative to the manifest's folder, wherever the command is typed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo


def absolute(value: str, info: ValidationInfo) -> str:
    """A relative path, from the folder in the validation context; `~` is the home folder; what has a scheme stays.

    Raises:
        ValueError: it has a space around it or a control character in it, or names an environment variable, of which a
            record couldn't tell what it was.
    """
    if re.search(r"[\x00-\x1f\x7f]", value) or value != value.strip():
        raise ValueError(f"{value!r}: has a space around it or a control character in it; take it out")
    context: dict[str, object] = info.context or {}
    root = context.get("root")
    if root is None or re.match(r"[A-Za-z0-9]+://", value):
        return value
    path = Path(str(root), os.path.expanduser(value))
    if (variable := re.search(r"\$(\w+|\{\w+\})", value)) and not path.exists():
        raise ValueError(f"{value}: variables such as {variable[0]} aren't filled in; write the path itself")
    return str(path)


Uri = Annotated[str, Field(min_length=1), AfterValidator(absolute)]
