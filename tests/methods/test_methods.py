from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from pydantic import TypeAdapter, ValidationError

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.factors import Factors
from fleet.algebra.random_edits import named_generator
from fleet.algebra.sparsify import dropped, trimmed
from fleet.algebra.spectral import Triplets, truncated
from fleet.methods import (
    AnyRealignMethod,
    CsuLora,
    Decision,
    Lox,
    ModuleStatistics,
    Noise,
    Ranks,
    RealignMethod,
    Resta,
    Revert,
    SafeLora,
    SafeMerge,
    SpLora,
    WiseFt,
)
from fleet.methods.base import measured_needs

SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**31)


# -- stand-ins, also for the controls' tests -------------------------------------------------------------------------


@dataclass
class FakeModule:
    """`fleet.methods.base.Module` of tensors in memory."""

    delta: Delta
    v: torch.Tensor
    safety: Delta | None = None
    harmful: Delta | None = None
    own_factors: tuple[Factors, Factors] | None = None
    target_norm: float = 0.0
    name: str = "m"

    @property
    def factors(self) -> tuple[Factors, Factors]:
        assert self.own_factors is not None
        return self.own_factors

    @property
    def projected(self) -> Delta:
        c = self.v @ self.v.T / self.v.norm()
        return LowRank(c @ self.delta.b, self.delta.a) if isinstance(self.delta, LowRank) else Dense(c @ dense(self))

    def masked(self) -> Delta:
        raise AssertionError("these methods apply no mask")

    def displacement(self, k: int) -> Triplets:
        left, values, right = torch.linalg.svd(self.v, full_matrices=False)
        return Triplets(left, values, right.T).head(k)

    def generator(self, seed: int) -> torch.Generator:
        return named_generator(seed, self.name)


def dense(module: FakeModule) -> torch.Tensor:
    return module.delta.dense()


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int, d_out: int, d_in: int, rank: int) -> LowRank:
    return LowRank(normal(seed, d_out, rank), normal(seed + 1, rank, d_in))


def make_module(
    seed: int = 0,
    d_out: int = 12,
    d_in: int = 10,
    own: int = 3,
    safety: int | None = 2,
    harmful: int | None = 2,
    full: bool = False,
    target_norm: float = 0.0,
) -> FakeModule:
    """A module with a LoRA, or with its product as a full fine-tune's, beside adapters of these ranks."""
    delta = lora(seed, d_out, d_in, own)
    factors = None
    if safety is not None:
        other = lora(seed + 2, d_out, d_in, safety)
        factors = (Factors(delta.b, delta.a, 1.0), Factors(other.b, other.a, 1.0))
    return FakeModule(
        delta=Dense(delta.dense()) if full else delta,
        v=normal(seed + 6, d_out, d_in),
        safety=None if safety is None else lora(seed + 2, d_out, d_in, safety),
        harmful=None if harmful is None else lora(seed + 4, d_out, d_in, harmful),
        own_factors=factors,
        target_norm=target_norm,
    )


def ranks_of(module: FakeModule) -> Ranks:
    def rank(delta: Delta | None) -> int:
        return delta.rank if isinstance(delta, LowRank) else 0

    return Ranks(rank(module.delta), rank(module.safety), rank(module.harmful), min(module.delta.shape))


def assert_same(found: Delta | torch.Tensor, expected: torch.Tensor, rel: float = 1e-6) -> None:
    """Equal up to this share of the expected norm."""
    value = found if isinstance(found, torch.Tensor) else found.dense()
    assert value.shape == expected.shape
    assert float((value.double() - expected.double()).norm()) <= rel * float(expected.double().norm()) + 1e-12


def statistics(module: str = "m", **values: Any) -> ModuleStatistics:
    fields: dict[str, Any] = {
        "shape": (8, 8),
        "rank": 1,
        "delta_norm": 1.0,
        "safety_norm": 1.0,
        "rho": 0.6,
        "rho_null": 0.5,
        "rho_null_sd": 0.1,
        "lift": 2.0,
        "gain": 0.1,
        "cosine": 0.2,
        "energies": (0.25, 0.125, 0.125, 0.0),
    }
    return ModuleStatistics(module=module, **(fields | values))


UNDEFINED = dict.fromkeys(("rho", "rho_null", "rho_null_sd", "lift", "gain", "cosine", "energies"))

