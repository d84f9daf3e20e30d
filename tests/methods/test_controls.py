from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from pydantic import TypeAdapter, ValidationError

from fleet.algebra.delta import Delta, Dense, LowRank, zero
from fleet.algebra.random_edits import gaussian_like, named_generator, random_frame, turned
from fleet.algebra.spectral import truncated
from fleet.methods import (
    AnyRealignMethod,
    Control,
    Noise,
    RandomModules,
    RandomSubspace,
    Ranks,
    RealignMethod,
    UniformScaling,
    WiseFt,
)
from fleet.methods.controls import Edit
from tests.methods.test_methods import (
    ENTRYWISE,
    METHODS,
    SEEDS,
    SIZES,
    UNDEFINED,
    FakeModule,
    assert_same,
    lora,
    make_module,
    ranks_of,
    statistics,
)

ANY: TypeAdapter[RealignMethod] = TypeAdapter(AnyRealignMethod)
KINDS: dict[str, type[Control]] = {
    "uniform_scaling": UniformScaling,
    "random_modules": RandomModules,
    "random_subspace": RandomSubspace,
    "noise": Noise,
}


def control(kind: str, of: RealignMethod, **options: Any) -> Control:
    return KINDS[kind].model_validate({"method": kind, "of": of.model_dump(), **options})


def written(method: RealignMethod, module: FakeModule) -> Delta:
    """What the realign step writes: a LoRA of the method's rank, or the edit of a full fine-tune as it is."""
    edited = method.edit(module)
    if isinstance(module.delta, Dense):
        return edited
    return truncated(edited, method.written_rank(ranks_of(module)), module.generator(0))[0]


def edit_norm(method: RealignMethod, module: FakeModule) -> float:
    return float((written(method, module).dense() - module.delta.dense()).norm())


# -- the size of a control's edit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_control_edit_has_exactly_the_methods_norm(kind: str, name: str, full: bool) -> None:
    if full and METHODS[name].adapters_only:
        return
    module = make_module(own=2, d_out=14, d_in=11, full=full)
    target = edit_norm(METHODS[name], module)
    assert target > 0.0
    matched = control(kind, METHODS[name])
    assert edit_norm(matched, replace(module, target_norm=target)) == pytest.approx(target, rel=1e-4)
    # A target of another module, as `random_modules` has them.
    assert edit_norm(matched, replace(module, target_norm=0.37)) == pytest.approx(0.37, rel=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    name=st.sampled_from(sorted(METHODS)),
    d_out=st.integers(2, 12),
    d_in=st.integers(2, 12),
    own=st.integers(1, 8),
    max_rank=st.none() | st.integers(1, 4),
    seed=SEEDS,
)
def test_control_rank_holds_its_edit(
    kind: str, name: str, d_out: int, d_in: int, own: int, max_rank: int | None, seed: int
) -> None:
    module = make_module(seed, d_out, d_in, own, safety=own, target_norm=0.5)
    method = control(kind, METHODS[name].model_copy(update={"max_rank": max_rank}))
    edited, ranks = method.edit(module), ranks_of(module)
    assert method.written_rank(ranks) == method.rank(ranks) <= ranks.limit or kind == "uniform_scaling"
    kept, lost = truncated(edited, method.written_rank(ranks), module.generator(0))
    assert kept.rank <= method.written_rank(ranks)
    assert lost <= 1e-5 * (edited.norm() + module.delta.norm())


@pytest.mark.parametrize("name", ENTRYWISE)
@pytest.mark.parametrize("kind", ["random_modules", "random_subspace"])
def test_control_of_an_entrywise_method_takes_over_its_edit_as_written(kind: str, name: str) -> None:
    module = make_module(own=2, d_out=14, d_in=11)
    edit = written(METHODS[name], module).minus(module.delta)
    module.target_norm = edit.norm()
    found = control(kind, METHODS[name]).edit(module).minus(module.delta)
    ranks = torch.linalg.svdvals(edit.dense()), torch.linalg.svdvals(found.dense())
    torch.testing.assert_close(ranks[1], ranks[0], rtol=1e-4, atol=1e-5)


def test_control_of_a_limited_method_takes_over_its_edit_as_written() -> None:
    module = make_module(own=2, d_out=14, d_in=11)
    of = METHODS["lox"].model_copy(update={"max_rank": 3})
    expected = written(of, module)
    module.target_norm = expected.minus(module.delta).norm()
    assert_same(control("random_modules", of).edit(module), expected.dense(), rel=1e-5)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["random_modules", "random_subspace"])
