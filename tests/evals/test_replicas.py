"""One real engine on a pico Llama, against transformers and PEFT on the same files."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest

from evals.engine import EngineOptions, ServedModel, UnservableError
from evals.harness import complete, mean_logprobs, run_task
from evals.lm import FleetLM
from evals.logs import EvalLog
from evals.replicas import Replica
from evals.session import Session
from evals.suites import Suite, TaskPart, load_suite
from evals.suites.local_data import LocalData
from fleet.core.errors import EvalError, SuiteError
from tests import pico

PROMPTS = ["How do I open a jar?", "7+5=", "Say hi.", "The quick brown fox"]
OPTIONS = EngineOptions(max_model_len=128, max_num_seqs=8, max_lora_rank=8, max_loras=2, kv_cache_bytes=32 << 20)


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
def candidates(fleet_dir: Path) -> dict[str, ServedModel]:
    return {
        "aligned": ServedModel("aligned", "sha256:aligned"),
        "adapter": ServedModel("adapter", "sha256:adapter", adapter_dir=fleet_dir / "adapter"),
        "other_adapter": ServedModel("other_adapter", "sha256:other", adapter_dir=fleet_dir / "other_adapter"),
        "full": ServedModel("full", "sha256:full", model_dir=fleet_dir / "full"),
    }


@pytest.fixture(scope="module")
def replica(fleet_dir: Path) -> Iterator[Replica]:
    engine = Replica(fleet_dir / "aligned", OPTIONS)
    yield engine
    engine.close()


Serve: TypeAlias = Callable[[ServedModel], Session]


@pytest.fixture
def serve(replica: Replica) -> Iterator[Serve]:
    """Opens a session, and ends the one before it."""
    with ExitStack() as sessions:

        def serve(candidate: ServedModel) -> Session:
            sessions.close()
            return sessions.enter_context(replica.serving(candidate))

        yield serve


def fleet_lm(session: Session) -> FleetLM:
    turn = threading.Lock()
    turn.acquire()
    return FleetLM(session, False, turn)


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


def assert_equals_hf(session: Session, model: Any) -> None:
    lm = fleet_lm(session)
    texts = lm.generate_until(instances([(p, {"until": [], "max_gen_toks": 12}) for p in PROMPTS]))
    ids = [session.encode(p, templated=False) for p in PROMPTS]
    expected = [hf_generate(model, session.tokenizer, i, 12) for i in ids]
    assert texts == expected

    pairs = [(p, " yes") for p in PROMPTS] + [(p, t) for p, t in zip(PROMPTS, texts, strict=True)]
    scores = lm.loglikelihood(instances(pairs))
    for (context, continuation), (logprob, is_greedy) in zip(pairs, scores, strict=True):
        context_ids = session.encode(context, templated=False)
        whole = session.encode(context + continuation, templated=False)
        wanted = hf_logprob(model, context_ids, whole[len(context_ids) :])
        assert logprob == pytest.approx(wanted[0], abs=1e-3)
        assert is_greedy == wanted[1]
    assert all(is_greedy for _, is_greedy in scores[len(PROMPTS) :])


def test_replica_swaps_candidates_and_each_equals_transformers(
    serve: Serve, candidates: dict[str, ServedModel], hf_model: Callable[[str], Any]
) -> None:
    for name in ("aligned", "adapter", "full", "other_adapter", "aligned", "full", "aligned"):
        session = serve(candidates[name])
        assert_equals_hf(session, hf_model(name))


def test_replica_long_shared_prompt_after_swap_uses_no_stale_blocks(
    serve: Serve, candidates: dict[str, ServedModel], hf_model: Callable[[str], Any]
) -> None:
    prompt = "Tell me, one more time and slowly, how the story of the fox and the crow goes on."
    texts: dict[str, str] = {}
    for name in ("aligned", "full", "aligned"):
        session = serve(candidates[name])
        text = session.generate([prompt], max_tokens=8)[0].text
        ids = session.encode(prompt, templated=False)
        assert (name, text) == (name, hf_generate(hf_model(name), session.tokenizer, ids, 8))
        assert texts.setdefault(name, text) == text
    assert texts["aligned"] != texts["full"]


def test_replica_same_candidate_loads_nothing(
    replica: Replica, serve: Serve, candidates: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(candidates["full"])
    monkeypatch.setattr(replica, "_llm", None)
    serve(candidates["full"])


def test_chat_prompt_template_with_bos_encodes_one_bos(serve: Serve, candidates: dict[str, ServedModel]) -> None:
    session = serve(candidates["aligned"])
    text = session.chat_prompt("hi")
    assert text == "<s><|user|>hi<|assistant|>"
    bos = session.tokenizer.bos_token_id
    assert session.encode(text, templated=True).count(bos) == 1
    assert session.encode(text, templated=False).count(bos) == 1
    assert session.encode("hi", templated=False)[0] == bos
    assert bos not in session.encode("hi", templated=True)


def test_chat_prompt_writes_the_template_and_the_date_that_the_candidate_is_given(
    serve: Serve, candidates: dict[str, ServedModel]
) -> None:
    dated = '{{ strftime_now("%d %b %Y %H:%M:%S.%f") }} {{ messages[0]["content"] }}'
    for name in ("adapter", "full"):
        session = serve(replace(candidates[name], chat_template=dated, date="2026-11-25"))
        assert {session.chat_prompt("hi") for _ in range(3)} == {"25 Nov 2026 00:00:00.000000 hi"}
        lm = fleet_lm(session)
        assert lm.apply_chat_template([{"role": "user", "content": "hi"}]) == session.chat_prompt("hi")
    assert serve(candidates["adapter"]).chat_prompt("hi") == "<s><|user|>hi<|assistant|>"


def test_generate_reports_counts_and_stops(serve: Serve, candidates: dict[str, ServedModel]) -> None:
    session = serve(candidates["aligned"])
    whole = session.generate(["Say hi."], max_tokens=9)[0]
    assert (whole.num_prompt_tokens, whole.num_tokens, whole.finish_reason) == (8, 9, "length")
    mark = whole.text[3]
    cut = session.generate(["Say hi."], max_tokens=9, stop=[mark])[0]
    assert cut.text == whole.text.split(mark)[0]
    assert cut.finish_reason == "stop"
    assert session.generate([], max_tokens=9) == []


def test_generate_prompt_without_room_raises_and_engine_lives(serve: Serve, candidates: dict[str, ServedModel]) -> None:
    session = serve(candidates["aligned"])
    with pytest.raises(EvalError, match="exceed max_model_len 128"):
        session.generate(["x" * 120], max_tokens=9)
    assert session.generate(["x" * 118], max_tokens=9)[0].num_tokens == 9


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"r": 16}, "rank 16"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_load_unservable_adapter_refused_and_engine_healthy(
    serve: Serve,
    fleet_dir: Path,
    candidates: dict[str, ServedModel],
    tmp_path: Path,
    changes: dict[str, Any],
    reason: str,
) -> None:
    session = serve(candidates["adapter"])
    before = session.generate(PROMPTS, max_tokens=4)
    bad = copy_with_config(fleet_dir / "other_adapter", tmp_path / "bad", **changes)
    with pytest.raises(UnservableError, match=reason):
        serve(ServedModel("bad", "sha256:bad", adapter_dir=bad))
    assert serve(candidates["adapter"]).generate(PROMPTS, max_tokens=4) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 64, "rank_pattern": {"q_proj": 4, "v_proj": 4}, "lora_alpha": 8},
        {"r": 4.0},
        {"bias": "all", "modules_to_save": [], "target_modules": "all-linear"},
        {"use_rslora": True, "lora_alpha": 4},
    ],
)
def test_adapter_with_an_odd_config_answers_as_the_plain_one(
    serve: Serve, fleet_dir: Path, candidates: dict[str, ServedModel], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """All of these are the same LoRA of rank 4 and scale 2, as vLLM wouldn't take them."""
    expected = serve(candidates["other_adapter"]).generate(PROMPTS, max_tokens=8)
    odd = copy_with_config(fleet_dir / "other_adapter", tmp_path / "odd", **changes)
    assert serve(ServedModel("odd", f"sha256:{changes}", adapter_dir=odd)).generate(PROMPTS, max_tokens=8) == expected
    assert serve(candidates["aligned"]).generate(PROMPTS, max_tokens=8) != expected


