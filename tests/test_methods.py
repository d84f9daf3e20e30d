from __future__ import annotations

from typing import Any

import pytest
import torch

from fleet.algebra.delta import Dense, LowRank
from fleet.fusion import TaskArithmetic, WeightAverage
from fleet.methods import ModuleStatistics, SafeMerge, WiseFt


def statistics(**values: Any) -> ModuleStatistics:
    fields: dict[str, Any] = {"rho": 0.5, "lift": 2.0, "gain": 0.1, "cosine": 0.0}
    return ModuleStatistics(module="m", rank=1, delta_norm=1.0, safety_norm=1.0, **(fields | values))


def ones(value: float) -> LowRank:
    return LowRank(torch.full((2, 1), value), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("method", "values", "edit"),
    [
        (SafeMerge(method="safemerge"), {"rho": 0.6999}, True),
        (SafeMerge(method="safemerge"), {"rho": 0.7}, False),
        (SafeMerge(method="safemerge", threshold=0.0), {"rho": 0.0}, False),
        (SafeMerge(method="safemerge"), {"rho": None}, False),
        (SafeMerge(method="safemerge", statistic="lift", threshold=1.0), {"rho": 0.9, "lift": 0.5}, True),
        (WiseFt(method="wise_ft"), {"rho": None}, True),
    ],
)
def test_method_decides_on_its_statistic(method: SafeMerge | WiseFt, values: dict[str, Any], edit: bool) -> None:
    assert method.decide(statistics(**values)).edit is edit


def test_safemerge_undefined_statistic_says_so() -> None:
    assert SafeMerge(method="safemerge").decide(statistics(rho=None)).reason == "rho undefined: kept"


def test_safemerge_edit_is_the_product_space_average() -> None:
    merged = SafeMerge(method="safemerge", alpha=0.8).edit(ones(2.0), ones(-1.0))
    assert isinstance(merged, LowRank)
    torch.testing.assert_close(merged.dense(), torch.full((2, 3), 0.8 * 2.0 - 0.2))


def test_safemerge_without_safety_in_the_module_averages_with_zero() -> None:
    torch.testing.assert_close(SafeMerge(method="safemerge").edit(ones(1.0), None).dense(), torch.full((2, 3), 0.8))


def test_safemerge_of_a_full_fine_tune_is_dense() -> None:
    merged = SafeMerge(method="safemerge", alpha=0.5).edit(Dense(torch.ones(2, 3)), ones(3.0))
    torch.testing.assert_close(merged.dense(), torch.full((2, 3), 2.0))


def test_wise_ft_scales() -> None:
    torch.testing.assert_close(
        WiseFt(method="wise_ft", alpha=0.25).edit(ones(4.0), ones(9.0)).dense(), torch.ones(2, 3)
    )


def test_weight_average_weights_are_normalised() -> None:
    method = WeightAverage(method="weight_average", weights={"b": 3.0})
    assert method.coefficients(["a", "b"]) == {"a": 0.25, "b": 0.75}


def test_task_arithmetic_of_two_is_the_scaled_sum() -> None:
    method = TaskArithmetic(method="task_arithmetic", scale=0.5, weights={"b": 2.0})
    weights = method.coefficients(["a", "b"])
    fused = method.fuse([ones(1.0), ones(10.0)], list(weights.values()))
    assert isinstance(fused, LowRank)
    torch.testing.assert_close(fused.dense(), torch.full((2, 3), 0.5 + 10.0))
