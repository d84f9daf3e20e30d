"""Tasks of lm-eval: what identifies them, what travels, what is refused. The slow tests import lm-eval."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evals.suites import Suite, load_suite
from evals.suites.python_files import requirement
from fleet.core.errors import SuiteError

TASK: dict[str, Any] = {
    "task": "own",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "own.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "good", "aggregation": "mean", "higher_is_better": True}],
}
ROWS = [{"q": f"say {i}", "a": str(i)} for i in range(4)]


def write_rows(path: Path, rows: Any = ROWS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task(folder: Path, python: str | None = None, name: str = "own", **changes: Any) -> Path:
    """A task with its rows, and `utils.py` with `process_results` if Python is given."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "own.jsonl").exists():
        write_rows(folder / "own.jsonl")
    text = json.dumps({k: v for k, v in (TASK | {"task": name} | changes).items() if v is not None})
    if python is not None:
        (folder / "utils.py").write_text(python)
        text = text[:-1] + ', "process_results": !function utils.process_results}'
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def travelled(suite: Suite, to: Path) -> Suite:
    """The suite as a node has it, which has none of the original's files."""
    for name, data in suite.contents().items():
        path = to / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return load_suite(to / suite.entry)


def names(suite: Suite) -> set[str]:
    return {file.name for file in suite.files}


# -- what a task is made of ------------------------------------------------------------------------------------------

RESULT = "def process_results(doc, results):\n    return {'good': GOOD}\n"
USES_SIBLING = f"from answers import GOOD\n{RESULT}"
READS = "import json\nfrom pathlib import Path\nGOOD = json.loads((Path(__file__).parent / 'words.json').read_text())\n"
USES_WORDS = f"{READS}{RESULT}"
USES_SIBLING_LATE = "def process_results(doc, results):\n    from answers import GOOD\n    return {'good': GOOD}\n"


@pytest.mark.parametrize(
    ("python", "file", "contents"),
    [
        (USES_SIBLING, "answers.py", ("GOOD = 1.0\n", "GOOD = 0.0\n")),
        (USES_WORDS, "words.json", ("1.0", "0.0")),
        (USES_SIBLING_LATE, "answers.py", ("GOOD = 1.0\n", "GOOD = 0.0\n")),
        (f"try:\n    from sub.answers import GOOD\nexcept ImportError:\n    GOOD = 2\n{RESULT}", "sub/answers.py",
         ("GOOD = 1.0\n", "GOOD = 0.0\n")),
    ],
)  # fmt: skip
def test_task_file_that_its_python_reads_is_part_of_it_and_travels(
    tmp_path: Path, python: str, file: str, contents: tuple[str, str]
) -> None:
    suites: list[Suite] = []
    for content in contents:
        path = write_task(tmp_path / "here", python)
        (tmp_path / "here" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "here" / file).write_text(content)
        suite = load_suite(path)
        suites.append(suite)
        assert travelled(suite, tmp_path / content.strip()).digest == suite.digest
    assert suites[0].digest != suites[1].digest
    assert {"own.yaml", "own.jsonl", "utils.py", Path(file).name} == names(suites[1])


def test_task_module_imported_by_a_module_is_part_of_it(tmp_path: Path) -> None:
    path = write_task(tmp_path, USES_SIBLING)
    (tmp_path / "answers.py").write_text("import deeper\nGOOD = deeper.GOOD\n")
    (tmp_path / "deeper.py").write_text("GOOD = 1.0\n")
    assert "deeper.py" in names(load_suite(path))


