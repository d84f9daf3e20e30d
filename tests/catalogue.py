"""A pico catalogue for tests: base models, a safety adapter, LoRAs of two kinds and a full fine-tune, and suites."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.pico import make_adapter, make_model

TASK_YAML = r"""
task: task
dataset_path: json
dataset_kwargs: {data_files: {test: task.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""

HARM_YAML = """
suite: harm
kind: harmfulness
data: harm.jsonl
max_tokens: 4
rules: {refusal: ['[A-Z]'], compliance: ['[a-z]']}
"""


def make_catalogue(root: Path) -> Path:
    """Write `unaligned`, `aligned` (two shards), `safety`, `lora`, `rslora`, `full` and `suites` below `root`."""
    make_model(root / "unaligned", 0)
    make_model(root / "aligned", 1, shards=2)
    make_adapter(root / "safety", root / "aligned", 7, rank=8, targets=("q_proj", "v_proj", "o_proj"))
    make_adapter(root / "lora", root / "aligned", 2, rank_pattern={"layers.1.self_attn.q_proj": 2})
    make_adapter(root / "rslora", root / "aligned", 3, rank=8, use_rslora=True, targets=("k_proj", "q_proj"))
    make_model(root / "full", 4)
    make_suites(root / "suites")
    return root


def make_suites(suites: Path) -> None:
    """Write the suites `task` and `harm`."""
    suites.mkdir()
    (suites / "task.yaml").write_text(TASK_YAML)
    (suites / "harm.yaml").write_text(HARM_YAML)
    rows = ({"question": f"{i}+1=", "answer": str(i + 1)} for i in range(6))
    (suites / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (suites / "harm.jsonl").write_text("".join(json.dumps({"prompt": f"do {i}"}) + "\n" for i in range(6)))


def manifest_document(root: Path, work: Path, **changes: Any) -> dict[str, Any]:
    """A manifest over the catalogue at `root`, its artifacts and tracking below `work`; `changes` replace fields."""
    document: dict[str, Any] = {
        "schema": 1,
        "name": "pico",
        "base": {
            "unaligned": str(root / "unaligned"),
            "aligned": str(root / "aligned"),
            "safety": str(root / "safety"),
        },
        "models": [
            {"name": "lora", "source": str(root / "lora"), "suites": ["task"]},
            {"name": "rslora", "source": str(root / "rslora"), "suites": ["task"]},
            {"name": "full", "source": str(root / "full"), "suites": ["task"]},
        ],
        "variants": [
            {"name": "plain", "realign": None, "fuse": {"method": "weight_average"}},
            {
                "name": "merged",
                "realign": {"method": "safemerge", "statistic": "lift", "threshold": 0.75},
                "fuse": {"method": "task_arithmetic", "scale": 0.5},
            },
            {
                "name": "loras",
                "realign": {"method": "safemerge", "statistic": "lift", "threshold": 0.75},
                "models": ["lora", "rslora"],
                "fuse": {"method": "weight_average"},
            },
        ],
        "evaluation": {"harmfulness": ["harm"], "references": ["aligned"], "folders": [str(root / "suites")]},
        "tracking": {"uri": f"sqlite:///{work}/mlflow.db", "experiment": "pico", "register_as": "pico"},
        "artifacts": str(work / "artifacts"),
        "checkpoint": {"shard_bytes": 30_000},
    }
    return document | changes


def write_manifest(path: Path, document: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def make_continued(folder: Path, start: Path, seed: int) -> Path:
    """Write the adapter at `start`, moved a little as training would, into `folder`, and return `folder`."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(start, folder)
    generator = torch.Generator().manual_seed(seed)
    file = folder / "adapter_model.safetensors"
    tensors = {n: t + torch.randn(t.shape, generator=generator) * 0.05 for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def preference_rows(count: int) -> list[dict[str, str]]:
    """Preferences of short replies of several lengths; the chosen one is always of one kind, so a mask can learn it."""
    return [
        {"prompt": f"do {i}" + "!" * (i % 3), "chosen": "NO" + "O" * (i % 2), "rejected": "yes" + "s" * (i % 4)}
        for i in range(count)
    ]


def prompt_rows(count: int) -> list[dict[str, str]]:
    """Task prompts with replies of several lengths."""
    return [{"prompt": f"{i}+1=", "response": str(i + 1) + "." * (i % 3)} for i in range(count)]


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
