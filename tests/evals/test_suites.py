from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evals.suites import BUNDLED_SUITES, load_suite, read_prompts
from fleet.core.errors import SuiteError

PROMPTS: dict[str, Any] = {
    "suite": "mine",
    "kind": "harmfulness",
    "data": "mine.jsonl",
    "max_tokens": 8,
    "rules": {"refusal": ["cannot"], "compliance": ["sure"]},
}
TASK: dict[str, Any] = {
    "task": "sums",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}},
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"max_gen_toks": 5},
}


def write_prompts(folder: Path, rows: str = '{"prompt": "a"}\n{"prompt": "b"}\n', **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "mine.jsonl").write_text(rows)
    config = {k: v for k, v in (PROMPTS | changes).items() if v is not None}
    (folder / "mine.yaml").write_text(json.dumps(config))
    return folder / "mine.yaml"


def write_task(folder: Path, rows: str = '{"q": "1+1", "a": "2"}\n', **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "sums.jsonl").write_text(rows)
    (folder / "sums.yaml").write_text(json.dumps(TASK | changes))
    return folder / "sums.yaml"


def test_load_suite_prompts_by_name_and_by_path_are_one(tmp_path: Path) -> None:
    path = write_prompts(tmp_path)
    suite = load_suite("mine", (tmp_path,))
    assert suite == load_suite(path) == load_suite(str(path))
    assert (suite.kind, suite.num_samples, suite.max_tokens, suite.chat) == ("harmfulness", 2, 8, True)
    assert suite.rules is not None and suite.rules.refusal == ("cannot",)
    assert read_prompts(suite) == ["a", "b"]


def test_load_suite_first_folder_wins(tmp_path: Path) -> None:
    write_prompts(tmp_path / "first", max_tokens=1)
    write_prompts(tmp_path / "second", max_tokens=2)
    assert load_suite("mine", (tmp_path / "first", tmp_path / "second")).max_tokens == 1


def test_load_suite_task_knows_its_samples_and_length(tmp_path: Path) -> None:
    suite = load_suite(write_task(tmp_path))
    assert (suite.name, suite.kind, suite.num_samples, suite.max_tokens) == ("sums", "task", 1, 5)
    with pytest.raises(SuiteError, match="no prompts of its own"):
        read_prompts(suite)


@pytest.mark.parametrize("write", [write_prompts, write_task])
def test_suite_digest_follows_content_not_place(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "here")
    digest = load_suite(path).digest
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert load_suite(tmp_path / "there" / path.name).digest == digest
    assert load_suite(write(tmp_path / "rows", rows='{"prompt": "c", "q": "", "a": ""}\n')).digest != digest
    assert load_suite(write(tmp_path / "yaml", max_tokens=9)).digest != digest


