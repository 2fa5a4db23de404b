"""Files and folders that a command writes: checks, before any work, that they can be written; and writing them.

Links are followed. A device, a pipe or `/dev/stdout` is written to and never replaced.
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
    """Raise RequestError unless `path` can be written. Its content is not touched."""
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
    elif not os.access(path, os.W_OK):  # a pipe is not opened: that would wait for its reader
        raise PermissionError(0, "no permission")


def reason(error: OSError) -> str:
    """The system's text of an error, without its number and path."""
    return error.strerror or str(error) or type(error).__name__


def real(path: Path) -> Path:
    """Where `path` leads, all links followed; it need not exist."""
    return Path(os.path.realpath(path))


def is_ordinary(path: Path) -> bool:
    """Whether `path` may be replaced as a whole: it is an ordinary file, or does not exist."""
    return _descriptor(path) is None and (not os.path.exists(path) or os.path.isfile(path))


def _descriptor(path: Path) -> int | None:
    """The descriptor of this process that `path` stands for, as `/dev/stdout` does for 1."""
    for _ in range(40):  # links, as many as Linux follows
        folder = os.path.realpath(path.parent)
        if folder in ("/dev/fd", f"/proc/{os.getpid()}/fd") and path.name.isdecimal():
            return int(path.name)
        path = Path(folder, path.name)
        if not path.is_symlink():
            return None
        path = Path(folder, os.readlink(path))
    return None


def opened(path: Path, newline: str | None = None) -> TextIO:
    """Open `path` in place for UTF-8 text, emptied if it is a file; `newline` as in `open`.

    A descriptor is not opened anew: that would begin at the start of a file that the shell appends to.
    """
    number = _descriptor(path)
    return open(path if number is None else os.dup(number), "w", encoding="utf-8", newline=newline)


# What this process has begun to write and not finished.
_unfinished: set[Path] = set()


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for content that will replace it; removed at the end of the block or on a signal.

    Leftovers of a killed process are removed first: hold `path` (`locked`) where they may be another process's work.
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
    """Remove unfinished directories of killed processes in `folder`; those that another process holds stay."""
    for part in folder.glob(".*.unfinished"):
        target = part.with_name(part.name[1 : -len(".unfinished")])
        if part.is_dir():
            with suppress(RequestError), locked(target, "process"), unfinished(target):
                pass


def discard_unfinished() -> None:
    """Remove this process's unfinished files, just before it ends."""
    for part in tuple(_unfinished):
        _remove(part)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file that replaces `path` when the block ends without an error.

    Until then `path` is unchanged. Its permissions are kept. A device, a pipe, or a file with several names (hard
    links) is written in place.
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
    """Give `new` the permissions and, where that is allowed, the owner of `old`."""
    shutil.copymode(old, new)
    owner = old.stat()
    with suppress(OSError, AttributeError):
        os.chown(new, owner.st_uid, owner.st_gid)


def write_text(path: Path, text: str) -> None:
    """Write `path` as a whole, as `replacing` does."""
    with replacing(path) as file:
        file.write(text)


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Hold `path` for this process with a lock file beside it, which is removed afterwards. Reentrant.

    Raises RequestError if another process holds it; `doing` names that process in the message, such as `pdx batch`.
    """
    from filelock import FileLock, Timeout

    target = real(path)
    file = target.with_name(f".{target.name}.lock")
    lock = FileLock(file, is_singleton=True)
    try:
        lock.acquire(timeout=0)
        while not file.exists():  # its holder before removed it
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