def test_control_where_the_method_changes_nothing_leaves_the_module(kind: str, full: bool) -> None:
    """ΔW − ΔW is rounding, and has no direction to take to the target's norm."""
    module = make_module(harmful=None, full=full, target_norm=1.0)
    assert_same(control(kind, METHODS["resta"]).edit(module), module.delta.dense(), rel=1e-5)


# -- uniform scaling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["safemerge", "lox", "revert"])
def test_uniform_scaling_total_norm_is_the_methods(name: str) -> None:
    modules = {f"m{i}": make_module(seed=10 * i, own=i + 1) for i in range(4)}
    rows = [statistics(m, delta_norm=x.delta.norm()) for m, x in modules.items()]
    norms = {m: edit_norm(METHODS[name], x) for m, x in modules.items() if m != "m2"}  # m2 was kept
    matched = control("uniform_scaling", METHODS[name])
    targets = matched.targets(rows, norms)
    assert set(targets) == set(modules)
    edits = [edit_norm(matched, replace(x, target_norm=targets[m])) for m, x in modules.items()]
    assert sum(e**2 for e in edits) == pytest.approx(sum(n**2 for n in norms.values()), rel=1e-5)
    shares = [t / modules[m].delta.norm() for m, t in targets.items()]
    assert shares == pytest.approx([shares[0]] * 4)


def test_uniform_scaling_by_hand_overshoots_beyond_the_whole_task_vector() -> None:
    rows = [statistics("a", delta_norm=3.0), statistics("b", delta_norm=4.0), statistics("c", delta_norm=0.0)]
    matched = control("uniform_scaling", METHODS["lox"])
    assert matched.targets(rows, {"a": 6.0, "c": 8.0}) == {"a": pytest.approx(6.0), "b": pytest.approx(8.0)}
    module = FakeModule(delta=LowRank(torch.tensor([[3.0]]), torch.ones(1, 1)), v=torch.ones(1, 1), target_norm=6.0)
    assert_same(matched.edit(module), torch.tensor([[-3.0]]))
    assert matched.targets([statistics("c", delta_norm=0.0)], {"c": 8.0}) == {}


# -- random modules --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.data(), st.integers(0, 1000))
def test_random_modules_targets_are_the_norms_in_another_order(count: int, data: st.DataObject, seed: int) -> None:
    rows = [statistics(f"m{i}") for i in range(count)]
    edited = data.draw(st.integers(0, count))
    norms = {f"m{i}": float(i + 1) for i in range(edited)}
    matched = control("random_modules", METHODS["safemerge"], seed=seed)
    targets = matched.targets(rows, norms)
    assert sorted(targets.values()) == sorted(norms.values())
    assert set(targets) <= {row.module for row in rows}
    # Neither the order of the rows nor that of the norms is part of the draw.
    assert matched.targets(rows[::-1], dict(reversed(norms.items()))) == targets


def test_random_modules_draw_depends_on_the_seed_and_covers_all() -> None:
    rows = [statistics(f"m{i}") for i in range(8)]
    draws = [
        control("random_modules", METHODS["safemerge"], seed=s).targets(rows, {"m0": 1.0, "m1": 2.0}) for s in range(60)
    ]
    assert {name for targets in draws for name in targets} == {row.module for row in rows}
    assert len({tuple(targets.items()) for targets in draws}) > 30


def test_random_modules_are_drawn_where_the_method_can_edit() -> None:
    rows = [
        statistics("a"),
        statistics("b"),
        statistics("untouched", delta_norm=0.0, **UNDEFINED),
        statistics("V vanishes", safety_norm=0.0, **UNDEFINED),
    ]
    names = {
        name
        for s in range(30)
        for name in control("random_modules", METHODS["safe_lora"], seed=s).targets(rows, {"a": 1.0})
    }
    assert names == {"a", "b"}
    # RESTA edits every module it has a vector for, touched or not: these are all there is to draw from.
    everywhere = control("random_modules", METHODS["resta"]).targets(rows, {"a": 1.0, "untouched": 2.0, "b": 0.0})
    assert set(everywhere) == {"a", "untouched"}
    # A method that needs no V edits where V vanishes too; where it changed nothing there is no edit to take over.
    norms = {"a": 3.0, "b": 2.0, "untouched": 0.0, "V vanishes": 1.0}
    scaled = control("random_modules", METHODS["wise_ft"]).targets(rows, norms)
    assert sorted(scaled) == ["V vanishes", "a", "b"]
    assert sorted(scaled.values()) == [1.0, 2.0, 3.0]