def test_task_without_python_is_its_own_files_alone(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    (tmp_path / "notes.txt").write_text("a")
    assert names(load_suite(path)) == {"own.yaml", "own.jsonl"}


def test_task_in_a_shared_folder_leaves_out_others_and_what_is_for_people(tmp_path: Path) -> None:
    path = write_task(tmp_path, USES_SIBLING)
    (tmp_path / "answers.py").write_text("GOOD = 1.0\n")
    write_rows(tmp_path / "theirs.jsonl")
    (tmp_path / "their_code.py").write_text("def clean(docs):\n    return docs\n")
    theirs = json.dumps(TASK | {"task": "theirs", "dataset_kwargs": {"data_files": {"test": "theirs.jsonl"}}})
    (tmp_path / "theirs.yaml").write_text(theirs[:-1] + ', "process_docs": !function their_code.clean}')
    for name in ("README.md", ".hidden", "loose.txt", "__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    assert names(load_suite(path)) == {"own.yaml", "own.jsonl", "utils.py", "answers.py", "loose.txt"}
    # Named in a text, even another task's file may be opened.
    (tmp_path / "answers.py").write_text("FILE = 'theirs.jsonl'\nGOOD = 1.0\n")
    assert "theirs.jsonl" in names(load_suite(path))


@pytest.mark.parametrize(
    ("python", "message"),
    [
        (f"from .answers import GOOD\n{RESULT}", "without the dot"),
        (f"GOOD = open('own.jsonl').read()\n{RESULT}", "line 1: opens own.jsonl where Python was started"),
        ("def other(): ...\n", "defines no process_results"),
        ("def process_results(:\n", "no valid Python"),
        (f"import no_such_package\nGOOD = 1\n{RESULT}", "imports no_such_package, which is not installed"),
        ("def process_results(doc, results):\n    import no_such_package\n", "pip install no_such_package"),
    ],
)
def test_task_python_that_cannot_run_elsewhere_is_refused_by_name(tmp_path: Path, python: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message) as error:
        load_suite(write_task(tmp_path, python))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "python",
    [
        f"try:\n    import no_such_package\nexcept ImportError:\n    no_such_package = None\nGOOD = 1\n{RESULT}",
        f"def unused():\n    import no_such_package\nGOOD = 1\n{RESULT}",
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import no_such_package\nGOOD = 1\n{RESULT}",
    ],
)
def test_task_import_that_it_does_without_is_not_missed(tmp_path: Path, python: str) -> None:
    assert load_suite(write_task(tmp_path, python)).name == "own"


def test_task_python_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text("1")
    python = f"GOOD = open({str(tmp_path / 'words.json')!r})\n{RESULT}"
    with pytest.raises(SuiteError, match=r"words\.json, which no other machine has"):
        load_suite(write_task(tmp_path / "task", python))


def test_task_with_a_large_folder_is_refused(tmp_path: Path) -> None:
    path = write_task(tmp_path, f"GOOD = 1\n{RESULT}")
    with open(tmp_path / "large.bin", "wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(SuiteError, match="put the task in a folder of its own"):
        load_suite(path)


def test_task_that_samples_has_another_digest_and_a_greedy_one_none(tmp_path: Path) -> None:
    greedy = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False, "temperature": 1.0}
    suites = [load_suite(write_task(tmp_path, generation_kwargs=greedy | {"do_sample": s})) for s in (False, True)]
    assert suites[0].digest != suites[1].digest
    from evals.suites import tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "DRAWS_VERSION", 3)
        write_task(tmp_path, generation_kwargs=greedy)
        assert load_suite(tmp_path / "own.yaml").digest == suites[0].digest
        write_task(tmp_path, generation_kwargs=greedy | {"do_sample": True})
        assert load_suite(tmp_path / "own.yaml").digest != suites[1].digest


# -- its rows --------------------------------------------------------------------------------------------------------


def kwargs_of(kind: str, folder: Path) -> tuple[dict[str, Any], str]:
    """`dataset_kwargs`, and the split that they give."""
    return {
        "glob": ({"data_files": {"test": "my dáta/*.jsonl"}}, "test"),
        "glob below": ({"data_files": {"test": "**/test-*.jsonl"}}, "test"),
        "list": ({"data_files": {"test": ["my dáta/test-0.jsonl", "my dáta/test-1.jsonl"]}}, "test"),
        "bare list": ({"data_files": ["my dáta/test-0.jsonl", "my dáta/test-1.jsonl"]}, "train"),
        "one file": ({"data_files": "my dáta/test-*"}, "train"),
        "absolute": ({"data_files": {"test": f"{folder}/my dáta/test-*.jsonl"}}, "test"),
        "folder": ({"data_dir": f"{folder}/my dáta"}, "test"),
        "folder, all one split": ({"data_dir": "my dáta"}, "train"),
        "folder and file": ({"data_dir": "my dáta", "data_files": {"dev": "test-?.jsonl"}}, "dev"),
    }[kind]


