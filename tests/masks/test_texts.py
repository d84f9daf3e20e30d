from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fleet.core.errors import InputError, ManifestError
from fleet.masks.texts import TextSet, held_out, open_texts, parse_rows, split

PAIR = {"prompt": "p", "chosen": "no", "rejected": "yes"}
PROMPT = {"prompt": "1+1=", "response": "2"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lines(*rows: Any) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def prompts(*texts: str) -> list[dict[str, str]]:
    return [{"prompt": text, "response": "r"} for text in texts]


# -- rows ------------------------------------------------------------------------------------------------------------


def test_parse_rows_keeps_the_fields_it_needs_and_their_order() -> None:
    data = lines(PAIR | {"source": "x"}, "", "  ", PAIR | {"prompt": "q"})
    assert parse_rows("preferences", "f", data) == [PAIR, PAIR | {"prompt": "q"}]
    assert parse_rows("prompts", "f", lines(PROMPT | {"id": 3})) == [PROMPT]


def test_parse_rows_takes_any_line_end_and_any_script() -> None:
    rows = [PAIR | {"prompt": text} for text in ("здравствуй", "你好", "tab\tand\nbreak")]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert parse_rows("preferences", "f", text.encode()) == rows


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_parse_rows_character_that_only_unicode_takes_for_a_line_end_is_text(character: str) -> None:
    """JSON allows them in a string as they are, and other tools write them so."""
    row = PAIR | {"prompt": f"one{character}two"}
    assert parse_rows("preferences", "f", json.dumps(row, ensure_ascii=False).encode()) == [row]


@pytest.mark.parametrize("bad", ["{", "prompt,chosen", "{'prompt': 'p'}"])
def test_parse_rows_line_that_is_no_json_names_file_and_line(bad: str) -> None:
    with pytest.raises(ManifestError, match=r"^data\.jsonl: line 3: not JSON: ") as e:
        parse_rows("preferences", "data.jsonl", lines(PAIR, "", bad))
    assert "\n" not in str(e.value)


def without(row: dict[str, str], field: str) -> dict[str, str]:
    return {name: value for name, value in row.items() if name != field}


@pytest.mark.parametrize(
    "bad",
    [
        *(without(PAIR, field) for field in PAIR),
        *(PAIR | {field: ""} for field in PAIR),
        PAIR | {"chosen": 3},
        PAIR | {"chosen": None},
        PAIR | {"prompt": ["p"]},
        ["p", "no", "yes"],
        "3",
        "null",
    ],
)
def test_parse_rows_row_without_a_text_names_file_line_and_fields(bad: Any) -> None:
    message = r"^data\.jsonl: line 2: needs prompt, chosen, rejected, each a string that is not empty"
    with pytest.raises(ManifestError, match=message):
        parse_rows("preferences", "data.jsonl", lines(PAIR, bad))


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_parse_rows_prompts_need_a_response(field: str) -> None:
    with pytest.raises(ManifestError, match=r"^data\.jsonl: line 1: needs prompt, response, each"):
        parse_rows("prompts", "data.jsonl", lines(without(PROMPT, field)))


def test_parse_rows_preference_between_equals_refused() -> None:
    with pytest.raises(ManifestError, match=r"^data\.jsonl: line 2: chosen and rejected are the same"):
        parse_rows("preferences", "data.jsonl", lines(PAIR, PAIR | {"chosen": "yes"}))


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_parse_rows_of_no_rows_refused(data: bytes) -> None:
    with pytest.raises(ManifestError, match=r"^data\.jsonl: no rows"):
        parse_rows("preferences", "data.jsonl", data)


# -- files and datasets ----------------------------------------------------------------------------------------------


def test_open_texts_identity_is_of_the_content_not_of_the_path(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, row in zip(folders, (PAIR, PAIR, PAIR | {"prompt": "q"}), strict=True):
        folder.mkdir()
        (folder / f"{folder.name}.jsonl").write_bytes(lines(row))
    (one, data), (two, _), (other, _) = (open_texts("preferences", str(f / f"{f.name}.jsonl"), "x") for f in folders)
    assert data == lines(PAIR)
    assert one.identity == two.identity != other.identity
    assert one.key == two.key != other.key
    assert one.uri != two.uri
    assert not one.is_dataset and one.rows(data) == [PAIR]


def test_open_texts_key_is_a_digest_below_texts(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(lines(PAIR))
    found, _ = open_texts("preferences", str(tmp_path / "p.jsonl"), "x")
    assert found.identity.startswith("sha256:")
    assert found.key == f"texts/{found.identity[7:23]}.jsonl"
    assert TextSet("prompts", "elsewhere", "sha256:" + "ab" * 32).key == "texts/abababababababab.jsonl"


def test_open_texts_bad_row_names_the_field_and_the_file(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(lines(PAIR, {}))
    with pytest.raises(ManifestError, match=rf"^models: m: prompts: {tmp_path}/p\.jsonl: line 1: needs prompt, resp"):
        open_texts("prompts", str(tmp_path / "p.jsonl"), "models: m: prompts")


@pytest.mark.parametrize("name", ["none.jsonl", "none/p.jsonl"])
def test_open_texts_of_a_file_that_is_not_there_is_an_input_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="none") as e:
        open_texts("preferences", str(tmp_path / name), "x")
    assert "\n" not in str(e.value)


def test_open_texts_from_s3(s3_bucket: str) -> None:
    from fleet.store import open_store

    open_store(f"s3://{s3_bucket}/data").replace("p.jsonl", lines(PAIR))
    found, data = open_texts("preferences", f"s3://{s3_bucket}/data/p.jsonl", "x")
    assert data == lines(PAIR) and found.rows(data) == [PAIR]


def test_open_texts_pinned_dataset_is_not_read() -> None:
    uri = f"hf://datasets/org/na.me-1@{COMMIT}/test"
    found, data = open_texts("preferences", uri, "x")
    assert data is None and found.is_dataset and found.uri == uri


def test_open_texts_dataset_identity_follows_name_commit_and_split() -> None:
    uris = [
        f"hf://datasets/org/name@{COMMIT}/test",
        f"hf://datasets/org/name@{COMMIT}/train",
        f"hf://datasets/org/other@{COMMIT}/test",
        f"hf://datasets/org/name@{COMMIT[::-1]}/test",
    ]
    assert len({open_texts("preferences", uri, "x")[0].identity for uri in uris}) == 4


@pytest.mark.parametrize(
    "uri",
    [
        "hf://datasets/org/name/test",
        "hf://datasets/org/name@main/test",
        f"hf://datasets/org/name@{COMMIT}",
        f"hf://datasets/org/name@{COMMIT[:-1]}/test",
        f"hf://datasets/name@{COMMIT}/test",
        f"hf://datasets/org/name@{COMMIT}/test[:10]",
        f"hf://org/name@{COMMIT}",
    ],
)
def test_open_texts_dataset_that_is_not_pinned_refused(uri: str) -> None:
    with pytest.raises(ManifestError, match=r"^x: hf://.* a dataset is hf://datasets/org/name@<40 hexadecimal digits>"):
        open_texts("preferences", uri, "x")


def test_text_set_rows_of_a_dataset_come_from_the_pinned_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, str]]] = []

    def load(rows: list[dict[str, str]]) -> Callable[..., list[dict[str, str]]]:
        def load_dataset(name: str, **options: str) -> list[dict[str, str]]:
            asked.append((name, options))
            return rows

        return load_dataset

    uri = f"hf://datasets/org/name@{COMMIT}/test"
    found, _ = open_texts("preferences", uri, "x")
    monkeypatch.setattr("datasets.load_dataset", load([PAIR | {"more": "x"}]))
    assert found.rows(None) == [PAIR]
    assert asked == [("org/name", {"revision": COMMIT, "split": "test"})]
    monkeypatch.setattr("datasets.load_dataset", load([PAIR, PAIR | {"prompt": ""}]))
    with pytest.raises(ManifestError, match="/test: row 1: needs prompt"):
        found.rows(None)
    monkeypatch.setattr("datasets.load_dataset", load([]))
    with pytest.raises(ManifestError, match="/test: no rows"):
        found.rows(None)


