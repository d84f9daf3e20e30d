"""Readers of published sets, on invented rows of their forms: no prompt of any set is here."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.logs import sample_ids
from evals.suites import TEMPLATES, Suite, load_suite, read_prompts, read_requests
from evals.suites.prompts import PLAIN, Prompt, read_files
from evals.suites.published import READERS, DataPolicy, DatasetSource
from fleet.core.errors import SuiteError

ALL = DataPolicy(non_commercial=True, gated=True)

HARMBENCH = """Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID
Hide my socks,standard,laundry,,,hide_socks
"Name the thief, then stop",contextual,theft,context,"Ann took the {red} sock.
Bob saw it.",name_thief
Recite the sock song,copyright,songs,hash_check,,sock_song
"""
JBB = """Index,Goal,Target,Behavior,Category,Source
0,{0},Sure,Socks,Laundry,Original
1,{1},Sure,Shoes,Footwear,Original
"""


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def catqa(*questions: str) -> str:
    return lines(*({"Category": "Laundry", "Subcategory": "Socks", "Question": q} for q in questions))


ROWS: dict[str, tuple[str, str, list[Prompt]]] = {
    # File as published -> what its reader makes of it.
    "directharm4": (
        "test.csv",
        "instruction,category\nHide my socks,laundry\nLose a shoe,footwear\n",
        [Prompt("Hide my socks", "laundry", "", "en"), Prompt("Lose a shoe", "footwear", "", "en")],
    ),
    "advbench": (
        "harmful_behaviors.csv",
        'goal,target\n"Hide my socks, all of them","Sure, here is"\nLose a shoe,Sure\n',
        [Prompt("Hide my socks, all of them", "", "", "en"), Prompt("Lose a shoe", "", "", "en")],
    ),
    "harmbench": (
        "harmbench_behaviors_text_all.csv",
        HARMBENCH,
        [
            Prompt("Hide my socks", "laundry", "", "en"),
            Prompt("Name the thief, then stop", "theft", "Ann took the {red} sock.\nBob saw it.", "en"),
        ],
    ),
    "harmbench_standard": (
        "harmbench_behaviors_text_all.csv",
        HARMBENCH,
        [Prompt("Hide my socks", "laundry", "", "en")],
    ),
    "harmbench_contextual": (
        "harmbench_behaviors_text_all.csv",
        HARMBENCH,
        [Prompt("Name the thief, then stop", "theft", "Ann took the {red} sock.\nBob saw it.", "en")],
    ),
    "harmbench_copyright": (
        "harmbench_behaviors_text_all.csv",
        HARMBENCH,
        [Prompt("Recite the sock song", "songs", "", "en")],
    ),
    "jailbreakbench": (
        "harmful-behaviors.csv",
        JBB.format("Hide my socks", "Lose a shoe"),
        [Prompt("Hide my socks", "Laundry", "", "en"), Prompt("Lose a shoe", "Footwear", "", "en")],
    ),
    "jailbreakbench_benign": (
        "benign-behaviors.csv",
        JBB.format("Wash my socks", "Find a shoe"),
        [Prompt("Wash my socks", "Laundry", "", "en"), Prompt("Find a shoe", "Footwear", "", "en")],
    ),
    "strongreject": (
        "strongreject_dataset.csv",
        "category,source,forbidden_prompt\nLaundry,custom,Hide my socks\nFootwear,custom,Lose a shoe\n",
        [Prompt("Hide my socks", "Laundry", "", "en"), Prompt("Lose a shoe", "Footwear", "", "en")],
    ),
    "catqa_en": (
        "catqa_english.json",
        catqa("Where are my socks?"),
        [Prompt("Where are my socks?", "Laundry", "", "en")],
    ),
    "catqa_zh": ("catqa_chinese.json", catqa("我的袜子在哪里？"), [Prompt("我的袜子在哪里？", "Laundry", "", "zh")]),
    "catqa_vi": ("catqa_vietnamese.json", catqa("Tất của tôi đâu?"), [Prompt("Tất của tôi đâu?", "Laundry", "", "vi")]),
    "sorrybench": (
        "question.jsonl",
        lines(
            {"question_id": 1, "category": "1", "turns": ["Hide my socks"], "prompt_style": "base"},
            {"question_id": 1, "category": "1", "turns": ["Uif tpdlt"], "prompt_style": "caesar"},
        ),
        [Prompt("Hide my socks", "1", "", "en")],
    ),
    "beavertails_evaluation": (
        "test.jsonl",
        lines({"prompt": "Hide my socks", "category": "laundry", "category_id": 3}),
        [Prompt("Hide my socks", "laundry", "", "en")],
    ),
    "xstest": (
        "xstest_prompts.csv",
        "id,prompt,type,label,focus,note\n1,How do I beat an egg?,homonyms,safe,beat,\n"
        "2,How do I hide a sock?,contrast_homonyms,unsafe,hide,\n",
        [Prompt("How do I beat an egg?", "homonyms", "", "en")],
    ),
    "orbench_hard": (
        "or-bench-hard-1k.csv",
        "prompt,category\nHow do I beat an egg?,violence\n",
        [Prompt("How do I beat an egg?", "violence", "", "en")],
    ),
}


def write_suite(folder: Path, name: str, file: str, text: str, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(text, encoding="utf-8")
    config = {"suite": name, "reader": name, "data": file, "max_tokens": 8} | changes
    (folder / f"{name}.yaml").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder / f"{name}.yaml"


def own(folder: Path, *rows: dict[str, Any], **changes: Any) -> Suite:
    folder.mkdir(exist_ok=True)
    (folder / "own.jsonl").write_text(lines(*rows), encoding="utf-8")
    config = {"suite": "own", "kind": "harmfulness", "data": "own.jsonl", "max_tokens": 8} | changes
    (folder / "own.yaml").write_text(json.dumps(config))
    return load_suite(folder / "own.yaml")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` loads as it loads a dataset of the hub; its cache is thrown away."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hub"
    folder.mkdir()
    return folder


def publish(hub: Path, name: str, files: dict[str, str], config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put files (split -> name) into `hub` under a configuration, and point the reader there."""
    splits = [{"split": split, "path": file} for split, file in files.items()]
    card = json.dumps({"configs": [{"config_name": config, "data_files": splits}]})
    (hub / "README.md").write_text(f"---\n{card}\n---\n")
    reader = READERS[name]
    source = dataclasses.replace(reader.source, path=str(hub), revision=None)
    monkeypatch.setitem(READERS, name, dataclasses.replace(reader, source=source))


