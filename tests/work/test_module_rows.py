from __future__ import annotations

import pytest

from fleet.core.identity import Json
from fleet.methods import Decision, ModuleStatistics
from fleet.work.module_rows import module_rows


def statistics(module: str) -> ModuleStatistics:
    return ModuleStatistics(module=module, shape=(4, 4), rank=2, delta_norm=1 / 3, safety_norm=1.0, lift=2.0, gain=9.0)


def test_row_has_what_was_measured_decided_and_done() -> None:
    edit: dict[str, Json] = {"module": "m", "edit_norm": 0.5, "directions": [[0.1, 0.2]]}
    (row,) = module_rows([statistics("m")], [Decision(module="m", edit=True, reason="why")], {"m": edit})
    assert row == {
        "module": "m", "edit": True, "reason": "why", "lift": 2.0,
        "delta_norm": 0.333333, "edit_norm": 0.5, "directions": [[0.1, 0.2]],
    }  # fmt: skip


@pytest.mark.parametrize("edits", [{}, {"m": {"edit_norm": 0.0}}])
def test_row_of_an_edit_that_changed_nothing_says_so(edits: dict[str, dict[str, Json]]) -> None:
    (row,) = module_rows([statistics("m")], [Decision(module="m", edit=True, reason="why")], edits)
    assert (row["edit"], row["reason"]) == (False, "why; nothing changed")


def test_row_of_a_module_left_alone_has_no_edit() -> None:
    (row,) = module_rows([statistics("m")], [Decision(module="m", edit=False, reason="why not")], {})
    assert (row["edit"], row["reason"]) == (False, "why not")
    assert "edit_norm" not in row


def test_decision_missing_for_a_module_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        module_rows([statistics("m")], [], {})
