"""Host arrays on their way to the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pdx.errors import ModelFileError

_POINTER = b"version https://git-lfs"
# XLA's CPU client uses a buffer of this alignment without a copy.
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
    """How many values of a floating array are NaN or infinite and the flat index of the first; None if none is.

    A finite sum proves that all are finite; values are checked one by one only otherwise.
    """
    with np.errstate(all="ignore"):
        total = np.sum(x, dtype=np.float32)
        if np.isfinite(total):
            return None
        bad = ~np.isfinite(x.reshape(-1))
    count = int(np.count_nonzero(bad))
    return (count, int(np.argmax(bad))) if count else None


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only array that is read from disk as it is used."""
    return np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)


def check_pointer(path: Path, content: np.ndarray) -> None:
    """Raises ModelFileError for a Git LFS pointer in place of the file."""
    if content[: len(_POINTER)].tobytes() == _POINTER:
        raise ModelFileError(
            f"{path}: is a pointer of Git LFS in the place of the file: run `git lfs pull` in the "
            "repository, or download the file itself"
        )