METHODS: dict[str, RealignMethod] = {
    "safemerge": SafeMerge(method="safemerge", statistic="lift"),
    "safemerge peft_factor": SafeMerge(method="safemerge", merge="peft_factor"),
    "safemerge dare": SafeMerge(method="safemerge", merge="dare"),
    "safemerge ties": SafeMerge(method="safemerge", merge="ties"),
    "safe_lora": SafeLora(method="safe_lora", statistic="lift"),
    "safe_lora norm_preserving": SafeLora(method="safe_lora", operator="norm_preserving"),
    "safe_lora subspace": SafeLora(method="safe_lora", operator="subspace", subspace_directions=3),
    "safe_lora delete": SafeLora(method="safe_lora", operator="delete"),
    "resta": Resta(method="resta"),
    "resta dropped": Resta(method="resta", drop_rate=0.3),
    "resta displacement": Resta(method="resta", vector="displacement", vector_directions=3),
    "wise_ft": WiseFt(method="wise_ft"),
    "lox": Lox(method="lox"),
    "csulora": CsuLora(method="csulora", subspace_directions=3),
    "splora": SpLora(method="splora"),
    "revert": Revert(method="revert"),
}
ENTRYWISE = ("safemerge dare", "safemerge ties", "resta dropped")
"""What sees single entries of ΔW: its edit is dense, and a LoRA is recompressed after it."""


# -- what a method decides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statistic", "null", "field", "around"),
    [
        ("lift", 1.0, "lift", (0.999, 1.0, 1.001)),
        ("rho", 0.7, "rho", (0.699, 0.7, 0.701)),
        ("rho_z", 0.0, "rho", (0.499, 0.5, 0.501)),
        ("cosine", 0.0, "cosine", (-0.001, 0.0, 0.001)),
        ("kappa", 1.0, "energies", ((0.1, 0.024), (0.1, 0.025), (0.1, 0.026))),
    ],
)
def test_gate_default_threshold_is_the_null_and_safemerge_edits_below_it(
    statistic: Any, null: float, field: str, around: tuple[Any, Any, Any]
) -> None:
    shape = (16, 4)  # κ's null with two directions is an eighth
    modules = [statistics(str(i), shape=shape, **{field: value}) for i, value in enumerate(around)]
    method = SafeMerge(method="safemerge", statistic=statistic, gate_directions=2)
    assert method.tau == null
    assert [d.edit for d in method.decide(modules)] == [True, False, False]
    inclusive = SafeLora(method="safe_lora", statistic=statistic, gate_directions=2, threshold=null)
    assert [d.edit for d in inclusive.decide(modules)] == [True, True, False]


def test_gate_default_threshold_of_safe_lora_is_its_papers() -> None:
    assert SafeLora(method="safe_lora", statistic="rho").tau == 0.5
    assert [SafeLora(method="safe_lora", statistic=s).tau for s in ("lift", "kappa", "rho_z", "cosine")] == [1, 1, 0, 0]


def test_gated_methods_without_parameters_are_the_papers() -> None:
    safemerge, safe_lora = SafeMerge(method="safemerge"), SafeLora(method="safe_lora")
    assert (safemerge.statistic, safemerge.tau, safemerge.alpha, safemerge.merge) == ("rho", 0.7, 0.8, "exact")
    assert (safe_lora.statistic, safe_lora.tau, safe_lora.select) == ("rho", 0.5, "threshold")
    assert safe_lora.operator == "projection"
    # Whatever lift says: above 1 nothing was edited while it was the default.
    modules = [statistics(name, rho=rho, lift=1.5) for name, rho in {"a": 0.45, "b": 0.6, "c": 0.75}.items()]
    assert [d.edit for d in safemerge.decide(modules)] == [True, True, False]
    assert [d.edit for d in safe_lora.decide(modules)] == [True, False, False]


def test_method_says_whether_it_reads_v() -> None:
    reads = {name for name, method in METHODS.items() if method.reads_displacement}
    assert METHODS.keys() - reads == {"resta", "resta dropped", "wise_ft", "revert"}
    assert not TypeAdapter(AnyRealignMethod).validate_python({"method": "somf", "reuse": "mask"}).reads_displacement
    for of in METHODS.values():
        assert Noise.model_validate({"method": "noise", "of": of}).reads_displacement == of.reads_displacement


@pytest.mark.parametrize(
    "method",
    [SafeMerge(method="safemerge", statistic="lift", threshold=1.5), SafeLora(method="safe_lora", statistic="lift")],
)
def test_gate_reason_names_statistic_value_and_threshold(method: SafeMerge | SafeLora) -> None:
    edited, kept = method.decide([statistics("a", lift=0.5), statistics("b", lift=2.0)])
    sign, other = ("<", "≥") if isinstance(method, SafeMerge) else ("≤", ">")
    assert edited == Decision(module="a", edit=True, reason=f"lift 0.5000 {sign} {method.tau:g}")
    assert kept == Decision(module="b", edit=False, reason=f"lift 2.0000 {other} {method.tau:g}")


