"""Which files of a folder are its model's: what decides its identity, and what travels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fleet.checkpoint.companions import prompting_files
from fleet.checkpoint.headers import read_headers
from fleet.checkpoint.model import content_identity
from fleet.checkpoint.opened import open_model, open_model_folder
from fleet.store import open_folder
from tests.pico import write_adapter, write_model

FACTORS = {"m.lora_A.weight": torch.ones(1, 2), "m.lora_B.weight": torch.ones(3, 1)}


def folder_of(kind: str, path: Path) -> Path:
    if kind == "adapter":
        return write_adapter(path, {}, FACTORS)
    return write_model(path, {"model_type": "llama"}, {"m.weight": torch.ones(3, 2)})


def add(folder: Path, name: str, data: bytes = b"x") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({"other.weight": torch.full((1,), float(len(data)))}, path)
    else:
        path.write_bytes(data)


PROMPTING = (
    "additional_chat_templates/tools.jinja", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model",
    "tekken.json", "added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
    "tokenizer.json", "tokenizer_config.json", "qwen.tiktoken", "sentencepiece.bpe.model", "tokenizer.model.v3",
)  # fmt: skip
BUILDING = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "extra.safetensors")
LEFT = (
    "checkpoint-250/model.safetensors", "checkpoint-250/config.json", "optimizer.pt", "scheduler.pt", "rng_state_0.pth",
    "training_args.bin", "trainer_state.json", "README.md", "LICENSE", "runs/x/tfevents.1", "pytorch_model.bin",
    "global_step10/mp_rank_00_model_states.pt", "merged/model.safetensors", "merged/config.json", "params.json",
    "consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "train.log", "all_results.json",
)  # fmt: skip
LEFT_OF_ADAPTERS = tuple(name for name in LEFT if name != "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("model", n) for n in (*PROMPTING, *BUILDING)), *(("adapter", n) for n in PROMPTING)],
)
def test_file_that_decides_what_a_model_does_is_in_its_identity(tmp_path: Path, kind: str, name: str) -> None:
    folder = folder_of(kind, tmp_path / "m")
    found = {content_identity(open_model_folder(str(folder)))}
    for data in (b"x", b"xy"):
        add(folder, name, data)
        found.add(content_identity(open_model_folder(str(folder))))
        assert name in open_model_folder(str(folder)).files()
    assert len(found) == 3


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("model", n) for n in LEFT),
        *(("adapter", n) for n in (*LEFT_OF_ADAPTERS, "model.safetensors", "config.json", "merged/tokenizer.json")),
    ],
)
def test_file_that_trainers_leave_neither_counts_nor_travels(tmp_path: Path, kind: str, name: str) -> None:
    folder = folder_of(kind, tmp_path / "m")
    before, files = content_identity(open_model_folder(str(folder))), set(open_folder(str(folder)).files())
    add(folder, name)
    assert content_identity(open_model_folder(str(folder))) == before
    local = open_model_folder(str(folder)).local(tmp_path / "scratch")
    assert {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()} == files
    open_model(str(folder))


def test_weights_are_what_the_index_names_whatever_else_is_there(tmp_path: Path) -> None:
    """Names of anyone's choice; without the index all safetensors files would be."""
    folder = folder_of("model", tmp_path)
    (folder / "model.safetensors").rename(folder / "weights-1.safetensors")
    add(folder, "extra.safetensors")
    index = {"weight_map": {"m.weight": "weights-1.safetensors"}}
    assert set(read_headers(open_folder(str(folder)), "model")) == {"m.weight", "other.weight"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(read_headers(open_folder(str(folder)), "model")) == {"m.weight"}
    assert "extra.safetensors" not in open_model_folder(str(folder)).files()


def test_only_copy_in_another_dtype_is_the_weights(tmp_path: Path) -> None:
    folder = folder_of("model", tmp_path)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert set(read_headers(open_folder(str(folder)), "model")) == {"m.weight"}


def test_prompting_files_are_the_aligned_models_where_a_source_has_no_tokenizer(tmp_path: Path) -> None:
    own, aligned = tmp_path / "own", tmp_path / "aligned"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        add(aligned, name)
    add(own, "chat_template.jinja")
    add(own, "config.json")
    found = prompting_files(open_folder(str(own)), open_folder(str(aligned)))
    assert {name: Path(folder.uri).name for name, folder in found.items()} == {
        "tokenizer.json": "aligned", "tokenizer_config.json": "aligned", "chat_template.jinja": "own",
    }  # fmt: skip
    add(own, "tokenizer.model")
    assert set(prompting_files(open_folder(str(own)), open_folder(str(aligned)))) == {
        "chat_template.jinja",
        "tokenizer.model",
    }
