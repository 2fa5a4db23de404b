"""Checkpoints of pdx: configuration, tokenizer and parameters in one directory, written with orbax.

    DIR/pdx.json      format, configuration, shape and type of every array, the quantization of every parameter
    DIR/params/       an orbax checkpoint: one uncompressed Zarr array per parameter, each in a single chunk
    DIR/tokenizer/    what `Tokenizer.save` writes; none where the model has no tokenizer, such as a draft model

A chunk holds the array's bytes, so pdx reads it directly into place, several times faster than orbax. Any orbax can
restore `params/`. A quantized parameter is two or three arrays: NAME.values, NAME.scales and, if it is affine,
NAME.offsets. int4 values are packed two to a byte, with the even column in the low four bits.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from pallas_kernels import QuantArray
from pdx.config import ModelConfig
from pdx.errors import ModelFileError
from pdx.io import outputs
from pdx.quant import Kind, kind_of
from pdx.weights.arrays import aligned_empty, converted
from pdx.weights.loaded import Model
from pdx.weights.resolve import CHECKPOINT_FILE

FORMAT, VERSION = "pdx-checkpoint", 1
_DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "int32": np.int32,
    "int8": np.int8,
    "uint8": np.uint8,
}


def check_target(directory: str | Path) -> Path:
    """The resolved path of a directory that a checkpoint can be written to.

    Raises ModelFileError unless it is new or empty, RequestError if it cannot be created.
    """
    directory = outputs.real(Path(directory).expanduser())
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ModelFileError(f"{directory} exists and is not empty: name a new directory")
    if directory.exists() and not directory.is_dir():
        raise ModelFileError(f"{directory} exists and is not a directory: name a new directory")
    outputs.check_folder(directory.parent)
    return directory


@contextmanager
def reserved(directory: str | Path) -> Iterator[Path]:
    """Lock a directory before a checkpoint is written to it, so that a second process is refused at once.

    Removes unfinished directories of killed processes beside it. Raises as `check_target`, and RequestError if another
    process holds the lock.
    """
    directory = check_target(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    outputs.remove_leftovers(directory.parent)
    with outputs.locked(directory, "process"):
        yield directory


def save(model: Model, directory: str | Path) -> Path:
    """Write a checkpoint; the directory appears whole or not at all. Raises as `check_target`."""
    import orbax.checkpoint as ocp

    # Arrays on the host, because orbax would write a chunk per shard, and a checkpoint does not depend on a mesh.
    quantized = {n: dataclasses.asdict(kind_of(x)) for n, x in named_leaves(model.params) if isinstance(x, QuantArray)}
    params = jax.tree.map(_on_host, model.params, is_leaf=lambda x: isinstance(x, QuantArray))
    with reserved(directory) as directory, outputs.unfinished(directory) as part:
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)
        with _quiet(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(part / "params", args=ocp.args.PyTreeSave(params))
        if model.make_tokenizer is not None:
            model.tokenizer.save(part / "tokenizer")
        leaves = {name: {"shape": list(x.shape), "dtype": x.dtype.name} for name, x in named_leaves(params)}
        head = {
            "format": FORMAT,
            "version": VERSION,
            "name": model.name,
            "license": model.license,
            "terms": list(model.terms),
            "sampling": dict(model.sampling),
            "config": json.loads(model.config.to_json()),
            "params": leaves,
            "quantized": quantized,
        }
        (part / CHECKPOINT_FILE).write_text(json.dumps(head, indent=1), encoding="utf-8")
        CheckpointFile(part)  # notices an orbax that writes another array layout now, not at the next load
        if directory.is_dir():
            outputs.keep_mode(directory, part)
            directory.rmdir()
        os.rename(part, directory)
    return directory


def _on_host(x: Any) -> Any:
    if not isinstance(x, QuantArray):
        return np.asarray(x)
    values = np.asarray(x.values).astype(np.int8)
    if x.bits == 4:
        pairs = values.view(np.uint8) & 15
        values = pairs[:, 0::2] | pairs[:, 1::2] << 4
    arrays = {"values": values, "scales": x.scales, "offsets": x.offsets}
    return {name: np.asarray(array) for name, array in arrays.items() if array is not None}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence orbax's warnings about this array layout."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def named_leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, leaf) of nested dicts and lists, sorted by key.

    >>> list(named_leaves({"layers": [{"q_proj": 1}], "embed": 2}))
    [('embed', 2), ('layers.0.q_proj', 1)]
    """
    if isinstance(tree, (dict, list)):
        items = sorted(tree.items()) if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from named_leaves(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), tree


def _chunk(directory: Path, name: str, rank: int) -> Path:
    return directory / "params" / name / ".".join("0" * rank)