@pytest.mark.parametrize(
    "method", [SafeMerge(method="safemerge", statistic="lift"), SafeLora(method="safe_lora", statistic="lift")]
)
def test_gate_value_of_zero_is_defined(method: SafeMerge | SafeLora) -> None:
    assert method.decide([statistics(lift=0.0)])[0].edit


def test_gate_explicit_threshold_zero_is_no_default() -> None:
    method = SafeMerge(method="safemerge", statistic="rho", threshold=0.0)
    assert method.tau == 0.0
    assert not method.decide([statistics(rho=0.0)])[0].edit


@pytest.mark.parametrize("select", ["threshold", "number"])
@pytest.mark.parametrize("statistic", ["lift", "rho", "rho_z", "kappa", "cosine"])
def test_gate_undefined_statistic_keeps_and_says_so(statistic: Any, select: Any) -> None:
    methods = (
        SafeMerge(method="safemerge", statistic=statistic, threshold=1e9),
        SafeLora(method="safe_lora", statistic=statistic, threshold=1e9, select=select),
    )
    for method in methods:
        assert method.decide([statistics("a"), statistics("m", **UNDEFINED)])[1] == Decision(
            module="m", edit=False, reason=f"{statistic} undefined: kept"
        )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 1.0),
        ({"rho_null": None}, None),
        ({"rho_null_sd": 0.0}, None),
        ({"rho_null_sd": None}, None),
        ({"rho": 0.3}, -2.0),
    ],
)
def test_statistics_rho_z_counts_standard_deviations(values: dict[str, Any], expected: float | None) -> None:
    found = statistics(**values).rho_z
    assert found is None if expected is None else found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"delta_norm": 1.0}, True),
        ({"delta_norm": 0.0}, False),
        ({"delta_norm": 1.0, "safety_norm": 2.0, "lift": 0.0}, True),
        ({"delta_norm": 1.0, "safety_norm": 0.0, "lift": None}, False),
    ],
    ids=["without V", "no ΔW", "with V", "V vanishes"],
)
def test_statistics_are_defined_where_what_was_measured_has_a_direction(values: dict[str, Any], expected: bool) -> None:
    assert ModuleStatistics(module="m", shape=(4, 4), rank=2, **values).is_defined is expected


def test_statistics_energy_lift_is_one_where_indifferent() -> None:
    assert statistics(shape=(8, 3)).energy_lift(1) == 2.0
    assert statistics(shape=(8, 3)).energy_lift(2) == pytest.approx(1.5)
    assert statistics(shape=(10, 3), energies=(0.1,) * 3).energy_lift(2) == pytest.approx(1.0)
    # Only as many directions as V has.
    assert statistics(shape=(10, 3), energies=(0.1,) * 3).energy_lift(8) == pytest.approx(1.0)
    assert statistics(energies=None).energy_lift(2) is None
    assert statistics(energies=()).energy_lift(2) is None


def test_safe_lora_number_takes_exactly_that_many_and_ties_go_by_name() -> None:
    lifts = {"d": 0.5, "b": 0.5, "c": 0.5, "a": 3.0, "e": 0.1}
    modules = [statistics(name, lift=lift) for name, lift in lifts.items()] + [statistics("f", **UNDEFINED)]
    for number, chosen in {1: "e", 2: "be", 3: "bce", 5: "abcde", 9: "abcde"}.items():
        method = SafeLora(method="safe_lora", statistic="lift", select="number", number=number, threshold=0.0)
        decisions = method.decide(modules)
        assert [d.module for d in decisions] == [*lifts, "f"]
        assert {d.module for d in decisions if d.edit} == set(chosen)
    two = SafeLora(method="safe_lora", statistic="lift", select="number", number=2).decide(modules)
    assert two[1].reason == "lift 0.5000 among the 2 lowest; within rounding of the cut"
    assert two[0].reason == "lift 0.5000 not among the 2 lowest; within rounding of the cut"
    assert [d.module for d in two if d.close] == ["d", "b", "c"], "a tie is decided by name"
    assert not any(
        d.close for d in SafeLora(method="safe_lora", statistic="lift", select="number", number=1).decide(modules)
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 3), max_size=12), st.integers(1, 15))
def test_safe_lora_number_edits_no_module_above_one_it_keeps(lifts: list[float], number: int) -> None:
    modules = [statistics(f"m{i}", lift=lift) for i, lift in enumerate(lifts)]
    decisions = SafeLora(method="safe_lora", statistic="lift", select="number", number=number).decide(modules)
    edited = [lift for lift, d in zip(lifts, decisions, strict=True) if d.edit]
    kept = [lift for lift, d in zip(lifts, decisions, strict=True) if not d.edit]
    assert len(edited) == min(number, len(lifts))
    assert not edited or not kept or max(edited) <= min(kept)


