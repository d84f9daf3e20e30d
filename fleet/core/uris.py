"""Addresses in a manifest: a relative path means relative to the manifest's folder, wherever the command is typed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo


def absolute(value: str, info: ValidationInfo) -> str:
    """A relative path, from the folder in the validation context; anything with a scheme stays."""
    context: dict[str, object] = info.context or {}
    root = context.get("root")
    if root is None or re.match(r"[a-z0-9]+://", value):
        return value
    return str(Path(str(root), value))


Uri = Annotated[str, Field(min_length=1), AfterValidator(absolute)]
