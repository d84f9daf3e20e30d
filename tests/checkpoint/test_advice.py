"""What a folder without safetensors weights is told: each command is one that works."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoModelForCausalLM

from fleet.checkpoint.advice import advice
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import read_model
from fleet.core.errors import CheckpointError
from fleet.store import open_folder


@pytest.mark.parametrize(
    ("what", "files", "told"),
    [
        (
            "model",
            ["config.json", "pytorch_model_fsdp_0/__0_0.distcp"],
            "merge-weights FOLDER/pytorch_model_fsdp_0 OUT",
        ),
        ("model", ["optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/__1_0.distcp"], "FOLDER/pytorch_model_fsdp_0"),
        ("adapter", ["adapter_config.json", "__0_0.distcp"], "accelerate merge-weights FOLDER OUT"),
        ("model", ["global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "zero_to_fp32.py . OUT --safe_ser"),
        ("model", ["checkpoint-9/zero_to_fp32.py"], "--safe_serialization` in FOLDER/checkpoint-9"),
        (
            "model",
            [
                f"checkpoint-{n}/{f}"
                for n in (50, 250, 100)
                for f in ("adapter_config.json", "adapter_model.safetensors")
            ],
            "point the source at the folder's checkpoint-250, the last of 3 checkpoints",
        ),
        ("model", ["snapshots/abc/config.json", "snapshots/abc/model.safetensors"], "hold a model: snapshots/abc"),
        ("model", ["config.json", "pytorch_model-00001-of-00002.bin", "training_args.bin"], "save_pretrained.OUT"),
        ("adapter", ["adapter_model.bin"], "PeftModel.from_pretrained"),
        ("model", ["consolidated.00.pth", "params.json"], "Meta's own layout"),
        ("model", ["final.pt"], "final.pt is a pickle.*load_state_dict"),
        ("model", ["m-Q4_K_M.gguf"], r'gguf_file="m-Q4_K_M\.gguf"'),
        ("model", ["consolidated.safetensors"], "Mistral's own layout"),
        ("model", ["tf_model.h5"], "another framework's"),
        ("model", ["training_args.bin", "optimizer.pt", "rng_state_0.pth"], "^found: optimizer.pt, rng_state_0"),
        ("model", [], "^found: nothing"),
    ],
)
def test_advice_is_what_gets_weights_out_of_what_is_there(what: str, files: list[str], told: str) -> None:
    import re

    line = advice(what, files)
    assert re.search(told, line), line
    assert "\n" not in line


@pytest.mark.parametrize("kept", [["config.json"], []])
def test_folder_of_checkpoints_alone_is_refused_with_the_last(catalogue: Path, tmp_path: Path, kept: list[str]) -> None:
    for step in (5, 25):
        shutil.copytree(catalogue / "full", tmp_path / f"checkpoint-{step}")
    for name in kept:
        shutil.copy(catalogue / "full" / name, tmp_path)
    with pytest.raises(CheckpointError, match="point the source at the folder's checkpoint-25,"):
        read_model(open_folder(str(tmp_path)))


@pytest.mark.slow
def test_fsdps_shards_merged_as_advised_are_the_model(catalogue: Path, tmp_path: Path) -> None:
    shards, out = tmp_path / "pytorch_model_fsdp_0", tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(catalogue / "full")
    save({"model": model.state_dict()}, checkpoint_id=shards, no_dist=True)
    shutil.copy(catalogue / "full" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"no safetensors weights.*accelerate merge-weights"):
        read_model(open_folder(str(tmp_path)))
    merge_fsdp_weights(str(shards), str(out))
    shutil.copy(catalogue / "full" / "config.json", out)
    assert isinstance(read_model(open_folder(str(out))), FullModel)


def test_pickled_weights_saved_as_advised_are_the_model(catalogue: Path, tmp_path: Path) -> None:
    """`from_pretrained` and `save_pretrained`; the pickle is made here."""
    shutil.copy(catalogue / "full" / "config.json", tmp_path)
    expected = load_file(catalogue / "full" / "model.safetensors")
    torch.save(expected, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        read_model(open_folder(str(tmp_path)))
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "out")
    model = read_model(open_folder(str(tmp_path / "out")))
    assert isinstance(model, FullModel)
    assert set(model.tensors) == set(expected)


@pytest.mark.parametrize(
    ("what", "files", "told"),
    [
        ("model", {"config.json", "MODEL.SafeTensors"}, "rename it to model.safetensors"),
        ("adapter", {"adapter_config.json", "model.safetensors"}, "rename model.safetensors to it"),
        ("model", {"adapter_model.safetensors"}, "copy the adapter_config.json"),
        ("model", {"tokenizer.json", "model.safetensors"}, "copy the config.json of the model"),
    ],
)
def test_advice_on_weights_that_nothing_tells(what: str, files: set[str], told: str) -> None:
    assert told in advice(what, files)
