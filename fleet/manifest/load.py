"""A manifest's file -> `Manifest`, and its JSON Schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypeVar, cast

from pydantic import BaseModel, ValidationError

from fleet.core.errors import ManifestError
from fleet.core.identity import Json
from fleet.core.json_lines import decode_text, refuse_halves, unique_keys
from fleet.manifest.mistakes import describe
from fleet.manifest.schema import Manifest

_WORDS = {"True": "true", "False": "false", "None": "null"}
"""Python's words -> JSON's."""

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
        data = path.read_bytes()
    except FileNotFoundError as e:
        raise ManifestError(f"{path}: no such manifest") from e
    except IsADirectoryError as e:
        raise ManifestError(f"{path}: a folder; give the manifest in it, such as {path / 'models.json'}") from e
    except OSError as e:
        raise ManifestError(f"{path}: can't be read ({e.strerror})") from e
    text = decode_text(data, str(path), ManifestError)
    try:
        document = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
        refuse_halves(document)
    except RecursionError as e:
        raise ManifestError(f"{path}: not a manifest: it is nested too deeply") from e
    except ValueError as e:
        raise ManifestError(f"{path}: not valid JSON: {e}{_yaml_hint(path, text) or _hint(e, text)}") from e
    return document


def parse(kind: type[_Model], document: object, root: Path, where: str) -> _Model:
    """Check a document; relative paths in it become absolute, from `root`. `where` is what messages call it.

    Raises:
        ManifestError: it breaks the schema; one line with every problem.
    """
    try:
        return kind.model_validate(document, context={"root": root})
    except ValidationError as e:
        raise ManifestError(f"{where}: " + "; ".join(describe(e, kind, cast("Json", document)))) from e


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no number in JSON")


def _yaml_hint(path: Path, text: str) -> str:
    """What to do with a manifest that is YAML: by its name, or because it begins like it and not like JSON."""
    if path.suffix not in (".yaml", ".yml") and not re.match(r"\s*(#.*\s+|---\s+)*\w+:(\s|$)", text):
        return ""
    convert = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout, indent=2)"
    return f"; it looks like YAML, and a manifest is JSON: python -c '{convert}' < {path} > models.json"


def _hint(error: ValueError, text: str) -> str:
    """What to do with what people write that is no JSON, by the character where reading stopped."""
    if not text.strip():
        return "; the file is empty"
    if not isinstance(error, json.JSONDecodeError):
        return ""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if after.startswith(("//", "/*", "#")):
        return "; JSON has no comments: take it out"
    if after.startswith("'"):
        return '; JSON has texts in double quotes, "'
    if after.startswith(("}", "]")) and before.endswith(","):
        return "; take out the comma before it"
    if word := re.match(r"True|False|None", after):
        return f"; JSON writes {_WORDS[word[0]]}"
    return ""


def manifest_schema() -> str:
    """JSON Schema of a manifest, as shipped in `fleet/manifest/manifest.schema.json`."""
    schema = Manifest.model_json_schema(by_alias=True)
    for definition in schema["$defs"].values():
        for part in definition.get("properties", {}).values():
            if "const" in part:  # what tells the types of a union apart
                part.setdefault("description", f"Says which one it is. {definition['description'].splitlines()[0]}")
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"
