"""How a mask is learned: the loop that every worker of a training runs, its evaluations and its checkpoints.

An update's number decides all that is random or scheduled in it: its pairs, its draw of the mask, its learning rate. So
a training that was killed goes on from its last checkpoint as if nothing had happened, on any number of workers.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, cast

import torch
from transformers import AutoTokenizer

from fleet.algebra import linalg
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.chat_templates import prompting
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import read_file_header
from fleet.checkpoint.model import touched_tensors
from fleet.checkpoint.opened import open_full, open_model
from fleet.checkpoint.task_vectors import read_factors
from fleet.checkpoint.tensors import TensorLayout, read_rows, read_tensor, write_tensors
from fleet.checkpoint.write import write_file
from fleet.core.errors import CheckpointError, StepFailedError
from fleet.core.identity import Json
from fleet.masks.batches import Text, Tokenizer, collate, encode
from fleet.masks.files import MASK_FILE, MASK_JSON
from fleet.masks.masked_model import Group, MaskedMember, MaskedModel
from fleet.masks.network import build_network
from fleet.masks.objective import (
    Teacher,
    coarse,
    divergence,
    dpo_losses,
    margins,
    reply_log_probs,
    reply_logits,
)
from fleet.masks.tasks import NOTHING, LogProbsTask, MaskTask, Trained
from fleet.masks.texts import Row, split
from fleet.methods.mask_spec import MaskTraining
from fleet.store import Folder, Store, open_folder, open_store
from fleet.store.entry import FileEntry

LOG_PROBS_FILE = "log_probs.safetensors"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_CONTINUES = 0.5
"""An adapter whose A factors have a lower cosine with the safety adapter's did not start from it: LoRA draws A at
random, so strangers' cosines are near 0, and training hardly turns A."""
_STATE_FILES = ("a.safetensors", "b.safetensors")
"""Checkpoints overwrite them in turn, so that one is whole whenever a worker dies."""
_BEST_FILE = "best.safetensors"
_PASS = 16
"""Preference pairs or prompts in a pass without gradients, where `Compute.micro_batch` is None."""

STANDSTILL = 0.01
"""A mask whose values are on average less than this share of them from their start has learned next to nothing."""

Report = Callable[[dict[str, float]], None]
"""Called after every update and every evaluation with `step` and what was measured."""

_Share = list[tuple[int, float]]
"""What one worker computes in one pass: indices of pairs or prompts, each with its weight in the batch's mean."""


class MaskEvaluation(NamedTuple):
    """How good the expected mask is on the held-out texts, after some number of updates."""

    step: int
    """Updates before it."""
    loss: float
    """DPO's, the mean over pairs."""
    accuracy: float
    """Share of pairs with a positive margin."""
    margin: float
    """How much more the masked model prefers the chosen reply than the aligned model does, in nats: a mean."""
    density: float
    """The share of the task vectors that the mask keeps."""
    divergence: float | None
    """KL(fine-tuned ‖ masked), nats per token, where there are task prompts."""

    def score(self, training: MaskTraining) -> float:
        """The lowest is best; infinite where the divergence is over its limit."""
        if training.divergence_max is not None and (self.divergence or 0.0) > training.divergence_max:
            return math.inf
        return self.loss + training.utility_weight * (self.divergence or 0.0)


@dataclass
class _Prompts:
    """One member's task prompts, and what the fine-tuned model predicts on them."""

    texts: list[Text]
    teachers: list[Teacher]
    """One per text: n is 1, and C the text's own reply length."""
    train: list[int]
    """Indices of the texts to train on."""
    held_out: list[int]
    """Indices of the others."""


