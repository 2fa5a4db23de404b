"""Host arrays on their way to the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pdx.errors import ModelFileError

_POINTER = b"version https://git-lfs"
# Bytes. XLA's CPU client uses a buffer with this alignment without copying it.
ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array whose data starts at a multiple of `ALIGNMENT` bytes."""
    dtype = np.dtype(dtype)
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def converted(source: np.ndarray, dtype: Any, rows: np.ndarray | None = None) -> np.ndarray:
    """A fresh aligned copy of `source` in `dtype`; `rows` reorders or selects along the first axis."""
    if rows is not None:
        source = source[rows]
    out = aligned_empty(source.shape, dtype)
    out[...] = source
    return out


def nonfinite(x: np.ndarray) -> tuple[int, int] | None:
    """(count, flat index of the first) of the values that are NaN or infinite; None if all are finite.

    A finite sum proves that all values are finite. Only otherwise are they checked one by one.
    """
    with np.errstate(all="ignore"):
        total = np.sum(x, dtype=np.float32)
        if np.isfinite(total):
            return None
        bad = ~np.isfinite(x.reshape(-1))
    count = int(np.count_nonzero(bad))
    return (count, int(np.argmax(bad))) if count else None


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only, memory-mapped array."""
    return np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)


def refuse_lfs_pointer(path: Path, content: np.ndarray) -> None:
    """Raises ModelFileError if the content is a Git LFS pointer instead of the file itself."""
    if content[: len(_POINTER)].tobytes() == _POINTER:
        raise ModelFileError(
            f"{path}: is a Git LFS pointer instead of the file: run `git lfs pull` in the "
            "repository, or download the file itself"
        )
