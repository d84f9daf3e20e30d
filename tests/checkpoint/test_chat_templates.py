"""Where folders keep a chat template, as transformers finds it; and which date it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fleet.checkpoint.chat_templates import check_asks, prompting, read_chat_template
from fleet.core.errors import CheckpointError
from fleet.store import open_folder
from tests.pico import make_tokenizer

LISTED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


def folder_with(folder: Path, field: Any = None, **files: str) -> Path:
    make_tokenizer(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({"chat_template": field} if field else {})))
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("field", "files", "text"),
    [
        ("F", {}, "F"),
        (LISTED, {}, "D"),
        ("F", {"chat_template_dot_jinja": "J"}, "J"),
        (None, {"chat_template_dot_jinja": "J", "additional_chat_templates__tool_use_dot_jinja": "T"}, "J"),
        (None, {"additional_chat_templates__default_dot_jinja": "A"}, "A"),
        (None, {}, None),
    ],
)
def test_chat_template_is_the_one_that_transformers_finds(
    tmp_path: Path, field: Any, files: dict[str, str], text: str | None
) -> None:
    folder = folder_with(tmp_path, field, **files)
    found = read_chat_template(open_folder(str(folder)))
    assert (found and found.text) == text
    if text is not None:
        assert AutoTokenizer.from_pretrained(folder).get_chat_template() == text


def test_chat_template_of_a_processor_is_found(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, chat_template_dot_json=json.dumps({"chat_template": "P"}))
    found = read_chat_template(open_folder(str(folder)))
    assert found is not None and (found.text, found.file) == ("P", "chat_template.json")


def test_chat_template_with_transformers_own_tags_is_jinja_and_a_broken_one_is_not(tmp_path: Path) -> None:
    tags = "{% for m in messages %}{% generation %}{{ m }}{%- endgeneration %}{% continue %}{% endfor %}"
    assert read_chat_template(open_folder(str(folder_with(tmp_path / "a", tags)))) is not None
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: line 1 of the chat template"):
        read_chat_template(open_folder(str(folder_with(tmp_path / "b", "{% if %}"))))


def test_prompting_writes_one_date_and_leaves_the_tokenizer_as_it_is(tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder_with(tmp_path, "F"))
    dated: Any = prompting(tokenizer, '{{ strftime_now("%d %b %Y %f") }}', "2026-11-25")
    turns = [{"role": "user", "content": "hi"}]
    texts = {dated.apply_chat_template(turns, tokenize=False) for _ in range(3)}
    assert texts == {"25 Nov 2026 000000"}
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "F"
    assert prompting(tokenizer, None, None) is tokenizer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("hello", "writes the same whatever a user says"),
        ("", "writes the same whatever a user says"),
        ("{{ raise_exception('only with a system turn') }}", "only with a system turn"),
        ("{{ nothing(messages) }}", "'nothing' is undefined"),
        ("{{ messages | nothing }}", "No filter named 'nothing'"),
        ("{% include 'x' %}", "takes no conversation"),
    ],
)
def test_chat_template_that_asks_nothing_is_refused(template: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        check_asks("m", template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d') }}{{ bos_token + messages[0].content }}",
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
        "{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m['content'] | trim }}{% endgeneration %}{% break %}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{% if tools %}{{ tools | tojson }}{% endif %}",
    ],
)
def test_chat_template_that_asks_what_is_said_is_taken(template: str) -> None:
    check_asks("m", template)
