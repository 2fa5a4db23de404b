"""Reading safetensors: one file, or shards with an index. Nothing is ever unpickled.

A file is eight bytes of header length, a JSON header, and the values. It is read directly, because the library's
numpy interface copies each tensor and lacks some types. Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from pdx.errors import ModelFileError, UnsupportedModelError
from pdx.families.fields import count_of
from pdx.families.ignored_tensors import MERGE
from pdx.weights.arrays import converted, map_file, refuse_lfs_pointer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model"  # peft's file name for a LoRA adapter
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


class SafetensorsFile:
    """One `.safetensors` file. Opening it checks the header: every tensor lies within the file, and none overlap.

    Raises ModelFileError that names the file, the tensor and what was expected.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        fail = partial(_fail, self.path)
        try:
            self._bytes = map_file(self.path)
        except FileNotFoundError:
            raise fail("is missing") from None
        size = len(self._bytes)
        if size < 8:
            raise fail(f"{size} bytes are too few for a safetensors file: truncated")
        refuse_lfs_pointer(self.path, self._bytes)
        (length,) = struct.unpack("<Q", self._bytes[:8].tobytes())
        if 8 + length > size:
            raise fail(
                f"announces a header of {length} bytes, but is only {size} bytes long: "
                "truncated, corrupted, or not a safetensors file"
            )
        try:
            self._header: dict[str, dict] = json.loads(self._bytes[8 : 8 + length].tobytes())
            self._header.pop("__metadata__", None)
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise fail("its header is not a JSON object: corrupted, or not a safetensors file") from None
        self._start = 8 + length
        for name, entry in self._header.items():
            self._check(name, entry, size - self._start)
        self._check_overlaps()

    def _check(self, name: str, entry: Any, room: int) -> None:
        fail = partial(_fail, self.path)
        said = entry if isinstance(entry, dict) else {}
        shape, dtype, place = (said.get(key) for key in ("shape", "dtype", "data_offsets"))
        if not (_are_whole(shape) and isinstance(dtype, str) and _are_whole(place) and len(place) == 2):
            raise fail(
                f"tensor {name} has the header entry {reprlib.repr(entry)}, expected dtype, shape and "
                "data_offsets: corrupted"
            )
        begin, end = place
        width, count = _WIDTHS.get(dtype), math.prod(shape)
        if not 0 <= begin <= end or min(shape, default=0) < 0 or (width is not None and end - begin != width * count):
            raise fail(f"tensor {name} of type {dtype} and shape {shape} takes bytes {begin} to {end}: corrupted")
        if end > room:
            raise fail(
                f"tensor {name} ends at byte {end} of the data, but there are only {room}: "
                "truncated; download or copy it again"
            )

    def _check_overlaps(self) -> None:
        places = sorted((*entry["data_offsets"], name) for name, entry in self._header.items())
        for (begin, end, name), (start, _, other) in pairwise(place for place in places if place[0] < place[1]):
            if start < end:
                raise _fail(
                    self.path,
                    f"tensor {other} starts at byte {start} of the data, within tensor {name}, "
                    f"bytes {begin} to {end}: corrupted",
                )

    def names(self) -> list[str]:
        return list(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> str:
        return self._header[name]["dtype"]

    def path_of(self, name: str) -> str:
        return str(self.path)

    def read(self, name: str, dtype: Any, rows: np.ndarray | None = None) -> np.ndarray:
        """The values in `dtype`. Raises UnsupportedModelError for a tensor that is not of a floating-point type."""
        kind = self.dtype(name)
        if kind not in _FLOATS:
            raise UnsupportedModelError(
                f"{self.path}: tensor {name} has type {kind}, expected one of "
                f"{', '.join(_FLOATS)}; checkpoints quantized by other tools are not read"
            )
        begin, end = (self._start + n for n in self._header[name]["data_offsets"])
        # Not `view`, since the format does not guarantee alignment.
        values = np.frombuffer(self._bytes[begin:end], _FLOATS[kind]).reshape(self.shape(name))
        return converted(values, dtype, rows)


class ShardedSafetensors:
    """The files of one `model.safetensors.index.json`: each tensor is read from the shard that the index names.

    `unlisted` maps the other tensors in the shards (those that the index does not name, or assigns to another shard) to
    their file. Raises ModelFileError for a missing shard, and for a tensor that is not in the shard the index names.
    """

    def __init__(self, index: str | Path):
        self.index = Path(index)
        where = _weight_map(self.index)
        shards = sorted(set(where.values()))
        missing = [s for s in shards if not (self.index.parent / s).is_file()]
        if missing:
            raise ModelFileError(
                f"{self.index.parent / missing[0]}: is missing; {self.index.name} needs "
                f"{len(shards)} shards and {len(missing)} of them are not there"
            )
        files = {shard: SafetensorsFile(self.index.parent / shard) for shard in shards}
        for name, shard in where.items():
            if name not in files[shard]._header:
                raise _fail(files[shard].path, f"tensor {name} is missing, {self.index.name} says it is here")
        self._files = {name: files[shard] for name, shard in where.items()}
        self.unlisted = {
            name: str(file.path) for shard, file in files.items() for name in file.names() if where.get(name) != shard
        }

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def dtype(self, name: str) -> str:
        return self._files[name].dtype(name)

    def path_of(self, name: str) -> str:
        return self._files[name].path_of(name)

    def read(self, name: str, dtype: Any, rows: np.ndarray | None = None) -> np.ndarray:
        return self._files[name].read(name, dtype, rows)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard's file name. Raises ModelFileError for a malformed index."""
    try:
        where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = set(where.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _fail(index, "is not a JSON object with a weight_map: corrupted") from None
    if not where:
        raise _fail(index, "has a weight_map without tensors: corrupted")
    if any(not isinstance(shard, str) for shard in shards):
        raise _fail(index, "has a weight_map that does not map tensors to files: corrupted")
    if any(not shard or Path(shard).is_absolute() or ".." in Path(shard).parts for shard in shards):
        raise _fail(index, "names a shard outside its own directory")
    return where


def _fail(path: Path, text: str) -> ModelFileError:
    return ModelFileError(f"{path}: {text}")


def _are_whole(numbers: Any) -> TypeGuard[list[int]]:
    """Whether this is a list of integers."""
    return isinstance(numbers, list) and all(type(n) is int for n in numbers)


def has_weights(directory: Path) -> bool:
    """Whether a directory holds safetensors: single files, or an index with shards."""
    return (directory / INDEX).is_file() or bool(_files(directory))


def _files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, without adapters and Mistral's `consolidated` copies of the weights."""
    return sorted(p for p in directory.glob("*.safetensors") if not p.name.startswith(("consolidated", ADAPTER)))


def open_safetensors(directory: str | Path, notes: list[str] | None = None) -> SafetensorsFile | ShardedSafetensors:
    """The weights of a Hugging Face directory. A sentence about each ignored file is appended to `notes`.

    If the index does not name an existing `model.safetensors`, that file is read and the index is ignored, as in
    transformers: the model was saved again in one file. Raises ModelFileError if there are no weights to read.
    """
    directory, notes = Path(directory), [] if notes is None else notes
    files, index = _files(directory), directory / INDEX
    if adapters := sorted(directory.glob(f"{ADAPTER}*")):
        said = f"{adapters[0].name} is a LoRA adapter, which pdx does not apply"
        others = [p for p in directory.iterdir() if p.suffix in PICKLED and p not in adapters]
        if not files and not index.is_file() and not others:
            raise _fail(directory, f"{said}, and there is no model beside it: {MERGE}")
        notes.append(f"{said}: {MERGE}")
    single = directory / SINGLE in files
    if index.is_file() and not (single and SINGLE not in _shards_or_none(index)):
        return _sharded(index, notes)
    if single and index.is_file():
        notes.append(f"{INDEX} is ignored: it does not name {SINGLE}, which holds the model in one file")
    if single:
        return SafetensorsFile(directory / SINGLE)
    if len(files) == 1:
        return SafetensorsFile(files[0])
    if files:
        raise ModelFileError(
            f"{directory}: {len(files)} safetensors files and no {INDEX}: copy the index too, or keep one file"
        )
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLED)
    if pickled:
        raise ModelFileError(
            f"{directory}: has only pickled files such as {pickled[0]}, which are not read because unpickling runs "
            "code; save the model as safetensors (transformers: save_pretrained(..., "
            "safe_serialization=True))"
        )
    raise ModelFileError(f"{directory}: no {SINGLE} and no {INDEX}")


def _shards_or_none(index: Path) -> set[str]:
    """The shards that an index names; an empty set if it cannot be read."""
    try:
        return set(_weight_map(index).values())
    except ModelFileError:
        return set()


def _sharded(index: Path, notes: list[str]) -> ShardedSafetensors:
    file = ShardedSafetensors(index)
    if file.unlisted:
        name, path = next(iter(file.unlisted.items()))
        notes.append(
            f"ignored {count_of(len(file.unlisted), 'tensor')} in the shards that {INDEX} does not assign to them, "
            f"such as {name} in {Path(path).name}"
        )
    return file
