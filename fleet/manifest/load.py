"""A manifest's file -> `Manifest`, and its JSON Schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypeVar, cast

from pydantic import BaseModel, ValidationError

from fleet.core.errors import ManifestError
from fleet.core.identity import Json
from fleet.manifest.mistakes import describe
from fleet.manifest.schema import Manifest, refuse_duplicates

_Model = TypeVar("_Model", bound=BaseModel)


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest; relative paths in it become absolute, from its own folder.

    Raises:
        ManifestError: the file is missing, is not JSON, or breaks the schema; one line with every problem.
    """
    return parse(Manifest, read_json(path), path.resolve().parent, str(path))


def read_json(path: Path) -> object:
    """What a JSON file holds, not yet checked; a byte order mark before it is allowed.

    Raises:
        ManifestError: the file is missing, is not JSON, or has a key twice in one object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as e:
        raise ManifestError(f"{path}: no such manifest") from e
    except IsADirectoryError as e:
        raise ManifestError(f"{path}: a folder; give the manifest in it, such as {path / 'models.json'}") from e
    except UnicodeDecodeError as e:
        raise ManifestError(f"{path}: not UTF-8 ({e.reason} at byte {e.start}); save it as UTF-8") from e
    except OSError as e:
        raise ManifestError(f"{path}: can't be read ({e.strerror})") from e
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError as e:
        raise ManifestError(f"{path}: not a manifest: it is nested too deeply") from e
    except ValueError as e:
        raise ManifestError(f"{path}: not valid JSON: {e}{_yaml_hint(path, text)}") from e


def parse(kind: type[_Model], document: object, root: Path, where: str) -> _Model:
    """Check a document; relative paths in it become absolute, from `root`. `where` is what messages call it.

    Raises:
        ManifestError: it breaks the schema; one line with every problem.
    """
    try:
        return kind.model_validate(document, context={"root": root})
    except ValidationError as e:
        raise ManifestError(f"{where}: " + "; ".join(describe(e, kind, cast("Json", document)))) from e


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse an object with a key twice, of which Python would silently keep the last."""
    refuse_duplicates("object", [key for key, _ in pairs])
    return dict(pairs)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no number in JSON")


def _yaml_hint(path: Path, text: str) -> str:
    """What to do with a manifest that is YAML: by its name, or because it begins like it and not like JSON."""
    if path.suffix not in (".yaml", ".yml") and not re.match(r"\s*(#.*\s+|---\s+)*\w+:(\s|$)", text):
        return ""
    convert = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout, indent=2)"
    return f"; it looks like YAML, and a manifest is JSON: python -c '{convert}' < {path} > models.json"


def manifest_schema() -> str:
    """JSON Schema of a manifest, as shipped in `fleet/manifest/manifest.schema.json`."""
    schema = Manifest.model_json_schema(by_alias=True)
    for definition in schema["$defs"].values():
        for part in definition.get("properties", {}).values():
            if "const" in part:  # what tells the types of a union apart
                part.setdefault("description", f"Says which one it is. {definition['description'].splitlines()[0]}")
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"
