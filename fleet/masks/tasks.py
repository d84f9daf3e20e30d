"""What is asked of a training, and what it answers: small values, sent between nodes, that name all else by URI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fleet.checkpoint.shards import Output
from fleet.core.errors import StepFailedError
from fleet.core.identity import Json
from fleet.fusion import AnyFusionMethod
from fleet.fusion.member import Member
from fleet.masks.texts import Row, TextSet
from fleet.methods.mask_spec import MaskSpec
from fleet.store import open_store
from fleet.store.entry import FileEntry


@dataclass(frozen=True)
class Texts:
    """Where a worker finds a set of texts: in the run's store, or on the Hub."""

    texts: TextSet
    store: str
    """URI of the store."""

    def rows(self) -> list[Row]:
        """All rows, in order.

        Raises:
            StepFailedError: the file is no longer in the store.
            ManifestError: a row of a dataset is not what it should be.
        """
        if self.texts.is_dataset:
            return self.texts.rows(None)
        data = open_store(self.store).read(self.texts.key)
        if data is None:
            raise StepFailedError(f"{self.store}/{self.texts.key}: gone from the store; type the same command again")
        return self.texts.rows(data)


@dataclass(frozen=True)
class Compute:
    """How a training runs; it changes the result only by rounding."""

    micro_batch: int | None
    """Preference pairs or prompts per forward pass and worker; the gradients of a batch's passes are added up. None
    takes the whole batch in one pass."""
    activation_checkpointing: bool
    """Whether activations are computed again in the backward pass instead of kept."""
    checkpoint_every: int
    """Updates between checkpoints."""


@dataclass(frozen=True)
class LogProbsTask:
    """Compute the aligned model's log-probabilities of a preference set: DPO's reference, for every model and run."""

    aligned: str
    """URI of the aligned model."""
    preferences: Texts
    max_tokens: int
    """Longest prompt and reply together."""
    dtype: str
    """Of the model: `bfloat16` or `float32`."""
    compute: Compute
    output: Output
    date: str | None = None
    """What the aligned model's chat template writes, as 2026-11-25; None if it writes no date."""


@dataclass(frozen=True)
class MaskTask:
    """Learn one mask."""

    step: str
    """Key of the step, under which updates and evaluations are reported."""
    aligned: str
    """URI of the aligned model."""
    members: tuple[Member, ...]
    fusion: AnyFusionMethod | None
    method: MaskSpec
    safety: str | None
    """URI of the safety adapter, if the mask is a factor mask that reverts to it."""
    preferences: Texts
    log_probs: str
    """Folder of the aligned model's log-probabilities."""
    prompts: tuple[Texts, ...]
    """Task prompts of each member, in their order; none if the method uses no prompts."""
    compute: Compute
    output: Output
    date: str | None = None
    """What the aligned model's chat template writes, as 2026-11-25; None if it writes no date."""

    @property
    def state(self) -> str:
        """Prefix of the checkpoints in the store: the same for every attempt, so that each goes on from the last."""
        return f"{self.step}/state"


class Trained(NamedTuple):
    """The files that a training wrote and its result. Only its first worker has any; see `NOTHING`."""

    files: dict[str, FileEntry]
    result: dict[str, Json]


NOTHING = Trained({}, {})
"""What all workers but the first return."""
