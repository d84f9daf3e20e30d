"""NuSLERP and NearSwap, which fuse two models."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.sparsify import WHOLE
from fleet.core.errors import ManifestError
from fleet.fusion import AnyFusionMethod, NearSwap, NuSlerp, Slerp
from fleet.fusion.place import Place

PLACE = Place("model.layers.1.q.weight", 0.5)
VECTORS: tuple[Literal["tensor", "rows", "columns"], ...] = ("tensor", "rows", "columns")


def of(*values: object) -> dict[str, Delta]:
    return {f"m{i}": Dense(torch.tensor(value)) for i, value in enumerate(values)}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fused(method: AnyFusionMethod, deltas: dict[str, Delta], models: tuple[str, ...] = ("m0", "m1")) -> torch.Tensor:
    return method.fuse(deltas, method.coefficients(models, PLACE), PLACE, WHOLE).dense()


@pytest.mark.parametrize("method", [NuSlerp(method="nuslerp", vectors="rows"), NearSwap(method="nearswap", t=0.5)])
def test_methods_of_two_are_read_by_their_names(method: AnyFusionMethod) -> None:
    assert TypeAdapter(AnyFusionMethod).validate_json(method.model_dump_json()) == method
    assert not method.is_linear


# -- NuSLERP ---------------------------------------------------------------------------------------------------------


def test_nuslerp_by_hand_of_orthogonal_tensors() -> None:
    method = NuSlerp(method="nuslerp", weights={"m0": 2.0})
    # t = 1/3: sin 60° of the first, sin 30° of the second.
    torch.testing.assert_close(fused(method, of([2.0, 0.0], [0.0, 4.0])), torch.tensor([math.sqrt(3.0), 2.0]))


def test_nuslerp_by_hand_of_rows_and_of_columns() -> None:
    one, two = [[2.0, 0.0], [1.0, 1.0]], [[0.0, 4.0], [3.0, 3.0]]
    half = math.sqrt(0.5)
    # The first rows are orthogonal, the second ones parallel.
    rows = torch.tensor([[2.0 * half, 4.0 * half], [2.0, 2.0]])
    torch.testing.assert_close(fused(NuSlerp(method="nuslerp", vectors="rows"), of(one, two)), rows)
    turned = of(*(torch.tensor(v).T.tolist() for v in (one, two)))
    torch.testing.assert_close(fused(NuSlerp(method="nuslerp", vectors="columns"), turned), rows.T)


def test_nuslerp_of_a_zero_vector_turns_from_it_by_a_right_angle() -> None:
    found = fused(NuSlerp(method="nuslerp"), of([3.0, 4.0], [0.0, 0.0]))
    torch.testing.assert_close(found, math.sqrt(0.5) * torch.tensor([3.0, 4.0]))
    absent = fused(NuSlerp(method="nuslerp"), of([3.0, 4.0]))
    assert torch.equal(absent, found)


def test_nuslerp_of_nearly_parallel_tensors_is_still_an_arc() -> None:
    """Where SLERP's is a straight line: both ends are as long as the middle."""
    angle = 0.02
    deltas = of([1.0, 0.0], [math.cos(angle), math.sin(angle)])
    assert float(fused(NuSlerp(method="nuslerp"), deltas).norm()) == pytest.approx(1.0, abs=1e-6)
    straight = math.cos(angle / 2.0)
    assert float(fused(Slerp(method="slerp"), deltas).norm()) == pytest.approx(straight, abs=1e-6)


@pytest.mark.parametrize("vectors", VECTORS)
def test_nuslerp_of_loras_is_that_of_their_products(vectors: Literal["tensor", "rows", "columns"]) -> None:
    method = NuSlerp(method="nuslerp", vectors=vectors, weights={"m1": 3.0})
    loras: dict[str, Delta] = {f"m{i}": LowRank(normal(i, 6, 2), normal(i + 9, 2, 5)) for i in range(2)}
    found = method.fuse(loras, method.coefficients([*loras], PLACE), PLACE, WHOLE)
    assert isinstance(found, LowRank) and found.rank == 4
    products: dict[str, Delta] = {n: Dense(d.dense()) for n, d in loras.items()}
    torch.testing.assert_close(fused(method, products), found.dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vectors", VECTORS)
def test_nuslerp_of_a_vector_has_one_angle_and_of_a_stack_those_of_each_matrix(
    vectors: Literal["tensor", "rows", "columns"],
) -> None:
    method = NuSlerp(method="nuslerp", vectors=vectors)
    one, two = normal(0, 3, 4, 5), normal(1, 3, 4, 5)
    flat: dict[str, Delta] = {"m0": Dense(one.flatten()), "m1": Dense(two.flatten())}
    torch.testing.assert_close(fused(method, flat), fused(NuSlerp(method="nuslerp"), flat))
    if vectors != "tensor":
        found = fused(method, {"m0": Dense(one), "m1": Dense(two)})
        for i in range(3):
            torch.testing.assert_close(found[i], fused(method, {"m0": Dense(one[i]), "m1": Dense(two[i])}))


def test_nuslerp_of_other_than_two_models_or_without_weight_is_refused() -> None:
    for models in (["a"], ["a", "b", "c"]):
        with pytest.raises(ManifestError, match="nuslerp fuses two models"):
            NuSlerp(method="nuslerp").coefficients(models, PLACE)
    with pytest.raises(ManifestError, match="at least one over 0"):
        NuSlerp(method="nuslerp", weights={"a": 0.0, "b": 0.0}).coefficients(["a", "b"], PLACE)


# -- NearSwap --------------------------------------------------------------------------------------------------------


def test_nearswap_by_hand_of_two_models_and_of_one_and_the_aligned_model() -> None:
    method = NearSwap(method="nearswap", t=0.5)
    first, second = [1.0, 1.0, 1.0, 0.0], [1.25, 3.0, -1.0, 0.0]
    assert fused(method, of(first, second)).tolist() == [1.25, 1.5, 0.5, 0.0]
    assert fused(method, of(second), ("m0",)).tolist() == [0.5, 0.5, -0.5, 0.0]


def test_nearswap_moves_towards_a_model_that_leaves_the_tensor_alone() -> None:
    method = NearSwap(method="nearswap", t=0.5)
    assert fused(method, of([2.0, 0.25])).tolist() == [1.5, 0.0]
    second: dict[str, Delta] = {"m1": Dense(torch.tensor([2.0, 0.25]))}
    assert fused(method, second).tolist() == [0.5, 0.25]


def test_nearswap_of_no_step_is_the_first_model() -> None:
    assert fused(NearSwap(method="nearswap", t=0.0), of([1.0, 2.0], [5.0, 5.0])).tolist() == [1.0, 2.0]


def test_nearswap_refuses_weights_a_negative_t_and_three_models() -> None:
    with pytest.raises(ValidationError, match="no weights"):
        NearSwap(method="nearswap", weights={"a": 2.0})
    with pytest.raises(ManifestError, match="t is -1 for"):
        NearSwap(method="nearswap", t=-1.0).coefficients(["a"], PLACE)
    with pytest.raises(ManifestError, match="nearswap puts one model into another, not 3"):
        NearSwap(method="nearswap").coefficients([*"abc"], PLACE)
