from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from pydantic import TypeAdapter, ValidationError

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.noise import noise_key, uniform
from fleet.algebra.sparsify import WHOLE, Piece
from fleet.core.errors import ManifestError
from fleet.fusion import AnyFusionMethod, Breadcrumbs, Dare, Della, FusionMethod, TaskArithmetic, Ties, WeightAverage
from fleet.fusion.place import Place

METHODS = (
    WeightAverage(method="weight_average"),
    TaskArithmetic(method="task_arithmetic"),
    Ties(method="ties"),
    Dare(method="dare"),
    Breadcrumbs(method="breadcrumbs"),
)

HERE = Place("q", 0.5)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fused(method: AnyFusionMethod, deltas: dict[str, Delta], tensor: str = "q", piece: Piece = WHOLE) -> torch.Tensor:
    place = Place(tensor, 0.5)
    return method.fuse(deltas, method.coefficients([*deltas], place), place, piece).dense()


def test_fusion_defaults_are_somfs() -> None:
    read = TypeAdapter(AnyFusionMethod).validate_python
    assert [read({"method": m.method}) for m in METHODS] == list(METHODS)
    ties, dare = METHODS[2], METHODS[3]
    assert isinstance(ties, Ties) and (ties.density, ties.consensus, ties.scale) == (0.2, "sum", 0.4)
    assert isinstance(dare, Dare) and (dare.drop_rate, dare.scale, dare.seed) == (0.2, 0.3, 0)


def test_fusion_identity_tells_of_what_was_made_anew_and_only_then() -> None:
    """A key from before there were revisions stays what it was."""
    plain, again = WeightAverage(method="weight_average"), Breadcrumbs(method="breadcrumbs")
    assert plain.identity() == plain.model_dump(mode="json")
    assert again.identity() == again.model_dump(mode="json") | {"revision": 2}
    learned = Della(method="della").learning_identity()
    assert learned["gradient"] == 2 and "output" not in learned
    assert "gradient" not in plain.learning_identity()


def test_fusion_linear_methods_say_so() -> None:
    assert [m.is_linear for m in METHODS] == [True, True, False, False, False]


def test_fusion_coefficients_by_hand() -> None:
    weights = {"a": 3.0}
    found = [type(m)(**(m.model_dump() | {"weights": weights})).coefficients(["a", "b"], HERE) for m in METHODS]
    assert found[0] == {"a": 0.75, "b": 0.25}
    assert found[1] == pytest.approx({"a": 0.9, "b": 0.3})
    assert found[2] == {"a": 3.0, "b": 1.0}
    assert found[3] == found[4] == {"a": 3.0, "b": 1.0}


@pytest.mark.parametrize("method", METHODS[:2])
def test_fusion_linear_is_the_weighted_sum_and_stays_low_rank(method: AnyFusionMethod) -> None:
    deltas: dict[str, Delta] = {n: LowRank(normal(i, 4, 2), normal(i + 9, 2, 5)) for i, n in enumerate("ab")}
    lam = method.coefficients(["a", "b"], HERE)
    found = method.fuse(deltas, lam, HERE, WHOLE)
    assert isinstance(found, LowRank) and found.rank == 4
    torch.testing.assert_close(found.dense(), lam["a"] * deltas["a"].dense() + lam["b"] * deltas["b"].dense())


@pytest.mark.parametrize("method", METHODS)
def test_fusion_of_zero_task_vectors_is_zero(method: AnyFusionMethod) -> None:
    found = fused(method, {"a": Dense(torch.zeros(3, 4)), "b": Dense(torch.zeros(3, 4))})
    assert torch.equal(found, torch.zeros(3, 4))


@pytest.mark.parametrize("method", METHODS)
def test_fusion_gradient_flows_into_every_model(method: AnyFusionMethod) -> None:
    dense, b, a = (t.requires_grad_() for t in (normal(0, 6, 5), normal(1, 6, 2), normal(2, 2, 5)))
    fused(method, {"one": Dense(dense), "two": LowRank(b, a)}).square().sum().backward()
    for tensor in (dense, b, a):
        assert tensor.grad is not None and bool(tensor.grad.any())


