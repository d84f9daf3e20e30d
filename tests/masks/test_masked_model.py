"""A model under a mask: what it writes, its gradients against finite differences, and several workers against one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from fleet.algebra.delta import Delta
from fleet.algebra.noise import noise_key, uniform
from fleet.algebra.sparsify import WHOLE
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import Model, read_model, require_full_model
from fleet.checkpoint.task_vectors import read_delta, read_factors, read_weight
from fleet.core.errors import CheckpointError
from fleet.fusion import AnyFusionMethod, Dare, Karcher, Sce, TaskArithmetic, Ties, WeightAverage
from fleet.fusion.place import places
from fleet.masks.learned import open_mask
from fleet.masks.masked_model import ALONE, Group, MaskedMember, MaskedModel
from fleet.masks.network import build_network
from fleet.methods import Somf
from fleet.store import open_folder
from tests.catalogue import make_continued
from tests.pico import VOCAB_SIZE, make_gpt2, make_model
from tests.work.test_workers import merged_weights, weights_of

pytestmark = pytest.mark.slow  # a training in small: every part of its forward and backward pass

CPU = torch.device("cpu")
TOKENS = torch.randint(6, VOCAB_SIZE, (6, 5), generator=torch.Generator().manual_seed(0))
"""Six texts: as many for each of one, two or three workers."""
STEP = 3
TEMPERATURE = 0.5


@dataclass(frozen=True)
class Case:
    """Some models under one mask."""

    mask: str
    names: tuple[str, ...]
    fusion: AnyFusionMethod | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    safety: bool = False

    @property
    def method(self) -> Somf:
        learn_on = "model" if self.fusion is None else "fusion"
        return Somf.model_validate(
            {"method": "somf", "preferences": "x", "mask": self.mask, "learn_on": learn_on, **self.settings}
        )


APART = {"shared": False}
CASES: dict[str, Case] = {
    "lora-dense": Case("dense", ("lora",)),
    "lora-rows": Case("rows_and_columns", ("lora",)),
    "lora-rank": Case("rank", ("lora",)),
    "lora-factor": Case("factor", ("lora",), settings={"independent_adapters": True}),
    "continued-factor": Case("factor", ("continued",), safety=True),
    "full-dense": Case("dense", ("full",)),
    "full-rows": Case("rows_and_columns", ("full",)),
}
FLEETS: dict[str, Case] = {
    "average-dense": Case("dense", ("lora", "full"), WeightAverage(method="weight_average", weights={"full": 3.0})),
    "average-rows": Case("rows_and_columns", ("lora", "rslora", "full"), WeightAverage(method="weight_average")),
    "arithmetic-dense": Case("dense", ("lora", "full"), TaskArithmetic(method="task_arithmetic", scale=0.7), APART),
    "arithmetic-rank": Case("rank", ("lora", "rslora"), TaskArithmetic(method="task_arithmetic"), APART),
    "ties-dense": Case("dense", ("lora", "full"), Ties(method="ties", density=0.5), APART),
    "ties-shared": Case("dense", ("lora", "rslora", "full"), Ties(method="ties", density=0.5)),
    "dare-dense": Case("dense", ("rslora", "lora"), Dare(method="dare", drop_rate=0.3), APART),
    "sce-dense": Case("dense", ("lora", "full"), Sce(method="sce"), APART),
    "karcher-rank": Case("rank", ("lora", "rslora"), Karcher(method="karcher"), APART),
}
SHARDED = {
    name: (CASES | FLEETS)[name]
    for name in (
        "full-dense", "full-rows", "lora-rank", "continued-factor", "average-dense", "ties-dense", "ties-shared",
        "dare-dense", "sce-dense", "karcher-rank",
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def root(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalogue, and an adapter that continues its safety adapter."""
    folder = tmp_path_factory.mktemp("masked")
    for name in ("aligned", "safety", "lora", "rslora", "full"):
        (folder / name).symlink_to(catalogue / name)
    make_continued(folder / "continued", catalogue / "safety", 5)
    return folder


def opened(folder: Path) -> Model:
    return read_model(open_folder(str(folder)))


def aligned_model(folder: Path) -> FullModel:
    return require_full_model(opened(folder), str(folder))


