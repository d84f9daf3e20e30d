"""Values of Fishers and Gram matrices, checked as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from fleet.checkpoint.curvature import Curvature, CurvatureKind
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.modules import is_transposed
from fleet.checkpoint.tensors import read_rows, read_tensor
from fleet.core.errors import CheckpointError

_ASYMMETRY = 1e-2
"""Of the largest entry: what the dtypes' rounding, and sums in another order, may make of a symmetric matrix."""


class CurvatureOf(Mapping[str, torch.Tensor]):
    """Model -> its Fisher of one tensor, float32 in canonical orientation, or its Gram matrix, in its file's dtype.

    Each is read when it is asked for. Empty where a model has none: then there is nothing to weight the others with.
    """

    def __init__(
        self,
        kind: CurvatureKind | None,
        curvatures: Mapping[str, Curvature],
        aligned: FullModel,
        tensor: str,
    ) -> None:
        self._kind = kind
        known = all(tensor in c.tensors for c in curvatures.values())
        self._curvatures: Mapping[str, Curvature] = curvatures if known else {}
        self._aligned = aligned
        self._tensor = tensor

    def __getitem__(self, model: str) -> torch.Tensor:
        """
        Raises:
            CheckpointError: it isn't finite, or no Fisher or Gram matrix.
        """
        curvature = self._curvatures[model]
        if self._kind == "gram":
            return read_gram(curvature, self._tensor)
        value = read_tensor(curvature.folder, curvature.tensors[self._tensor]).float()
        _check_fisher(curvature, self._tensor, value)
        return value.mT if is_transposed(self._aligned, self._tensor) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._curvatures)

    def __len__(self) -> int:
        return len(self._curvatures)


def read_fisher_rows(curvature: Curvature, tensor: str, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a Fisher, all axes but the last taken as rows: (stop − start, columns) float32.

    Raises:
        CheckpointError: a value is negative, infinite or NaN.
    """
    value = read_rows(curvature.folder, curvature.tensors[tensor], start, stop).float()
    _check_fisher(curvature, tensor, value)
    return value


def read_gram(curvature: Curvature, tensor: str) -> torch.Tensor:
    """The Gram matrices of a tensor: (…, d_in, d_in), exactly symmetric.

    In the dtype of their file: its rounding says from which eigenvalue on they can be told from singular ones.

    Raises:
        CheckpointError: it isn't finite, isn't symmetric, or its diagonal is negative somewhere.
    """
    stored = read_tensor(curvature.folder, curvature.tensors[tensor])
    value = stored.double()
    if value.numel():
        slack = _ASYMMETRY * value.abs().max()
        negative = value.diagonal(dim1=-2, dim2=-1).min() < 0.0
        if not bool(value.isfinite().all()) or bool(negative) or bool((value - value.mT).abs().max() > slack):
            raise CheckpointError(
                f"{curvature.folder.uri}: tensor {tensor} is no Gram matrix: it has to be finite and symmetric, and "
                "not negative on its diagonal; make it again as XᵀX, summed in float32"
            )
    return ((value + value.mT) / 2.0).to(stored.dtype)


def _check_fisher(curvature: Curvature, tensor: str, value: torch.Tensor) -> None:
    # NaN compares as false.
    if value.numel() and not (float(value.min()) >= 0.0 and float(value.max()) < float("inf")):
        raise CheckpointError(
            f"{curvature.folder.uri}: tensor {tensor} is no Fisher: it has values that are negative, infinite or NaN; "
            "make it again as a mean of squared gradients"
        )