@pytest.mark.parametrize("method", METHODS)
def test_fusion_over_a_model_that_leaves_the_tensor_alone_keeps_the_others_coefficients(
    method: AnyFusionMethod,
) -> None:
    """λ is over the variant's models, so a model without a task vector here counts as zero."""
    delta = Dense(normal(0, 6, 5))
    weights = method.coefficients(["a", "b"], HERE)
    alone = method.fuse({"a": delta}, weights, HERE, WHOLE).dense()
    beside = method.fuse({"a": delta, "b": Dense(torch.zeros(6, 5))}, weights, HERE, WHOLE).dense()
    torch.testing.assert_close(alone, beside)


# -- TIES ------------------------------------------------------------------------------------------------------------

ONE, TWO = torch.tensor([[4.0, -1.0, 3.0], [0.5, -3.0, 2.0]]), torch.tensor([[2.0, 5.0, -4.0], [0.1, 0.2, 6.0]])


def test_ties_fuse_by_hand_sums_what_agrees_and_scales() -> None:
    method = Ties(method="ties", density=0.66, scale=0.5, weights={"a": 3.0})
    # Four of six stay; weighted sums 12 + 2, 5, 9 − 4, 0, −9, 6 + 6, and of the third the first model's sign wins.
    expected = 0.5 * torch.tensor([[14.0, 5.0, 9.0], [0.0, -9.0, 12.0]])
    torch.testing.assert_close(fused(method, {"a": Dense(ONE), "b": Dense(TWO)}), expected)


def test_ties_fuse_by_hand_averages_what_agrees() -> None:
    method = Ties(method="ties", density=0.66, consensus="mean", scale=1.0, weights={"a": 3.0})
    expected = torch.tensor([[14.0 / 4, 5.0, 3.0], [0.0, -3.0, 12.0 / 4]])
    torch.testing.assert_close(fused(method, {"a": Dense(ONE), "b": Dense(TWO)}), expected)


def test_ties_weights_go_with_their_models_whatever_the_order() -> None:
    method = Ties(method="ties", density=0.66, weights={"a": 3.0})
    found = fused(method, {"b": Dense(TWO), "a": Dense(ONE)})
    torch.testing.assert_close(found, fused(method, {"a": Dense(ONE), "b": Dense(TWO)}))


# -- by model -------------------------------------------------------------------------------------------------------

ROW: dict[str, Delta] = {n: Dense(torch.tensor([[8.0, 4.0, -2.0, 1.0]])) for n in "abc"}


def alone(method: AnyFusionMethod, model: str, place: Place = HERE) -> list[float]:
    """What stays of one of three models."""
    weights = {m: float(m == model) for m in ROW}
    return method.fuse(ROW, weights, place, WHOLE).dense().flatten().tolist()


def test_ties_density_by_model_by_hand() -> None:
    method = Ties(method="ties", density={"a": 0.25, "b": (1.0, 0.0001)}, consensus="none", scale=1.0)
    assert alone(method, "a") == [8.0, 0.0, 0.0, 0.0]
    assert alone(method, "b") == [8.0, 4.0, 0.0, 0.0]
    assert alone(method, "b", Place("q", 1.0)) == [8.0, 0.0, 0.0, 0.0]
    assert alone(method, "c") == [8.0, 4.0, -2.0, 1.0]


def test_breadcrumbs_density_by_model_by_hand_and_what_is_to_stay_comes_before_outliers() -> None:
    method = Breadcrumbs(method="breadcrumbs", density={"a": 0.5, "b": 0.75}, outliers=0.5)
    assert alone(method, "a") == [0.0, 0.0, -2.0, 1.0]
    assert alone(method, "b") == [0.0, 4.0, -2.0, 1.0]
    assert alone(method, "c") == [8.0, 4.0, -2.0, 1.0]
    few = Breadcrumbs(method="breadcrumbs", density=0.25, outliers=0.25)
    assert alone(few, "a") == [0.0, 4.0, 0.0, 0.0]