@pytest.mark.parametrize(
    ("operator", "lift", "gain", "warned"),
    [
        ("projection", 0.5, 0.0499, True),
        ("projection", 0.5, 0.05, False),
        ("projection", 1.5, 0.001, False),
        ("norm_preserving", 0.5, 0.001, False),
        ("subspace", 0.5, None, False),
        ("delete", 0.5, None, False),
    ],
)
def test_safe_lora_warns_where_its_projection_is_a_deletion(
    operator: Any, lift: float, gain: float | None, warned: bool
) -> None:
    method = SafeLora(method="safe_lora", statistic="lift", operator=operator)
    reason = method.decide([statistics(lift=lift, gain=gain)])[0].reason
    assert reason.endswith(f"gain {gain:.2g}: the projection is a deletion") if warned else "deletion" not in reason


def test_safe_lora_warning_counts_the_deletions_among_the_edited() -> None:
    modules = [statistics(name, gain=gain) for name, gain in {"a": 0.01, "b": 0.2, "c": 0.02, "d": 0.03}.items()]
    warning = SafeLora(method="safe_lora", statistic="lift").warning(modules, {"a", "b", "c"})
    assert (warning or "").startswith("in 2 of 3 edited modules the projection keeps less than 5% of ΔW")
    assert SafeLora(method="safe_lora", statistic="lift").warning(modules, {"b"}) is None
    assert SafeLora(method="safe_lora", operator="delete").warning(modules, {"a"}) is None
    for name in METHODS.keys() - {"safe_lora"}:
        assert METHODS[name].warning(modules, {"a", "b", "c", "d"}) is None


def close_of(method: RealignMethod, modules: list[ModuleStatistics]) -> set[str]:
    decisions = method.decide(modules)
    assert all(d.close == d.reason.endswith("; within rounding of the cut") for d in decisions)
    assert method.close_modules(modules) == [d.module for d in decisions if d.close]
    return {d.module for d in decisions if d.close}


@pytest.mark.parametrize("statistic", ["lift", "rho", "rho_z", "kappa", "cosine"])
@pytest.mark.parametrize("make", [SafeMerge, SafeLora])
def test_decisions_within_rounding_of_the_threshold_are_close_on_either_side(make: Any, statistic: str) -> None:
    """Half the rounding off and twice it, below and above; undefined ones are never close."""
    method = make(method="safemerge" if make is SafeMerge else "safe_lora", statistic=statistic, threshold=0.25)
    # ρ_z is (0.5 + x − 0.5) / 0.01: its rounding is ρ's, 1e-5 (0.5 + 0.5), in units of 0.01.
    rounding = {"lift": 2.5e-6, "rho": 2.5e-6, "rho_z": 1e-3, "kappa": 2.5e-4, "cosine": 1e-5}[statistic]

    def at(name: str, value: float) -> ModuleStatistics:
        if statistic == "rho_z":
            return statistics(name, rho=0.5 + 0.01 * value, rho_null=0.5, rho_null_sd=0.01)
        if statistic == "kappa":
            return statistics(name, shape=(1, 5), energies=(value,))
        return statistics(name, **{statistic: value})

    offsets = {"below": -2.0, "just below": -0.5, "on it": 0.0, "just above": 0.5, "above": 2.0}
    modules = [at(name, 0.25 + rounding * offset) for name, offset in offsets.items()]
    assert close_of(method, [*modules, statistics("m", **UNDEFINED)]) == {"just below", "on it", "just above"}
    warning = method.warning(modules, set())
    assert warning and warning.startswith("3 of 5 modules lie within rounding of what decides")
    assert "just below, on it, just above" in warning


def test_the_lowest_within_rounding_of_the_cut_are_close_on_either_side() -> None:
    lifts = {"a": 0.3, "b": 0.5, "c": 0.5 + 4e-6, "d": 0.5 + 8e-6, "e": 0.5 + 3e-5, "f": 0.9}

    def close_at(number: int) -> set[str]:
        modules = [statistics(name, lift=lift) for name, lift in lifts.items()]
        return close_of(SafeLora(method="safe_lora", statistic="lift", select="number", number=number), modules)

    assert close_at(1) == close_at(5) == close_at(6) == close_at(9) == set()
    assert close_at(2) == close_at(3) == {"b", "c", "d"}


def test_splora_distances_within_rounding_of_the_cut_are_close() -> None:
    rhos = {"a": 0.2, "b": 0.5, "c": 0.5 + 5e-6, "d": 0.5 + 2e-4, "e": 1.0}
    modules = [statistics(name, rho=rho, shape=(10, 10)) for name, rho in rhos.items()]
    assert close_of(SpLora(method="splora", number=2), modules) == {"b", "c"}
    assert close_of(SpLora(method="splora", number=3), modules) == set()
    assert close_of(SpLora(method="splora", number=5), modules) == set()