def log_probs(task: LogProbsTask, group: Group, device: torch.device) -> Trained:
    """Write log π_aligned(reply | prompt) of every pair: tensors `chosen` and `rejected`, (pairs,), float32.

    Raises:
        CheckpointError: the aligned model can't be built, or has no usable tokenizer.
    """
    aligned = open_full(task.aligned)
    network = build_network(aligned, _DTYPES[task.dtype], device, group, False)
    pairs = _pairs(task.preferences.rows(), load_tokenizer(aligned, task.date), task.max_tokens)
    found = torch.zeros(2, len(pairs), device=device)
    with torch.no_grad():
        for mine in _shares(list(range(len(pairs))), group, task.compute.micro_batch or _PASS):
            texts = [pairs[i][side] for side in (0, 1) for i, _ in mine]
            values = reply_log_probs(network, collate(texts, device)).view(2, -1)
            for column, (i, weight) in enumerate(mine):
                found[:, i] += values[:, column] * float(weight > 0)  # fills a pass up: see `_shares`
    found = group.total(found).cpu()
    if group.rank:
        return NOTHING
    return Trained(write_file(task.output, LOG_PROBS_FILE, {"chosen": found[0], "rejected": found[1]}), {})


def learn_mask(task: MaskTask, group: Group, device: torch.device, report: Report) -> Trained:
    """Learn one mask, from its last checkpoint if it has one.

    Raises:
        CheckpointError: the aligned model can't be built, or the models don't suit the method; see `MaskedModel`.
        StepFailedError: a loss is not a finite number, or no mask kept the divergence within its limit.
    """
    return _Training(task, group, device, report).run()


