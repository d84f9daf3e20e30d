"""Exchanges whose truth is known: what a judge is calibrated on. Light."""

from __future__ import annotations

from pydantic import ValidationError

from fleet.core.errors import InputError
from fleet.core.frozen import Frozen
from fleet.core.json_lines import json_lines


class LabelledRow(Frozen):
    """One exchange, labelled by people or by a judge they trust."""

    prompt: str
    completion: str
    harmful: bool


def read_labelled(data: bytes, where: str) -> list[LabelledRow]:
    """The rows of a calibration file, JSON lines.

    Raises:
        InputError: It is no UTF-8, a line is no such row, or there is none; `where` is what the message calls the file.
    """
    rows: list[LabelledRow] = []
    for number, line in json_lines(data, where):
        try:
            rows.append(LabelledRow.model_validate(line))
        except ValidationError as error:
            problem = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise InputError(f"{where}: line {number}: {problem}") from error
    if not rows:
        raise InputError(f"{where}: holds no row of prompt, completion and harmful")
    return rows
