"""The tensor workers without Ray: two routes, one answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fleet.checkpoint.headers import plan_shards, shard_name
from fleet.checkpoint.models import read_model, require_full_model, touched_tensors
from fleet.errors import CheckpointError
from fleet.fusion import AnyFusionMethod, TaskArithmetic, WeightAverage
from fleet.methods import SafeMerge
from fleet.store import open_folder
from fleet.workers import FuseUnit, Member, Output, RealignUnit, Shard, SurveyUnit, TensorWorker

SAFEMERGE = SafeMerge(method="safemerge", alpha=0.75)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def merged_weights(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's own route from an adapter to full weights, float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {n: p.detach() for n, p in merged.named_parameters()}


def full_shards(root: Path, shard_bytes: int) -> list[Shard]:
    aligned = require_full_model(read_model(open_folder(str(root / "aligned"))), "aligned")
    groups = plan_shards(aligned.tensors.values(), shard_bytes)
    files = [shard_name(i, len(groups)) for i in range(len(groups))]
    index = {n: f for f, names in zip(files, groups, strict=True) for n in names}
    return [Shard(f, tuple(g), index if i == 0 else None) for i, (f, g) in enumerate(zip(files, groups, strict=True))]


def adapter_shard(*folders: Path) -> Shard:
    names = {n for f in folders for n in touched_tensors(read_model(open_folder(str(f))))}
    return Shard("adapter_model.safetensors", tuple(sorted(names)), {})


def fuse(
    root: Path, out: Path, members: dict[str, float], method: AnyFusionMethod, shard_bytes: int | None = 10**9
) -> Path:
    """Fuse to full weights in shards of `shard_bytes`, or to an adapter if None."""
    folders = [root / name for name in members]
    shards = [adapter_shard(*folders)] if shard_bytes is None else full_shards(root, shard_bytes)
    members_M = tuple(Member(str(root / name), weight) for name, weight in members.items())
    for shard in shards:
        unit = FuseUnit(str(root / "aligned"), members_M, method, shard_bytes is None, shard, Output(str(out), "m"))
        TensorWorker().fuse(unit)
    return out / "m"


def realign(root: Path, out: Path, model: str, edited: frozenset[str], shards: list[Shard]) -> Path:
    for shard in shards:
        unit = RealignUnit(
            aligned=str(root / "aligned"), model=str(root / model), safety=str(root / "safety"), method=SAFEMERGE,
            edited=edited, shard=shard, output=Output(str(out), "m"),
        )  # fmt: skip
        TensorWorker().realign(unit)
    return out / "m"


def test_fused_adapter_and_fused_model_are_the_same_weights(catalogue: Path, tmp_path: Path) -> None:
    members = {"lora": 0.25, "rslora": 0.75}
    method = WeightAverage(method="weight_average")
    adapter = fuse(catalogue, tmp_path / "adapter", members, method, None)
    model = fuse(catalogue, tmp_path / "model", members, method)
    by_peft = merged_weights(catalogue / "aligned", adapter)
    for name, value in weights_of(model).items():
        torch.testing.assert_close(value, by_peft[name].bfloat16(), rtol=1e-2, atol=1e-3)


def test_fused_adapter_equals_the_sum_of_pefts_own_merges(catalogue: Path, tmp_path: Path) -> None:
    """PEFT's add_weighted_adapter would add cross terms, and √r under rsLoRA; ours is the equation."""
    members = {"lora": 0.25, "rslora": 0.75}
    fused = fuse(catalogue, tmp_path, members, WeightAverage(method="weight_average"), None)
    found = merged_weights(catalogue / "aligned", fused)
    base = {n: t.float() for n, t in weights_of(catalogue / "aligned").items()}
    alone = {name: merged_weights(catalogue / "aligned", catalogue / name) for name in members}
    for name, value in base.items():
        expected = value + sum(w * (alone[m][name] - value) for m, w in members.items())
        torch.testing.assert_close(found[name], expected, rtol=0, atol=5e-6)


def test_fused_mixed_fleet_equals_plain_arithmetic(catalogue: Path, tmp_path: Path) -> None:
    fused = weights_of(fuse(catalogue, tmp_path, {"lora": 0.5, "full": 0.5}, TaskArithmetic(method="task_arithmetic")))
    base = {n: t.float() for n, t in weights_of(catalogue / "aligned").items()}
    lora, full = merged_weights(catalogue / "aligned", catalogue / "lora"), weights_of(catalogue / "full")
    for name, value in base.items():
        expected = value + 0.5 * (lora[name] - value) + 0.5 * (full[name].float() - value)
        torch.testing.assert_close(fused[name], expected.bfloat16(), rtol=1e-2, atol=1e-3)


