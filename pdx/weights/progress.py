"""Progress of something long, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO


class Report(Protocol):
    """Called with what is being done, how much of it is done, and how much there is: bytes, or what else is counted."""

    def __call__(self, label: str, done: int, total: int) -> None: ...


def silent(label: str, done: int, total: int) -> None:
    """Reports nothing."""


@contextmanager
def progress_bar(stream: TextIO | None = None, unit: str | None = None) -> Iterator[Report]:
    """A bar on a terminal; elsewhere one line when each label is first seen. `unit`: what is counted, None: bytes."""
    stream = stream or sys.stderr
    if not stream.isatty():
        seen: set[str] = set()

        def line(label: str, done: int, total: int) -> None:
            if label not in seen:
                seen.add(label)
                size = f"{total} {unit}" if unit else f"{total / 1e6:.0f} MB"
                print(f"{label} ({size})", file=stream, flush=True)

        yield line
        return

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    counted = MofNCompleteColumn() if unit else DownloadColumn()
    columns = TextColumn("{task.description}"), BarColumn(), counted, TimeRemainingColumn()
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        tasks: dict = {}

        def draw(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], completed=min(done, total))

        yield draw