def test_splora_removes_the_highest_distances() -> None:
    modules = [
        statistics("far", rho=0.1, shape=(10, 10)),
        statistics("near", rho=0.9, shape=(10, 10)),
        # The same angle in more entries is more standard deviations below the distance of independent tensors.
        statistics("far, large", rho=0.1, shape=(20, 20)),
        statistics("undefined", **UNDEFINED),
    ]
    decisions = SpLora(method="splora", number=1).decide(modules)
    assert [d.edit for d in decisions] == [True, False, False, False]
    assert decisions[3].reason == "rho undefined: kept"
    # √200 (√0.9 − 1), √200 (√0.1 − 1), √800 (√0.9 − 1)
    assert [d.reason for d in decisions[:3]] == ["distance -0.7", "distance -9.7", "distance -1.5"]
    two = SpLora(method="splora", number=2).decide(modules)
    assert [d.edit for d in two] == [True, False, True, False]


def test_splora_distance_is_that_of_scaled_tensors() -> None:
    """Against the definition: the distance at unit root mean square, in sds off the mean of independent tensors."""
    module = make_module(d_out=40, d_in=30)
    w, c = dense(module).flatten(), module.projected.dense().flatten()
    rho, n = float(torch.cosine_similarity(w, c, dim=0)), w.numel()
    distance = float((w / w.norm() - c / c.norm()).norm()) * n**0.5
    generator = torch.Generator().manual_seed(0)
    random = torch.stack([(torch.randn(2, n, generator=generator).diff(dim=0)).norm() for _ in range(500)])
    expected = (distance - float(random.mean())) / float(random.std())
    reason = SpLora(method="splora").decide([statistics(rho=rho, shape=(40, 30))])[0].reason
    assert float(reason.removeprefix("distance ")) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", ["resta", "resta displacement", "wise_ft", "lox", "revert"])
def test_ungated_methods_edit_every_module(name: str) -> None:
    modules = [statistics("a", lift=9.0), statistics("b", **UNDEFINED)]
    assert [(d.module, d.edit) for d in METHODS[name].decide(modules)] == [("a", True), ("b", True)]


def test_csulora_keeps_what_vanishes_and_says_so() -> None:
    decisions = METHODS["csulora"].decide([statistics("a"), statistics("b", **UNDEFINED)])
    assert [d.edit for d in decisions] == [True, False]
    assert decisions[1].reason == "ΔW or V vanishes: kept"


def test_methods_ask_for_what_they_use() -> None:
    assert {name: method.needs for name, method in METHODS.items() if method.needs} == {
        "safemerge": {"safety", "displacement"},
        "safemerge peft_factor": {"safety", "rho"},
        "safemerge dare": {"safety", "rho"},
        "safemerge ties": {"safety", "rho"},
        "safe_lora": {"displacement", "rho", "projection"},
        "safe_lora norm_preserving": {"rho", "projection"},
        "safe_lora subspace": {"rho"},
        "safe_lora delete": {"rho"},
        "resta": {"harmful"},
        "resta dropped": {"harmful"},
        "csulora": {"displacement"},
        "splora": {"rho"},
    }
    assert SafeMerge(method="safemerge", statistic="rho_z").needs == {"safety", "rho_null"}
    assert {SafeMerge(method="safemerge", statistic=s).needs for s in ("lift", "cosine", "kappa")} == {
        frozenset({"safety", "displacement"})
    }
    assert measured_needs(METHODS["safe_lora"].needs) == {"displacement", "rho", "projection"}
    assert measured_needs({"rho_null", "safety"}) == {"displacement", "rho", "rho_null"}
    assert not measured_needs({"safety", "harmful", "mask"})
    assert SafeLora(method="safe_lora", statistic="rho", operator="delete").needs == {"rho"}
    assert {name: method.directions for name, method in METHODS.items() if method.directions} == {
        "safe_lora subspace": 3,
        "resta displacement": 3,
        "lox": 6,
        "csulora": 3,
    }
    kappa = SafeMerge(method="safemerge", statistic="kappa", gate_directions=5)
    assert (kappa.directions, kappa.energies) == (5, 5)
    assert not any(method.energies for method in METHODS.values())
    both = SafeLora(method="safe_lora", statistic="kappa", operator="subspace", subspace_directions=9)
    assert both.directions == 9
    assert [name for name, method in METHODS.items() if method.adapters_only] == ["safemerge peft_factor"]
    untouched = [name for name, method in METHODS.items() if method.edits_untouched]
    assert untouched == ["resta", "resta dropped", "resta displacement", "lox"]


