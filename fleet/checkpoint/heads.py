"""A model whose output head is kept unlike the aligned model's, read as if it were kept alike.

A head is the embedding again, and in no file, or a tensor of its own. What a model computes is the same if its own head
equals its embedding, as PEFT leaves it where it merges into a tied model: then it is read as tied beside a tied aligned
model. And one that is tied is read as having a head, beside an aligned model that has one of its own.
"""

from __future__ import annotations

import json
from typing import Any

from fleet.checkpoint.companions import is_companion
from fleet.checkpoint.configs import ties_head, with_text_fields
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.joined import open_source
from fleet.checkpoint.model import content_identity, read_model, require_full_model
from fleet.checkpoint.tables import output_head, same_values, token_table
from fleet.checkpoint.views import Stored, TensorView, ViewFolder
from fleet.core.identity import Json, canonical_json
from fleet.store import Folder

HEAD_SCHEME = "head:"
"""URI scheme of a model that is read with another head than its files have: JSON follows, of the model's address and
the head's name, null where it is to be tied."""


def with_head_of(aligned: FullModel, model: FullModel, uri: str) -> str:
    """The address at which a full model is read as tied, or as untied, as the aligned one: its own where it is anyway.

    A head of its own that is not the embedding can't be left out: that model keeps its address, and doesn't belong.
    """
    own, theirs, table = output_head(model.tensors), output_head(aligned.tensors), token_table(model.tensors)
    if table is None or (own is None) == (theirs is None):
        return uri
    copy = own or model.tied_head
    fits = (copy is None or same_values(model.folder, copy, table)) and (own is not None or ties_head(model.config))
    return HEAD_SCHEME + canonical_json({"head": theirs and theirs.name, "model": uri}) if fits else uri


def open_base_folder(uri: str) -> Folder:
    """The folder of a model in its own vocabulary, which may be one that `with_head_of` made an address for.

    Raises:
        SourceError: as `open_source`.
        CheckpointError: as `open_source` and `read_model`.
    """
    if not uri.startswith(HEAD_SCHEME):
        return open_source(uri)
    found: Any = json.loads(uri.removeprefix(HEAD_SCHEME))
    folder = open_source(found["model"])
    return _view(require_full_model(read_model(folder), folder.uri), found["head"])


def _view(model: FullModel, head: str | None) -> ViewFolder:
    files: dict[str, dict[str, TensorView]] = {}
    own, table = output_head(model.tensors), token_table(model.tensors)
    for name, info in sorted(model.tensors.items(), key=lambda item: item[1].start):
        if head is not None or info is not own:
            files.setdefault(info.file, {})[name] = Stored(model.folder, info)
    if head is not None and table is not None:
        files[table.file][head] = Stored(model.folder, table)
    tied: dict[str, Json] = {"tie_word_embeddings": head is None}
    config = with_text_fields({**model.config, **tied}, tied)  # the outermost word counts
    small = {"config.json": (json.dumps(config, indent=2) + "\n").encode()}
    passed = {name: model.folder for name in model.folder.files() if is_companion(name) and name not in small}

    def identity() -> Json:
        return ["head", head, content_identity(model.folder)]

    return ViewFolder(model.folder.uri, identity, files, passed, small, (model.folder,))
