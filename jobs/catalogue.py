"""A catalogue folder and a template manifest -> the complete manifest of tonight.

The catalogue decides which models there are, the template everything else. One listing of the catalogue finds them;
what is in their files is for `fleet.run.plan` to check.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import cast

from pydantic import BaseModel, ConfigDict

from fleet.core.errors import ManifestError, SourceError
from fleet.core.uris import Uri
from fleet.manifest import Base, Manifest, ModelSpec, parse, read_json
from fleet.manifest.schema import Tracking
from fleet.steps import KINDS
from fleet.store import Folder, open_store

logger = logging.getLogger("jobs.catalogue")

SUITES_FILE = "fleet.json"
"""Beside a model's weights: {"suites": [...]}, for a model that the template doesn't list."""

# Pickled weights count as a model: planning refuses them and names the command that converts them. Skipped here, the
# model would be missing without a word.
_WEIGHTS = re.compile(r".+\.safetensors|pytorch_model.*\.bin")

_TRAINING_CHECKPOINT = re.compile(r"checkpoint-\d+")
"""What trainers leave inside a model's folder on the way to it."""

_MERGED = re.compile(r"merged[\w.-]*")
"""What they leave inside an adapter's folder: the same model, merged into its base."""


class _Template(BaseModel):
    """The part of a template that is read before its models are known; the whole becomes a `Manifest` afterwards."""

    model_config = ConfigDict(frozen=True, extra="allow")

    base: Base
    artifacts: Uri
    models: tuple[ModelSpec, ...] = ()


class _SuitesFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    suites: tuple[str, ...]


def complete_manifest(catalogue: str, template: Path) -> Manifest:
    """The template with the models that the catalogue holds tonight, sorted by name; every path in it is absolute.

    A model that the template lists with this source keeps its entry. Any other is named by its folder, and has the
    suites of the template's entry of that name, else those of the `fleet.json` beside its weights.

    Raises:
        ManifestError: the template is wrong, two folders make one name, or a variant names a model that is gone.
        SourceError: the catalogue can't be listed, or holds no model.
    """
    document = read_json(template)
    root = template.resolve().parent
    known = parse(_Template, document, root, str(template))
    fields = cast(dict[str, object], document)  # a template that is no object has just been refused
    folder = open_store(catalogue).folder("")
    models = _models(folder, known)
    gone = sorted({m.name for m in known.models} - {m.name for m in models})
    if gone:
        logger.warning("not in %s any more, and left out: %s", folder.uri, ", ".join(gone))
    entries = [m.model_dump(mode="json") for m in models]
    tracking = fields.get("tracking", {})
    if isinstance(tracking, dict):  # the default is a file, too: not one beside tonight's manifest, which is not kept
        fields = {**fields, "tracking": {"uri": Tracking().uri} | cast("dict[str, object]", tracking)}
    return parse(Manifest, {**fields, "models": entries}, root, f"{template} with the models of {folder.uri}")


def model_folders(files: Iterable[str]) -> list[PurePosixPath]:
    """The folders that hold a model, at any depth, by the names of all files below the catalogue."""
    names: dict[PurePosixPath, set[str]] = {}
    for file in map(PurePosixPath, files):
        names.setdefault(file.parent, set()).add(file.name)
    found = {path for path, inside in names.items() if _holds_model(inside)}
    adapters = {path for path in found if "adapter_config.json" in names[path]}
    left = {p for p in found if _TRAINING_CHECKPOINT.fullmatch(p.name) and p.parent in found}
    left |= {p for p in found if _MERGED.fullmatch(p.name) and p.parent in adapters}
    if left:
        told = ", ".join(map(str, sorted(left)))
        logger.info("left out, as checkpoints or merged copies of the model they lie in: %s", told)
    return sorted(found - left)


def model_name(path: str) -> str:
    """`team/french lora.v2` -> `team-french-lora-v2`, a name that a manifest and a store's key can hold."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path).strip("-_")


def _holds_model(names: set[str]) -> bool:
    return "adapter_config.json" in names or ("config.json" in names and any(map(_WEIGHTS.fullmatch, names)))


def _models(folder: Folder, template: _Template) -> list[ModelSpec]:
    files = folder.files()
    by_source = {_canonical(m.source): m for m in template.models}
    by_name = {m.name: m for m in template.models}
    # The harmful LoRA of RESTA may be a model of the catalogue too; then the template lists it.
    bases = {_canonical(uri) for uri in template.base.sources} - by_source.keys()
    outputs = tuple(f"{_canonical(template.artifacts)}/{kind}/" for kind in KINDS)
    found: dict[str, ModelSpec] = {}
    for path in model_folders(files):
        is_root = path == PurePosixPath()
        uri = folder.uri if is_root else f"{folder.uri}/{path}"
        if uri in bases or uri.startswith(outputs):
            continue
        model = by_source.get(uri)
        if model is None:
            name = model_name(uri.rpartition("/")[2] if is_root else str(path))
            suites = by_name[name].suites if name in by_name else _own_suites(folder, path, files)
            model = parse(ModelSpec, {"name": name, "source": uri, "suites": suites}, Path("/"), uri)
        if model.name in found:
            raise ManifestError(
                f"{uri} and {found[model.name].source} would both be named {model.name}; rename one of the folders"
            )
        found[model.name] = model
    if not found:
        raise SourceError(
            f"{folder.uri}: no model there: no folder holds adapter_config.json, or config.json and *.safetensors"
        )
    return [found[name] for name in sorted(found)]


def _own_suites(folder: Folder, path: PurePosixPath, files: Iterable[str]) -> tuple[str, ...]:
    name = str(path / SUITES_FILE)
    if name not in files:
        logger.info("%s: new, and neither the template nor a %s gives its suites", path, SUITES_FILE)
        return ()
    where = f"{folder.uri}/{name}"
    try:
        document = json.loads(folder.read(name))
    except ValueError as e:
        raise ManifestError(f"{where}: not valid JSON: {e}") from e
    return parse(_SuitesFile, document, Path("/"), where).suites


def _canonical(uri: str) -> str:
    """One spelling for each place, without the `@sha256:` pin, so that sources can be compared with a listing."""
    place = uri.partition("@sha256:")[0]
    return place if place.startswith("hf://") else open_store(place).uri
