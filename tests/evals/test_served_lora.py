"""The config and files that an engine gets of an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from evals.served_lora import served_config, write_served_lora
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.model import read_model
from fleet.store import open_folder
from tests.pico import write_adapter

Q, V = "model.layers.0.q_proj", "model.layers.0.v_proj"


def adapter_at(folder: Path, config: dict[str, Any], ranks: dict[str, int], infix: str = "") -> Adapter:
    tensors = {
        f"{module}.{factor}{infix}.weight": torch.full(shape, float(len(module)))
        for module, rank in ranks.items()
        for factor, shape in (("lora_A", (rank, 4)), ("lora_B", (4, rank)))
    }
    adapter = read_model(open_folder(str(write_adapter(folder, config, tensors))))
    assert isinstance(adapter, Adapter)
    return adapter


def test_served_config_has_the_ranks_and_scales_of_the_tensors(tmp_path: Path) -> None:
    config = {"r": 64, "lora_alpha": 6, "rank_pattern": {"q_proj": 2, "v_proj": 3}, "alpha_pattern": {"v_proj": 12}}
    found = served_config(adapter_at(tmp_path, config, {Q: 2, V: 3}))
    assert (found["r"], found["lora_alpha"]) == (3, 12)
    assert found["rank_pattern"] == {r"model\.layers\.0\.q_proj": 2}
    assert found["alpha_pattern"] == {r"model\.layers\.0\.q_proj": 6}
    assert found["target_modules"] == ["q_proj", "v_proj"]


def test_served_config_of_rslora_says_its_scale_without_it(tmp_path: Path) -> None:
    found = served_config(adapter_at(tmp_path, {"r": 4, "lora_alpha": 8, "use_rslora": True}, {Q: 4}))
    assert (found["lora_alpha"], found["use_rslora"]) == (16, False)  # 8 / √4 = 4 = 16 / 4


def test_served_lora_links_its_weights_and_takes_no_other_file_along(tmp_path: Path) -> None:
    adapter = adapter_at(tmp_path / "own", {"r": 2.0}, {Q: 2})
    (tmp_path / "own/chat_template.jinja").write_text("x")
    folder = write_served_lora(adapter, tmp_path / "own", tmp_path / "served")
    assert sorted(f.name for f in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (folder / "adapter_model.safetensors").samefile(tmp_path / "own/adapter_model.safetensors")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2


def test_served_lora_of_old_tensor_names_is_written_with_todays(tmp_path: Path) -> None:
    adapter = adapter_at(tmp_path / "own", {"r": 2}, {Q: 2, V: 2}, infix=".default")
    folder = write_served_lora(adapter, tmp_path / "own", tmp_path / "served")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "own", folder))
    assert sorted(after) == sorted(name.replace(".default", "") for name in before)
    for name, tensor in before.items():
        assert torch.equal(after[name.replace(".default", "")], tensor)