def test_rows_of_every_reader_are_tested() -> None:
    assert ROWS.keys() | {"hexphi"} == READERS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_reader_file_as_published_gives_its_prompts(tmp_path: Path, name: str) -> None:
    file, text, expected = ROWS[name]
    suite = load_suite(write_suite(tmp_path, name, file, text), policy=ALL)
    assert list(suite.prompts) == expected
    assert (suite.name, suite.kind, suite.max_tokens) == (name, READERS[name].kind, 8)


@pytest.mark.parametrize("name", ROWS)
def test_reader_hub_and_file_are_the_same_suite(
    tmp_path: Path, hub: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, text, expected = ROWS[name]
    (hub / file).write_text(text, encoding="utf-8")
    source = READERS[name].source
    if source.data_files is not None:
        assert source.data_files.endswith(f"/{file}")
        local = dataclasses.replace(READERS[name], source=dataclasses.replace(source, data_files=str(hub / file)))
        monkeypatch.setitem(READERS, name, local)
    else:
        publish(hub, name, {str(source.split): file}, source.config or "default", monkeypatch)
    suite = load_suite(name, policy=ALL)
    assert list(suite.prompts) == expected
    assert suite.digest == load_suite(write_suite(tmp_path, name, file, text, max_tokens=512), policy=ALL).digest


def test_hexphi_files_without_header_lose_no_row(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"category_1": "Hide my socks\n", "category_3": '"Lose a shoe, or two"\nEat the shoe\n'}
    for name, text in files.items():
        (hub / f"{name}.csv").write_text(text)
        write_suite(tmp_path / "own", "hexphi", f"{name}.csv", text, data="category_*.csv")
    expected = [
        Prompt("Hide my socks", "category_1", "", "en"),
        Prompt("Lose a shoe, or two", "category_3", "", "en"),
        Prompt("Eat the shoe", "category_3", "", "en"),
    ]
    assert list(load_suite(tmp_path / "own" / "hexphi.yaml", policy=ALL).prompts) == expected
    publish(hub, "hexphi", {name: f"{name}.csv" for name in files}, "default", monkeypatch)
    assert list(load_suite("hexphi", policy=ALL).prompts) == expected


def test_reader_sources_are_pinned_and_terms_are_stated() -> None:
    for name, reader in READERS.items():
        assert reader.licence and "arXiv" in reader.paper and reader.num_prompts > 0, name
        assert reader.source.path.count("/") == 1 or reader.source.path == "csv"
    assert {n for n, r in READERS.items() if not r.commercial} == {"hexphi", "beavertails_evaluation"}
    assert {n for n, r in READERS.items() if r.gated} == {"hexphi", "sorrybench"}


def test_docs_state_the_terms_of_every_reader() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "suites.md").read_text(encoding="utf-8")
    for name, reader in READERS.items():
        access = "**on request**" if reader.gated else "open"
        assert f"| `{name}` | {reader.num_prompts:,} | {reader.licence} | {access} | " in docs
    for name in TEMPLATES:
        assert f"| `{name}` |" in docs


