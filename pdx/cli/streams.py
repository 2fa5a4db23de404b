"""Makes the three standard streams of the command robust.

- Standard output accepts every text. A character that its encoding lacks is written as a JSON escape, `\\u4f60`, so
  that an object printed by `--json` stays valid and exact.
- Standard error never fails. If a message cannot be written, it is lost, and the command continues.
- A descriptor that was closed (`>&-`) is opened again, so that no file of the command gets its number. Reading or
  writing it is an error, except for standard error, which stays silent.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from contextlib import suppress

from pdx.errors import RequestError
from pdx.io import inputs

OUTPUT = "standard output"
ESCAPING = "pdx.json_escape"
# Error handlers that never raise; if the user has chosen one of them, it is kept.
LENIENT = ("replace", "ignore", "backslashreplace", "xmlcharrefreplace", "namereplace")


def prepare() -> None:
    """Make the streams robust, once, when the command starts."""
    _open_closed()
    codecs.register_error(ESCAPING, _json_escape)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors not in LENIENT:
        sys.stdout.reconfigure(errors=ESCAPING)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.flush()
        sys.stderr = _NeverFailing(sys.stderr.buffer, sys.stderr.encoding, "backslashreplace", line_buffering=True)


def _open_closed() -> None:
    """Open closed descriptors again, lowest first, so that each gets its own number. Standard input is opened for
    writing and the others for reading, so that using them fails."""
    for number, name, mode, flags in (
        (0, "stdin", "r", os.O_WRONLY),
        (1, "stdout", "w", os.O_RDONLY),
        (2, "stderr", "w", os.O_WRONLY),
    ):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, flags) == number:
                setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _json_escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)), error.end


class _NeverFailing(io.TextIOWrapper):
    """A text stream that ignores errors of a closed, full or broken descriptor."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()

    def close(self) -> None:
        """Flush only: the descriptor belongs to the process, not to this object."""
        self.flush()


def flush_output() -> None:
    """Flush standard output. Raises OSError if that fails, and then drops the buffered text, since Python would try
    again at exit."""
    try:
        sys.stdout.flush()
    except OSError as error:
        drop_output()
        raise OSError(error.errno, error.strerror, OUTPUT) from None


def drop_output() -> None:
    """Discard the buffered text of standard output, and all later text."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def is_output_broken() -> bool:
    """Whether standard output is a pipe whose reader has closed it."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def read_prompt() -> str:
    """Standard input as text, without one newline at its end, which `echo` and editors add.

    Raises RequestError if it cannot be read or decoded.
    """
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise RequestError(f"standard input cannot be read: {error.strerror}") from None
    text = inputs.decode(data, "standard input", encoding())
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def encoding() -> str:
    """The encoding of standard input, from the console or PYTHONIOENCODING; UTF-8 instead of ASCII."""
    name = codecs.lookup(sys.stdin.encoding or "utf-8").name
    return "utf-8" if name == "ascii" else name


def check_argument(name: str, text: str | None) -> None:
    """Raise RequestError for an argument of the command line that is not valid in the console's encoding."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} holds bytes that are not {sys.getfilesystemencoding()} text") from None
