"""What one vLLM engine is and what it may be asked to serve; light: no torch, no vllm.

The coordinator reads this module to plan and to start replicas: `EngineOptions` is how an engine is built,
`engine_env` the environment of its process, `ServedModel` what it is asked to serve. `unservable` and
`weights_mismatch` say, from a config and from headers alone, why an engine must not be handed a model: vLLM
ignores some of these silently and does not recover from others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.configs import differences
from fleet.checkpoint.full_model import FullModel
from fleet.core.errors import EvalError, InputError, some
from fleet.core.identity import Json

LORA_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""The linear layers of Llama-like models. lm_head and embed_tokens stay out: with the first, prompt logprobs
crash on the CPU and are wrong on a GPU (vLLM #51594, #16668)."""

DEFAULT_MAX_MODEL_LEN = 4096
"""Longest prompt and completion where neither the manifest nor the model says less, in tokens."""

UNKNOWN_MODEL_LEN = 2048
"""Taken of a model whose config names no length, as vLLM takes it."""

_LENGTHS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "model_max_length",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
"""What models call their longest text in config.json."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values vLLM 0.32 takes for max_lora_rank."""

MAX_SERVED_RANK = VLLM_RANKS[-1]
"""The largest LoRA rank vLLM serves."""


class UnservableError(EvalError):
    """A model was refused before the engine was touched: the engine is as healthy as it was."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built, the same words on a CPU and on a GPU.

    What only one of them reads says so. `max_lora_rank` 0 builds an engine without LoRA.
    """

    max_model_len: int = 2048
    """Tokens of prompt and completion together."""
    max_num_seqs: int = 64
    """Sequences decoded at once."""
    dtype: str = "auto"
    """auto is the checkpoint's on a GPU and float32 on a CPU, where bfloat16 is emulated at half the speed."""
    max_lora_rank: int = 64
    """The largest rank of any adapter to be served; rounded up to a value that vLLM takes."""
    max_loras: int = 1
    """Adapters in one batch; each takes the memory of one of the largest rank in every target module."""
    lora_target_modules: tuple[str, ...] = LORA_MODULES
    seed: int = 0
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    """GPU only."""
    kv_cache_bytes: int = 128 << 20
    """CPU only: an engine that is not told takes 92 % of the machine's memory."""

    def __post_init__(self) -> None:
        if self.max_lora_rank:
            engine_rank(self.max_lora_rank)


@dataclass(frozen=True)
class ServedModel:
    """What an engine serves: full weights, an adapter on the aligned model, or (neither given) the aligned model.

    `identity` is a content digest; two with the same identity are the same model.
    """

    name: str
    identity: str
    model_dir: Path | None = None
    adapter_dir: Path | None = None
    chat_template: str | None = None
    """What it is prompted with; None is its tokenizer's own."""
    date: str | None = None
    """What the template writes, as 2026-11-25; None leaves the clock to it."""

    def __post_init__(self) -> None:
        if self.model_dir is not None and self.adapter_dir is not None:
            raise EvalError(
                f"candidate {self.name}: both full weights and an adapter are given; "
                "an adapter is served on the aligned model, so give one of the two"
            )


@dataclass(frozen=True)
class Completion:
    """What a model said to one prompt."""

    text: str
    num_prompt_tokens: int
    num_tokens: int
    finish_reason: str
    """stop (end of text or a stop string) or length."""
    logprobs: Mapping[str, float] = field(default_factory=dict[str, float])
    """Token text -> log probability in nats, of the likeliest first tokens, where they were asked for."""


class Likelihood(NamedTuple):
    """How likely a continuation is: its summed log probability in nats, and whether greedy decoding gives it.

    Two tokens that tie for the first place are both not greedy.
    """

    logprob: float
    is_greedy: bool


