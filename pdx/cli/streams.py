"""The three standard streams of the command, made so that nothing is lost on them and nothing fails for their sake.

- Standard output takes every text: a character that its encoding lacks is written as JSON escapes it, `\\u4f60`. So an
  object that `--json` prints stays valid and exact.
- Standard error never fails: a message that nobody can read costs no answer.
- A descriptor that was closed (`>&-`) is opened again, so that no file of the command gets its number: reading or
  writing it is an error of its own, except for standard error, where it is silence.
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
# Handlers of the user's own choice that never raise.
LENIENT = ("replace", "ignore", "backslashreplace", "xmlcharrefreplace", "namereplace")


def mend() -> None:
    """Put the streams in order, once, as the command starts."""
    _open_closed()
    codecs.register_error(ESCAPING, _json_escape)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors not in LENIENT:
        sys.stdout.reconfigure(errors=ESCAPING)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.flush()
        sys.stderr = _NeverFailing(sys.stderr.buffer, sys.stderr.encoding, "backslashreplace", line_buffering=True)


def _open_closed() -> None:
    """Open closed descriptors again the wrong way round, lowest first, so that each gets its own number."""
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
    """Text to a stream that may be closed, full or a broken pipe."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()

    def close(self) -> None:
        """The descriptor is the process's, not this object's."""
        self.flush()


def flush_output() -> None:
    """Write what standard output still holds. Raises OSError where that fails, and drops it then: Python would try
    once more as it ends."""
    try:
        sys.stdout.flush()
    except OSError as error:
        drop_output()
        raise OSError(error.errno, error.strerror, OUTPUT) from None


def drop_output() -> None:
    """Send what standard output still holds, and all that follows, nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def is_output_broken() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def read_prompt() -> str:
    """Standard input as a text, less the newline at its end, which `echo` and editors put there.

    Raises RequestError for what is no text.
    """
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise RequestError(f"standard input cannot be read: {error.strerror}") from None
    text = inputs.decode(data, "standard input", encoding())
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def encoding() -> str:
    """Of standard input: as the console or PYTHONIOENCODING has it; where that is ASCII, UTF-8, which includes it."""
    name = codecs.lookup(sys.stdin.encoding or "utf-8").name
    return "utf-8" if name == "ascii" else name


def check_argument(name: str, text: str | None) -> None:
    """Raise RequestError for a text of the command line that is not of the console's encoding."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} holds bytes that are no {sys.getfilesystemencoding()} text") from None
