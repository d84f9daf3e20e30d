"""The tensor workers without Ray: two routes, one answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fleet.algebra.sparsify import WHOLE, at_least, elected
from fleet.algebra.statistics import Asked
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.headers import plan_shards, shard_name
from fleet.checkpoint.model import read_model, require_full_model, touched_tensors
from fleet.checkpoint.opened import open_full, open_model
from fleet.checkpoint.shards import Output, Shard
from fleet.checkpoint.task_vectors import read_factors
from fleet.core.errors import CheckpointError
from fleet.fusion import AnyFusionMethod, TaskArithmetic, Ties, WeightAverage
from fleet.fusion.member import Member
from fleet.fusion.place import Place
from fleet.methods import AnyRealignMethod, CsuLora, Lox, Noise, Resta, Revert, SafeLora, SafeMerge, WiseFt
from fleet.store import open_folder
from fleet.work.fusing import FuseUnit
from fleet.work.realigning import RealignUnit
from fleet.work.scratch import Scratch
from fleet.work.survey import OwnPart, Surveyed, SurveyResult, SurveyUnit
from fleet.work.survey import survey as survey_unit
from fleet.work.tensor_worker import TensorWorker
from fleet.work.unit import UnitRecord
from tests.pico import make_adapter, make_gpt2, write_model

SAFEMERGE = SafeMerge(method="safemerge", alpha=0.75)
DIRECTIONS = 4
ALL = Asked(displacement=True, rho=True, rho_null=True, energies=DIRECTIONS)


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
    method = method.model_copy(update={"weights": members})
    members_M = tuple(Member(name, str(root / name)) for name in members)
    for shard in shards:
        output = Output(str(out), "m")
        unit = FuseUnit(str(root / "aligned"), members_M, method, shard_bytes is None, None, shard, output)
        TensorWorker().run(unit)
    return out / "m"


def survey(
    root: Path,
    models: dict[str, Path],
    out: Path,
    groups: list[list[str]] | None = None,
    displacement: str | None = None,
    asked: Asked = ALL,
    unaligned: Path | None = None,
) -> list[SurveyResult]:
    """One result per group of tensors (by default one of all).

    V's own parts are left in `out`/displacement and `out`/spectrum, or read from those of an earlier `displacement`.
    """
    aligned = require_full_model(read_model(open_folder(str(root / "aligned"))), "aligned")
    groups = groups or [sorted(aligned.tensors)]

    def part(name: str) -> OwnPart:
        return OwnPart(name, Output(str(out), name) if displacement is None else f"{displacement}/{name}")

    return [
        surveyed(
            SurveyUnit(
                aligned=str(root / "aligned"),
                unaligned=str(unaligned or root / "unaligned") if asked.displacement else None,
                models={
                    name: Surveyed(str(folder), asked, Output(str(out), name) if asked.rho else None)
                    for name, folder in models.items()
                },
                tensors=tuple(group), file=shard_name(index, len(groups)), directions=DIRECTIONS,
                basis=part("displacement") if asked.energies else None,
                spectrum=part("spectrum") if asked.rho_null else None,
            )
        )
        for index, group in enumerate(groups)
    ]  # fmt: skip


def surveyed(unit: SurveyUnit) -> SurveyResult:
    models = {name: open_model(model.uri) for name, model in unit.models.items()}
    unaligned = open_full(unit.unaligned) if unit.unaligned is not None else None
    return survey_unit(unit, open_full(unit.aligned), unaligned, models, Scratch())


def realign(
    root: Path,
    out: Path,
    model: Path,
    method: AnyRealignMethod,
    edited: frozenset[str],
    shards: list[Shard],
    targets: dict[str, float] | None = None,
    harmful: Path | None = None,
    mask: str | None = None,
) -> tuple[Path, list[UnitRecord]]:
    """Realign with what the survey in `out` left; one record per shard."""
    records: list[UnitRecord] = []
    for shard in shards:
        unit = RealignUnit(
            aligned=str(root / "aligned"), unaligned=str(root / "unaligned"), model=str(model),
            safety=str(root / "safety"), harmful=str(harmful) if harmful else None,
            displacement=str(out / "displacement"),
            projections=str(out / model.name) if (out / model.name).exists() else None,
            method=method, edited=edited, targets=targets or {},
            mask=mask, name=model.name, as_lora=shard.file.startswith("adapter"),
            shard=shard, output=Output(str(out), "m"),
        )  # fmt: skip
        records.append(TensorWorker().run(unit))
    return out / "m", records


SUM = TaskArithmetic(method="task_arithmetic", scale=1.0)


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


@pytest.mark.parametrize(
    "method", [SUM, Ties(method="ties", density=0.5, scale=1.0)], ids=["a LoRA cut", "no LoRA made one"]
)
def test_fused_adapter_of_a_rank_is_the_nearest_and_says_what_is_lost(
    catalogue: Path, tmp_path: Path, method: AnyFusionMethod
) -> None:
    limited = method.model_copy(update={"max_rank": 3})
    names = ("lora", "rslora")
    members = tuple(Member(name, str(catalogue / name)) for name in names)
    shard = adapter_shard(*(catalogue / name for name in names))
    unit = FuseUnit(str(catalogue / "aligned"), members, limited, True, None, shard, Output(str(tmp_path), "m"))
    lost = TensorWorker().run(unit).result["recompression_residual"]
    assert isinstance(lost, dict)
    folders = {"written": tmp_path / "m", **{name: catalogue / name for name in names}}
    models = {name: read_model(open_folder(str(folder))) for name, folder in folders.items()}
    adapters = {name: model for name, model in models.items() if isinstance(model, Adapter)}
    assert adapters["written"].max_rank == 3
    for tensor in shard.tensors:
        found = {n: read_factors(adapters[n], tensor) for n in names}
        place = Place(tensor, 0.0)
        deltas = {n: d for n, d in found.items() if d is not None}
        whole = method.fuse(deltas, method.coefficients(names, place), place, WHOLE).dense()
        tail = torch.linalg.svdvals(whole.double())[3:].square().sum().sqrt()
        kept = read_factors(adapters["written"], tensor)
        assert kept is not None
        assert float((whole - kept.dense()).norm()) == pytest.approx(float(tail), rel=1e-3)
        assert lost[tensor.removesuffix(".weight")] == pytest.approx(float(tail), rel=1e-3)


def test_fused_adapter_of_whole_models_trimmed_has_their_thresholds(catalogue: Path, tmp_path: Path) -> None:
    method = Ties(method="ties", trim="model", scale=1.0, max_rank=512)
    names, thresholds = ("lora", "rslora"), {"lora": (0.1,), "rslora": (0.3,)}
    members = tuple(Member(name, str(catalogue / name)) for name in names)
    shard = adapter_shard(*(catalogue / name for name in names))
    output = Output(str(tmp_path), "m")
    TensorWorker().run(FuseUnit(str(catalogue / "aligned"), members, method, True, thresholds, shard, output))
    folders = {"written": tmp_path / "m", **{name: catalogue / name for name in names}}
    models = {name: read_model(open_folder(str(folder))) for name, folder in folders.items()}
    adapters = {name: model for name, model in models.items() if isinstance(model, Adapter)}
    for tensor in shard.tensors:
        found = {n: read_factors(adapters[n], tensor) for n in names}
        values = [at_least(d.dense(), thresholds[n][0]) for n, d in found.items() if d is not None]
        whole = elected(values, [1.0] * len(values), "sum")
        written = read_factors(adapters["written"], tensor)
        assert written is not None
        # As near as the sum of the LoRAs' ranks allows.
        tail = torch.linalg.svdvals(whole.double())[adapters["written"].modules[tensor.removesuffix(".weight")].rank :]
        distance = float((whole - written.dense()).norm())
        assert distance == pytest.approx(float(tail.square().sum().sqrt()), rel=1e-3, abs=1e-5)


def test_fused_mixed_fleet_equals_plain_arithmetic(catalogue: Path, tmp_path: Path) -> None:
    fused = weights_of(fuse(catalogue, tmp_path, {"lora": 0.5, "full": 0.5}, SUM))
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


def modules_of(folder: Path) -> frozenset[str]:
    return frozenset(n.removesuffix(".weight") for n in touched_tensors(read_model(open_folder(str(folder)))))


def linears(root: Path) -> frozenset[str]:
    """Every module of the pico Llama."""
    names = weights_of(root / "aligned")
    return frozenset(n.removesuffix(".weight") for n, t in names.items() if t.ndim == 2 and "embed" not in n)


def test_realigned_adapter_merges_only_the_edited_modules(catalogue: Path, tmp_path: Path) -> None:
    survey(catalogue, {}, tmp_path)
    edited = frozenset({"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"})
    shards = [adapter_shard(catalogue / "lora")]
    folder, _ = realign(catalogue, tmp_path, catalogue / "lora", SAFEMERGE, edited, shards)
    found = merged_weights(catalogue / "aligned", folder)
    task, safety = (merged_weights(catalogue / "aligned", catalogue / n) for n in ("lora", "safety"))
    for name, value in task.items():
        expected = value
        if name.removesuffix(".weight") in edited:
            expected = 0.75 * value + 0.25 * safety[name]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=5e-6)


def test_realigned_full_model_keeps_what_is_not_edited_bit_for_bit(catalogue: Path, tmp_path: Path) -> None:
    survey(catalogue, {}, tmp_path)
    edited = "model.layers.1.self_attn.o_proj"
    shards = full_shards(catalogue, 30_000)
    folder, _ = realign(catalogue, tmp_path, catalogue / "full", SAFEMERGE, frozenset({edited}), shards)
    found, before = weights_of(folder), weights_of(catalogue / "full")
    safety = merged_weights(catalogue / "aligned", catalogue / "safety")
    for name, value in before.items():
        if name == f"{edited}.weight":
            expected = (0.75 * value.float() + 0.25 * safety[name]).bfloat16()
            torch.testing.assert_close(found[name], expected, rtol=1e-2, atol=1e-3)
            assert not torch.equal(found[name], value)
        else:
            assert torch.equal(found[name], value)


def dense_edits(root: Path, model: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What each method below makes of ΔW in every module, by the definitions, in float64."""
    base, unaligned = ({n: t.double() for n, t in weights_of(root / m).items()} for m in ("aligned", "unaligned"))
    is_full = (model / "config.json").exists()
    tuned = {
        n: t.double() for n, t in (weights_of(model) if is_full else merged_weights(root / "aligned", model)).items()
    }
    harmful = {n: t.double() for n, t in merged_weights(root / "aligned", root / "rslora").items()}
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for module in linears(root):
        name = f"{module}.weight"
        delta, v, h = (x[name] - base[name] for x in (tuned, {name: 2 * base[name] - unaligned[name]}, harmful))
        left, singular, right = torch.linalg.svd(v, full_matrices=False)
        u, top = left[:, :DIRECTIONS], left[:, :DIRECTIONS] * singular[:DIRECTIONS] @ right[:DIRECTIONS]
        projected = v @ v.T @ delta / v.norm()
        expected[module] = {
            "projection": projected,
            "norm_preserving": projected * (delta.norm() / projected.norm()) if delta.norm() else delta,
            "subspace": u @ u.T @ delta,
            "lox": delta + 0.5 * top,
            "resta": delta - 0.5 * h,
            "wise_ft": 0.25 * delta,
        }
    return expected


