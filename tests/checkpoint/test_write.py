"""What is written beside weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from fleet.algebra.delta import LowRank
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.model import read_model, require_full_model
from fleet.checkpoint.opened import open_full
from fleet.checkpoint.shards import ADAPTER_FILE, Output, Shard
from fleet.checkpoint.write import write_adapter, write_shard
from fleet.store import open_folder

NAME = "model.layers.0.self_attn.q_proj.weight"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_full(source: Path, aligned: Path, out: Path) -> list[str]:
    """Files of a model that is written like the one at `source`, one tensor of it."""
    like, base = open_full(str(source)), open_full(str(aligned))
    shard = Shard("model.safetensors", (NAME,), {NAME: "model.safetensors"})
    pieces = torch.ones(like.tensors[NAME].shape)
    return sorted(write_shard(Output(str(out), "out"), shard, like, base, lambda name: [pieces]))


def write_lora(source: Path, aligned: Path, out: Path) -> list[str]:
    adapter, base = read_model(open_folder(str(source))), open_full(str(aligned))
    assert isinstance(adapter, Adapter)
    d_out, d_in = base.tensors[NAME].shape
    delta = LowRank(torch.ones(d_out, 1), torch.ones(1, d_in))
    shard = Shard(ADAPTER_FILE, (NAME,), {})
    written = write_adapter(Output(str(out), "out"), shard, base, {NAME: 1}, lambda name: delta, [adapter])
    return sorted(written.files)


@pytest.fixture
def bare(catalogue: Path, tmp_path: Path) -> Path:
    """A full model without a tokenizer."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(catalogue / "full" / name, folder)
    return folder


def test_full_model_of_a_source_without_tokenizer_is_written_with_the_aligned_ones(
    catalogue: Path, tmp_path: Path, bare: Path
) -> None:
    files = write_full(bare, catalogue / "aligned", tmp_path)
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} < set(files)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(catalogue / "aligned").get_vocab()


def test_full_model_of_a_source_without_tokenizer_keeps_its_chat_template(
    catalogue: Path, tmp_path: Path, bare: Path
) -> None:
    (bare / "chat_template.jinja").write_text(TEMPLATE)
    write_full(bare, catalogue / "aligned", tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE


def test_adapter_is_written_with_its_own_tokenizer_else_the_aligned_ones(catalogue: Path, tmp_path: Path) -> None:
    files = write_lora(catalogue / "lora", catalogue / "aligned", tmp_path / "a")
    assert {"adapter_config.json", ADAPTER_FILE, "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert AutoTokenizer.from_pretrained(tmp_path / "a" / "out").chat_template is not None
    own = Path(shutil.copytree(catalogue / "lora", tmp_path / "lora"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(catalogue / "aligned" / name, own)
    (own / "chat_template.jinja").write_text(TEMPLATE)
    write_lora(own, catalogue / "aligned", tmp_path / "b")
    assert AutoTokenizer.from_pretrained(tmp_path / "b" / "out").chat_template == TEMPLATE


def test_what_trainers_leave_beside_a_source_is_not_written(catalogue: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(catalogue / "full", tmp_path / "full"))
    (source / "trainer_state.json").write_text("{}")
    (source / "optimizer.pt").write_bytes(b"x")
    shutil.copytree(catalogue / "full", source / "checkpoint-5")
    expected = write_full(catalogue / "full", catalogue / "aligned", tmp_path / "a")
    assert write_full(source, catalogue / "aligned", tmp_path / "b") == expected
    written = json.loads((tmp_path / "b" / "out" / "config.json").read_text())
    assert written == json.loads((source / "config.json").read_text())
    assert require_full_model(read_model(open_folder(str(tmp_path / "b" / "out"))), "out").tensors.keys() == {NAME}
