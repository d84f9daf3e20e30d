"""What no engine could serve is known at planning, and how candidates are prompted is decided there."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fleet.core.errors import CheckpointError, InputError, ManifestError, SuiteError
from fleet.run.plan import Plan
from fleet.run.pools import engine_options
from fleet.steps.score import ScoreStep
from tests.pico import make_adapter, make_gpt2, make_tokenizer
from tests.run.test_plan import plan_of

DATED = '{{ strftime_now("%d %b %Y") }}{% for m in messages %}{{ m["content"] }}{% endfor %}'
PLAIN = '{% for m in messages %}{{ m["content"] }}{% endfor %}'
KEEP: list[dict[str, Any]] = [{"name": "keep", "realign": {"method": "wise_ft", "alpha": 0.9}, "fuse": None}]
AVERAGE: list[dict[str, Any]] = [{"name": "avg", "realign": None, "fuse": {"method": "weight_average"}}]


@pytest.fixture
def root(catalogue: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(catalogue, tmp_path / "root"))


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def evaluation(root: Path, **fields: Any) -> dict[str, Any]:
    return {"harmfulness": ["harm"], "folders": [str(root / "suites")], **fields}


def scores(plan: Plan) -> dict[str, ScoreStep]:
    return {f"{c.name}.{suite}": step for c in plan.candidates for suite, step in c.scores.items()}


def keys(plan: Plan) -> dict[str, str]:
    return {name: step.key for name, step in scores(plan).items()}


def said(plan: Plan, words: str) -> list[str]:
    return [warning for warning in plan.warnings if words in warning]


def only(root: Path, *names: str) -> list[dict[str, Any]]:
    return [{"name": name, "source": str(root / name)} for name in names]


@pytest.fixture
def gpt2(root: Path) -> Path:
    """Base models, a fine-tune and an adapter of a pico GPT-2, beside suites."""
    for name, seed in (("unaligned", 0), ("aligned", 1), ("full", 2)):
        shutil.rmtree(root / name)
        make_tokenizer(make_gpt2(root / name, seed, heads=1))
    shutil.rmtree(root / "lora")
    make_adapter(root / "lora", root / "aligned", 3, targets=("c_attn",), fan_in_fan_out=True)
    return root


def test_plan_of_gpt2_writes_adapters_in_full_says_so_once_and_has_its_length(gpt2: Path, tmp_path: Path) -> None:
    base = {"unaligned": str(gpt2 / "unaligned"), "aligned": str(gpt2 / "aligned")}
    plan = plan_of(gpt2, tmp_path, base=base, models=only(gpt2, "lora", "full"), variants=KEEP + AVERAGE)
    assert not any(candidate.weights.as_lora for candidate in plan.candidates)
    assert len(said(plan, "takes no LoRA on GPT2LMHeadModel: lora, and what is made of it,")) == 1
    assert (engine_options(plan).max_lora_rank, engine_options(plan).max_model_len) == (0, 64)


def test_plan_of_a_mixture_of_experts_takes_lora_on_a_gpu_alone(root: Path, tmp_path: Path) -> None:
    """The architecture alone is looked at: the tensors stay a Llama's."""
    for name in ("unaligned", "aligned", "full"):
        change(root / name / "config.json", architectures=["MixtralForCausalLM"], num_experts_per_tok=2)
    on_cpu = plan_of(root, tmp_path / "cpu", variants=AVERAGE)
    on_gpu = plan_of(root, tmp_path / "gpu", variants=AVERAGE, placement={"replica_gpus": 1})
    assert any("mixture of experts on a CPU" in warning for warning in on_cpu.warnings)
    assert [c.name for c in on_cpu.candidates if c.weights.as_lora] == []
    assert [c.name for c in on_gpu.candidates if c.weights.as_lora] == ["lora", "rslora"]


def test_plan_of_attention_heads_that_a_cpu_engine_does_not_compute_is_refused(root: Path, tmp_path: Path) -> None:
    for name in ("unaligned", "aligned", "full"):
        change(root / name / "config.json", head_dim=48)
    with pytest.raises(InputError, match=r"heads are 48 wide, and on a CPU vLLM computes 32, 64, .*replica_gpus"):
        plan_of(root, tmp_path)
    plan_of(root, tmp_path, placement={"replica_gpus": 1})