def test_random_modules_edit_is_the_methods_at_the_targets_norm() -> None:
    module = make_module()
    edit = METHODS["safe_lora subspace"].edit(module).dense() - module.delta.dense()
    module.target_norm = 2.5
    found = control("random_modules", METHODS["safe_lora subspace"]).edit(module)
    assert_same(found, module.delta.dense() + 2.5 * edit / edit.norm(), rel=1e-5)


# -- random subspace and noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["safemerge", "safe_lora", "csulora", "lox"])
def test_random_subspace_keeps_spectrum_and_input_and_turns_the_output(name: str, full: bool) -> None:
    module = make_module(d_out=40, d_in=11, own=2, full=full)
    edit = METHODS[name].edit(module).dense() - module.delta.dense()
    module.target_norm = float(edit.norm())

    def found(seed: int) -> torch.Tensor:
        return control("random_subspace", METHODS[name], seed=seed).edit(module).dense() - module.delta.dense()

    assert_same(torch.linalg.svdvals(found(0)), torch.linalg.svdvals(edit), rel=1e-5)
    assert_same(found(0).T @ found(0), edit.T @ edit, rel=1e-5)  # the same right singular vectors
    assert_same(found(0), found(0), rel=0.0)
    assert float((found(0) - found(1)).norm()) > 0.5 * float(edit.norm())
    assert abs(float((found(0) * edit).sum())) < 0.6 * float(edit.norm() ** 2)


@settings(deadline=None, max_examples=40)
@given(SIZES, SIZES, st.integers(1, 15), SEEDS)
def test_turned_has_the_gram_of_what_it_turned(d_out: int, d_in: int, rank: int, seed: int) -> None:
    delta = lora(seed, d_out, d_in, rank)
    w = delta.dense()
    for kind in (delta, Dense(w)):
        found = turned(kind, named_generator(seed, "m"))
        assert type(found) is type(kind)
        assert found.shape == w.shape
        assert_same(found.dense().T @ found.dense(), w.T @ w, rel=1e-4)


def test_turned_column_space_is_uniform_on_both_routes() -> None:
    """Every output coordinate holds the same share of the energy on average, and no sign is preferred."""
    delta = lora(0, 5, 4, 2)
    for kind in (delta, Dense(delta.dense())):
        draws = torch.stack([turned(kind, named_generator(s, "m")).dense() for s in range(1500)])
        shares = draws.square().sum(dim=2) / delta.norm() ** 2
        assert shares.mean(dim=0).tolist() == pytest.approx([0.2] * 5, abs=0.03)
        assert float(draws.mean(dim=0).abs().max()) < 0.15 * delta.norm()


