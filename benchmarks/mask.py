"""One update of a mask's training, compared with the published way and a floor: `python -m benchmarks.mask`.

There is a Llama of 185 million parameters in bfloat16, a full fine-tune of it, a dense mask over every Linear, and the
published batch: 16 preference pairs, here of 32 tokens of prompt and 128 of reply. In turns, each in a process of its
own:

- `ours`: `fleet.masks.masked_model`, with the aligned model's log-probabilities from the cache.
- `published`: a straightforward update as the paper's code makes it: every mask is drawn and every merged tensor built
  under autograd, the policy runs on them, the reference does the same live, and Adam moves all logits at the end.
- `floor`: forward and backward of the plain model on the same batch, with gradients for the same weights. No update can
  be faster.

Memory is what the process holds after an update (weights, task vector, logits, moments), and its peak within one; both
are resident bytes, so they include what the allocators keep. What a 7B would take on GPUs is computed from the first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation calls it
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fleet.checkpoint.model import read_model, require_full_model
from fleet.masks.batches import Batch, Text, collate
from fleet.masks.masked_model import ALONE, MaskedMember, MaskedModel
from fleet.masks.network import build_network
from fleet.masks.objective import dpo_losses, margins, reply_log_probs
from fleet.methods.somf import Somf
from fleet.run.pools import WORKER_ENV
from fleet.store import open_folder

CONFIG = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True, "max_position_embeddings": 1024,
}  # fmt: skip
PAIRS, PROMPT_TOKENS, REPLY_TOKENS = 16, 32, 128
BETA, TEMPERATURE, LEARNING_RATE = 0.1, 0.5, 5e-3
CPU = torch.device("cpu")

_WARM_UP = 2

CONTESTANTS = ("floor", "ours", "published")
LLAMA_7B = {"parameters": 6_738_415_616, "masked": 6_476_005_376, "layer": 202_383_360, "largest": 45_088_768}
"""Parameters of Llama-2-7B: all, those of its Linears without the head, of one layer, and of the largest Linear."""


def write_models(folder: Path) -> None:
    """`aligned` and `tuned`, which differs from it in every Linear by about a hundredth."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).bfloat16()  # type: ignore[arg-type]
    model.save_pretrained(folder / "aligned")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_masked(name):
                parameter.add_(torch.randn_like(parameter) * 2e-4)
    model.save_pretrained(folder / "tuned")


def is_masked(name: str) -> bool:
    return name.endswith("_proj.weight")