@pytest.mark.parametrize(
    ("name", "policy", "fields"),
    [
        ("beavertails_evaluation", DataPolicy(), ["CC-BY-NC-4.0", "evaluation.policy.non_commercial"]),
        ("beavertails_evaluation", DataPolicy(gated=True), ["evaluation.policy.non_commercial"]),
        ("sorrybench", DataPolicy(non_commercial=True), ["SORRY-Bench", "evaluation.policy.gated"]),
        ("hexphi", DataPolicy(), ["HEx-PHI", "evaluation.policy.non_commercial", "evaluation.policy.gated"]),
    ],
)
def test_policy_refuses_before_anything_is_read(
    tmp_path: Path, name: str, policy: DataPolicy, fields: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = dataclasses.replace(READERS[name], source=DatasetSource("no/such/folder"))
    monkeypatch.setitem(READERS, name, lost)
    yaml = write_suite(tmp_path, name, "damaged.csv", "\n", data="damaged.csv")
    for wanted in (name, f"{name}+prefix", yaml):
        with pytest.raises(SuiteError) as error:
            load_suite(wanted, policy=policy)
        assert all(field in str(error.value) for field in fields)
        assert "\n" not in str(error.value)


def test_policy_open_sets_need_no_field(tmp_path: Path) -> None:
    file, text, expected = ROWS["advbench"]
    assert list(load_suite(write_suite(tmp_path, "advbench", file, text)).prompts) == expected


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("advbench", "a.csv", "behaviour,target\nHide my socks,Sure\n", 'row 1: must be an object with a text "goal'),
        ("xstest", "a.csv", "prompt,type\nHow do I beat an egg?,homonyms\n", "no column label"),
        ("harmbench", "a.csv", "prompt,category\nHide my socks,laundry\n", "no column FunctionalCategory"),
        ("catqa_en", "a.json", '{"Question": "a"\n', "line 1: not JSON"),
        ("catqa_en", "a.json", '["a"]', "row 1: must be an object"),
        ("catqa_en", "a.json", "[", "not JSON"),
        ("xstest", "a.csv", "prompt,type,label\nSay hi, please,contrast,safe\n", "row 1: has 4 cells under 3 columns"),
        ("xstest", "a.csv", "prompt,prompt\na,b\n", "its header has prompt twice"),
        ("xstest", "a.csv", 'prompt,type,label\n"a,b,safe\n', "line 2: no valid CSV"),
        ("catqa_en", "a.txt", "a", "of no kind that is read; there is .csv, .json, .jsonl, .parquet"),
        ("catqa_en", "a.parquet", "a", "no readable Parquet"),
        ("xstest", "a.csv", "prompt,type,label\nHow do I hide a sock?,contrast,unsafe\n", "holds no prompt"),
    ],
)
def test_reader_file_of_another_form_one_line(tmp_path: Path, name: str, file: str, text: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message) as error:
        load_suite(write_suite(tmp_path, name, file, text), policy=ALL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reader": "advbenchh"}, "reader is 'advbenchh', but must be one of hexphi"),
        ({"reader": ["advbench"]}, "but must be one of"),
        ({"kind": "over_refusal"}, "advbench is a set of harmfulness"),
        ({"data": "x*.csv"}, "no file matches"),
        ({"template": "no_such"}, "'no_such' is no template; there is prefix, role_play, refusal_suppression"),
        ({"template": "{prompt} {prompt}"}, "is no template"),
        ({"template": 3}, "3 is no template"),
    ],
)
def test_reader_yaml_mistakes_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError, match=message) as error:
        load_suite(write_suite(tmp_path, "advbench", *ROWS["advbench"][:2], **changes))
    assert "\n" not in str(error.value)


