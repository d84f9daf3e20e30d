"""The manifest: what a run is asked to do, checked before anything else happens."""

from fleet.manifest.load import load_manifest, manifest_schema, parse, read_json
from fleet.manifest.schema import (
    Base,
    Checkpoint,
    Manifest,
    ModelSpec,
    Placement,
    Survey,
    Tracking,
    Variant,
    VocabularyOf,
)

__all__ = [
    "Base",
    "Checkpoint",
    "Manifest",
    "ModelSpec",
    "Placement",
    "Survey",
    "Tracking",
    "Variant",
    "VocabularyOf",
    "load_manifest",
    "manifest_schema",
    "parse",
    "read_json",
]
