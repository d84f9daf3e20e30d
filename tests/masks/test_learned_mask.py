from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fleet.algebra.delta import Dense, LowRank
from fleet.core.errors import CheckpointError
from fleet.masks.files import MASK_FILE, MASK_JSON
from fleet.masks.learned import LearnedMask, open_mask
from fleet.methods import Somf

TENSOR = "model.layers.0.self_attn.q_proj.weight"


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_mask(folder: Path, logits: Mapping[str, torch.Tensor], mask: str = "dense") -> LearnedMask:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone() for name, value in logits.items()}, folder / MASK_FILE)
    (folder / MASK_JSON).write_text(json.dumps({"mask": mask}))
    return open_mask(str(folder))


def somf(**changes: object) -> Somf:
    return Somf.model_validate({"method": "somf", "preferences": "p.jsonl", "hardening": "threshold", **changes})


def masked(mask: LearnedMask, delta: Dense | LowRank, method: Somf, model: str = "m") -> torch.Tensor:
    return mask.apply(method, model, TENSOR, delta, None).dense()


DELTA = Dense(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
LOGITS = torch.tensor([[1.0, -1.0], [0.0, -9.0]])


def test_learned_mask_threshold_keeps_logits_from_zero_and_rescales(tmp_path: Path) -> None:
    mask = write_mask(tmp_path, {f"*/{TENSOR}/entries": LOGITS})
    assert torch.equal(masked(mask, DELTA, somf()), torch.tensor([[2.0, 0.0], [6.0, 0.0]]))


def test_learned_mask_expected_is_sigma_over_its_mean(tmp_path: Path) -> None:
    mask = write_mask(tmp_path, {f"*/{TENSOR}/entries": LOGITS})
    keep = torch.sigmoid(LOGITS)
    torch.testing.assert_close(masked(mask, DELTA, somf(hardening="expected")), keep * DELTA.value / keep.mean())


def test_learned_mask_sample_is_one_seeded_draw_over_its_mean(tmp_path: Path) -> None:
    mask = write_mask(tmp_path, {f"*/{TENSOR}/entries": normal(0, 40, 40)})
    delta = Dense(torch.ones(40, 40))
    found, again, other = (masked(mask, delta, somf(hardening="sample", seed=s)) for s in (0, 0, 1))
    assert torch.equal(found, again) and not torch.equal(found, other)
    kept = found != 0.0
    torch.testing.assert_close(found[kept], torch.full((int(kept.sum()),), 1600.0 / float(kept.sum())))
    # σ of a standard normal has mean ½; four standard errors of a share of 1600 are 0.05.
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.05)


def test_learned_mask_draws_are_of_the_tensor_and_the_owner(tmp_path: Path) -> None:
    """One seed for a whole model must not repeat one pattern in all its tensors."""
    other = TENSOR.replace("q_proj", "k_proj")
    logits = torch.zeros(20, 20)
    mask = write_mask(tmp_path, {f"{o}/{t}/entries": logits for o in ("a", "b") for t in (TENSOR, other)})
    method, delta = somf(hardening="sample"), Dense(torch.ones(20, 20))
    found = [mask.apply(method, m, t, delta, None).dense() for m in ("a", "b") for t in (TENSOR, other)]
    assert not any(torch.equal(found[i], found[j]) for i in range(4) for j in range(i))


def test_learned_mask_own_logits_win_over_shared(tmp_path: Path) -> None:
    own = torch.tensor([[-1.0, 1.0], [-1.0, -1.0]])
    mask = write_mask(tmp_path, {f"*/{TENSOR}/entries": LOGITS, f"m/{TENSOR}/entries": own})
    assert torch.equal(masked(mask, DELTA, somf(), "m"), torch.tensor([[0.0, -8.0], [0.0, 0.0]]))
    assert torch.equal(masked(mask, DELTA, somf(), "other"), torch.tensor([[2.0, 0.0], [6.0, 0.0]]))


def test_learned_mask_without_logits_for_a_tensor_leaves_it_alone(tmp_path: Path) -> None:
    logits = {f"m/{TENSOR}/entries": LOGITS, f"*/{TENSOR}_extra/entries": LOGITS, "*/other/entries": LOGITS}
    mask = write_mask(tmp_path, logits)
    assert mask.apply(somf(), "n", TENSOR, DELTA, None) is DELTA
    assert mask.apply(somf(), "m", "model.norm.weight", DELTA, None) is DELTA


def test_learned_mask_of_an_empty_threshold_is_the_aligned_model(tmp_path: Path) -> None:
    mask = write_mask(tmp_path, {f"*/{TENSOR}/entries": torch.full((2, 2), -1.0)})
    assert torch.equal(masked(mask, DELTA, somf()), torch.zeros(2, 2))


def test_learned_mask_of_another_shape_names_the_logits_and_both_shapes(tmp_path: Path) -> None:
    mask = write_mask(tmp_path, {f"*/{TENSOR}/entries": torch.zeros(2, 3)})
    with pytest.raises(CheckpointError, match=rf"\*/{TENSOR}/entries are \(2, 3\), but the task vector needs \(2, 2\)"):
        masked(mask, DELTA, somf())


def test_learned_mask_with_a_part_missing_names_it(tmp_path: Path) -> None:
    mask = write_mask(tmp_path, {f"*/{TENSOR}/rows": torch.zeros(2)}, "rows_and_columns")
    with pytest.raises(CheckpointError, match=r"columns are None, but the task vector needs \(2,\)"):
        masked(mask, DELTA, somf(mask="rows_and_columns"))


# -- the other granularities -----------------------------------------------------------------------------------------


