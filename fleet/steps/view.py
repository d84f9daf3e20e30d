"""What a step may ask of its run: where things are, and what other steps found. Knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from evals.suites import Suite
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import plan_shards, shard_name
from fleet.checkpoint.shards import ADAPTER_FILE, Output, Shard
from fleet.core.identity import KEY_DIGITS
from fleet.manifest import Manifest
from fleet.masks.tasks import Texts
from fleet.masks.texts import TextSet
from fleet.steps.record import AnyResult, Keyed, Record, attempt_prefix
from fleet.steps.sources import Bases, Judging, Source, Weights
from fleet.store import Store
from fleet.work.served import SuiteFiles

UNIT_BYTES = 256 << 20
"""Base weights per unit of a survey or a trim: small enough to spread, and a message is cheap beside it."""


@dataclass(frozen=True)
class RunView:
    """One run, as its steps see it."""

    manifest: Manifest
    store: Store
    bases: Bases
    judging: Judging
    texts: Mapping[str, bytes]
    """Key in the store -> bytes of every file of preferences, task prompts or labelled rows."""
    records: Mapping[str, Record]
    """Step key -> record, of what is done by now."""
    _placed: set[str] = field(default_factory=set[str])
    """Keys of what this run has put in the store for its workers."""

    @property
    def aligned(self) -> FullModel:
        """The aligned model's headers."""
        return self.bases.aligned_model

    def output(self, step: Keyed, attempt: str) -> Output:
        """Where a step's units write."""
        return Output(self.store.uri, attempt_prefix(step, attempt))

    def folder(self, step: Keyed) -> str:
        """URI of the folder where a step that is done has left its files."""
        return self.store.folder(self.records[step.key].prefix).uri

    def uri(self, weights: Weights) -> str:
        """Where a source is, or where the step that makes the weights has left them."""
        return weights.uri if isinstance(weights, Source) else self.folder(weights)

    def result(self, step: Keyed, kind: type[AnyResult]) -> AnyResult:
        """What a step that is done has found."""
        return self.records[step.key].read(kind)

    def shards(self, weights: Weights) -> list[Shard]:
        """The files that weights are written to, from headers alone."""
        if weights.as_lora:
            return [Shard(ADAPTER_FILE, weights.tensors, {})]
        groups = plan_shards(self.aligned.tensors.values(), self.manifest.checkpoint.shard_bytes)
        files = [shard_name(i, len(groups)) for i in range(len(groups))]
        weight_map = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        return [
            Shard(file, tuple(names), weight_map if i == 0 else None)
            for i, (file, names) in enumerate(zip(files, groups, strict=True))
        ]

    def place_texts(self, key: str) -> str:
        """Put a file of texts or labelled rows where workers find it, whatever node they are on; returns its key."""
        self._place(key, self.texts[key])
        return key

    def text_set(self, texts: TextSet) -> Texts:
        """Preferences or prompts as a worker finds them: in the store, or on the Hub."""
        if not texts.is_dataset:
            self.place_texts(texts.key)
        return Texts(texts, self.store.uri)

    def suite_files(self, suite: Suite) -> SuiteFiles:
        """A suite as a worker finds it; its files are put in the store once per content."""
        prefix = f"suites/{suite.digest.removeprefix('sha256:')[:KEY_DIGITS]}"
        if prefix not in self._placed:
            for name, data in suite.contents().items():
                self._place(f"{prefix}/{name}", data)
            self._placed.add(prefix)
        return SuiteFiles(suite.entry, self.store.folder(prefix).uri)

    def _place(self, key: str, data: bytes) -> None:
        if key not in self._placed:
            self.store.create(key, data)
            self._placed.add(key)