def engine_env(options: EngineOptions, num_threads: int = 1) -> dict[str, str]:
    """The environment an engine's process must start with, before torch or vllm is imported.

    Without OMP_NUM_THREADS decoding on a CPU is ten times slower. In-process engines are for one device; with
    tensor parallelism vLLM needs its own processes.
    """
    env = {
        "OMP_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if options.tensor_parallel_size == 1:
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env


def model_length(config: Mapping[str, Json]) -> int | None:
    """Tokens that a model can have before it, by its config; None where that says nothing.

    Of the names that models give it, the smallest value counts, at the top and in `text_config`, as in vLLM 0.32
    (`derive_max_model_len_and_key`); a rope scaling by a factor stretches it, unless its length says so already.
    """
    inner = config.get("text_config")
    parts = [config, inner] if isinstance(inner, dict) else [config]
    named = [part.get(name) for part in parts for name in _LENGTHS]
    found = [value for value in named if isinstance(value, int) and value > 0]
    if not found:
        return None
    factor = max((_stretch(part) for part in parts), default=1.0)
    return int(min(found) * factor)


def _stretch(config: Mapping[str, Json]) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or "gemma3" in str(config.get("model_type")):
        return 1.0
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    return factor if kind in ("linear", "dynamic") and isinstance(factor, int | float) else 1.0


def engine_length(config: Mapping[str, Json], asked: int | None, where: str) -> int:
    """Tokens of prompt and completion together: what the user asks for, else the model's own, at most the default's.

    Args:
        config: of the model that the engine starts on.
        asked: `evaluation.max_model_len`.
        where: whose config it is, for messages.

    Raises:
        InputError: more is asked for than the model can.
    """
    limit = model_length(config)
    if asked is None:
        return min(limit or UNKNOWN_MODEL_LEN, DEFAULT_MAX_MODEL_LEN)
    if limit is not None and asked > limit:
        raise InputError(
            f"evaluation.max_model_len is {asked}, but {where} has {limit} positions (config.json); give at most that"
        )
    return asked


def engine_rank(rank: int) -> int:
    """The smallest max_lora_rank vLLM takes that serves adapters of `rank`.

    Raises:
        EvalError: The rank is not positive or larger than vLLM serves.
    """
    for allowed in VLLM_RANKS:
        if 0 < rank <= allowed:
            return allowed
    raise EvalError(f"LoRA rank {rank} cannot be served: vLLM takes 1 to {VLLM_RANKS[-1]}")


ENGINE_ENV: dict[str, str] = engine_env(EngineOptions())
"""`engine_env` of an engine on one device with one CPU thread."""


def engine_arguments(options: EngineOptions, on_cpu: bool) -> dict[str, Any]:
    """The keyword arguments of `vllm.LLM` for these options on this kind of device."""
    arguments: dict[str, Any] = {
        "dtype": "float32" if on_cpu and options.dtype == "auto" else options.dtype,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "seed": options.seed,
        "tensor_parallel_size": options.tensor_parallel_size,
        "disable_log_stats": True,
        # The sampling parameters are ours; a model's own (top_p, repetition_penalty) would skew a comparison.
        "generation_config": "vllm",
    }
    if on_cpu:
        # Given both, vLLM skips its warm-up: 3 seconds instead of 86.
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": options.kv_cache_bytes}
    else:
        arguments |= {"gpu_memory_utilization": options.gpu_memory_utilization}
    if options.max_lora_rank:
        arguments |= {
            "enable_lora": True,
            "max_loras": options.max_loras,
            "max_cpu_loras": options.max_loras,
            "max_lora_rank": engine_rank(options.max_lora_rank),
            "lora_target_modules": list(options.lora_target_modules),
        }
    return arguments


def unservable(
    adapter: Adapter, max_rank: int = MAX_SERVED_RANK, target_modules: Collection[str] | None = None
) -> str | None:
    """Why an engine can't serve an adapter as a LoRA, or None if it can: what planning and scoring both ask.

    Every reason is listed, in one line. It follows from the tensors: what the adapter's config says beside them is
    written anew for the engine (`evals.served_lora`). The other way to score such an adapter is in full weights.

    Args:
        adapter: its headers.
        max_rank: the engine's; 0 if it was built without LoRA.
        target_modules: the last parts of the names of the modules that can have a LoRA in it; None is any Linear's.
    """
    reasons: list[str] = []
    if reason := adapter.why_not_lora():
        reasons.append(f"it {reason}")
    if not max_rank:
        reasons.append("the engine was built without LoRA (max_lora_rank 0)")
    elif adapter.max_rank > max_rank:
        reasons.append(f"its rank {adapter.max_rank} is above the engine's {max_rank}")
    if max_rank and (outside := unserved_modules(adapter.modules, target_modules)):
        reasons.append(f"the engine has no LoRA on {some(outside)}")
    return "; ".join(reasons) or None


def unserved_modules(modules: Iterable[str], target_modules: Collection[str] | None) -> set[str]:
    """Modules on which a LoRA would be lost, by the last parts of their names: vLLM drops some without a word. LoRAs
    of experts by name are left to full weights: a CPU has no kernel for them, and other models stack their experts."""
    parts = [module.split(".") for module in modules]
    experts = {".".join(path[-3:]) for path in parts if "experts" in path}
    plain = {path[-1] for path in parts if "experts" not in path}
    return experts | (set() if target_modules is None else plain - set(target_modules))


def weights_mismatch(resident: FullModel, candidate: FullModel) -> list[str]:
    """Every way in which a candidate's tensors differ from the resident model's in name or shape.

    Both leave out a tied lm_head and derived buffers, which no loader reads.
    """
    expected = {name: list(tensor.shape) for name, tensor in resident.tensors.items()}
    found = {name: list(tensor.shape) for name, tensor in candidate.tensors.items()}
    problems = [f"missing {n} {expected[n]}" for n in sorted(expected.keys() - found.keys())]
    problems += [f"extra {n} {found[n]}" for n in sorted(found.keys() - expected.keys())]
    problems += [
        f"{n} is {found[n]}, not {expected[n]}"
        for n in sorted(expected.keys() & found.keys())
        if found[n] != expected[n]
    ]
    return problems


def config_mismatch(resident: Mapping[str, Any], candidate: Mapping[str, Any]) -> list[str]:
    """Every field of two `config.json`s that differs and changes what the weights compute, as planning asks too.

    Swapping weights does not swap the configuration: a candidate with another rope or normalisation would be
    scored as something it is not.
    """
    return [str(found) for found in differences(candidate, resident)]


def lora_id(identity: str) -> int:
    """A positive 62-bit number for an adapter, from its identity: vLLM trusts it to be unique."""
    return int(hashlib.sha256(identity.encode()).hexdigest()[:15], 16) + 1


def describe(problems: Sequence[str], limit: int = 20) -> str:
    """The problems in one line; beyond `limit` only their number."""
    shown = "; ".join(problems[:limit])
    return f"{shown}; and {len(problems) - limit} more" if len(problems) > limit else shown
