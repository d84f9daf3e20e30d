"""Which names of tensors mean the same one."""

from __future__ import annotations

import pytest

from fleet.checkpoint.names import AlignedNames, class_names, unwrapped

LLAMA = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
VLM = ("model.language_model.layers.0.mlp.up_proj.weight", "model.visual.blocks.0.mlp.fc1.weight", "lm_head.weight")
OLD_VLM = ("language_model.model.layers.0.mlp.up_proj.weight", "language_model.lm_head.weight")
UP = "layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("model._orig_mod.layers.0._orig_mod.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("module.model.norm.weight", "model.norm.weight"),
        ("module._orig_mod.module.norm", "norm"),
        ("_fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.x", "model.layers.0.x"),
        ("encoder.module.weight", "encoder.module.weight"),
    ],
)
def test_wrappers_leave_no_trace_in_a_name(name: str, expected: str) -> None:
    assert unwrapped(name) == expected


@pytest.mark.parametrize(
    ("model_type", "name", "expected"),
    [
        ("gpt2", "h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.bias"),
        ("bloom", "h.0.mlp.dense_h_to_4h.weight", "transformer.h.0.mlp.dense_h_to_4h.weight"),
        ("gpt_neox", "layers.0.attention.dense.weight", "gpt_neox.layers.0.attention.dense.weight"),
        ("mamba", "layers.0.mixer.A_log", "backbone.layers.0.mixer.A_log"),
        ("llama", UP, f"model.{UP}"),
        ("opt", "decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight"),
    ],
)
def test_base_files_without_their_classs_prefix_get_it(model_type: str, name: str, expected: str) -> None:
    renamed = class_names({"model_type": model_type}, [name, "lm_head.weight"])
    assert [renamed(n) for n in (name, "lm_head.weight")] == [expected, "lm_head.weight"]


@pytest.mark.parametrize("names", [LLAMA, VLM, OLD_VLM, ("transformer.h.0.ln_1.weight",), ("m.weight", "norm")])
def test_base_files_with_a_prefix_and_those_of_no_decoder_keep_their_names(names: tuple[str, ...]) -> None:
    renamed = class_names({"model_type": "llama"}, names)
    assert tuple(map(renamed, names)) == names


@pytest.mark.parametrize(
    ("aligned", "name", "expected"),
    [
        (LLAMA, UP, LLAMA[1]),
        (LLAMA, f"model.language_model.{UP}", LLAMA[1]),
        (LLAMA, f"language_model.model.{UP}", LLAMA[1]),
        (LLAMA, f"module._orig_mod.model.{UP}", LLAMA[1]),
        (LLAMA, "language_model.lm_head.weight", "lm_head.weight"),
        (LLAMA, "model.language_model.layers.0.mlp.up_proj.lora_A.weight", "model.layers.0.mlp.up_proj.lora_A.weight"),
        (LLAMA, "layers.0.mlp.up_proj.weight_scale_inv", "model.layers.0.mlp.up_proj.weight_scale_inv"),
        (LLAMA, "layers.0.mlp.new.weight", "model.layers.0.mlp.new.weight"),
        (VLM, f"model.{UP}", VLM[0]),
        (VLM, f"language_model.model.{UP}", VLM[0]),
        (VLM, "visual.blocks.0.mlp.fc1.weight", VLM[1]),
        (OLD_VLM, f"model.language_model.{UP}", OLD_VLM[0]),
        (OLD_VLM, "lm_head.weight", OLD_VLM[1]),
        (LLAMA, "some.other.thing", "some.other.thing"),
    ],
)
def test_name_of_another_class_or_wrapper_is_the_aligned_models(
    aligned: tuple[str, ...], name: str, expected: str
) -> None:
    assert AlignedNames(aligned).of(name) == expected


def test_name_that_could_be_two_of_the_aligned_models_is_left_alone() -> None:
    names = AlignedNames(["model.norm.weight", "language_model.norm.weight"])
    assert names.of("norm.weight") == "norm.weight"
