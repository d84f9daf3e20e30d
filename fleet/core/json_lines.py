"""Text files and JSON lines as people bring them: the one reader of both.

Text is UTF-8, with or without a byte order mark, and nothing in it is replaced: a byte that is no UTF-8 is refused.
A file of JSON lines holds one value a line (https://jsonlines.org); lines end with LF or CRLF, and empty ones are
skipped. U+2028, U+2029 and U+0085 end no line: JSON allows them inside a string.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import cast

from fleet.core.errors import InputError
from fleet.core.identity import Json

_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)

_KINDS = {
    b"\x1f\x8b": "packed with gzip",
    b"PK\x03\x04": "a ZIP",
    b"PAR1": "Parquet",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
}
"""First bytes of a file -> what it is."""


def decode_text(data: bytes, where: str, error: type[InputError] = InputError) -> str:
    """The text of a file, without its byte order mark.

    Args:
        where: What messages call the file.
        error: What is raised.

    Raises:
        InputError: It is no UTF-8; the message has the line.
    """
    if data.startswith(_WIDE_MARKS):
        raise error(f"{where}: is UTF-16 or UTF-32; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise error(
            f"{where}: line {line}: byte 0x{data[e.start]:02x} is no UTF-8 (latin-1 or Windows' encoding?); save the "
            "file as UTF-8"
        ) from e
    if 3 * text.count("\0") > len(text):  # of Latin script in UTF-16, every second byte is zero
        raise error(f"{where}: is full of zero bytes, like UTF-16 without its mark; save it as UTF-8")
    return text


def json_lines(data: bytes, where: str, error: type[InputError] = InputError) -> Iterator[tuple[int, Json]]:
    """Line number, from 1, and value of every line that is not empty.

    `NaN` and `Infinity`, which Python's and pandas' writers put where a number is missing, are taken as numbers: a text
    is never one.

    Args:
        where: What messages call the file.
        error: What is raised.

    Raises:
        InputError: It is no UTF-8, or a line is not one JSON value, has a key twice in one object, or half of a
            character; the message has the line.
    """
    _check_text_file(data, where, error)
    text = decode_text(data, where, error)
    if text.lstrip().startswith("["):
        raise error(
            f"{where}: holds a JSON array, and not an object on each line; `jq -c '.[]' FILE > NEW.jsonl` writes these"
        )
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, json_value(line, f"{where}: line {number}", error)


def _check_text_file(data: bytes, where: str, error: type[InputError]) -> None:
    """Refuse what is no text by its first bytes, so that nobody is told to save it in another encoding."""
    for start, kind in _KINDS.items():
        if data.startswith(start):
            raise error(f"{where}: is {kind}, and not JSON lines; give the rows as text, one JSON object a line")


def json_value(text: str, where: str, error: type[InputError] = InputError) -> Json:
    """The value of a JSON text.

    Raises:
        InputError: It is not one JSON value, or has a key twice in one object, or half of a character.
    """
    try:
        value = cast(Json, json.loads(text, object_pairs_hook=unique_keys))
        if "\\u" in text:
            refuse_halves(value)
    except json.JSONDecodeError as e:
        place = f"line {e.lineno}, column {e.colno}" if "\n" in text.strip() else f"column {e.colno}"
        raise error(f"{where}: not JSON: {e.msg} at {place}") from e
    except (ValueError, RecursionError) as e:
        raise error(f"{where}: not JSON: {e}") from e
    return value


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON, as `json.loads` gives its pairs.

    Raises:
        ValueError: A key is there twice, of which Python would silently keep the last.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice; leave one")
    return found


def refuse_halves(value: object) -> None:
    """Refuse an escaped half of a character beyond U+FFFF: it is no text, and can't be written or hashed.

    Raises:
        ValueError: It has the half.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        half = ascii(e.object[e.start])[1:-1]
        raise ValueError(f"{half} is half of a character, of which the other half is missing; remove it") from e