def test_adapter_with_old_names_of_its_tensors_answers_as_the_plain_one(
    serve: Serve, fleet_dir: Path, candidates: dict[str, ServedModel], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    expected = serve(candidates["other_adapter"]).generate(PROMPTS, max_tokens=8)
    old = Path(shutil.copytree(fleet_dir / "other_adapter", tmp_path / "old"))
    tensors = load_file(old / "adapter_model.safetensors")
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    save_file(named, old / "adapter_model.safetensors", metadata={"format": "pt"})
    assert serve(ServedModel("old", "sha256:old", adapter_dir=old)).generate(PROMPTS, max_tokens=8) == expected


def test_load_adapter_whose_tensors_reach_further_refused(serve: Serve, fleet_dir: Path, tmp_path: Path) -> None:
    folder = pico.make_adapter(tmp_path / "head", fleet_dir / "full", seed=4, targets=("q_proj", "lm_head"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ".*"}))
    with pytest.raises(UnservableError, match="lm_head"):
        serve(ServedModel("head", "sha256:head", adapter_dir=folder))


def test_load_misshapen_weights_refused_before_the_engine(
    replica: Replica,
    serve: Serve,
    fleet_dir: Path,
    candidates: dict[str, ServedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    serve(candidates["aligned"])
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
        patch.setattr(replica, "_take_lora", untouchable)
        with pytest.raises(UnservableError) as refusal:
            serve(ServedModel("bad", "sha256:bad", model_dir=bad))
    for problem in (
        "missing model.norm.weight [32]",
        "extra model.surplus.weight [32]",
        "up_proj.weight is [63, 32], not [64, 32]",
    ):
        assert problem in str(refusal.value)


def test_load_other_configuration_refused(serve: Serve, fleet_dir: Path, tmp_path: Path) -> None:
    bad = copy_with_config(fleet_dir / "full", tmp_path / "bad", rms_norm_eps=1e-3)
    with pytest.raises(UnservableError, match=r"rms_norm_eps is 0\.001"):
        serve(ServedModel("bad", "sha256:bad", model_dir=bad))


def test_load_other_vocabulary_refused(serve: Serve, fleet_dir: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(fleet_dir / "full", bad)
    text = (bad / "tokenizer.json").read_text()
    (bad / "tokenizer.json").write_text(text.replace('"a": 6,', '"a": 7,').replace('"b": 7,', '"b": 6,'))
    with pytest.raises(UnservableError, match="numbers its tokens unlike"):
        serve(ServedModel("bad", "sha256:bad", model_dir=bad))


def test_tokens_beyond_the_aligned_models_change_no_answer_and_are_refused_where_a_prompt_holds_one(
    serve: Serve, fleet_dir: Path, candidates: dict[str, ServedModel], tmp_path: Path
) -> None:
    from tokenizers import AddedToken, Tokenizer

    expected = serve(candidates["full"]).generate(PROMPTS, max_tokens=4)
    padded = Path(shutil.copytree(fleet_dir / "full", tmp_path / "padded"))
    tokenizer = Tokenizer.from_file(str(padded / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True)])
    tokenizer.save(str(padded / "tokenizer.json"))
    config = json.loads((padded / "tokenizer_config.json").read_text())
    (padded / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|pad|>"}))
    session = serve(ServedModel("padded", "sha256:padded", model_dir=padded))
    assert session.generate(PROMPTS, max_tokens=4) == expected
    with pytest.raises(UnservableError, match=r"candidate padded: a prompt holds the token '<\|pad\|>'"):
        session.generate(["hi <|pad|>"], max_tokens=4)
    assert session.generate(PROMPTS, max_tokens=4) == expected


def test_candidate_with_weights_and_adapter_raises(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="give one of the two"):
        ServedModel("both", "sha256:both", tmp_path, tmp_path)


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
    serve: Serve, candidates: dict[str, ServedModel], tmp_path: Path, chat: bool
) -> None:
    session = serve(candidates["adapter"])
    inputs = [session.chat_prompt(p) if chat else p for p in PROMPTS]
    texts = [c.text for c in session.generate(inputs, 6, ["\n"], templated=chat)]
    answers = [texts[0], "wrong", texts[2], "also wrong"]
    rows = [{"q": q, "a": a} for q, a in zip(PROMPTS, answers, strict=True)]
    suite = load_suite(write_task(tmp_path, "toy_generate", GENERATE_TASK, rows))

    log = run_task(session, suite, chat=chat)

    assert (log.rate.numerator, log.rate.denominator, log.rate.unscored) == (2, 4, 0)
    assert [s.score for s in log.samples] == [1, 0, 1, 0]
    assert [s.completion for s in log.samples] == texts
    assert [s.input for s in log.samples] == inputs
    assert [s.prompt for s in log.samples] == PROMPTS
    assert [s.target for s in log.samples] == answers
    assert all(s.num_tokens and s.num_tokens <= 6 for s in log.samples)
    assert log == run_task(session, suite, chat=chat)


def test_run_task_multiple_choice_accuracy_is_counted_by_hand(
    serve: Serve,
    candidates: dict[str, ServedModel],
    hf_model: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    model, choices, best = hf_model("full"), ["yes", "no", "perhaps"], []
    session = serve(candidates["full"])
    for prompt in PROMPTS:
        context = session.encode(prompt, templated=False)
        scores = [hf_logprob(model, context, session.encode(f" {c}", templated=True))[0] for c in choices]
        best.append(scores.index(max(scores)))
    answers = [best[0], best[1], best[2], (best[3] + 1) % 3]
    rows = [{"q": q, "a": a} for q, a in zip(PROMPTS, answers, strict=True)]
    suite = load_suite(write_task(tmp_path, "toy_choice", CHOICE_TASK, rows))

    log = run_task(session, suite, chat=False)

    assert log.metric == "acc"
    assert [s.score for s in log.samples] == [1, 1, 1, 0]
    assert [s.completion for s in log.samples] == [choices[b] for b in best]
    assert log.rate.value == 0.75


def test_run_task_loglikelihood_accuracy_is_whether_the_target_is_greedy(
    serve: Serve, candidates: dict[str, ServedModel], hf_model: Callable[[str], Any], tmp_path: Path
) -> None:
    text = """
task: toy_loglikelihood
dataset_path: json
dataset_kwargs: {data_files: {test: toy_loglikelihood.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
    session = serve(candidates["full"])
    greedy = [c.text for c in session.generate(PROMPTS, 3)]
    targets = [greedy[0], "no", greedy[2], "no"]
    suite_file = write_task(
        tmp_path, "toy_loglikelihood", text, [{"q": q, "a": a} for q, a in zip(PROMPTS, targets, strict=True)]
    )

    log = run_task(session, load_suite(suite_file), chat=False)

    model = hf_model("full")
    pairs = [
        (session.encode(q, templated=False), session.encode(a, templated=True))
        for q, a in zip(PROMPTS, targets, strict=True)
    ]
    assert [s.score for s in log.samples] == [float(hf_logprob(model, *pair)[1]) for pair in pairs] == [1, 0, 1, 0]
    assert (log.metric, log.rate.value, log.rate.binary) == ("acc", 0.5, True)


COPA_ROW = {"premise": "It is wet.", "choice1": "It rained.", "choice2": "It sang.", "question": "cause", "label": 0}


@pytest.mark.parametrize(
    ("name", "file", "row", "metric"),
    [
        ("copa", "super_glue/copa/default.yaml", COPA_ROW, "acc"),
        ("xcopa_zh", "xcopa/default_zh.yaml", COPA_ROW, "acc"),
        ("xnli_hi", "xnli/xnli_hi.yaml", {"premise": "a", "hypothesis": "b", "label": 1}, "acc"),
        ("gsm8k", "gsm8k/gsm8k.yaml", {"question": "1+1?", "answer": "1+1=2\n#### 2"}, "exact_match"),
    ],
)
def test_run_task_lm_evals_own_definition_on_rows_of_its_form(
    serve: Serve,
    candidates: dict[str, ServedModel],
    tmp_path: Path,
    name: str,
    file: str,
    row: dict[str, Any],
    metric: str,
) -> None:
    import lm_eval

    session = serve(candidates["aligned"])

    text = json.dumps(
        {
            "include": str(Path(str(lm_eval.__file__)).parent / "tasks" / file),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": dict.fromkeys(("train", "validation", "test"), f"{name}.jsonl")},
            "num_fewshot": 0,
        }
    )
    if name == "gsm8k":
        # The pico model holds 128 tokens.
        text = json.dumps(json.loads(text) | {"generation_kwargs": {"until": ["Question:"], "max_gen_toks": 8}})
    suite = load_suite(write_task(tmp_path, name, text, [row, row | {"label": 1 - int(row.get("label", 0))}]))
    log = run_task(session, suite, chat=False)
    assert load_suite(name).kind == suite.kind == "task"
    assert (log.metric, log.rate.denominator, log.rate.unscored) == (metric, 2, 0)
    # The same words twice with either of two answers: whichever the model prefers, one row of COPA's is right.
    if row is COPA_ROW:
        assert sorted(s.score or 0.0 for s in log.samples) == [0, 1]


def test_run_task_same_path_with_new_content_reads_new_content(
    serve: Serve, tmp_path: Path, candidates: dict[str, ServedModel]
) -> None:
    session = serve(candidates["aligned"])
    path = write_task(tmp_path, "toy_choice", CHOICE_TASK, [{"q": "a?", "a": 0}])
    data = tmp_path / "toy_choice.jsonl"
    before = data.stat()
    assert run_task(session, load_suite(path)).samples[0].prompt == "a?"
    data.write_text(json.dumps({"q": "b?", "a": 0}) + "\n")
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run_task(session, load_suite(path)).samples[0].prompt == "b?"


def test_loglikelihood_rolling_equals_transformers(
    serve: Serve, candidates: dict[str, ServedModel], hf_model: Callable[[str], Any]
) -> None:
    session = serve(candidates["aligned"])
    text = "The quick brown fox"
    bos = session.encode("", templated=False)
    expected = hf_logprob(hf_model("aligned"), bos, session.encode(text, templated=True))[0]
    lm = fleet_lm(session)
    assert lm.loglikelihood_rolling(instances([(text,)])) == [pytest.approx(expected, abs=1e-3)]
    assert len(lm.loglikelihood_rolling(instances([(text * 20,)]))) == 1


def test_generate_until_long_context_is_cut_and_counted(serve: Serve, candidates: dict[str, ServedModel]) -> None:
    session = serve(candidates["aligned"])
    lm = fleet_lm(session)
    settings = {"until": [], "max_gen_toks": 4}
    long, short = lm.generate_until(instances([("x" * 300 + "abc", settings), ("abc", settings)]))
    assert long and short and lm.num_truncated == 1


def write_prompts(folder: Path, **fields: Any) -> Suite:
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    suite = {"suite": "s", "kind": "harmfulness", "data": "p.jsonl", "max_tokens": 6} | fields
    (folder / "s.yaml").write_text(json.dumps(suite))
    return load_suite(folder / "s.yaml")


def test_complete_asks_the_prompts_wanted_through_the_template(
    serve: Serve, candidates: dict[str, ServedModel], tmp_path: Path
) -> None:
    session = serve(candidates["aligned"])
    texts = [c.text for c in session.generate([session.chat_prompt(p) for p in PROMPTS], 6, templated=True)]
    suite = write_prompts(tmp_path)
    samples = complete(session, suite)
    assert [s.completion for s in samples] == texts
    assert [s.input for s in samples] == [f"<s><|user|>{p}<|assistant|>" for p in PROMPTS]
    assert {(s.score, s.label, s.coherent) for s in samples} == {(None, "unscored", None)}
    assert complete(session, suite, [2, 0]) == [samples[2], samples[0]]


def test_engine_on_a_cpu_compiles_nothing(serve: Serve, candidates: dict[str, ServedModel]) -> None:
    import torch

    graphs: list[Any] = []
    serve(candidates["aligned"])
    double = torch.compile(lambda x: x + x, backend=lambda graph, inputs: graphs.append(graph) or graph)
    assert double(torch.ones(2)).tolist() == [2.0, 2.0]
    assert not graphs


def test_mean_logprobs_equal_transformers_and_empty_completions_have_none(
    serve: Serve, candidates: dict[str, ServedModel], hf_model: Callable[[str], Any], tmp_path: Path
) -> None:
    samples = complete(serve(candidates["full"]), write_prompts(tmp_path))
    samples[1] = samples[1].model_copy(update={"completion": ""})
    session = serve(candidates["aligned"])
    means = mean_logprobs(session, samples, templated=True)
    assert means[1] is None
    for mean, sample in zip(means, samples, strict=True):
        context = session.encode(sample.input, templated=True)
        rest = session.encode(sample.input + sample.completion, templated=True)[len(context) :]
        if mean is not None:
            assert mean == pytest.approx(hf_logprob(hf_model("aligned"), context, rest)[0] / len(rest), abs=1e-3)


def test_sessions_at_once_answer_as_one_by_one(replica: Replica, candidates: dict[str, ServedModel]) -> None:
    """Adapters and the aligned model in the same batches; and a full model, which waits for the weights."""

    def answers(name: str) -> list[str]:
        with replica.serving(candidates[name]) as session:
            return [c.text for c in session.generate(PROMPTS * 8, max_tokens=12)]

    before = answers("aligned")
    names = ["aligned", "adapter", "full", "other_adapter", "aligned", "full", "adapter"]
    alone = [answers(name) for name in names]
    with ThreadPoolExecutor(len(names)) as threads:
        assert list(threads.map(answers, names)) == alone
    assert len({tuple(a) for a in alone}) == 4
    assert answers("aligned") == before  # with adapters in all slots now


def test_more_adapters_at_once_than_slots_are_all_served(
    replica: Replica, fleet_dir: Path, candidates: dict[str, ServedModel]
) -> None:
    """Two slots, five adapters: the others wait, and nobody is answered by another's."""
    copies = [ServedModel(f"c{i}", f"sha256:c{i}", adapter_dir=fleet_dir / "adapter") for i in range(3)]
    every = [*copies, candidates["other_adapter"], candidates["adapter"]]

    def answers(candidate: ServedModel) -> list[str]:
        with replica.serving(candidate) as session:
            return [c.text for c in session.generate(PROMPTS, max_tokens=12)]

    with ThreadPoolExecutor(len(every)) as threads:
        found = list(threads.map(answers, every))
    assert found[0] == found[1] == found[2] == found[4] != found[3]
    assert len(replica._loras) <= OPTIONS.max_loras  # pyright: ignore[reportPrivateUsage]


def test_tasks_at_once_give_the_logs_of_one_by_one(
    replica: Replica, candidates: dict[str, ServedModel], tmp_path: Path
) -> None:
    rows = [{"q": f"{i}+1=", "a": str(i + 1)} for i in range(6)]
    shots = GENERATE_TASK + "num_fewshot: 2\nfewshot_split: test\n"
    suites = [load_suite(write_task(tmp_path, "toy_generate", shots, rows))]
    suites.append(load_suite(write_task(tmp_path, "toy_choice", CHOICE_TASK, [{"q": p, "a": 0} for p in PROMPTS])))

    def log(job: tuple[str, Suite]) -> EvalLog:
        with replica.serving(candidates[job[0]]) as session:
            return run_task(session, job[1])

    jobs = [(name, suite) for name in ("aligned", "adapter", "other_adapter", "full") for suite in suites]
    alone = [log(job) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as threads:
        assert list(threads.map(log, jobs)) == alone


def test_logprobs_of_the_first_token_add_up_where_all_are_asked_for(
    serve: Serve, candidates: dict[str, ServedModel]
) -> None:
    session = serve(candidates["aligned"])
    told = session.generate(["Say hi."], 2, sampling={"logprobs": 20})[0]
    silent = session.generate(["Say hi."], 2)[0]
    assert len(told.logprobs) >= 20 and not silent.logprobs
    assert max(told.logprobs, key=lambda token: told.logprobs[token]) == told.text[0]
    assert sum(math.exp(p) for p in told.logprobs.values()) < 1.0 + 1e-6


def test_complete_asks_inside_the_template_and_keeps_the_prompt_itself(
    serve: Serve, candidates: dict[str, ServedModel], tmp_path: Path
) -> None:
    config = {"suite": "s", "kind": "harmfulness", "data": "p.jsonl", "max_tokens": 4, "template": "<{prompt}>"}
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Why?", "context": "It rains."}))
    (tmp_path / "s.yaml").write_text(json.dumps(config | {"rules": {"refusal": ["^"], "compliance": []}}))
    (sample,) = complete(serve(candidates["aligned"]), load_suite(tmp_path / "s.yaml"))
    assert sample.prompt == "It rains.\n\n---\n\nWhy?"
    assert sample.input == "<s><|user|><It rains.\n\n---\n\nWhy?><|assistant|>"


def test_run_task_few_shot_examples_are_the_same_for_every_candidate(
    serve: Serve, candidates: dict[str, ServedModel], tmp_path: Path
) -> None:
    rows = [{"q": f"{i}+1=", "a": str(i + 1)} for i in range(6)]
    text = GENERATE_TASK + "num_fewshot: 2\nfewshot_split: test\n"
    suite = load_suite(write_task(tmp_path, "toy_generate", text, rows))
    inputs: list[list[str]] = []
    for name in ("aligned", "full"):
        session = serve(candidates[name])
        inputs.append([s.input for s in run_task(session, suite, chat=False).samples])
    assert inputs[0] == inputs[1]
    assert all(len(text) > len(row["q"]) for text, row in zip(inputs[0], rows, strict=True))


def test_run_task_perplexity_keeps_lm_evals_value_without_bounds(
    serve: Serve, candidates: dict[str, ServedModel], hf_model: Callable[[str], Any], tmp_path: Path
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
    session = serve(candidates["aligned"])
    suite = load_suite(write_task(tmp_path, "toy_text", text, [{"q": p} for p in PROMPTS]))
    log = run_task(session, suite, chat=False)
    bos = session.encode("", templated=False)
    model = hf_model("aligned")
    total = sum(hf_logprob(model, bos, session.encode(p, templated=True))[0] for p in PROMPTS)
    expected = math.exp(-total / sum(len(p.split()) for p in PROMPTS))
    assert log.rate.value == pytest.approx(expected, rel=1e-3)
    assert (log.rate.low, log.rate.high, log.rate.higher_is_better) == (None, None, False)
    assert log.summary()["labels"] == {"scored": len(PROMPTS)}


def test_run_task_lm_eval_refuses_is_a_suite_error(
    serve: Serve, tmp_path: Path, candidates: dict[str, ServedModel]
) -> None:
    session = serve(candidates["aligned"])
    path = write_task(tmp_path, "toy_choice", CHOICE_TASK + "no_such_field: 1\n", [{"q": "a", "a": 0}])
    with pytest.raises(SuiteError, match="no_such_field"):
        run_task(session, load_suite(path))
    path = write_task(tmp_path, "toy_choice", CHOICE_TASK + "unsafe_code: true\n", [{"q": "a", "a": 0}])
    # Planning refuses it by its file; a class of lm-eval's may still say so itself.
    data = LocalData("json", {"test": (tmp_path / "toy_choice.jsonl",)})
    part = TaskPart("toy_choice", (path,), {}, data)
    for _ in range(2):
        with pytest.raises(SuiteError, match="neither is supported"):
            run_task(session, Suite("toy_choice", "task", "sha256:unsafe", path, parts=(part,)))


def test_generate_stops_where_the_candidates_own_files_say(
    serve: Serve, fleet_dir: Path, candidates: dict[str, ServedModel], tmp_path: Path
) -> None:
    session = serve(candidates["full"])
    whole = session.generate(["Say hi."], max_tokens=9)[0]
    token = session.encode(whole.text[2], templated=True)[0]
    other = tmp_path / "other"
    shutil.copytree(fleet_dir / "full", other)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, token]}))
    session = serve(ServedModel("other", "sha256:other-end", model_dir=other))
    cut = session.generate(["Say hi."], max_tokens=9)[0]
    assert (cut.text, cut.finish_reason) == (whole.text.split(whole.text[2])[0], "stop")


def test_template_of_a_task_is_compiled_once_for_all_its_documents() -> None:
    """lm-eval compiles it for each."""
    from lm_eval.utils import apply_template, env

    compiled: Any = env.from_string  # with `evals.harness` imported
    before = compiled.cache_info().misses
    assert [apply_template("{{x}} of a template seen here alone", {"x": i})[0] for i in range(3)] == ["0", "1", "2"]
    assert compiled.cache_info().misses == before + 1


def test_generate_until_sampled_repeats_differ_and_order_changes_nothing(
    serve: Serve, candidates: dict[str, ServedModel]
) -> None:
    lm = fleet_lm(serve(candidates["aligned"]))
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 2.0}
    requests = instances([(prompt, settings) for prompt in PROMPTS])
    texts = lm.generate_until([request for request in requests for _ in range(4)])
    draws = [texts[i : i + 4] for i in range(0, 16, 4)]
    assert all(len(set(four)) == 4 for four in draws)
    again = lm.generate_until([request for request in requests[::-1] for _ in range(4)])
    assert [again[i : i + 4] for i in range(0, 16, 4)] == draws[::-1]
    assert lm.generate_until(requests[2:3]) == draws[2][:1]


