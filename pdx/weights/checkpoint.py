"""Checkpoints of pdx: configuration, tokenizer and parameters in one directory, written through orbax.

    DIR/pdx.json      format, configuration, and the shape and type of every parameter
    DIR/params/       an orbax checkpoint of one uncompressed Zarr array a parameter, each in a single chunk
    DIR/tokenizer/    what `Tokenizer.save` writes

A chunk of such an array is its plain bytes, so a parameter is read straight into its place; orbax itself
takes several times as long. Any orbax can still restore `params/`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
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
from pdx.weights.arrays import aligned_empty, converted
from pdx.weights.loaded import Model
from pdx.weights.resolve import CHECKPOINT_FILE

FORMAT, VERSION = "pdx-checkpoint", 1
_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def check_target(directory: str | Path) -> Path:
    """The directory a checkpoint may be written to. Raises ModelFileError unless it is new or empty."""
    directory = Path(directory).expanduser()
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ModelFileError(f"{directory} is there and not empty: name a new directory")
    return directory


def save(model: Model, directory: str | Path) -> Path:
    """Write a checkpoint; the directory appears whole or not at all. Raises ModelFileError if it is taken."""
    import orbax.checkpoint as ocp

    if any(isinstance(x, QuantArray) for _, x in named_leaves(model.params)):
        raise NotImplementedError("quantized parameters are not saved yet: convert the model as it is, and quantize it "
                                  "as it is loaded (quantize=, --quantize)")
    directory = check_target(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Host arrays: orbax makes a chunk of each shard of a device array, and a checkpoint is of no mesh.
    params = jax.tree.map(np.asarray, model.params)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent.resolve()))
    try:
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)
        with _quiet(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(temporary / "params", args=ocp.args.PyTreeSave(params))
        model.tokenizer.save(temporary / "tokenizer")
        leaves = {name: {"shape": list(x.shape), "dtype": x.dtype.name} for name, x in named_leaves(params)}
        head = {"format": FORMAT, "version": VERSION, "name": model.name, "license": model.license,
                "terms": list(model.terms),
                "config": json.loads(model.config.to_json()), "params": leaves}  # fmt: skip
        (temporary / CHECKPOINT_FILE).write_text(json.dumps(head, indent=1), encoding="utf-8")
        CheckpointFile(temporary)  # an orbax that lays its arrays out otherwise is noticed now, not at the next load
        temporary.chmod(0o777 & ~_umask())
        if directory.is_dir():
            directory.rmdir()
        os.rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _quiet() -> Iterator[None]:
    """Without orbax's remarks on a layout that is meant."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def named_leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts and lists with their names, such as `layers.3.q_proj`, sorted by key."""
    if isinstance(tree, (dict, list)):
        items = sorted(tree.items()) if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from named_leaves(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), tree


def _chunk(directory: Path, name: str, rank: int) -> Path:
    return directory / "params" / name / ".".join("0" * rank)


class CheckpointFile:
    """The parameters of a checkpoint under their own names, and its configuration.

    Raises ModelFileError that names the file, the parameter and what was expected.
    """

    def __init__(self, directory: str | Path):
        self.path = Path(directory)
        head_file = self.path / CHECKPOINT_FILE
        try:
            head = json.loads(head_file.read_text(encoding="utf-8"))
            kind, version = head["format"], head["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelFileError(f"{head_file}: not the description of a pdx checkpoint ({error!r}); "
                                 "convert the model again") from None
        if kind != FORMAT or version != VERSION:
            raise ModelFileError(f"{head_file}: format {kind!r} version {version!r}, expected {FORMAT!r} version "
                                 f"{VERSION}: convert the model again with this pdx")
        try:
            self.config = ModelConfig.from_json(json.dumps(head["config"]))
            self._leaves = {name: (tuple(x["shape"]), str(x["dtype"])) for name, x in head["params"].items()}
            self.license, self.terms = head["license"], tuple(head["terms"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(f"{head_file}: {error}: convert the model again") from None
        for name in self._leaves:
            self._check(name)

    def _check(self, name: str) -> None:
        """Hold a parameter's Zarr description and the size of its chunk to what `pdx.json` says."""
        shape, dtype = self._leaves[name]
        if dtype not in _DTYPES:
            raise ModelFileError(f"{self.path / CHECKPOINT_FILE}: parameter {name} has type {dtype!r}, "
                                 f"expected one of {', '.join(_DTYPES)}")
        described = self.path / "params" / name / ".zarray"
        try:
            meta = json.loads(described.read_text(encoding="utf-8"))
            found = meta["shape"], meta["chunks"], meta["compressor"], meta["order"], meta["filters"], meta["dtype"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ModelFileError(f"{described}: parameter {name} is missing or its description is corrupted, expected "
                                 f"{dtype} of shape {list(shape)}: convert the model again") from None
        stored = "bfloat16" if dtype == "bfloat16" else np.dtype(_DTYPES[dtype]).newbyteorder("<").str
        if found != (list(shape), list(shape), None, "C", None, stored):
            raise ModelFileError(f"{described}: parameter {name} is stored as {meta['dtype']} of shape {meta['shape']} "
                                 f"in chunks of {meta['chunks']}, expected {dtype} of shape {list(shape)} in one "
                                 "uncompressed chunk: convert the model again")
        chunk = _chunk(self.path, name, len(shape))
        expected = int(np.prod(shape, dtype=np.int64)) * np.dtype(_DTYPES[dtype]).itemsize
        size = chunk.stat().st_size if chunk.is_file() else None
        if size != expected:
            said = "is missing" if size is None else f"has {size} bytes"
            raise ModelFileError(f"{chunk}: the data of parameter {name} {said}, expected {expected} bytes: "
                                 "convert the model again")

    def names(self) -> list[str]:
        return list(self._leaves)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._leaves[name][0]

    def dtype(self, name: str) -> str:
        return self._leaves[name][1]

    def path_of(self, name: str) -> str:
        return str(_chunk(self.path, name, len(self.shape(name))))

    def read(self, name: str, dtype: Any, rows: np.ndarray | None = None) -> np.ndarray:
        """The values in `dtype`."""
        shape, stored = self._leaves[name]
        values = aligned_empty(shape, _DTYPES[stored])
        with open(self.path_of(name), "rb", buffering=0) as file:
            if file.readinto(values.reshape(-1).view(np.uint8)) != values.nbytes:
                raise ModelFileError(f"{file.name}: the data of parameter {name} is cut off")
        if rows is None and values.dtype == dtype:
            return values
        return converted(values, dtype, rows)