def test_task_digest_covers_includes_and_functions(tmp_path: Path) -> None:
    write_task(tmp_path)
    (tmp_path / "outer.yaml").write_text("include: sums.yaml\ntask: outer\nprocess_docs: !function helper.clean\n")
    (tmp_path / "helper.py").write_text("def clean(docs):\n    return docs\n")
    digests = [load_suite(tmp_path / "outer.yaml").digest]
    (tmp_path / "helper.py").write_text("def clean(docs):\n    return docs[:1]\n")
    digests.append(load_suite(tmp_path / "outer.yaml").digest)
    write_task(tmp_path, doc_to_text="Q: {{q}}")
    digests.append(load_suite(tmp_path / "outer.yaml").digest)
    (tmp_path / "sums.jsonl").write_text('{"q": "2+2", "a": "4"}\n')
    digests.append(load_suite(tmp_path / "outer.yaml").digest)
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_token": 3}, "unknown field max_token"),
        ({"data": None}, "missing field data"),
        ({"data": "gone.jsonl"}, "no file"),
        ({"data": "s3://bucket/x.jsonl"}, "beside the YAML"),
        ({"kind": "harm"}, "kind is 'harm'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"chat": "yes"}, "chat is 'yes'"),
        ({"rules": {"refusal": []}}, "refusal and compliance"),
        ({"rules": {"refusal": ["("], "compliance": []}}, "no regular expression"),
        ({"rows": ""}, "holds no prompt"),
        ({"rows": '{"prompt": ""}\n'}, "line 1"),
        ({"rows": '{"prompt": "a"}\n{"text": "b"}\n'}, "line 2"),
        ({"rows": "{\n"}, "line 1: not JSON"),
    ],
)
def test_load_suite_malformed_prompts_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError, match=message) as error:
        load_suite(write_prompts(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_load_suite_malformed_yaml_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for text, message in (
        ("suite: [", "no valid YAML"),
        ("- a", "must be a mapping"),
        ("name: x", "neither `suite:`"),
    ):
        path.write_text(text)
        with pytest.raises(SuiteError, match=message) as error:
            load_suite(path)
        assert "\n" not in str(error.value)
    with pytest.raises(SuiteError, match="cannot be read"):
        load_suite(tmp_path / "gone.yaml")


def test_load_suite_task_missing_data_names_the_file(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    (tmp_path / "sums.jsonl").unlink()
    with pytest.raises(SuiteError, match=r"sums\.jsonl"):
        load_suite(path)


def test_load_suite_lm_eval_names_known_and_near_matches_listed(tmp_path: Path) -> None:
    for name in ("gsm8k", "mmlu", "mmlu_anatomy", "ai2_arc", "copa", "xcopa_zh", "xnli_hi"):
        suite = load_suite(name, (tmp_path,))
        assert (suite.name, suite.kind, suite.path) == (name, "task", None)
    assert load_suite("gsm8k").digest != load_suite("mmlu").digest
    write_prompts(tmp_path)
    with pytest.raises(SuiteError, match="gsm8k"):
        load_suite("gsm8kk", (tmp_path,))
    with pytest.raises(SuiteError, match="mine"):
        load_suite("mines", (tmp_path,))


def test_load_suite_that_runs_what_a_model_wrote_is_refused_with_the_reason(tmp_path: Path) -> None:
    # humaneval_64_instruct is marked by what its include includes.
    for name in ("humaneval", "humaneval_64_instruct", "mbpp", write_task(tmp_path, unsafe_code=True)):
        with pytest.raises(SuiteError, match="running code that a model wrote") as error:
            load_suite(name, (tmp_path,))
        assert "\n" not in str(error.value)
    assert load_suite(write_task(tmp_path, unsafe_code=False)).name == "sums"


def test_bundled_suites_all_load() -> None:
    for path in sorted(BUNDLED_SUITES.glob("*.yaml")):
        assert load_suite(path.stem).path == path


@pytest.mark.slow
def test_planning_modules_import_nothing_heavy() -> None:
    code = (
        "import evals.engine, evals.gates, evals.judges, evals.logs, evals.rates, evals.suites, sys;"
        "evals.suites.load_suite('gsm8k');"
        "print(sorted({'torch','vllm','lm_eval','ray','transformers','datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": true}', 'text "prompt"'),
        ('{"prompt": ["first turn", "second turn"]}', 'text "prompt"'),
    ],
)
def test_load_suite_prompt_that_would_be_cut_or_made_up_is_refused(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        load_suite(write_prompts(tmp_path / "s", row + "\n"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("max_tokens: 9", "'max_tokens' is there twice; leave one"),
        ("5: x\nfoo: y", "unknown field 5, foo"),
        ("limit: .inf", "limit is inf, but must be"),
        ("rules: {refusal: [x], refusal: [y], compliance: [z]}", "'refusal' is there twice"),
    ],
)
def test_load_suite_yaml_fields_that_are_odd_are_one_line(tmp_path: Path, more: str, message: str) -> None:
    path = write_prompts(tmp_path / "s", rules=None)
    path.write_text("suite: mine\nkind: harmfulness\ndata: mine.jsonl\nmax_tokens: 8\n" + more + "\n")
    with pytest.raises(SuiteError, match=message):
        load_suite(path)


def test_load_suite_name_longer_than_a_file_may_have_is_looked_up_like_any_other(tmp_path: Path) -> None:
    name = "x" * 300
    write_task(tmp_path / "s", task=name)
    assert load_suite(name, [tmp_path / "s"]).name == name
    with pytest.raises(SuiteError, match="no task of lm-eval"):
        load_suite("y" * 300, [tmp_path / "s"])


def test_load_suite_relative_path_that_is_not_there_says_to_give_a_name() -> None:
    with pytest.raises(SuiteError, match=r"^suite suites/mine\.yaml: no such file; .* such as mine$"):
        load_suite("suites/mine.yaml")


def test_load_suite_data_by_an_absolute_pattern_is_found(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "s[1]", data=f"{tmp_path}/other/*.jsonl")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jsonl").write_text('{"prompt": "c"}\n')
    assert read_prompts(load_suite(path)) == ["c"]
    (tmp_path / "other" / "a.jsonl").unlink()
    with pytest.raises(SuiteError, match="data: no file matches"):
        load_suite(path)
