"""The chat template that lies beside a model's weights, from its files alone."""

from __future__ import annotations

import json

from fleet.core.identity import Json
from fleet.store import Folder


def read_chat_template(folder: Folder) -> str | None:
    """The template as its file has it, with the names of several as JSON; None if there is none.

    A tokenizer's configuration that can't be read has none: whoever loads the tokenizer says what is wrong with it.
    """
    files = folder.files()
    if "chat_template.jinja" in files:
        return folder.read("chat_template.jinja").decode(errors="replace").strip()
    for file in ("tokenizer_config.json", "chat_template.json"):
        if file not in files:
            continue
        try:
            found: Json = json.loads(folder.read(file).decode("utf-8-sig"))
        except ValueError:
            continue
        template = found.get("chat_template") if isinstance(found, dict) else None
        if template:
            return template.strip() if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return None