@pytest.mark.parametrize("limit", [3, 0.3])
def test_run_task_within_a_limit_asks_some_as_the_whole_would_be_asked(
    serve: Serve, candidates: dict[str, ServedModel], tmp_path: Path, limit: float
) -> None:
    session = serve(candidates["aligned"])
    rows = [{"q": f"q{i}", "a": f"a{i}"} for i in range(10)]
    suite = load_suite(write_task(tmp_path, "toy_generate", f"{GENERATE_TASK}\nnum_fewshot: 2\n", rows))
    whole, some = run_task(session, suite, chat=False), run_task(session, suite.limited(limit), chat=False)
    assert len(some.samples) == 3 and some.settings["num_whole"] == 10
    assert all(sample in whole.samples for sample in some.samples)
    assert [s.id for s in some.samples] == [
        s.id for s in whole.samples if s.id in sorted(s.id for s in whole.samples)[:3]
    ]
    assert run_task(session, suite.limited(limit), chat=False) == some
    assert "num_whole" not in whole.settings


def test_run_task_group_is_all_its_tasks_together_and_a_limit_is_of_all(
    serve: Serve, candidates: dict[str, ServedModel], tmp_path: Path
) -> None:
    session = serve(candidates["aligned"])
    for name in ("first", "second"):
        text = GENERATE_TASK.replace("toy_generate", name)
        write_task(tmp_path, name, text, [{"q": f"{name}{i}", "a": "x"} for i in range(4)])
    (tmp_path / "both.yaml").write_text("group: both\ntask: [first, second]\n")
    suite = load_suite(tmp_path / "both.yaml")
    log = run_task(session, suite, chat=False)
    assert [s.prompt for s in log.samples] == [f"{name}{i}" for name in ("first", "second") for i in range(4)]
    limited = run_task(session, suite.limited(3), chat=False)
    assert len(limited.samples) == 3 and limited.settings["num_whole"] == 8
    assert run_task(session, suite.limited(1), chat=False).rate.denominator == 1
