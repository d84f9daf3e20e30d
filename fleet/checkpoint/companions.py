"""Which files of a folder belong to its model: weights, and the small files that say how it is built and prompted.

Trainers leave much more in a folder: earlier checkpoints, optimizers, logs, a merged copy below an adapter. None of it
is read, hashed, copied to nodes or into outputs, or seen by an engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fleet.checkpoint.headers import INDEX_FILE, weight_files
from fleet.store import Folder

_VOCABULARY = re.compile(
    r"(tokenizer|vocab|added_tokens|vocab-src|vocab-tgt|source_vocab|target_vocab)\.json|vocab\.(txt|bpe)|merges\.txt"
    r"|dict\.txt|bpe\.codes|tekken\.json|[\w.-]+\.(model|spm|tiktoken)|tokenizer\.model\.v\d+\w*"
)
"""Files that number tokens: transformers' and vLLM's tokenizers read one or more of them."""

_PROMPTING = re.compile(
    r"(tokenizer_config|special_tokens_map|chat_template)\.json|chat_template\.jinja"
    r"|additional_chat_templates/[^/]+\.jinja"
)
"""What else says how text becomes tokens."""

_BUILDING = re.compile(
    r"config\.json|generation_config\.json|((image_|video_|audio_)?(pre)?processor_config)\.json|video_preprocessor_config\.json"
)
"""How a full model is built and run."""


def is_vocabulary(file: str) -> bool:
    """Whether a tokenizer's tokens are in this file."""
    return _VOCABULARY.fullmatch(file) is not None


def is_prompting(file: str) -> bool:
    """Whether a file decides how text becomes tokens: a tokenizer's, or a chat template's."""
    return is_vocabulary(file) or _PROMPTING.fullmatch(file) is not None


def is_companion(file: str) -> bool:
    """Whether a file beside a full model's weights decides what it does: how it is built, and how it is prompted."""
    return is_prompting(file) or _BUILDING.fullmatch(file) is not None


def prompting_files(own: Folder, aligned: Folder) -> dict[str, Folder]:
    """What a model made of `own` is prompted with: file -> where it is. Where `own` has no tokenizer, the aligned
    model's, with `own`'s chat template if it has one."""
    mine = {name: own for name in own.files() if is_prompting(name)}
    if any(map(is_vocabulary, mine)):
        return mine
    return {name: aligned for name in aligned.files() if is_prompting(name)} | mine


def own_files(folder: Folder, files: Mapping[str, int]) -> Folder:
    """The folder with its model's files alone; itself, if there are no others, or no weights.

    Args:
        files: those of the folder; a listing costs a request where they are remote.

    Raises:
        CheckpointError: an index that is damaged or names files that aren't there.
    """
    is_adapter = "adapter_config.json" in files
    weights = weight_files(folder, "adapter" if is_adapter else "model", files)
    if not weights:
        return folder  # whoever reads it sees all that is there, and says what to do about it
    own = {"adapter_config.json", *filter(is_prompting, files)} if is_adapter else {*filter(is_companion, files)}
    own |= {*weights, INDEX_FILE} & files.keys()
    return folder if own >= files.keys() else folder.only(own)
