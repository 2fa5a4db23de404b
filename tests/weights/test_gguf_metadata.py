"""GGUF metadata as files have it: a list where a number is expected, fields of encoders, odd types."""

from __future__ import annotations

import re
import struct

import gguf
import numpy as np
import pytest

from pdx.config import RopeConfig
from pdx.errors import ModelFileError, PdxError, UnsupportedModelError
from pdx.families import config_from_gguf
from pdx.weights.gguf_file import GgufFile
from pdx.weights.load import load
from tests.support import tiny_model, weight_files

LAYERS = 4
FIELDS = {
    "block_count": LAYERS,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
}


class Tensors:
    """A file of nothing but an embedding."""

    def names(self):
        return ["token_embd.weight"]

    def shape(self, name):
        return (128, 64)

    def path_of(self, name):
        return "x.gguf"


def read(arch: str = "llama", without=(), notes=None, **changes):
    """The configuration; in `changes` `__` stands for a dot, and lists arrive as the reader gives them."""
    fields = {k: v for k, v in FIELDS.items() if k not in without}
    for key, value in changes.items():
        numbers = isinstance(value, list) and value and not isinstance(value[0], (str, list))
        fields[key.replace("__", ".")] = np.array(value) if numbers else value
    metadata = {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in fields.items()}}
    return config_from_gguf(metadata, Tensors(), "x.gguf", notes)[1]


def refusal(arch: str, **changes) -> str:
    """The sentence that refuses a file; empty where it is taken."""
    try:
        read(arch, **changes)
    except PdxError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("field", [k for k in FIELDS if k not in ("block_count", "embedding_length")])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_equal_entries_are_the_number(arch, field):
    key = field.replace(".", "__")
    assert read(arch, **{key: [FIELDS[field]] * LAYERS}) == read(arch)


@pytest.mark.parametrize("field", ["attention__head_count", "attention__head_count_kv", "feed_forward_length"])
def test_entries_that_differ_are_refused_with_the_values(field):
    with pytest.raises(UnsupportedModelError, match=re.escape(f"llama.{field.replace('__', '.')} = [2, 1, 2, 2]")):
        read(**{field: [2, 1, 2, 2]})
    with pytest.raises(ModelFileError, match=r"is \[2, 2, 2\], .* = 4"):
        read(**{field: [2, 2, 2]})
    with pytest.raises(ModelFileError, match=r"is \[\], expected a positive integer"):
        read(**{field: []})


def test_windows_a_layer():
    window = {"attention__sliding_window": 8}
    every_second = (8, None, 8, None)
    pattern = "attention__sliding_window_pattern"
    assert read("gemma3", **window).windows == (8, 8, 8, 8)  # every sixth sees everything
    assert read("gemma3", **window, **{pattern: 2}).windows == every_second
    assert read("gemma3", **window, **{pattern: [True, False, True, False]}).windows == every_second
    assert read("gemma3", **window, **{pattern: [1, 0, 1, 0]}).windows == every_second
    assert read("gemma3", attention__sliding_window=[8, 0, 8, 0]).windows == every_second
    assert read("gemma2", **window).windows == every_second
    assert read("llama", **window, **{pattern: [True, False, True, False]}).windows == every_second
    assert read("llama", attention__sliding_window=[8, 16, 0, 8]).windows == (8, 16, None, 8)
    assert read("llama", **window).windows == (8,) * 4
    assert read("gemma3").windows == (None,) * 4


@pytest.mark.parametrize(
    ("arch", "fields", "said"),
    [
        (
            "gemma3",
            {"attention__sliding_window": 8, "attention__sliding_window_pattern": [True, False]},
            r"sliding_window_pattern is \[True, False\], .* 4 layers",
        ),
        (
            "gemma3",
            {"attention__sliding_window": 8, "attention__sliding_window_pattern": ["local"] * 4},
            r"sliding_window_pattern is \['local'",
        ),
        ("gemma3", {"attention__sliding_window_pattern": [True] * 4}, "sliding_window is missing"),
        ("llama", {"attention__sliding_window": [8, -1, 8, 8]}, r"sliding_window is \[8, -1, 8, 8\]"),
        ("llama", {"attention__sliding_window": [8] * 3}, r"sliding_window is \[8, 8, 8\]"),
        ("llama", {"attention__sliding_window": 2.5}, r"sliding_window is 2\.5"),
        ("qwen2", {"attention__sliding_window": [8] * 4}, r"qwen2\.attention\.sliding_window = \[8, 8, 8, 8\]"),
    ],
)
def test_windows_that_do_not_fit_are_refused_by_name(arch, fields, said):
    with pytest.raises((ModelFileError, UnsupportedModelError), match=said):
        read(arch, **fields)


@pytest.mark.parametrize(
    "value",
    [
        [8, 8, 0, 0],
        list(range(10_000)),
        [True, False],
        ["a", "b"],
        [0.5, 1.5],
        [[1, 2], [3]],
        "text",
        3,
        0.5,
        True,
        np.float32(2.5),
        np.int64(3),
        np.arange(6).reshape(2, 3),
    ],
)
def test_unknown_fields_are_refused_by_name_and_short(value):
    with pytest.raises(UnsupportedModelError, match=r"llama\.rope\.dimension_sections = ") as caught:
        read(rope__dimension_sections=value)
    assert len(str(caught.value)) < 300


