from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.belongs import check_belongs
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import lora_rank, read_model, require_full_model, touched_tensors
from fleet.checkpoint.modules import module_views
from fleet.checkpoint.task_vectors import read_delta, read_factors, read_unscaled_factors, read_weight, to_stored
from fleet.core.errors import CheckpointError
from fleet.store import open_folder
from tests.pico import VOCAB_SIZE, make_adapter, make_gpt2, make_model, write_adapter, write_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Kind:
    """An adapter that PEFT writes, and what it is to us."""

    options: dict[str, Any]
    base: str = "llama"
    is_lora: bool = True
    dense: frozenset[str] = field(default_factory=frozenset)
    """Ends of the names of the tensors whose task vector is no product of factors."""


BIASES = frozenset({".bias"})
DORA = frozenset({"q_proj.weight", "k_proj.weight"})
KINDS = {
    "plain": Kind({}),
    "rslora": Kind({"use_rslora": True, "rank": 8}),
    "patterns": Kind(
        {
            "targets": ATTENTION,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.[kv]_proj": 6},
            "alpha_pattern": {"v_proj": 3, "o_proj": 0.5},
        }
    ),
    "rslora patterns": Kind({"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "targets by regex": Kind({"targets": r".*layers\.1\.(self_attn\.k_proj|mlp\.(up|down)_proj)"}),
    "all linears": Kind({"targets": "all-linear"}),
    "rank as wide as the output": Kind({"targets": ("k_proj",), "rank": 64}),
    "all biases": Kind({"bias": "all"}, is_lora=False, dense=BIASES),
    "biases of targets": Kind({"bias": "lora_only"}, is_lora=False, dense=BIASES),
    "lora_bias": Kind({"lora_bias": True, "use_rslora": True}, is_lora=False, dense=BIASES),
    "lora_bias and biases": Kind({"lora_bias": True, "bias": "all"}, is_lora=False, dense=BIASES),
    "saved modules": Kind(
        {"modules_to_save": ["lm_head", "embed_tokens", "post_attention_layernorm"]},
        is_lora=False,
        dense=frozenset({"lm_head.weight", "embed_tokens.weight", "post_attention_layernorm.weight"}),
    ),
    "dora": Kind({"use_dora": True, "targets": ("q_proj", "k_proj")}, is_lora=False, dense=DORA),
    "rslora dora": Kind(
        {"use_dora": True, "use_rslora": True, "targets": ("q_proj", "k_proj")}, is_lora=False, dense=DORA
    ),
    "embedding": Kind({"targets": ("embed_tokens", "q_proj")}, is_lora=False),
    "embedding dora": Kind(
        {"use_dora": True, "targets": ("embed_tokens", "q_proj", "k_proj")},
        is_lora=False,
        dense=DORA | {"embed_tokens.weight"},
    ),
    "head": Kind({"targets": ("lm_head", "q_proj")}, is_lora=False),
    "conv1d": Kind({"targets": ("c_attn", "c_proj", "c_fc"), "fan_in_fan_out": True}, base="gpt2"),
    "conv1d dora": Kind(
        {"targets": ("c_attn", "c_proj"), "fan_in_fan_out": True, "use_dora": True},
        base="gpt2",
        is_lora=False,
        dense=frozenset({"c_attn.weight", "c_proj.weight"}),
    ),
    "conv1d biases": Kind(
        {"targets": ("c_attn", "c_proj"), "fan_in_fan_out": True, "bias": "all"},
        base="gpt2",
        is_lora=False,
        dense=BIASES,
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` with grouped queries, attention biases and a head of its own, `tied`, and `gpt2`."""
    root = tmp_path_factory.mktemp("bases")
    make_model(root / "llama", 0, tie=False, attention_bias=True)
    make_model(root / "tied", 1)
    make_gpt2(root / "gpt2", 2)
    return root


def full_model(folder: Path) -> FullModel:
    return require_full_model(read_model(open_folder(str(folder))), "aligned")


def adapter_at(folder: Path) -> Adapter:
    model = read_model(open_folder(str(folder)))
    assert isinstance(model, Adapter)
    return model


def our_deltas(adapter: Adapter, aligned: FullModel) -> dict[str, Delta]:
    deltas: dict[str, Delta] = {}
    for name in touched_tensors(adapter):
        delta = read_delta(adapter, name, read_weight(aligned, name))
        assert delta is not None
        deltas[name] = delta
    return deltas


def our_merge(adapter: Adapter, aligned: FullModel) -> dict[str, torch.Tensor]:
    """Every tensor of the merged model, in the orientation of the files."""
    deltas = our_deltas(adapter, aligned)
    merged: dict[str, torch.Tensor] = {}
    for name in aligned.tensors:
        weight = read_weight(aligned, name)
        merged[name] = to_stored(aligned, name, weight + deltas[name].dense() if name in deltas else weight)
    return merged


def peft_merge(adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_of_each_kind_merges_as_peft_does(bases: Path, tmp_path: Path, kind: str) -> None:
    base = bases / KINDS[kind].base
    make_adapter(tmp_path, base, 5, **KINDS[kind].options)
    adapter, aligned = adapter_at(tmp_path), full_model(base)
    check_belongs(adapter, aligned)
    ours, theirs = our_merge(adapter, aligned), peft_merge(tmp_path, base)
    assert set(theirs) - set(ours) <= {"lm_head.weight"}  # the tied one
    moved = {n for n in ours if not torch.equal(theirs[n], to_stored(aligned, n, read_weight(aligned, n)))}
    assert moved == set(touched_tensors(adapter))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_of_each_kind_low_rank_where_factors_say_all(bases: Path, tmp_path: Path, kind: str) -> None:
    base = bases / KINDS[kind].base
    make_adapter(tmp_path, base, 5, **KINDS[kind].options)
    adapter, aligned = adapter_at(tmp_path), full_model(base)
    assert adapter.is_lora == KINDS[kind].is_lora
    for name, delta in our_deltas(adapter, aligned).items():
        dense = name.endswith(tuple(KINDS[kind].dense))
        assert isinstance(delta, Dense if dense else LowRank), name
        assert delta.dense().dtype == torch.float32
        assert delta.shape == read_weight(aligned, name).shape
    if adapter.is_lora:
        for name in touched_tensors(adapter):
            product, unscaled = read_factors(adapter, name), read_unscaled_factors(adapter, name)
            assert product is not None
            assert unscaled is not None
            torch.testing.assert_close(unscaled.scale * (unscaled.b @ unscaled.a), product.dense())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("dora", r"is a DoRA on \(model\.layers\.0\.self_attn\.k_proj, .*"),
        ("all biases", r"holds base tensors whole \(model\.layers\.0\.self_attn\.k_proj\.bias, "),
        ("lora_bias", r"trains the bias of \(model\.layers\.0\.self_attn\.q_proj, "),
        ("head", r"adapts an embedding or the output head \(lm_head\)"),
    ],
)
def test_factors_of_more_than_a_lora_refused(bases: Path, tmp_path: Path, kind: str, reason: str) -> None:
    make_adapter(tmp_path, bases / KINDS[kind].base, 5, **KINDS[kind].options)
    adapter = adapter_at(tmp_path)
    for read in (read_factors, read_unscaled_factors):
        with pytest.raises(CheckpointError, match=reason):
            read(adapter, "model.layers.0.self_attn.q_proj.weight")


def test_lora_rank_is_zero_where_nothing_is_adapted(bases: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path, bases / "llama", 5, rank=4, rank_pattern={"v_proj": 3})
    adapter, layer = adapter_at(tmp_path), "model.layers.0.self_attn"
    assert [lora_rank(adapter, f"{layer}.{m}") for m in ("q_proj", "v_proj", "k_proj")] == [4, 3, 0]
    assert lora_rank(full_model(bases / "llama"), f"{layer}.q_proj") == 0
    assert lora_rank(None, f"{layer}.q_proj") == 0


def test_tensor_the_adapter_leaves_alone_has_no_task_vector(bases: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path, bases / "llama", 5, use_dora=True, targets=("q_proj",))
    aligned = full_model(bases / "llama")
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.v_proj.weight", "lm_head.weight"):
        assert read_delta(adapter_at(tmp_path), name, read_weight(aligned, name)) is None


def test_dora_by_hand_rescales_each_row(tmp_path: Path) -> None:
    """W + BA = [[3, 4], [0, 2]] has rows of norm 5 and 2; magnitudes 10 and 1 make them [6, 8] and [0, 1]."""
    write_model(tmp_path / "base", {"model_type": "toy"}, {"m.weight": torch.tensor([[3.0, 0.0], [0.0, 1.0]])})
    write_adapter(
        tmp_path / "dora",
        {"use_dora": True, "lora_alpha": 2},
        {
            "m.lora_A.weight": torch.tensor([[0.0, 1.0]]),
            "m.lora_B.weight": torch.tensor([[2.0], [0.5]]),
            "m.lora_magnitude_vector": torch.tensor([10.0, 1.0]),
        },
    )
    aligned = full_model(tmp_path / "base")
    delta = read_delta(adapter_at(tmp_path / "dora"), "m.weight", read_weight(aligned, "m.weight"))
    assert delta is not None
    torch.testing.assert_close(delta.dense(), torch.tensor([[3.0, 8.0], [0.0, 0.0]]))


def test_embedding_lora_by_hand_moves_the_table(tmp_path: Path) -> None:
    """B (2, 1) A (1, 3) is (d, vocab); the table is (vocab, d)."""
    write_model(tmp_path / "base", {"tie_word_embeddings": False}, {"wte.weight": torch.zeros(3, 2)})
    write_adapter(
        tmp_path / "lora",
        {"lora_alpha": 4},
        {
            "wte.lora_embedding_A": torch.tensor([[1.0, 0.0, 2.0]]),
            "wte.lora_embedding_B": torch.tensor([[1.0], [3.0]]),
        },
    )
    aligned, adapter = full_model(tmp_path / "base"), adapter_at(tmp_path / "lora")
    check_belongs(adapter, aligned)
    delta = read_delta(adapter, "wte.weight", read_weight(aligned, "wte.weight"))
    assert isinstance(delta, LowRank)
    assert torch.equal(delta.dense(), torch.tensor([[4.0, 12.0], [0.0, 0.0], [8.0, 24.0]]))


def test_lora_on_a_saved_table_counts_from_that_table(tmp_path: Path) -> None:
    """The adapter's own table is 1 where the base's is 0, and the LoRA adds 2 to its first entry."""
    write_model(tmp_path / "base", {"tie_word_embeddings": False}, {"wte.weight": torch.zeros(2, 1)})
    write_adapter(
        tmp_path / "lora",
        {},
        {
            "wte.base_layer.weight": torch.ones(2, 1),
            "wte.lora_embedding_A": torch.tensor([[2.0, 0.0]]),
            "wte.lora_embedding_B": torch.ones(1, 1),
        },
    )
    adapter = adapter_at(tmp_path / "lora")
    delta = read_delta(adapter, "wte.weight", torch.zeros(2, 1))
    assert isinstance(delta, Dense)
    assert delta.value.tolist() == [[3.0], [1.0]]
    on_the_same = read_delta(adapter, "wte.weight", torch.ones(2, 1))
    assert isinstance(on_the_same, LowRank)
    assert on_the_same.dense().tolist() == [[2.0], [0.0]]


def test_dora_on_a_saved_table_rescales_that_table(tmp_path: Path) -> None:
    """The adapter's table (3, 4) and a LoRA of 0 keep a column of norm 5; magnitude 10 doubles it: (6, 8)."""
    write_adapter(
        tmp_path,
        {"use_dora": True},
        {
            "wte.base_layer.weight": torch.tensor([[3.0], [4.0]]),
            "wte.lora_embedding_A": torch.zeros(1, 2),
            "wte.lora_embedding_B": torch.zeros(1, 1),
            "wte.lora_magnitude_vector": torch.tensor([10.0]),
        },
    )
    delta = read_delta(adapter_at(tmp_path), "wte.weight", torch.tensor([[1.0], [1.0]]))
    assert delta is not None
    assert delta.dense().tolist() == [[5.0], [7.0]]


def test_untied_base_with_a_head_of_another_name_takes_an_embedding_lora(tmp_path: Path) -> None:
    factors = {"wte.lora_embedding_A": torch.ones(1, 3), "wte.lora_embedding_B": torch.ones(2, 1)}
    adapter = adapter_at(write_adapter(tmp_path / "lora", {}, factors))
    tensors = {"wte.weight": torch.zeros(3, 2), "output.weight": torch.zeros(3, 2)}
    for silent in (False, True):
        config = {} if silent else {"tie_word_embeddings": False}
        aligned = full_model(write_model(tmp_path / f"base-{silent}", config, tensors))
        if silent:
            with pytest.raises(CheckpointError, match="ties its output head"):
                check_belongs(adapter, aligned)
        else:
            check_belongs(adapter, aligned)


@pytest.mark.parametrize("name", ["q_proj.bias", "q_proj.base_layer.bias"])
def test_bias_of_a_target_is_found_under_both_names(tmp_path: Path, name: str) -> None:
    factors = {"q_proj.lora_A.weight": torch.ones(1, 2), "q_proj.lora_B.weight": torch.ones(2, 1)}
    write_adapter(tmp_path, {"bias": "lora_only"}, factors | {name: torch.tensor([1.0, 5.0])})
    delta = read_delta(adapter_at(tmp_path), "q_proj.bias", torch.tensor([1.0, 2.0]))
    assert delta is not None
    assert delta.dense().tolist() == [0.0, 3.0]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_sum_of_rsloras_is_right_where_pefts_cat_is_not(bases: Path, tmp_path: Path, use_rslora: bool) -> None:
    """PEFT's `cat` sets alpha to the new rank so that the scale is 1, and keeps `use_rslora`, so it is √rank."""
    base = bases / "llama"
    make_adapter(tmp_path / "a", base, 5, rank=4, use_rslora=use_rslora)
    make_adapter(tmp_path / "b", base, 6, rank=8, use_rslora=use_rslora)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(tmp_path / "a"), adapter_name="a"
    )
    model.load_adapter(str(tmp_path / "b"), adapter_name="b")
    tuner: Any = model.base_model
    tuner.add_weighted_adapter(["a", "b"], [1.0, 1.0], "cat", combination_type="cat")
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    separate = layer.get_delta_weight("a") + layer.get_delta_weight("b")

    name = "model.layers.0.self_attn.q_proj.weight"
    ours = [read_factors(adapter_at(tmp_path / folder), name) for folder in ("a", "b")]
    assert ours[0] is not None
    assert ours[1] is not None
    fused = ours[0].plus(ours[1])
    assert isinstance(fused, LowRank)
    assert fused.rank == 12
    torch.testing.assert_close(fused.dense(), separate, rtol=1e-5, atol=2e-6)

    theirs = layer.get_delta_weight("cat")
    factor = math.sqrt(12) if use_rslora else 1.0
    torch.testing.assert_close(theirs, factor * separate, rtol=1e-5, atol=1e-5)


def test_conv1d_weight_is_read_canonical_and_stored_as_it_was(bases: Path) -> None:
    aligned = full_model(bases / "gpt2")
    raw = load_file(bases / "gpt2" / "model.safetensors")
    for name, tensor in raw.items():
        weight = read_weight(aligned, name)
        conv1d = ".c_" in name and name.endswith(".weight")
        assert torch.equal(weight, tensor.T if conv1d else tensor), name
        assert torch.equal(to_stored(aligned, name, weight), tensor), name
    assert read_weight(aligned, "transformer.h.0.attn.c_attn.weight").shape == (96, 32)


def test_conv1d_names_in_another_architecture_stay_linear(tmp_path: Path) -> None:
    """GPT-BigCode's c_attn is a Linear."""
    value = torch.arange(6.0).reshape(2, 3)
    write_model(tmp_path, {"model_type": "gpt_bigcode"}, {"transformer.h.0.attn.c_attn.weight": value})
    assert torch.equal(read_weight(full_model(tmp_path), "transformer.h.0.attn.c_attn.weight"), value)


def test_full_fine_tune_of_conv1ds_has_canonical_task_vector(bases: Path, tmp_path: Path) -> None:
    make_gpt2(tmp_path, 9)
    name = "transformer.h.1.mlp.c_fc.weight"
    delta = read_delta(read_model(open_folder(str(tmp_path))), name, read_weight(full_model(bases / "gpt2"), name))
    assert delta is not None
    raw = [load_file(folder / "model.safetensors")[name] for folder in (tmp_path, bases / "gpt2")]
    assert torch.equal(delta.dense(), (raw[0] - raw[1]).T)


def test_experts_one_tensor_each_are_modules_of_their_own(tmp_path: Path) -> None:
    """Mixtral's names: each expert's Linear is joined with an adapter by name."""
    prefix = "model.layers.0.block_sparse_moe"
    names = [f"{prefix}.experts.{e}.{w}" for e in range(2) for w in ("w1", "w2")]
    tensors = {f"{n}.weight": torch.full((2, 2), float(i)) for i, n in enumerate(names)}
    write_model(tmp_path / "moe", {"model_type": "mixtral"}, tensors | {f"{prefix}.gate.weight": torch.ones(2, 2)})
    write_adapter(
        tmp_path / "lora",
        {"target_modules": ["w2"]},
        {
            f"{names[3]}.lora_A.weight": torch.tensor([[1.0, 0.0]]),
            f"{names[3]}.lora_B.weight": torch.tensor([[2.0], [3.0]]),
        },
    )
    aligned, adapter = full_model(tmp_path / "moe"), adapter_at(tmp_path / "lora")
    check_belongs(adapter, aligned)
    assert [module_views(aligned, t) for t in tensors] == [((n, f"{n}.weight", None),) for n in names]
    assert touched_tensors(adapter) == [f"{names[3]}.weight"]
    merged = our_merge(adapter, aligned)
    assert merged[f"{names[3]}.weight"].tolist() == [[5.0, 3.0], [6.0, 3.0]]
    assert merged[f"{names[1]}.weight"].tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("model_type", "transposed"), [("gpt_oss", True), ("llama4", True), ("qwen3_5_moe", False), (None, False)]
)
def test_stacked_experts_are_views_in_canonical_orientation(
    tmp_path: Path, model_type: str | None, transposed: bool
) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stack = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {name: stack, f"{name}_bias": torch.zeros(2, 4), "model.layers.0.conv1d.weight": torch.zeros(4, 1, 2)}
    write_model(tmp_path, {"model_type": model_type}, tensors)
    model = full_model(tmp_path)
    assert module_views(model, name) == ((f"{name}[0]", name, 0), (f"{name}[1]", name, 1))
    assert module_views(model, f"{name}_bias") == ()
    assert module_views(model, "model.layers.0.conv1d.weight") == ()
    weight = read_weight(model, name)
    expert = stack[1].T if transposed else stack[1]
    assert torch.equal(weight[1], expert)
    assert torch.equal(to_stored(model, name, weight), stack)


def test_granites_experts_are_views(tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    write_model(tmp_path, {"model_type": "granitemoe"}, {name: torch.zeros(2, 4, 3)})
    assert [v.index for v in module_views(full_model(tmp_path), name)] == [0, 1]


def test_module_views_of_a_dense_model_are_its_linears(bases: Path) -> None:
    model = full_model(bases / "llama")
    views = [view for tensor in model.tensors for view in module_views(model, tensor)]
    assert len(views) == 2 * 7
    assert {v.module.rpartition(".")[2] for v in views} == {*ATTENTION, "gate_proj", "up_proj", "down_proj"}
    assert all(v.tensor == f"{v.module}.weight" and v.index is None for v in views)
    gpt2 = full_model(bases / "gpt2")
    modules = {v.module for tensor in gpt2.tensors for v in module_views(gpt2, tensor)}
    assert modules == {
        f"transformer.h.{i}.{m}" for i in (0, 1) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"targets": ("embed_tokens", "q_proj")}, "model.embed_tokens.weight"),
        ({"targets": ("lm_head", "q_proj")}, "lm_head.weight"),
        ({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens.weight"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
    ],
)
def test_adapter_of_one_half_of_a_tie_refused(bases: Path, tmp_path: Path, options: dict[str, Any], named: str) -> None:
    make_adapter(tmp_path, bases / "tied", 5, **options)
    with pytest.raises(CheckpointError, match=r"ties its output head to its embedding.*tie_word_embeddings=False") as e:
        check_belongs(adapter_at(tmp_path), full_model(bases / "tied"))
    assert named in str(e.value)


def test_peft_unties_a_saved_embedding_and_merges_a_lora_into_both(bases: Path, tmp_path: Path) -> None:
    """Why a tied base refuses them: PEFT gives the two halves of the tie different treatment, in two ways."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    make_adapter(tmp_path / "saved", bases / "tied", 5, modules_to_save=["embed_tokens"])
    saved = peft_merge(tmp_path / "saved", bases / "tied")
    assert not torch.equal(saved[embedding], saved[head])

    make_adapter(tmp_path / "lora", bases / "tied", 5, targets=("embed_tokens",))
    merged = peft_merge(tmp_path / "lora", bases / "tied")
    assert torch.equal(merged[embedding], merged[head])
    model = AutoModelForCausalLM.from_pretrained(bases / "tied", dtype=torch.float32)
    before = model.lm_head.weight.detach().clone()
    running = PeftModel.from_pretrained(model, str(tmp_path / "lora"))
    assert torch.equal(running.get_output_embeddings().weight, before)
    assert not torch.equal(merged[head], before)


def test_adapter_that_does_not_fit_lists_every_problem(bases: Path, tmp_path: Path) -> None:
    layer = "model.layers.0.self_attn"
    write_adapter(
        tmp_path,
        {"lora_bias": True, "modules_to_save": ["lm_head", "down_proj"], "bias": "all"},
        {
            f"{layer}.rotary.lora_A.weight": torch.ones(1, 2),
            f"{layer}.rotary.lora_B.weight": torch.ones(2, 1),
            f"{layer}.rotary.lora_B.bias": torch.ones(2),
            "lm_head.weight": torch.ones(7, 32),
            "score.weight": torch.ones(2, 32),
        },
    )
    with pytest.raises(CheckpointError) as e:
        check_belongs(adapter_at(tmp_path), full_model(bases / "llama"))
    for part in (
        f"module {layer}.rotary is not in the base",
        f"module {layer}.rotary has no bias in the base",
        f"tensor lm_head.weight is (7, 32), but the base's is ({VOCAB_SIZE}, 32)",
        "tensor score.weight is not in the base",
        "modules_to_save names down_proj, but the adapter holds no model.layers.0.mlp.down_proj.weight, ",
    ):
        assert part in str(e.value)


def test_lora_bias_where_the_base_has_none_refused(bases: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has no bias"):
        make_adapter(tmp_path, bases / "tied", 5, lora_bias=True)
    with pytest.raises(CheckpointError, match=r"q_proj has no bias in the base"):
        check_belongs(adapter_at(tmp_path), full_model(bases / "tied"))


def test_conv1d_saved_whole_refused(bases: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path, bases / "gpt2", 5, targets=("c_attn",), fan_in_fan_out=True, modules_to_save=["c_fc"])
    with pytest.raises(CheckpointError, match=r"c_fc\.weight is saved whole, as \(d_in, d_out\)"):
        check_belongs(adapter_at(tmp_path), full_model(bases / "gpt2"))


def test_lora_of_transposed_shape_refused_for_conv1d(tmp_path: Path) -> None:
    """The canonical shape is what an adapter has to fit, not the file's."""
    name = "transformer.h.0.attn.c_attn"
    write_model(tmp_path / "base", {"model_type": "gpt2"}, {f"{name}.weight": torch.zeros(2, 6)})
    for d_out, d_in in ((6, 2), (2, 6)):
        write_adapter(
            tmp_path / f"{d_out}",
            {},
            {f"{name}.lora_A.weight": torch.zeros(1, d_in), f"{name}.lora_B.weight": torch.zeros(d_out, 1)},
        )
    check_belongs(adapter_at(tmp_path / "6"), full_model(tmp_path / "base"))
    with pytest.raises(CheckpointError, match=r"is \(2, 6\), but the base's is \(6, 2\)"):
        check_belongs(adapter_at(tmp_path / "2"), full_model(tmp_path / "base"))


def test_adapter_bytes_count_everything_read(bases: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path, bases / "llama", 5, bias="all", use_dora=True, targets=("q_proj", "embed_tokens"))
    held = load_file(tmp_path / "adapter_model.safetensors").values()
    assert adapter_at(tmp_path).num_bytes == sum(t.numel() * t.element_size() for t in held)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"]