def test_plan_of_an_architecture_that_vllm_lacks_is_refused_by_its_name(root: Path, tmp_path: Path) -> None:
    change(root / "aligned" / "config.json", architectures=["XGLMForCausalLM"], model_type="xglm")
    with pytest.raises(InputError, match=r"^base\.aligned: .* no text with XGLMForCausalLM"):
        plan_of(root, tmp_path)


def test_plan_of_an_adapter_on_a_module_without_lora_in_vllm_writes_it_in_full(root: Path, tmp_path: Path) -> None:
    for name in ("unaligned", "aligned", "full"):
        change(root / name / "config.json", architectures=["Phi3ForCausalLM"])  # whose LoRAs are on qkv_proj
    plan = plan_of(root, tmp_path, variants=AVERAGE)
    assert not any(candidate.weights.as_lora for candidate in plan.candidates)


def test_plan_of_an_adapter_whose_rank_no_module_has_starts_engines_for_what_they_have(
    root: Path, tmp_path: Path
) -> None:
    change(root / "lora" / "adapter_config.json", r=64, rank_pattern={"q_proj": 4, "v_proj": 4}, lora_alpha=8)
    change(root / "lora" / "adapter_config.json", rank_pattern={"1.self_attn.q_proj": 2, "q_proj": 4, "v_proj": 4})
    plan = plan_of(root, tmp_path, models=only(root, "lora"), variants=KEEP)
    assert (plan.max_lora_rank, [c.weights.as_lora for c in plan.candidates]) == (4, [False, True, True])


def test_plan_longer_than_the_models_positions_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"max_model_len is 100000, but base\.aligned: .* has \d+ positions"):
        plan_of(root, tmp_path, evaluation=evaluation(root, max_model_len=100000))


def test_plan_of_completions_or_prompts_that_cannot_fit_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="completions of 4 tokens leave no room"):
        plan_of(root, tmp_path, evaluation=evaluation(root, max_model_len=4))
    (root / "suites" / "harm.jsonl").write_text('{"prompt": "do"}\n{"prompt": "' + "x" * 40 + '"}\n')
    with pytest.raises(SuiteError, match=r"prompt 2 has 40 tokens, which with a completion of 4 exceed the 32"):
        plan_of(root, tmp_path, evaluation=evaluation(root, max_model_len=32))
    plan_of(root, tmp_path, evaluation=evaluation(root, max_model_len=48))


def test_plan_of_an_aligned_model_without_a_tokenizer_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "aligned" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"^base\.aligned: .* no tokenizer is there"):
        plan_of(root, tmp_path)


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def test_plan_reference_without_a_chat_template_is_prompted_with_the_aligned_models(root: Path, tmp_path: Path) -> None:
    fields = evaluation(root, references=["unaligned", "aligned"])
    without_template(root / "unaligned")
    plan = plan_of(root, tmp_path, evaluation=fields)
    assert len(said(plan, "unaligned: without a chat template, so prompted with the aligned model's")) == 1
    assert scores(plan)["unaligned.harm"].prompting.template == (root / "aligned" / "chat_template.jinja").read_text()
    told = {name for name, step in scores(plan).items() if "chat_template" in step.spec}
    assert told == {"unaligned.harm", "unaligned.task"}


def test_plan_without_any_chat_template_is_refused_if_a_suite_asks_through_one(root: Path, tmp_path: Path) -> None:
    for name in ("unaligned", "aligned", "full"):
        without_template(root / name)
    with pytest.raises(ManifestError, match=r"harm goes through a chat template, but neither aligned.* has one; set"):
        plan_of(root, tmp_path)
    (root / "plain.jinja").write_text(PLAIN)
    plan = plan_of(root, tmp_path, evaluation=evaluation(root, chat_template=str(root / "plain.jinja")))
    assert {step.prompting.template for step in scores(plan).values()} == {PLAIN}
    with (root / "suites" / "harm.yaml").open("a") as suite:
        suite.write("chat: false\n")
    assert scores(plan_of(root, tmp_path))["aligned.task"].prompting.template is None


