from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.belongs import check_belongs, check_config, check_head
from fleet.checkpoint.full_model import FullModel, read_full_model
from fleet.checkpoint.heads import HEAD_SCHEME, with_head_of
from fleet.checkpoint.model import read_model, touched_tensors
from fleet.checkpoint.opened import open_model, open_model_folder
from fleet.checkpoint.tables import same_values
from fleet.checkpoint.task_vectors import read_delta, read_weight
from fleet.checkpoint.tensors import read_tensor
from fleet.core.errors import CheckpointError
from fleet.store import open_folder
from tests.pico import make_adapter, make_model, write_adapter, write_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLE = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def model_at(folder: Path, tied: bool | None, head: torch.Tensor | None, **config: Any) -> FullModel:
    """A model of one table and perhaps a head; `tied` is what its config says, None nothing."""
    said = {} if tied is None else {"tie_word_embeddings": tied}
    tensors = {EMBEDDING: TABLE} if head is None else {EMBEDDING: TABLE, HEAD: head.clone()}
    write_model(folder, {"model_type": "llama", **said, **config}, tensors)
    return read_full_model(open_folder(str(folder)))


def test_head_beside_a_tied_config_is_dropped_if_it_is_the_embedding_and_refused_if_not(tmp_path: Path) -> None:
    aligned = model_at(tmp_path / "aligned", True, None)
    same = model_at(tmp_path / "same", True, TABLE)
    assert list(same.tensors) == [EMBEDDING]
    check_belongs(same, aligned)
    other = model_at(tmp_path / "other", True, TABLE + 1)
    with pytest.raises(CheckpointError, match=r'lm_head\.weight differs.*"tie_word_embeddings": false'):
        check_head(other)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        check_belongs(other, aligned)


def test_head_beside_a_silent_config_is_what_the_class_says(tmp_path: Path) -> None:
    assert list(model_at(tmp_path / "gemma", None, TABLE, model_type="gemma3_text").tensors) == [EMBEDDING]
    assert set(model_at(tmp_path / "llama", None, TABLE).tensors) == {EMBEDDING, HEAD}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_heads_values_are_compared_across_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    for change in (0.0, 1.0):
        write_model(tmp_path, {"model_type": "llama"}, {EMBEDDING: TABLE, HEAD: (TABLE + change).to(dtype)})
        model = read_full_model(open_folder(str(tmp_path)))
        assert same_values(model.folder, model.tensors[EMBEDDING], model.tensors[HEAD]) is (change == 0)


def test_untied_config_without_a_head_refused_with_the_way_out(tmp_path: Path) -> None:
    bare = model_at(tmp_path / "bare", False, None, architectures=["LlamaForCausalLM"])
    with pytest.raises(
        CheckpointError, match=r'hold no head beside model\.embed_tokens\.weight.*"tie_word_embeddings"'
    ):
        check_head(bare)
    check_head(model_at(tmp_path / "own", False, TABLE, architectures=["LlamaForCausalLM"]))
    check_head(model_at(tmp_path / "backbone", False, None, architectures=["LlamaModel"]))


def test_model_that_peft_untied_is_read_as_tied_beside_a_tied_one(tmp_path: Path) -> None:
    aligned, uri = model_at(tmp_path / "aligned", True, None), str(tmp_path / "merged")
    address = with_head_of(aligned, model_at(tmp_path / "merged", False, TABLE), uri)
    model = open_model(address)
    assert address.startswith(HEAD_SCHEME)
    assert isinstance(model, FullModel)
    assert list(model.tensors) == [EMBEDDING]
    assert model.config["tie_word_embeddings"] is True
    check_belongs(model, aligned)
    assert torch.equal(read_weight(model, EMBEDDING), TABLE)


def test_model_with_a_head_of_its_own_is_no_tied_one(tmp_path: Path) -> None:
    aligned, uri = model_at(tmp_path / "aligned", True, None), str(tmp_path / "trained")
    trained = model_at(tmp_path / "trained", False, TABLE + 1)
    assert with_head_of(aligned, trained, uri) == uri
    with pytest.raises(CheckpointError, match=r"extra tensors: lm_head\.weight.*tie_word_embeddings=False"):
        check_belongs(trained, aligned)


def test_tied_model_is_read_with_a_head_beside_one_that_has_its_own(tmp_path: Path) -> None:
    aligned, uri = model_at(tmp_path / "aligned", False, TABLE + 1), str(tmp_path / "tied")
    config = {"text_config": {"tie_word_embeddings": True}}
    model = open_model(with_head_of(aligned, model_at(tmp_path / "tied", True, None, **config), uri))
    assert isinstance(model, FullModel)
    assert torch.equal(read_tensor(model.folder, model.tensors[HEAD]), TABLE)
    assert (model.config["tie_word_embeddings"], model.config["text_config"]) == (False, {"tie_word_embeddings": False})