def make_batch() -> Batch:
    """Chosen and rejected replies of random tokens to shared prompts."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, int(CONFIG["vocab_size"]), (count,), generator=generator).tolist())

    prompts = [draw(PROMPT_TOKENS) for _ in range(PAIRS)]
    return collate([Text(prompt, draw(REPLY_TOKENS)) for _ in range(2) for prompt in prompts], CPU)


def preference_loss(network: Any, batch: Batch, reference: torch.Tensor) -> torch.Tensor:
    policy = reply_log_probs(network, batch).view(2, -1)
    return dpo_losses(margins(policy, reference), BETA).mean()


def floor(folder: Path, batch: Batch) -> tuple[Callable[[int], float], int]:
    network = load(folder / "aligned")
    masked = [p.requires_grad_(True) for name, p in network.named_parameters() if is_masked(name)]
    reference = torch.zeros(2, PAIRS)

    def step(number: int) -> float:
        loss = preference_loss(network, batch, reference)
        loss.backward()
        network.zero_grad()
        return loss.item()

    return step, sum(p.numel() for p in masked)


def ours(folder: Path, batch: Batch) -> tuple[Callable[[int], float], int]:
    aligned = require_full_model(read_model(open_folder(str(folder / "aligned"))), "aligned")
    network = build_network(aligned, torch.bfloat16, CPU, ALONE, False)
    with torch.no_grad():
        reference = reply_log_probs(network, batch).view(2, -1)
    method = Somf(method="somf", preferences="none", temperature=TEMPERATURE)
    member = MaskedMember("tuned", read_model(open_folder(str(folder / "tuned"))))
    model = MaskedModel(network, aligned, [member], None, method, None, ALONE)

    def step(number: int) -> float:
        model.draw(number)
        loss = preference_loss(network, batch, reference)
        model.backward(loss, LEARNING_RATE)
        return loss.item()

    return step, sum(logits.count for logits in model.logits)


def published(folder: Path, batch: Batch) -> tuple[Callable[[int], float], int]:
    """As the paper's code makes an update: the reference is a masked model too, drawn and built anew each time."""
    network, tuned = load(folder / "aligned"), load(folder / "tuned")
    base = {name: p.detach() for name, p in network.named_parameters() if is_masked(name)}
    delta = {name: p.detach() - base[name] for name, p in tuned.named_parameters() if name in base}
    del tuned
    logits = {name: torch.zeros(p.shape, requires_grad=True) for name, p in base.items()}
    optimizer = torch.optim.Adam(logits.values(), lr=LEARNING_RATE)

    def merged() -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, x in logits.items():
            noise = torch.rand_like(x).clamp(1e-6, 1 - 1e-6)
            mask = torch.sigmoid((torch.log(noise) - torch.log(1 - noise) + x) / TEMPERATURE)
            found[name] = (base[name].float() + mask * delta[name] / mask.mean()).bfloat16()
        return found

    def log_probs(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        def call(**inputs: Any) -> Any:
            return torch.func.functional_call(network, weights, (), inputs)

        return reply_log_probs(call, batch).view(2, -1)

    def step(number: int) -> float:
        with torch.no_grad():
            reference = log_probs(merged())
        loss = -F.logsigmoid(BETA * margins(log_probs(merged()), reference)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, sum(x.numel() for x in logits.values())


def load(path: Path) -> Any:
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return network.requires_grad_(False).train()


def measure(name: str, folder: str, steps: int, threads: int, answer: Any) -> None:
    """One turn of one contestant, in this process: updates until its memory has settled, then `steps` timed ones."""
    torch.set_num_threads(threads)
    batch = make_batch()
    step, masked = {"floor": floor, "ours": ours, "published": published}[name](Path(folder), batch)
    for number in range(_WARM_UP):
        step(number)
    held = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    seconds: list[float] = []
    for number in range(_WARM_UP, _WARM_UP + steps):
        start = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - start)
    answer.send({"seconds": min(seconds), "held": held, "peak": resident("VmHWM"), "masked": masked})


def resident(field: str) -> int:
    """Bytes this process holds, or held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def turn(name: str, folder: Path, steps: int, threads: int) -> dict[str, float]:
    os.environ.update(WORKER_ENV | {"OMP_NUM_THREADS": str(threads)})  # as a training worker has it
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, str(folder), steps, threads, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def seven_billion(bytes_per_logit: float) -> dict[int, float]:
    """n -> GB on each of n GPUs for a dense mask over a 7B's Linears, without activations.

    Sharded are the weights in bfloat16, what goes with a logit, as measured, and the values of the largest tensor's
    mask in float32. If there are several GPUs, FSDP2 gathers two layers' weights and one's gradients on each.
    """
    sharded = 2 * LLAMA_7B["parameters"] + bytes_per_logit * LLAMA_7B["masked"]
    whole = 2 * 3 * LLAMA_7B["layer"]
    return {n: (sharded / n + (whole if n > 1 else 0) + 4 * LLAMA_7B["largest"] / n) / 1e9 for n in (1, 2, 4, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mask", description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed updates of each turn, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    console = Console()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as scratch:
        write_models(Path(scratch))
        for number in range(arguments.turns):
            for name in CONTESTANTS:
                measured = turn(name, Path(scratch), arguments.steps, arguments.threads)
                found[name].append(measured)
                console.print(f"turn {number + 1}, {name}: {measured['seconds']:.2f} s")
    seconds = {name: statistics.median(m["seconds"] for m in rows) for name, rows in found.items()}
    held = {name: statistics.median(m["held"] for m in rows) for name, rows in found.items()}
    peak = {name: statistics.median(m["peak"] for m in rows) for name, rows in found.items()}
    masked = found["ours"][0]["masked"]
    table = Table(
        title=f"One update, {masked / 1e6:.0f} M logits, {PAIRS} pairs of {PROMPT_TOKENS} + {REPLY_TOKENS} tokens"
    )
    for heading in ("", "seconds", "× floor", "held, GB", "peak, GB"):
        table.add_column(heading, justify="right")
    for name in CONTESTANTS:
        ratio = seconds[name] / seconds["floor"]
        table.add_row(
            name, f"{seconds[name]:.2f}", f"{ratio:.2f}", f"{held[name] / 1e9:.2f}", f"{peak[name] / 1e9:.2f}"
        )
    console.print(table)
    # The floor holds the weights once; an update also needs W, δ, the logits and two moments.
    per_logit = (held["ours"] - held["floor"]) / masked
    console.print(f"bytes per logit beside the weights: {per_logit:.1f} (W 2, δ 2, logit 4, moments 8: 16)")
    console.print(
        "a dense mask on a 7B, GB per GPU without activations: "
        + ", ".join(f"{n}: {gb:.0f}" for n, gb in seven_billion(per_logit).items())
    )
    required = {
        "floor_ratio": (seconds["ours"] / seconds["floor"], 1.35, "max"),
        "published_speedup": (seconds["published"] / seconds["ours"], 2.0, "min"),
    }
    met = all(x <= bound if kind == "max" else x >= bound for x, bound, kind in required.values())
    result = {
        "benchmark": "mask",
        "required": {n: {"measured": round(x, 3), "bound": b, "kind": k} for n, (x, b, k) in required.items()},
        "met": met,
        "bytes_per_logit": round(per_logit, 2),
        "peak_over_floor_gb": round((peak["ours"] - peak["floor"]) / 1e9, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
