"""RAM and RAM+, by hand."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fleet.algebra.delta import Delta, Dense
from fleet.algebra.sparsify import WHOLE
from fleet.fusion import AnyFusionMethod, Ram, RamPlusTl
from fleet.fusion.place import Place

PLACE = Place("model.layers.1.q.weight", 0.5)
ONE, TWO, THREE = [8.0, 4.0, 0.0, 0.0, 6.0, 0.5], [0.0, 2.0, 3.0, 0.0, 3.0, 0.5], [0.0, 0.0, 0.0, 0.0, -3.0, 0.5]
"""Changed by: the first alone, two, the second alone, none, all, and by all by too little."""


def fused(method: AnyFusionMethod, *values: list[float]) -> list[float]:
    deltas: dict[str, Delta] = {f"m{i}": Dense(torch.tensor(value)) for i, value in enumerate(values)}
    return method.fuse(deltas, method.coefficients([*deltas], PLACE), PLACE, WHOLE).dense().tolist()


def test_ram_keeps_what_one_model_changed_and_averages_what_several_did() -> None:
    found = fused(Ram(method="ram", epsilon=0.5), ONE, TWO, THREE)
    assert found == [8.0, 3.0, 3.0, 0.0, 2.0, 0.0]


def test_ramplus_raises_what_one_model_changed_by_how_much_it_shares() -> None:
    # The first shares two entries and changed one alone, as the second; the third changed none alone.
    found = fused(RamPlusTl(method="ramplus_tl", epsilon=0.5, r=0.25, alpha=3.0), ONE, TWO, THREE)
    assert found == [8.0 * 1.5, 3.0, 3.0 * 1.5, 0.0, 2.0, 0.0]
    capped = fused(RamPlusTl(method="ramplus_tl", epsilon=0.5, r=0.25, alpha=1.0), ONE, TWO, THREE)
    assert capped == [8.0 * 1.25, 3.0, 3.0 * 1.25, 0.0, 2.0, 0.0]


def test_ramplus_of_models_that_share_nothing_is_their_sum() -> None:
    assert fused(RamPlusTl(method="ramplus_tl"), [1.0, 0.0], [0.0, 2.0]) == [1.0, 2.0]


@pytest.mark.parametrize("name", ["ram", "ramplus_tl"])
def test_ram_has_mergekits_defaults_and_no_weights(name: str) -> None:
    read = TypeAdapter(AnyFusionMethod).validate_python
    found = read({"method": name})
    assert isinstance(found, (Ram, RamPlusTl)) and found.epsilon == 1e-5
    assert not isinstance(found, RamPlusTl) or (found.r, found.alpha) == (0.1, 0.2)
    with pytest.raises(ValidationError, match="RAM has no weights"):
        read({"method": name, "weights": {"a": 2.0}})
