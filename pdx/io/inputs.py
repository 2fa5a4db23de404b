"""Reading and decoding the text files of commands."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path

from pdx.errors import RequestError
from pdx.io.outputs import reason


def decode(data: bytes, where: str, encoding: str = "utf-8") -> str:
    """Bytes as text, without a byte-order mark. Raises RequestError, beginning with `where`, if they are not text.

    >>> decode(b"\\xef\\xbb\\xbfHello", "the file")
    'Hello'
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise RequestError(f"{where}: not readable as text: it is UTF-16, save it as UTF-8")
    try:
        text = data.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        raise RequestError(f"{where}: not readable as {encoding.upper()} text ({error})") from None
    if "\0" in text:
        raise RequestError(f"{where}: not readable as text: it holds NUL bytes, as binary files and UTF-16 do")
    return text


def lines(path: Path) -> list[str]:
    """The lines of a JSONL file. Raises RequestError for a file that cannot be read.

    Only a line feed ends a line, since JSON texts may contain the other line breaks of `str.splitlines`.
    """
    return read(path).split("\n")


def read(path: Path | None, otherwise: Callable[[], str] = str) -> str:
    """A file's text; without a file, `otherwise()`. Raises RequestError for a file that cannot be read."""
    if path is None:
        return otherwise()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {reason(error)}") from None
    return decode(data, str(path))
