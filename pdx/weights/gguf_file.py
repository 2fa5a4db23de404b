"""Reading GGUF: pdx's own parser for metadata and tensor list, the `gguf` library for dequantization.

The library's reader takes 13 s for a vocabulary of 262144 tokens; this parser takes a tenth of a second. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import reprlib
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from pdx.errors import ModelFileError, UnsupportedModelError
from pdx.weights.arrays import aligned_empty, converted, refuse_lfs_pointer

if TYPE_CHECKING:  # listing models imports no jax
    from pallas_kernels import QuantArray
    from pdx.quant import Kind

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_DEEPEST = 8  # the most levels of nested arrays; published files have none
_PLAIN = {0: np.float32, 1: np.float16, 28: np.float64, 30: ml_dtypes.bfloat16}  # ggml types that are not quantized
_BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}  # block types that a QuantArray represents exactly, in groups of 32
# Values dequantized at a time: few enough for the second-level cache, many enough to hide numpy's call overhead.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class TensorInfo:
    """An entry of the tensor list; `shape` in row-major order, `start` and `size` in bytes from the file's start."""

    shape: tuple[int, ...]
    ggml_type: int
    start: int
    size: int


class GgufFile:
    """A GGUF file. Opening it checks magic, version, lists, alignment, and that every tensor lies within the file.

    Raises ModelFileError that names the file and what is wrong, UnsupportedModelError for a split file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self._tensors: dict[str, TensorInfo] = {}
        with open(self.path, "rb") as file:
            self._size = file.seek(0, 2)
            if self._size < 24:
                raise self._error(f"{self._size} bytes are too few for a GGUF file")
            self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        refuse_lfs_pointer(self.path, self._bytes)
        _Parser(self).run()
        parts = self.metadata.get("split.count", 1)
        if not isinstance(parts, int):
            raise self._error(f"split.count is {reprlib.repr(parts)}, expected a whole number: corrupted")
        if parts > 1:
            raise UnsupportedModelError(
                f"{self.path}: one of {parts} parts; merge them into one file with llama.cpp's gguf-split --merge"
            )

    def _error(self, text: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {text}")

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """The ggml type, such as F32 or Q4_1."""
        return _types()(self._tensors[name].ggml_type).name

    def path_of(self, name: str) -> str:
        return str(self.path)

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.frombuffer(self._buffer, np.uint8)

    def blocks(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, uint8 [rows.., bytes per row], without a copy."""
        info = self._tensors[name]
        return self._bytes[info.start : info.start + info.size].reshape(*info.shape[:-1], -1)

    def read(self, name: str, dtype: Any, rows: np.ndarray | None = None) -> np.ndarray:
        """The values in `dtype`; quantized blocks are dequantized. Raises UnsupportedModelError for a type that
        the `gguf` library cannot dequantize."""
        info, stored = self._tensors[name], self.blocks(name)
        if info.ggml_type in _PLAIN:
            return converted(stored.view(_PLAIN[info.ggml_type]), dtype, rows)
        import gguf

        if rows is not None:
            stored = stored[rows]
        quant = getattr(gguf.quants, self.dtype(name), None)
        if quant is None:
            raise UnsupportedModelError(
                f"{self.path}: tensor {name} has type {self.dtype(name)}, which cannot be "
                "dequantized; use a file in F32, F16, BF16, Q8_0, Q4_0, Q4_1 or a K-quant"
            )
        quant.init_grid()
        block, size = gguf.GGML_QUANT_SIZES[quant.qtype]
        out = aligned_empty((*stored.shape[:-1], info.shape[-1]), dtype)
        values, packed = out.reshape(-1, block), stored.reshape(-1, size)
        step = max(1, _CHUNK // block)
        with np.errstate(all="ignore"):  # the loader reports values that are not finite
            for i in range(0, len(packed), step):
                values[i : i + step] = quant.dequantize_blocks(packed[i : i + step])
        return out

    def stored_kind(self, name: str) -> Kind | None:
        """The kind of a block type that a `QuantArray` represents exactly (`_BITS`), in groups of 32; else None."""
        from pdx.quant import Kind

        name = self.dtype(name)
        return Kind(_BITS[name], 32, symmetric=name != "Q4_1", as_stored=True) if name in _BITS else None

    def read_stored(self, name: str, dtype: Any, rows: np.ndarray | None = None) -> QuantArray:
        """A matrix of Q8_0, Q4_0 or Q4_1 blocks, not dequantized.

        Q4_1 stores d q + m with q in 0..15; as a `QuantArray` it is d (q - 8) + (m + 8 d).
        """
        import gguf

        from pallas_kernels.quant_array import from_blocks

        stored, kind = self.blocks(name), self.dtype(name)
        stored = stored if rows is None else stored[rows]
        _, size = gguf.GGML_QUANT_SIZES[_types()[kind]]
        blocks = stored.reshape(len(stored), -1, size)
        halves = 2 if kind == "Q4_1" else 1
        numbers = np.ascontiguousarray(blocks[..., : 2 * halves]).view(np.float16).astype(np.float32)
        values, scales = blocks[..., 2 * halves :], numbers[..., 0]
        if kind == "Q8_0":
            values = values.view(np.int8)
        else:  # the low four bits hold the first half of a block
            values = np.concatenate([values & 15, values >> 4], axis=-1).astype(np.int8) - np.int8(8)
        offsets = numbers[..., 1] + 8 * scales if halves == 2 else None
        return from_blocks(values.reshape(len(stored), -1), scales, offsets, _BITS[kind], np.dtype(dtype).name)


def _types():
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType


class _Parser:
    """Reads header, metadata and tensor list into a `GgufFile`, in one pass."""

    def __init__(self, file: GgufFile):
        self.file, self.buffer, self.size, self.at = file, file._buffer, file._size, 0
        self.doing = "the header"

    def run(self) -> None:
        try:
            self._run()
        except struct.error:
            raise self.file._error(f"ends inside {self.doing}: truncated or corrupted") from None

    def _number(self, kind: struct.Struct) -> int:
        (value,) = kind.unpack_from(self.buffer, self.at)
        self.at += kind.size
        return value

    def _string(self) -> str:
        length = self._number(_U64)
        end = self.at + length
        if end > self.size:
            raise struct.error
        try:
            text = str(self.buffer[self.at : end], "utf-8")
        except UnicodeDecodeError:
            raise self.file._error(f"{self.doing} holds text that is not UTF-8: corrupted") from None
        self.at = end
        return text

    def _run(self) -> None:
        fail = self.file._error
        if self.buffer[:4] != MAGIC:
            raise fail(f"starts with {bytes(self.buffer[:4])!r}, expected {MAGIC!r}: not a GGUF file")
        self.at = 4
        version = self._number(_U32)
        if version not in VERSIONS:
            known = " or ".join(map(str, VERSIONS))
            swapped = " (big-endian)" if version & 0xFFFF == 0 else ""
            raise fail(f"GGUF version {version}{swapped}, expected {known}, little-endian: convert it again")
        tensors, pairs = self._number(_U64), self._number(_U64)
        # Each tensor and each pair takes at least 13 bytes. Without this check, a corrupted count would loop for long.
        if (tensors + pairs) * 13 > self.size:
            raise fail(f"announces {tensors} tensors and {pairs} metadata fields in {self.size} bytes: corrupted")
        for i in range(pairs):
            self.doing = f"metadata field {i + 1} of {pairs}"
            key = self._string()
            self.doing = f"metadata field {key!r}"
            self.file.metadata[key] = self._value(self._number(_U32))
        listed = [self._tensor(i, tensors) for i in range(tensors)]
        self._place(listed)

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._number(_U32), self._number(_U64)
            if inner == _STRING:
                return self._strings(count)
            if inner == _ARRAY:
                if count * 12 > self.size:
                    raise struct.error
                if depth == _DEEPEST:
                    raise self.file._error(f"{self.doing} has arrays more than {_DEEPEST} deep: corrupted")
                return [self._value(_ARRAY, depth + 1) for _ in range(count)]
            return self._numbers(inner, count)
        value = self._numbers(kind, 1)[0]
        # The shortest decimal that gives this f32 is the published value: 1e-05, not 9.999999747378752e-06.
        return float(str(value)) if value.dtype == np.float32 else value.item()

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise self.file._error(f"{self.doing} has value type {kind}, which GGUF does not know: corrupted")
        dtype = np.dtype(_SCALARS[kind])
        end = self.at + count * dtype.itemsize
        if end > self.size:
            raise struct.error
        values = np.frombuffer(self.buffer[self.at : end], dtype)
        self.at = end
        return values

    def _strings(self, count: int) -> list[str]:
        """An array of strings. For speed with large vocabularies, it uses local variables and checks bounds only before
        and after the loop."""
        if count * 8 > self.size:
            raise struct.error
        buffer, at, unpack, out = self.buffer, self.at, _U64.unpack_from, []
        try:
            for _ in range(count):
                (length,) = unpack(buffer, at)
                at += 8 + length
                out.append(str(buffer[at - length : at], "utf-8"))
        except UnicodeDecodeError:
            if at > self.size:
                raise struct.error from None
            raise self.file._error(f"{self.doing}: entry {len(out)} is not UTF-8: corrupted") from None
        except OverflowError:  # a length beyond any file's size
            raise struct.error from None
        if at > self.size:
            raise struct.error
        self.at = at
        return out

    def _tensor(self, i: int, count: int) -> tuple[str, tuple[int, ...], int, int]:
        self.doing = f"tensor {i + 1} of {count} in the tensor list"
        name = self._string()
        self.doing = f"tensor {name} in the tensor list"
        rank = self._number(_U32)
        if not 1 <= rank <= 4:
            raise self.file._error(f"tensor {name} has {rank} dimensions, expected 1 to 4: corrupted")
        shape = tuple(self._number(_U64) for _ in range(rank))[::-1]
        return name, shape, self._number(_U32), self._number(_U64)

    def _place(self, listed: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        """Turn the offsets of the tensor list into positions in the file, and check them against its size."""
        from gguf.constants import GGML_QUANT_SIZES

        fail, types = self.file._error, _types()
        alignment = self.file.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise fail(f"general.alignment is {alignment!r}, expected a multiple of 8")
        data = -(-self.at // alignment) * alignment
        for name, shape, kind, offset in listed:
            if name in self.file._tensors:
                raise fail(f"tensor {name} is listed twice: corrupted")
            if kind not in types._value2member_map_:
                raise fail(
                    f"tensor {name} has type {kind}, which the installed gguf library does not know: "
                    "corrupted, or update the gguf package"
                )
            block, width = GGML_QUANT_SIZES[types(kind)]
            if min(shape) < 1 or shape[-1] % block:
                raise fail(
                    f"tensor {name} has shape {list(shape)}, expected rows of a multiple of {block} values "
                    f"for type {types(kind).name}"
                )
            if offset % alignment:
                raise fail(f"tensor {name} starts at offset {offset}, expected a multiple of {alignment}: corrupted")
            size = shape[-1] // block * width
            for n in shape[:-1]:
                size *= n
            if data + offset + size > self.size:
                raise fail(
                    f"tensor {name} ends at byte {data + offset + size}, but the file has only {self.size}: "
                    "truncated; download or copy it again"
                )
            self.file._tensors[name] = TensorInfo(shape, kind, data + offset, size)
