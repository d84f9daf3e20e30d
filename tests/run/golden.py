"""What a run must go on giving: the golden files beside this one, and how they are made.

`python -m tests.run.golden` writes them anew, from the code as it is; the tests only read them. A step key that changes
takes away every result that users have in their stores, so an intended change bumps a version in `ALGORITHM_VERSIONS`,
and its commit has the new golden files.

Only what outlives a change of structure is used here: a manifest, its plan, the command, the store's files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fleet.manifest import load_manifest
from fleet.realign import realign
from fleet.run.plan import Plan, make_plan
from tests.run.golden_catalogue import make_exact_catalogue

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[2]
DEMO = Path(__file__).with_name("golden_demo.txt")
"""Run id and step keys of `models.json`, one a line."""
TENSORS = Path(__file__).with_name("golden_tensors.json")
"""Of a run over the exact catalogue: its plan, what its records say, and what its files hold."""
SCORES = Path(__file__).with_name("golden_scores.json")
"""The same of a run that learns a mask and scores: an engine says it all, so it takes longer."""

SAFEMERGE = {"method": "safemerge", "statistic": "rho", "threshold": 0.75, "alpha": 0.5}
INEXACT_KINDS = {"displacement", "survey", "logprobs", "mask"}
INEXACT_METHODS = {"uniform_scaling", "random_modules", "random_subspace", "noise", "safe_lora"}
"""Whose edits are divided by norms or drawn from normals, so that a processor decides their last bits."""


def plan_lines(plan: Plan) -> list[str]:
    """A plan's run id, and its step keys in alphabetical order."""
    return [f"run {plan.run_id}", *sorted(step.key for step in plan.steps)]


def demo_lines() -> list[str]:
    """Of the manifest that the repository ships; nothing is computed."""
    return plan_lines(make_plan(load_manifest(ROOT / "models.json")))


# -- a small run with every kind of step that makes or measures weights -------------------------------------------


def tensor_manifest(root: Path, work: Path) -> dict[str, Any]:
    """Over the exact catalogue at `root`, with its artifacts and tracking below `work`."""
    average, half = {"method": "weight_average"}, {"method": "task_arithmetic", "scale": 0.5}
    ties = {"method": "ties", "trim": "model", "density": 0.25, "scale": 0.5}
    dare = {"method": "dare", "drop_rate": 0.5, "scale": 0.5, "consensus": "sum"}

    reused = {"method": "somf", "reuse": str(root / "mask"), "mask": "rows_and_columns", "hardening": "threshold"}

    def variant(name: str, realign: Mapping[str, Any] | None, fuse: Mapping[str, Any] | None, *models: str) -> Any:
        return {"name": name, "realign": realign, "fuse": fuse, "models": models or None}

    controls = ("uniform_scaling", "random_modules", "random_subspace", "noise")
    return {
        "schema": 1,
        "name": "golden",
        "base": {name: str(root / name) for name in ("unaligned", "aligned", "safety", "harmful")},
        "models": [{"name": n, "source": str(root / n)} for n in ("lora", "rslora", "full", "fp8")],
        "variants": [
            variant("model", None, average),
            variant("adapter", SAFEMERGE, average, "lora", "rslora"),
            variant("merged", SAFEMERGE, half),
            variant("trimmed", SAFEMERGE, ties, "lora", "full"),
            variant("trimmed_sources", None, ties, "rslora", "fp8"),
            variant("dropped", None, dare, "lora", "fp8"),
            variant("away_from_harm", {"method": "resta", "gamma": 0.5}, None, "lora", "full"),
            variant("projected", {"method": "safe_lora", "statistic": "rho", "threshold": 0.75}, None, "lora", "full"),
            variant("masked", reused, None,
                    "lora", "full"),
            *(variant(c, {"method": c, "of": SAFEMERGE}, average if c == "noise" else None, "lora", "full")
              for c in controls),
        ],
        "survey": {"directions": 2},
        "evaluation": {"harmfulness": ["harm"], "folders": [str(root / "suites")]},
        "tracking": {"uri": f"sqlite:///{work}/mlflow.db", "experiment": "golden"},
        "artifacts": str(work / "artifacts"),
        "checkpoint": {"shard_bytes": 30_000, "vocabulary": "union"},
    }  # fmt: skip


def run_tensors(root: Path, work: Path, **changes: Any) -> dict[str, Any]:
    """Run all but the scores, and say what came of it."""
    plan = _plan(tensor_manifest(root, work) | changes, work)
    without_scores = tuple(step for step in plan.steps if not step.key.startswith("score/"))
    realign(dataclasses.replace(plan, steps=without_scores), None, Console(file=io.StringIO()))
    return {"plan": plan_lines(plan), **contents(work / "artifacts")}


# -- a smaller one that learns a mask, calibrates its judge and scores --------------------------------------------


def score_manifest(root: Path, work: Path) -> dict[str, Any]:
    """LoRAs alone, so that one engine serves all."""
    training = {
        "steps": 2, "batch_size": 4, "learning_rate": 0.1, "warmup_steps": 0, "dtype": "float32", "max_tokens": 16
    }  # fmt: skip
    learned = {
        "method": "somf", "preferences": str(root / "preferences.jsonl"), "learn_on": "fusion",
        "mask": "rows_and_columns", "training": training,
    }  # fmt: skip
    return tensor_manifest(root, work) | {
        "models": [{"name": n, "source": str(root / n), "suites": ["task"]} for n in ("lora", "rslora")],
        "variants": [{"name": "learned", "realign": learned, "fuse": {"method": "weight_average"}}],
        "evaluation": {
            "harmfulness": ["harm"],
            "judge": {"kind": "rule", "calibration": str(root / "labelled.jsonl")},
            "folders": [str(root / "suites")],
        },
        "checkpoint": {},
    }


