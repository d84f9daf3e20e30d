"""A model whose weights are θ = W + F({m ⊙ δ_t / mean(m)}), and whose gradients are those of the mask's logits.

W is the aligned model, δ_t the task vectors, m the mask and F the fusion, if the models are masked as they are fused.

The network is the plain transformers model, of any architecture, whole or sharded by FSDP2. Before each update its
weights are written anew from W, δ and a draw of the mask. While the backward pass runs, each weight's gradient is
turned into its logits' gradient, which Adam applies at once, and is freed. So the memory of a model's size is: θ, W
(as much as the weights' gradients would take), one δ, the logits, and Adam's two moments. A step costs what plain
training's does and some elementwise work, done in chunks that stay in cache.

A worker holds the rows of each tensor that FSDP2 gives it: of θ, W, δ, and of the logits that have the same rows. All
that it needs of the other workers' rows is the sum of their mask values, for the mean. Noise is a hash of an entry's
index, so a draw is the same however tensors are cut.

Where F is linear and one mask serves all models, Σ λ_t δ_t is added up once, before training, and masked as if it were
one model's task vector: then a fleet costs what one model does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.noise import NoiseKey, noise_key, uniform
from fleet.algebra.sparsify import Piece
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import Model, touched_tensors
from fleet.checkpoint.modules import is_transposed
from fleet.checkpoint.task_vectors import read_delta, read_factors, read_weight
from fleet.checkpoint.tensors import read_rows, read_tensor
from fleet.core.errors import CheckpointError
from fleet.fusion import AnyFusionMethod
from fleet.fusion.place import Place, places
from fleet.masks.concrete import draw_, floored, logit_gradient_, masked_weight_, relaxed, weighted_sum
from fleet.masks.files import SHARED
from fleet.masks.granularity import MASKS, Part
from fleet.methods.mask_spec import MaskSpec


@dataclass(frozen=True)
class MaskedMember:
    """One of the models whose task vectors are masked."""

    name: str
    model: Model


@dataclass(frozen=True)
class Group:
    """The workers that hold one model together, seen from one of them."""

    rank: int
    """This worker's number, from 0."""
    size: int
    mesh: DeviceMesh | None
    """None for one worker alone: nothing is sharded."""

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all workers. Differentiable; all workers have to take the gradient then."""
        if self.mesh is None:
            return value
        apply = cast("Callable[[torch.Tensor], torch.Tensor]", _Total.apply)  # pyright: ignore[reportUnknownMemberType] - torch leaves it untyped
        return apply(value)

    def rows(self, count: int) -> slice:
        """This worker's rows of a tensor with `count` rows, cut as FSDP2 does: even pieces, rounded up."""
        size = math.ceil(count / self.size)
        return slice(min(self.rank * size, count), min((self.rank + 1) * size, count))


