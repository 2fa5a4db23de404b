"""Token ids to text, one at a time, so that the texts add up to the text of the whole sequence.

The decoders of the `tokenizers` library take a whole sequence. Those of language models can also run token by token:
the text that a token adds depends only on the bytes of an unfinished character, and on whether the token is the first.
`DecodeRule` describes such a decoder; `StreamDecoder` runs it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from pdx.errors import UnsupportedModelError

_Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class DecodeRule:
    """How the pieces (tokens as the vocabulary spells them) become text.

    Attributes:
      byte_level: pieces spell bytes in GPT-2's alphabet; the text is their UTF-8 decoding.
      replace: (old, new) substitutions in every piece.
      first: the substitutions in the first piece; None: the same.
      byte_fallback: a piece `<0xNN>` is that byte, and consecutive ones are decoded together.
      strip: a character, and up to how many of it are removed from the start of the text.
    """

    byte_level: bool = False
    replace: _Pairs = ()
    first: _Pairs | None = None
    byte_fallback: bool = False
    strip: tuple[str, int] = ("", 0)

    @classmethod
    def from_decoder(cls, state: dict[str, Any] | None) -> DecodeRule:
        """From a decoder's description in `tokenizer.json`. Raises UnsupportedModelError for an unknown kind."""
        kind = state["type"] if state else None
        steps: list[dict[str, Any]] = [] if state is None else state["decoders"] if kind == "Sequence" else [state]
        kinds: list[str | None] = [step["type"] if step else None for step in steps] or [None]
        if kinds == ["ByteLevel"]:
            return cls(byte_level=True)
        if kinds == ["Metaspace"]:
            mark, scheme = steps[0]["replacement"], steps[0].get("prepend_scheme", "always")
            return cls(replace=((mark, " "),), first=None if scheme == "never" else ((mark, ""),))
        return cls._from_sequence(steps, kinds)

    @classmethod
    def _from_sequence(cls, steps: list[dict[str, Any]], kinds: list[str | None]) -> DecodeRule:
        count = kinds.count("Replace")
        rest = kinds[count:]
        patterns = [step.get("pattern", {}).get("String") for step in steps[:count]]
        known = rest in (["ByteFallback"], ["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"])
        if kinds[:count] != ["Replace"] * count or not known or None in patterns:
            raise UnsupportedModelError(
                f"pdx cannot stream a tokenizer whose decoder is {' > '.join(map(str, kinds))}; it knows ByteLevel, "
                "Metaspace, and Replace > ByteFallback > Fuse > Strip. `Tokenizer.decode` works on whole sequences."
            )
        strip = ("", 0)
        if rest[-1] == "Strip":
            if steps[-1]["stop"]:
                raise UnsupportedModelError("pdx cannot stream a decoder that strips the end of the text")
            strip = (steps[-1]["content"], steps[-1]["start"])
        replace = tuple((pattern, step["content"]) for pattern, step in zip(patterns, steps[:count], strict=True))
        return cls(replace=replace, byte_fallback=True, strip=strip)

    def piece_text(self, piece: str, *, first: bool = False) -> str:
        """The piece after substitutions. A byte piece stays `<0xNN>`."""
        pairs = self.first if first and self.first is not None else self.replace
        for old, new in pairs:
            piece = piece.replace(old, new)
        return piece

    def piece_alone(self, piece: str) -> str:
        """The text of one piece by itself, with its leading space. Incomplete characters become U+FFFD."""
        return self.bytes_alone(piece).decode("utf-8", "replace")

    def bytes_alone(self, piece: str) -> bytes:
        """The UTF-8 bytes of one piece by itself, with its leading space. They may be part of a character."""
        if self.byte_level:
            return _byte_level_bytes(piece)
        text = self.piece_text(piece)
        byte = _fallback_byte(text) if self.byte_fallback else None
        return text.encode("utf-8") if byte is None else bytes([byte])


class StreamDecoder:
    """Turns token ids into text, one at a time. The texts of `push` and `flush` add up to what `decode` returns.

    Bytes are held back until their character is complete. With byte fallback, a run of byte pieces is held back until
    the run ends, because `decode` turns the whole run into U+FFFD if any part of it is not UTF-8. The work per token is
    constant.
    """

    def __init__(self, rule: DecodeRule, piece_of: Callable[[int], str | None], skip: frozenset[str]):
        self._rule = rule
        self._piece_of = piece_of
        self._skip = skip
        self._start()

    def _start(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()
        self._first = True
        self._to_strip = self._rule.strip[1]

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" if it completes none."""
        piece = self._piece_of(token_id)
        if piece is None or piece in self._skip:
            return ""
        if self._rule.byte_level:
            return self._utf8.decode(_byte_level_bytes(piece))
        text = self._rule.piece_text(piece, first=self._first)
        self._first = False
        byte = _fallback_byte(text) if self._rule.byte_fallback else None
        if byte is not None:
            self._run.append(byte)
            return ""
        return self._strip(self._end_run() + text)

    def flush(self) -> str:
        """The rest of the text after the last token. Resets the decoder."""
        rest = self._utf8.decode(b"", True) + self._strip(self._end_run())
        self._start()
        return rest

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip(self, text: str) -> str:
        while text and self._to_strip:
            if text[0] != self._rule.strip[0]:
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text


def decoder_state(backend: Any) -> dict[str, Any] | None:
    """The decoder of a `tokenizers.Tokenizer` as in `tokenizer.json`; None if it has none."""
    return json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None


def _fallback_byte(piece: str) -> int | None:
    if len(piece) != 6 or not piece.startswith("<0x") or piece[5] != ">":
        return None
    try:
        return int(piece[3:5], 16)
    except ValueError:
        return None


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: character -> byte. Printable bytes are themselves, the others are U+0100, U+0101, ..."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in set(plain)]
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


def _byte_level_bytes(piece: str) -> bytes:
    alphabet = byte_alphabet()
    try:
        return bytes([alphabet[char] for char in piece])
    except KeyError:  # an added token written in plain text
        return piece.encode("utf-8")