ODD = [
    "1024",
    "",
    b"4",
    8.5,
    float("nan"),
    float("inf"),
    -1,
    0,
    True,
    False,
    2**70,
    [],
    [[2] * 4],
    ["2"] * 4,
    np.float32(2),
    np.uint8(1),
    np.bool_(True),
    np.zeros(0),
    np.array(["x"]),
    {"a": 1},
]


@pytest.mark.parametrize(
    "field",
    [
        *FIELDS,
        "attention.value_length",
        "attention.sliding_window",
        "rope.scaling.type",
        "attention.sliding_window_pattern",
        "rope.scaling.factor",
        "attention.causal",
        "rope.scaling.attn_factor",
        "rope.dimension_count",
        "expert_count",
    ],
)
def test_odd_types_end_in_a_configuration_or_a_sentence(field):
    said = [
        refusal(arch, **{field.replace(".", "__"): value})
        for arch in ("llama", "gemma2", "gemma3", "qwen3")
        for value in ODD
    ]
    assert max(map(len, said)) < 400
    assert sum(map(bool, said)) > 30


def test_whole_floats_and_numpy_scalars_are_numbers():
    numbers = {"attention__head_count": 4.0, "feed_forward_length": np.float32(96), "block_count": np.uint64(LAYERS)}
    assert read(**numbers) == read()
    assert read(attention__causal=np.uint8(1), use_parallel_residual=0, expert_count=0) == read()
    with pytest.raises(ModelFileError, match="context_length is '512', expected a positive integer"):
        read(context_length="512")


VISION = {
    "mm__tokens_per_image": 256,
    "vision__block_count": 27,
    "vision__image_mean": [0.5, 0.5, 0.5],
    "vision__image_size": 896,
    "vision__attention__layer_norm_epsilon": 1e-6,
}


def test_fields_of_an_image_encoder_are_ignored_and_said():
    """Google's QAT files of Gemma 3 have them beside the tensors of the text alone."""
    notes = []
    assert read("gemma3", notes=notes, **VISION) == read("gemma3")
    (note,) = notes
    assert "5 metadata fields" in note
    assert "gemma3.mm.tokens_per_image" in note
    metadata = {
        "general.architecture": "llama",
        "clip.has_vision_encoder": True,
        **{f"llama.{key}": value for key, value in FIELDS.items()},
    }
    assert config_from_gguf(metadata, Tensors(), "x.gguf", notes)[1] == read()
    assert "1 metadata field of" in notes[1]
    with pytest.raises(UnsupportedModelError, match=r"gemma3\.visions = 1"):
        read("gemma3", visions=1)


def test_gemma3_as_ollama_writes_it():
    """Without a word about RoPE or the norms: the values that every Gemma 3 has, and the large ones' scaling, said."""
    gone, notes = ("rope.freq_base", "attention.layer_norm_rms_epsilon"), []
    large = read("gemma3", without=gone, notes=notes, context_length=131072, **VISION)
    assert (large.norm_eps, large.rope, large.rope_window) == (1e-6, RopeConfig(1e6, (8.0,) * 8), RopeConfig(1e4))
    assert any("has no RoPE scaling" in note for note in notes)
    small = read("gemma3", without=gone, context_length=32768, rope__local__freq_base=2e4, rope__global__freq_base=2e6)
    assert (small.rope, small.rope_window) == (RopeConfig(2e6), RopeConfig(2e4))
    told = read("gemma3", context_length=131072, rope__freq_base=1e6)
    assert told.rope == RopeConfig(1e6)
    with pytest.raises(ModelFileError, match="layer_norm_rms_epsilon is missing"):
        read("llama", without=gone)


def test_tensors_of_encoders_are_ignored_and_unknown_ones_refused(tmp_path):
    content = weight_files.tensors(tiny_model.make(tmp_path / "tiny"))
    plain = load(weight_files.write_gguf(tmp_path / "plain.gguf", content))

    def with_tensors(*names):
        path = tmp_path / "more.gguf"
        writer, reader = gguf.GGUFWriter(path, "llama"), gguf.GGUFReader(tmp_path / "plain.gguf")
        for field in reader.fields.values():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                kind = field.types[0]
                sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        for name in names:
            writer.add_tensor(name, np.ones((2, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    model = load(with_tensors("v.blk.0.attn_q.weight", "mm.mm_input_projection.weight", "blk.0.attn_rot_embd"))
    assert model.config == plain.config
    assert [note for note in model.notes if "2 tensors of an image encoder" in note] == model.notes != []
    with pytest.raises(ModelFileError, match=r"does not ask for tensor blk\.0\.attn_sinks\.weight"):
        load(with_tensors("blk.0.attn_sinks.weight"))


def test_files_that_are_not_read_say_why(tmp_path):
    """The image encoder alone; a part of a split file; big-endian; the first version; an unknown tensor type."""
    with pytest.raises(UnsupportedModelError, match=r"this is the image encoder of a model.*text model"):
        config_from_gguf({"general.architecture": "clip"}, Tensors(), "mmproj.gguf")
    path = tmp_path / "x.gguf"
    first, swapped = struct.pack("<I", 1), struct.pack(">I", 3)
    for version, said in ((first, "GGUF version 1, expected 2 or 3"), (swapped, "big-endian")):
        path.write_bytes(b"GGUF" + version + bytes(32))
        with pytest.raises(ModelFileError, match=said):
            GgufFile(path)
    writer = gguf.GGUFWriter(tmp_path / "model-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("x", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="one of 2 parts; merge them into one file"):
        load(tmp_path / "model-00001-of-00002.gguf")
