"""What a fusion method may have to know of a model beside its weights: a Fisher, or Gram matrices, from headers alone.

Both are folders of safetensors, `model.safetensors` or shards with an index, in float32, float16, bfloat16 or float64:

    fisher: the diagonal of the Fisher information, for every tensor its name and its shape in the aligned model's files
    gram:   XᵀX of a Linear's inputs X (n, d_in), (d_in, d_in), named as the Linear's weight; (E, d_in, d_in) of stacked
            experts; not turned, however the weight is stored

Only the tensors that some model of a variant changes are looked at; others may be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import DTYPE_BYTES, TensorInfo, read_headers
from fleet.checkpoint.modules import canonical_shape, module_views
from fleet.core.errors import CheckpointError
from fleet.store import Folder

CurvatureKind: TypeAlias = Literal["fisher", "gram"]

_SHOWN = 4


@dataclass(frozen=True)
class Curvature:
    """The headers of a model's Fisher or Gram matrices."""

    folder: Folder
    tensors: dict[str, TensorInfo]

    @property
    def num_bytes(self) -> int:
        return sum(t.num_bytes for t in self.tensors.values())


def read_curvature(folder: Folder) -> Curvature:
    """
    Raises:
        CheckpointError: no safetensors, damaged files, or tensors that are no floating-point numbers.
    """
    tensors = read_headers(folder, "model")
    if wrong := [f"{t.name} ({t.dtype})" for t in tensors.values() if t.dtype not in (*DTYPE_BYTES, "F64")]:
        raise CheckpointError(f"{folder.uri}: {some(wrong)}: no floating-point numbers; store them in float32")
    return Curvature(folder, tensors)


def check_curvature(
    kind: CurvatureKind,
    curvatures: Mapping[str, Curvature],
    aligned: FullModel,
    tensors: Iterable[str],
    may_lack: bool,
) -> list[str]:
    """What is missing or of the wrong shape, a line for each model.

    Args:
        tensors: the base tensors that some model of the variant changes.
        may_lack: whether Gram matrices may be missing.
    """
    expected = {name: shape for name in tensors if (shape := _expected(kind, aligned, name)) is not None}
    needed = {name for name in expected if kind == "fisher" or module_views(aligned, name)}
    needed |= {name for name in expected if any(name in c.tensors for c in curvatures.values())}
    problems: list[str] = []
    for model, curvature in curvatures.items():
        found = {name: info.shape for name, info in curvature.tensors.items() if name in needed}
        wrong = [f"{n} is {s}, not {expected[n]}" for n, s in sorted(found.items()) if s != expected[n]]
        missing = sorted(needed - set(found))
        if wrong:
            problems.append(f"models: {model}: {kind}: {some(wrong)}")
        if missing and not may_lack:
            problems.append(f"models: {model}: {kind}: {curvature.folder.uri} has no {some(missing)}")
    return problems


def _expected(kind: CurvatureKind, aligned: FullModel, tensor: str) -> tuple[int, ...] | None:
    """The shape of what belongs to a tensor; None of one that no Gram matrix can belong to."""
    if kind == "fisher":
        return aligned.tensors[tensor].shape
    shape = canonical_shape(aligned, tensor)
    return None if len(shape) < 2 else (*shape[:-2], shape[-1], shape[-1])


def some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
