"""A learned mask, applied to a task vector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fleet.algebra.delta import Delta
from fleet.algebra.noise import noise_key, uniform
from fleet.checkpoint.headers import TensorInfo, read_file_header
from fleet.checkpoint.tensors import read_tensor
from fleet.core.errors import CheckpointError
from fleet.masks.concrete import hardened, multipliers
from fleet.masks.files import MASK_FILE, SHARED, read_granularity
from fleet.masks.granularity import MASKS, Granularity
from fleet.methods.mask_spec import MaskSpec
from fleet.store import Folder, open_folder


@dataclass(frozen=True)
class LearnedMask:
    """The headers of a learned mask; logits are read when they are applied."""

    folder: Folder
    granularity: Granularity
    logits: dict[str, TensorInfo]

    def apply(self, method: MaskSpec, model: str, tensor: str, delta: Delta, origin: Delta | None) -> Delta:
        """δ' = m ⊙ δ / mean(m) of one whole tensor; δ itself where the mask has no logits for it.

        Args:
            method: how the mask is applied: its hardening, arrangement and seed.
            model: the name of the model whose task vector it is; its own logits go before shared ones.
            tensor: the tensor's name in the aligned model.
            delta: δ, with the axes that the checkpoint holds.
            origin: what a factor mask reverts to; None for zero.

        Raises:
            CheckpointError: a part of the logits is missing, or has another shape than the task vector.
        """
        owner = next((o for o in (model, SHARED) if any(n.startswith(f"{o}/{tensor}/") for n in self.logits)), None)
        if owner is None:
            return delta
        mask = MASKS[self.granularity]
        delta = mask.prepared(delta)
        factors: dict[str, torch.Tensor] = {}
        for part, (shape, _) in mask.parts(delta).items():
            name = f"{owner}/{tensor}/{part}"
            info = self.logits.get(name)
            if info is None or tuple(info.shape) != shape:
                has = None if info is None else tuple(info.shape)
                raise CheckpointError(f"{self.folder.uri}: logits {name} are {has}, but the task vector needs {shape}")
            values = hardened(read_tensor(self.folder, info), method.hardening, noise_key(method.seed, "harden", name))
            if method.arrangement == "random":
                order = uniform(noise_key(method.seed, "arrange", name), 0, values.numel()).argsort()
                values = values.flatten()[order].reshape(shape)
            elif method.arrangement == "magnitude":
                order = mask.sizes(delta)[part].flatten().argsort(descending=True, stable=True)
                arranged = torch.empty_like(values).flatten()
                arranged[order] = values.flatten().sort(descending=True).values
                values = arranged.reshape(shape)
            factors[part] = multipliers(values)
        return mask.masked(delta, factors, origin)


@lru_cache(maxsize=16)
def open_mask(uri: str) -> LearnedMask:
    """The learned mask in a folder; a process keeps the last few it opened.

    Raises:
        CheckpointError: the folder holds no learned mask, or one of an unknown granularity.
    """
    folder = open_folder(uri)
    granularity = read_granularity(folder)
    if granularity not in MASKS:
        raise CheckpointError(f"{uri}: no mask is called {granularity!r}; there are {', '.join(MASKS)}")
    return LearnedMask(folder, granularity, read_file_header(folder, MASK_FILE))