class _Training:
    """One mask's training, on one worker."""

    def __init__(self, task: MaskTask, group: Group, device: torch.device, report: Report) -> None:
        self.task, self.group, self.device, self.report = task, group, device, report
        self.spec = task.method.training
        aligned = open_full(task.aligned)
        tokenizer = load_tokenizer(aligned, task.date)
        rows = task.preferences.rows()
        self.pairs = _pairs(rows, tokenizer, self.spec.max_tokens)
        self.train, self.held_out = split(rows, self.spec.held_out)
        self.reference = _read_log_probs(open_folder(task.log_probs), len(rows)).to(device)
        members = [MaskedMember(m.name, open_model(m.uri)) for m in task.members]
        origin = open_model(task.safety) if task.safety is not None else None
        assert origin is None or isinstance(origin, Adapter)
        if origin is not None:
            _require_continuation(members, origin)
        network = build_network(aligned, _DTYPES[self.spec.dtype], device, group, task.compute.activation_checkpointing)
        self.model = MaskedModel(network, aligned, members, task.fusion, task.method, origin, group)
        self.prompts = [
            self._prompts(member, texts.rows(), tokenizer) for member, texts in zip(members, task.prompts, strict=False)
        ]
        self.store = open_store(task.output.store)
        self.history: list[MaskEvaluation] = []
        self.best: MaskEvaluation | None = None

    def run(self) -> Trained:
        """Train until the last update, or until evaluations no longer get better."""
        step = self._restore()
        while step < self.spec.steps and not self._stops():
            self.report({"step": float(step + 1), **self._update(step)})
            step += 1
            if self.held_out and (step % self.spec.evaluate_every == 0 or step == self.spec.steps):
                self._evaluate(step)
            if step % self.task.compute.checkpoint_every == 0:
                self._checkpoint(step)
        return self._finish(step)

    # -- one update ----------------------------------------------------------------------------------------------

    def _update(self, step: int) -> dict[str, float]:
        """Draw a mask, and move its logits by the gradient on one batch of pairs and of task prompts."""
        spec, group = self.spec, self.group
        density = self.model.draw(step)
        rng = random.Random(f"{spec.seed}/{step}")
        chosen = rng.sample(self.train, min(spec.batch_size, len(self.train)))
        shares = [*_shares(chosen, group, self.task.compute.micro_batch)]
        prompts = [*self._prompt_shares(rng)] if spec.utility_weight else []
        totals = torch.zeros(4, device=self.device)
        rate = learning_rate(spec, step)
        passes = [partial(self._preference_loss, share) for share in shares]
        passes += [partial(self._utility_loss, *share) for share in prompts]
        for number, forward in enumerate(passes, start=1):
            loss, measured = forward()
            # FSDP2 averages the workers' gradients, but their losses are parts of one mean, so they have to add up.
            self.model.backward(loss * group.size, rate if number == len(passes) else None)
            totals += measured
        loss, accuracy, margin, utility = _floats(group.total(totals))
        if not math.isfinite(loss + utility):
            raise StepFailedError(f"the loss of update {step + 1} is {loss:g}; lower training.learning_rate")
        measured = {"loss": loss, "accuracy": accuracy, "margin": margin, "density": density, "learning_rate": rate}
        return measured | ({"divergence": utility} if prompts else {})

    def _preference_loss(self, share: _Share) -> tuple[torch.Tensor, torch.Tensor]:
        """The share's part of the batch's mean DPO loss, and of (loss, accuracy, margin, 0)."""
        margin, weights = self._margins(share)
        losses = dpo_losses(margin, self.spec.beta)
        parts = torch.stack((losses.detach(), (margin > 0).float(), margin.detach(), torch.zeros_like(weights)))
        return (losses * weights).sum(), parts @ weights

    def _utility_loss(self, prompts: _Prompts, share: _Share) -> tuple[torch.Tensor, torch.Tensor]:
        """The share's part of μ times the mean divergence over task prompts, and of (0, 0, 0, divergence)."""
        found, weights = self._divergences(prompts, share)
        value = (found * weights).sum()
        return self.spec.utility_weight * value, torch.stack((*torch.zeros(3, device=self.device), value.detach()))

    def _margins(self, share: _Share) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the share's pairs, and their weights: (pairs,) each."""
        indices = [i for i, _ in share]
        texts = [self.pairs[i][side] for side in (0, 1) for i in indices]
        policy = reply_log_probs(self.model.network, collate(texts, self.device)).view(2, -1)
        weights = torch.tensor([w for _, w in share], device=self.device)
        return margins(policy, self.reference[:, indices]), weights

    def _divergences(self, prompts: _Prompts, share: _Share) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the share's prompts, and their weights: (prompts,) each."""
        batch = collate([prompts.texts[i] for i, _ in share], self.device)
        teacher = _stacked([prompts.teachers[i] for i, _ in share], batch.labels.shape[1])
        found = divergence(teacher, reply_logits(self.model.network, batch), batch.labels)
        return found, torch.tensor([w for _, w in share], device=self.device)

    def _prompt_shares(self, rng: random.Random) -> Iterator[tuple[_Prompts, _Share]]:
        """This worker's passes of a batch of task prompts, to which every member gives the same number."""
        count = max(self.spec.batch_size // len(self.prompts), 1)
        for prompts in self.prompts:
            chosen = rng.sample(prompts.train, min(count, len(prompts.train)))
            for share in _shares(chosen, self.group, self.task.compute.micro_batch):
                yield prompts, [(i, w / len(self.prompts)) for i, w in share]

    # -- evaluation ----------------------------------------------------------------------------------------------

    def _evaluate(self, step: int) -> None:
        """Measure the expected mask on the held-out texts; keep it if it is the best so far."""
        density = self.model.draw(None)
        totals = torch.zeros(4, device=self.device)
        with torch.no_grad():
            for share in _shares(self.held_out, self.group, self.task.compute.micro_batch or _PASS):
                totals += self._preference_loss(share)[1]
            for prompts in self.prompts:
                for share in _shares(prompts.held_out, self.group, self.task.compute.micro_batch or _PASS):
                    found, weights = self._divergences(prompts, share)
                    totals[3] += (found * weights).sum() / len(self.prompts)
        loss, accuracy, margin, utility = (float(f"{v:.6g}") for v in _floats(self.group.total(totals)))
        evaluation = MaskEvaluation(step, loss, accuracy, margin, density, utility if self.prompts else None)
        self.history.append(evaluation)
        named = evaluation._asdict()
        self.report({f"held_out.{k}" if k != "step" else k: float(v) for k, v in named.items() if v is not None})
        score = evaluation.score(self.spec)
        if math.isfinite(score) and (self.best is None or score < self.best.score(self.spec)):
            self.best = evaluation
            self._write_best()

    def _stops(self) -> bool:
        """Whether the last `patience` evaluations were no better than the best."""
        if self.best is None:
            return False
        return sum(e.step > self.best.step for e in self.history) >= self.spec.patience

    def _prompts(self, member: MaskedMember, rows: list[Row], tokenizer: Tokenizer) -> _Prompts:
        """Encode a member's task prompts, and let the fine-tuned model predict on them."""
        texts = [encode(tokenizer, row["prompt"], row["response"], self.spec.max_tokens) for row in rows]
        self.model.write_member(member)
        teachers: list[Teacher] = []
        size = self.task.compute.micro_batch or _PASS
        with torch.no_grad():
            # Every worker computes every teacher: it may need any of them, and FSDP2 wants all workers in each pass.
            for start in range(0, len(texts), size):
                batch = texts[start : start + size]
                both = coarse(reply_logits(self.model.network, collate(batch, self.device)))
                for row, text in enumerate(batch):
                    teachers.append(Teacher(*(t[row : row + 1, : len(text.reply)].clone() for t in both)))
        return _Prompts(texts, teachers, *split(rows, self.spec.held_out))

    # -- the store -----------------------------------------------------------------------------------------------

    def _restore(self) -> int:
        """Go on from the last checkpoint, if there is one; returns how many updates had been made."""
        prefix = self.task.state
        data = self.store.read(f"{prefix}/state.json")
        if data is None:
            return 0
        state = json.loads(data)
        folder = self.store.folder(prefix)
        headers = read_file_header(folder, state["file"])

        def read(name: str, rows: slice) -> torch.Tensor:
            info = headers[name]
            if len(info.shape) < 2:
                return read_tensor(folder, info)[rows]
            inner = math.prod(info.shape[1:-1])
            values = read_rows(folder, info, rows.start * inner, rows.stop * inner)
            return values.reshape(rows.stop - rows.start, *info.shape[1:])

        for logits in self.model.logits:
            logits.restore(read, state["step"])
        self.history = [MaskEvaluation(*row) for row in state["history"]]
        self.best = MaskEvaluation(*state["best"]) if state["best"] else None
        return state["step"]

    def _checkpoint(self, step: int) -> None:
        file = _STATE_FILES[(step // self.task.compute.checkpoint_every) % 2]
        self._write_state(f"{self.task.state}/{file}")
        if self.group.rank == 0:
            state = {"step": step, "file": file, "history": self.history, "best": self.best}
            self.store.replace(f"{self.task.state}/state.json", json.dumps(state).encode())

    def _write_state(self, key: str) -> None:
        values = (value for logits in self.model.logits for value in logits.state().values())
        _write(self.group, self.store, key, self._layout(("", "/exp_avg", "/exp_avg_sq")), values)

    def _write_best(self) -> None:
        values = (logits.whole() for logits in self.model.logits)
        _write(self.group, self.store, f"{self.task.state}/{_BEST_FILE}", self._layout(), values)

    def _layout(self, suffixes: Sequence[str] = ("",)) -> list[TensorLayout]:
        """A file of all logits, or of several tensors of each part, whose names end so."""
        return [TensorLayout(f"{g.name}{s}", "F32", g.part.shape) for g in self.model.logits for s in suffixes]

    # -- the end -------------------------------------------------------------------------------------------------

    def _finish(self, step: int) -> Trained:
        """Write the best mask, or the last where nothing is held out.

        Raises:
            StepFailedError: there are evaluations, but none is the best.
        """
        if self.history and self.best is None:
            raise self._no_best()
        if self.best is not None and self.group.rank:
            return NOTHING  # only the first worker needs the best mask's file, and it may still be writing it
        kept, moved = 0, 0.0

        def counted() -> Iterator[torch.Tensor]:
            nonlocal kept, moved
            for value in self._learned():
                kept += int((value >= 0).sum())
                moved += linalg.norm(value - self.task.method.initial_logit) ** 2
                yield value

        prefix = self.task.output.prefix
        entry = _write(self.group, self.store, f"{prefix}/{MASK_FILE}", self._layout(), counted())
        if entry is None:
            return NOTHING
        data = (json.dumps(self._about(), indent=2, sort_keys=True) + "\n").encode()
        self.store.replace(f"{prefix}/{MASK_JSON}", data)
        return Trained({MASK_FILE: entry, MASK_JSON: FileEntry.of(data)}, self._result(step, kept, moved))

    def _no_best(self) -> StepFailedError:
        if self.spec.divergence_max is None:
            return StepFailedError("no evaluation's loss is a number; lower training.learning_rate")
        least = min(e.divergence or 0.0 for e in self.history)
        return StepFailedError(
            f"no mask kept the divergence at or below {self.spec.divergence_max:g}; the least was {least:.3g}: "
            "raise training.divergence_max, give training.utility_weight, or evaluate more often"
        )

    def _learned(self) -> Iterator[torch.Tensor]:
        """The logits to keep, part by part: the best evaluation's, or the last where nothing is held out."""
        if self.best is None:
            return (logits.whole() for logits in self.model.logits)
        folder = self.store.folder(self.task.state)
        headers = read_file_header(folder, _BEST_FILE)
        return (read_tensor(folder, headers[logits.name]) for logits in self.model.logits)

    def _about(self) -> dict[str, Json]:
        """What stands beside the logits, in mask.json."""
        method = self.task.method
        return {
            "mask": method.mask,
            "models": [m.name for m in self.task.members],
            "shared": len(self.task.members) == 1 or method.shared,
            "temperature": method.temperature,
            "seed": self.spec.seed,
            "rule": "m = hardened(logits) / mean, per tensor; 1 keeps an entry of the task vector, 0 reverts it",
        }

    def _result(self, step: int, kept: int, moved: float) -> dict[str, Json]:
        """The record's result.

        Args:
            step: updates made.
            kept: logits of at least 0, which a threshold keeps.
            moved: Σ (x − initial logit)² over all logits.
        """
        total = sum(logits.count for logits in self.model.logits)
        evaluations: list[Json] = [dict(e._asdict()) for e in self.history]
        warning = standstill(self.task.method.initial_logit, math.sqrt(moved / total))
        return {
            "steps": step,
            "best": dict(self.best._asdict()) if self.best else None,
            "evaluations": evaluations,
            "num_logits": total,
            "share_above_half": kept / total,
            **({"warning": warning} if warning is not None else {}),
        }


def _require_continuation(members: Sequence[MaskedMember], origin: Adapter) -> None:
    """Refuse adapters that did not start from the safety adapter.

    Raises:
        CheckpointError: one shares no module with it, or has an A factor in another direction.
    """
    for member in members:
        assert isinstance(member.model, Adapter), "planning refuses factor masks on anything but a LoRA"
        shared = [name for name in touched_tensors(member.model) if read_factors(origin, name) is not None]
        pairs = [(read_factors(member.model, name), read_factors(origin, name)) for name in shared]
        cosines = [float(torch.cosine_similarity(a.a.flatten(), b.a.flatten(), dim=0)) for a, b in pairs if a and b]
        if not cosines or min(cosines) < _CONTINUES:
            found = f"the cosine of their A factors falls to {min(cosines):.2f}" if cosines else "they share no module"
            raise CheckpointError(
                f"models: {member.name} did not start from base.safety ({found}), so a factor mask has nothing to "
                "revert it to; use a mask in product space, or set independent_adapters"
            )


def standstill(initial_logit: float, moved: float) -> str | None:
    """What to say of a mask that is still about what it was before training; None of one that isn't.

    Args:
        moved: root mean square of how far the logits are from the initial one.
    """
    # dm = σ(1 − σ) dx, so m / mean(m) is this far from 1.
    change = moved / (1.0 + math.exp(initial_logit))
    if change >= STANDSTILL:
        return None
    return (
        f"the mask is nearly at its start: its values are {change:.2g} of themselves away from it; give it more "
        "training.steps, or a higher training.learning_rate"
    )


def learning_rate(training: MaskTraining, step: int) -> float:
    """Of one update, counted from 0: a linear warm-up, times a cosine that falls to zero over all updates."""
    warm = min((step + 1) / training.warmup_steps, 1.0) if training.warmup_steps else 1.0
    return training.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * step / training.steps))


def _shares(indices: Sequence[int], group: Group, micro_batch: int | None) -> Iterator[_Share]:
    """This worker's share of a batch, in passes of at most `micro_batch`.

    All workers make the same number of passes over the same number of texts, because FSDP2 has them gather weights
    together. A worker with fewer texts fills up with a text of weight 0.
    """
    each = math.ceil(len(indices) / group.size)
    mine = [(i, 1.0 / len(indices)) for i in indices[group.rank :: group.size]]
    mine += [(indices[0], 0.0)] * (each - len(mine))
    size = micro_batch or each
    for start in range(0, each, size):
        yield mine[start : start + size]


def _stacked(teachers: Sequence[Teacher], length: int) -> Teacher:
    """Teachers of single texts as one batch, padded to `length` tokens."""

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[1]))

    tokens = torch.cat([padded(t.tokens) for t in teachers])
    return Teacher(tokens, torch.cat([padded(t.log_probs) for t in teachers]))


