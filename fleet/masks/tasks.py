"""What is asked of a training: small frozen values that travel as messages and name everything by URI."""

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
    """A set of texts as a worker finds it: a file in the store, or a dataset on the Hub."""

    texts: TextSet
    store: str

    def rows(self) -> list[Row]:
        if self.texts.is_dataset:
            return self.texts.rows(None)
        data = open_store(self.store).read(self.texts.key)
        if data is None:
            raise StepFailedError(f"{self.store}/{self.texts.key}: gone from the store; type the same command again")
        return self.texts.rows(data)


@dataclass(frozen=True)
class Compute:
    """How a training runs; nothing in it decides what comes out, but for rounding."""

    micro_batch: int | None
    """Texts per forward pass and worker; the rest of an update's batch is accumulated. None takes all at once."""
    activation_checkpointing: bool
    checkpoint_every: int
    """Updates between checkpoints."""


@dataclass(frozen=True)
class LogProbsTask:
    """The aligned model's log-probabilities of a preference set: what DPO compares with, for every model and night."""

    aligned: str
    preferences: Texts
    max_tokens: int
    dtype: str
    compute: Compute
    output: Output


@dataclass(frozen=True)
class MaskTask:
    """Learn one mask."""

    step: str
    """Key of the step: what is measured on the way is told under it."""
    aligned: str
    members: tuple[Member, ...]
    fusion: AnyFusionMethod | None
    method: MaskSpec
    safety: str | None
    """What a factor mask reverts to."""
    preferences: Texts
    log_probs: str
    """Folder of the aligned model's log-probabilities."""
    prompts: tuple[Texts, ...]
    """Of each member, if the method uses them."""
    compute: Compute
    output: Output

    @property
    def state(self) -> str:
        """Prefix in the store of the checkpoints; the same for every attempt."""
        return f"{self.step}/state"


class Trained(NamedTuple):
    """What a training left; of its first worker, for the others leave nothing."""

    files: dict[str, FileEntry]
    result: dict[str, Json]


NOTHING = Trained({}, {})
