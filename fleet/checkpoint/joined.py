"""Sources read under the aligned model's names, and as PEFT and transformers would have saved them.

What wrappers, older versions and other classes left in names and configs is gone in such a view, and buffers are. So a
source is joined with the others, served and written under one set of names. Values are the files' own.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping

from fleet.checkpoint.adapter import PEFT_PREFIX, Adapter, plain_name
from fleet.checkpoint.companions import own_files
from fleet.checkpoint.full_model import FullModel, is_buffer
from fleet.checkpoint.headers import INDEX_FILE, json_bytes, parse_json, read_headers
from fleet.checkpoint.model import Model, content_identity, read_model, require_full_model
from fleet.checkpoint.names import AlignedNames, class_names, unwrapped_weight
from fleet.checkpoint.peft_rules import DeclaredValues, plain_config
from fleet.checkpoint.tables import token_table
from fleet.checkpoint.views import Stored, TensorView, ViewFolder
from fleet.core.errors import CheckpointError
from fleet.core.identity import Json, canonical_json, digest
from fleet.store import Folder, open_folder

JOINED_SCHEME = "joined:"
"""URI scheme of a source that is read under the aligned model's names: JSON follows, of both addresses."""

_SMALL_JSON = frozenset({
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
})  # fmt: skip

_VERSION = 1
"""Bumped by hand when the same source would come out otherwise."""


def joined_address(uri: str, model: Model, aligned_uri: str, aligned: FullModel) -> str:
    """The address under which a source has the aligned model's names; its own, where it is as it should be already.

    Args:
        uri: where `model` is.
        aligned_uri: where `aligned` is: what this function gave for the aligned model, or `uri` if that is the source.
    """
    if isinstance(model, FullModel):
        names, is_plain = model.tensors, not model.left_out and not _without_marks(model.folder)
    else:
        infos = [info for module in model.modules.values() for info in module.tensors]
        names = [info.name for info in (*infos, *model.replaced.values())]
        is_plain = json_bytes(plain_config(model.config)) == json_bytes(model.config)
        is_plain = is_plain and not _without_marks(model.folder)
    renamed = _naming(model, aligned)
    if is_plain and all(renamed(name) == name for name in names):
        return uri
    return JOINED_SCHEME + canonical_json({"model": uri, "to": aligned_uri})


def open_source(uri: str) -> Folder:
    """A source's own files: as they are, or as `joined_address` says.

    Raises:
        SourceError: as `open_folder`.
        CheckpointError: the source or the aligned model can't be read, a small file holds no JSON, or two of the
            source's tensors are one of the aligned model's.
    """
    if not uri.startswith(JOINED_SCHEME):
        return _own_files(uri)
    addresses = json.loads(uri.removeprefix(JOINED_SCHEME))
    folder = _own_files(addresses["model"])
    model = read_model(folder)
    is_aligned = addresses["to"] == addresses["model"]
    aligned = model if is_aligned else read_model(open_source(addresses["to"]))
    return _view(folder, model, require_full_model(aligned, "base.aligned"))


def _own_files(uri: str) -> Folder:
    folder = open_folder(uri)
    return own_files(folder, folder.files())


def _naming(model: Model, aligned: FullModel) -> Callable[[str], str]:
    """From names in a source's files to those it is to have."""
    if isinstance(model, FullModel) and model is aligned:
        return class_names(aligned.config, aligned.tensors)
    names = AlignedNames(aligned.tensors)
    if isinstance(model, FullModel):
        head, table = model.head_for_table, token_table(aligned.tensors)
        alias = {head.name: table.name} if head is not None and table is not None else {}
        return lambda name: alias.get(name) or names.of(unwrapped_weight(name))
    return lambda name: PEFT_PREFIX + names.of(plain_name(name))


def _view(folder: Folder, model: Model, aligned: FullModel) -> ViewFolder:
    what = "model" if isinstance(model, FullModel) else "adapter"
    found = {name: info for name, info in read_headers(folder, what).items() if not is_buffer(info)}
    renamed = _naming(model, aligned)
    names = {name: renamed(name) for name in found}
    _check_no_two(folder.uri, names)
    files: dict[str, dict[str, TensorView]] = {info.file: {} for info in found.values()}
    for name, info in sorted(found.items(), key=lambda item: item[1].start):
        files[info.file][names[name]] = Stored(folder, info)
    small = _without_marks(folder)
    if not isinstance(model, FullModel):
        small["adapter_config.json"] = json_bytes(_config(model, renamed))
    passed = {name: folder for name in folder.files() if name not in (*files, *small, INDEX_FILE)}

    def identity() -> Json:
        return ["joined", _VERSION, content_identity(folder), digest(names)]

    return ViewFolder(folder.uri, identity, files, passed, small, (folder,))


def _without_marks(folder: Folder) -> dict[str, bytes]:
    """The small files that begin with a byte order mark, without it: transformers and engines refuse one.

    Raises:
        CheckpointError: one of them holds no JSON object.
    """
    found: dict[str, bytes] = {}
    for name in sorted(_SMALL_JSON & folder.files().keys()):
        data = folder.read(name)
        parse_json(f"{folder.uri}/{name}", data)
        if data.startswith(codecs.BOM_UTF8):
            found[name] = data.removeprefix(codecs.BOM_UTF8)
    return found


def _check_no_two(where: str, names: Mapping[str, str]) -> None:
    origin: dict[str, str] = {}
    for name, new in names.items():
        if new in origin:
            raise CheckpointError(
                f"{where}: tensors {origin[new]} and {name} are both {new} of the base; keep the one that was trained"
            )
        origin[new] = name


def _config(adapter: Adapter, renamed: Callable[[str], str]) -> dict[str, Json]:
    """The adapter's config; where modules get other names, with every one of them named in full."""
    config = plain_config(adapter.config)
    modules = {name: renamed(module.a.name).partition(".lora_")[0] for name, module in adapter.modules.items()}
    modules = {name: new.removeprefix(PEFT_PREFIX) for name, new in modules.items()}
    if all(name == new for name, new in modules.items()):
        return config
    declared = DeclaredValues(adapter.folder.uri, config)
    ranks = {new: adapter.modules[name].rank for name, new in modules.items()}
    alphas = {new: declared.alpha(name) for name, new in modules.items()}
    named: dict[str, Json] = {
        "target_modules": [*sorted(modules.values())],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {new: rank for new, rank in ranks.items() if rank != config.get("r")},
        "alpha_pattern": {new: alpha for new, alpha in alphas.items() if alpha != config.get("lora_alpha")},
    }
    return plain_config(config | named)