def test_breadcrumbs_of_128_equal_entries_keeps_them() -> None:
    """115 are asked for, and at most one may be left out above: entries of equal magnitude go together."""
    value = torch.full((128,), 0.5) * torch.tensor([1.0, -1.0]).repeat(64)
    assert torch.equal(fused(Breadcrumbs(method="breadcrumbs"), {"a": Dense(value)}), value)


def test_breadcrumbs_leaves_tied_entries_in_from_both_sides_by_hand() -> None:
    value = torch.tensor([4.0, -3.0, 3.0, 2.0, 2.0, 2.0, -1.0, 1.0, 0.0, 0.0])
    method = Breadcrumbs(method="breadcrumbs", density=0.3, outliers=0.2)
    # Ranks 3 to 5 are to stay, from 3 down to 2. Of the largest two, one is tied with the third.
    expected = torch.tensor([0.0, -3.0, 3.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    assert torch.equal(fused(method, {"a": Dense(value)}), expected)


@pytest.mark.parametrize(("method", "kept"), [("ties", [-8.0, 4.0, 0.0, 0.0]), ("breadcrumbs", [0.0, 4.0, -2.0, 0.0])])
def test_trims_that_rescale_keep_the_norm_by_hand(method: str, kept: list[float]) -> None:
    """The L1 norm is 15; of zeros nothing stays that could have it."""
    given = {"method": method, "density": 0.5, "consensus": "none", "scale": 2.0, "rescale": True}
    fusion = TypeAdapter(AnyFusionMethod).validate_python(
        given | ({"outliers": 0.25} if method == "breadcrumbs" else {})
    )
    found = fused(fusion, {"a": Dense(torch.tensor([-8.0, 4.0, -2.0, 1.0]))})
    torch.testing.assert_close(found, 2.0 * torch.tensor(kept) * 15.0 / torch.tensor(kept).abs().sum())
    assert torch.equal(fused(fusion, {"a": Dense(torch.zeros(4))}), torch.zeros(4))


@pytest.mark.parametrize(("method", "rate"), [("dare", {"drop_rate": 0.5}), ("della", {"density": 0.5})])
def test_drops_that_dont_rescale_leave_what_stays_as_it_is(method: str, rate: dict[str, float]) -> None:
    read = TypeAdapter(AnyFusionMethod).validate_python
    value = normal(3, 8, 5)
    common = {"method": method, "scale": 1.0, "consensus": "none", **rate}
    rescaled, plain = (fused(read(common | changes), {"a": Dense(value)}) for changes in ({}, {"rescale": False}))
    assert torch.equal(plain != 0.0, rescaled != 0.0)
    assert torch.equal(plain, torch.where(plain != 0.0, value, 0.0)) and not torch.equal(plain, rescaled)


def test_ties_of_whole_models_that_rescale_is_refused() -> None:
    with pytest.raises(ValueError, match="undoes a trim of whole models"):
        Ties(method="ties", trim="model", rescale=True)


def test_options_left_at_their_defaults_are_in_no_identity() -> None:
    """They are newer than stored results, whose keys stay."""
    read = TypeAdapter(AnyFusionMethod).validate_python
    newer = {"rescale", "filter_wise", "normalize_weights"}
    for name in ("ties", "dare", "della", "breadcrumbs", "model_stock", "multi_slerp"):
        assert not newer & read({"method": name}).identity().keys()
    assert read({"method": "ties", "rescale": True}).identity()["rescale"] is True
    assert read({"method": "dare", "rescale": False}).identity()["rescale"] is False


@pytest.mark.parametrize(
    "method",
    [
        Ties(method="ties", density=0.5, consensus="none", scale=1.0),
        Breadcrumbs(method="breadcrumbs", density=0.25, outliers=0.25),
    ],
)
def test_trims_of_float64_keep_the_entry_at_the_threshold(method: AnyFusionMethod) -> None:
    """A threshold is float32: that of 0.1 is larger than it, that of 0.3 larger, and that of 0.7 smaller."""
    value = torch.tensor([0.7, 0.1, 0.3, 0.05], dtype=torch.float64)
    kept = value > 0.2 if isinstance(method, Ties) else value == 0.3
    assert torch.equal(fused(method, {"a": Dense(value)}) != 0.0, kept)


FEW_MAGNITUDES = st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0, 3.0]), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(FEW_MAGNITUDES, st.floats(0.001, 1.0), st.floats(0.0, 0.99))
def test_breadcrumbs_counts_hold_however_many_entries_tie(values: list[float], density: float, share: float) -> None:
    value = torch.tensor(values)
    found = fused(Breadcrumbs(method="breadcrumbs", density=density, outliers=share), {"a": Dense(value)})
    zeros = int((value == 0.0).sum())
    assert int((found != 0.0).sum()) + zeros >= max(round(density * len(values)), 1)
    largest = float(found.abs().max())
    above = int((value.abs() > largest).sum()) if largest else 0
    assert above <= round(share * len(values))
    assert bool(((found == value) | (found == 0.0)).all())


