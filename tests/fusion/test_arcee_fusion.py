"""Arcee Fusion: its equation in float64, streamed in any runs, by any workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from pydantic import TypeAdapter, ValidationError

import fleet.fusion.streaming
from fleet.core.errors import ManifestError
from fleet.fusion import AnyFusionMethod, ArceeFusion
from fleet.fusion.base import Entries
from fleet.fusion.place import Place
from fleet.manifest import load_manifest
from tests.catalogue import manifest_document, write_manifest
from tests.fusion.test_streaming import assert_same_bits, fuse, held, streamed, weights_in
from tests.pico import write_adapter, write_model

ARCEE = ArceeFusion(method="arcee_fusion")
PLACE = Place("q", 0.5)
SHAPES = {
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 6, 8),
    "model.layers.1.mlp.down_proj.weight": (70, 130),
    "model.layers.1.self_attn.q_proj.weight": (33, 8),
    "model.norm.weight": (8,),
}
Q_PROJ = "model.layers.1.self_attn.q_proj"


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def importance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Written out: of the shape given, float64."""
    one, two = first.double(), second.double()
    p, q = two.softmax(dim=-1), one.softmax(dim=-1)
    return (two - one).abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True).clamp(min=0.0)


def threshold(scores: torch.Tensor, fence: float) -> float:
    ordered = scores.flatten().sort().values
    lower, median, upper = (float(ordered[int(share * (len(ordered) - 1))]) for share in (0.25, 0.5, 0.75))
    return median + fence * (upper - lower)


def assert_is_the_equation(found: torch.Tensor, first: torch.Tensor, second: torch.Tensor, fence: float) -> None:
    """Every entry is one of the two models', and the right one unless it is at the threshold."""
    scores = importance(first, second)
    least = threshold(scores, fence)
    taken = torch.where(scores >= least, second, first)
    close = (scores - least).abs() <= 1e-5 * abs(least) + 1e-30
    same = torch.isclose(found, taken, rtol=1e-5, atol=1e-6)
    assert bool((same | close).all())


def entries(aligned: Sequence[Any], models: Sequence[str] = ("a",), **values: Sequence[Any]) -> Entries:
    base = torch.tensor(aligned)
    deltas = {n: torch.tensor(v).flatten() for n, v in values.items()}
    return Entries(deltas, PLACE, 0, base.shape[-1], {}, models, base.flatten())


def test_arcee_fusion_is_read_by_its_name() -> None:
    assert TypeAdapter(AnyFusionMethod).validate_json(ARCEE.model_dump_json()) == ARCEE
    assert not ARCEE.is_linear and not ARCEE.keeps_lora and ARCEE.is_entrywise


def test_arcee_fusion_importance_by_hand() -> None:
    """From (1/2, 1/2) to (3/4, 1/4): KL = ¾ ln 3/2 + ¼ ln 1/2. The other row is only shifted: softmax is the same."""
    log3 = torch.tensor(3.0).log().item()
    found = ARCEE.scores(entries([[0.0, 0.0], [2.0, 1.0]], a=[[log3, 0.0], [5.0, 5.0]]))["importance"]
    divergence = 0.75 * torch.tensor(1.5).log().item() + 0.25 * torch.tensor(0.5).log().item()
    torch.testing.assert_close(found, torch.tensor([log3 * divergence, 0.0, 0.0, 0.0]), rtol=1e-6, atol=1e-12)


