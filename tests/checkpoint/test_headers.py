from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fleet.checkpoint.headers import plan_shards, read_headers, read_json, shard_name
from fleet.checkpoint.tensors import TORCH_DTYPES, TensorLayout, read_tensor, write_tensors
from fleet.core.errors import CheckpointError
from fleet.store import open_folder, open_store


def write_raw(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(raw) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", claimed) + raw + data)


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_headers_of_safetensors_file_equal_the_library(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "a": torch.ones(4), "empty": torch.ones(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    folder = open_folder(str(tmp_path))
    infos = read_headers(folder, "model")
    assert {n: i.shape for n, i in infos.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(folder, infos[name]), tensor)


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"t": entry([2], 0, 8)}, b"1234", None, "truncated"),
        ({"t": entry([2], 0, 8)}, b"12345678", 10**12, "claims"),
        (b"not json", b"", None, "not valid JSON"),
        ([1], b"", None, "not a JSON object"),
        ({"t": entry([3], 0, 8)}, b"12345678", None, "needs 12 bytes"),
        ({"t": entry([2], 0, 8, "Q4")}, b"12345678", None, "dtype Q4"),
        ({"t": {"shape": [2]}}, b"", None, "malformed header entry"),
        ({"t": entry([-1], 0, -4)}, b"", None, "malformed shape"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12, None, "overlaps or leaves a gap"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"0" * 12, None, "overlaps or leaves a gap"),
    ],
)
def test_header_damaged_or_lying_refused(
    tmp_path: Path, header: Any, data: bytes, length: int | None, message: str
) -> None:
    write_raw(tmp_path, header, data, length)
    with pytest.raises(CheckpointError, match=message):
        read_headers(open_folder(str(tmp_path)), "model")


def test_headers_pickle_only_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        read_headers(open_folder(str(tmp_path)), "model")


def test_headers_index_that_disagrees_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"disagrees with the files \(missing or elsewhere: b\)"):
        read_headers(open_folder(str(tmp_path)), "model")


def test_written_tensors_read_back_by_the_library(tmp_path: Path) -> None:
    values = [torch.randn(3, 2), torch.randn(5)]
    layout = [TensorLayout("z", "F32", (3, 2)), TensorLayout("a", "BF16", (5,))]
    written = write_tensors(open_store(str(tmp_path)), "m/model.safetensors", layout, ([value] for value in values))
    path = tmp_path / "m" / "model.safetensors"
    loaded = load_file(path)
    assert torch.equal(loaded["z"], values[0])
    assert torch.equal(loaded["a"], values[1].bfloat16())
    assert written.num_bytes == path.stat().st_size


def test_written_tensors_piece_by_piece_are_the_same_bytes(tmp_path: Path) -> None:
    value, layout, store = torch.randn(7, 3), [TensorLayout("a", "BF16", (7, 3))], open_store(str(tmp_path))
    written = {write_tensors(store, f"{n}.safetensors", layout, [value.split(n)]).sha256 for n in (1, 2, 7)}
    assert len(written) == 1


def test_written_tensors_of_more_than_was_laid_out_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"a has 16 bytes, laid out as \(3,\)"):
        write_tensors(open_store(str(tmp_path)), "m/x.safetensors", [TensorLayout("a", "F32", (3,))], [[torch.ones(4)]])
    assert open_store(str(tmp_path)).list("m") == {}


def test_written_tensors_not_finite_leave_nothing(tmp_path: Path) -> None:
    layout = [TensorLayout("a", "F16", (1,))]
    with pytest.raises(CheckpointError, match="tensor a came out with NaN or Inf in F16"):
        write_tensors(open_store(str(tmp_path)), "m/x.safetensors", layout, [[torch.tensor([1e6])]])
    assert open_store(str(tmp_path)).list("m") == {}


