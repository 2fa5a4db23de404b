"""The journal of a batch job: its finished rows, on disk beside the output, so that the job can be resumed.

    OUT.jsonl.journal    {"job": {...}}              the job's description (`batch_job.describe_engine_job`)
                         3 9f0c2a1b {"text": ...}    the answer to line 3 of the requests, with a checksum
                         ...                         in the order in which they finished

A damaged or incomplete line is ignored, and its request is computed again. A journal of another job is refused. The
lock on the output (`pdx.io.outputs.locked`) keeps a second job from using the same journal.
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
    """The finished rows of a job on disk. `done` maps the line of a request to its answer as JSON text.

    Args:
      output: the job's output file; the journal is beside it.
      job: the job's description, a JSON value.
      lines: the line numbers of the requests; rows of other lines are dropped. None: keep all.

    Raises:
      RequestError: the existing journal belongs to another job, or is not a journal.
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
        # Unbuffered, so that each row is written by one system call before the next one is computed.
        self._file = self.path.open("r+b", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)

    def add(self, line: int, row: Mapping[str, Any]) -> None:
        """Append the answer to the request of a line. Raises EngineError if it cannot be written."""
        text = strict_json.dumps(row, ensure_ascii=False)
        data = _row(line, text)
        try:
            if self._file.write(data) != len(data):
                self._file.truncate(self._size)
                raise OSError("there is no space left on the device")
        except OSError as error:
            raise EngineError(
                f"{self.path} cannot be written: {outputs.reason(error)}; finished rows are kept: run the same "
                "command to resume"
            ) from error
        self._size += len(data)
        self.done[line] = text

    def finish(self, lines: list[int]) -> None:
        """Write the output at once, in the order of `lines`, and remove the journal."""
        with outputs.replacing(self.output) as file:
            file.writelines(self.done[line] + "\n" for line in lines)
        self.close()
        self.path.unlink()

    def close(self) -> None:
        self._file.close()


class StreamedOutput:
    """Takes the place of a `Journal` for an output that is not an ordinary file, such as a pipe.

    A row is written as soon as it and all rows before it are finished. The job cannot be resumed.
    """

    def __init__(self, output: Path, lines: list[int]):
        self.output = self.path = output
        self.done: dict[int, str] = {}
        self._lines = iter(lines)
        self._next = next(self._lines, None)
        self._file = outputs.opened(output)

    def add(self, line: int, row: Mapping[str, Any]) -> None:
        self.done[line] = strict_json.dumps(row, ensure_ascii=False)
        with _naming_file(self.output):
            while self._next in self.done:
                self._file.write(self.done[self._next] + "\n")
                self._next = next(self._lines, None)
            self._file.flush()

    def finish(self, lines: list[int]) -> None:
        self.close()

    def close(self) -> None:
        with _naming_file(self.output):  # closing tries again to write buffered rows
            self._file.close()


@contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError of an open file, which lacks it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def path_of(output: Path) -> Path:
    """The path of an output's journal. Links are followed first, so that two names of one file share it."""
    target = outputs.real(output)
    return target.with_name(target.name + ".journal")


def check_job(path: Path, found: bytes, job: Any) -> bool:
    """Whether `found`, the content of `path`, is a journal of `job`. False if its first line is incomplete.

    If both descriptions are objects, only their common keys are compared. Raises RequestError for a journal of another
    job, and for content that is not a journal.
    """
    first, newline, _ = found.partition(b"\n")
    if not newline and b'{"job": '.startswith(first[:8]):
        return False
    try:
        there = json.loads(first)["job"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RequestError(f"{path} is not a readable journal: remove it to start again") from None
    if isinstance(there, dict) and isinstance(job, dict):
        differ = [f"{k} ({there[k]} there, {job[k]} here)" for k in job if k in there and there[k] != job[k]]
    else:
        differ = [] if there == job else ["the whole description"]
    if differ:
        raise RequestError(
            f"{path} belongs to another job, which differs in {', '.join(differ)}: finish that one, or "
            "remove the file to start again"
        )
    return True


def _rows(found: bytes) -> Iterator[tuple[int, str]]:
    """(line, row) of the intact rows of a journal."""
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