@pytest.mark.parametrize("density", [1e-6, 1.0])
@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.0, 0.0, 0.0], [0.0, -1.0]])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_trims_keep_the_largest_entry_of_the_smallest_tensor(method: str, values: list[float], density: float) -> None:
    given = {"method": method, "density": density, "consensus": "none", "scale": 1.0}
    found = fused(TypeAdapter(AnyFusionMethod).validate_python(given), {"a": Dense(torch.tensor(values))})
    assert torch.equal(found, torch.tensor(values))


def test_dare_drop_rate_by_model_and_by_place_is_that_of_one_rate() -> None:
    rules = [{"filter": "mlp", "value": 0.9}, {"value": [0.2, 0.6]}]
    method = Dare.model_validate({"method": "dare", "drop_rate": {"a": 0.7, "b": rules}})
    for model, place, rate in (("a", HERE, 0.7), ("b", HERE, 0.4), ("b", Place("mlp", 1.0), 0.9), ("c", HERE, 0.0)):
        assert alone(method, model, place) == pytest.approx(alone(Dare(method="dare", drop_rate=rate), model, place))


@pytest.mark.parametrize(
    ("method", "field", "given", "message"),
    [
        ("ties", "density", 1.5, r"density\.for_all\n.*1\.5 is no share of a task vector's entries: over 0, at most 1"),
        ("ties", "density", {"a": 0.5, "b": [0.5, 0]}, r"density\.by_model\.b\n.* 0 is no share"),
        ("breadcrumbs", "density", {"a": [{"value": 2}]}, r"density\.by_model\.a\n.* 2 is no share"),
        ("della", "density", {"a": -1}, r"density\.by_model\.a\n.* -1 is no share"),
        ("della", "density", {"a": 0.5, "b": 0.9}, r"for densities from 0\.5 to 0\.9 and an epsilon of 0\.15"),
        ("dare", "drop_rate", 1, r"drop_rate\.for_all\n.* 1 is no drop rate: 0 or more, under 1"),
        ("dare", "drop_rate", {"a": 0, "b": [0, 1]}, r"drop_rate\.by_model\.b\n.* 1 is no drop rate"),
    ],
)
def test_shares_outside_their_range_are_refused_by_name(method: str, field: str, given: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(AnyFusionMethod).validate_python({"method": method, field: given})


@pytest.mark.parametrize(("kind", "field"), [(Ties, "density"), (Breadcrumbs, "density"), (Dare, "drop_rate")])
def test_shares_of_a_model_that_takes_no_part_are_refused(kind: type[FusionMethod], field: str) -> None:
    method = kind.model_validate({"method": kind.__name__.lower(), field: {"a": 0.5, "d": 0.5}})
    with pytest.raises(ManifestError, match=f"fuse.{field} names d, not among the variant's models: a, b, c"):
        method.coefficients([*"abc"], HERE)
    assert method.coefficients([*"abd"], HERE) == {"a": 1.0, "b": 1.0, "d": 1.0}
    assert kind.model_validate_json(method.model_dump_json()) == method


def test_ties_of_whole_models_with_a_schedule_refused() -> None:
    Ties.model_validate({"method": "ties", "trim": "model", "density": {"a": 0.3}})
    with pytest.raises(ValueError, match="trimmed as a whole has one density"):
        Ties.model_validate({"method": "ties", "trim": "model", "density": [0.2, 0.5]})


# -- DARE ------------------------------------------------------------------------------------------------------------

ALL = Dense(torch.ones(30, 20))


def kept_by(method: Dare, model: str = "a", tensor: str = "q") -> torch.Tensor:
    return fused(method, {model: ALL}, tensor) != 0.0


def test_dare_drops_by_seed_model_and_tensor_alone() -> None:
    method = Dare(method="dare", drop_rate=0.5)
    mask = kept_by(method)
    assert torch.equal(mask, kept_by(method))
    assert torch.equal(mask, kept_by(Dare(method="dare", drop_rate=0.5, scale=2.0)))
    for other in (
        kept_by(Dare(method="dare", drop_rate=0.5, seed=1)),
        kept_by(method, model="b"),
        kept_by(method, tensor="k"),
    ):
        # Two masks that know nothing of each other agree on half; four standard errors over 600 are 0.082.
        assert float((mask == other).float().mean()) == pytest.approx(0.5, abs=0.082)


def test_dare_another_model_changes_nothing_of_the_first() -> None:
    method = Dare(method="dare", drop_rate=0.5)
    both = fused(method, {"a": ALL, "b": Dense(torch.full((30, 20), 10.0))})
    alone = [fused(method, {n: Dense(torch.full((30, 20), v))}) for n, v in (("a", 1.0), ("b", 10.0))]
    torch.testing.assert_close(both, alone[0] + alone[1])


def test_dare_a_higher_rate_drops_more_of_the_same() -> None:
    few, many = (kept_by(Dare(method="dare", drop_rate=p)) for p in (0.2, 0.6))
    assert bool((few | ~many).all()) and int(few.sum()) > int(many.sum())


@pytest.mark.parametrize("delta", [Dense(normal(0, 9, 7)), LowRank(normal(1, 9, 2), normal(2, 2, 7))])
def test_dare_of_a_piece_is_the_wholes_rows(delta: Delta) -> None:
    method = Dare(method="dare", drop_rate=0.4)
    whole = fused(method, {"a": delta})
    for rows in (slice(0, 4), slice(4, 9)):
        cut = LowRank(delta.b[rows], delta.a) if isinstance(delta, LowRank) else Dense(delta.value[rows])
        found = fused(method, {"a": cut}, piece=Piece(rows.start * 7, WHOLE.total))
        torch.testing.assert_close(found, whole[rows])


def test_dare_is_the_formula_on_the_noise_of_its_key() -> None:
    delta = normal(0, 8, 6)
    keep = uniform(noise_key(3, "a", "q"), 0, 48).view(8, 6) >= 0.4
    found = fused(Dare(method="dare", drop_rate=0.4, scale=0.5, seed=3), {"a": Dense(delta)})
    torch.testing.assert_close(found, 0.5 * delta * keep / 0.6)


def test_dare_without_drops_is_task_arithmetic() -> None:
    deltas: dict[str, Delta] = {n: Dense(normal(i, 5, 4)) for i, n in enumerate("ab")}
    one, two = Dare(method="dare", drop_rate=0.0), TaskArithmetic(method="task_arithmetic")
    torch.testing.assert_close(fused(one, deltas), fused(two, deltas))


def test_dare_mean_over_seeds_is_the_scaled_sum() -> None:
    deltas: dict[str, Delta] = {n: Dense(normal(i, 5, 4)) for i, n in enumerate("ab")}
    seeds = 1500
    draws = torch.stack([fused(Dare(method="dare", drop_rate=0.3, seed=s), deltas) for s in range(seeds)])
    wanted = 0.3 * (deltas["a"].dense() + deltas["b"].dense())
    variance = 0.09 * 0.3 / 0.7 * (deltas["a"].dense().square() + deltas["b"].dense().square())
    assert bool(((draws.mean(dim=0) - wanted).abs() < 5 * (variance / seeds).sqrt()).all())
    torch.testing.assert_close(draws.var(dim=0), variance, rtol=0.25, atol=0.0)