# -- what is held out ------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([f"p{i}" for i in range(12)]), min_size=2, max_size=40), st.floats(0.01, 0.99))
def test_split_never_has_a_prompt_on_both_sides_nor_an_empty_side(texts: list[str], share: float) -> None:
    rows = prompts(*texts)
    if len(set(texts)) == 1:
        with pytest.raises(ManifestError, match="all rows have one prompt"):
            split(rows, share)
        return
    kept, out = split(rows, share)
    assert sorted(kept + out) == list(range(len(rows)))
    assert kept == sorted(kept) and out == sorted(out)
    assert kept and out
    assert not {texts[i] for i in kept} & {texts[i] for i in out}
    assert split(rows, share) == (kept, out)


@given(st.permutations(range(6)), st.floats(0.01, 0.99))
def test_split_goes_by_the_prompt_not_by_its_place(order: list[int], share: float) -> None:
    rows = prompts(*(f"p{i}" for i in range(6)))
    moved = [rows[i] for i in order]
    one, two = ({r[i]["prompt"] for i in split(r, share)[1]} for r in (rows, moved))
    assert one == two


def test_split_holds_out_about_its_share() -> None:
    rows = prompts(*(f"question {i}" for i in range(4000)))
    kept, out = split(rows, 0.1)
    # Four standard errors of a share of 4000 are 0.019.
    assert len(out) / 4000 == pytest.approx(0.1, abs=0.019)
    assert out == [i for i, row in enumerate(rows) if held_out(row, 0.1)]
    assert set(out) < set(split(rows, 0.2)[1])
    assert len(kept) + len(out) == 4000


def test_split_of_a_share_of_zero_trains_on_all() -> None:
    assert split(prompts("a", "b"), 0.0) == ([0, 1], [])
    assert split(prompts("a"), 0.0) == ([0], [])


def test_split_of_one_prompt_refused() -> None:
    for share in (0.1, 0.999999):
        with pytest.raises(ManifestError, match="all rows have one prompt, so none can be held out"):
            split(prompts("a", "a"), share)


def test_parse_rows_text_in_another_encoding_is_refused_with_its_line() -> None:
    row = json.dumps(PAIR | {"prompt": "Öl"}, ensure_ascii=False)
    with pytest.raises(ManifestError, match=r"^data\.jsonl: line 2: byte 0xd6 is no UTF-8.*save the file as UTF-8"):
        parse_rows("preferences", "data.jsonl", f"\n{row}".encode("latin-1"))
    assert parse_rows("preferences", "f", row.encode("utf-8-sig")) == [PAIR | {"prompt": "Öl"}]