def test_model_read_with_another_head_loads_in_transformers(tmp_path: Path) -> None:
    """What is served: a local copy of the view, beside an untied model whose logits it must have but for the head."""
    make_model(tmp_path / "tied", 1)
    untied = AutoModelForCausalLM.from_pretrained(tmp_path / "tied", tie_word_embeddings=False)
    untied.lm_head.weight.data = untied.get_input_embeddings().weight.data.clone()
    untied.save_pretrained(tmp_path / "untied")
    aligned = read_full_model(open_folder(str(tmp_path / "untied")))
    address = with_head_of(aligned, read_full_model(open_folder(str(tmp_path / "tied"))), str(tmp_path / "tied"))
    local = open_model_folder(address).local(tmp_path / "scratch")
    assert json.loads((local / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.tensor([[1, 2, 3]])
    ours = AutoModelForCausalLM.from_pretrained(local)(ids).logits
    assert torch.equal(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "tied")(ids).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"targets": ("q_proj", "embed_tokens")},
        {"targets": ("q_proj", "lm_head")},
    ],
    ids=["embedding saved", "head saved", "both saved", "LoRA of the embedding", "LoRA of the head"],
)
def test_adapter_that_ensures_tying_is_a_tied_model(tmp_path: Path, options: dict[str, Any]) -> None:
    """A tied model of our weights says what the adapter does when PEFT runs it (peft 0.21.2's merge adds a LoRA of a
    tied table twice)."""
    make_model(tmp_path / "base", 1, dtype="float32")
    make_adapter(tmp_path / "lora", tmp_path / "base", 5, ensure_weight_tying=True, **options)
    aligned, adapter = (
        read_full_model(open_folder(str(tmp_path / "base"))),
        read_model(open_folder(str(tmp_path / "lora"))),
    )
    assert isinstance(adapter, Adapter)
    check_belongs(adapter, aligned)
    names = touched_tensors(adapter)
    assert EMBEDDING in names
    assert HEAD not in names
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    running = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "lora"))
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for name in names:
        delta = read_delta(adapter, name, weights[name])
        assert delta is not None
        weights[name] = weights[name] + delta.dense()
    model.load_state_dict(weights, strict=False)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(ids).logits, running(ids).logits, rtol=1e-4, atol=1e-4)


def test_adapter_that_ensures_tying_refused_on_a_base_with_a_head_of_its_own(tmp_path: Path) -> None:
    make_model(tmp_path / "tied", 1)
    make_model(tmp_path / "untied", 1, tie=False)
    make_adapter(tmp_path / "lora", tmp_path / "tied", 5, ensure_weight_tying=True, modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"ensure_weight_tying: .*this base has a head of its own"):
        check_belongs(
            read_model(open_folder(str(tmp_path / "lora"))), read_full_model(open_folder(str(tmp_path / "untied")))
        )


def test_adapter_with_added_tokens_on_a_tied_base_is_told_three_steps_at_once(tmp_path: Path) -> None:
    make_model(tmp_path / "base", 1)
    rows = TABLE.new_zeros(1000, 32)
    adapter = write_adapter_of_tables(tmp_path / "lora", rows)
    with pytest.raises(CheckpointError) as e:
        check_belongs(adapter, read_full_model(open_folder(str(tmp_path / "base"))))
    told = str(e.value)
    for part in ("(1) save the aligned model", "(2) fold", "resize_token_embeddings(1000)", "(3) give MERGED"):
        assert part in told
    assert "has no task vector" not in told


def write_adapter_of_tables(folder: Path, rows: torch.Tensor) -> Adapter:
    module = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": torch.zeros(1, 32),
        f"{module}.lora_B.weight": torch.zeros(128, 1),
        EMBEDDING: rows,
        HEAD: rows + 1,
    }
    write_adapter(folder, {"modules_to_save": ["embed_tokens", "lm_head"]}, tensors)
    adapter = read_model(open_folder(str(folder)))
    assert isinstance(adapter, Adapter)
    return adapter


@pytest.mark.parametrize("head", [TABLE, TABLE + 1])
def test_adapter_that_names_both_of_a_tied_bases_tables_is_taken_if_they_are_one(
    tmp_path: Path, head: torch.Tensor
) -> None:
    aligned = model_at(tmp_path / "aligned", True, None, architectures=["LlamaForCausalLM"])
    factors = {"m.q.lora_A.weight": torch.ones(1, 2), "m.q.lora_B.weight": torch.ones(3, 1)}
    saved = {"model.embed_tokens.weight": TABLE, "lm_head.weight": head.clone()}
    asked = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    adapter = read_model(open_folder(str(write_adapter(tmp_path / "lora", asked, factors | saved))))
    if head is TABLE:
        assert set(touched_tensors(adapter)) == {"m.q.weight", EMBEDDING}
    else:
        with pytest.raises(CheckpointError, match=r"ties its output head to its embedding.*apart"):
            check_belongs(adapter, aligned)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 4}, r"vocab_size is 4, but model\.embed_tokens\.weight has 3 rows"),
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5, but the files hold 1 layers"),
        ({"num_hidden_layers": "1"}, "num_hidden_layers is '1', not a positive whole number"),
        ({"hidden_size": True}, "hidden_size is True, not a positive"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1, not a positive"),
        ({"model_type": None}, "model_type is None, not the name of an architecture"),
    ],
)
def test_base_whose_config_is_not_that_of_its_tensors_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tensors = {EMBEDDING: TABLE, "model.layers.0.mlp.up_proj.weight": torch.ones(3, 2)}
    sizes: dict[str, Any] = {"model_type": "llama", "vocab_size": 3, "num_hidden_layers": 1, "hidden_size": 2}
    write_model(tmp_path / "fits", sizes, tensors)
    write_model(tmp_path / "off", sizes | changes, tensors)
    check_config(read_full_model(open_folder(str(tmp_path / "fits"))))
    with pytest.raises(CheckpointError, match=message):
        check_config(read_full_model(open_folder(str(tmp_path / "off"))))