METHODS: dict[str, AnyRealignMethod] = {
    "projection": SafeLora(method="safe_lora"),
    "norm_preserving": SafeLora(method="safe_lora", operator="norm_preserving"),
    "subspace": SafeLora(method="safe_lora", operator="subspace", subspace_directions=DIRECTIONS),
    "lox": Lox(method="lox", coefficient=0.5, extrapolated_directions=DIRECTIONS),
    "resta": Resta(method="resta", gamma=0.5),
    "wise_ft": WiseFt(method="wise_ft", alpha=0.25),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", ["lora", "full"])
def test_realigned_model_equals_the_dense_definition(catalogue: Path, tmp_path: Path, name: str, model: str) -> None:
    """Adapter in, adapter out, and a full fine-tune: both against the papers' dense operators."""
    method, folder = METHODS[name], catalogue / model
    survey(catalogue, {model: folder}, tmp_path)
    edited = linears(catalogue) if method.edits_untouched or model == "full" else modules_of(folder)
    if model == "full":
        shards = full_shards(catalogue, 40_000)
    else:
        shards = [Shard("adapter_model.safetensors", tuple(sorted(f"{m}.weight" for m in edited)), {})]
    harmful = catalogue / "rslora" if name == "resta" else None
    out, _ = realign(catalogue, tmp_path, folder, method, edited, shards, harmful=harmful)
    found = weights_of(out) if model == "full" else merged_weights(catalogue / "aligned", out)
    base = weights_of(catalogue / "aligned")
    expected = dense_edits(catalogue, folder)
    for module in edited:
        weight = base[f"{module}.weight"].double() + expected[module][name]
        if model == "full":
            torch.testing.assert_close(found[f"{module}.weight"], weight.bfloat16(), rtol=1e-2, atol=1e-3)
        else:
            torch.testing.assert_close(found[f"{module}.weight"].double(), weight, rtol=0, atol=1e-5)


def test_reverted_model_is_the_aligned_one_bit_for_bit(catalogue: Path, tmp_path: Path) -> None:
    survey(catalogue, {}, tmp_path)
    method = Revert(method="revert")
    full, _ = realign(
        catalogue, tmp_path, catalogue / "full", method, linears(catalogue), full_shards(catalogue, 40_000)
    )
    assert all(torch.equal(weights_of(full)[n], t) for n, t in weights_of(catalogue / "aligned").items())
    shard = adapter_shard(catalogue / "lora")
    out = tmp_path / "adapter"
    survey(catalogue, {}, out)
    adapter, _ = realign(catalogue, out, catalogue / "lora", method, modules_of(catalogue / "lora"), [shard])
    merged = merged_weights(catalogue / "aligned", adapter)
    aligned = AutoModelForCausalLM.from_pretrained(catalogue / "aligned", dtype=torch.float32)
    assert all(torch.equal(merged[n], p) for n, p in aligned.named_parameters())


def test_realigned_adapter_leaves_removed_modules_out(catalogue: Path, tmp_path: Path) -> None:
    survey(catalogue, {}, tmp_path)
    removed = frozenset({"model.layers.0.self_attn.q_proj"})
    method = SafeLora(method="safe_lora", operator="delete")
    shards = [adapter_shard(catalogue / "lora")]
    folder, _ = realign(catalogue, tmp_path, catalogue / "lora", method, removed, shards)
    assert modules_of(folder) == modules_of(catalogue / "lora") - removed


def test_realigned_adapter_cut_to_a_rank_records_what_it_lost(catalogue: Path, tmp_path: Path) -> None:
    survey(catalogue, {}, tmp_path)
    edited, shards = modules_of(catalogue / "lora"), [adapter_shard(catalogue / "lora")]
    whole, _ = realign(catalogue, tmp_path, catalogue / "lora", SAFEMERGE, edited, shards)
    kept = merged_weights(catalogue / "aligned", whole)
    survey(catalogue, {}, tmp_path / "cut")
    limited = SafeMerge(method="safemerge", alpha=0.75, max_rank=3)
    cut, (record,) = realign(catalogue, tmp_path / "cut", catalogue / "lora", limited, edited, shards)
    found = merged_weights(catalogue / "aligned", cut)
    rows = {row["module"]: row for row in record.result["edits"]}  # type: ignore[union-attr, index]
    for module in edited:
        lost = float((kept[f"{module}.weight"] - found[f"{module}.weight"]).norm())
        assert rows[module]["recompression_residual"] == pytest.approx(lost, rel=1e-3)  # type: ignore[index]
        assert lost > 0.01
    config = json.loads((cut / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)


def test_realigned_rows_say_how_much_of_each_direction_is_left(catalogue: Path, tmp_path: Path) -> None:
    survey(catalogue, {}, tmp_path)
    edited, shards = modules_of(catalogue / "lora"), [adapter_shard(catalogue / "lora")]
    _, (record,) = realign(catalogue, tmp_path, catalogue / "lora", WiseFt(method="wise_ft", alpha=0.5), edited, shards)
    rows: Any = record.result["edits"]
    measured = survey(catalogue, {"lora": catalogue / "lora"}, tmp_path)[0].statistics["lora"]
    assert len(rows) == len(edited)
    for row, statistics in zip(sorted(rows, key=lambda r: r["module"]), measured, strict=True):
        assert row["energy_kept"] == pytest.approx(0.25, rel=1e-4)
        assert row["edit_norm"] == pytest.approx(0.5 * statistics.delta_norm, rel=1e-4)
        assert [before for before, _ in row["directions"]] == pytest.approx(list(statistics.energies or ()), rel=1e-3)
        assert [after for _, after in row["directions"]] == pytest.approx(
            [0.25 * e for e in statistics.energies or ()], rel=1e-3
        )


@pytest.mark.parametrize(
    "method",
    [
        SafeMerge(method="safemerge", merge="dare"),
        SafeMerge(method="safemerge", merge="ties", max_rank=5),
        CsuLora(method="csulora", subspace_directions=DIRECTIONS),
        Resta(method="resta", vector="displacement", vector_directions=2, drop_rate=0.3),
        Noise(method="noise", of=SafeMerge(method="safemerge")),
    ],
    ids=["dare", "ties", "csulora", "resta_d", "noise"],
)
def test_realigned_bytes_do_not_depend_on_shards_or_repetition(
    catalogue: Path, tmp_path: Path, method: AnyRealignMethod
) -> None:
    """Randomness is a module's own: one shard, many shards and a second time give the same tensors."""
    edited = linears(catalogue)
    targets = dict.fromkeys(edited, 0.5)
    found = []
    for run, shard_bytes in enumerate((10**9, 20_000, 10**9)):
        out = tmp_path / str(run)
        survey(catalogue, {}, out)
        shards = full_shards(catalogue, shard_bytes)
        folder, _ = realign(catalogue, out, catalogue / "full", method, edited, shards, targets)
        found.append(weights_of(folder))
    for other in found[1:]:
        assert all(torch.equal(found[0][n], other[n]) for n in found[0])


def test_realigned_dora_and_biases_become_a_full_model(catalogue: Path, tmp_path: Path) -> None:
    dora = make_adapter(tmp_path / "dora", catalogue / "aligned", 5, use_dora=True)
    survey(catalogue, {"dora": dora}, tmp_path)
    edited = frozenset({"model.layers.1.self_attn.v_proj"})
    shards = full_shards(catalogue, 40_000)
    folder, _ = realign(catalogue, tmp_path, dora, SAFEMERGE, edited, shards)
    found = weights_of(folder)
    task, safety = (merged_weights(catalogue / "aligned", x) for x in (dora, catalogue / "safety"))
    for name, value in task.items():
        if name not in found:
            continue
        expected = 0.75 * value + 0.25 * safety[name] if name.removesuffix(".weight") in edited else value
        torch.testing.assert_close(found[name], expected.bfloat16(), rtol=1e-2, atol=1e-3)


def test_survey_in_one_unit_and_many_gives_the_same_rows_and_files(catalogue: Path, tmp_path: Path) -> None:
    aligned = require_full_model(read_model(open_folder(str(catalogue / "aligned"))), "aligned")
    models = {n: catalogue / n for n in ("lora", "rslora", "full")}
    groups = [[n] for n in sorted(aligned.tensors)]

    def rows(results: list[SurveyResult]) -> dict[str, list[object]]:
        return {n: [row for r in results for row in r.statistics[n]] for n in models}

    one = survey(catalogue, models, tmp_path / "one")
    many = survey(catalogue, models, tmp_path / "many", groups)
    assert rows(one) == rows(many)
    assert {len(rows(one)["lora"]), len(rows(one)["rslora"])} == {4}
    assert len(rows(one)["full"]) == 14, "seven Linear modules in each of two layers, no embeddings, no norms"
    for part in ("displacement", "spectrum", "lora", "rslora"):
        ours, theirs = (weights_of(tmp_path / run / part) for run in ("one", "many"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert not (tmp_path / "one" / "full").exists(), "a full fine-tune has no factors to project"


def test_survey_of_many_models_equals_each_alone(catalogue: Path, tmp_path: Path) -> None:
    models = {n: catalogue / n for n in ("lora", "rslora", "safety", "full")}
    together = survey(catalogue, models, tmp_path / "all")[0].statistics
    for name, folder in models.items():
        alone = survey(catalogue, {name: folder}, tmp_path / name)[0].statistics[name]
        for ours, theirs in zip(together[name], alone, strict=True):
            assert ours == theirs


def test_survey_with_the_displacement_of_an_earlier_night_gives_the_same(catalogue: Path, tmp_path: Path) -> None:
    models = {n: catalogue / n for n in ("lora", "full")}
    (first,) = survey(catalogue, models, tmp_path / "first")
    (later,) = survey(catalogue, models, tmp_path / "later", displacement=str(tmp_path / "first"))
    assert first.statistics == later.statistics
    assert {name for name, record in first.own.items() if record.files} == {"displacement", "spectrum"}
    assert not later.own


@pytest.mark.parametrize(
    ("asked", "leaves"),
    [
        (Asked(), set[str]()),
        (Asked(True), set[str]()),
        (Asked(True, True), {"lora"}),
        (Asked(True, True, True), {"lora", "spectrum"}),
        (Asked(True, energies=2), {"displacement"}),
    ],
    ids=["nothing", "cosine", "rho", "rho's null", "directions"],
)
def test_survey_measures_what_is_asked_for_and_leaves_the_rest_out(
    catalogue: Path, tmp_path: Path, asked: Asked, leaves: set[str]
) -> None:
    models = {n: catalogue / n for n in ("lora", "full")}
    (everything,) = survey(catalogue, models, tmp_path / "everything")
    (found,) = survey(catalogue, models, tmp_path / "found", asked=asked)
    for name in models:
        for ours, theirs in zip(found.statistics[name], everything.statistics[name], strict=True):
            row, whole = (m.model_dump(exclude_unset=True) for m in (ours, theirs))
            assert row.keys() == {"module", "shape", "rank", *asked.fields}
            for field in set(asked.fields) - {"energies"}:
                assert row[field] == pytest.approx(whole[field], rel=1e-12)
    assert {path.name for path in (tmp_path / "found").glob("*")} == leaves


def test_survey_undefined_statistics_are_null_and_those_not_asked_for_are_absent(
    catalogue: Path, tmp_path: Path
) -> None:
    """V vanishes: both base models are the same."""
    unit = SurveyUnit(
        aligned=str(catalogue / "aligned"), unaligned=str(catalogue / "aligned"),
        models={"lora": Surveyed(str(catalogue / "lora"), Asked(True))},
        tensors=tuple(open_full(str(catalogue / "aligned")).tensors), file="all",
    )  # fmt: skip
    row = json.loads(json.dumps(unit.run(TensorWorker())["lora"].result))["modules"][0]
    assert (row["lift"], row["cosine"], row["safety_norm"]) == (None, None, 0.0)
    assert not {"rho", "rho_null", "gain", "energies"} & row.keys()


def test_survey_of_a_large_tensor_streams_it_and_gives_the_same(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks that don't lie aligned in the whole, and of V's own part too."""
    monkeypatch.setattr("fleet.algebra.products.BLOCK_ENTRIES", 500)
    models = {n: catalogue / n for n in ("lora", "full")}
    (resident,) = survey(catalogue, models, tmp_path / "resident")
    monkeypatch.setattr("fleet.work.survey.RESIDENT_BYTES", 0)
    (streamed,) = survey(catalogue, models, tmp_path / "streamed")
    assert streamed.statistics == resident.statistics
    for part in ("displacement", "spectrum"):
        ours, theirs = (weights_of(tmp_path / run / part) for run in ("streamed", "resident"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_survey_of_a_conv1d_model_uses_the_module_as_it_multiplies(tmp_path: Path) -> None:
    """GPT-2 stores (d_in, d_out); V and ΔW of its modules are (d_out, d_in) all the same."""
    for name, seed in (("unaligned", 0), ("aligned", 1)):
        make_gpt2(tmp_path / name, seed)
    targets = ["c_attn", "c_proj"]
    adapter = make_adapter(tmp_path / "lora", tmp_path / "aligned", 2, targets=targets, fan_in_fan_out=True)
    rows = survey(tmp_path, {"lora": adapter}, tmp_path / "out")[0].statistics["lora"]
    base, unaligned = (weights_of(tmp_path / m) for m in ("aligned", "unaligned"))
    merged = merged_weights(tmp_path / "aligned", adapter)
    assert rows
    for row in rows:
        name = f"{row.module}.weight"
        v, delta = (base[name].double() - unaligned[name].double()).T, (merged[name] - base[name].float()).double().T
        assert row.shape == tuple(v.shape)
        lift = v.shape[0] * (v.T @ delta).norm() ** 2 / (v.norm() ** 2 * delta.norm() ** 2)
        assert row.lift == pytest.approx(float(lift), rel=1e-3)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_expert_of_a_stacked_tensor_is_a_module_of_its_own(tmp_path: Path, model_type: str) -> None:
    """(E, d_out, d_in), and (E, d_in, d_out) in gpt_oss: one expert is measured and reverted, the others stay."""
    tensor, transposed = "model.layers.0.mlp.experts.gate_up_proj", model_type == "gpt_oss"
    stored = {}
    for seed, name in enumerate(("unaligned", "aligned", "full")):
        generator = torch.Generator().manual_seed(seed)
        stored[name] = torch.randn(3, 6, 8, generator=generator)
        write_model(tmp_path / name, {"model_type": model_type}, {tensor: stored[name], "norm.weight": torch.ones(4)})
    out = tmp_path / "out"
    rows = survey(tmp_path, {"full": tmp_path / "full"}, out)[0].statistics["full"]
    assert [row.module for row in rows] == [f"{tensor}[{e}]" for e in range(3)]
    canonical = {n: (t.mT if transposed else t).double() for n, t in stored.items()}
    for e, row in enumerate(rows):
        v, delta = canonical["aligned"][e] - canonical["unaligned"][e], canonical["full"][e] - canonical["aligned"][e]
        assert row.shape == tuple(v.shape)
        lift = v.shape[0] * (v.T @ delta).norm() ** 2 / (v.norm() ** 2 * delta.norm() ** 2)
        assert row.lift == pytest.approx(float(lift), rel=1e-4)
    names = (tensor, "norm.weight")
    shard = Shard("model.safetensors", names, dict.fromkeys(names, "model.safetensors"))
    unit = RealignUnit(
        aligned=str(tmp_path / "aligned"), unaligned=str(tmp_path / "unaligned"), model=str(tmp_path / "full"),
        safety=None, harmful=None, displacement=str(out / "displacement"), projections=None,
        method=SafeLora(method="safe_lora", operator="delete"), edited=frozenset({f"{tensor}[1]"}), targets={},
        mask=None, name="full", as_lora=False, shard=shard, output=Output(str(out), "m"),
    )  # fmt: skip
    TensorWorker().run(unit)
    found = weights_of(out / "m")[tensor]
    torch.testing.assert_close(found[1], stored["aligned"][1])
    torch.testing.assert_close(found[[0, 2]], stored["full"][[0, 2]])


def test_survey_finds_nan_and_names_the_tensor(catalogue: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    tensors = load_file(catalogue / "lora" / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((catalogue / "lora" / "adapter_config.json").read_bytes())
    module = "model.layers.1.self_attn.v_proj.weight"
    (result,) = survey(catalogue, {"bad": folder, "good": catalogue / "lora"}, tmp_path / "out", [[module]])
    assert result.non_finite == {"bad": [module], "good": []}
    assert [row.module for row in result.statistics["good"]] == ["model.layers.1.self_attn.v_proj"]


def test_survey_finds_nan_outside_the_modules(catalogue: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    tensors = load_file(catalogue / "full" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((catalogue / "full" / "config.json").read_bytes())
    (result,) = survey(catalogue, {"bad": folder}, tmp_path / "out", [["model.norm.weight"]])
    assert result.non_finite == {"bad": ["model.norm.weight"]}


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_survey_nan_in_a_base_model_is_an_error(catalogue: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "nan"
    folder.mkdir()
    tensors = load_file(catalogue / "full" / "model.safetensors")
    tensors[name].view(-1)[-1] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((catalogue / "full" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=rf"nan: tensor {re.escape(name)} holds NaN or Inf"):
        survey(catalogue, {}, tmp_path / "out", [["model.norm.weight"], sorted(tensors)], unaligned=folder)