@pytest.mark.parametrize(("name", "dtype"), TORCH_DTYPES.items())
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_written_tensors_tell_numbers_from_nan_and_inf(
    tmp_path: Path, name: str, dtype: torch.dtype, bad: float
) -> None:
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, -0.0, 0.5], dtype=dtype)
    store, layout = open_store(str(tmp_path)), [TensorLayout("a", name, (6,))]
    write_tensors(store, "good.safetensors", layout, [[values]])
    assert torch.equal(load_file(tmp_path / "good.safetensors")["a"], values)
    for at in (0, 3, 5):
        wrong = values.clone()
        wrong[at] = bad
        with pytest.raises(CheckpointError, match="NaN or Inf"):
            write_tensors(store, "bad.safetensors", layout, [[wrong]])


def test_shards_planned_from_headers_hold_every_tensor_once(tmp_path: Path) -> None:
    save_file({f"t{i}": torch.ones(10 * (i + 1)) for i in range(5)}, tmp_path / "model.safetensors")
    infos = read_headers(open_folder(str(tmp_path)), "model")
    shards = plan_shards(infos.values(), 130)
    assert [name for shard in shards for name in shard] == sorted(infos)
    assert shards == [["t0", "t1"], ["t2"], ["t3"], ["t4"]]
    assert shard_name(1, 4) == "model-00002-of-00004.safetensors"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "not a JSON object"),
        ({}, "weight_map is None, not an object"),
        ({"weight_map": []}, r"weight_map is \[\], not an object"),
        ({"weight_map": 0}, "weight_map is 0, not an object"),
        ({"weight_map": {}}, "weight_map is {}, not an object"),
        ({"weight_map": {"a": 1}}, "weight_map names no file for a"),
        ({"weight_map": {"a": "./model.safetensors"}}, "by a path, which vLLM doesn't find"),
        ({"weight_map": {"a": "../x.safetensors"}}, "by a path"),
        ({"weight_map": {"a": "gone.safetensors"}}, "names gone.safetensors, which is not there"),
        ({"weight_map": {"c": "other.safetensors"}}, "doesn't name model.safetensors, which is there too"),
        ({"weight_map": {"a": "model.safetensors", "c": "model.safetensors"}}, "missing or elsewhere: c"),
        ("[" * 100_000, "not JSON: "),
        (b"\xff\xfe", "is UTF-16"),
    ],
)
def test_headers_of_a_folder_with_a_bad_index_refused_in_one_line(tmp_path: Path, index: Any, message: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"c": torch.ones(1)}, tmp_path / "other.safetensors")
    data = index if isinstance(index, str | bytes) else json.dumps(index)
    (tmp_path / "model.safetensors.index.json").write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(CheckpointError, match=message) as e:
        read_headers(open_folder(str(tmp_path)), "model")
    assert "\n" not in str(e.value)


def test_headers_of_an_index_with_a_wrong_total_are_read(tmp_path: Path) -> None:
    """No loader reads `total_size`, and editors of checkpoints leave it as it was."""
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    index = {"metadata": {"total_size": -1}, "weight_map": {"a": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(read_headers(open_folder(str(tmp_path)), "model")) == {"a"}


@pytest.mark.parametrize("shape", [[10**30], [1] * 65, [True, None]])
def test_header_with_a_shape_of_no_tensor_refused(tmp_path: Path, shape: list[Any]) -> None:
    write_raw(tmp_path, {"t": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}, b"1234")
    with pytest.raises(CheckpointError, match="malformed shape"):
        read_headers(open_folder(str(tmp_path)), "model")


def test_shard_of_a_numbered_set_that_is_missing_is_named_without_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    folder = open_folder(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is not there"):
        read_headers(folder, "model")
    save_file({"b": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert set(read_headers(folder, "model")) == {"a", "b"}


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_pointer_of_git_lfs_is_called_so(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 26\n")
    folder = open_folder(str(tmp_path))
    with pytest.raises(CheckpointError, match=f"{file}: is Git LFS's pointer.*git lfs pull"):
        read_json(folder, file) if file == "config.json" else read_headers(folder, "model")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        ("{}".encode("utf-16"), "is UTF-16"),
        (b'{"a": "\xe9"}', "is no UTF-8"),
        (b'{"r": 8, "r": 4}', "'r' is there twice"),
        (b'{"a": "\\ud800"}', "half of a character"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_config_that_is_no_json_in_utf_8_refused_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}") as e:
        read_json(open_folder(str(tmp_path)), "config.json")
    assert "\n" not in str(e.value)