def test_learned_mask_rescales_rows_and_columns_each_by_its_own_mean(tmp_path: Path) -> None:
    logits = {f"*/{TENSOR}/rows": torch.tensor([1.0, -1.0]), f"*/{TENSOR}/columns": torch.tensor([1.0, 1.0])}
    found = masked(write_mask(tmp_path, logits, "rows_and_columns"), DELTA, somf(mask="rows_and_columns"))
    assert torch.equal(found, torch.tensor([[2.0, -4.0], [0.0, 0.0]]))


def test_learned_mask_of_ranks_acts_on_singular_components(tmp_path: Path) -> None:
    delta = LowRank(torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.eye(2))
    mask = write_mask(tmp_path, {f"*/{TENSOR}/components": torch.tensor([1.0, -1.0])}, "rank")
    found = mask.apply(somf(mask="rank"), "m", TENSOR, delta, None)
    assert isinstance(found, LowRank)
    torch.testing.assert_close(found.dense(), torch.diag(torch.tensor([0.0, 10.0])), rtol=0.0, atol=1e-5)


def test_learned_mask_of_factors_reverts_to_its_origin(tmp_path: Path) -> None:
    delta, origin = (LowRank(normal(s, 3, 2), normal(s + 1, 2, 4)) for s in (0, 5))
    logits = {f"*/{TENSOR}/b": torch.full((3, 2), -1.0), f"*/{TENSOR}/a": torch.full((2, 4), -1.0)}
    mask = write_mask(tmp_path, logits, "factor")
    method = somf(mask="factor")
    assert torch.equal(mask.apply(method, "m", TENSOR, delta, origin).dense(), origin.dense())
    assert torch.equal(mask.apply(method, "m", TENSOR, delta, None).dense(), torch.zeros(3, 4))


# -- arrangements: controls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardening", ["threshold", "expected", "sample"])
@pytest.mark.parametrize("arrangement", ["random", "magnitude"])
def test_learned_mask_arrangement_keeps_the_values_and_moves_them(
    tmp_path: Path, hardening: str, arrangement: str
) -> None:
    mask = write_mask(tmp_path, {f"*/{TENSOR}/entries": normal(0, 12, 10)})
    delta = Dense(normal(1, 12, 10))
    learned, moved = (
        masked(mask, delta, somf(hardening=hardening, arrangement=a)) / delta.value for a in ("learned", arrangement)
    )
    torch.testing.assert_close(learned.flatten().sort().values, moved.flatten().sort().values, rtol=1e-4, atol=1e-6)
    assert int((~torch.isclose(learned, moved)).sum()) > 20


def test_learned_mask_random_arrangement_is_seeded_and_uncorrelated_with_the_learned(tmp_path: Path) -> None:
    mask = write_mask(tmp_path, {f"*/{TENSOR}/entries": normal(0, 60, 50)})
    delta = Dense(torch.ones(60, 50))
    learned = masked(mask, delta, somf(hardening="expected"))
    one, again, two = (masked(mask, delta, somf(hardening="expected", arrangement="random", seed=s)) for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, two)
    stacked = torch.stack([t.flatten() for t in (learned, one, two)])
    # Four standard errors of a correlation over 3000 entries are 0.073.
    assert float((torch.corrcoef(stacked) - torch.eye(3)).abs().max()) < 0.073


def test_learned_mask_magnitude_arrangement_puts_the_largest_values_on_the_largest_entries(tmp_path: Path) -> None:
    mask = write_mask(tmp_path, {f"*/{TENSOR}/entries": LOGITS})
    threshold = masked(mask, DELTA, somf(arrangement="magnitude"))
    assert torch.equal(threshold, torch.tensor([[0.0, 0.0], [6.0, 8.0]]))
    expected = masked(mask, DELTA, somf(arrangement="magnitude", hardening="expected"))
    # |δ| is 1, 2, 3, 4, and σ(−9) < σ(−1) < σ(0) < σ(1).
    values = torch.sigmoid(torch.tensor([[-9.0, -1.0], [0.0, 1.0]]))
    torch.testing.assert_close(expected, DELTA.value * values / values.mean())


def test_learned_mask_magnitude_arrangement_goes_by_each_parts_own_sizes(tmp_path: Path) -> None:
    logits = {f"*/{TENSOR}/rows": torch.tensor([1.0, -1.0]), f"*/{TENSOR}/columns": torch.tensor([1.0, -1.0])}
    mask = write_mask(tmp_path, logits, "rows_and_columns")
    found = masked(mask, DELTA, somf(mask="rows_and_columns", arrangement="magnitude"))
    assert torch.equal(found, torch.tensor([[0.0, 0.0], [0.0, 16.0]]))  # the second row and the second column


# -- opening ---------------------------------------------------------------------------------------------------------


def test_open_mask_reads_granularity_and_headers_alone(tmp_path: Path) -> None:
    mask = write_mask(tmp_path, {f"*/{TENSOR}/b": torch.zeros(3, 2), f"*/{TENSOR}/a": torch.zeros(2, 3)}, "factor")
    assert mask.granularity == "factor"
    assert {name: tuple(info.shape) for name, info in mask.logits.items()} == {
        f"*/{TENSOR}/b": (3, 2), f"*/{TENSOR}/a": (2, 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"mask": "colour"}', "no mask is called 'colour'; there are dense, rank, rows_and_columns, factor"),
        ("{}", "doesn't say which mask"),
        ("[1]", "doesn't say which mask"),
        ('{"mask": ["dense"]}', "doesn't say which mask"),
        ("{", "not JSON"),
    ],
)
def test_open_mask_of_damaged_or_unknown_files_refused(tmp_path: Path, config: str, message: str) -> None:
    save_file({"*/x/entries": torch.zeros(1)}, tmp_path / MASK_FILE)
    (tmp_path / MASK_JSON).write_text(config)
    with pytest.raises(CheckpointError, match=message):
        open_mask(str(tmp_path))