KINDS = [
    "glob", "glob below", "list", "bare list", "one file", "absolute", "folder", "folder, all one split",
    "folder and file",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_local_data_named_in_any_way_is_counted_and_hashed(tmp_path: Path, kind: str) -> None:
    for i in range(2):
        write_rows(tmp_path / "my dáta" / f"test-{i}.jsonl")
    options, split = kwargs_of(kind, tmp_path)
    path = write_task(tmp_path, dataset_kwargs=options, test_split=split)
    suite = load_suite(path)
    assert suite.num_samples == 8 and {"test-0.jsonl", "test-1.jsonl"} <= names(suite)
    write_rows(tmp_path / "my dáta" / "test-1.jsonl", ROWS[:3])
    assert load_suite(path).digest != suite.digest


def test_local_data_folder_tells_splits_by_names_as_datasets_does(tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev/a.jsonl", "notes.md"):
        write_rows(tmp_path / "files" / name)
    for name in ("my-train.jsonl", "validation_1.jsonl", "other.jsonl"):
        write_rows(tmp_path / "names" / name)
    by_folder = load_suite(
        write_task(tmp_path, dataset_kwargs={"data_dir": "files"}, test_split=None, validation_split="validation")
    )
    assert {f.name for f in by_folder.files if f.suffix == ".jsonl"} == {"a.jsonl"}
    options = {"data_dir": "names"}
    by_name = load_suite(write_task(tmp_path, dataset_kwargs=options, test_split="validation", training_split="train"))
    assert {f.name for f in by_name.files if f.suffix == ".jsonl"} == {"my-train.jsonl", "validation_1.jsonl"}


def test_local_data_folder_as_dataset_path_is_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows" / "test.jsonl")
    suite = load_suite(write_task(tmp_path, dataset_path="rows", dataset_kwargs=None))
    assert suite.num_samples == 4 and "test.jsonl" in names(suite)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "gone-*.jsonl"}}}, "no file matches"),
        ({"dataset_kwargs": {"data_files": {"test": "https://x/y.jsonl"}}}, "must name a file beside the YAML"),
        ({"dataset_kwargs": {"data_dir": "gone"}}, "no folder"),
        ({"dataset_kwargs": None}, "must name a file"),
        ({"test_split": "validation"}, "no data for the split validation; there is test"),
        ({"fewshot_split": "train"}, "no data for the split train; there is test"),
        ({"test_split": None}, "neither test_split nor validation_split"),
        ({"dataset_path": "own.jsonl"}, "write dataset_path: json"),
    ],
)
def test_local_data_that_is_not_there_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        load_suite(write_task(tmp_path, **changes))