class _Total(torch.autograd.Function):
    """The sum over all workers, on each of them.

    Every worker's loss depends on the sum, so the gradient of each summand is the sum of all workers' gradients.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)  # pyright: ignore[reportUnknownMemberType] - torch leaves its group untyped
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return _Total.forward(ctx, gradients[0])


ALONE = Group(0, 1, None)


@dataclass(eq=False)
class Logits:
    """One part of one tensor's mask: this worker's rows of it, with Adam's moments."""

    name: str
    """{owner}/{tensor}/{part}, as in the mask's file."""
    value: torch.Tensor
    """The logits, float32: this worker's rows."""
    part: Part
    """The whole part's shape."""
    start: int
    """Index of this worker's first entry in the whole part, flattened."""
    group: Group
    optimizer: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        self.value.requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.value], fused=True)

    @property
    def count(self) -> int:
        """Logits of the whole part."""
        return math.prod(self.part.shape)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over the whole part, given the sum over this worker's rows of it. Differentiable."""
        return self.group.total(value) if self.part.by_row else value

    def key(self, seed: int, step: int | None) -> NoiseKey | None:
        """Of the noise of one step's draw; None for the expected mask."""
        return None if step is None else noise_key(seed, step, self.name)

    def update(self, learning_rate: float, sparsity: float) -> None:
        """One step of Adam with the accumulated gradient, to which that of sparsity · Σ σ(x) is added."""
        if sparsity and self.value.grad is not None:
            keep = torch.sigmoid(self.value.detach())
            self.value.grad += sparsity * keep * (1.0 - keep)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()  # pyright: ignore[reportUnknownMemberType] - torch leaves its closure untyped
        self.value.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """What training continues from: the part's logits and Adam's moments by name, whole, on every worker."""
        moments = self.optimizer.state.get(self.value, {})
        zero = torch.zeros_like(self.value)
        local = {"": self.value.detach(), **{m: moments.get(m, zero) for m in ("exp_avg", "exp_avg_sq")}}
        return {f"{self.name}{'/' + m if m else ''}": self._gathered(v) for m, v in local.items()}

    def whole(self) -> torch.Tensor:
        """The logits of the whole part, on every worker."""
        return self._gathered(self.value.detach())

    def restore(self, read: Callable[[str, slice], torch.Tensor], step: int) -> None:
        """Go on from a saved state.

        Args:
            read: some rows of a tensor of the state, by the names of `state`.
            step: updates that were made before it was saved.
        """
        rows = self.group.rows(self.part.shape[0]) if self.part.by_row else slice(0, self.part.shape[0])
        with torch.no_grad():
            self.value.copy_(read(self.name, rows))
        moments = {m: read(f"{self.name}/{m}", rows).to(self.value.device) for m in ("exp_avg", "exp_avg_sq")}
        self.optimizer.state[self.value] = {"step": torch.tensor(float(step), device=self.value.device), **moments}

    def _gathered(self, local: torch.Tensor) -> torch.Tensor:
        if self.group.mesh is None or not self.part.by_row:
            return local
        shape = torch.Size(self.part.shape)
        stride = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(local, self.group.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return whole.full_tensor()


class MaskedModel:
    """A transformers model whose task vectors are masked.

    Args:
        network: built by `fleet.masks.network`, on the group's mesh if it has one.
        aligned: the aligned model, W.
        members: the models whose task vectors are masked, in the manifest's order.
        fusion: F, or None for one model by itself.
        method: the mask, and how it is learned.
        origin: what a factor mask reverts to.
        group: this worker's place among those that hold the network.

    Raises:
        CheckpointError: a model changed a tensor that the network has no parameter for, the models changed nothing at
            all, or their factors have unequal ranks and share a mask.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        aligned: FullModel,
        members: Sequence[MaskedMember],
        fusion: AnyFusionMethod | None,
        method: MaskSpec,
        origin: Adapter | None,
        group: Group,
    ) -> None:
        self.network = network
        self.method = method
        self.group = group
        self._aligned = aligned
        self._members = members
        self._fusion = fusion
        self._origin = origin
        self._places = places(aligned.tensors)
        self._parameters = named_parameters(network)
        self._learning_rate: float | None = None
        uses = [id(p) for _, p in network.named_parameters(remove_duplicate=False)]
        self._tied = {name for name, p in self._parameters.items() if uses.count(id(p)) > 1}
        touched = sorted({name for member in members for name in touched_tensors(member.model)})
        if missing := [name for name in touched if name not in self._parameters]:
            raise CheckpointError(
                f"{type(network).__name__} has no parameters named {', '.join(missing[:4])} ({len(missing)} in all): "
                "its checkpoint's tensors are not its parameters, so no mask can be learned over them"
            )
        built = (self._tensor(name) for name in touched)
        self.tensors: list[_MaskedTensor] = [tensor for tensor in built if tensor is not None]
        folded = [tensor for tensor in self.tensors if isinstance(tensor, _FoldedTensor)]
        scratch = torch.empty(max((t.weight.theta.numel() for t in folded), default=0), device=self.device)
        for tensor in folded:
            tensor.scratch = scratch
        for tensor in self.tensors:
            parameter = tensor.weight.parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(self._hook(tensor))  # pyright: ignore[reportUnknownMemberType] - torch leaves the hook untyped
        if not self.tensors:
            names = ", ".join(m.name for m in members)
            raise CheckpointError(f"models: {names}: the weights are the aligned model's, so there is nothing to mask")
        self._num_logits = sum(logits.count for logits in self.logits)

    @property
    def device(self) -> torch.device:
        return local(next(iter(self._parameters.values()))).device

    @property
    def logits(self) -> Iterator[Logits]:
        return (logits for tensor in self.tensors for logits in tensor.logits)

    def draw(self, step: int | None) -> float:
        """Write θ for one step's draw of the mask, or without a step for the expected mask, σ(x).

        Returns:
            The share kept: the mean mask value over all entries of the tensors that are masked.
        """
        kept = torch.zeros((), dtype=torch.float64, device=self.device)
        for tensor in self.tensors:
            kept += tensor.write(step)
        return float(self.group.total(kept)) / sum(math.prod(t.weight.shape) for t in self.tensors)

    def write_member(self, member: MaskedMember) -> None:
        """Write θ = W + δ_t: one fine-tuned model, unmasked."""
        for tensor in self.tensors:
            weight = tensor.weight
            found = self._task_vector(member.model, weight.name)
            with torch.no_grad():
                weight.theta.copy_(weight.base if found is None else weight.base.float() + found.rows.dense())

    def write_aligned(self) -> None:
        """Write θ = W."""
        with torch.no_grad():
            for tensor in self.tensors:
                tensor.weight.theta.copy_(tensor.weight.base)

    def backward(self, loss: torch.Tensor, learning_rate: float | None) -> None:
        """Add the loss's gradient to the logits' own; with a learning rate also let Adam apply it, and clear it.

        Each tensor is updated as soon as its gradient is there, so that no two tensors' gradients are in memory at the
        same time. Tied weights are updated at the end, because FSDP2 delivers a gradient for each of their uses.
        """
        self._learning_rate = learning_rate
        torch.autograd.backward(loss)
        for tensor in self.tensors:
            if tensor.weight.name in self._tied:
                self._update(tensor)

    # -- building ------------------------------------------------------------------------------------------------

    def _hook(self, tensor: _MaskedTensor) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            at_once = self._learning_rate is not None and tensor.weight.name not in self._tied
            tensor.add_gradients(local(parameter.grad), kept=not at_once)
            parameter.grad = None
            if at_once:
                self._update(tensor)

        return hook

    def _update(self, tensor: _MaskedTensor) -> None:
        if self._learning_rate is not None:
            for logits in tensor.logits:
                logits.update(self._learning_rate, self.method.training.sparsity_weight / self._num_logits)

    def _tensor(self, name: str) -> _MaskedTensor | None:
        """None where no model's task vector has an entry that isn't zero: there is nothing to mask."""
        found = {m.name: v for m in self._members if (v := self._task_vector(m.model, name)) is not None}
        changed = any(bool(v.rows.dense().any()) for v in found.values())
        if not float(self.group.total(torch.tensor(float(changed), device=self.device))):
            return None
        weight = self._weight(name)
        place, names = self._places[name], [m.name for m in self._members]
        coefficients = self._fusion.coefficients(names, place) if self._fusion else dict.fromkeys(names, 1.0)
        folds = self._folds
        if folds:
            zero = torch.zeros_like(weight.base).float()
            folded = sum((v.rows.dense() * coefficients[model] for model, v in found.items()), zero)
            found = {SHARED: _TaskVector(Dense(folded.to(weight.base.dtype)), _shape_only(weight.shape))}
        deltas, masks = {model: v.rows for model, v in found.items()}, self._masks(name, found)
        if folds and self.method.mask == "dense":
            return _FoldedTensor(weight, self.method, deltas, masks)
        return _FusedTensor(
            weight,
            self.method,
            deltas,
            masks,
            fusion=None if folds else self._fusion,
            coefficients=coefficients,
            origin=self._origin_rows(name, weight.rows),
            piece=Piece(weight.start, self.group.total),
            place=place,
        )

    @property
    def _shared(self) -> bool:
        """Whether one mask serves all models."""
        return len(self._members) == 1 or self.method.shared

    @property
    def _folds(self) -> bool:
        """Whether the mask of the sum of all task vectors is the sum of the masked ones."""
        linear = self._fusion is None or self._fusion.is_linear
        return linear and self._shared and self.method.mask in ("dense", "rows_and_columns")

    def _weight(self, name: str) -> _Weight:
        shape = tuple(self._aligned.tensors[name].shape)
        rows = self.group.rows(shape[0])
        parameter = self._parameters[name]
        theta = local(parameter)
        assert tuple(theta.shape) == (rows.stop - rows.start, *shape[1:]), f"{name}: FSDP2 cut it in another way"
        return _Weight(name, shape, rows, parameter, theta, base=theta.clone())

    def _masks(self, name: str, found: Mapping[str, _TaskVector]) -> dict[str, dict[str, Logits]]:
        """Model -> part -> its logits, which are the same objects where models share a mask."""
        by_owner: dict[str, dict[str, Logits]] = {}
        owners = {model: SHARED if self._shared else model for model in found}
        for model, owner in owners.items():
            parts = MASKS[self.method.mask].parts(found[model].whole)
            if owner not in by_owner:
                by_owner[owner] = {p: self._logits(f"{owner}/{name}/{p}", part) for p, part in parts.items()}
            elif any(by_owner[owner][p].part != part for p, part in parts.items()):
                raise CheckpointError(
                    f"{name}: the models' task vectors have factors of unequal ranks, so they can't share a "
                    f"{self.method.mask} mask; set shared to false, or use dense"
                )
        return {model: by_owner[owner] for model, owner in owners.items()}

    def _logits(self, name: str, part: Part) -> Logits:
        rows = self.group.rows(part.shape[0]) if part.by_row else slice(0, part.shape[0])
        shape = (rows.stop - rows.start, *part.shape[1:])
        value = torch.full(shape, self.method.initial_logit, device=self.device)
        return Logits(name, value, part, rows.start * math.prod(part.shape[1:]), self.group)

    def _task_vector(self, model: Model, name: str) -> _TaskVector | None:
        """None where the model has no task vector in this tensor."""
        shape = tuple(self._aligned.tensors[name].shape)
        rows = self.group.rows(shape[0])
        delta = self._delta(model, name, rows)
        if delta is None:
            return None
        if isinstance(delta, LowRank):
            delta = MASKS[self.method.mask].prepared(delta)
            assert isinstance(delta, LowRank)
            return _TaskVector(LowRank(delta.b[rows].to(self.device), delta.a.to(self.device)), delta)
        return _TaskVector(Dense(delta.value.to(self.device)), _shape_only(shape))

    def _delta(self, model: Model, name: str, rows: slice) -> Delta | None:
        """A task vector with the axes that the checkpoint holds: a LoRA's whole, of a dense one these rows.

        None where the model has none in this tensor.
        """
        if isinstance(model, FullModel):
            return Dense(stored_rows(model, name, rows) - stored_rows(self._aligned, name, rows))
        turned = is_transposed(self._aligned, name)
        if model.is_lora:
            low_rank = read_factors(model, name)
            return low_rank.transposed() if low_rank is not None and turned else low_rank
        delta = read_delta(model, name, read_weight(self._aligned, name))
        if delta is None:
            return None
        return Dense((delta.transposed() if turned else delta).dense()[rows])

    def _origin_rows(self, name: str, rows: slice) -> Delta | None:
        if self._origin is None:
            return None
        origin = self._delta(self._origin, name, rows)
        if origin is None:
            return None
        assert isinstance(origin, LowRank), "planning takes a LoRA alone for a safety adapter"
        return LowRank(origin.b[rows].to(self.device), origin.a.to(self.device))


class _TaskVector(NamedTuple):
    """One model's task vector in one tensor, in the form that the mask is defined on."""

    rows: Delta
    """This worker's rows, with their values."""
    whole: Delta
    """Of the whole tensor's shape, which its logits go by; a dense one has no values."""


@dataclass(frozen=True, eq=False)
class _Weight:
    """One weight of the network that is masked."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    rows: slice
    """Those of this worker."""
    parameter: torch.Tensor
    """The network's parameter, sharded if the group has a mesh."""
    theta: torch.Tensor
    """θ: this worker's rows of the parameter, in its memory."""
    base: torch.Tensor
    """W: the same rows of the aligned model."""

    @property
    def start(self) -> int:
        """Index of this worker's first entry in the whole tensor, flattened."""
        return self.rows.start * math.prod(self.shape[1:])


@dataclass(eq=False)
class _MaskedTensor:
    """One weight under its mask."""

    weight: _Weight
    method: MaskSpec
    deltas: dict[str, Delta]
    """Model -> this worker's rows of its task vector; `SHARED` -> their sum, where that is masked."""
    masks: dict[str, dict[str, Logits]]
    """Model -> part -> its logits, for the models of `deltas`."""

    @property
    def logits(self) -> list[Logits]:
        """Those of all parts and models; logits that models share are there once."""
        found = {logits.name: logits for parts in self.masks.values() for logits in parts.values()}
        return [*found.values()]

    def write(self, step: int | None) -> torch.Tensor:
        """Write θ for one step's draw of the mask, or for the expected mask without a step.

        Returns:
            Entries kept among this worker's: its mask values, summed; a float64 scalar.
        """
        raise NotImplementedError

    def add_gradients(self, gradient: torch.Tensor, kept: bool) -> None:
        """Add ∂L/∂x to the logits' gradients, for the mask that was written last.

        Args:
            gradient: ∂L/∂θ of this worker's rows.
            kept: whether the logits' gradients are still needed when the next tensor's are computed; if not, they may
                be in scratch memory, which that overwrites.
        """
        raise NotImplementedError


@dataclass(eq=False)
class _FoldedTensor(_MaskedTensor):
    """One dense mask on one dense task vector: θ = W + m ⊙ δ / mean(m), with its gradient in closed form, in chunks."""

    step: int | None = None
    """Of the draw that θ holds."""
    mean: float = 1.0
    """mean(m) of that draw, over the whole tensor."""
    scratch: torch.Tensor = field(init=False)
    """Memory for mask values, float32, at least as many as this worker's entries; all tensors share it."""

    def __post_init__(self) -> None:
        (delta,) = self.deltas.values()
        dense = delta.dense().to(self.weight.base.dtype).contiguous()
        self.deltas = {name: Dense(dense) for name in self.deltas}
        self._delta = dense.view(-1)
        (self._logits,) = self.logits

    def write(self, step: int | None) -> torch.Tensor:
        self.step = step
        values, kept = self._draw()
        mean = self._logits.total(kept) / self._logits.count
        self.mean = float(floored(mean, self._logits.count))
        theta, base = self.weight.theta.view(-1), self.weight.base.view(-1)
        masked_weight_(theta, base, self._delta, values, 1.0 / self.mean)
        return kept

    def add_gradients(self, gradient: torch.Tensor, kept: bool) -> None:
        values, summed = self._draw()
        flat, total = gradient.reshape(-1), float(self._logits.total(summed))
        centre = 0.0
        if total >= 1.0:  # below 1 the mean is at its floor, a constant
            centre = float(self._logits.total(weighted_sum(flat, self._delta, values))) / total
        logit_gradient_(values, flat, self._delta, centre, 1.0 / (self.mean * self.method.temperature))
        leaf = self._logits.value
        found = values.view(leaf.shape)
        if leaf.grad is None:
            leaf.grad = found.clone() if kept else found
        else:
            leaf.grad.add_(found)

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This worker's mask values, in scratch memory, and their sum."""
        logits = self._logits
        values = self.scratch[: self.weight.theta.numel()]
        key = logits.key(self.method.training.seed, self.step)
        kept = draw_(values, logits.value.detach().view(-1), logits.start, key, self.method.temperature)
        return values, kept


@dataclass(eq=False)
class _FusedTensor(_MaskedTensor):
    """Any mask on any task vectors through any fusion; the gradient of this one tensor is taken by autograd."""

    _: KW_ONLY
    fusion: AnyFusionMethod | None
    """None for a single task vector, which is masked as it is."""
    coefficients: Mapping[str, float]
    """Model -> λ_t."""
    origin: Delta | None
    """What a factor mask reverts to, in this worker's rows."""
    piece: Piece
    place: Place
    step: int | None = None
    """Of the draw that θ holds."""

    def write(self, step: int | None) -> torch.Tensor:
        self.step = step
        with torch.no_grad():
            values = self._values()
            self.weight.theta.copy_(self._theta(values))
            # Several parts or models have a value each for one entry; what is kept of it is taken to be their mean.
            shares = [v.mean(dtype=torch.float64) for v in values.values()]
        return torch.stack(shares).mean() * self.weight.theta.numel()

    def add_gradients(self, gradient: torch.Tensor, kept: bool) -> None:
        leaves = [logits.value for logits in self.logits]
        with torch.enable_grad():
            theta = self._theta(self._values())
            found = torch.autograd.grad(theta, leaves, gradient.to(theta.dtype))
        for logits, new in zip(self.logits, found, strict=True):
            if not logits.part.by_row:
                new = logits.group.total(new)
            logits.value.grad = new if logits.value.grad is None else logits.value.grad.add_(new)

    def _values(self) -> dict[str, torch.Tensor]:
        """Logits' name -> this worker's mask values, differentiable in the logits."""
        found: dict[str, torch.Tensor] = {}
        for logits in self.logits:
            key = logits.key(self.method.training.seed, self.step)
            if key is None:
                found[logits.name] = torch.sigmoid(logits.value)
            else:
                noise = uniform(key, logits.start, logits.value.numel(), logits.value.device)
                found[logits.name] = relaxed(logits.value, noise.view(logits.value.shape), self.method.temperature)
        return found

    def _theta(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """θ in float32, differentiable in the mask values."""
        mask = MASKS[self.method.mask]
        masked: dict[str, Delta] = {}
        for model, delta in self.deltas.items():
            scaled: dict[str, torch.Tensor] = {}
            for part, logits in self.masks[model].items():
                value = values[logits.name]
                mean = logits.total(value.sum()) / logits.count
                scaled[part] = value / floored(mean, logits.count)
            masked[model] = mask.masked(delta, scaled, self.origin)
        if self.fusion is None:
            (fused,) = masked.values()
        else:
            fused = self.fusion.fuse(masked, self.coefficients, self.place, self.piece)
        return self.weight.base.float() + fused.dense()


def _shape_only(shape: tuple[int, ...]) -> Dense:
    """A dense task vector of a shape, without values or memory."""
    return Dense(torch.empty(shape, device="meta"))


def named_parameters(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name, which is their tensor's name in the checkpoint; FSDP2 changes no names."""
    return dict(network.named_parameters())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's rows of a tensor, all of one that isn't sharded; they share its memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def stored_rows(model: FullModel, name: str, rows: slice) -> torch.Tensor:
    """Rows of a full model's tensor, with the axes that the checkpoint holds, float32. Only they are read."""
    info = model.tensors[name]
    if len(info.shape) < 2:
        return read_tensor(model.folder, info).float()[rows]
    inner = math.prod(info.shape[1:-1])
    values = read_rows(model.folder, info, rows.start * inner, rows.stop * inner)
    return values.float().reshape(rows.stop - rows.start, *info.shape[1:])
