"""An adapter as vLLM takes it: its config written anew from what its tensors are. Light: no torch, no vllm.

vLLM reads the config beside an adapter by rules of its own, and refuses what PEFT takes: a rank written as 8.0, an `r`
that no module has because `rank_pattern` gives each its own, an initialisation as the word "true", biases that are
asked for and not there. All that a LoRA on Linears is stands in its headers, so the engine's config is made of them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from fleet.checkpoint.adapter import PEFT_PREFIX, Adapter
from fleet.checkpoint.headers import TensorInfo, TensorLayout, header_bytes
from fleet.checkpoint.shards import ADAPTER_FILE
from fleet.core.identity import Json

_COPY_BYTES = 16 << 20


def write_served_lora(adapter: Adapter, source: Path, folder: Path) -> Path:
    """Write an adapter that is nothing but a LoRA on Linears into `folder`, as vLLM takes it; returns the folder.

    Args:
        adapter: its headers.
        source: where its files are on this machine.
        folder: a new one. The weights in it are a link, if their names are those that vLLM looks for.
    """
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(served_config(adapter), indent=2))
    named = _named_tensors(adapter)
    if all(name == info.name for name, info in named.items()) and {info.file for info in named.values()} == {
        ADAPTER_FILE
    }:
        (folder / ADAPTER_FILE).symlink_to((source / ADAPTER_FILE).resolve())
    else:
        _rewrite(named, source, folder / ADAPTER_FILE)
    return folder


def served_config(adapter: Adapter) -> dict[str, Json]:
    """PEFT's config of what an adapter's tensors are: rank and alpha of each module, and nothing beside them. vLLM
    multiplies by alpha / rank, so a module's alpha is its scale times its rank."""
    rank = adapter.max_rank
    alphas = {name: _whole(module.scale * module.rank) for name, module in adapter.modules.items()}
    alpha = next(alphas[name] for name, module in adapter.modules.items() if module.rank == rank)
    ranks: dict[str, Json] = {re.escape(n): m.rank for n, m in adapter.modules.items() if m.rank != rank}
    others: dict[str, Json] = {re.escape(n): a for n, a in alphas.items() if a != alpha}
    targets: list[Json] = [*sorted({name.rpartition(".")[2] for name in adapter.modules})]
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": others,
        "target_modules": targets, "bias": "none", "use_rslora": False, "init_lora_weights": True,
    }  # fmt: skip


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _named_tensors(adapter: Adapter) -> dict[str, TensorInfo]:
    """The factors by the names that vLLM looks for: the base's module between PEFT's prefix and the factor's name."""
    found: dict[str, TensorInfo] = {}
    for name, module in adapter.modules.items():
        found[f"{PEFT_PREFIX}{name}.lora_A.weight"] = module.a
        found[f"{PEFT_PREFIX}{name}.lora_B.weight"] = module.b
    return found


def _rewrite(named: dict[str, TensorInfo], source: Path, file: Path) -> None:
    """The same tensors under other names, as bytes."""
    with file.open("wb") as out:
        out.write(header_bytes(TensorLayout(name, info.dtype, info.shape) for name, info in named.items()))
        for info in named.values():
            with (source / info.file).open("rb") as data:
                data.seek(info.start)
                left = info.num_bytes
                while chunk := data.read(min(left, _COPY_BYTES)):
                    out.write(chunk)
                    left -= len(chunk)
