"""A model whose weights are θ = W + F({m ⊙ δ_t / mean(m)}), and whose gradient ends in the mask's logits.

The network is the plain transformers model, of any architecture, whole or sharded by FSDP2. Before each update its
weights are written anew from W, δ and a draw of the mask; while the backward pass runs, each weight's gradient is
turned into that of its logits, applied by Adam, and let go. So beside the weights there are W in place of their
gradients, one δ, the logits and Adam's two moments, and nothing else of the model's size; and a step costs a plain
one and some elementwise work, done in chunks that stay in cache.

A worker holds the rows of each tensor that FSDP2 gives it: of θ, W, δ and of the logits that go by row. What a row
needs of the others is a sum: of mask values, for their mean. Noise is a hash of an entry's index, so how tensors are
cut changes no draw.

Where F is linear and one mask serves all models, Σ λ_t δ_t is folded once, so a fleet costs what one model does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    """The workers that hold one model together."""

    rank: int
    size: int
    mesh: DeviceMesh | None

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all workers."""
        if self.mesh is not None:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def rows(self, count: int) -> slice:
        """This worker's rows of a tensor that has `count`, as FSDP2 cuts it: even pieces, rounded up."""
        size = math.ceil(count / self.size)
        return slice(min(self.rank * size, count), min((self.rank + 1) * size, count))


ALONE = Group(0, 1, None)


