"""How the command ends: errors as one line, exit codes, signals, and removal of unfinished files.

Exit codes: 0, done, or the reader of the output has closed it (`| head`); 1, an error; 2, invalid options; 130,
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
# Depending on its release, typer has its own copy of click or imports it. This finds click's UsageError in both.
UsageError = typer.BadParameter.__mro__[2]
ENDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
# Seconds that Python gets to handle a signal. It cannot while it waits for a compiler or a kernel.
GRACE_S = 1.0


class Terminated(BaseException):
    """SIGTERM arrived."""


def run(command: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run a command and return its exit code. An error is reported on standard error."""
    at = arguments.index("--") if "--" in arguments else len(arguments)  # no options after it
    debug = DEBUG in arguments[:at] or os.environ.get("PDX_DEBUG", "") not in ("", "0")
    rest = [a for a in arguments[:at] if a != DEBUG] + arguments[at:]
    try:
        try:
            streams.prepare()
            threading.excepthook = partial(_thread_failed, debug=debug)
            if not debug:  # JAX logs a traceback if a plugin finds no device
                logging.getLogger("jax._src.xla_bridge").addFilter(_without_traceback)
            with _signals():
                command(rest)
                streams.flush_output()
            return 0
        except BaseException as error:
            return _exit_code(error, debug)
    except (KeyboardInterrupt, Terminated):  # a second signal, while the first is handled
        return leave(signal.SIGINT)


def _exit_code(error: BaseException, debug: bool) -> int:
    """Report an error; returns its exit code."""
    if isinstance(error, KeyboardInterrupt | Terminated):
        return leave(signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
    if _is_reader_gone(error):
        streams.drop_output()
        return 0
    try:
        streams.flush_output()
    except OSError as failed:
        if _is_reader_gone(failed):
            return 0
        error = failed if isinstance(error, typer.Exit) else error
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, UsageError):
        return _usage_error(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    _print_error(error, debug)
    return 1


def _usage_error(error: Any) -> int:
    """Print a UsageError of click; returns its exit code."""
    from typer import rich_utils

    rich_utils.rich_format_error(error)
    return error.exit_code


def _is_reader_gone(error: BaseException) -> bool:
    """Whether standard output is a broken pipe (no other pipe counts). rich turns that error into a SystemExit."""
    if isinstance(error, SystemExit):
        return isinstance(error.__context__, BrokenPipeError)
    return isinstance(error, BrokenPipeError) and (error.filename == streams.OUTPUT or streams.is_output_broken())


def _thread_failed(failed: threading.ExceptHookArgs, debug: bool) -> None:
    """Print an error that ended a thread, unless it is the engine's, which reports to its callers."""
    if debug or not (failed.thread and failed.thread.name.startswith("pdx-")):
        _print_error(failed.exc_value, debug)


def _without_traceback(record: logging.LogRecord) -> bool:
    """A log filter that replaces a record's traceback by the error's text."""
    if record.exc_info:
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]}", ()
        record.exc_info = None
    return True


def _print_error(error: BaseException | None, debug: bool) -> None:
    if debug and error:
        traceback.print_exception(error)
    print(f"error: {message(error)}", file=sys.stderr)


def message(error: BaseException | None) -> str:
    """The text of an error for users: its own if pdx raised it on purpose, else one line that says what to do."""
    if isinstance(error, PdxError | NotImplementedError):
        return str(error)
    line = next((x.strip() for x in str(error).splitlines() if x.strip()), "")[:400]
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{outputs.reason(error)}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in line:
        return f"there is not enough memory: take a smaller model, batch or context, or --quantize ({line or 'host'})"
    if _is_backend_error(error):
        platforms = os.environ.get("JAX_PLATFORMS")
        why = f"JAX_PLATFORMS={platforms} is not available" if platforms else "JAX finds no device that it can use"
        return f"{why} ({line or type(error).__name__}): JAX_PLATFORMS=cpu runs on the CPU; unset, JAX chooses"
    return (
        f"unexpected error, which is a fault of pdx: {type(error).__name__}: {line}. {DEBUG} (or PDX_DEBUG=1) shows "
        "the traceback; please report it"
    )


def _is_backend_error(error: BaseException | None) -> bool:
    """Whether JAX raised it while it initialized its devices, which has several error types."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    return bool(frames) and os.path.basename(frames[-1].filename) == "xla_bridge.py"


def leave(number: signal.Signals) -> int:
    """Remove unfinished files and end the process at once.

    A normal exit would wait for threads and running programs, possibly for minutes. Any thread may call this, even
    while another one holds the streams' locks, since it writes to the descriptors.
    """
    code, word = ENDS[number]
    outputs.discard_unfinished()
    with suppress(OSError):
        cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar may have hidden it
        os.write(2, cursor + word.encode() + b"\n")
    os._exit(code)


class _signals:
    """Within the block, Ctrl-C and SIGTERM raise an exception in the main thread. If that is busy in native code, such
    as a compilation, a second thread ends the process after `GRACE_S` seconds."""

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
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)  # written at once, before Python can run a handler
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