# -- what a method's edit is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_safemerge_exact_equals_dense(full: bool) -> None:
    module = make_module(full=full)
    assert module.safety is not None
    merged = SafeMerge(method="safemerge", alpha=0.7).edit(module)
    assert isinstance(merged, Dense if full else LowRank)
    assert_same(merged, 0.7 * dense(module).double() + 0.3 * module.safety.dense().double())


@pytest.mark.parametrize("merge", ["exact", "peft_factor", "dare", "ties"])
def test_safemerge_without_safety_in_the_module_merges_with_zero(merge: Any) -> None:
    """TIES elects among what is not zero, so it keeps the trimmed ΔW whole; the others average."""
    module = make_module(safety=None)
    expected = {"exact": 0.8 * dense(module), "peft_factor": 0.8 * dense(module)}
    expected["dare"] = 0.8 * dropped(module.delta, 0.5, module.generator(0)).value
    expected["ties"] = trimmed(module.delta, 0.5).value
    assert_same(SafeMerge(method="safemerge", merge=merge).edit(module), expected[merge])


def test_safemerge_peft_factor_has_the_cross_terms() -> None:
    module = make_module(own=2, safety=2)
    (own, safety), alpha = module.factors, 0.8
    merged = SafeMerge(method="safemerge", merge="peft_factor").edit(module)
    cross = (alpha * (1 - alpha)) ** 0.5 * (own.b @ safety.a + safety.b @ own.a)
    assert_same(merged, alpha * own.b @ own.a + (1 - alpha) * safety.b @ safety.a + cross)
    assert isinstance(merged, LowRank) and merged.rank == 2


def test_safemerge_dare_is_unbiased_and_masks_both_apart() -> None:
    module = make_module(d_out=5, d_in=4)
    exact = SafeMerge(method="safemerge").edit(module).dense()
    draws = torch.stack(
        [SafeMerge(method="safemerge", merge="dare", density=0.6, seed=s).edit(module).dense() for s in range(2000)]
    )
    assert module.safety is not None
    # Var = (1 − density)/density · Σ (w_i x_i)², were the two masks independent of each other.
    variance = (0.4 / 0.6) * ((0.8 * dense(module)).square() + (0.2 * module.safety.dense()).square())
    assert bool(((draws.mean(dim=0) - exact).abs() < 5 * (variance / 2000).sqrt()).all())
    torch.testing.assert_close(draws.var(dim=0), variance, rtol=0.2, atol=0.0)


def test_safemerge_ties_by_hand() -> None:
    module = FakeModule(
        delta=Dense(torch.tensor([[4.0, -1.0, 3.0], [0.5, -3.0, 2.0]])),
        v=torch.eye(2, 3),
        safety=Dense(torch.tensor([[2.0, 5.0, -4.0], [0.1, 0.2, 6.0]])),
    )
    merged = SafeMerge(method="safemerge", merge="ties", alpha=0.75, density=0.66).edit(module)
    torch.testing.assert_close(merged.dense(), torch.tensor([[3.5, 5.0, 3.0], [0.0, -3.0, 3.0]]))


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("operator", ["projection", "norm_preserving", "subspace", "delete"])
def test_safe_lora_operators_equal_dense(operator: Any, full: bool) -> None:
    module = make_module(full=full, d_out=16, d_in=9)
    w, v = dense(module).double(), module.v.double()
    u = torch.linalg.svd(v).U[:, :4]
    expected = {
        "projection": v @ v.T / v.norm() @ w,
        "norm_preserving": v @ v.T @ w * w.norm() / (v @ v.T @ w).norm(),
        "subspace": u @ u.T @ w,
        "delete": torch.zeros_like(w),
    }[operator]
    found = SafeLora(method="safe_lora", operator=operator, subspace_directions=4).edit(module)
    assert_same(found, expected)
    if not full:
        assert isinstance(found, LowRank) and found.rank == module.delta.b.shape[1]
        assert operator == "delete" or torch.equal(found.a, module.delta.a)
    if operator == "norm_preserving":
        assert found.norm() == pytest.approx(module.delta.norm(), rel=1e-6)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_safe_lora_norm_preserving_of_what_the_operator_deletes_is_zero(full: bool) -> None:
    b, a, v = torch.zeros(4, 1), torch.ones(1, 3), torch.zeros(4, 3)
    b[0], v[1:] = 1.0, normal(0, 3, 3)
    module = FakeModule(delta=Dense(b @ a) if full else LowRank(b, a), v=v)
    found = SafeLora(method="safe_lora", operator="norm_preserving").edit(module)
    assert torch.equal(found.dense(), torch.zeros(4, 3))


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_resta_and_lox_equal_dense(full: bool) -> None:
    module = make_module(full=full)
    assert module.harmful is not None
    w, v = dense(module).double(), module.v.double()
    u, s, vh = torch.linalg.svd(v, full_matrices=False)
    top = {k: u[:, :k] * s[:k] @ vh[:k] for k in (2, 3)}
    assert_same(Resta(method="resta", gamma=0.4).edit(module), w - 0.4 * module.harmful.dense())
    proxy = Resta(method="resta", gamma=0.4, vector="displacement", vector_directions=3)
    assert_same(proxy.edit(module), w + 0.4 * top[3])
    assert_same(Lox(method="lox", coefficient=0.25, extrapolated_directions=2).edit(module), w + 0.25 * top[2])


