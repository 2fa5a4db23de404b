"""Progress of something long, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO


class Report(Protocol):
    """Called with what is being done, how many bytes of it are done, and how many there are."""

    def __call__(self, label: str, done: int, total: int) -> None: ...


def silent(label: str, done: int, total: int) -> None:
    """Reports nothing."""


@contextmanager
def progress_bar(stream: TextIO | None = None) -> Iterator[Report]:
    """A bar on a terminal; elsewhere one line when each label is first seen."""
    stream = stream or sys.stderr
    if not stream.isatty():
        seen: set[str] = set()

        def line(label: str, done: int, total: int) -> None:
            if label not in seen:
                seen.add(label)
                print(f"{label} ({total / 1e6:.0f} MB)", file=stream, flush=True)

        yield line
        return

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        tasks: dict = {}

        def draw(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], completed=min(done, total))

        yield draw
