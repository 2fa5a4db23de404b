"""Writing files and folders: checks before any work that they can be written, atomic replacement, and locks.

Links are followed. A device, a pipe or `/dev/stdout` is written to, never replaced.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from pdx.errors import RequestError


def check_file(path: Path) -> None:
    """Raise RequestError unless `path` can be written. Its content is not changed."""
    try:
        _try_file(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {reason(error)}") from None


def check_folder(path: Path) -> None:
    """Raise RequestError unless `path` is a folder in which files can be made, or such a folder can be created."""
    there = Path(os.path.realpath(path))
    try:
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise RequestError(f"{path} cannot be a folder: {there} is a file")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {reason(error)}") from None


def _try_file(path: Path) -> None:
    number = _descriptor(path)
    if number is not None:
        os.write(number, b"")
        return
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        target = real(path)
        if not target.parent.is_dir():
            raise RequestError(f"{target.parent} is not a directory: make it first") from None
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        target.unlink()
        return
    if stat.S_ISDIR(mode):
        raise RequestError(f"{path} is a directory: name a file")
    if stat.S_ISSOCK(mode):
        raise RequestError(f"{path} is a socket: name a file")
    if stat.S_ISREG(mode):
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
    elif not os.access(path, os.W_OK):  # a pipe is not opened, since that would wait for its reader
        raise PermissionError(0, "no permission")


def reason(error: OSError) -> str:
    """The system's text for an error, without number and path."""
    return error.strerror or str(error) or type(error).__name__


def real(path: Path) -> Path:
    """`path` with all links followed. It need not exist."""
    return Path(os.path.realpath(path))


def is_ordinary(path: Path) -> bool:
    """Whether `path` may be replaced: it is a regular file, or does not exist."""
    return _descriptor(path) is None and (not os.path.exists(path) or os.path.isfile(path))


def _descriptor(path: Path) -> int | None:
    """The descriptor of this process that `path` refers to, such as 1 for `/dev/stdout`; None for another path."""
    for _ in range(40):  # the most links that Linux follows
        folder = os.path.realpath(path.parent)
        if folder in ("/dev/fd", f"/proc/{os.getpid()}/fd") and path.name.isdecimal():
            return int(path.name)
        path = Path(folder, path.name)
        if not path.is_symlink():
            return None
        path = Path(folder, os.readlink(path))
    return None


def opened(path: Path, newline: str | None = None) -> TextIO:
    """Open `path` for writing UTF-8 text; `newline` as in `open`. A file is truncated.

    A descriptor such as `/dev/stdout` is duplicated, not opened again: opening would start at the beginning of a file
    that the shell appends to.
    """
    number = _descriptor(path)
    return open(path if number is None else os.dup(number), "w", encoding="utf-8", newline=newline)


# Temporary paths that this process has begun to write.
_unfinished: set[Path] = set()


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` for its new content. It is removed at the end of the block or on a signal.

    What a killed process left there is removed first. If another process may be writing it, hold the lock (`locked`).
    """
    target = real(path)
    part = target.with_name(f".{target.name}.unfinished")
    _unfinished.add(part)
    try:
        _remove(part)
        yield part
    finally:
        _remove(part)
        if not part.exists():  # a running thread may have written more: see discard_unfinished
            _unfinished.discard(part)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished directories of killed processes in `folder`, except those that another process locks."""
    for part in folder.glob(".*.unfinished"):
        target = part.with_name(part.name[1 : -len(".unfinished")])
        if part.is_dir():
            with suppress(RequestError), locked(target, "process"), unfinished(target):
                pass


def discard_unfinished() -> None:
    """Remove this process's unfinished files, before it ends."""
    for part in tuple(_unfinished):
        _remove(part)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Yield a UTF-8 text file that replaces `path` atomically when the block ends without an error.

    The permissions of `path` are kept. A device, a pipe, or a file with several hard links is written in place.
    """
    if not is_ordinary(path) or (os.path.exists(path) and os.stat(path).st_nlink > 1):
        with opened(path) as file:
            yield file
        return
    target = real(path)
    with unfinished(path) as part:
        with part.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            keep_mode(target, part)
        os.replace(part, target)


def keep_mode(old: Path, new: Path) -> None:
    """Give `new` the permissions of `old` and, if allowed, its owner."""
    shutil.copymode(old, new)
    owner = old.stat()
    with suppress(OSError, AttributeError):
        os.chown(new, owner.st_uid, owner.st_gid)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path`, as `replacing` does."""
    with replacing(path) as file:
        file.write(text)


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Lock `path` for this process with a lock file beside it, which is removed afterwards. Reentrant.

    Raises RequestError if another process holds the lock; `doing` names that process in the message (`pdx batch`).
    """
    from filelock import FileLock, Timeout

    target = real(path)
    file = target.with_name(f".{target.name}.lock")
    lock = FileLock(file, is_singleton=True)
    try:
        lock.acquire(timeout=0)
        while not file.exists():  # the previous holder has removed it: lock a new file
            lock.release()
            lock.acquire(timeout=0)
    except Timeout:
        raise RequestError(f"another {doing} is writing {path}: wait until it has finished, or name another") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {reason(error)}") from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):
                file.unlink()
        lock.release()
