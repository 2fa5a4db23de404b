"""What a batch job has finished, on disk beside its output, so that a run that is interrupted or killed can go on.

    OUT.jsonl.journal    {"job": {...}}              what the job is, see `pdx.clients.batch_job.job_of`
                         3 9f0c2a1b {"text": ...}    the answer to line 3 of the requests, with a checksum
                         ...                         in the order in which they finished

A line that is cut short or damaged, wherever it stands, is dropped, and its request computed anew. A journal of another
job is refused. The lock on the output (`pdx.io.outputs.locked`) keeps two jobs from one journal.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdx.errors import EngineError, RequestError
from pdx.io import outputs, strict_json


class Journal:
    """Finished rows of a job on disk, by the line of their request.

    Args:
      output: what the job is to write; the journal lies beside it.
      job: what the job is, as JSON: a journal of another one is refused.
      lines: the lines that requests stand in; rows of others are dropped. None: of any.

    Raises:
      RequestError: the journal there is of another job, or is none.
    """

    def __init__(self, output: Path, job: Any, lines: Collection[int] | None = None):
        self.output, self.path = output, path_of(output)
        self.done: dict[int, str] = {}
        header = _line(json.dumps({"job": job}))
        found = self.path.read_bytes() if self.path.exists() else b""
        if check_job(self.path, found, job):
            self.done = {n: row for n, row in _rows(found) if lines is None or n in lines}
        kept = b"".join([header, *(_row(n, row) for n, row in self.done.items())])
        if kept != found:
            outputs.write_text(self.path, kept.decode())
        # Unbuffered: a row is with the system, in one piece, before the next one is computed.
        self._file = self.path.open("r+b", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)

    def add(self, line: int, row: Mapping[str, Any]) -> None:
        """Keep the answer to the request of a line. Raises EngineError where the disk does not take it."""
        text = strict_json.dumps(row, ensure_ascii=False)
        data = _row(line, text)
        try:
            if self._file.write(data) != len(data):
                self._file.truncate(self._size)
                raise OSError("there is no space left on the device")
        except OSError as error:
            raise EngineError(
                f"{self.path} cannot be written: {outputs.reason(error)}; what is finished is kept: the "
                "same command goes on from there"
            ) from error
        self._size += len(data)
        self.done[line] = text

    def finish(self, lines: list[int]) -> None:
        """Write the output in the order of `lines`, in one piece, and remove the journal."""
        with outputs.replacing(self.output) as file:
            file.writelines(self.done[line] + "\n" for line in lines)
        self.close()
        self.path.unlink()

    def close(self) -> None:
        self._file.close()


class InOrder:
    """The same for an output that is no ordinary file, such as a pipe: each row is written as soon as it and those
    before it are finished, and a run that is killed cannot go on."""

    def __init__(self, output: Path, lines: list[int]):
        self.output, self.path, self.done = output, output, {}
        self._lines = iter(lines)
        self._next = next(self._lines, None)
        self._file = outputs.opened(output)

    def add(self, line: int, row: Mapping[str, Any]) -> None:
        self.done[line] = strict_json.dumps(row, ensure_ascii=False)
        with _errors_name(self.output):
            while self._next in self.done:
                self._file.write(self.done[self._next] + "\n")
                self._next = next(self._lines, None)
            self._file.flush()

    def finish(self, lines: list[int]) -> None:
        self.close()

    def close(self) -> None:
        with _errors_name(self.output):  # it writes once more what could not be written
            self._file.close()


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """What the system says of an open file does not name it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def path_of(output: Path) -> Path:
    """Where the journal of an output lies: beside the file that links lead to, so that two names have one journal."""
    target = outputs.real(output)
    return target.with_name(target.name + ".journal")


def check_job(path: Path, found: bytes, job: Any) -> bool:
    """Whether `found`, what `path` holds, is a journal of `job`; False: it never got as far as its first line.

    Where both are objects, only the keys that both have are compared. Raises RequestError for a journal of another job,
    and for what is none.
    """
    first, newline, _ = found.partition(b"\n")
    if not newline and b'{"job": '.startswith(first[:8]):
        return False
    try:
        there = json.loads(first)["job"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RequestError(f"{path} is no journal that can be read: remove it to begin anew") from None
    if isinstance(there, dict) and isinstance(job, dict):
        differ = [f"{k} ({there[k]} there, {job[k]} here)" for k in job if k in there and there[k] != job[k]]
    else:
        differ = [] if there == job else ["the whole description"]
    if differ:
        raise RequestError(
            f"{path} is of another job, which differs in {', '.join(differ)}: finish that one, or "
            "remove the file to begin anew"
        )
    return True


def _rows(found: bytes) -> Iterator[tuple[int, str]]:
    """The rows of a journal that are whole."""
    for line in found.split(b"\n")[1:]:
        number, _, rest = line.partition(b" ")
        try:
            row = rest[9:].decode()
            if _row(int(number), row) == line + b"\n" and isinstance(json.loads(row), dict):
                yield int(number), row
        except (ValueError, RecursionError):
            continue


def _row(line: int, row: str) -> bytes:
    return _line(f"{line} {zlib.crc32(f'{line} {row}'.encode()):08x} {row}")


def _line(text: str) -> bytes:
    return text.encode() + b"\n"