def masked_model(
    root: Path, case: Case, group: Group = ALONE, dtype: torch.dtype = torch.float32, **changes: Any
) -> MaskedModel:
    aligned = aligned_model(root / "aligned")
    network = build_network(aligned, dtype, CPU, group, False)
    members = [MaskedMember(name, opened(root / name)) for name in case.names]
    origin = opened(root / "safety") if case.safety else None
    assert origin is None or isinstance(origin, Adapter)
    method = case.method.model_copy(update=changes)
    return MaskedModel(network, aligned, members, case.fusion, method, origin, group)


def loss_of(model: MaskedModel) -> torch.Tensor:
    """What the next token is told to be, of this worker's texts; a mean over those of all workers."""
    group = model.group
    texts = TOKENS[group.rank :: group.size]
    log_probs = model.network(input_ids=texts).logits.log_softmax(-1)
    return -log_probs[..., 10].mean(dim=1).sum() / len(TOKENS)


def gradients(model: MaskedModel) -> dict[str, torch.Tensor]:
    """∂L/∂x of every part, taken before any update."""
    model.draw(STEP)
    model.backward(loss_of(model), None)
    found: dict[str, torch.Tensor] = {}
    for logits in model.logits:
        assert logits.value.grad is not None
        found[logits.name] = logits.value.grad
    return found


def weights_now(model: MaskedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().float().clone() for name, p in model.network.named_parameters()}


def finetuned_weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    """A fine-tuned model's weights, by PEFT's own route or from its own files."""
    if (root / name / "adapter_config.json").exists():
        return {n: t.float() for n, t in merged_weights(root / "aligned", root / name).items()}
    return {n: t.float() for n, t in weights_of(root / name).items()}