def test_random_frame_is_orthonormal_and_without_preferred_signs() -> None:
    frame = random_frame(9, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(frame.T @ frame, torch.eye(4))
    firsts = [float(random_frame(2, 2, torch.Generator().manual_seed(s))[0, 0]) for s in range(400)]
    assert sum(first > 0 for first in firsts) == pytest.approx(200, abs=50)


def test_gaussian_like_has_the_models_own_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    for delta, rank in ((lora(0, 9, 8, 3), 3), (zero((9, 8)), 1)):
        found = gaussian_like(delta, generator)
        assert isinstance(found, LowRank) and found.rank == rank and found.shape == (9, 8)
        assert int(torch.linalg.matrix_rank(found.dense())) == rank
    full = gaussian_like(Dense(torch.zeros(60, 50)), generator)
    assert isinstance(full, Dense)
    assert float(full.value.std()) == pytest.approx(1.0, abs=0.06)
    assert int(torch.linalg.matrix_rank(full.value)) == 50


@pytest.mark.parametrize("own", [0, 3])
def test_noise_is_seeded_and_has_the_models_own_rank(own: int) -> None:
    module = make_module(own=own, target_norm=2.0)
    module.delta = module.delta if own else zero((12, 10))

    def noise(seed: int) -> torch.Tensor:
        return control("noise", METHODS["resta"], seed=seed).edit(module).dense() - module.delta.dense()

    assert torch.equal(noise(0), noise(0))
    assert float((noise(0) - noise(1)).norm()) > 1.0
    assert int(torch.linalg.matrix_rank(noise(0), rtol=1e-4)) == max(own, 1)
    assert float(noise(0).norm()) == pytest.approx(2.0, rel=1e-5)


# -- what it takes over from the method, and its parameters ----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_control_needs_what_its_method_needs(kind: str, name: str) -> None:
    of, matched = METHODS[name], control(kind, METHODS[name])
    assert (matched.needs, matched.directions) == (of.needs, of.directions)
    assert (matched.adapters_only, matched.edits_untouched) == (of.adapters_only, of.edits_untouched)


def test_control_decisions_follow_from_its_targets() -> None:
    decisions = control("noise", METHODS["safemerge"]).decide_targets(
        [statistics("a"), statistics("b")], {"b": 0.12345678}
    )
    assert [(d.module, d.edit, d.reason) for d in decisions] == [
        ("a", False, "control: not edited"),
        ("b", True, "control: an edit of norm 0.1235"),
    ]
    for kind in ("random_subspace", "noise"):
        assert control(kind, METHODS["safemerge"]).targets([statistics("a")], {"b": 2.0}) == {"b": 2.0}


@pytest.mark.parametrize("kind", KINDS)
def test_control_of_a_decision_within_rounding_says_so(kind: str) -> None:
    """Of a method's decision for one module, where its edits are copied one by one, and else for all."""
    modules = [statistics("a", lift=1.0 + 1e-6), statistics("b", lift=0.5), statistics("c", lift=3.0)]
    matched = control(kind, METHODS["safemerge"])
    close = {"a"} if kind in ("random_subspace", "noise") else {"a", "b", "c"}
    decisions = matched.decide_targets(modules, {"b": 1.0})
    assert {d.module for d in decisions if d.close} == close == set(matched.close_modules(modules))
    assert decisions[0].reason == "control: not edited; within rounding of the cut"
    assert (matched.warning(modules, {"b"}) or "").startswith(f"{len(close)} of 3 modules lie within rounding")
    assert not matched.close_modules(modules[1:]) and matched.warning(modules[1:], {"b"}) is None


def ranks_by_kind(of: RealignMethod, ranks: Ranks) -> Sequence[int]:
    return [control(kind, of).rank(ranks) for kind in KINDS]


def test_control_ranks_by_hand() -> None:
    # Of SafeMERGE, whose edits are of rank 4 + 2: ΔW scaled; + the edit; + ΔW and the merge, turned; + noise of rank 4.
    assert ranks_by_kind(METHODS["safemerge"], Ranks(4, 2, 0, 64)) == [4, 10, 14, 8]
    assert ranks_by_kind(METHODS["revert"], Ranks(4, 2, 0, 64)) == [4, 4, 8, 8]
    assert ranks_by_kind(METHODS["lox"], Ranks(0, 0, 0, 64)) == [0, 6, 6, 1]
    assert ranks_by_kind(METHODS["safemerge"], Ranks(4, 2, 0, 5)) == [4, 5, 5, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_control_with_a_rank_of_its_own_is_refused(kind: str) -> None:
    """It would cut the edit, and with it the norm that has to match."""
    with pytest.raises(ValidationError, match="set it in `of`"):
        control(kind, METHODS["safemerge"], max_rank=5)


@pytest.mark.parametrize("kind", KINDS)
def test_control_round_trips_with_the_method_in_it(kind: str) -> None:
    for of in METHODS.values():
        matched = control(kind, of, seed=3)
        again = ANY.validate_json(ANY.dump_json(matched))
        assert again == matched
        assert isinstance(again, KINDS[kind])
        assert again.of == of
        assert type(again.of) is type(of)
    with pytest.raises(ValidationError, match="strength"):
        ANY.validate_python({"method": kind, "of": {"method": "wise_ft"}, "strength": 1})
    with pytest.raises(ValidationError, match="strength"):
        ANY.validate_python({"method": kind, "of": {"method": "wise_ft", "strength": 1}})
    with pytest.raises(ValidationError):
        ANY.validate_python({"method": kind})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", KINDS)
def test_control_of_a_control_is_refused(kind: str, inner: str) -> None:
    nested = {"method": kind, "of": {"method": inner, "of": {"method": "wise_ft"}}}
    with pytest.raises(ValidationError, match="of"):
        ANY.validate_python(nested)
    # The same one level less is fine.
    assert ANY.validate_python(nested["of"]) == control(inner, WiseFt(method="wise_ft"))


def test_edit_is_every_method_that_is_no_control() -> None:
    tags = {type(method) for method in METHODS.values()}
    assert {type(TypeAdapter(Edit).validate_python(m.model_dump())) for m in METHODS.values()} == tags
