"""Sources under other names than the aligned model's, read as if they had its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.belongs import check_belongs, check_head
from fleet.checkpoint.joined import joined_address
from fleet.checkpoint.model import Model, content_identity, require_full_model
from fleet.checkpoint.opened import open_full, open_model, open_model_folder
from fleet.checkpoint.task_vectors import read_delta, read_weight
from fleet.core.errors import CheckpointError
from fleet.manifest import load_manifest
from fleet.run.plan import make_plan
from tests.catalogue import manifest_document
from tests.pico import make_adapter, make_model, write_adapter, write_model

Rename = Callable[[str], str]

UP = "layers.0.mlp.up_proj"
BASE = {"model.embed_tokens.weight": torch.ones(5, 2), f"model.{UP}.weight": torch.ones(3, 2)}
FACTORS = {f"model.{UP}.lora_A.weight": torch.ones(1, 2), f"model.{UP}.lora_B.weight": torch.ones(3, 1)}
CONFIG = {"model_type": "llama"}


def rewrite(folder: Path, renamed: Rename, **more: torch.Tensor) -> Path:
    (file,) = folder.glob("*.safetensors")
    tensors = {renamed(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors | more, file, metadata={"format": "pt"})
    return folder


def joined(folder: Path, aligned: Path | None = None) -> tuple[str, Model]:
    """A source as a plan would read it, with its address; the aligned model itself without `aligned`."""
    if aligned is None:
        model = open_full(str(folder))
        uri = joined_address(str(folder), model, str(folder), model)
    else:
        base_uri, base = joined(aligned)
        uri = joined_address(str(folder), open_model(str(folder)), base_uri, require_full_model(base, "aligned"))
    return uri, open_model(uri)


def without_prefix(name: str) -> str:
    return name.removeprefix("model.")


@pytest.mark.parametrize("strip", [(), ("aligned",), ("full",), ("aligned", "full"), ("lora", "aligned")])
def test_base_fine_tune_and_lora_are_joined_with_and_without_the_classs_prefix(
    tmp_path: Path, strip: tuple[str, ...]
) -> None:
    for seed, name in enumerate(("aligned", "full")):
        make_model(tmp_path / name, seed)
    make_adapter(tmp_path / "lora", tmp_path / "aligned", 2)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned", dtype=torch.float32)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    tuned = {"full": dict(full.named_parameters())}
    merged = PeftModel.from_pretrained(base, str(tmp_path / "lora")).merge_and_unload()
    tuned["lora"] = dict(merged.named_parameters())
    for name in strip:
        rewrite(tmp_path / name, lambda n: n.replace("base_model.model.model.", "base_model.model."))
        rewrite(tmp_path / name, without_prefix)
    aligned = require_full_model(joined(tmp_path / "aligned")[1], "aligned")
    assert set(aligned.tensors) == set(before)
    for name, expected in tuned.items():
        model = joined(tmp_path / name, tmp_path / "aligned")[1]
        check_belongs(model, aligned)
        for tensor, value in expected.items():
            delta = read_delta(model, tensor, read_weight(aligned, tensor))
            moved = value.detach() - before[tensor]
            found = torch.zeros_like(moved) if delta is None else delta.dense()
            torch.testing.assert_close(found, moved, rtol=0, atol=2e-6)


def test_gpt2_as_the_hub_has_it_is_read_as_its_class_loads_it(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=20)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    mask = torch.tril(torch.ones(1, 1, 16, 16))
    more = {"h.0.attn.bias": mask.to(torch.uint8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    rewrite(tmp_path, lambda name: name.removeprefix("transformer."), **more)
    uri, found = joined(tmp_path)
    assert isinstance(found, type(open_full(uri)))
    parameters = {n: p for n, p in model.named_parameters() if n != "lm_head.weight"}
    assert set(found.tensors) - {"lm_head.weight"} == set(parameters)
    assert found.tensors["transformer.h.0.attn.c_attn.bias"].shape == (24,)
    local = open_model_folder(uri).local(tmp_path / "scratch")
    loaded = AutoModelForCausalLM.from_pretrained(local)
    for name, value in loaded.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name


def test_model_with_masks_is_served_without_them(tmp_path: Path) -> None:
    """A Llama of vLLM takes no tensor that it doesn't know."""
    write_model(tmp_path, CONFIG, BASE | {"model.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)})
    uri, _ = joined(tmp_path)
    assert set(load_file(open_model_folder(uri).local(tmp_path / "scratch") / "model.safetensors")) == set(BASE)


def test_source_as_it_should_be_keeps_its_address_and_files(catalogue: Path) -> None:
    for name in ("full", "lora", "rslora"):
        uri, model = joined(catalogue / name, catalogue / "aligned")
        assert uri == str(catalogue / name)
        assert model is open_model(uri)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module."])
def test_full_model_of_a_wrapper_has_the_aligned_models_names(tmp_path: Path, prefix: str) -> None:
    write_model(tmp_path / "aligned", CONFIG, BASE)
    write_model(tmp_path / "full", CONFIG, {prefix + name: tensor * 2 for name, tensor in BASE.items()})
    _, model = joined(tmp_path / "full", tmp_path / "aligned")
    check_belongs(model, open_full(str(tmp_path / "aligned")))


@pytest.mark.parametrize(
    "name", ["_orig_mod.{}", "model.language_model.{}", "language_model.model.{}", "{}", "model._orig_mod.{}"]
)
def test_adapter_under_other_names_is_written_anew_as_peft_would(tmp_path: Path, name: str) -> None:
    """Ranks and scales are those that its config gave to the names it was trained under."""
    write_model(tmp_path / "aligned", CONFIG, BASE | {"model.layers.1.mlp.up_proj.weight": torch.ones(3, 2)})
    factors = {
        "layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 2), "layers.0.mlp.up_proj.lora_B.weight": torch.ones(3, 2),
        "layers.1.mlp.up_proj.lora_A.weight": torch.ones(1, 2), "layers.1.mlp.up_proj.lora_B.weight": torch.ones(3, 1),
    }  # fmt: skip
    trained = name.replace("_orig_mod.", "").format("layers.0.mlp.up_proj")
    patterns = {"r": 1, "lora_alpha": 4, "rank_pattern": {trained: 2}, "alpha_pattern": {f"^{trained}": 6}}
    config = patterns | {"target_modules": ".*up_proj", "layers_to_transform": [0, 1]}
    write_adapter(tmp_path / "lora", config, {name.format(n): tensor for n, tensor in factors.items()})
    uri, model = joined(tmp_path / "lora", tmp_path / "aligned")
    assert isinstance(model, Adapter)
    check_belongs(model, open_full(str(tmp_path / "aligned")))
    scales = {module: (m.rank, m.scale) for module, m in model.modules.items()}
    assert scales == {"model.layers.0.mlp.up_proj": (2, 3.0), "model.layers.1.mlp.up_proj": (1, 4.0)}
    local = open_model_folder(uri).local(tmp_path / "scratch")
    assert set(load_file(local / "adapter_model.safetensors")) == {f"base_model.model.model.{n}" for n in factors}


def test_adapter_with_a_name_of_its_own_and_numbers_as_floats_is_served_as_peft_writes_it(tmp_path: Path) -> None:
    write_model(tmp_path / "aligned", CONFIG, BASE)
    named = {name.replace(".weight", ".sft.weight"): tensor for name, tensor in FACTORS.items()}
    config = {"r": 1.0, "lora_alpha": 2.0, "init_lora_weights": "True", "rank_pattern": {"up_proj": 1.0}}
    write_adapter(tmp_path / "lora", config, named)
    uri, _ = joined(tmp_path / "lora", tmp_path / "aligned")
    local = open_model_folder(uri).local(tmp_path / "scratch")
    written: dict[str, Any] = json.loads((local / "adapter_config.json").read_text())
    assert set(load_file(local / "adapter_model.safetensors")) == {f"base_model.model.{n}" for n in FACTORS}
    assert [written[f] for f in ("r", "lora_alpha", "init_lora_weights", "rank_pattern")] == [
        1,
        2,
        True,
        {"up_proj": 1},
    ]
    assert isinstance(written["r"], int)


def test_two_tensors_of_one_of_the_base_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "aligned", CONFIG, BASE)
    twice = BASE | {f"_orig_mod.model.{UP}.weight": torch.zeros(3, 2)}
    write_model(tmp_path / "full", CONFIG, twice)
    with pytest.raises(
        CheckpointError, match=rf"tensors .*{UP}\.weight and .*{UP}\.weight are both model\.{UP}\.weight"
    ):
        joined(tmp_path / "full", tmp_path / "aligned")


def test_identity_of_a_joined_source_is_that_of_its_files_and_names(tmp_path: Path) -> None:
    write_model(tmp_path / "aligned", CONFIG, BASE)
    wrapped = {f"module.{name}": tensor for name, tensor in BASE.items()}
    identities: list[str] = []
    for folder, tensors in (("a", wrapped), ("b", wrapped), ("c", {n: t * 2 for n, t in wrapped.items()})):
        write_model(tmp_path / folder, CONFIG, tensors)
        uri, _ = joined(tmp_path / folder, tmp_path / "aligned")
        identities.append(content_identity(open_model_folder(uri)))
    assert identities[0] == identities[1] != identities[2]


def test_plan_over_sources_of_all_namings_reads_them_as_one_family(catalogue: Path, tmp_path: Path) -> None:
    """Base models without the class's prefix, a compiled fine-tune, an adapter of a model of text and images."""
    root = tmp_path / "catalogue"
    for seed, name in enumerate(("unaligned", "aligned")):
        rewrite(make_model(root / name, seed), without_prefix)
    rewrite(make_model(root / "full", 4), lambda name: f"_orig_mod.{name}")
    make_adapter(root / "lora", catalogue / "aligned", 2)
    rewrite(root / "lora", lambda name: name.replace("model.model.model.", "model.model.model.language_model."))
    document = manifest_document(
        catalogue, tmp_path, base={"unaligned": str(root / "unaligned"), "aligned": str(root / "aligned")},
        models=[{"name": name, "source": str(root / name)} for name in ("lora", "full")],
        variants=[{"name": "plain", "realign": None, "fuse": {"method": "weight_average"}}],
    )  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    plan = make_plan(load_manifest(tmp_path / "manifest.json"))
    assert all(name.startswith("model.") for name in plan.bases.aligned_model.tensors)
    assert "model.layers.0.self_attn.q_proj" in plan.lora_modules


@pytest.mark.parametrize("prefix", ["base_model.model.", "_forward_module.", "_forward_module.base_model.model."])
def test_full_model_under_a_wrappers_prefix_is_joined(tmp_path: Path, prefix: str) -> None:
    aligned = write_model(tmp_path / "aligned", CONFIG, BASE)
    full = write_model(tmp_path / "full", CONFIG, {prefix + name: tensor for name, tensor in BASE.items()})
    assert set(require_full_model(joined(full, aligned)[1], "full").tensors) == set(BASE)


def test_tied_model_saved_with_its_head_alone_is_read_as_its_embedding(tmp_path: Path) -> None:
    tied = CONFIG | {"tie_word_embeddings": True}
    aligned = write_model(tmp_path / "aligned", tied, BASE)
    tensors = {name.replace("model.embed_tokens", "lm_head"): 2 * tensor for name, tensor in BASE.items()}
    full = write_model(tmp_path / "full", tied, tensors)
    uri, model = joined(full, aligned)
    check_belongs(model, open_full(str(aligned)))
    assert torch.equal(read_weight(open_full(uri), "model.embed_tokens.weight"), 2 * torch.ones(5, 2))
    with pytest.raises(CheckpointError, match=r"hold lm_head\.weight alone.*save it with transformers"):
        check_head(open_full(str(full)))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_small_file_with_a_byte_order_mark_is_read_without_it(tmp_path: Path, file: str) -> None:
    aligned = write_model(tmp_path / "aligned", CONFIG, BASE)
    plain = json.dumps(CONFIG).encode()
    (aligned / file).write_bytes(b"\xef\xbb\xbf" + plain)
    uri, _ = joined(aligned)
    assert open_model_folder(uri).read(file) == plain


def test_small_file_that_is_no_json_refused(tmp_path: Path) -> None:
    aligned = write_model(tmp_path / "aligned", CONFIG, BASE)
    (aligned / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not JSON"):
        joined(aligned)
