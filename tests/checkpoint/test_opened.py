"""Addresses of models, opened: what is kept, and what it weighs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fleet.checkpoint import opened
from fleet.checkpoint.headers import TENSOR_BYTES
from fleet.checkpoint.opened import open_curvature, open_full, open_model, open_model_folder
from fleet.checkpoint.row_tables import RUN_BYTES
from fleet.checkpoint.tokens import tokenizer_of
from fleet.checkpoint.views import VIEW_BYTES
from fleet.checkpoint.vocabulary import Vocabulary
from fleet.core.errors import CheckpointError, SourceError
from fleet.store import open_folder
from tests.pico import VOCAB_SIZE, make_tokenizer, write_adapter, write_model

CONFIG = {"model_type": "llama", "vocab_size": VOCAB_SIZE}


def model_in(folder: Path, rows: int = VOCAB_SIZE, **more: torch.Tensor) -> str:
    """The address of a model with an embedding and a norm: two tensors."""
    write_model(folder, CONFIG, {"embed_tokens.weight": torch.ones(rows, 2), "norm.weight": torch.ones(2), **more})
    make_tokenizer(folder)
    return str(folder)


def test_open_model_again_gives_the_same_headers_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = model_in(tmp_path / "model")
    model = open_model(uri)
    monkeypatch.setattr(opened, "read_model", lambda folder: pytest.fail("read again"))
    assert open_full(uri) is model


def test_open_curvature_again_gives_the_same_headers_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = model_in(tmp_path / "fisher")
    curvature = open_curvature(uri)
    monkeypatch.setattr(opened, "read_curvature", lambda folder: pytest.fail("read again"))
    assert open_curvature(uri) is curvature


def test_open_full_of_an_adapter_is_refused_by_its_address(tmp_path: Path) -> None:
    factors = {"m.lora_A.weight": torch.ones(1, 2), "m.lora_B.weight": torch.ones(3, 1)}
    uri = str(write_adapter(tmp_path / "lora", {}, factors))
    with pytest.raises(CheckpointError, match="lora is an adapter"):
        open_full(uri)


def test_open_model_folder_of_a_plain_address_is_the_stores(tmp_path: Path) -> None:
    uri = model_in(tmp_path / "model")
    assert open_model_folder(uri) == open_folder(uri)


def test_open_model_folder_of_a_vocabularys_address_is_its_view(tmp_path: Path) -> None:
    uri = model_in(tmp_path / "model")
    address = Vocabulary(aligned=uri, base=uri).address(uri)
    folder = open_model_folder(address)
    assert folder.uri == address
    assert folder.files().keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert open_full(address).folder.uri == address


def test_memory_of_headers_is_that_of_their_tensors(tmp_path: Path) -> None:
    factors = {"m.lora_A.weight": torch.ones(1, 2), "m.lora_B.weight": torch.ones(3, 1), "n.bias": torch.ones(3)}
    adapter = str(write_adapter(tmp_path / "lora", {"bias": "all"}, factors))
    model = model_in(tmp_path / "model")
    assert open_model(adapter).memory_bytes == 3 * TENSOR_BYTES
    assert open_model(model).memory_bytes == 2 * TENSOR_BYTES


def test_memory_of_an_fp8_models_headers_is_also_that_of_its_view(tmp_path: Path) -> None:
    write_model(tmp_path, CONFIG, {"m.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "norm": torch.ones(2)})
    assert open_model(str(tmp_path)).memory_bytes == 2 * (TENSOR_BYTES + VIEW_BYTES)


def test_memory_of_a_model_in_another_vocabulary_is_also_that_of_its_runs_of_rows(tmp_path: Path) -> None:
    aligned, padded = model_in(tmp_path / "aligned"), model_in(tmp_path / "padded", VOCAB_SIZE + 8)
    address = Vocabulary(aligned=aligned, base=aligned).address(padded)
    # The norm is as it is. The embedding is one run of `padded`, and would take tokens that it lacks from the aligned
    # model's table in this vocabulary, which is one run of its own.
    assert open_model(address).memory_bytes == 2 * TENSOR_BYTES + VIEW_BYTES + 2 * (2 * VIEW_BYTES + RUN_BYTES)


def test_open_model_folder_of_a_gguf_file_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "m-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r'gguf_file="m-Q4\.gguf"'):
        open_model_folder(str(tmp_path / "m-Q4.gguf"))


def test_open_model_folder_with_one_slash_after_a_scheme_says_two(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"two slashes after its scheme: s3://$"):
        open_model_folder(f"{tmp_path}/s3:/bucket/model").files()


def test_tokenizer_that_the_library_cannot_read_is_refused_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": null}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no tokenizer that can be read"):
        tokenizer_of(open_folder(str(tmp_path)))