class CheckpointFile:
    """The parameters and the configuration of a checkpoint. Its tensor names are pdx's own parameter names.

    Raises ModelFileError that names the file, the parameter and what was expected.
    """

    def __init__(self, directory: str | Path):
        self.path = Path(directory)
        head_file = self.path / CHECKPOINT_FILE
        try:
            head = json.loads(head_file.read_text(encoding="utf-8"))
            kind, version = head["format"], head["version"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelFileError(
                f"{head_file}: not the description of a pdx checkpoint ({error!r}); convert the model again"
            ) from None
        if kind != FORMAT or version != VERSION:
            raise ModelFileError(
                f"{head_file}: format {kind!r} version {version!r}, expected {FORMAT!r} version "
                f"{VERSION}: convert the model again with this pdx"
            )
        try:
            self.config = ModelConfig.from_json(json.dumps(head["config"]))
            self._leaves = {name: (tuple(x["shape"]), str(x["dtype"])) for name, x in head["params"].items()}
            self.license, self.terms = head["license"], tuple(head["terms"])
            self.sampling = head.get("sampling", {})
            self._quantized = {name: Kind(**x | {"as_stored": True}) for name, x in head.get("quantized", {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(f"{head_file}: {error}: convert the model again") from None
        for name, kind in self._quantized.items():
            self._check_quantized(name, kind)
        for name in self._leaves:
            self._check(name)

    def _check_quantized(self, name: str, kind: Kind) -> None:
        """Check the arrays of a quantized parameter against its kind."""
        wanted = ("values", "scales") if kind.symmetric else ("values", "scales", "offsets")
        for part in wanted:
            if f"{name}.{part}" not in self._leaves:
                raise ModelFileError(
                    f"{self.path / CHECKPOINT_FILE}: parameter {name} is quantized and has no {part}, "
                    f"expected {' and '.join(wanted)}: quantize the model again"
                )
        rows, columns = self.shape(name)
        groups = columns // (kind.group or columns)
        dtype = {8: "int8", 4: "uint8"}.get(kind.bits)
        if groups < 1 or columns % groups or self._leaves[f"{name}.values"][1] != dtype:
            raise ModelFileError(
                f"{self.path / CHECKPOINT_FILE}: parameter {name} should be {kind}, but its values are "
                f"{self._leaves[f'{name}.values']}: quantize the model again"
            )
        for part in wanted[1:]:
            if self._leaves[f"{name}.{part}"] != ((groups, rows), "float32"):
                raise ModelFileError(
                    f"{self.path / CHECKPOINT_FILE}: the {part} of parameter {name} are "
                    f"{self._leaves[f'{name}.{part}']}, expected float32 of shape [{groups}, {rows}]: "
                    "quantize the model again"
                )

    def _check(self, name: str) -> None:
        """Check a parameter's Zarr description and chunk size against `pdx.json`."""
        shape, dtype = self._leaves[name]
        if dtype not in _DTYPES:
            raise ModelFileError(
                f"{self.path / CHECKPOINT_FILE}: parameter {name} has type {dtype!r}, "
                f"expected one of {', '.join(_DTYPES)}"
            )
        described = self.path / "params" / name / ".zarray"
        try:
            meta = json.loads(described.read_text(encoding="utf-8"))
            found = meta["shape"], meta["chunks"], meta["compressor"], meta["order"], meta["filters"], meta["dtype"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise ModelFileError(
                f"{described}: parameter {name} is missing or its description is corrupted, expected "
                f"{dtype} of shape {list(shape)}: convert the model again"
            ) from None
        stored = "bfloat16" if dtype == "bfloat16" else np.dtype(_DTYPES[dtype]).newbyteorder("<").str
        if found != (list(shape), list(shape), None, "C", None, stored):
            raise ModelFileError(
                f"{described}: parameter {name} is stored as {meta['dtype']} of shape {meta['shape']} "
                f"in chunks of {meta['chunks']}, expected {dtype} of shape {list(shape)} in one "
                "uncompressed chunk: convert the model again"
            )
        chunk = _chunk(self.path, name, len(shape))
        expected = int(np.prod(shape, dtype=np.int64)) * np.dtype(_DTYPES[dtype]).itemsize
        size = chunk.stat().st_size if chunk.is_file() else None
        if size != expected:
            said = "is missing" if size is None else f"has {size} bytes"
            raise ModelFileError(
                f"{chunk}: the data of parameter {name} {said}, expected {expected} bytes: convert the model again"
            )

    def names(self) -> list[str]:
        """The names of the parameters. A quantized parameter has one name for all its arrays."""
        parts = {f"{name}.{part}" for name in self._quantized for part in ("values", "scales", "offsets")}
        return [*self._quantized, *(name for name in self._leaves if name not in parts)]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._quantized:
            return self._leaves[name][0]
        rows, columns = self._leaves[f"{name}.values"][0]
        return rows, columns * (2 if self._quantized[name].bits == 4 else 1)

    def dtype(self, name: str) -> str:
        return self._leaves[self._array(name)][1]

    def path_of(self, name: str) -> str:
        return str(_chunk(self.path, self._array(name), len(self.shape(name))))

    def _array(self, name: str) -> str:
        """The name of the array with a parameter's values."""
        return f"{name}.values" if name in self._quantized else name

    def stored_kind(self, name: str) -> Kind | None:
        return self._quantized.get(name)

    def read_stored(self, name: str, dtype: Any, rows: np.ndarray | None = None) -> QuantArray:
        kind = self._quantized[name]
        values: Any = self._raw(f"{name}.values")
        if kind.bits == 4:
            # Shifting up and down again extends the sign of the four bits.
            pairs = np.stack([values << 4, values], axis=-1).view(np.int8) >> 4
            values = pairs.reshape(self.shape(name)).astype(ml_dtypes.int4)
        scales: Any = self._raw(f"{name}.scales")
        offsets: Any = None if kind.symmetric else self._raw(f"{name}.offsets")
        return QuantArray(values, scales, offsets, kind.activations, np.dtype(dtype).name)

    def read(self, name: str, dtype: Any, rows: np.ndarray | None = None) -> np.ndarray:
        """The values in `dtype`."""
        values = self._raw(name)
        if rows is None and values.dtype == dtype:
            return values
        return converted(values, dtype, rows)

    def _raw(self, array: str) -> np.ndarray:
        """One array in its saved type."""
        shape, stored = self._leaves[array]
        values = aligned_empty(shape, _DTYPES[stored])
        with open(_chunk(self.path, array, len(shape)), "rb", buffering=0) as file:
            if file.readinto(values.reshape(-1).view(np.uint8).data) != values.nbytes:
                raise ModelFileError(f"{file.name}: the data of parameter {array} is cut off")
        return values
