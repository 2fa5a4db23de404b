"""How the command ends: what went wrong in one line, an exit code, and nothing left behind.

Exit codes: 0, done, or the reader of the output went away (`| head`); 1, an error; 2, options that cannot be read; 130,
interrupted; 143, terminated. `--debug` or PDX_DEBUG=1 shows the traceback of an error.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import typer

from pdx.cli import streams
from pdx.errors import PdxError
from pdx.io import outputs

DEBUG = "--debug"
# typer brings its own copy of click, or depends on it: its errors are found through a public name.
UsageError = typer.BadParameter.__mro__[2]
ENDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
# Seconds for Python to notice a signal; a compiler or a kernel does not let it.
GRACE_S = 1.0


class Terminated(BaseException):
    """SIGTERM arrived."""


def run(command: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run a command and return its exit code; whatever it raises is told on standard error."""
    at = arguments.index("--") if "--" in arguments else len(arguments)  # behind it nothing is an option
    asked = DEBUG in arguments[:at] or os.environ.get("PDX_DEBUG", "") not in ("", "0")
    rest = [a for a in arguments[:at] if a != DEBUG] + arguments[at:]
    try:
        try:
            streams.mend()
            threading.excepthook = partial(_thread_ended, debug=asked)
            if not asked:  # a plugin of JAX for a device that is not here
                logging.getLogger("jax._src.xla_bridge").addFilter(_without_traceback)
            with _signals():
                command(rest)
                streams.flush_output()
            return 0
        except BaseException as error:
            return _ended(error, asked)
    except (KeyboardInterrupt, Terminated):  # once more, while the first is dealt with
        return leave(signal.SIGINT)


def _ended(error: BaseException, debug: bool) -> int:
    """The exit code of an error, which is told."""
    if isinstance(error, KeyboardInterrupt | Terminated):
        return leave(signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
    if _reader_left(error):
        streams.drop_output()
        return 0
    try:
        streams.flush_output()
    except OSError as failed:
        if _reader_left(failed):
            return 0
        error = failed if isinstance(error, typer.Exit) else error
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, UsageError):
        from typer import rich_utils

        rich_utils.rich_format_error(error)
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    _tell(error, debug)
    return 1


def _reader_left(error: BaseException) -> bool:
    """Whether it is that of standard output which went away, and not of some other pipe. rich turns it into an exit."""
    if isinstance(error, SystemExit):
        return isinstance(error.__context__, BrokenPipeError)
    return isinstance(error, BrokenPipeError) and (error.filename == streams.OUTPUT or streams.is_output_broken())


def _thread_ended(failed: threading.ExceptHookArgs, debug: bool) -> None:
    """The engine's own thread tells those who wait for it."""
    if debug or not (failed.thread and failed.thread.name.startswith("pdx-")):
        _tell(failed.exc_value, debug)


def _without_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info:
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]}", ()
        record.exc_info = None
    return True


def _tell(error: BaseException | None, debug: bool) -> None:
    if debug and error:
        traceback.print_exception(error)
    print(f"error: {said(error)}", file=sys.stderr)


def said(error: BaseException | None) -> str:
    """What a user is told of an error: its text where pdx raised it on purpose, else one line."""
    if isinstance(error, PdxError | NotImplementedError):
        return str(error)
    line = next((x.strip() for x in str(error).splitlines() if x.strip()), "")[:400]
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{outputs.reason(error)}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in line:
        return f"there is not enough memory: take a smaller model, batch or context, or --quantize ({line or 'host'})"
    if _of_backends(error):
        asked = os.environ.get("JAX_PLATFORMS")
        why = f"JAX_PLATFORMS={asked} asks for what is not here" if asked else "JAX finds no device that it can use"
        return f"{why} ({line or type(error).__name__}): JAX_PLATFORMS=cpu runs on the CPU; unset, JAX chooses"
    return (
        f"pdx failed where it should not, which is a fault of pdx: {type(error).__name__}: {line}. {DEBUG} (or "
        "PDX_DEBUG=1) shows where; please report that"
    )


def _of_backends(error: BaseException | None) -> bool:
    """Whether JAX raised it as it looked for its devices; it does so with errors of several types."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    return bool(frames) and os.path.basename(frames[-1].filename) == "xla_bridge.py"


def leave(number: signal.Signals) -> int:
    """End the process at once, with nothing unfinished left on disk.

    An orderly end waits for threads and for programs under way, which may take minutes. Called from any thread, also
    while another one holds the streams: it writes to the descriptors.
    """
    code, word = ENDS[number]
    outputs.discard_unfinished()
    with suppress(OSError):
        cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a bar may have hidden it
        os.write(2, cursor + word.encode() + b"\n")
    os._exit(code)


class _signals:
    """Inside, Ctrl-C and SIGTERM raise in the main thread. Where that is busy with a call that does not return to
    Python, such as a compilation, a thread ends the process."""

    def __enter__(self) -> None:
        self._before: dict[int, Any] = {}
        if os.name != "posix" or threading.current_thread() is not threading.main_thread():
            return
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._raised = -math.inf
        for number in ENDS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._raise)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)  # Python writes there before it can run a handler
        threading.Thread(target=self._watch, args=(read,), name="pdx-signals", daemon=True).start()

    def __exit__(self, kind, error, _) -> None:
        if self._before and (error is None or isinstance(error, Exception)):
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(self._write)

    def _raise(self, number: int, _frame) -> None:
        self._raised = time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def _watch(self, read: int) -> None:
        while number := os.read(read, 1):
            arrived = time.monotonic()
            while number[0] in self._before and self._raised < arrived - GRACE_S:
                if time.monotonic() > arrived + GRACE_S:
                    leave(signal.Signals(number[0]))
                time.sleep(GRACE_S / 20)
        os.close(read)