def test_resta_without_a_harmful_part_in_the_module_leaves_it() -> None:
    module = make_module(harmful=None)
    assert Resta(method="resta").edit(module) is module.delta


def test_resta_dropped_is_unbiased_and_seeded_by_the_module() -> None:
    module = make_module(d_out=5, d_in=4)
    plain = Resta(method="resta").edit(module).dense()

    def edited(seed: int, name: str = "m") -> torch.Tensor:
        module.name = name
        return Resta(method="resta", drop_rate=0.3, seed=seed).edit(module).dense()

    draws = torch.stack([edited(s) for s in range(2000)])
    standard_error = dense(module).abs() * (0.3 / 0.7 / 2000) ** 0.5
    assert bool(((draws.mean(dim=0) - plain).abs() < 5 * standard_error).all())
    # An entry keeps ΔW/(1 − p) or nothing, beside the safety vector that is never dropped.
    safety = plain - dense(module)
    kept = (draws[0] - safety).abs() > 1e-6
    torch.testing.assert_close(draws[0], torch.where(kept, dense(module) / 0.7, 0.0) + safety)
    assert torch.equal(edited(0), draws[0])
    assert not torch.equal(edited(0, "other"), draws[0])


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_wise_ft_and_revert_scale_everything(full: bool) -> None:
    module = make_module(full=full)
    method = WiseFt(method="wise_ft", alpha=0.25)
    assert_same(method.edit(module), 0.25 * dense(module))
    rest = FakeModule(Dense(torch.tensor([4.0, 8.0])), torch.zeros(2, 2))
    assert torch.equal(method.edit_rest(rest).dense(), torch.tensor([1.0, 2.0]))
    for name in ("revert", "splora"):
        assert METHODS[name].edit(module).norm() == 0.0
    assert torch.equal(METHODS["revert"].edit_rest(rest).dense(), torch.zeros(2))
    for name in METHODS.keys() - {"wise_ft", "revert"}:
        assert METHODS[name].edit_rest(rest) is rest.delta


