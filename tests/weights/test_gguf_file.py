"""The GGUF reader against the `gguf` library, and on files that are broken in every way there is."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest

from pallas_kernels.quant_array import dequantize
from pdx.errors import ModelFileError, UnsupportedModelError
from pdx.weights.gguf_file import GgufFile
from pdx.weights.resolve import resolve
from tests.support import weight_files

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32"]
K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ2_XS", "TQ1_0", "MXFP4"]


def write(path, tensors: dict, fields=lambda writer: None, types=None):
    writer = gguf.GGUFWriter(path, "llama")
    fields(writer)
    for name, value in tensors.items():
        writer.add_tensor(name, value, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small(tmp_path):
    return write(
        tmp_path / "small.gguf", {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(7, np.float16)}
    )


def patch(path, at: int, content: bytes):
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)


def test_metadata_of_every_type(tmp_path):
    def fields(w):
        w.add_uint8("u8", 200)
        w.add_int8("i8", -5)
        w.add_uint16("u16", 60000)
        w.add_int16("i16", -30000)
        w.add_uint32("u32", 4_000_000_000)
        w.add_int32("i32", -7)
        w.add_uint64("u64", 1 << 60)
        w.add_int64("i64", -(1 << 60))
        w.add_float32("f32", 0.5)
        w.add_float64("f64", 0.1)
        w.add_bool("yes", True)
        w.add_string("text", "héllo")
        w.add_array("words", ["a", "", "日本"])
        w.add_array("numbers", [1, 2, 3])
        w.add_array("scores", [0.5, -1.5])
        w.add_array("flags", [True, False])
        w.add_array("nested", [[1, 2], [3, 4]])

    got = GgufFile(write(tmp_path / "m.gguf", {"x": np.ones(4, np.float32)}, fields)).metadata
    got = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in got.items()}
    assert got.pop("general.architecture") == "llama"
    assert [x.tolist() for x in got.pop("nested")] == [[1, 2], [3, 4]]
    assert got == {
        "u8": 200,
        "i8": -5,
        "u16": 60000,
        "i16": -30000,
        "u32": 4_000_000_000,
        "i32": -7,
        "u64": 1 << 60,
        "i64": -(1 << 60),
        "f32": 0.5,
        "f64": 0.1,
        "yes": True,
        "text": "héllo",
        "words": ["a", "", "日本"],
        "numbers": [1, 2, 3],
        "scores": [0.5, -1.5],
        "flags": [True, False],
    }
    assert type(got["yes"]) is bool
    assert type(got["u32"]) is int


@pytest.mark.parametrize("name", TYPES)
def test_values_of_every_type_that_can_be_written(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    x = np.random.default_rng(0).standard_normal((3, 5000 // 32 * 32)).astype(np.float32)
    packed = gguf.quants.quantize(x, kind)
    file = GgufFile(write(tmp_path / "q.gguf", {"x": packed}, types={"x": kind}))
    assert (file.names(), file.shape("x"), file.dtype("x")) == (["x"], x.shape, name)
    expected = gguf.quants.dequantize(packed, kind)
    np.testing.assert_array_equal(file.read("x", np.float32), expected)
    np.testing.assert_array_equal(file.read("x", np.float32, np.array([2, 0])), expected[[2, 0]])
    assert np.abs(expected - x).max() < 0.5  # the comparison is not of zeros
    import ml_dtypes

    np.testing.assert_array_equal(file.read("x", ml_dtypes.bfloat16), expected.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("name", K_QUANTS)
def test_values_of_types_that_can_only_be_read(tmp_path, name):
    """Random blocks; the chunks in which they are read must not show."""
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    packed = np.random.default_rng(1).integers(0, 256, (1100, 256 // block * size), np.uint8)
    file = GgufFile(write(tmp_path / "q.gguf", {"x": packed}, types={"x": kind}))
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(packed, kind)
    np.testing.assert_array_equal(file.read("x", np.float32), expected)


def test_data_are_aligned_for_the_device(small):
    assert GgufFile(small).read("a", np.float32).ctypes.data % 64 == 0


def test_a_file_cut_anywhere_is_refused(tmp_path, small):
    """At every byte of the head, and inside the data."""
    whole = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    last = len(whole) - 32 + 13  # behind the last value there is only padding
    for length in range(last):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match=r"cut\.gguf"):
            GgufFile(cut)
    cut.write_bytes(whole[:-32])
    with pytest.raises(ModelFileError, match=r"tensor b ends at byte \d+,.* \d+"):
        GgufFile(cut)


def test_random_damage_to_the_head_raises_nothing_but_a_clear_error(tmp_path, small):
    whole, rng = small.read_bytes(), np.random.default_rng(2)
    path = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(0, 200, 3):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        refused += weight_files.is_refused(GgufFile, path)
    assert refused > 200


@pytest.mark.parametrize(
    ("at", "content", "said"),
    [
        (0, b"PK\x03\x04", "expected b'GGUF': not a GGUF file"),
        (4, struct.pack("<I", 1), "GGUF version 1, expected 2 or 3"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 40), "announces 1099511627776 tensors"),
    ],
)
def test_a_wrong_header_is_named(small, at, content, said):
    patch(small, at, content)
    with pytest.raises(ModelFileError, match=said):
        GgufFile(small)


def test_a_wrong_tensor_list_is_named(small):
    info = small.read_bytes().index(struct.pack("<Q", 1) + b"a") + 9  # rank, two sizes, type, offset of tensor a
    whole = small.read_bytes()
    for at, content, said in [
        (info, struct.pack("<I", 9), "tensor a has 9 dimensions"),
        (info + 20, struct.pack("<I", 999), "tensor a has type 999"),
        (info + 20, struct.pack("<I", 2), "tensor a has shape .*multiple of 32 values for type Q4_0"),
        (info + 24, struct.pack("<Q", 5), "tensor a starts at offset 5, expected a multiple of 32"),
        (info + 4, struct.pack("<Q", 1 << 40), "tensor a ends at byte"),
        (info + 4, struct.pack("<Q", 0), r"tensor a has shape \[3, 0\]"),
    ]:
        small.write_bytes(whole)
        patch(small, at, content)
        with pytest.raises(ModelFileError, match=said):
            GgufFile(small)
    small.write_bytes(whole.replace(struct.pack("<Q", 1) + b"b", struct.pack("<Q", 1) + b"a"))
    with pytest.raises(ModelFileError, match="tensor a is listed twice"):
        GgufFile(small)


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = write(
        tmp_path / "t.gguf",
        {"x": np.ones(4, np.float32)},
        lambda w: (w.add_string("name", "QQQQ"), w.add_array("words", ["fine", "WWWW"])),
    )
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"QQQQ", b"\xff\xfe\xfd\xfc"))
    with pytest.raises(ModelFileError, match="metadata field 'name' holds text that is not UTF-8"):
        GgufFile(path)
    path.write_bytes(whole.replace(b"WWWW", b"\xff\xfe\xfd\xfc"))
    with pytest.raises(ModelFileError, match="metadata field 'words': entry 1 is not UTF-8"):
        GgufFile(path)


def test_a_length_that_no_text_can_have_is_named(tmp_path):
    path = write(tmp_path / "t.gguf", {"x": np.ones(4, np.float32)}, lambda w: w.add_array("words", ["fine", "WWWW"]))
    whole = path.read_bytes()
    count, length = whole.index(b"fine") - 16, whole.index(b"fine") - 8
    for at, value in ((length, 1 << 63), (length, (1 << 64) - 1), (count, 1 << 63), (count, 1 << 40)):
        path.write_bytes(whole)
        patch(path, at, struct.pack("<Q", value))
        with pytest.raises(ModelFileError, match=r"t\.gguf: ends inside metadata field 'words'"):
            GgufFile(path)


def test_deep_arrays_are_refused(tmp_path):
    nested = struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQ", 4, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    path = tmp_path / "deep.gguf"
    path.write_bytes(head + struct.pack("<Q", 4) + b"deep" + struct.pack("<I", 9) + nested)
    with pytest.raises(ModelFileError, match=r"deep\.gguf: .*'deep'.* 8"):
        GgufFile(path)


@pytest.mark.parametrize("value", ["two", [1, 2]])
def test_a_count_of_parts_that_is_no_number_is_named(tmp_path, value):
    def fields(w):
        (w.add_string if isinstance(value, str) else w.add_array)("split.count", value)

    path = write(tmp_path / "s.gguf", {"x": np.ones(4, np.float32)}, fields)
    with pytest.raises(ModelFileError, match=r"s\.gguf: split\.count is .*, expected a whole number"):
        GgufFile(path)


def test_a_part_of_a_split_file_and_a_type_without_dequantizer_are_unsupported(tmp_path):
    path = write(tmp_path / "s.gguf", {"x": np.ones(4, np.float32)}, lambda w: w.add_uint16("split.count", 3))
    with pytest.raises(UnsupportedModelError, match=r"one of 3 parts; .*gguf-split --merge"):
        GgufFile(path)
    path = write(tmp_path / "i.gguf", {"x": np.ones(4, np.int32)})
    with pytest.raises(UnsupportedModelError, match="tensor x has type I32, which cannot be dequantized"):
        GgufFile(path).read("x", np.float32)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_are_taken_value_for_value(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    x = np.random.default_rng(0).standard_normal((6, 160)).astype(np.float32)
    x[2] += 3  # offsets far from the middle
    x[:, 32:64] = 0  # a scale of zero
    file = GgufFile(write(tmp_path / "q.gguf", {"x": gguf.quants.quantize(x, kind)}, types={"x": kind}))
    rows = np.array([5, 0, 2, 1, 4, 3])
    found = file.read_stored("x", np.float32, rows)
    assert (found.bits, found.group, found.offsets is not None) == (8 if name == "Q8_0" else 4, 32, name == "Q4_1")
    np.testing.assert_array_equal(dequantize(found), file.read("x", np.float32, rows))
    kind = file.stored_kind("x")
    assert (kind.bits, kind.group, kind.symmetric, kind.as_stored) == (found.bits, 32, found.offsets is None, True)


@pytest.mark.parametrize("name", ["Q5_0", "F16", "F32", "BF16"])
def test_other_types_are_not_stored_kinds(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    packed = gguf.quants.quantize(np.ones((2, 64), np.float32), kind)
    assert GgufFile(write(tmp_path / "q.gguf", {"x": packed}, types={"x": kind})).stored_kind("x") is None


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_is_taken_exactly():
    """Every matrix of the real file: Q4_1 as affine int4 in groups of 32, the embedding's Q8_0 as int8."""
    file = GgufFile(resolve("smollm2-135m-instruct").path)
    kinds = {}
    for name in file.names():
        if (kind := file.stored_kind(name)) is not None:
            np.testing.assert_array_equal(dequantize(file.read_stored(name, np.float32)), file.read(name, np.float32))
            kinds[file.dtype(name)] = kinds.get(file.dtype(name), 0) + 1
            assert (kind.bits, kind.group, kind.symmetric) == (
                (4, 32, False) if file.dtype(name) == "Q4_1" else (8, 32, True)
            )
    assert kinds == {"Q4_1": 210, "Q8_0": 1}
