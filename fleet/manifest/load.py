"""A manifest's file -> `Manifest`, and its JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fleet.core.errors import ManifestError
from fleet.manifest.schema import Manifest, refuse_duplicates

_Model = TypeVar("_Model", bound=BaseModel)


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest; relative paths in it become absolute, from its own folder.

    Raises:
        ManifestError: the file is missing, is not JSON, or breaks the schema; one line with every problem.
    """
    return parse(Manifest, read_json(path), path.resolve().parent, str(path))


def read_json(path: Path) -> object:
    """What a JSON file holds, not yet checked.

    Raises:
        ManifestError: the file is missing, is not JSON, or has a key twice in one object.
    """
    try:
        text = path.read_text()
    except FileNotFoundError as e:
        raise ManifestError(f"{path}: no such manifest") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ManifestError(f"{path}: can't be read ({e})") from e
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except ValueError as e:
        raise ManifestError(f"{path}: not valid JSON: {e}") from e


def parse(kind: type[_Model], document: object, root: Path, where: str) -> _Model:
    """Check a document; relative paths in it become absolute, from `root`. `where` is what messages call it.

    Raises:
        ManifestError: it breaks the schema; one line with every problem.
    """
    try:
        return kind.model_validate(document, context={"root": root})
    except ValidationError as e:
        raise ManifestError(f"{where}: " + "; ".join(_problem(error) for error in e.errors())) from e


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse an object with a key twice, of which Python would silently keep the last."""
    refuse_duplicates("object", [key for key, _ in pairs])
    return dict(pairs)


def _problem(error: ErrorDetails) -> str:
    field, message = ".".join(str(part) for part in error["loc"]), error["msg"]
    if error["type"] == "extra_forbidden":
        return f"{field}: unknown field; remove it or correct its name"
    if error["type"] == "missing":
        return f"{field}: missing"
    return f"{field}: {message}" if field else message.removeprefix("Value error, ")


def manifest_schema() -> str:
    """JSON Schema of a manifest, as shipped in `fleet/manifest/manifest.schema.json`."""
    return json.dumps(Manifest.model_json_schema(by_alias=True), indent=2, sort_keys=True) + "\n"