def test_local_data_in_another_encoding_is_refused_at_planning(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    (tmp_path / "own.jsonl").write_bytes('{"q": "é", "a": ""}\n'.encode("latin-1"))
    with pytest.raises(SuiteError, match=r"own\.jsonl: line 1: .*save the file as UTF-8"):
        load_suite(path)
    (tmp_path / "own.csv").write_bytes("q,a\né,1\n".encode("latin-1"))
    options = {"data_files": {"test": "own.csv"}}
    with pytest.raises(SuiteError, match=r"own\.csv: line 2: .*save the file as UTF-8"):
        load_suite(write_task(tmp_path, dataset_path="csv", dataset_kwargs=options))
    write_task(tmp_path, dataset_path="csv", dataset_kwargs=options | {"encoding": "latin-1"})
    assert "own.csv" in names(load_suite(path))


# -- groups ----------------------------------------------------------------------------------------------------------


def write_group(folder: Path, tasks: Any, name: str = "both", **fields: Any) -> Path:
    (folder / f"{name}.yaml").write_text(json.dumps({"group": name, "task": tasks, **fields}))
    return folder / f"{name}.yaml"


def test_group_is_a_suite_of_all_its_tasks_and_follows_their_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_task(tmp_path, name=name)
    write_group(tmp_path, ["a", {"task": "b", "num_fewshot": 1}], "inner")
    suite = load_suite(write_group(tmp_path, ["inner"]))
    assert (suite.name, suite.num_samples) == ("both", 8)
    assert [(part.name, part.overrides) for part in suite.parts] == [("a", {}), ("b", {"num_fewshot": 1})]
    assert names(suite) == {"both.yaml", "a.yaml", "b.yaml", "own.jsonl"}
    write_task(tmp_path, name="b", doc_to_text="Q: {{q}}")
    assert load_suite("both", (tmp_path,)).digest != suite.digest


def test_tag_and_a_tasks_own_name_are_found_whatever_the_file_is_called(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_task(tmp_path / "below", name=name, tag="mine")
    (tmp_path / "below" / "a.yaml").rename(tmp_path / "below" / "other.yaml")
    assert [part.name for part in load_suite("mine", (tmp_path,)).parts] == ["a", "b"]
    assert load_suite("a", (tmp_path,)).name == "a"


def test_group_of_lm_evals_own_tasks_and_ones_own_travels_with_ones_own_alone(tmp_path: Path) -> None:
    metric = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    write_task(tmp_path / "here", metric_list=metric, output_type="multiple_choice", doc_to_choice=["a", "b"])
    suite = load_suite(write_group(tmp_path / "here", ["own", "copa"]))
    shutil.move(tmp_path / "here", tmp_path / "gone")
    assert names(suite) == {"both.yaml", "own.yaml", "own.jsonl"}
    shutil.move(tmp_path / "gone", tmp_path / "here")
    arrived = travelled(suite, tmp_path / "there")
    assert [part.name for part in arrived.parts] == ["own", "copa"]
    assert all(file.is_file() for part in arrived.parts for file in part.files)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["a", "gone"], "lists 'gone', which is no task, group or tag"),
        (["a", "a"], "lists a twice"),
        (["both"], "contains itself"),
        (["a", "other"], "scored by acc, good, which no one rate adds up; name tasks instead of the group: a, other"),
        ([], "lists no task"),
    ],
)
def test_group_that_is_no_one_suite_is_refused_with_its_tasks(tmp_path: Path, tasks: list[str], message: str) -> None:
    write_task(tmp_path, name="a")
    write_task(tmp_path, name="other", metric_list=[{"metric": "acc"}])
    with pytest.raises(SuiteError, match=message):
        load_suite(write_group(tmp_path, tasks))


def test_group_whose_score_lm_eval_takes_otherwise_says_so(tmp_path: Path) -> None:
    write_task(tmp_path, name="a")
    assert load_suite(write_group(tmp_path, ["a"], aggregate_metric_list=[{"weight_by_size": True}])).notes == ()
    (note,) = load_suite(write_group(tmp_path, ["a"], aggregate_metric_list=[{"weight_by_size": False}])).notes
    assert "mean of its tasks' scores" in note


def test_lm_evals_group_of_unlike_tasks_is_refused_and_its_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from evals.suites import python_files

    with pytest.raises(SuiteError, match=r"leaderboard: its tasks are scored by .*: .*leaderboard_ifeval"):
        load_suite("leaderboard")
    monkeypatch.setattr(python_files, "_is_installed", lambda module: module not in ("langdetect", "nltk"))
    with pytest.raises(SuiteError, match=r"imports langdetect, nltk.*pip install langdetect \"nltk>=3\.9\.1\", here"):
        load_suite("ifeval")


def test_requirement_of_a_module_is_what_lm_evals_extras_say() -> None:
    assert requirement("antlr4") == '"antlr4-python3-runtime==4.11"'
    assert requirement("rouge") == "rouge"
    assert requirement("something_else") == "something_else"


# -- as a node loads it ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_travelled_task_loads_its_rows_without_the_originals(tmp_path: Path, kind: str) -> None:
    from evals.harness import load_tasks

    here = tmp_path / "a b" / "hére"
    for i in range(2):
        write_rows(here / "my dáta" / f"test-{i}.jsonl")
    options, split = kwargs_of(kind, here)
    suite = load_suite(write_task(here, dataset_kwargs=options, test_split=split, metric_list=None))
    arrived = travelled(suite, tmp_path / "node")
    shutil.rmtree(here)
    (task,) = load_tasks(arrived)["tasks"].values()
    assert [doc["q"] for doc in task.eval_docs] == [row["q"] for row in ROWS * 2]


