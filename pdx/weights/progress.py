"""Progress of slow operations, on standard error."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO, TypeVar

T = TypeVar("T")
NOTICE_AFTER_S = 3.0  # seconds without output after which the user is told what is running


class Report(Protocol):
    """A function that is called with a label, the amount done and the total, in bytes or another unit."""

    def __call__(self, label: str, done: int, total: int) -> None: ...


@contextmanager
def slow_notice(label: str, stream: TextIO | None = None, after_s: float = NOTICE_AFTER_S) -> Iterator[None]:
    """Print `label` on standard error if the block takes longer than `after_s` seconds."""
    timer = threading.Timer(after_s, lambda: print(f"{label} ...", file=stream or sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def notify_if_slow(
    items: Iterable[T], label: str, stream: TextIO | None = None, after_s: float = NOTICE_AFTER_S
) -> Iterator[T]:
    """Yield the items; print `label` on standard error whenever the next one takes longer than `after_s` seconds."""
    items = iter(items)
    while True:
        with slow_notice(label, stream, after_s):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def silent(label: str, done: int, total: int) -> None:
    """Reports nothing."""


@contextmanager
def progress_bar(stream: TextIO | None = None, unit: str | None = None) -> Iterator[Report]:
    """A progress bar on a terminal; elsewhere, one line per label. `unit`: what is counted; None: bytes."""
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

    counts = MofNCompleteColumn() if unit else DownloadColumn()
    columns = TextColumn("{task.description}"), BarColumn(), counts, TimeRemainingColumn()
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        tasks: dict = {}

        def draw(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], completed=min(done, total))

        yield draw
