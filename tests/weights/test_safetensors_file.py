"""The safetensors reader against the library, single and sharded, and on broken files."""

from __future__ import annotations

import json
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from pdx.errors import ModelFileError, UnsupportedModelError
from pdx.weights.safetensors_file import SafetensorsFile, has_weights, open_safetensors
from tests.support import tiny_model, weight_files


@pytest.fixture
def directory(tmp_path):
    return tiny_model.make(tmp_path / "tiny")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_values_of_every_floating_type(tmp_path, dtype):
    """An odd-sized tensor in front puts the next one at an odd place."""
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(dtype)
    save_file({"a": np.ones(3, np.uint8), "b": x}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.shape("b") == (5, 3)
    np.testing.assert_array_equal(file.read("b", np.float32), x.astype(np.float32))
    np.testing.assert_array_equal(file.read("b", ml_dtypes.bfloat16), x.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(file.read("b", np.float32, np.array([4, 1])), x.astype(np.float32)[[4, 1]])
    with pytest.raises(UnsupportedModelError, match="tensor a has type U8, expected one of F64, F32, F16, BF16"):
        file.read("a", np.float32)


def test_shards_are_the_single_file(directory):
    whole = weight_files.tensors(directory)
    single = open_safetensors(directory)
    assert sorted(single.names()) == sorted(whole)
    weight_files.shard(directory, 3)
    sharded = open_safetensors(directory)
    assert sorted(sharded.names()) == sorted(whole)
    for name, x in whole.items():
        np.testing.assert_array_equal(sharded.read(name, np.float32), x)
        assert sharded.shape(name) == x.shape
    assert len({sharded.path_of(name) for name in whole}) == 3


def test_a_missing_shard_and_a_tensor_in_no_shard_are_named(directory):
    weight_files.shard(directory)
    second = directory / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(ModelFileError, match=r"model-00002-of-00002\.safetensors: is missing; .* 2 shards and 1 of"):
        open_safetensors(directory)
    second.write_bytes(content)
    index = directory / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": where | {"extra": second.name}}))
    with pytest.raises(ModelFileError, match=r"00002-of-00002\.safetensors: tensor extra is missing"):
        open_safetensors(directory)
    index.write_text(json.dumps({"weight_map": where | {"extra": "../outside.safetensors"}}))
    with pytest.raises(ModelFileError, match="outside its own directory"):
        open_safetensors(directory)
    index.write_text("[]")
    with pytest.raises(ModelFileError, match="not a JSON object with a weight_map"):
        open_safetensors(directory)
    index.write_text('{"weight_map": {"extra": 5}}')
    with pytest.raises(ModelFileError, match="does not map tensors to files"):
        open_safetensors(directory)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path, cut = tmp_path / "x.safetensors", tmp_path / "cut.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match=r"cut\.safetensors"):
            SafetensorsFile(cut)
    with pytest.raises(ModelFileError, match=r"tensor b ends at byte 32 .*31"):
        SafetensorsFile(cut)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{", "its header is not a JSON object"),
        (b"[]", "its header is not a JSON object"),
        (b'{"a": 3}', "tensor a has the header entry 3"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "takes bytes 0 to 4: corrupted"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "takes bytes -4 to 0: corrupted"),
        (b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}', "shape .* takes bytes 0 to 4"),
        (b'{"a": {"dtype": "I4", "shape": [2], "data_offsets": [4, 0]}}', "takes bytes 4 to 0"),
        (b'{"a": {"dtype": [1], "shape": [1], "data_offsets": [0, 4]}}', "tensor a has the header entry"),
        (b'{"a": {"dtype": "F32", "shape": [1180591620717411303424], "data_offsets": [0, 4]}}', "tensor a of type F32"),
        (b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}', "tensor a of type F32"),
        (b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}', "tensor a has the header entry"),
        (b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "tensor a has the header entry"),
        (b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}', "tensor a has the header entry"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "tensor a has the header entry"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}', "tensor a has the header entry"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}', "tensor a has the header entry"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}', "tensor a has the header entry"),
        (b"[" * 100_000, "its header is not a JSON object"),
        (
            b'{"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]},'
            b' "b": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}}',
            "tensor b starts at byte 2 of the data, within tensor a, bytes 0 to 4: corrupted",
        ),
    ],
)
def test_a_wrong_header_is_named(tmp_path, header, said):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(ModelFileError, match=rf"x\.safetensors: .*{said}"):
        SafetensorsFile(path)


def test_tensors_of_nothing_overlap_nothing(tmp_path):
    save_file({"a": np.ones(3, np.float32), "b": np.ones((0, 4), np.float32)}, tmp_path / "x.safetensors")
    assert SafetensorsFile(tmp_path / "x.safetensors").read("b", np.float32).shape == (0, 4)


def test_random_damage_to_the_header_raises_nothing_but_a_clear_error(directory, tmp_path):
    """Bytes changed, among them by those that JSON is made of, and files cut short; one digit more may be fine."""
    whole, rng = (directory / "model.safetensors").read_bytes(), np.random.default_rng(3)
    (length,) = struct.unpack("<Q", whole[:8])
    path, refused = tmp_path / "damaged.safetensors", 0
    for i in range(600):
        data = bytearray(whole)
        for at in rng.integers(0 if i % 4 == 0 else 8, 8 + length, 1 + i % 3):
            data[at] = rng.integers(256) if i % 2 else rng.choice(list(b'0123456789[]{},":-e. '))
        path.write_bytes(data[: rng.integers(len(data))] if i % 5 == 0 else data)
        refused += weight_files.is_refused(SafetensorsFile, path)
    assert 300 < refused < 600


def test_a_value_of_the_header_changed_at_random_raises_nothing_but_a_clear_error(directory, tmp_path):
    """JSON as before, another value: in the place of a field, or of a number within it."""
    whole, rng = (directory / "model.safetensors").read_bytes(), np.random.default_rng(4)
    (length,) = struct.unpack("<Q", whole[:8])
    path = tmp_path / "damaged.safetensors"
    odd = [None, True, -1, 1.0, 1.5, float("inf"), float("nan"), 2**70, "", "32", [], [1], [[1]], {}, {"a": 1}]
    for _ in range(300):
        header = json.loads(whole[8 : 8 + length])
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        field, value = rng.choice(["dtype", "shape", "data_offsets"]), odd[rng.integers(len(odd))]
        if field != "dtype" and rng.integers(2):
            entry[field][rng.integers(len(entry[field]))] = value
        else:
            entry[field] = value
        content = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(content)) + content + whole[8 + length :])
        assert weight_files.is_refused(SafetensorsFile, path)


def test_pickles_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert not has_weights(tmp_path)
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin.*safetensors"):
        open_safetensors(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_which_file_is_meant(tmp_path):
    with pytest.raises(ModelFileError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        open_safetensors(tmp_path)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "other.safetensors")
    save_file({"b": np.ones(2, np.float32)}, tmp_path / "consolidated.safetensors")
    assert open_safetensors(tmp_path).names() == ["a"]
    save_file({"c": np.ones(2, np.float32)}, tmp_path / "more.safetensors")
    with pytest.raises(ModelFileError, match="2 safetensors files and no model"):
        open_safetensors(tmp_path)
    save_file({"d": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    assert open_safetensors(tmp_path).names() == ["d"]
