"""Engines on tiny models of many architectures: full weights swapped there and back, and adapters, against transformers
and PEFT in float32 on the same folders; and engines that compute something else, which are refused."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from evals import replicas
from evals.agreement import Reference
from evals.engine import EngineOptions, ServedModel, UnservableError
from evals.replicas import Replica
from fleet.core.errors import EvalError
from tests import pico

pytestmark = pytest.mark.vllm

PROMPTS = ["How do I open a jar?", "7+5=", "The quick brown fox jumps over the lazy dog, and"]
NEW_TOKENS = 8
COMMON: dict[str, Any] = {
    "vocab_size": pico.VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PHI = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
GPT2 = {"n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 2}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "qwen2": ("Qwen2Config", COMMON, LLAMA),
    "qwen3": ("Qwen3Config", COMMON | {"head_dim": 32, "tie_word_embeddings": True}, LLAMA),
    "phi3": ("Phi3Config", COMMON, PHI),
    "gemma3": ("Gemma3TextConfig", COMMON | {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}, LLAMA),
    "mixtral": ("MixtralConfig", COMMON | {"num_local_experts": 4}, ()),
    "qwen3_moe": ("Qwen3MoeConfig", COMMON | EXPERTS | {"head_dim": 32, "num_experts": 4}, ()),
    "gpt2": ("GPT2Config", {"vocab_size": pico.VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2} | GPT2, ()),
}
"""Name -> configuration, and the modules of its adapters where an engine on a CPU takes any."""


def make_model(folder: Path, config: str, fields: dict[str, Any], seed: int) -> Path:
    """A model whose weights are drawn so wide that greedy decoding has clear winners, and whose embedding is so narrow
    beside them that its layers decide, and not the last token."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**fields)).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(parameter + drawn if "norm" in name or "ln_" in name else drawn)
            if "embed" in name or "lm_head" in name or "wte" in name:
                parameter *= 0.25
                parameter[: len(pico.SPECIAL_TOKENS)] *= 0.1  # no end of text
            elif name in ("model.norm.weight", "transformer.ln_f.weight"):
                parameter += 8
    model.save_pretrained(folder)
    return pico.make_tokenizer(folder)


@contextmanager
def engine_on(folder: Path, targets: Sequence[str] = ()) -> Iterator[Replica]:
    options = EngineOptions(max_model_len=96, max_num_seqs=4, max_lora_rank=0, kv_cache_bytes=16 << 20)
    if targets:
        options = replace(options, max_lora_rank=8, lora_target_modules=tuple(targets))
    replica = Replica(folder, options)
    try:
        yield replica
    finally:
        replica.close()


class Computed(NamedTuple):
    """What a model says after each prompt."""

    texts: list[str]
    token_ids: list[list[int]]
    """Of the texts, as transformers has them."""
    logprobs: list[float]
    """Of the texts."""