@dataclass(eq=False)
class Logits:
    """One part of one tensor's mask: this worker's rows of it, with Adam's moments."""

    name: str
    value: torch.Tensor
    """float32, of this worker's shape."""
    part: Part
    start: int
    """Index of its first entry in the whole part."""
    group: Group
    optimizer: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        self.value.requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.value], fused=True)

    @property
    def count(self) -> int:
        return math.prod(self.part.shape)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """A sum over all of the part's entries from that over this worker's."""
        return self.group.total(value) if self.part.by_row else value

    def key(self, seed: int, step: int | None) -> NoiseKey | None:
        return None if step is None else noise_key(seed, step, self.name)

    def update(self, learning_rate: float, sparsity: float) -> None:
        """One step of Adam on the gradient that has come together; with it goes that of sparsity · Σ σ(x)."""
        if sparsity and self.value.grad is not None:
            keep = torch.sigmoid(self.value.detach())
            self.value.grad += sparsity * keep * (1.0 - keep)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.value.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """What training continues from, by name: logits and Adam's moments, whole, on every worker."""
        moments = self.optimizer.state.get(self.value, {})
        zero = torch.zeros_like(self.value)
        local = {"": self.value.detach(), **{m: moments.get(m, zero) for m in ("exp_avg", "exp_avg_sq")}}
        return {f"{self.name}{'/' + m if m else ''}": self._gathered(v) for m, v in local.items()}

    def whole(self) -> torch.Tensor:
        """The logits of the whole part, on every worker."""
        return self._gathered(self.value.detach())

    def restore(self, read: Callable[[str, slice], torch.Tensor], step: int) -> None:
        """Take up this worker's rows of a saved state."""
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
    """A transformers model under a mask.

    Args:
        network: built by `fleet.masks.network`, on the group's mesh if it has one.
        aligned: the aligned model, W.
        members: the models whose task vectors are masked, in the manifest's order.
        fusion: F, or None for one model by itself.
        method: the mask, and how it is learned.
        origin: what a factor mask reverts to.
        group: this worker's place among those that hold the network.

    Raises:
        CheckpointError: a task vector is in a tensor that the network has no parameter for.
    """

    def __init__(
        self,
        network: Any,
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
        sizes = [t.theta.numel() for t in self.tensors if isinstance(t, _FoldedTensor)]
        scratch = torch.empty(max(sizes, default=0), device=self.device)
        for tensor in self.tensors:
            tensor.scratch = scratch
            tensor.parameter.requires_grad_(True)
            tensor.parameter.register_post_accumulate_grad_hook(self._hook(tensor))
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
        """Write θ for one draw of the mask, or for the expected mask, σ(x), without a step; returns the share kept."""
        kept = torch.zeros((), dtype=torch.float64, device=self.device)
        for tensor in self.tensors:
            kept += tensor.write(step)
        return float(self.group.total(kept)) / sum(math.prod(t.shape) for t in self.tensors)

    def write_member(self, member: MaskedMember) -> None:
        """Write θ = W + δ_t: a fine-tuned model as it came."""
        for tensor in self.tensors:
            delta = self._local_delta(member.model, tensor.name)
            with torch.no_grad():
                tensor.theta.copy_(tensor.base if delta is None else tensor.base.float() + delta.dense())

    def write_aligned(self) -> None:
        """Write θ = W."""
        with torch.no_grad():
            for tensor in self.tensors:
                tensor.theta.copy_(tensor.base)

    def backward(self, loss: torch.Tensor, learning_rate: float | None) -> None:
        """Add the loss's gradient to that of the logits; with a learning rate also apply it, and start anew.

        Each tensor is done as soon as its gradient is there, so gradients never lie together. Tied weights are done at
        the end: FSDP2 brings the gradient of each of their uses apart.
        """
        self._learning_rate = learning_rate
        loss.backward()
        for tensor in self.tensors:
            if tensor.name in self._tied:
                self._update(tensor)

    # -- building ------------------------------------------------------------------------------------------------

    def _hook(self, tensor: _MaskedTensor) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            at_once = self._learning_rate is not None and tensor.name not in self._tied
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
        parameter = self._parameters[name]
        shape = tuple(self._aligned.tensors[name].shape)
        deltas = {m.name: d for m in self._members if (d := self._whole_or_rows(m.model, name)) is not None}
        moved = torch.tensor(float(any(bool(d.dense().any()) for d, _ in deltas.values())), device=self.device)
        if not float(self.group.total(moved)):
            return None
        rows = self.group.rows(shape[0])
        start = rows.start * math.prod(shape[1:])
        theta = local(parameter)
        assert tuple(theta.shape) == (rows.stop - rows.start, *shape[1:]), f"{name}: FSDP2 cut it in another way"
        mask, shared = MASKS[self.method.mask], len(self._members) == 1 or self.method.shared
        base = theta.clone()
        place, names = self._places[name], [m.name for m in self._members]
        coefficients = self._fusion.coefficients(names, place) if self._fusion else dict.fromkeys(names, 1.0)
        linear = self._fusion is None or self._fusion.is_linear
        if linear and shared and self.method.mask in ("dense", "rows_and_columns"):
            folded = sum((d.dense() * coefficients[n] for n, (d, _) in deltas.items()), torch.zeros_like(base).float())
            whole = {SHARED: Dense(torch.empty(shape, device="meta"))}
            parts: dict[str, Delta] = {SHARED: Dense(folded.to(base.dtype))}
            fuse = None
        else:
            parts = {n: d for n, (d, _) in deltas.items()}
            whole = {n: like for n, (_, like) in deltas.items()}
            fuse = self._fusion
        owners = {n: SHARED if shared else n for n in parts}
        logits: dict[str, dict[str, Logits]] = {}
        for model, owner in owners.items():
            found = mask.parts(whole[model])
            if owner in logits and any(logits[owner][p].part != part for p, part in found.items()):
                raise CheckpointError(
                    f"{name}: the models' task vectors have factors of unequal ranks, so they can't share a "
                    f"{self.method.mask} mask; set shared to false, or use dense"
                )
            logits.setdefault(owner, {p: self._logits(f"{owner}/{name}/{p}", part) for p, part in found.items()})
        common = {
            "name": name, "shape": shape, "parameter": parameter, "theta": theta, "base": base, "method": self.method,
            "deltas": parts, "masks": {n: logits[o] for n, o in owners.items()}, "logits": [
                item for parts_of in logits.values() for item in parts_of.values()
            ],
        }  # fmt: skip
        if self.method.mask == "dense" and fuse is None and len(parts) == 1:
            return _FoldedTensor(**common)
        origin = self._origin_rows(name, rows)
        piece = Piece(start, lambda counts: self.group.total(counts))
        return _FusedTensor(**common, fusion=fuse, coefficients=coefficients, origin=origin, piece=piece, place=place)

    def _logits(self, name: str, part: Part) -> Logits:
        rows = self.group.rows(part.shape[0]) if part.by_row else slice(0, part.shape[0])
        shape = (rows.stop - rows.start, *part.shape[1:])
        value = torch.full(shape, self.method.initial_logit, device=self.device)
        return Logits(name, value, part, rows.start * math.prod(part.shape[1:]), self.group)

    def _whole_or_rows(self, model: Model, name: str) -> tuple[Delta, Delta] | None:
        """This worker's rows of a task vector, ready to be masked, and something of the whole one's shape."""
        rows, shape = self.group.rows(self._aligned.tensors[name].shape[0]), self._aligned.tensors[name].shape
        delta = self._delta(model, name, rows)
        if delta is None:
            return None
        if isinstance(delta, LowRank):
            delta = MASKS[self.method.mask].prepared(delta)
            assert isinstance(delta, LowRank)
            return LowRank(delta.b[rows].to(self.device), delta.a.to(self.device)), delta
        return Dense(delta.value.to(self.device)), Dense(torch.empty(shape, device="meta"))

    def _local_delta(self, model: Model, name: str) -> Delta | None:
        found = self._whole_or_rows(model, name)
        return None if found is None else found[0]

    def _delta(self, model: Model, name: str, rows: slice) -> Delta | None:
        """A task vector as the checkpoint holds weights: a LoRA's whole, a dense one's rows; None where it has none."""
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


@dataclass(eq=False, kw_only=True)
class _MaskedTensor:
    """One tensor under its mask; a worker's rows of it."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    parameter: torch.Tensor
    theta: torch.Tensor
    base: torch.Tensor
    method: MaskSpec
    deltas: dict[str, Delta]
    masks: dict[str, dict[str, Logits]]
    """Model -> part -> its logits, as in `deltas`."""
    logits: list[Logits]
    scratch: torch.Tensor = field(init=False)

    def write(self, step: int | None) -> torch.Tensor:
        """Write θ; returns Σ over this worker's entries of the share of each that is kept, float64."""
        raise NotImplementedError

    def add_gradients(self, gradient: torch.Tensor, kept: bool) -> None:
        """Add ∂L/∂x to every logit's gradient, for the mask that was written last, given ∂L/∂θ.

        Args:
            kept: whether the gradients have to outlive the next tensor's; else they may lie in scratch memory.
        """
        raise NotImplementedError


@dataclass(eq=False, kw_only=True)
class _FoldedTensor(_MaskedTensor):
    """One dense mask on one dense task vector: θ = W + m ⊙ δ / mean(m), in closed form and in chunks."""

    step: int | None = None
    """Of the draw that θ holds."""
    mean: float = 1.0

    def __post_init__(self) -> None:
        (delta,) = self.deltas.values()
        dense = delta.dense().to(self.base.dtype).contiguous()
        self.deltas = {name: Dense(dense) for name in self.deltas}
        self._delta = dense.view(-1)
        (self._logits,) = self.logits

    def write(self, step: int | None) -> torch.Tensor:
        self.step = step
        values, kept = self._draw()
        mean = self._logits.total(kept) / self._logits.count
        self.mean = float(floored(mean, self._logits.count))
        masked_weight_(self.theta.view(-1), self.base.view(-1), self._delta, values, 1.0 / self.mean)
        return kept

    def add_gradients(self, gradient: torch.Tensor, kept: bool) -> None:
        values, summed = self._draw()
        flat, total = gradient.reshape(-1), float(self._logits.total(summed))
        centre = 0.0
        if total >= 1.0:  # below, the floor holds the mean, and it doesn't move
            centre = float(self._logits.total(weighted_sum(flat, self._delta, values))) / total
        logit_gradient_(values, flat, self._delta, centre, 1.0 / (self.mean * self.method.temperature))
        leaf = self._logits.value
        found = values.view(leaf.shape)
        if leaf.grad is None:
            leaf.grad = found.clone() if kept else found
        else:
            leaf.grad.add_(found)

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._logits
        values = self.scratch[: self.theta.numel()]
        key = logits.key(self.method.training.seed, self.step)
        kept = draw_(values, logits.value.detach().view(-1), logits.start, key, self.method.temperature)
        return values, kept


@dataclass(eq=False, kw_only=True)
class _FusedTensor(_MaskedTensor):
    """Any mask on any task vectors through any fusion, by automatic differentiation of this one tensor."""

    fusion: AnyFusionMethod | None
    coefficients: Mapping[str, float]
    origin: Delta | None
    piece: Piece
    place: Place
    step: int | None = None

    def write(self, step: int | None) -> torch.Tensor:
        self.step = step
        with torch.no_grad():
            values = self._values()
            self.theta.copy_(self._theta(values))
            # A tensor's share is the mean over its parts' and its models' shares.
            shares = [v.mean(dtype=torch.float64) for v in values.values()]
        return torch.stack(shares).mean() * self.theta.numel()

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
        mask = MASKS[self.method.mask]
        masked: dict[str, Delta] = {}
        for model, delta in self.deltas.items():
            scaled: dict[str, torch.Tensor] = {}
            for part, logits in self.masks[model].items():
                value = values[logits.name]
                mean = _WholeSum.apply(value.sum(), logits) / logits.count
                scaled[part] = value / floored(mean, logits.count)
            masked[model] = mask.masked(delta, scaled, self.origin)
        if self.fusion is None:
            (fused,) = masked.values()
        else:
            fused = self.fusion.fuse(masked, self.coefficients, self.place, self.piece)
        return self.base.float() + fused.dense()


class _WholeSum(torch.autograd.Function):
    """A sum over all workers' rows; each worker's loss depends on it, so their gradients add up too."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, logits: Logits) -> torch.Tensor:
        ctx.logits = logits
        return logits.total(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.logits.total(gradients[0]), None


def named_parameters(network: Any) -> dict[str, torch.Tensor]:
    """Parameters by their checkpoint's names: as they were before anything wrapped a layer."""
    return dict(network.named_parameters())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's rows of a tensor, sharded or not; shares memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def stored_rows(model: FullModel, name: str, rows: slice) -> torch.Tensor:
    """Rows of a base tensor as the checkpoint holds it, float32."""
    info = model.tensors[name]
    if len(info.shape) < 2:
        return read_tensor(model.folder, info).float()[rows]
    inner = math.prod(info.shape[1:-1])
    values = read_rows(model.folder, info, rows.start * inner, rows.stop * inner)
    return values.float().reshape(rows.stop - rows.start, *info.shape[1:])