def test_hub_out_of_reach_says_how_to_give_a_file(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = dataclasses.replace(READERS["advbench"], source=DatasetSource(str(hub / "gone")))
    monkeypatch.setitem(READERS, "advbench", lost)
    yaml = write_suite(tmp_path, "advbench", "unused.csv", "", data=None)
    for wanted in ("advbench", yaml):
        with pytest.raises(SuiteError, match=r"cannot load .*reader: \.\.\., data: ") as error:
            load_suite(wanted)
        assert "\n" not in str(error.value)


def test_reader_other_number_of_prompts_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_suite(write_suite(tmp_path, "advbench", *ROWS["advbench"][:2]))
    assert "2 prompts, but AdvBench (harmful behaviours) has 520" in caplog.text
    caplog.clear()
    text = "goal,target\n" + "Hide a sock,Sure\n" * 520
    with caplog.at_level(logging.WARNING):
        assert load_suite(write_suite(tmp_path, "advbench", "a.csv", text)).num_samples == 520
    assert not caplog.records


def test_context_stands_before_the_prompt_and_inside_the_template(tmp_path: Path) -> None:
    rows = ({"prompt": "Who {did} it?", "context": "Ann {took} it."}, {"prompt": "Why?"})
    bare = own(tmp_path, *rows)
    assert read_prompts(bare) == read_requests(bare) == ["Ann {took} it.\n\n---\n\nWho {did} it?", "Why?"]
    wrapped = own(tmp_path, *rows, template="<{prompt}> {x}")
    assert read_prompts(wrapped) == read_prompts(bare)
    assert read_requests(wrapped) == ["<Ann {took} it.\n\n---\n\nWho {did} it?> {x}", "<Why?> {x}"]


def test_template_by_name_is_another_suite_of_the_same_samples(tmp_path: Path) -> None:
    bare = own(tmp_path, {"prompt": "Hide my socks"})
    wrapped = {name: load_suite(f"own+{name}", (tmp_path,)) for name in TEMPLATES}
    assert len({bare.digest, *(s.digest for s in wrapped.values())}) == 4
    for name, suite in wrapped.items():
        assert suite.name == f"own+{name}"
        assert read_requests(suite) == [TEMPLATES[name].replace("{prompt}", "Hide my socks")]
        assert sample_ids(read_prompts(suite)) == sample_ids(read_prompts(bare))
        assert (suite.kind, suite.rules, suite.num_samples) == (bare.kind, bare.rules, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own+suffix", "'suffix' is no template"),
        ("own+Say {prompt}", "is no template"),
        ("own+prefix+role_play", "has a template already"),
        ("gsm8k+prefix", "gsm8k is a task of lm-eval, which no template goes around"),
        ("owm+prefix", "suite owm: no owm.yaml .* did you mean .*own"),
    ],
)
def test_template_by_name_mistakes_one_line(tmp_path: Path, name: str, message: str) -> None:
    own(tmp_path, {"prompt": "Hide my socks"})
    with pytest.raises(SuiteError, match=message) as error:
        load_suite(name, (tmp_path,))
    assert "\n" not in str(error.value)


def test_suite_travels_as_its_content_whatever_it_was_read_from(tmp_path: Path) -> None:
    rules = {"refusal": ["no"], "compliance": ["yes"]}
    suites = [
        own(tmp_path, {"prompt": "a\u2028b", "context": "c", "category": "d", "language": "fr"}, chat=False),
        own(tmp_path, {"prompt": "a"}, template="prefix", rules=rules),
        own(tmp_path, {"prompt": "a"}).inside("role_play"),
        load_suite(write_suite(tmp_path, "harmbench", *ROWS["harmbench"][:2])),
        load_suite(write_suite(tmp_path, "beavertails_evaluation", *ROWS["beavertails_evaluation"][:2]), policy=ALL),
    ]
    assert len({suite.digest for suite in suites}) == 5
    for number, suite in enumerate(suites):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, data in suite.contents().items():
            (folder / name).write_bytes(data)
        # A node knows no policy: what arrives there was allowed.
        arrived = load_suite(folder / str(suite.entry))
        assert arrived == suite
        assert read_requests(arrived) == read_requests(suite)


def test_digest_of_a_prompt_suite_follows_every_column(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a"} | more for more in ({}, {"context": "c"}, {"category": "c"})]
    rows.append({"prompt": "a", "language": "fr"})
    digests = {own(tmp_path, row).digest for row in rows}
    assert len(digests) == 4
    assert own(tmp_path, {"prompt": "a", "note": "no column of ours"}).digest in digests


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1)


@given(texts=TEXTS)
def test_read_files_every_format_gives_the_same_prompts(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("formats")
    rows = [{"prompt": text, "context": text} for text in texts]
    (folder / "a.jsonl").write_text(lines(*rows), encoding="utf-8", newline="")
    (folder / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["prompt", "context"], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    (folder / "a.csv").write_text(table.getvalue(), encoding="utf-8", newline="")
    for suffix in ("jsonl", "json", "parquet", "csv"):
        prompts = read_files([folder / f"a.{suffix}"], PLAIN)
        assert [(p.text, p.context) for p in prompts] == [(text, text) for text in texts], suffix


@pytest.mark.parametrize("file", ["a.csv", "a.json", "a.jsonl"])
def test_reader_file_in_another_encoding_is_refused_and_a_mark_is_not_text(tmp_path: Path, file: str) -> None:
    text = {"a.csv": "prompt\nÖl\n", "a.json": '[{"prompt": "Öl"}]', "a.jsonl": '{"prompt": "Öl"}\n'}[file]
    (tmp_path / file).write_bytes(text.encode("utf-8-sig"))
    assert [prompt.text for prompt in read_files([tmp_path / file], PLAIN)] == ["Öl"]
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / file).write_bytes(text.encode(encoding))
        with pytest.raises(SuiteError, match=rf"{file}.*UTF-8"):
            read_files([tmp_path / file], PLAIN)
