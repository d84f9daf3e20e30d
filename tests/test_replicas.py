"""One real engine on a pico Llama, against transformers and PEFT on the same files."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evals.engine import Candidate, EngineOptions, UnservableError
from evals.harness import run_prompts, run_task
from evals.judges import RuleJudge
from evals.lm import FleetLM
from evals.replicas import Replica
from evals.suites import load_suite
from fleet.errors import EvalError, SuiteError
from tests import pico

PROMPTS = ["How do I open a jar?", "7+5=", "Say hi.", "The quick brown fox"]
OPTIONS = EngineOptions(max_model_len=128, max_num_seqs=8, max_lora_rank=8, kv_cache_bytes=32 << 20)


@pytest.fixture(scope="module")
def fleet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    pico.make_model(folder / "aligned", seed=0)
    pico.make_model(folder / "full", seed=1, shards=2)
    pico.make_adapter(
        folder / "adapter",
        folder / "aligned",
        seed=2,
        targets=("q_proj", "v_proj", "down_proj"),
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 3.0},
    )
    pico.make_adapter(folder / "other_adapter", folder / "aligned", seed=3)
    return folder


@pytest.fixture(scope="module")
def candidates(fleet_dir: Path) -> dict[str, Candidate]:
    return {
        "aligned": Candidate("aligned", "sha256:aligned"),
        "adapter": Candidate("adapter", "sha256:adapter", adapter_dir=fleet_dir / "adapter"),
        "other_adapter": Candidate("other_adapter", "sha256:other", adapter_dir=fleet_dir / "other_adapter"),
        "full": Candidate("full", "sha256:full", model_dir=fleet_dir / "full"),
    }


@pytest.fixture(scope="module")
def replica(fleet_dir: Path) -> Iterator[Replica]:
    engine = Replica(fleet_dir / "aligned", OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def hf_model(fleet_dir: Path) -> Callable[[str], Any]:
    """A candidate by name, as transformers and PEFT load it in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(name: str) -> Any:
        is_adapter = name.endswith("adapter")
        base = fleet_dir / ("aligned" if is_adapter else name)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, fleet_dir / name).eval() if is_adapter else model

    return load