def test_plan_chat_template_of_the_manifest_is_in_the_scores_identity_where_it_is_another(
    root: Path, tmp_path: Path
) -> None:
    (root / "full" / "chat_template.jinja").write_text(PLAIN)
    own = keys(plan_of(root, tmp_path))
    aligned = keys(plan_of(root, tmp_path, evaluation=evaluation(root, chat_template="aligned")))
    same = (root / "aligned" / "chat_template.jinja").read_text()
    (root / "same.jinja").write_text(same)
    file = keys(plan_of(root, tmp_path, evaluation=evaluation(root, chat_template=str(root / "same.jinja"))))
    assert aligned == file
    assert {name for name in own if own[name] != aligned[name]} == {
        name for name in own if name.startswith("full.")
    }  # what is fused has the aligned model's either way


def test_plan_adapter_with_a_chat_template_is_scored_with_it_and_says_so(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "aligned" / "chat_template.jinja", root / "lora" / "chat_template.jinja")
    same = plan_of(root, tmp_path)  # PEFT's trainers leave the base's own there
    assert said(same, "adapter brings") == []
    assert not any("chat_template" in step.spec for step in scores(same).values())
    (root / "lora" / "chat_template.jinja").write_text(PLAIN)
    plan = plan_of(root, tmp_path)
    assert len(said(plan, "lora: the adapter brings a chat template")) == 1
    own = {f"{name}.{suite}" for name in ("lora", "lora.safemerge") for suite in ("harm", "task")}
    assert {name for name, step in scores(plan).items() if step.prompting.template == PLAIN} == own
    assert {name for name, step in scores(plan).items() if "chat_template" in step.spec} == own
    aligned = plan_of(root, tmp_path, evaluation=evaluation(root, chat_template="aligned"))
    assert said(aligned, "adapter brings") == []
    assert PLAIN not in {step.prompting.template for step in scores(aligned).values()}


def test_plan_template_that_writes_the_date_has_one_in_the_identity_and_says_so(root: Path, tmp_path: Path) -> None:
    (root / "full" / "chat_template.jinja").write_text(DATED)
    plan = plan_of(root, tmp_path)
    today = datetime.date.today().isoformat()
    (warning,) = said(plan, "full: the chat template writes the date")
    assert f'evaluation.date to "{today}"' in warning
    fixed = plan_of(root, tmp_path, evaluation=evaluation(root, date="2026-11-25"))
    other = plan_of(root, tmp_path, evaluation=evaluation(root, date="2026-11-26"))
    assert said(fixed, "date") == []
    assert scores(fixed)["full.harm"].prompting.date == "2026-11-25"
    assert scores(fixed)["aligned.harm"].prompting.date is None
    changed = {name for name, key in keys(fixed).items() if key != keys(other)[name]}
    assert changed == {f"{name}.{suite}" for name in ("full", "full.safemerge") for suite in ("harm", "task")}
    again = plan_of(root, tmp_path, evaluation=evaluation(root, date="2026-11-25"))
    assert (keys(again), again.run_id) == (keys(fixed), fixed.run_id)


def test_plan_template_that_is_no_jinja_is_refused_with_its_line(root: Path, tmp_path: Path) -> None:
    (root / "full" / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m[ }}")
    with pytest.raises(CheckpointError, match=r"full/chat_template\.jinja: line 2 of the chat template"):
        plan_of(root, tmp_path)


def add_token(folder: Path, token: str) -> None:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_plan_token_without_a_row_is_no_harm_unless_the_template_writes_it(root: Path, tmp_path: Path) -> None:
    add_token(root / "full", "<|pad|>")
    plan_of(root, tmp_path)
    (root / "full" / "chat_template.jinja").write_text("<|pad|>" + PLAIN)
    with pytest.raises(CheckpointError, match=r"the chat template writes <\|pad\|>, which .* no row"):
        plan_of(root, tmp_path)
    (root / "full" / "chat_template.jinja").write_text("{{ eos_token }}" + PLAIN)
    change(root / "full" / "tokenizer_config.json", eos_token="<|pad|>")
    with pytest.raises(CheckpointError, match=r"the chat template writes <\|pad\|>"):
        plan_of(root, tmp_path)