def test_fused_model_in_one_shard_and_many_has_the_same_tensors(catalogue: Path, tmp_path: Path) -> None:
    method = WeightAverage(method="weight_average")
    one = weights_of(fuse(catalogue, tmp_path / "one", {"lora": 0.5, "full": 0.5}, method))
    folder = fuse(catalogue, tmp_path / "many", {"lora": 0.5, "full": 0.5}, method, 20_000)
    many = weights_of(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert one.keys() == many.keys()
    assert all(torch.equal(one[n], many[n]) for n in one)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_fused_unit_done_again_writes_the_same_bytes(catalogue: Path, tmp_path: Path, shard_bytes: int) -> None:
    method = WeightAverage(method="weight_average")
    a, b = (fuse(catalogue, tmp_path / x, {"rslora": 0.5, "full": 0.5}, method, shard_bytes) for x in "ab")
    assert {f.name: f.read_bytes() for f in a.iterdir()} == {f.name: f.read_bytes() for f in b.iterdir()}


def test_fused_one_model_at_weight_one_is_that_model(catalogue: Path, tmp_path: Path) -> None:
    fused = weights_of(fuse(catalogue, tmp_path, {"full": 1.0}, WeightAverage(method="weight_average")))
    assert all(torch.equal(fused[n], t) for n, t in weights_of(catalogue / "full").items())


def test_fused_zero_task_vector_is_the_aligned_model_bit_for_bit(catalogue: Path, tmp_path: Path) -> None:
    fused = weights_of(fuse(catalogue, tmp_path, {"aligned": 1.0}, TaskArithmetic(method="task_arithmetic")))
    assert all(torch.equal(fused[n], t) for n, t in weights_of(catalogue / "aligned").items())


def test_realigned_adapter_merges_only_the_edited_modules(catalogue: Path, tmp_path: Path) -> None:
    edited = frozenset({"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"})
    folder = realign(catalogue, tmp_path, "lora", edited, [adapter_shard(catalogue / "lora")])
    found = merged_weights(catalogue / "aligned", folder)
    task, safety = (merged_weights(catalogue / "aligned", catalogue / n) for n in ("lora", "safety"))
    for name, value in task.items():
        expected = value
        if name.removesuffix(".weight") in edited:
            expected = 0.75 * value + 0.25 * safety[name]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=5e-6)


def test_realigned_full_model_keeps_what_is_not_edited_bit_for_bit(catalogue: Path, tmp_path: Path) -> None:
    edited = "model.layers.1.self_attn.o_proj"
    shards = full_shards(catalogue, 30_000)
    found = weights_of(realign(catalogue, tmp_path, "full", frozenset({edited}), shards))
    before = weights_of(catalogue / "full")
    safety = merged_weights(catalogue / "aligned", catalogue / "safety")
    for name, value in before.items():
        if name == f"{edited}.weight":
            expected = (0.75 * value.float() + 0.25 * safety[name]).bfloat16()
            torch.testing.assert_close(found[name], expected, rtol=1e-2, atol=1e-3)
            assert not torch.equal(found[name], value)
        else:
            assert torch.equal(found[name], value)


def test_survey_in_one_unit_and_many_gives_the_same_rows(catalogue: Path) -> None:
    aligned = require_full_model(read_model(open_folder(str(catalogue / "aligned"))), "aligned")
    names = sorted(aligned.tensors)
    models = {n: str(catalogue / n) for n in ("lora", "rslora", "full")}

    def survey(groups: list[list[str]]) -> dict[str, list[object]]:
        rows: dict[str, list[object]] = {n: [] for n in models}
        for group in groups:
            unit = SurveyUnit(str(catalogue / "aligned"), str(catalogue / "unaligned"), models, tuple(group))
            for name, found in TensorWorker().survey(unit).statistics.items():
                rows[name].extend(found)
        return rows

    assert survey([names]) == survey([[n] for n in names])
    rows = survey([names])
    assert {len(rows["lora"]), len(rows["rslora"])} == {4}
    assert len(rows["full"]) == 14, "seven Linear modules in each of two layers, no embeddings, no norms"


def test_survey_finds_nan_and_names_the_tensor(catalogue: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    tensors = load_file(catalogue / "lora" / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((catalogue / "lora" / "adapter_config.json").read_bytes())
    module = "model.layers.1.self_attn.v_proj.weight"
    models = {"bad": str(folder), "good": str(catalogue / "lora")}
    unit = SurveyUnit(str(catalogue / "aligned"), str(catalogue / "unaligned"), models, (module,))
    result = TensorWorker().survey(unit)
    assert result.non_finite == {"bad": [module], "good": []}
    assert [row.module for row in result.statistics["good"]] == ["model.layers.1.self_attn.v_proj"]


def test_survey_nan_in_a_base_model_is_an_error(catalogue: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    folder.mkdir()
    tensors = load_file(catalogue / "full" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((catalogue / "full" / "config.json").read_bytes())
    unit = SurveyUnit(str(catalogue / "aligned"), str(folder), {}, ("model.norm.weight",))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or Inf"):
        TensorWorker().survey(unit)