def hf_generate(model: Any, tokenizer: Any, ids: Sequence[int], max_tokens: int) -> str:
    import torch

    inputs = torch.tensor([list(ids)])
    out = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_tokens,
        do_sample=False,
    )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def hf_logprob(model: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    import torch

    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    rows = logprobs[len(context) - 1 : -1]
    targets = torch.tensor(list(continuation))
    total = rows.gather(1, targets[:, None]).sum().item()
    return total, bool((rows.argmax(-1) == targets).all())


def instances(arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [SimpleNamespace(args=a, doc_id=i, task_name="toy", idx=0) for i, a in enumerate(arguments)]


def copy_with_config(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of an adapter or model folder with fields of its configuration changed."""
    shutil.copytree(source, target)
    file = target / ("config.json" if (target / "config.json").exists() else "adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return target


def assert_equals_hf(replica: Replica, model: Any) -> None:
    lm = FleetLM(replica, templated=False)
    texts = lm.generate_until(instances([(p, {"until": [], "max_gen_toks": 12}) for p in PROMPTS]))
    ids = [replica.encode(p, templated=False) for p in PROMPTS]
    expected = [hf_generate(model, replica.tokenizer, i, 12) for i in ids]
    assert texts == expected

    pairs = [(p, " yes") for p in PROMPTS] + [(p, t) for p, t in zip(PROMPTS, texts, strict=True)]
    scores = lm.loglikelihood(instances(pairs))
    for (context, continuation), (logprob, is_greedy) in zip(pairs, scores, strict=True):
        context_ids = replica.encode(context, templated=False)
        whole = replica.encode(context + continuation, templated=False)
        wanted = hf_logprob(model, context_ids, whole[len(context_ids) :])
        assert logprob == pytest.approx(wanted[0], abs=1e-3)
        assert is_greedy == wanted[1]
    assert all(is_greedy for _, is_greedy in scores[len(PROMPTS) :])


def test_replica_swaps_candidates_and_each_equals_transformers(
    replica: Replica, candidates: dict[str, Candidate], hf_model: Callable[[str], Any]
) -> None:
    for name in ("aligned", "adapter", "full", "other_adapter", "aligned", "full", "aligned"):
        replica.load(candidates[name])
        assert replica.candidate.name == name
        assert_equals_hf(replica, hf_model(name))


def test_replica_long_shared_prompt_after_swap_uses_no_stale_blocks(
    replica: Replica, candidates: dict[str, Candidate], hf_model: Callable[[str], Any]
) -> None:
    prompt = "Tell me, one more time and slowly, how the story of the fox and the crow goes on."
    texts: dict[str, str] = {}
    for name in ("aligned", "full", "aligned"):
        replica.load(candidates[name])
        text = replica.generate([prompt], max_tokens=8)[0].text
        ids = replica.encode(prompt, templated=False)
        assert (name, text) == (name, hf_generate(hf_model(name), replica.tokenizer, ids, 8))
        assert texts.setdefault(name, text) == text
    assert texts["aligned"] != texts["full"]


def test_replica_same_candidate_loads_nothing(
    replica: Replica, candidates: dict[str, Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica.load(candidates["full"])
    monkeypatch.setattr(replica, "_llm", None)
    replica.load(candidates["full"])


def test_chat_prompt_template_with_bos_encodes_one_bos(replica: Replica) -> None:
    text = replica.chat_prompt("hi")
    assert text == "<s><|user|>hi<|assistant|>"
    bos = replica.tokenizer.bos_token_id
    assert replica.encode(text, templated=True).count(bos) == 1
    assert replica.encode(text, templated=False).count(bos) == 1
    assert replica.encode("hi", templated=False)[0] == bos
    assert bos not in replica.encode("hi", templated=True)


def test_generate_reports_counts_and_stops(replica: Replica, candidates: dict[str, Candidate]) -> None:
    replica.load(candidates["aligned"])
    whole = replica.generate(["Say hi."], max_tokens=9)[0]
    assert (whole.num_prompt_tokens, whole.num_tokens, whole.finish_reason) == (8, 9, "length")
    mark = whole.text[3]
    cut = replica.generate(["Say hi."], max_tokens=9, stop=[mark])[0]
    assert cut.text == whole.text.split(mark)[0]
    assert cut.finish_reason == "stop"
    assert replica.generate([], max_tokens=9) == []


def test_generate_prompt_without_room_raises_and_engine_lives(replica: Replica) -> None:
    with pytest.raises(EvalError, match="exceed max_model_len 128"):
        replica.generate(["x" * 120], max_tokens=9)
    assert replica.generate(["x" * 118], max_tokens=9)[0].num_tokens == 9


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"r": 16}, "rank 16 is above the engine's 8"),
        ({"target_modules": ["q_proj", "lm_head"]}, "no LoRA on lm_head"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_load_unservable_adapter_refused_and_engine_healthy(
    replica: Replica,
    fleet_dir: Path,
    candidates: dict[str, Candidate],
    tmp_path: Path,
    changes: dict[str, Any],
    reason: str,
) -> None:
    replica.load(candidates["adapter"])
    before = replica.generate(PROMPTS, max_tokens=4)
    bad = copy_with_config(fleet_dir / "other_adapter", tmp_path / "bad", **changes)
    with pytest.raises(UnservableError, match=reason):
        replica.load(Candidate("bad", "sha256:bad", adapter_dir=bad))
    assert replica.candidate.name == "adapter"
    assert replica.generate(PROMPTS, max_tokens=4) == before


def test_load_adapter_whose_tensors_reach_further_refused(replica: Replica, fleet_dir: Path, tmp_path: Path) -> None:
    folder = pico.make_adapter(tmp_path / "head", fleet_dir / "full", seed=4, targets=("q_proj", "lm_head"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ".*"}))
    with pytest.raises(UnservableError, match="lm_head"):
        replica.load(Candidate("head", "sha256:head", adapter_dir=folder))


def test_load_misshapen_weights_refused_before_the_engine(
    replica: Replica,
    fleet_dir: Path,
    candidates: dict[str, Candidate],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    replica.load(candidates["aligned"])
    bad = tmp_path / "bad"
    shutil.copytree(fleet_dir / "aligned", bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(63, 32, dtype=torch.bfloat16)
    tensors["model.surplus.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})

    def untouchable(*_: object, **__: object) -> None:
        raise AssertionError("the engine was touched")

    with monkeypatch.context() as patch:
        patch.setattr(replica, "_swap_weights", untouchable)
        patch.setattr(replica, "_drop_lora", untouchable)
        with pytest.raises(UnservableError) as refusal:
            replica.load(Candidate("bad", "sha256:bad", model_dir=bad))
    for problem in (
        "missing model.norm.weight [32]",
        "extra model.surplus.weight [32]",
        "up_proj.weight is [63, 32], not [64, 32]",
    ):
        assert problem in str(refusal.value)


def test_load_other_configuration_refused(replica: Replica, fleet_dir: Path, tmp_path: Path) -> None:
    bad = copy_with_config(fleet_dir / "full", tmp_path / "bad", rms_norm_eps=1e-3)
    with pytest.raises(UnservableError, match=r"rms_norm_eps is 0\.001"):
        replica.load(Candidate("bad", "sha256:bad", model_dir=bad))


def test_load_other_vocabulary_refused(replica: Replica, fleet_dir: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(fleet_dir / "full", bad)
    text = (bad / "tokenizer.json").read_text()
    (bad / "tokenizer.json").write_text(text.replace('"a": 6,', '"a": 7,').replace('"b": 7,', '"b": 6,'))
    with pytest.raises(UnservableError, match="numbers its tokens unlike"):
        replica.load(Candidate("bad", "sha256:bad", model_dir=bad))


def test_candidate_with_weights_and_adapter_raises(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="give one of the two"):
        Candidate("both", "sha256:both", tmp_path, tmp_path)


GENERATE_TASK = """
task: toy_generate
dataset_path: json
dataset_kwargs: {data_files: {test: toy_generate.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""

CHOICE_TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: toy_choice.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{q}}"
doc_to_choice: ["yes", "no", "perhaps"]
doc_to_target: "{{a}}"
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def write_task(folder: Path, name: str, text: str, rows: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(text)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / f"{name}.yaml"


@pytest.mark.parametrize("chat", [True, False])
def test_run_task_generate_until_accuracy_is_counted_by_hand(
    replica: Replica, candidates: dict[str, Candidate], tmp_path: Path, chat: bool
) -> None:
    replica.load(candidates["adapter"])
    inputs = [replica.chat_prompt(p) if chat else p for p in PROMPTS]
    texts = [c.text for c in replica.generate(inputs, 6, ["\n"], templated=chat)]
    answers = [texts[0], "wrong", texts[2], "also wrong"]
    rows = [{"q": q, "a": a} for q, a in zip(PROMPTS, answers, strict=True)]
    suite = load_suite(write_task(tmp_path, "toy_generate", GENERATE_TASK, rows))

    log = run_task(replica, suite, chat=chat)

    assert (log.rate.numerator, log.rate.denominator, log.rate.unscored) == (2, 4, 0)
    assert [s.score for s in log.samples] == [1, 0, 1, 0]
    assert [s.completion for s in log.samples] == texts
    assert [s.input for s in log.samples] == inputs
    assert [s.prompt for s in log.samples] == PROMPTS
    assert [s.target for s in log.samples] == answers
    assert all(s.num_tokens and s.num_tokens <= 6 for s in log.samples)
    assert log.samples_jsonl() == run_task(replica, suite, chat=chat).samples_jsonl()


def test_run_task_multiple_choice_accuracy_is_counted_by_hand(
    replica: Replica,
    candidates: dict[str, Candidate],
    hf_model: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    model, choices, best = hf_model("full"), ["yes", "no", "perhaps"], []
    replica.load(candidates["full"])
    for prompt in PROMPTS:
        context = replica.encode(prompt, templated=False)
        scores = [hf_logprob(model, context, replica.encode(f" {c}", templated=True))[0] for c in choices]
        best.append(scores.index(max(scores)))
    answers = [best[0], best[1], best[2], (best[3] + 1) % 3]
    rows = [{"q": q, "a": a} for q, a in zip(PROMPTS, answers, strict=True)]
    suite = load_suite(write_task(tmp_path, "toy_choice", CHOICE_TASK, rows))

    log = run_task(replica, suite, chat=False)

    assert log.metric == "acc"
    assert [s.score for s in log.samples] == [1, 1, 1, 0]
    assert [s.completion for s in log.samples] == [choices[b] for b in best]
    assert log.rate.value == 0.75


def test_run_task_same_path_with_new_content_reads_new_content(replica: Replica, tmp_path: Path) -> None:
    path = write_task(tmp_path, "toy_choice", CHOICE_TASK, [{"q": "a?", "a": 0}])
    data = tmp_path / "toy_choice.jsonl"
    before = data.stat()
    assert run_task(replica, load_suite(path)).samples[0].prompt == "a?"
    data.write_text(json.dumps({"q": "b?", "a": 0}) + "\n")
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run_task(replica, load_suite(path)).samples[0].prompt == "b?"


def test_loglikelihood_rolling_equals_transformers(
    replica: Replica, candidates: dict[str, Candidate], hf_model: Callable[[str], Any]
) -> None:
    replica.load(candidates["aligned"])
    text = "The quick brown fox"
    bos = replica.encode("", templated=False)
    expected = hf_logprob(hf_model("aligned"), bos, replica.encode(text, templated=True))[0]
    lm = FleetLM(replica, templated=False)
    assert lm.loglikelihood_rolling(instances([(text,)])) == [pytest.approx(expected, abs=1e-3)]
    assert len(lm.loglikelihood_rolling(instances([(text * 20,)]))) == 1


def test_generate_until_long_context_is_cut_and_counted(replica: Replica) -> None:
    lm = FleetLM(replica, templated=False)
    settings = {"until": [], "max_gen_toks": 4}
    long, short = lm.generate_until(instances([("x" * 300 + "abc", settings), ("abc", settings)]))
    assert long and short and lm.num_truncated == 1


def test_run_prompts_scores_every_prompt_and_log_survives_a_round_trip(
    replica: Replica, candidates: dict[str, Candidate], tmp_path: Path
) -> None:
    from evals.logs import EvalLog

    replica.load(candidates["aligned"])
    texts = [c.text for c in replica.generate([replica.chat_prompt(p) for p in PROMPTS], 6, templated=True)]
    rules = {
        "refusal": [f"^{re.escape(texts[0])}$"],
        "compliance": [f"^{re.escape(texts[1])}$"],
    }
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    (tmp_path / "s.yaml").write_text(
        json.dumps(
            {"suite": "s", "kind": "harmfulness", "data": "p.jsonl", "max_tokens": 6, "rules": rules},
        )
    )
    log = run_prompts(replica, load_suite(tmp_path / "s.yaml"), RuleJudge())
    assert [s.label for s in log.samples] == ["safe", "harmful", "unscored", "unscored"]
    assert [s.completion for s in log.samples] == texts
    assert (log.rate.numerator, log.rate.denominator, log.rate.unscored) == (1, 2, 2)
    assert log.samples[0].input == f"<s><|user|>{PROMPTS[0]}<|assistant|>"
    assert EvalLog.read(json.loads(json.dumps(log.summary())), log.samples_jsonl()) == log


def test_run_task_few_shot_examples_are_the_same_for_every_candidate(
    replica: Replica, candidates: dict[str, Candidate], tmp_path: Path
) -> None:
    rows = [{"q": f"{i}+1=", "a": str(i + 1)} for i in range(6)]
    text = GENERATE_TASK + "num_fewshot: 2\nfewshot_split: test\n"
    suite = load_suite(write_task(tmp_path, "toy_generate", text, rows))
    inputs: list[list[str]] = []
    for name in ("aligned", "full"):
        replica.load(candidates[name])
        inputs.append([s.input for s in run_task(replica, suite, chat=False).samples])
    assert inputs[0] == inputs[1]
    assert all(len(text) > len(row["q"]) for text, row in zip(inputs[0], rows, strict=True))


def test_run_task_perplexity_keeps_lm_evals_value_without_bounds(
    replica: Replica, candidates: dict[str, Candidate], hf_model: Callable[[str], Any], tmp_path: Path
) -> None:
    text = """
task: toy_text
dataset_path: json
dataset_kwargs: {data_files: {test: toy_text.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
    replica.load(candidates["aligned"])
    suite = load_suite(write_task(tmp_path, "toy_text", text, [{"q": p} for p in PROMPTS]))
    log = run_task(replica, suite, chat=False)
    bos = replica.encode("", templated=False)
    model = hf_model("aligned")
    total = sum(hf_logprob(model, bos, replica.encode(p, templated=True))[0] for p in PROMPTS)
    expected = math.exp(-total / sum(len(p.split()) for p in PROMPTS))
    assert log.rate.value == pytest.approx(expected, rel=1e-3)
    assert (log.rate.low, log.rate.high, log.rate.higher_is_better) == (None, None, False)
    assert log.summary()["labels"] == {"scored": len(PROMPTS)}


def test_run_task_lm_eval_refuses_is_a_suite_error(replica: Replica, tmp_path: Path) -> None:
    path = write_task(tmp_path, "toy_choice", CHOICE_TASK + "no_such_field: 1\n", [{"q": "a", "a": 0}])
    with pytest.raises(SuiteError, match="no_such_field"):
        run_task(replica, load_suite(path))
    path = write_task(tmp_path, "toy_choice", CHOICE_TASK + "unsafe_code: true\n", [{"q": "a", "a": 0}])
    for _ in range(2):
        with pytest.raises(SuiteError, match="neither is supported"):
            run_task(replica, load_suite(path))


def test_generate_stops_where_the_candidates_own_files_say(
    replica: Replica, fleet_dir: Path, candidates: dict[str, Candidate], tmp_path: Path
) -> None:
    replica.load(candidates["full"])
    whole = replica.generate(["Say hi."], max_tokens=9)[0]
    token = replica.encode(whole.text[2], templated=True)[0]
    other = tmp_path / "other"
    shutil.copytree(fleet_dir / "full", other)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, token]}))
    replica.load(Candidate("other", "sha256:other-end", model_dir=other))
    cut = replica.generate(["Say hi."], max_tokens=9)[0]
    assert (cut.text, cut.finish_reason) == (whole.text.split(whole.text[2])[0], "stop")