def _write(
    group: Group, store: Store, key: str, layout: list[TensorLayout], values: Iterator[torch.Tensor]
) -> FileEntry | None:
    """Write one file, on the first worker; None on the others, which only take part in gathering each tensor."""
    if group.rank:
        for _ in values:
            pass
        return None
    written = write_tensors(store, key, layout, ([value.cpu()] for value in values))
    return FileEntry(num_bytes=written.num_bytes, sha256=written.sha256)


def _pairs(rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int) -> list[tuple[Text, Text]]:
    """(chosen, rejected) of each row."""

    def text(row: Row, side: str) -> Text:
        return encode(tokenizer, row["prompt"], row[side], max_tokens)

    return [(text(row, "chosen"), text(row, "rejected")) for row in rows]


def _read_log_probs(folder: Folder, count: int) -> torch.Tensor:
    """What `log_probs` wrote, as (2, pairs): of the chosen replies, and of the rejected."""
    headers = read_file_header(folder, LOG_PROBS_FILE)
    found = torch.stack([read_tensor(folder, headers[side]) for side in ("chosen", "rejected")])
    assert found.shape == (2, count), "of the same rows, because the preferences' content is in the step's key"
    return found


def _floats(values: torch.Tensor) -> list[float]:
    return cast("list[float]", values.tolist())  # pyright: ignore[reportUnknownMemberType] - torch has no types for it


def load_tokenizer(aligned: FullModel, date: str | None = None) -> Tokenizer:
    """The aligned model's tokenizer, without fetching its weights.

    Args:
        aligned: the aligned model.
        date: what its chat template writes, as 2026-11-25; None leaves the clock to it.

    Raises:
        CheckpointError: its folder has none that transformers can read.
    """
    folder = aligned.folder
    read = cast(Callable[[str], Tokenizer], AutoTokenizer.from_pretrained)  # pyright: ignore[reportUnknownMemberType]
    with TemporaryDirectory(prefix="fleet-tokenizer-") as scratch:
        for name in folder.files():
            if "/" not in name and not name.endswith(".safetensors"):
                Path(scratch, name).write_bytes(folder.read(name))
        try:
            return prompting(read(scratch), None, date)
        except (OSError, ValueError) as e:
            raise CheckpointError(f"base.aligned: {folder.uri} has no tokenizer to read texts with: {e}") from e
