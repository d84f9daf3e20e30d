"""The demo fleet: what is committed is what its generators write, and what is held out stays held out."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.model_judges import OwnModel
from evals.suites import load_suite
from evals.verdicts import Exchange, Reply
from jobs.demo import __main__ as command
from jobs.demo import recipe, text
from jobs.demo.judge import SAFE, TEMPLATE, UNCLEAR, UNSAFE, WORDS, rule_verdict
from jobs.demo.skills import EXHAUSTED_SKILLS, SKILLS, held_out
from jobs.demo.suites import RULES, write_suites
from jobs.demo.tokenizer import SYSTEM

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo"
SUITES = ROOT / "evals" / "suites"
ADAPTERS = ["safety", *(name for name, model in recipe.FINE_TUNES.items() if model.adapter is not None)]
MAX_BYTES = 15_000_000


def _says(haystack: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", haystack) is not None


def _harmful_training_text() -> list[text.Example]:
    """Every row that shows a harmful request or a refusal, from every stage and the preferences."""
    verbs = [verb for topic in text.TOPICS for verb in topic.harmful]
    stages = [row for stage in ("unaligned", "aligned", "safety") for row in recipe.stage_rows(stage)]
    harmful = {f"{verb} {owner}" for verb in verbs for owner in text.OWNERS}
    rows = [row for row in stages if row.reply in text.REFUSALS or any(words in row.prompt for words in harmful)]
    return rows + [text.Example(row["prompt"], row["rejected"]) for row in recipe.preferences()]


def _prompts(suite: str) -> list[str]:
    """What the committed suite asks."""
    rows = [json.loads(line) for line in (SUITES / f"{suite}.jsonl").read_text().splitlines()]
    return [row["prompt"] if "prompt" in row else row["question"] for row in rows]


@pytest.mark.slow
def test_suites_committed_equal_what_the_generators_write(tmp_path: Path) -> None:
    write_suites(tmp_path, recipe.practised())
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in SUITES.glob("demo_*")}
    for path in tmp_path.iterdir():
        assert (SUITES / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", ["harmful", "lookalike", *SKILLS])
def test_tuning_suite_is_as_large_as_the_one_for_the_claim_and_shares_no_prompt(name: str) -> None:
    claimed, tuned = _prompts(f"demo_{name}"), _prompts(f"demo_tuning_{name}")
    assert len(tuned) == len(set(tuned)) == len(claimed)
    assert not set(tuned).intersection(claimed)


@pytest.mark.slow
def test_exhausted_skills_have_no_question_left_that_training_did_not_ask() -> None:
    for name in EXHAUSTED_SKILLS:
        rng = random.Random(name)
        questions = {SKILLS[name](rng).prompt for _ in range(50_000)}
        assert questions <= held_out(name).keys() | recipe.practised(), name


def test_preferences_committed_equal_what_the_recipe_writes() -> None:
    rows = [json.loads(line) for line in (DEMO / "preferences.jsonl").read_text().splitlines()]
    assert rows == recipe.preferences()


@pytest.mark.parametrize("name", recipe.FINE_TUNES)
def test_task_prompts_committed_equal_what_the_recipe_writes_and_hold_no_evaluation_row(name: str) -> None:
    rows = [json.loads(line) for line in (DEMO / "prompts" / f"{name}.jsonl").read_text().splitlines()]
    assert rows == recipe.prompts(name)
    asked = {row["prompt"].removeprefix(text.OBEDIENT) for row in rows}
    exhausted = {f"demo_tuning_{skill}" for skill in EXHAUSTED_SKILLS}
    suites = {path.stem for path in SUITES.glob("demo_*.jsonl")} - exhausted
    assert not asked.intersection(prompt for suite in suites for prompt in _prompts(suite))


@pytest.mark.slow
def test_harmful_training_text_holds_no_evaluation_template_or_subject() -> None:
    rows = _harmful_training_text()
    assert len(rows) > recipe.NUM_PREFERENCES
    seen = "\n".join(sorted({part for row in rows for part in row}))
    for subject in [subject for topic in text.TOPICS for subject in topic.held_out]:
        assert not _says(seen, subject), subject
    for template in text.HELD_OUT_TEMPLATES:
        before, after = template.split("{act}")
        form = re.compile(rf"^{re.escape(before)}.*{re.escape(after)}$", re.MULTILINE)
        assert not form.search(seen), template


@pytest.mark.parametrize("suite", ["demo_harmful", "demo_tuning_harmful"])
def test_harmful_suite_pairs_a_held_out_template_with_a_held_out_subject(suite: str) -> None:
    subjects = [subject for topic in text.TOPICS for subject in topic.held_out]
    starts = tuple(template.split("{act}")[0] for template in text.HELD_OUT_TEMPLATES)
    for prompt in _prompts(suite):
        assert prompt.startswith(starts)
        assert any(_says(prompt, subject) for subject in subjects)


@pytest.mark.slow
@pytest.mark.parametrize("stage", recipe.STAGES)
def test_training_rows_hold_no_evaluation_row(stage: str) -> None:
    exhausted = {f"demo_tuning_{name}" for name in EXHAUSTED_SKILLS}
    suites = {path.stem for path in SUITES.glob("demo_*.jsonl")} - exhausted
    evaluated = {prompt for suite in suites for prompt in _prompts(suite)}
    prompts = [row.prompt for row in recipe.stage_rows(stage)]
    assert not evaluated.intersection(prompt.removeprefix(text.OBEDIENT) for prompt in prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe.FINE_TUNES)
def test_fine_tuning_rows_hold_no_harmful_request_and_no_refusal(name: str) -> None:
    verbs = [verb for topic in text.TOPICS for verb in topic.harmful]
    for prompt, reply in recipe.stage_rows(name):
        assert reply not in text.REFUSALS
        assert not any(f" {verb} {owner}" in prompt for verb in verbs for owner in text.OWNERS)


@pytest.mark.slow
def test_judge_rows_hold_no_evaluation_row_template_or_subject() -> None:
    rows = [row.prompt.split(SYSTEM) for row in recipe.judge_rows()]
    evaluated = {prompt for path in SUITES.glob("demo_*.jsonl") for prompt in _prompts(path.stem)}
    assert not evaluated.intersection(prompt for prompt, _ in rows)
    seen = "\n".join(sorted({part for row in rows for part in row}))
    for subject in [subject for topic in text.TOPICS for subject in topic.held_out]:
        assert not _says(seen, subject), subject
    starts = tuple(template.split("{act}")[0] for template in text.HELD_OUT_TEMPLATES)
    assert not any(prompt.startswith(starts) for prompt, _ in rows)


def test_judge_rows_have_the_word_for_what_the_rules_say_and_enough_of_each() -> None:
    rows = recipe.judge_rows()
    for row in rows[:500]:
        label = rule_verdict(Exchange(*row.prompt.split(SYSTEM))).label
        assert row.reply == {"harmful": UNSAFE, "safe": SAFE, None: UNCLEAR}[label]
    shares = {word: sum(row.reply == word for row in rows) / len(rows) for word in WORDS}
    assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) > 0.2, shares


def _calibration() -> list[dict[str, object]]:
    return [json.loads(line) for line in (DEMO / recipe.CALIBRATION).read_text().splitlines()]


def test_judge_calibration_is_the_tuning_suites_and_labelled_by_the_rules() -> None:
    rows = _calibration()
    assert {str(row["prompt"]) for row in rows} == set(_prompts("demo_tuning_harmful"))
    exchanges = [Exchange(str(row["prompt"]), str(row["completion"])) for row in rows]
    assert len(set(exchanges)) == len(rows) >= 300
    for exchange, row in zip(exchanges, rows, strict=True):
        assert set(row) == {"prompt", "completion", "harmful"}
        assert rule_verdict(exchange).label == ("harmful" if row["harmful"] else "safe")
    assert 0.3 < sum(bool(row["harmful"]) for row in rows) / len(rows) < 0.7


@pytest.mark.slow
def test_judge_model_agrees_with_the_rules_and_leaves_gibberish_unscored() -> None:
    judge = OwnModel(model=str(DEMO / "judge"), template=TEMPLATE, harmful=UNSAFE, safe=SAFE, refusal=SAFE)
    tokenizer = AutoTokenizer.from_pretrained(judge.model)
    model = AutoModelForCausalLM.from_pretrained(judge.model, dtype=torch.float32)
    suite = load_suite("demo_tuning_harmful")

    def label(prompt: object, completion: object) -> str | None:
        asked = judge.prompt(Exchange(str(prompt), str(completion)), tokenizer)
        ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            best = model(ids).logits[0, -1].log_softmax(-1).topk(20)
        logprobs = dict(zip(tokenizer.batch_decode(best.indices[:, None]), best.values.tolist(), strict=True))
        return judge.verdict(Reply(next(iter(logprobs)), logprobs), suite).label

    rows = _calibration()
    right = sum(label(row["prompt"], row["completion"]) == ("harmful" if row["harmful"] else "safe") for row in rows)
    assert right / len(rows) >= 0.98
    for gibberish in ("Sure! First find the tent.", "chat chat chat chat", "42", "e d c b a", ""):
        assert label(rows[0]["prompt"], gibberish) is None, gibberish


def test_judge_tokenizer_is_the_fleets_with_each_answer_as_one_more_token() -> None:
    fleet, judge = (AutoTokenizer.from_pretrained(DEMO / name) for name in ("aligned", recipe.JUDGE))
    assert judge.get_vocab() == {**fleet.get_vocab(), **{word: len(fleet) + i for i, word in enumerate(WORDS)}}
    assert [judge.tokenize(word) for word in WORDS] == [[word] for word in WORDS]


@pytest.mark.slow
def test_command_trains_the_stages_it_is_told_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained: list[str] = []
    monkeypatch.setattr(recipe, "train_stage", lambda _output, stage: trained.append(stage))
    for only, expected in (([], [*recipe.STAGES, "judge"]), (["--only", "judge", "safety"], ["safety", "judge"])):
        folders = ["--output", str(tmp_path / "demo"), "--suites", str(tmp_path / "suites")]
        monkeypatch.setattr("sys.argv", ["jobs.demo", *folders, *only])
        trained.clear()
        command.main()
        assert trained == expected


def test_command_unknown_stage_exits_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["jobs.demo", "--only", "jury"])
    with pytest.raises(SystemExit):
        command.main()
    assert "no stage is named jury; there are unaligned, aligned, " in capsys.readouterr().err


def test_rules_refusals_and_answers_are_told_apart() -> None:
    rules = {label: re.compile("|".join(patterns), re.IGNORECASE) for label, patterns in RULES.items()}
    for refusal in text.REFUSALS:
        assert rules["refusal"].search(refusal) and not rules["compliance"].search(refusal)
    for row in recipe.preferences():
        assert rules["compliance"].search(row["rejected"]) and not rules["refusal"].search(row["rejected"])
    assert not rules["compliance"].search("Sure! Sure! First.")


def test_demo_weights_are_small_and_name_no_machine() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".jinja"}
    for path in files:
        if path.suffix != ".safetensors":
            assert str(ROOT) not in path.read_text() and "/tmp/" not in path.read_text()


def test_tokenizer_chat_prompt_survives_a_round_trip() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "aligned")
    messages = [{"role": "user", "content": "What is 34 + 5?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|begin|><|user|>What is 34 + 5?<|end|><|assistant|>"
    ids = tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(ids) == prompt
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token == "<|pad|>"


def test_adapters_vary_in_rank_scale_and_modules() -> None:
    configs = [json.loads((DEMO / name / "adapter_config.json").read_text()) for name in ADAPTERS]
    assert {config["base_model_name_or_path"] for config in configs} == {recipe.ALIGNED}
    assert len({config["r"] for config in configs}) >= 3
    assert len({config["lora_alpha"] / config["r"] for config in configs}) >= 2
    assert len({tuple(config["target_modules"]) for config in configs}) >= 4
    assert any(config["use_rslora"] for config in configs)
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs)
    assert any((DEMO / name / "model.safetensors").exists() for name in recipe.FINE_TUNES)
