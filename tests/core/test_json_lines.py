from __future__ import annotations

import pytest

from fleet.core.errors import InputError, SuiteError
from fleet.core.json_lines import decode_text, json_lines

ROW = '{"q": "é\u2028ü"}'


@pytest.mark.parametrize(
    "data",
    [
        ROW.encode(),
        ROW.encode("utf-8-sig"),
        f"\n  \n{ROW}\n\n".encode(),
        f"\r\n{ROW}\r\n\r\n".encode("utf-8-sig"),
    ],
)
def test_json_lines_mark_blank_lines_and_any_line_end_give_the_row(data: bytes) -> None:
    assert [row for _, row in json_lines(data, "f")] == [{"q": "é\u2028ü"}]


def test_json_lines_numbers_count_every_line_of_the_file() -> None:
    assert list(json_lines(b"1\n\n2\r\n3", "f")) == [(1, 1), (3, 2), (4, 3)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1\n" + ROW.encode("latin-1", "ignore"), r"^f: line 2: byte 0xe9 is no UTF-8.*save the file as UTF-8$"),
        (ROW.encode("utf-16"), r"^f: is UTF-16 or UTF-32; save it as UTF-8$"),
        (ROW.encode("utf-32"), r"^f: is UTF-16 or UTF-32; save it as UTF-8$"),
        ("1\n2".encode("utf-16-le"), r"^f: is full of zero bytes.*save it as UTF-8$"),
        (b"1\n\n{", r"^f: line 3: not JSON: .* column 2$"),
        (b'1\n{"a": 1} {"a": 2}', r"^f: line 2: not JSON"),
        (b'{"a": {"b": 1, "b": 2}}', r"^f: line 1: .*'b' is there twice"),
        (rb'{"a": "\ud83d"}', r"^f: line 1: .*\\ud83d is half of a character"),
        (b"1\n" + b"[" * 100_000, "^f: line 2: not JSON"),
        (b'\n[{"a": 1},\n {"a": 2}]', r"^f: holds a JSON array.*jq -c"),
        (b"\x1f\x8b\x08\x00", "^f: is packed with gzip"),
        (b"PAR1\x15\x04", "^f: is Parquet"),
    ],
)
def test_json_lines_what_is_no_row_is_one_line_with_its_place(data: bytes, message: str) -> None:
    with pytest.raises(SuiteError, match=message) as e:
        list(json_lines(data, "f", SuiteError))
    assert "\n" not in str(e.value)


def test_json_lines_whole_escaped_characters_and_missing_numbers_are_taken() -> None:
    (_, row), (_, other) = json_lines(rb'{"a": "\ud83d\ude00"}' + b'\n{"a": "b", "n": NaN}', "f")
    assert row == {"a": "\U0001f600"}
    assert isinstance(other, dict) and other["a"] == "b"


def test_decode_text_by_default_raises_the_users_error() -> None:
    with pytest.raises(InputError):
        decode_text(b"\xff", "f")
