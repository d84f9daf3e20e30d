"""What the command says of a manifest with a mistake in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from fleet.core.errors import ManifestError
from fleet.manifest import load_manifest, manifest_schema

MINIMAL: dict[str, Any] = {
    "schema": 1,
    "name": "m",
    "base": {"unaligned": "u", "aligned": "a"},
    "models": [{"name": "x", "source": "x"}],
    "variants": [{"name": "v", "realign": None, "fuse": {"method": "ties"}}],
    "evaluation": {"harmfulness": ["h"]},
    "artifacts": "artifacts",
}


def mistake(folder: Path, where: str, value: Any) -> str:
    """What is said of the minimal manifest with `value` at a dotted path; `...` takes the field away."""
    document = deepcopy(MINIMAL)
    *path, last = where.split(".")
    part: Any = document
    for key in path:
        part = part[int(key)] if isinstance(part, list) else part.setdefault(key, {})
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return refused(folder, json.dumps(document))


def refused(folder: Path, text: str, name: str = "models.json") -> str:
    path = folder / name
    path.write_text(text)
    with pytest.raises(ManifestError) as e:
        load_manifest(path)
    message = str(e.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("variants.0.fuse.method", "tie", "variants.0.fuse: no method is called 'tie'; did you mean ties?"),
        ("variants.0.realign", {"method": "safemerg"}, "no method is called 'safemerg'; did you mean safemerge?"),
        ("variants.0.realign", {"method": "Safe-LoRA"}, "did you mean safe_lora?"),
        ("variants.0.realign", {"threshold": 1}, "variants.0.realign: no method is given; add the field"),
        ("variants.0.fuse.method", "qqq", "no method is called 'qqq'; there are weight_average, task_arithmetic"),
        ("variants.0.fuse.densty", 0.5, "variants.0.fuse.densty: unknown field; did you mean density?"),
        ("gates.harmfulnes_max", 0.5, "gates.harmfulnes_max: unknown field; did you mean harmfulness_max?"),
        ("colour", 1, "colour: unknown field; remove it or correct its name"),
        ("checkpoint.vocabulary", {"modell": "x"}, "checkpoint.vocabulary.modell: unknown field; did you mean model?"),
        ("gates.harmfulness_max", 5, "should be less than or equal to 1; for 5 % write 0.05"),
        ("gates.confidence", 95, "should be less than 1; for 95 % write 0.95"),
        ("variants.0.fuse.density", 20, "over 0, at most 1; for 20 % write 0.2"),
        ("variants.0.fuse.density", "a", "variants.0.fuse.density: should be a number or a list, in [ ]"),
        (
            "variants.0.fuse.density",
            [{"filter": "q", "value": "a"}],
            "variants.0.fuse.density.0.value: should be a number or a list, in [ ]",
        ),
        ("checkpoint.vocabulary", "aligend", "'aligend' isn't known here; did you mean aligned?"),
        ("evaluation.harmfulness", "h", "evaluation.harmfulness: should be a list, in [ ]"),
        ("base", "org/model", "base: should be an object, in { }"),
        ("placement.workers", "two", "placement.workers: should be a whole number"),
        ("models.0.name", ..., "models.0.name: missing"),
        ("models.0.source", "$HOME/x", "$HOME/x: variables such as $HOME aren't filled in; write the path itself"),
        ("models.0.source", "${WORK}/x", "variables such as ${WORK} aren't filled in"),
        ("tracking.uri", "mlflow.db", "write sqlite:///mlflow.db"),
        ("tracking.uri", "file:///runs", "no plain folder or file any more"),
        ("tracking.uri", "sqlite:///", "names no file that stays; write sqlite:///mlflow.db"),
        ("tracking.uri", "sqlite:///:memory:", "names no file that stays"),
        ("tracking.uri", "sqlite://mlflow.db", "names no file that stays"),
    ],
)  # fmt: skip
def test_mistake_is_one_line_with_the_field_and_the_fix(tmp_path: Path, where: str, value: Any, said: str) -> None:
    message = mistake(tmp_path, where, value)
    assert said in message
    assert message.count(";") <= 1 and "function-" not in message and "tuple[" not in message, "nothing follows from it"


def test_field_under_a_wrong_name_is_not_called_missing_too(tmp_path: Path) -> None:
    document = {("evalution" if key == "evaluation" else key): value for key, value in MINIMAL.items()}
    assert refused(tmp_path, json.dumps(document)) == "evalution: unknown field; did you mean evaluation?"


def test_two_mistakes_are_both_said(tmp_path: Path) -> None:
    document = MINIMAL | {"name": "a b", "artifacts": 3}
    first, second = refused(tmp_path, json.dumps(document)).split("; ")
    assert first.startswith("name: 'a b' doesn't match") and second == "artifacts: should be a text, in quotes"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("models.yaml", '{"schema": 1,}', "it looks like YAML"),
        ("models.json", "# a comment\nschema: 1\n", "a manifest is JSON: python -c"),
        ("models.json", '{"schema": 1,}', "not valid JSON: "),
        ("models.json", '{"schema": NaN}', "NaN is no number in JSON"),
        ("models.json", "[" * 100_000, "nested too deeply"),
        ("models.json", "[]", "should be an object"),
        ("models.json", "", "not valid JSON: Expecting value"),
    ],
)
def test_file_that_is_no_manifest_is_told_what_it_is(tmp_path: Path, name: str, text: str, said: str) -> None:
    message = refused(tmp_path, text, name)
    assert said in message
    assert ("YAML" in said or "python" in said) == ("YAML" in message)


def test_folder_and_other_encodings_are_named_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"a folder; give the manifest in it, such as .*models\.json"):
        load_manifest(tmp_path)
    path = tmp_path / "models.json"
    path.write_text(json.dumps(MINIMAL), encoding="utf-16")
    with pytest.raises(ManifestError, match=r"is UTF-16 or UTF-32; save it as UTF-8"):
        load_manifest(path)


def test_byte_order_mark_and_editors_schema_change_nothing(tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain.json", tmp_path / "marked.json"
    plain.write_text(json.dumps(MINIMAL))
    marked.write_text(json.dumps({"$schema": "manifest.schema.json"} | MINIMAL), encoding="utf-8-sig")
    first, second = load_manifest(plain), load_manifest(marked)
    assert first.model_dump_json(by_alias=True) == second.model_dump_json(by_alias=True)


def test_home_folder_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    path = tmp_path / "models.json"
    path.write_text(json.dumps(MINIMAL | {"artifacts": "~/artifacts"}))
    assert load_manifest(path).artifacts == "/home/someone/artifacts"


def test_schema_describes_every_property_and_tells_every_union_apart() -> None:
    schema = json.loads(manifest_schema())
    bare = [where for where, part in _properties(schema, "") if not _described(schema, part)]
    assert bare == []
    unions = [where for where, part in _parts(schema, "") if _is_bare_union(part)]
    assert unions == []


def _described(schema: dict[str, Any], part: dict[str, Any]) -> bool:
    """pydantic leaves a description out where the type's own says the same."""
    name = part.get("$ref", "").rpartition("/")[2]
    return "description" in part or "description" in schema["$defs"].get(name, {})


def _parts(node: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        yield where, node
        for key, value in node.items():
            yield from _parts(value, f"{where}/{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _parts(value, f"{where}/{i}")


def _properties(schema: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, part in _parts(schema, where):
        if not path.endswith("/properties"):
            for name, value in part.get("properties", {}).items():
                yield f"{path}/{name}", value


def _is_bare_union(part: dict[str, Any]) -> bool:
    options = part.get("anyOf", part.get("oneOf", ()))
    return sum("$ref" in option for option in options) > 1 and "discriminator" not in part