def stirred(model: MaskedModel, scale: float = 1.0) -> MaskedModel:
    """Give every logit a value of its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for logits in model.logits:
            logits.value.copy_(torch.randn(logits.value.shape, generator=generator) * scale)
    return model


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied in two shards", "untied", "with biases", "gpt2", "checkpointing activations"])
def test_network_built_from_a_checkpoint_computes_what_transformers_does(tmp_path: Path, kind: str) -> None:
    """GPT-2 has Conv1Ds and dropout, which a network in training mode would show."""
    folder = tmp_path / "model"
    if kind == "gpt2":
        make_gpt2(folder, 1)
    else:
        make_model(folder, 1, shards=2, tie=kind != "untied", attention_bias=kind == "with biases")
    network = build_network(aligned_model(folder), torch.float32, CPU, ALONE, kind.startswith("checkpointing"))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(network(input_ids=TOKENS).logits, reference(input_ids=TOKENS).logits)
    assert not any(p.requires_grad for p in network.parameters())


def test_network_of_a_checkpoint_with_other_names_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", 1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.scale"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"needs model\.norm\.weight \(1 in all\)"):
        build_network(aligned_model(folder), torch.float32, CPU, ALONE, False)


def test_network_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(CheckpointError, match="can't build a 'nonsense'"):
        build_network(aligned_model(folder), torch.float32, CPU, ALONE, False)


def test_task_vector_in_a_tensor_the_network_has_not_is_refused(root: Path, tmp_path: Path) -> None:
    """A checkpoint may hold more than its network does, as long as no model moves it."""
    for name in ("aligned", "full"):
        shutil.copytree(root / name, tmp_path / name)
        file = next((tmp_path / name).glob("*.safetensors"))
        save_file({**load_file(file), "model.extra": torch.ones(2)}, file, metadata={"format": "pt"})
        index = tmp_path / name / "model.safetensors.index.json"
        if index.exists():
            listed = json.loads(index.read_text())
            listed["weight_map"]["model.extra"] = file.name
            index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=r"no parameters named model\.extra"):
        masked_model(tmp_path, Case("dense", ("full",)))


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", [0.0, 1.5])
@pytest.mark.parametrize("name", CASES)
def test_uniform_mask_leaves_the_fine_tuned_model_as_it_is(root: Path, name: str, initial: float) -> None:
    """All entries are kept alike, and the rescaling undoes by how much."""
    case = CASES[name]
    model = masked_model(root, case, initial_logit=initial)
    share = model.draw(None)
    assert share == pytest.approx(1.0 / (1.0 + math.exp(-initial)), rel=1e-6)
    found = weights_now(model)
    for tensor, expected in finetuned_weights(root, case.names[0]).items():
        if tensor in found:
            torch.testing.assert_close(found[tensor], expected, rtol=1e-4, atol=2e-6, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", CASES | FLEETS)
def test_draw_is_the_same_twice_and_another_at_another_step(root: Path, name: str) -> None:
    model = stirred(masked_model(root, (CASES | FLEETS)[name]))
    shares = [model.draw(3)]
    first = weights_now(model)
    shares.append(model.draw(4))
    second = weights_now(model)
    shares.append(model.draw(3))
    again = weights_now(model)
    moved = {t.weight.name for t in model.tensors}
    assert moved and all(torch.equal(first[t], again[t]) for t in first)
    assert all(torch.equal(first[t], second[t]) == (t not in moved) for t in first)
    assert shares[0] == shares[2] != shares[1]


@pytest.mark.parametrize("name", ["full-dense", "lora-dense"])
def test_drawn_dense_mask_is_the_equation(root: Path, name: str) -> None:
    """θ = W + m ⊙ δ / mean(m) with m = σ((x + log u − log(1 − u)) / λ), tensor by tensor, and the share kept."""
    case = CASES[name]
    model = stirred(masked_model(root, case))
    share = model.draw(STEP)
    found = weights_now(model)
    base, tuned = (
        finetuned_weights(root, "aligned"),
        finetuned_weights(root, case.names[0]),
    )
    kept = entries = 0.0
    for logits in model.logits:
        tensor = logits.name.split("/")[1]
        noise = uniform(noise_key(0, STEP, logits.name), 0, logits.count).view(logits.value.shape).double()
        mask = torch.sigmoid((logits.value.detach() + (noise / (1 - noise)).log()) / TEMPERATURE)
        expected = base[tensor] + mask * (tuned[tensor] - base[tensor]) / mask.mean()
        torch.testing.assert_close(found[tensor].double(), expected, rtol=1e-4, atol=5e-6)
        kept, entries = kept + float(mask.sum()), entries + mask.numel()
    assert share == pytest.approx(kept / entries, rel=1e-5)


@pytest.mark.parametrize("name", CASES | FLEETS)
def test_mask_learned_is_the_mask_applied(root: Path, tmp_path: Path, name: str) -> None:
    """Expected masks in training, and the same logits from the store on each model and fused afterwards."""
    case = (CASES | FLEETS)[name]
    model = stirred(masked_model(root, case))
    model.draw(None)
    found = weights_now(model)
    save_file({logits.name: logits.whole() for logits in model.logits}, tmp_path / "mask.safetensors")
    (tmp_path / "mask.json").write_text(json.dumps({"mask": case.mask}))
    mask, method = open_mask(str(tmp_path)), case.method.model_copy(update={"hardening": "expected"})
    aligned, safety = aligned_model(root / "aligned"), opened(root / "safety")
    assert isinstance(safety, Adapter)
    for tensor in aligned.tensors:
        base, masked = read_weight(aligned, tensor), dict[str, Delta]()
        for member in case.names:
            delta = read_delta(opened(root / member), tensor, base)
            if delta is not None:
                origin = read_factors(safety, tensor) if case.safety else None
                masked[member] = mask.apply(method, member, tensor, delta, origin)
        if masked and case.fusion is not None:
            place = places(aligned.tensors)[tensor]
            weights = case.fusion.coefficients(case.names, place)
            expected = base + case.fusion.fuse(masked, weights, place, WHOLE).dense()
        else:
            expected = base + masked[case.names[0]].dense() if masked else base
        torch.testing.assert_close(found[tensor], expected.float(), rtol=1e-4, atol=5e-6)


def test_written_member_and_aligned_are_the_models_as_they_came(root: Path) -> None:
    """In a fleet, each member by itself, wherever the mask stands."""
    case = FLEETS["ties-dense"]
    model = stirred(masked_model(root, case))
    for name in (*case.names, "aligned"):
        model.draw(STEP)
        if name == "aligned":
            model.write_aligned()
        else:
            model.write_member(MaskedMember(name, opened(root / name)))
        found = weights_now(model)
        for tensor, expected in finetuned_weights(root, name).items():
            if tensor in found:
                torch.testing.assert_close(found[tensor], expected, rtol=1e-4, atol=2e-6)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES | FLEETS)
def test_gradient_of_every_part_is_the_finite_difference(root: Path, name: str) -> None:
    """The loss's change when the steepest logit of a part moves, and when all of them do, each its own way.

    All of them only where F is smooth: TIES' trim, and its and SCE's signs, are steps, which some of many logits would
    cross.
    """
    case = (CASES | FLEETS)[name]
    model = stirred(masked_model(root, case, dtype=torch.float64), 0.5)
    found = gradients(model)
    generator = torch.Generator().manual_seed(2)
    steepest = max(float(g.abs().max()) for g in found.values())
    checked = 0
    for logits in model.logits:
        gradient = found[logits.name]
        one = torch.zeros_like(gradient).flatten()
        one[gradient.abs().argmax()] = 1.0
        directions = [(one.view_as(gradient), 0.004)]
        if not isinstance(case.fusion, (Ties, Sce)):
            every = torch.randn(gradient.shape, generator=generator)
            directions.append((every / every.norm(), 0.02))
        for direction, size in directions:
            expected = float((gradient * direction).sum())
            measured = _central_difference(model, logits.value, direction, size)
            assert measured == pytest.approx(expected, rel=0.02, abs=3e-4 * steepest), logits.name
            checked += 1
    assert checked >= len(found)


@pytest.mark.parametrize("name", ["arithmetic-dense", "arithmetic-rank", "ties-dense", "dare-dense"])
def test_gradient_reaches_every_models_own_logits(root: Path, name: str) -> None:
    """Released code's TIES wrote through `.data`, so that only the first task's mask ever learned anything."""
    case = FLEETS[name]
    found = gradients(masked_model(root, case))
    for member in case.names:
        mine = [g for n, g in found.items() if n.startswith(f"{member}/")]
        assert len(mine) == len({n for n in found if n.startswith(f"{member}/")}) > 0
        assert all(float(g.abs().max()) > 0.0 for g in mine)


def test_gradients_of_two_passes_add_up(root: Path) -> None:
    for name in ("full-dense", "lora-rank"):
        model = masked_model(root, CASES[name])
        once = {n: g.clone() for n, g in gradients(model).items()}
        model.backward(loss_of(model) * 2.0, None)
        for logits in model.logits:
            torch.testing.assert_close(logits.value.grad, once[logits.name] * 3.0)


def test_update_is_adams_own(root: Path) -> None:
    """Three updates by torch's Adam on leaves of ours, from the gradients of each; with the sparsity's own term."""
    case = CASES["lora-rank"]
    method = case.method
    weighted = method.model_copy(update={"training": method.training.model_copy(update={"sparsity_weight": 2.0})})
    model, probe = (masked_model(root, case, training=weighted.training) for _ in range(2))
    leaves = {logits.name: logits.value.detach().clone().requires_grad_() for logits in probe.logits}
    adam = torch.optim.Adam(leaves.values(), lr=0.1)
    count = sum(leaf.numel() for leaf in leaves.values())
    for step in range(3):
        model.draw(step)
        model.backward(loss_of(model), 0.1)
        probe.draw(step)
        probe.backward(loss_of(probe), None)
        for logits in probe.logits:
            (pressed,) = torch.autograd.grad(2.0 * torch.sigmoid(logits.value).sum() / count, logits.value)
            assert logits.value.grad is not None
            leaves[logits.name].grad = logits.value.grad + pressed
            logits.value.grad = None
        adam.step()
        with torch.no_grad():
            for logits in probe.logits:
                logits.value.copy_(leaves[logits.name])
        for logits in model.logits:
            assert logits.value.grad is None
            torch.testing.assert_close(logits.value.detach(), leaves[logits.name].detach(), rtol=1e-4, atol=1e-5)


def test_linear_fleet_with_one_mask_holds_one_task_vector_and_has_the_general_routes_gradients(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = FLEETS["average-dense"]
    folded = stirred(masked_model(root, case))
    found = gradients(folded)
    touched = set(aligned_model(root / "full").tensors)
    assert all(list(t.deltas) == ["*"] for t in folded.tensors)
    assert set(found) <= {f"*/{t}/entries" for t in touched}
    monkeypatch.setattr(WeightAverage, "is_linear", property(lambda self: False))
    general = stirred(masked_model(root, case))
    assert any(set(t.deltas) == {"lora", "full"} for t in general.tensors)
    for name, gradient in gradients(general).items():
        assert _relative(found[name], gradient) < 1e-5, name


def test_ranks_that_differ_cannot_share_a_factor_mask(root: Path) -> None:
    case = Case(
        "factor", ("lora", "rslora"), WeightAverage(method="weight_average"), {"independent_adapters": True}
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="unequal ranks"):
        masked_model(root, case)


# -- several workers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the states that three workers, and two, came to: `{case}-{workers}.safetensors`."""
    out = tmp_path_factory.mktemp("sharded")
    mp.spawn(_worker, (str(root), str(out)), nprocs=3)
    return out


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("name", SHARDED)
def test_workers_come_to_the_gradients_of_one(root: Path, sharded: Path, name: str, workers: int) -> None:
    """By Adam's first moment, a tenth of the gradient that was applied; 32 hidden units are no multiple of three.

    The logits themselves say less: after one update each has moved by the learning rate's size, whatever its gradient.
    """
    found = load_file(sharded / f"{name}-{workers}.safetensors")
    alone = masked_model(root, SHARDED[name])
    expected = {n: g * 0.1 for n, g in gradients(stirred(alone)).items()}
    scale = max(float(g.abs().max()) for g in expected.values())
    assert {n for n in found if n.endswith("/exp_avg")} == {f"{n}/exp_avg" for n in expected}
    for part, gradient in expected.items():
        moment = found[f"{part}/exp_avg"]
        assert moment.shape == gradient.shape
        assert float((moment - gradient).norm()) < 3e-5 * float(gradient.norm()) + 1e-7 * scale, part


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("name", SHARDED)
def test_workers_keep_the_share_that_one_does(root: Path, sharded: Path, name: str, workers: int) -> None:
    alone = stirred(masked_model(root, SHARDED[name]))
    found = load_file(sharded / f"{name}-{workers}.safetensors")
    assert float(found["share"]) == pytest.approx(alone.draw(STEP), rel=1e-6)
    assert float(found["expected share"]) == pytest.approx(alone.draw(None), rel=1e-6)