def test_arcee_fusion_direction_is_from_the_first_model_to_the_second() -> None:
    """Whichever of them leaves the tensor alone."""
    values = [[2.0, 0.0, -1.0]]
    into = ARCEE.scores(entries([[0.0, 1.0, 3.0]], ("a", "b"), b=values))["importance"].double()
    away = ARCEE.scores(entries([[0.0, 1.0, 3.0]], ("a", "b"), a=values))["importance"].double()
    first, second = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[2.0, 1.0, 2.0]])
    torch.testing.assert_close(into, importance(first, second).flatten(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(away, importance(second, first).flatten(), rtol=1e-6, atol=0.0)
    assert not torch.allclose(into, away)


def test_arcee_fusion_takes_what_reaches_the_threshold() -> None:
    """Of importances 0 to 4: 2 + k (3 − 1), so 5 with k = 1.5, and 4, which one has, with k = 1."""
    scored = entries([[0.0] * 5], a=[[1.0, 2.0, 3.0, 4.0, 5.0]])
    thresholds = {"importance": (1.0, 2.0, 3.0)}

    class Scored(ArceeFusion):
        def scores(self, entries: Entries) -> dict[str, torch.Tensor]:
            return {"importance": torch.arange(5.0)}

    assert Scored(method="arcee_fusion").combine(scored, {"a": 1.0}, thresholds, None).tolist() == [0.0] * 5
    found = Scored(method="arcee_fusion", fence=1.0).combine(scored, {"a": 1.0}, thresholds, None)
    assert found.tolist() == [0.0, 0.0, 0.0, 0.0, 5.0]


@pytest.mark.parametrize(
    ("size", "expected"), [(1, [1, 1, 1]), (2, [2, 2, 2]), (4, [4, 3, 2]), (5, [4, 3, 2]), (9, [7, 5, 3])]
)
def test_arcee_fusion_quartiles_are_the_lower_of_two_neighbours(size: int, expected: list[int]) -> None:
    """From above: of nine in order, the third, the fifth and the seventh; of four, the first, the second, the third."""
    assert ARCEE.ranks(["a"], PLACE, size)["importance"] == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.floats(0.0, 3.0))
def test_arcee_fusion_is_its_equation(seed: int, rows: int, columns: int, has_two: bool, fence: float) -> None:
    name = "layers.0.weight"
    aligned, one, two = (normal(seed + i, rows, columns) for i in range(3))
    members = {n: held({name: t})[0] for n, t in (("one", one), ("two", two))}
    members = members if has_two else {"two": members["two"]}
    method = ArceeFusion(method="arcee_fusion", fence=fence)
    found = streamed(held({name: aligned})[0], members, method)[name]
    assert_is_the_equation(found, one if has_two else aligned, two, fence)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`aligned` and `near` and `far` from it, bfloat16, and a LoRA."""
    root = tmp_path_factory.mktemp("arcee")
    config = {"model_type": "qwen3_moe"}
    base = {n: normal(i, *s) * 0.3 for i, (n, s) in enumerate(SHAPES.items())}
    write_model(root / "aligned", config, {n: t.bfloat16() for n, t in base.items()})
    for seed, (name, size) in enumerate((("near", 0.02), ("far", 0.5))):
        moved = {n: (t + normal(30 + 10 * seed + i, *t.shape) * size) for i, (n, t) in enumerate(base.items())}
        write_model(root / name, config, {n: t.bfloat16() for n, t in moved.items()})
    factors = {f"{Q_PROJ}.lora_A.weight": normal(5, 2, 8), f"{Q_PROJ}.lora_B.weight": normal(6, 33, 2) * 0.1}
    write_adapter(root / "lora", {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}, factors)
    return root


@pytest.mark.parametrize("members", [("near",), ("near", "far"), ("far", "near"), ("lora", "far"), ("far", "lora")])
def test_streamed_arcee_fusion_is_its_equation_whatever_the_runs_and_shards(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: tuple[str, ...]
) -> None:
    found = fuse(models, tmp_path / "default", members, ARCEE)
    base = weights_in(models / "aligned")
    for name, weight in base.items():
        stored = [weights_in(models / m).get(name) for m in members if m != "lora"]
        if "lora" not in members or name != f"{Q_PROJ}.weight":
            pair = [t for t in stored if t is not None]
            pair = [weight, *pair] if members[0] == "lora" or len(members) == 1 else [*pair, weight][:2]
            assert_is_the_equation(found[name].float(), pair[0].float(), pair[1].float(), 1.5)
            assert 0 < int((found[name] != pair[0]).sum()) < 0.5 * weight.numel() or name == "model.norm.weight"
    for entries_of_run in (1, 64, 1000, 1 << 20):
        monkeypatch.setattr(fleet.fusion.streaming, "RUN_ENTRIES", entries_of_run)
        out = tmp_path / str(entries_of_run)
        assert_same_bits(fuse(models, out, members, ARCEE, shard_bytes=500), found)
    monkeypatch.setattr(fleet.fusion.streaming, "SAMPLE_ENTRIES", 4)
    assert_same_bits(fuse(models, tmp_path / "sampled", members, ARCEE), found)


def test_streamed_arcee_fusion_of_a_zero_task_vector_is_the_aligned_model(models: Path, tmp_path: Path) -> None:
    expected = weights_in(models / "aligned")
    (tmp_path / "same").symlink_to(models / "aligned")
    (tmp_path / "aligned").symlink_to(models / "aligned")
    assert_same_bits(fuse(tmp_path, tmp_path / "out", ("same",), ARCEE), expected)


def test_arcee_fusion_of_three_models_is_refused() -> None:
    with pytest.raises(ManifestError, match="arcee_fusion puts one model into another, not 3 together"):
        ARCEE.coefficients(["a", "b", "c"], PLACE)


@pytest.mark.parametrize("given_as", [{"weights": {"a": 1.0}}, {"max_rank": 4}, {"fence": -1.0}])
def test_arcee_fusion_parameters_that_mean_nothing_are_refused(given_as: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"arcee_fusion|greater than"):
        ArceeFusion(method="arcee_fusion", **given_as)


def test_manifest_mask_learned_on_an_arcee_fusion_is_refused(catalogue: Path, tmp_path: Path) -> None:
    realign = {"method": "somf", "learn_on": "fusion", "preferences": "p.jsonl"}
    variant = {"name": "v", "realign": realign, "fuse": {"method": "arcee_fusion"}, "models": ["lora", "full"]}
    document = manifest_document(catalogue, tmp_path, variants=[variant])
    with pytest.raises(ManifestError, match="arcee_fusion reads more than task vectors"):
        load_manifest(write_manifest(tmp_path / "models.json", document))