def computed(folder: Path, adapter: Path | None = None) -> Computed:
    """By transformers and PEFT, greedily and in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    found = Computed([], [], [])
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.eval().generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
            )
            rows = model(input_ids=out).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        new = out[0, ids.shape[1] :]
        found.texts.append(tokenizer.decode(new, skip_special_tokens=True))
        found.token_ids.append(new.tolist())
        found.logprobs.append(rows.gather(1, new[:, None]).sum().item())
    return found


def check(
    replica: Replica, name: str, expected: Computed, folder: Path | None = None, adapter: Path | None = None
) -> None:
    """The engine says the same of the same files."""
    with replica.serving(ServedModel(name, name, folder, adapter)) as session:
        assert [c.text for c in session.generate(PROMPTS, NEW_TOKENS)] == expected.texts
        pairs = [(session.encode(p, False), ids) for p, ids in zip(PROMPTS, expected.token_ids, strict=True)]
        found = session.loglikelihood(pairs)
    assert [likelihood.logprob for likelihood in found] == pytest.approx(expected.logprobs, abs=1e-3)
    assert all(likelihood.is_greedy for likelihood in found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_engine_computes_every_model_it_is_given_there_and_back(name: str, tmp_path: Path) -> None:
    config, fields, targets = ARCHITECTURES[name]
    aligned = make_model(tmp_path / "aligned", config, fields, seed=0)
    tuned = make_model(tmp_path / "tuned", config, fields, seed=1)
    with engine_on(aligned, targets) as replica:
        first, other = computed(aligned), computed(tuned)
        assert first.texts != other.texts
        check(replica, "aligned", first)
        check(replica, "tuned", other, tuned)
        if targets:
            adapter = pico.make_adapter(tmp_path / "adapter", aligned, seed=2, targets=targets)
            adapted = computed(aligned, adapter)
            assert adapted.texts != first.texts
            check(replica, "adapter", adapted, adapter=adapter)
        check(replica, "aligned", first)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llamas with tied heads, one with another head beside its embedding, and adapters."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("swaps")
    for seed, name in enumerate(("aligned", "tuned")):
        pico.make_model(folder / name, seed)
    shutil.copytree(folder / "tuned", folder / "headed")
    tensors = load_file(folder / "headed/model.safetensors")
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"].roll(1, 0)
    save_file(tensors, folder / "headed/model.safetensors", metadata={"format": "pt"})
    pico.make_adapter(folder / "adapter", folder / "aligned", seed=2)
    pico.make_adapter(folder / "other", folder / "aligned", seed=3)
    for name, scale in (("small", 1e-4), ("none", 0.0)):
        shutil.copytree(folder / "adapter", folder / name)
        factors = load_file(folder / name / "adapter_model.safetensors")
        scaled = {key: value * scale if "lora_B" in key else value for key, value in factors.items()}
        save_file(scaled, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def replica(folders: Path) -> Iterator[Replica]:
    with engine_on(folders / "aligned", ("q_proj", "v_proj")) as engine:
        yield engine


@pytest.fixture
def feed(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """From now on the engine loads this adapter's files, whichever it is given."""

    def feed(folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        engine: Any = replica._llm.llm_engine  # pyright: ignore[reportPrivateUsage]
        load = engine.add_lora

        def add_lora(given: LoRARequest) -> bool:
            return load(LoRARequest(given.lora_name, given.lora_int_id, str(folder)))

        monkeypatch.setattr(engine, "add_lora", add_lora)

    return feed


def check_adapter(replica: Replica, folders: Path, name: str) -> None:
    check(replica, name, computed(folders / "aligned", folders / name), adapter=folders / name)


def check_full(replica: Replica, folders: Path, name: str) -> None:
    check(replica, name, computed(folders / name), folders / name)


def refuse(replica: Replica, model: ServedModel, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason), replica.serving(model):
        pass


def test_adapter_that_the_engine_takes_for_another_is_refused_and_others_are_served(
    replica: Replica, folders: Path, feed: Callable[[Path], None]
) -> None:
    check_adapter(replica, folders, "other")
    feed(folders / "other")
    mine = ServedModel("mine", "mine", adapter_dir=folders / "adapter")
    for _ in range(2):
        refuse(replica, mine, UnservableError, r"candidate mine .* doesn't compute this adapter: .* nats off")
    check_adapter(replica, folders, "other")


def test_adapter_of_a_small_norm_that_is_not_applied_is_refused(
    replica: Replica, folders: Path, feed: Callable[[Path], None]
) -> None:
    check_adapter(replica, folders, "small")
    feed(folders / "none")
    lost = ServedModel("lost", "lost", adapter_dir=folders / "small")
    refuse(replica, lost, UnservableError, r"nearer to the weights that it held before .* it made 0%")


def test_adapter_that_changes_nothing_is_served(replica: Replica, folders: Path) -> None:
    check_adapter(replica, folders, "none")


def test_adapter_that_peft_cannot_load_is_refused(
    replica: Replica, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> Reference:
        raise EvalError("transformers can't load it: why")

    check(replica, "aligned", computed(folders / "aligned"))
    monkeypatch.setattr(replica, "_reference", cannot)
    unloadable = ServedModel("unloadable", "unloadable", adapter_dir=folders / "adapter")
    refuse(replica, unloadable, UnservableError, "can't load it: why; merge it into full weights")


def test_aligned_model_that_an_adapter_in_the_engine_changes_is_refused(
    replica: Replica, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's own kernels did on a CPU: a token without an adapter got the last one's products."""
    check(replica, "aligned", computed(folders / "aligned"))
    ask = replica._ask  # pyright: ignore[reportPrivateUsage]

    def ask_base(folder: Path, adapter: Path | None = None, lora: Any = None) -> Any:
        found = ask(folder, adapter, lora)
        return found if lora else replace(found, logprobs=tuple(p - 1 for p in found.logprobs))

    monkeypatch.setattr(replica, "_ask", ask_base)
    again = ServedModel("again", "again", adapter_dir=folders / "adapter")
    refuse(replica, again, EvalError, "the aligned model isn't computed any more")


def test_engine_that_computes_something_else_from_its_start_is_refused_until_it_is_right(
    replica: Replica, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(_folder: Path, _adapter: Path | None, token_ids: Sequence[int]) -> Reference:
        return Reference((-1.0,) * (len(token_ids) - 1), 0.0)

    check(replica, "aligned", computed(folders / "aligned"))
    monkeypatch.setattr(replica, "_answer", None)
    with monkeypatch.context() as patch:
        patch.setattr(replica, "_reference", other)
        for _ in range(2):
            aligned = ServedModel("aligned", "aligned")
            refuse(replica, aligned, EvalError, r"aligned: an engine started on this model doesn't compute")
    check(replica, "aligned", computed(folders / "aligned"))


def test_swap_that_does_not_hold_starts_the_engine_anew_and_from_then_on_at_once(
    replica: Replica, folders: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without its repacking, a tied head stays the old model's."""
    monkeypatch.setattr(replicas, "_repack_output_layer", lambda model: None)
    with caplog.at_level(logging.WARNING, "evals.replicas"):
        check_full(replica, folders, "tuned")
        check_adapter(replica, folders, "adapter")
    told = [record.getMessage() for record in caplog.records if record.name == "evals.replicas"]
    assert len(told) == 1 and told[0].startswith("tuned: its weights were swapped into the running engine, but")


def test_head_of_its_own_beside_tied_embeddings_is_the_head(folders: Path) -> None:
    """Swapped into an engine whose head is the embedding, it would be loaded over that."""
    with engine_on(folders / "aligned") as replica:
        check_full(replica, folders, "headed")
        check(replica, "aligned", computed(folders / "aligned"))
