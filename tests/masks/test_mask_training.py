"""The training loop by itself: what it starts from, what it learns, what it keeps, and what a kill leaves behind."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer

import fleet.masks.training
from fleet.checkpoint.shards import Output
from fleet.core.errors import CheckpointError, StepFailedError
from fleet.fusion import AnyFusionMethod, WeightAverage
from fleet.fusion.member import Member
from fleet.masks.files import MASK_FILE, MASK_JSON
from fleet.masks.masked_model import ALONE, Group
from fleet.masks.objective import dpo_losses
from fleet.masks.tasks import NOTHING, Compute, LogProbsTask, MaskTask, Texts, Trained
from fleet.masks.texts import held_out, open_texts, split
from fleet.masks.training import LOG_PROBS_FILE, learn_mask, learning_rate, log_probs, standstill
from fleet.methods import Somf
from fleet.methods.mask_spec import MaskTraining
from fleet.store import open_store
from tests.catalogue import make_continued, preference_rows, prompt_rows, write_rows
from tests.pico import make_adapter

CPU = torch.device("cpu")
ROWS = preference_rows(24)
SETTINGS: dict[str, Any] = {
    "steps": 12, "batch_size": 6, "learning_rate": 0.3, "warmup_steps": 2, "beta": 0.5, "held_out": 0.25,
    "evaluate_every": 3, "patience": 99, "max_tokens": 32, "dtype": "float32",
}  # fmt: skip
COMPUTE = Compute(micro_batch=None, activation_checkpointing=False, checkpoint_every=4)


def ignored(measured: dict[str, float]) -> None:
    pass


@dataclass(frozen=True)
class Bench:
    """A catalogue, and a store with its texts and the aligned model's log-probabilities."""

    root: Path
    work: Path

    @property
    def store(self) -> str:
        return str(self.work / "store")

    def texts(self, what: Any, rows: list[dict[str, str]], name: str) -> Texts:
        found, data = open_texts(what, str(write_rows(self.work / f"{name}.jsonl", rows)), "test")
        assert data is not None
        open_store(self.store).create(found.key, data)
        return Texts(found, self.store)

    def log_probs(self, preferences: Texts, name: str, compute: Compute = COMPUTE) -> str:
        output = Output(self.store, name)
        task = LogProbsTask(str(self.root / "aligned"), preferences, 32, "float32", compute, output)
        log_probs(task, ALONE, CPU)
        return str(self.work / "store" / name)

    def task(
        self,
        out: str,
        training: dict[str, Any],
        names: tuple[str, ...] = ("full",),
        fusion: AnyFusionMethod | None = None,
        rows: list[dict[str, str]] = ROWS,
        compute: Compute = COMPUTE,
        safety: bool = False,
        **method: Any,
    ) -> MaskTask:
        learn_on = "model" if fusion is None else "fusion"
        somf = Somf.model_validate(
            {"method": "somf", "preferences": "x", "learn_on": learn_on, "training": SETTINGS | training, **method}
        )
        preferences = self.texts("preferences", rows, out)
        cached = f"reference-{preferences.texts.identity[7:15]}"
        folder = self.work / "store" / cached
        if not folder.exists():
            self.log_probs(preferences, cached)
        prompts = (self.texts("prompts", prompt_rows(8), "prompts"),) * len(names) if somf.training.uses_prompts else ()
        return MaskTask(
            step=out, aligned=str(self.root / "aligned"),
            members=tuple(Member(n, str(self.root / n)) for n in names), fusion=fusion, method=somf,
            safety=str(self.root / "safety") if safety else None, preferences=preferences, log_probs=str(folder),
            prompts=prompts, compute=compute, output=Output(self.store, f"{out}/attempt"),
        )  # fmt: skip

    def bytes(self, task: MaskTask) -> bytes:
        return (self.work / "store" / task.output.prefix / MASK_FILE).read_bytes()

    def logits(self, task: MaskTask) -> dict[str, torch.Tensor]:
        return load(self.bytes(task))


@dataclass(frozen=True)
class Done:
    """A training that ended, and all it told."""

    task: MaskTask
    record: Trained
    told: list[dict[str, float]]

    @property
    def result(self) -> dict[str, Any]:
        return dict(self.record.result)