def _worker(rank: int, root: str, out: str) -> None:
    """One of three workers, then of two: the third goes home."""
    torch.set_num_threads(1)
    for size in (3, 2):
        if rank >= size:
            continue
        dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous-{size}", rank=rank, world_size=size)
        group = Group(rank, size, init_device_mesh("cpu", (size,)))
        for name, case in SHARDED.items():
            model = masked_model(Path(root), case, group)
            _take_rows(model, stirred(masked_model(Path(root), case)))
            expected = model.draw(None)
            share = model.draw(STEP)
            model.backward(loss_of(model) * size, 1e-3)  # FSDP2 averages over the workers
            state: dict[str, torch.Tensor] = {}
            for logits in model.logits:
                state |= {n: t.clone() for n, t in logits.state().items()}
            if rank == 0:
                shares = {"share": torch.tensor(share), "expected share": torch.tensor(expected)}
                save_file(state | shares, Path(out, f"{name}-{size}.safetensors"))
        dist.barrier()
        dist.destroy_process_group()


def _take_rows(model: MaskedModel, whole: MaskedModel) -> None:
    """Give a worker its rows of the logits of a model that is alone."""
    values = {logits.name: logits.value.detach() for logits in whole.logits}
    with torch.no_grad():
        for logits in model.logits:
            flat = values[logits.name].flatten()[logits.start : logits.start + logits.value.numel()]
            logits.value.copy_(flat.view_as(logits.value))


def _central_difference(model: MaskedModel, value: torch.Tensor, direction: torch.Tensor, size: float) -> float:
    """The loss's slope along a direction, at the same draw."""
    before = value.detach().clone()
    losses: list[float] = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            value.copy_(before + sign * size * direction)
            model.draw(STEP)
            losses.append(float(loss_of(model)))
        value.copy_(before)
    return (losses[0] - losses[1]) / (2.0 * size)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