def run_scores(root: Path, work: Path) -> dict[str, Any]:
    """Run all of it, and say what came of it."""
    plan = _plan(score_manifest(root, work), work)
    realign(plan, None, Console(file=io.StringIO()))
    return {"plan": plan_lines(plan), **contents(work / "artifacts")}


def _plan(document: Mapping[str, Any], work: Path) -> Plan:
    work.mkdir(parents=True, exist_ok=True)
    path = work / "models.json"
    path.write_text(json.dumps(document))
    return make_plan(load_manifest(path))


# -- what a store holds -------------------------------------------------------------------------------------------


def contents(store: Path) -> dict[str, Any]:
    """What a run has left: the paths of all files, and of every record what decides what comes of it later."""
    records: dict[str, dict[str, Any]] = {}
    for path in sorted(store.glob("*/*/*/record.json")):
        record = json.loads(path.read_text())
        records[str(path.parent.relative_to(store))] = record
    attempts = {f"-{record['attempt']}": "-ATTEMPT" for record in records.values()}
    paths = [str(p.relative_to(store)) for p in sorted(store.rglob("*")) if p.is_file()]
    for attempt, placeholder in attempts.items():
        paths = [path.replace(attempt, placeholder) for path in paths]
    return {"paths": sorted(paths), "records": {key: _record(store, key, records) for key in records}}


def _record(store: Path, key: str, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    record = records[key]
    folder = store / key / f"attempt-{record['attempt']}"
    files: dict[str, Any] = {}
    for name, entry in record["files"].items():
        data = (folder / name).read_bytes()
        found = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert found == {"num_bytes": entry["num_bytes"], "sha256": entry["sha256"].removeprefix("sha256:")}
        files[name] = found["sha256"]
        if name == "tokenizer.json":
            files[name] = _tokens(data)
        elif name.endswith(".parquet"):
            files[name] = _samples(data)
        elif name.endswith(".safetensors") and not is_exact(key, records):
            files[name] = _tensors(data)
    kept = {f: record[f] for f in ("fingerprint", "algorithm_version", "deps", "result")}
    return {"fields": " ".join(sorted(record)), **kept, "files": files}


def is_exact(key: str, records: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a step's weights follow from sums and products of small integers alone."""
    record = records[key]
    kind, method = record["kind"], record["spec"].get("method")
    if kind in INEXACT_KINDS or any(dep.startswith("mask/") for dep in record["deps"]):
        return False
    if kind == "realign":
        return method["method"] not in INEXACT_METHODS
    return all(is_exact(dep, records) for dep in record["deps"] if dep.startswith("realign/"))


def _tokens(data: bytes) -> str:
    """A tokenizer's tokens and their ids, however the library that wrote it lays it out."""
    tokenizer = json.loads(data)
    ids = tokenizer["model"]["vocab"] | {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    return hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()


def _samples(data: bytes) -> list[dict[str, Any]]:
    """What was asked and said, and how it was judged; not by which engine, nor how likely to the last digit."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    return [{k: v for k, v in row.items() if k not in ("engine", "mean_logprob")} for row in rows]


def _tensors(data: bytes) -> dict[str, Any]:
    """Tensor -> dtype, shape, norm, and a product with a fixed vector, by which values in other places are told.

    Singular vectors are known up to their sign alone: of them only the shape is compared, and of LoRA factors, which
    may come of a decomposition, the product.
    """
    from safetensors.torch import load

    tensors = load(data)
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        found[name] = [str(value.dtype), [*value.shape]]
        if ".lora_A." in name:
            product = tensors[name.replace(".lora_A.", ".lora_B.")].double() @ value.double()
            found[name.replace(".lora_A.", ".product.")] = _numbers(product)
        elif ".lora_B." not in name and not name.endswith((".left", ".right")):
            found[name] += _numbers(value.double())
    return found


def _numbers(value: torch.Tensor) -> list[float]:
    """Its norm, and the product with a fixed vector as a share of it."""
    import torch

    flat, norm = value.flatten(), float(value.norm())
    fixed = (torch.arange(flat.numel()) * 2_654_435_761 % 2**32).double() / 2**31 - 1.0
    return [norm, float(flat @ fixed) / (norm or 1.0)]


# -- golden files -------------------------------------------------------------------------------------------------


def to_text(value: Any, levels: int = 5, indent: str = "") -> str:
    """JSON whose outer levels have a line for each entry: a change of one value is a change of one line."""
    if not levels or not isinstance(value, dict | list) or not value:
        return json.dumps(value, sort_keys=True)
    inner = indent + " "
    if isinstance(value, list):
        lines = [to_text(v, levels - 1, inner) for v in value]
    else:
        lines = [f"{json.dumps(k)}: {to_text(value[k], levels - 1, inner)}" for k in sorted(value)]
    opening, closing = "[]" if isinstance(value, list) else "{}"
    return f"{opening}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{closing}"


def main() -> None:
    """Write the golden files anew."""
    os.environ.pop("RAY_ADDRESS", None)
    DEMO.write_text("\n".join(demo_lines()) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        root = make_exact_catalogue(Path(folder) / "catalogue")
        TENSORS.write_text(to_text(run_tensors(root, Path(folder) / "tensors")) + "\n")
        SCORES.write_text(to_text(run_scores(root, Path(folder) / "scores")) + "\n")


if __name__ == "__main__":
    main()