def trained(task: MaskTask, report: Callable[[dict[str, float]], None] = ignored) -> Done:
    told: list[dict[str, float]] = []

    def hear(measured: dict[str, float]) -> None:
        told.append(measured)
        report(measured)

    return Done(task, learn_mask(task, ALONE, CPU, hear), told)


@pytest.fixture(scope="module")
def bench(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("training")
    for name in ("aligned", "safety", "lora", "full"):
        (root / name).symlink_to(catalogue / name)
    make_continued(root / "continued", catalogue / "safety", 5)
    make_adapter(root / "stranger", catalogue / "aligned", 99, rank=8, targets=("q_proj", "v_proj", "o_proj"))
    return Bench(root, root)


@pytest.fixture(scope="module")
def done(bench: Bench) -> Done:
    """One training that nothing disturbed, dense and on a full fine-tune."""
    return trained(bench.task("undisturbed", {}))


# -- the reference -----------------------------------------------------------------------------------------------------


def test_cached_log_probs_are_those_of_the_aligned_model_on_each_text_alone(bench: Bench) -> None:
    """Without padding or batches: transformers on the chat template, the reply and its end, summed by hand."""
    preferences = bench.texts("preferences", ROWS, "alone")
    small = replace(COMPUTE, micro_batch=5)
    files = [bench.log_probs(preferences, f"alone-{c.micro_batch}", c) for c in (COMPUTE, small)]
    expected = by_hand(bench.root / "aligned")
    for row, side in enumerate(("chosen", "rejected")):
        for found in files:
            cached = load_file(Path(found) / LOG_PROBS_FILE)[side]
            torch.testing.assert_close(cached, expected[row], rtol=1e-4, atol=1e-4)


def test_evaluation_of_a_uniform_mask_is_that_of_the_fine_tuned_model(bench: Bench) -> None:
    """DPO's margins, loss and accuracy by hand, on the pairs held out: positive where the chosen reply gained."""
    still = trained(bench.task("still", {"learning_rate": 1e-9, "steps": 1}))
    gained = by_hand(bench.root / "full") - by_hand(bench.root / "aligned")
    margin = (gained[0] - gained[1])[split(ROWS, 0.25)[1]]
    best = still.result["best"]
    assert best["margin"] == pytest.approx(float(margin.mean()), rel=1e-3)
    assert best["loss"] == pytest.approx(float((-0.5 * margin).exp().log1p().mean()), rel=1e-3)
    assert best["accuracy"] == pytest.approx(float((margin > 0).float().mean()))
    assert best["density"] == pytest.approx(0.5)


def test_mask_that_keeps_nothing_prefers_nothing_over_the_reference(bench: Bench) -> None:
    """θ is the aligned model then: margins are 0, and DPO's loss is log 2."""
    told = trained(bench.task("nothing", {"steps": 1}, initial_logit=-200.0)).told
    assert sorted(told[0]) == ["accuracy", "density", "learning_rate", "loss", "margin", "step"]
    for measured, prefix in zip(told, ("", "held_out."), strict=True):
        assert measured[f"{prefix}loss"] == pytest.approx(math.log(2.0), abs=1e-4)
        assert measured[f"{prefix}margin"] == pytest.approx(0.0, abs=3e-4)
        assert measured[f"{prefix}density"] == pytest.approx(0.0, abs=1e-6)


# -- what is learned ---------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_on_what_it_has_not_seen(bench: Bench, done: Done) -> None:
    still = trained(bench.task("before", {"learning_rate": 1e-9, "steps": 1}))
    before, after = still.result["best"], done.result["best"]
    assert after["loss"] < 0.8 * before["loss"]
    assert after["margin"] > before["margin"] and after["accuracy"] >= before["accuracy"]


def test_training_on_a_fleet_with_masks_apart_lowers_the_held_out_loss(bench: Bench) -> None:
    average = WeightAverage(method="weight_average")
    task = bench.task("fleet", {"steps": 9}, ("lora", "full"), average, mask="rows_and_columns", shared=False)
    result = trained(task)
    evaluations: Any = result.result["evaluations"]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    owners = {name.split("/")[0] for name in bench.logits(task)}
    assert owners == {"lora", "full"}


def test_record_tells_the_best_every_evaluation_and_how_much_is_kept(bench: Bench, done: Done) -> None:
    result = done.result
    assert result["steps"] == 12
    assert [e["step"] for e in result["evaluations"]] == [3, 6, 9, 12]
    assert result["best"] == min(result["evaluations"], key=lambda e: e["loss"])
    assert set(result["best"]) == {"step", "loss", "accuracy", "margin", "density", "divergence"}
    assert result["best"]["divergence"] is None
    logits = bench.logits(done.task)
    assert result["num_logits"] == sum(t.numel() for t in logits.values())
    above = sum(int((t >= 0).sum()) for t in logits.values())
    assert result["share_above_half"] == pytest.approx(above / result["num_logits"])
    assert "warning" not in result


def test_record_of_a_mask_that_stayed_at_its_start_says_so(bench: Bench) -> None:
    task = bench.task("still", {"steps": 1, "learning_rate": 1e-4, "held_out": 0.0})
    assert "nearly at its start" in str(trained(task).result["warning"])


def test_every_update_and_evaluation_is_told_in_order(done: Done) -> None:
    updates = [t["step"] for t in done.told if "loss" in t]
    evaluations = [t["step"] for t in done.told if "held_out.loss" in t]
    assert updates == [*range(1, 13)] and evaluations == [3, 6, 9, 12]
    assert [t["learning_rate"] for t in done.told if "loss" in t] == [
        learning_rate(done.task.method.training, step) for step in range(12)
    ]


def test_mask_file_holds_float32_logits_by_tensor_and_says_what_they_are(bench: Bench, done: Done) -> None:
    logits = bench.logits(done.task)
    aligned = load_all(bench.root / "aligned")
    assert {n: t.shape for n, t in logits.items()} == {
        f"*/{n}/entries": t.shape for n, t in aligned.items() if f"*/{n}/entries" in logits
    }
    assert f"*/{'model.embed_tokens.weight'}/entries" in logits
    assert {t.dtype for t in logits.values()} == {torch.float32}
    about = json.loads((bench.work / "store" / done.task.output.prefix / MASK_JSON).read_text())
    expected = {"mask": "dense", "models": ["full"], "shared": True, "temperature": 0.5, "seed": 0}
    assert about.pop("rule") and about == expected
    assert set(done.record.files) == {MASK_FILE, MASK_JSON}
    assert done.record.files[MASK_FILE].num_bytes == len(bench.bytes(done.task))


def test_sparsity_weight_lowers_what_is_kept(bench: Bench, done: Done) -> None:
    pressed = trained(bench.task("pressed", {"sparsity_weight": 1000.0}))
    assert pressed.result["evaluations"][-1]["density"] < 0.6 * done.result["evaluations"][-1]["density"]


def test_utility_weight_keeps_the_model_nearer_to_what_it_was(bench: Bench) -> None:
    """The same training, measured alike; the first only measures."""
    free, held = (
        trained(bench.task(f"utility-{mu}", {"divergence_max": 1e9, "utility_weight": mu})).result["evaluations"][-1]
        for mu in (0.0, 30.0)
    )
    assert 0.0 < held["divergence"] < 0.7 * free["divergence"]


def test_utility_is_weighed_against_the_preferences(bench: Bench) -> None:
    """By Adam's first moment, which is linear in the loss: what μ = 3 adds is three times what μ = 1 does."""
    moments: list[dict[str, torch.Tensor]] = []
    compute = replace(COMPUTE, checkpoint_every=1)
    for mu in (0.0, 1.0, 3.0):
        training = {"steps": 1, "divergence_max": 1e9, "utility_weight": mu}
        task = bench.task(f"weight-{mu}", training, ("lora",), mask="rank", compute=compute)
        trained(task)
        moments.append(load_file(bench.work / "store" / task.state / "b.safetensors"))
    without, one, three = moments
    for name in without:
        if name.endswith("/exp_avg"):
            added = one[name] - without[name]
            assert added.any()
            torch.testing.assert_close(three[name] - without[name], 3.0 * added, rtol=1e-3, atol=1e-7)


def test_divergence_of_a_fleet_is_the_mean_over_its_members(bench: Bench) -> None:
    """Under a mask that keeps nothing: each member's own from the aligned model, on all of its prompts."""
    training = {"steps": 1, "utility_weight": 1.0, "batch_size": 32}
    average = WeightAverage(method="weight_average")
    alone = [trained(bench.task(f"apart-{n}", training, (n,), initial_logit=-200.0)).told for n in ("lora", "full")]
    fleet = trained(bench.task("together", training, ("lora", "full"), average, initial_logit=-200.0)).told
    for told, one, two in zip(fleet, *alone, strict=True):
        name = "divergence" if "divergence" in told else "held_out.divergence"
        assert one[name] != pytest.approx(two[name], rel=0.05)
        assert told[name] == pytest.approx((one[name] + two[name]) / 2.0, rel=1e-4)


# -- kills -------------------------------------------------------------------------------------------------------------


@dataclass
class KilledError(Exception):
    step: float


def killed_at(step: int) -> Callable[[dict[str, float]], None]:
    def report(measured: dict[str, float]) -> None:
        if measured["step"] == step and "loss" in measured:
            raise KilledError(step)

    return report


@pytest.mark.parametrize("kill", [2, 7, 9])
def test_training_killed_and_run_again_learns_the_same_bits(bench: Bench, done: Done, kill: int) -> None:
    """From the last checkpoint, every fourth update; the evaluations before it are not made again."""
    task = bench.task(f"killed-{kill}", {})
    with pytest.raises(KilledError):
        trained(task, killed_at(kill))
    again = trained(task)
    start = kill - 1 - (kill - 1) % 4
    assert [t["step"] for t in again.told if "loss" in t] == [*range(start + 1, 13)]
    assert bench.bytes(task) == bench.bytes(done.task)
    assert again.record == done.record


def test_training_that_is_over_only_writes_its_mask_again(bench: Bench, done: Done) -> None:
    """A driver that was killed before it had written the record: another attempt, the same state."""
    again = trained(replace(done.task, output=Output(bench.store, "undisturbed/second")))
    assert again.told == [] and again.record == done.record


def test_last_checkpoint_is_whole_while_the_next_is_written(
    bench: Bench, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a checkpoint's tensors and the word that they are there."""
    task = bench.task("torn", {})
    store_class = type(open_store(bench.store))
    original = store_class.replace

    def torn(self: Any, key: str, data: bytes) -> None:
        if key.endswith("state.json") and json.loads(data)["step"] == 8:
            raise KilledError(8)
        original(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(store_class, "replace", torn)
        with pytest.raises(KilledError):
            trained(task)
    again = trained(task)
    assert next(t["step"] for t in again.told) == 5
    assert bench.bytes(task) == bench.bytes(done.task)


# -- how it is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compute", [replace(COMPUTE, micro_batch=3), replace(COMPUTE, micro_batch=1, activation_checkpointing=True)]
)
def test_batches_in_parts_learn_what_whole_ones_do(bench: Bench, compute: Compute) -> None:
    """Preferences and task prompts; a rank mask, whose few logits all have gradients well above rounding."""
    training = {"steps": 3, "utility_weight": 0.5, "batch_size": 8}
    whole, parts = (
        bench.task(f"parts-{c.micro_batch}-{name}", training, ("lora",), compute=c, mask="rank")
        for name, c in (("whole", COMPUTE), ("parts", compute))
    )
    first, second = trained(whole), trained(parts)
    for name, value in bench.logits(whole).items():
        torch.testing.assert_close(bench.logits(parts)[name], value, rtol=1e-4, atol=1e-5)
    for one, other in zip(first.told, second.told, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_two_workers_take_the_gradients_of_one(bench: Bench) -> None:
    """Whole updates of `learn_mask`, of an odd batch, with both terms: by Adam's first moment in the checkpoint.

    So slow that the logits hardly move: after an update they'd tell the signs of gradients that are mere rounding. The
    first worker is late in writing the only evaluation's mask, which the second has no need of.
    """
    training = {"steps": 3, "utility_weight": 0.5, "batch_size": 5, "learning_rate": 1e-6}
    compute = replace(COMPUTE, checkpoint_every=2)
    tasks = [bench.task(f"{n}-workers", training, mask="rows_and_columns", compute=compute) for n in (1, 2)]
    (one, two) = tasks
    alone = trained(one)
    mp.spawn(_worker, (two,), nprocs=2)
    states = [load_file(bench.work / "store" / t.state / "b.safetensors") for t in tasks]
    assert set(states[0]) == set(states[1])
    for name, value in states[0].items():
        if name.endswith("/exp_avg"):
            assert float((states[1][name] - value).norm()) < 1e-4 * float(value.norm()) + 1e-9, name
    found = json.loads((bench.work / "store" / two.state / "record.json").read_text())
    result = alone.result
    for field in ("loss", "accuracy", "margin", "density", "divergence"):
        assert found["best"][field] == pytest.approx(result["best"][field], rel=1e-3, abs=1e-4)


def _worker(rank: int, task: MaskTask) -> None:
    torch.set_num_threads(1)
    rendezvous = Path(task.output.store, f"{task.step}-rendezvous")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    group = Group(rank, 2, init_device_mesh("cpu", (2,)))
    write = fleet.masks.training.write_tensors

    def slow(*args: Any) -> Any:
        values = [[piece.clone() for piece in pieces] for pieces in args[3]]
        time.sleep(2.0)
        return write(*args[:3], iter(values))

    fleet.masks.training.write_tensors = slow
    record = learn_mask(task, group, CPU, ignored)
    if rank == 0:
        open_store(task.output.store).replace(f"{task.state}/record.json", json.dumps(record.result).encode())
    else:
        assert record == NOTHING
    dist.barrier()
    dist.destroy_process_group()


# -- the best ----------------------------------------------------------------------------------------------------------


def turned(rows: list[dict[str, str]], share: float) -> list[dict[str, str]]:
    """Preferences whose held-out part prefers the opposite: the better the training, the worse they get."""
    return [r | {"chosen": r["rejected"], "rejected": r["chosen"]} if held_out(r, share) else r for r in rows]


@pytest.fixture(scope="module")
def worsening(bench: Bench) -> tuple[Done, dict[int, dict[str, torch.Tensor]]]:
    """A training whose evaluations get worse, and its logits after each of its evaluations."""
    compute = replace(COMPUTE, checkpoint_every=3)
    task = bench.task("worse", {"steps": 30, "patience": 2}, rows=turned(ROWS, 0.25), compute=compute)
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def look(measured: dict[str, float]) -> None:
        data = open_store(bench.store).read(f"{task.state}/state.json")
        if data is not None:
            state = json.loads(data)
            whole = load_file(bench.work / "store" / task.state / state["file"])
            seen.setdefault(state["step"], {n: t for n, t in whole.items() if "/exp_avg" not in n})

    return trained(task, look), seen


def test_training_stops_after_patience_evaluations_without_a_better_one(worsening: tuple[Done, Any]) -> None:
    result = worsening[0].result
    assert result["best"]["step"] == 3
    assert result["steps"] == 9 == worsening[0].told[-1]["step"]


def test_mask_written_is_the_best_evaluations_and_not_the_last(bench: Bench, worsening: tuple[Done, Any]) -> None:
    done, seen = worsening
    found = bench.logits(done.task)
    assert set(seen) >= {3, 6}
    assert all(torch.equal(found[name], value) for name, value in seen[3].items())
    assert not all(torch.equal(found[name], value) for name, value in seen[6].items())


def test_training_that_holds_nothing_out_writes_its_last_mask(bench: Bench) -> None:
    task = bench.task("all", {"held_out": 0.0, "steps": 4}, ("lora",), mask="rank")
    done = trained(task)
    assert done.result["best"] is None and done.result["evaluations"] == []
    state = load_file(bench.work / "store" / task.state / "b.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in bench.logits(task).items())


def test_mask_over_the_divergence_limit_is_never_the_best(bench: Bench) -> None:
    """The loss falls while the divergence grows; a limit between two evaluations excludes the later."""
    wide = trained(bench.task("wide", {"divergence_max": 1e9})).result["evaluations"]
    grown = [e["divergence"] for e in wide]
    assert wide[-1]["loss"] < wide[0]["loss"] and grown[0] < grown[-1]
    limit = (grown[0] + grown[-1]) / 2.0
    narrow = trained(bench.task("narrow", {"divergence_max": limit})).result
    assert [e["divergence"] for e in narrow["evaluations"]] == grown
    allowed = [e for e in wide if e["divergence"] <= limit]
    assert narrow["best"] == min(allowed, key=lambda e: e["loss"])


# -- failures ----------------------------------------------------------------------------------------------------------


def test_loss_that_is_no_number_fails_and_names_the_update(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def failing(margin: torch.Tensor, beta: float) -> torch.Tensor:
        calls.append(1)
        return dpo_losses(margin, beta) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(fleet.masks.training, "dpo_losses", failing)
    with pytest.raises(StepFailedError, match=r"update 3 is nan; lower training\.learning_rate"):
        trained(bench.task("nan", {"held_out": 0.0}, ("lora",), mask="rank"))


def test_factor_mask_on_an_adapter_of_another_start_is_refused(bench: Bench) -> None:
    with pytest.raises(CheckpointError, match=r"models: stranger did not start from base\.safety \(the cosine"):
        trained(bench.task("stranger", {}, ("stranger",), mask="factor", safety=True))


def test_factor_mask_on_an_adapter_that_continues_is_learned(bench: Bench) -> None:
    task = bench.task("continued", {"steps": 1}, ("continued",), mask="factor", safety=True)
    trained(task)
    parts = {name.rsplit("/", 1)[1] for name in bench.logits(task)}
    assert parts == {"a", "b"}


# -- pieces ------------------------------------------------------------------------------------------------------------


def test_warm_up_is_at_most_a_fifth_of_the_updates_unless_it_is_given() -> None:
    """The published 320 updates and the demo's 120 warm up over 20, as ever; four start at their peak."""
    by_steps = {steps: MaskTraining(steps=steps).warmup_steps for steps in (1, 4, 10, 99, 100, 120, 320)}
    assert by_steps == {1: 0, 4: 0, 10: 2, 99: 19, 100: 20, 120: 20, 320: 20}
    assert MaskTraining(steps=4, warmup_steps=20).warmup_steps == 20
    assert learning_rate(MaskTraining(steps=4), 0) == MaskTraining().learning_rate
    assert MaskTraining.model_validate(MaskTraining(steps=10).model_dump()) == MaskTraining(steps=10)


def test_mask_that_hardly_moved_says_so() -> None:
    """From σ(0) = ½, a logit of 0.01 is 0.005 and so a hundredth of the mask's value; from σ(2) = 0.88 it is less."""
    assert "0.005 of themselves away from it" in (standstill(0.0, 0.01) or "")
    assert standstill(0.0, 0.03) is None
    assert standstill(2.0, 0.03) is not None


def test_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    training = MaskTraining(steps=8, warmup_steps=4, learning_rate=2.0)
    cosines = [0.5 * (1.0 + math.cos(math.pi * step / 8)) for step in range(8)]
    warm = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    expected = [2.0 * w * c for w, c in zip(warm, cosines, strict=True)]
    assert [learning_rate(training, step) for step in range(8)] == pytest.approx(expected)
    assert learning_rate(MaskTraining(steps=8, warmup_steps=0, learning_rate=2.0), 4) == pytest.approx(1.0)


@given(st.integers(1, 40), st.integers(1, 7), st.none() | st.integers(1, 9))
def test_shares_cover_a_batch_once_in_as_many_passes_on_every_worker(
    count: int, size: int, micro_batch: int | None
) -> None:
    indices = [10 * i for i in range(count)]
    shares = [
        [*fleet.masks.training._shares(indices, Group(rank, size, None), micro_batch)]  # pyright: ignore[reportPrivateUsage]
        for rank in range(size)
    ]
    passes = [[len(p) for p in share] for share in shares]
    assert all(p == passes[0] for p in passes)
    assert micro_batch is None or max(passes[0]) <= micro_batch
    weights: dict[int, float] = {}
    for share in shares:
        for index, weight in (item for p in share for item in p):
            weights[index] = weights.get(index, 0.0) + weight
    assert set(weights) == set(indices)
    assert all(weight == pytest.approx(1.0 / count) for weight in weights.values())


def test_rows_are_held_out_by_their_prompt(bench: Bench) -> None:
    train, out = split(ROWS, 0.25)
    assert sorted([*train, *out]) == [*range(24)] and 2 <= len(out) <= 12


def by_hand(folder: Path) -> torch.Tensor:
    """log π(reply | prompt) of all rows' chosen replies, and of the rejected: each text alone, in transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = torch.zeros(2, len(ROWS))
    for side, name in enumerate(("chosen", "rejected")):
        for index, row in enumerate(ROWS):
            prompt = tokenizer(f"<s><|user|>{row['prompt']}<|assistant|>", add_special_tokens=False)["input_ids"]
            reply = [*tokenizer(row[name], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            log = model(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
            found[side, index] = sum(float(log[len(prompt) - 1 + i, token]) for i, token in enumerate(reply))
    return found


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
