"""A learned mask's files, as a mask step leaves them.

    mask.safetensors   logits, float32, named {owner}/{base tensor}/{part}; the owner is `*` where all models share them
    mask.json          the mask's granularity, and with which temperature and seed it was learned

Logits have the axes of the weights as the checkpoint holds them: (d_in, d_out) for a Conv1D.
"""

from __future__ import annotations

import json
from typing import cast

from fleet.core.errors import CheckpointError
from fleet.store import Folder

MASK_FILE, MASK_JSON = "mask.safetensors", "mask.json"
SHARED = "*"
"""The owner of logits that all models share."""


def read_granularity(folder: Folder) -> str:
    """What one logit of a stored mask stands for.

    Raises:
        CheckpointError: the folder holds no learned mask, or one that doesn't say.
    """
    files = folder.files()
    if missing := [name for name in (MASK_FILE, MASK_JSON) if name not in files]:
        raise CheckpointError(
            f"{folder.uri}: no learned mask, {', '.join(missing)} is missing; give the attempt folder of a mask step"
        )
    try:
        config: object = json.loads(folder.read(MASK_JSON))
    except ValueError as e:
        raise CheckpointError(f"{folder.uri}/{MASK_JSON}: not JSON ({e}); copy the mask again") from e
    granularity = cast("dict[str, object]", config).get("mask") if isinstance(config, dict) else None
    if not isinstance(granularity, str):
        raise CheckpointError(f"{folder.uri}/{MASK_JSON}: doesn't say which mask it is; copy the mask again")
    return granularity