def csulora_parts(module: FakeModule, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ΔW, and its aligned, partial and other part by dense projectors, float64."""
    w = dense(module).double()
    u, _, vh = torch.linalg.svd(module.v.double(), full_matrices=False)
    p, q = u[:, :k] @ u[:, :k].T, vh[:k].T @ vh[:k]
    aligned, rest = p @ w @ q, (w - p @ w) - (w - p @ w) @ q
    return w, aligned, w - aligned - rest, rest


@settings(deadline=None, max_examples=40)
@given(SIZES, SIZES, st.integers(1, 5), st.integers(1, 8), st.floats(0, 20), SEEDS)
def test_csulora_low_rank_and_dense_routes_equal_the_closed_form(
    d_out: int, d_in: int, own: int, k: int, penalty: float, seed: int
) -> None:
    module = make_module(seed, d_out, d_in, own)
    assume(module.delta.norm() > 1e-2)
    w, aligned, partial, rest = csulora_parts(module, k)
    weights = [penalty * float(x.norm() ** 2 / w.norm() ** 2) for x in (partial, rest)]
    expected = aligned + partial / (1 + weights[0]) + rest / (1 + weights[1])
    method = CsuLora(method="csulora", penalty=penalty, subspace_directions=k)
    found = method.edit(module)
    assert isinstance(found, LowRank) and found.rank == 2 * own
    full = FakeModule(delta=Dense(dense(module)), v=module.v)
    for edited in (found, method.edit(full)):
        assert float((edited.dense() - expected).norm()) <= 2e-5 * float(w.norm())


def test_csulora_is_the_minimiser_of_its_objective() -> None:
    module = make_module()
    w, _, partial, rest = csulora_parts(module, 3)
    weights = [4.0 * float(x.norm() ** 2 / w.norm() ** 2) for x in (partial, rest)]

    def objective(x: torch.Tensor) -> torch.Tensor:
        _, _, x_partial, x_rest = csulora_parts(FakeModule(delta=Dense(x), v=module.v), 3)
        penalties = weights[0] * x_partial.square().sum() + weights[1] * x_rest.square().sum()
        return (x - w).square().sum() + penalties

    double = FakeModule(delta=Dense(w), v=module.v.double())
    found = METHODS["csulora"].edit(double).dense().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(found), found)
    assert float(gradient.norm()) < 1e-10 * float(w.norm())
    before = w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(before), before)
    assert float(gradient.norm()) > 0.1 * float(w.norm())


def test_csulora_no_penalty_or_all_aligned_leaves_the_task_vector() -> None:
    module = make_module()
    assert_same(CsuLora(method="csulora", penalty=0.0).edit(module), dense(module))
    basis = module.displacement(2)
    inside = FakeModule(delta=LowRank(basis.left, basis.right.T), v=module.v)
    assert_same(CsuLora(method="csulora", subspace_directions=2).edit(inside), dense(inside), rel=1e-5)


# -- ranks -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(METHODS)),
    d_out=SIZES,
    d_in=SIZES,
    own=st.integers(0, 8),
    safety=st.none() | st.integers(1, 8),
    harmful=st.none() | st.integers(1, 8),
    max_rank=st.none() | st.integers(1, 4),
    seed=SEEDS,
)
def test_rank_holds_the_edit_and_no_edit_exceeds_it(
    name: str, d_out: int, d_in: int, own: int, safety: int | None, harmful: int | None, max_rank: int | None, seed: int
) -> None:
    assume(own > 0 or METHODS[name].edits_untouched)
    if name == "safemerge peft_factor" and safety is not None:
        safety = own  # it refuses unequal ranks
    module = make_module(seed, d_out, d_in, own, safety, harmful)
    method, ranks = METHODS[name].model_copy(update={"max_rank": max_rank}), ranks_of(module)
    edited = method.edit(module)
    written, _ = truncated(edited, method.written_rank(ranks), module.generator(0))
    assert written.rank <= method.written_rank(ranks) <= method.rank(ranks)
    assert max_rank is None or written.rank <= max_rank
    # Without a limit nothing is lost: what `rank` says is enough for what `edit` makes.
    whole, lost = truncated(edited, method.rank(ranks), module.generator(0))
    if name not in ENTRYWISE:
        size = edited.norm() + module.delta.norm()
        assert lost <= 1e-5 * size
        assert float((whole.dense() - edited.dense()).norm()) <= 1e-5 * size


def test_rank_by_hand() -> None:
    own = {name: method.rank(Ranks(own=4, safety=2, harmful=3, limit=64)) for name, method in METHODS.items()}
    assert own == {
        "safemerge": 6,
        "safemerge peft_factor": 4,
        "safemerge dare": 6,
        "safemerge ties": 6,
        "safe_lora": 4,
        "safe_lora norm_preserving": 4,
        "safe_lora subspace": 4,
        "safe_lora delete": 0,
        "resta": 7,
        "resta dropped": 7,
        "resta displacement": 7,
        "wise_ft": 4,
        "lox": 10,
        "csulora": 8,
        "splora": 0,
        "revert": 0,
    }
    narrow = {name: method.rank(Ranks(own=4, safety=2, harmful=3, limit=5)) for name, method in METHODS.items()}
    assert narrow == {name: min(rank, 5) for name, rank in own.items()}
    limited = SafeMerge(method="safemerge", max_rank=5)
    assert [limited.written_rank(Ranks(own, 2, 0, 64)) for own in (1, 3, 8)] == [3, 5, 5]


# -- what a manifest may say -------------------------------------------------------------------------------------------

ANY: TypeAdapter[RealignMethod] = TypeAdapter(AnyRealignMethod)


@pytest.mark.parametrize("name", METHODS)
def test_method_round_trips_and_refuses_unknown_fields(name: str) -> None:
    method = METHODS[name].model_copy(update={"max_rank": 7})
    again = ANY.validate_json(ANY.dump_json(method))
    assert again == method
    assert type(again) is type(method)
    with pytest.raises(ValidationError, match="strength"):
        ANY.validate_python({**method.model_dump(), "strength": 1.0})
    assert ANY.validate_python({"method": method.model_dump()["method"]}).max_rank is None


@pytest.mark.parametrize(
    "values",
    [
        {"method": "nonsense"},
        {"method": "wise_ft", "alpha": 1.1},
        {"method": "safemerge", "alpha": -0.1},
        {"method": "safemerge", "merge": "linear"},
        {"method": "safemerge", "density": 0.0},
        {"method": "safe_lora", "statistic": "gain"},
        {"method": "safe_lora", "number": 0},
        {"method": "resta", "drop_rate": 1.0},
        {"method": "resta", "gamma": 0.0},
        {"method": "csulora", "penalty": -1.0},
        {"method": "lox", "extrapolated_directions": 0},
        {"method": "revert", "max_rank": 0},
    ],
    ids=str,
)
def test_method_refuses_values_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ANY.validate_python(values)