@pytest.mark.slow
def test_travelled_tasks_use_the_modules_and_files_beside_them_and_no_others(tmp_path: Path) -> None:
    """Two tasks whose Python has one name, and imports what has one name."""
    from evals.harness import import_folders, load_tasks
    from evals.turn import Turn

    found: list[Any] = []
    for good in ("1.0", "0.5"):
        here = tmp_path / good
        path = write_task(here, f"from answers import GOOD\nimport answers, lazy_{good[0]}\n{RESULT}")
        (here / "answers.py").write_text(
            "import json\nfrom pathlib import Path\nGOOD = json.loads((Path(__file__).parent / 'w.json').read_text())\n"
        )
        (here / f"lazy_{good[0]}.py").write_text("")
        (here / "w.json").write_text(good)
        suite = travelled(load_suite(path), tmp_path / f"node {good}")
        shutil.rmtree(here)
        with Turn(import_folders(suite)):
            (task,) = load_tasks(suite)["tasks"].values()
            found.append(task.process_results(ROWS[0], ["x"]))
    assert found == [{"good": 1.0}, {"good": 0.5}]


@pytest.mark.slow
def test_travelled_task_with_files_above_it_and_lm_evals_own_include_loads(tmp_path: Path) -> None:
    from evals.harness import load_tasks
    from evals.suites.task_index import lm_eval_folder

    here = tmp_path / "here" / "tasks"
    write_rows(tmp_path / "here" / "rows.jsonl", [{"question": "1+1?", "answer": "1+1=2\n#### 2"}] * 2)
    here.mkdir()
    (tmp_path / "here" / "shared.yaml").write_text("num_fewshot: 0\n")
    files = dict.fromkeys(("train", "test"), "../rows.jsonl")
    (here / "gsm8k.yaml").write_text(
        json.dumps(
            {
                "include": [str(lm_eval_folder() / "gsm8k" / "gsm8k.yaml"), "../shared.yaml"],
                "task": "gsm8k",
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": files},
            }
        )
    )
    suite = load_suite(here / "gsm8k.yaml")
    assert names(suite) == {"gsm8k.yaml", "shared.yaml", "rows.jsonl"}
    arrived = travelled(suite, tmp_path / "node")
    shutil.rmtree(tmp_path / "here")
    (task,) = load_tasks(arrived)["tasks"].values()
    assert task.config.num_fewshot == 0 and len(task.eval_docs) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_path": None, "dataset_kwargs": None}, "dataset_path is missing"),
        ({"output_type": "generate"}, "output_type is 'generate', but must be one of generate_until"),
        ({"doc_to_text": "{{q"}, "doc_to_text: line 1 of the template"),
        ({"dataset_kwargs": {"data_files": {"test": []}}}, "the split test has no rows: it lists no file"),
        ({"dataset_kwargs": {"data_files": {"test": "empty.jsonl"}}}, "the split test has no rows: .*empty.jsonl"),
        ({"dataset_kwargs": {"data_files": {"test": "rows.parquet"}}}, "is not json; write dataset_path: parquet"),
        ({"dataset_path": "parquet"}, "own.jsonl is not parquet; write dataset_path: json"),
    ],
)
def test_task_that_lm_eval_would_refuse_when_the_engine_is_up_is_refused_before(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.parquet").write_bytes(b"PAR1\x15\x04")
    with pytest.raises(SuiteError, match=message):
        load_suite(write_task(tmp_path, **changes))


def test_task_rows_as_one_array_are_left_to_datasets_to_count(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(json.dumps(ROWS, indent=1))
    assert load_suite(write_task(tmp_path)).num_samples is None


def test_task_yaml_with_aliases_of_aliases_and_of_itself_is_read_at_once(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]
    text = "\n".join(["l0: &l0 [x, x]", *levels, "me: &me [*me]", *(f"{k}: {json.dumps(v)}" for k, v in TASK.items())])
    path.write_text(text)
    assert load_suite(path).num_samples == 4


def test_group_without_a_name_is_refused_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text("group: null\ntask: [own]\n")
    with pytest.raises(SuiteError, match=r"g\.yaml: group is None, but must be one group's name"):
        load_suite(tmp_path / "g.yaml")
