import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from farrier.targets.errors import CheckpointError
from farrier.targets.safetensors_file import SafetensorsWriter, read_header

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5, dtype=np.int8),
    "c": np.full((2, 2), 7, np.float16),
}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    header, content = read_header(path), path.read_bytes()
    assert header.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        info = header[name]
        assert (info.path, info.shape) == (path, array.shape)
        np.testing.assert_array_equal(np.frombuffer(content[info.start : info.stop], array.dtype), array.ravel())


def test_the_library_reads_what_we_write_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    shapes = {"b": ("I8", (5,)), "a": ("F32", (3, 4)), "c": ("F16", (2, 2))}
    with SafetensorsWriter(path, shapes) as writer:
        writer.write("c", 0, TENSORS["c"])
        writer.write("a", 32, TENSORS["a"][2:])
        writer.write("b", 0, TENSORS["b"])
        writer.write("a", 0, TENSORS["a"][:2])
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(read[name], array)
    assert all(info.start % info.itemsize == 0 for info in read_header(path).values())


def test_the_writer_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"precious")
    with (
        pytest.raises(FileExistsError),
        SafetensorsWriter(tmp_path / "x.safetensors", {"a": ("F32", (1,))}),
    ):
        pass
    assert (tmp_path / "x.safetensors").read_bytes() == b"precious"


def file_of(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "size", "problem"),
    [
        ({"a": entry(0, 16)}, 12, "truncated"),
        ({"a": entry(0, 16)}, 20, "4 bytes more"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "'b' leaves a hole"),
        ({"a": entry(0, 8, [3])}, 8, "'a' makes no sense"),
        ({"a": entry(0, 8, [-2])}, 8, "'a' makes no sense"),
        ({"a": entry(8, 0, [-2])}, 8, "'a' makes no sense"),
        ({"a": entry(0, 8, dtype="F31")}, 8, "'a' makes no sense"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "'a' makes no sense"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4, "'a' makes no sense"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4, "'a' makes no sense"),
        ({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, 4, "'a' makes no sense"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4, "'a' makes no sense"),
        ({"a": 3}, 4, "'a' makes no sense"),
        ([], 0, "not a JSON object"),
        (b'{"a": ', 0, "not valid JSON"),
        (b"\xff\xfe", 0, "not valid JSON"),
        (b"[" * 100_000, 0, "not valid JSON"),
        (b'{"a": 1, "a": 1}', 0, "not valid JSON"),
        (b"9" * 5000, 0, "not valid JSON"),
    ],
)
def test_corrupt_headers(tmp_path: Path, header: Any, size: int, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        read_header(file_of(tmp_path / "x.safetensors", header, bytes(size)))


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 8, (100).to_bytes(8, "little") + b"{}"])
def test_files_that_end_before_their_header_does(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(tmp_path / "x.safetensors")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "x.safetensors")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_ends_in_anything_but_a_checkpoint_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        header = read_header(path)
    except CheckpointError:
        return
    assert sum(info.stop - info.start for info in header.values()) <= path.stat().st_size


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "I8", "BF16", "?", None]),
                "shape": st.lists(st.integers(-1, 3) | st.none() | st.text(max_size=1), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 40) | st.floats() | st.none(), max_size=3),
            }
        ),
        max_size=3,
    ),
    st.integers(0, 40),
)
def test_no_header_ends_in_anything_but_a_checkpoint_error(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    try:
        tensors = read_header(file_of(tmp_path / "x.safetensors", header, bytes(size)))
    except CheckpointError:
        return
    assert tensors.keys() == header.keys() - {"__metadata__"}
