"""`pdx chat`: a conversation on a terminal that keeps its KV cache between turns.

Each turn sends the whole conversation. The engine's prefix cache holds the tokens of earlier turns, so only the new
ones are prefilled. A line after each answer says how many these were.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TextIO

from pdx.errors import ContextLengthError, PdxError, RequestError
from pdx.generation.completion import Completion
from pdx.generation.results import speculation_line
from pdx.io import inputs
from pdx.metrics import ServedTiming
from pdx.sampling.options import SamplingOptions

HELP = "/reset forgets the conversation, /exit ends it (so does the end of input); Ctrl-C stops an answer"


class Chat:
    """A conversation with an engine.

    Args:
      engine: a `pdx.Engine` with a prefix cache.
      options: sampling settings of every answer; `max_tokens` is reduced to the room left in the context.
      system: a system message, or None.
    """

    def __init__(self, engine, options: SamplingOptions, system: str | None = None):
        self.engine, self.options = engine, options
        self._system = [{"role": "system", "content": system}] if system is not None else []
        self.messages: list[dict[str, str]] = list(self._system)

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = list(self._system)

    def say(self, text: str, show: Callable[[str], None] = lambda piece: None) -> Completion:
        """Send a message and return the answer. `show` is called with its text piece by piece.

        Ctrl-C stops the answer. The part generated until then stays in the conversation.

        Raises:
          ContextLengthError: the conversation is too long for the model. The message is not added to it.
          EngineError: the answer failed.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self.engine.model.tokenizer.encode_chat(asked)
        room = self.engine.config.max_context - len(ids)
        if room < 1:
            raise ContextLengthError(
                f"the conversation has {len(ids)} tokens, the context "
                f"{self.engine.config.max_context}: /reset forgets it"
            )
        options = dataclasses.replace(self.options, max_tokens=min(self.options.max_tokens, room))
        stream = self.engine.submit(ids, options)
        try:
            for output in stream:
                show(output.text)
        except KeyboardInterrupt:
            stream.cancel()
        done = stream.result()
        self.messages = [*asked, {"role": "assistant", "content": done.text}]
        return done


def turn_summary(done: Completion) -> str:
    """One line about a turn: TTFT, TPOT, and how many tokens of its prompt were not in the cache."""
    timing, hits = done.timing, done.timing.hit_tokens if isinstance(done.timing, ServedTiming) else 0
    new = done.prompt_tokens - hits
    decode = f", TPOT {timing.tpot_s * 1e3:.1f} ms" if timing.tpot_s is not None else ""
    drafts = f"; drafts: {speculation_line(done.speculation)}" if done.speculation else ""
    return (
        f"[prefilled {new} new of {done.prompt_tokens} tokens, TTFT {timing.ttft_s * 1e3:.0f} ms; "
        f"{done.completion_tokens} tokens{decode}{drafts}; {done.finish_reason}]"
    )


def converse(
    chat: Chat, lines: Iterable[str], out: TextIO | None = None, err: TextIO | None = None
) -> list[Completion]:
    """Answer line after line; returns the answers. Their text goes to `out`, summaries and errors to `err`."""
    out, err = out or sys.stdout, err or sys.stderr

    def show(piece: str) -> None:
        out.write(piece)
        out.flush()

    turns: list[Completion] = []
    print(HELP, file=err)
    for line in lines:
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            chat.reset()
            print("[forgotten]", file=err)
        elif text.startswith("/"):
            print(HELP, file=err)
        elif text:
            try:
                done = chat.say(text, show)
                turns.append(done)
                show("\n")
                print(turn_summary(done), file=err)
            except PdxError as error:  # an error ends the turn, not the chat
                if chat.engine.is_closed:
                    raise
                print(
                    f"error: {error} (the message was not added to the conversation; /reset forgets it all)", file=err
                )
    return turns


def check_template(tokenizer, system: str | None) -> None:
    """Raise RequestError for a model without a chat template, or whose template refuses the system message."""
    hello = [{"role": "user", "content": "Hello"}]
    tokenizer.encode_chat(hello)
    if system is not None:
        try:
            tokenizer.encode_chat([{"role": "system", "content": system}, *hello])
        except PdxError as error:
            raise RequestError(f"this model takes no --system message: {error}") from None


def input_lines(prompt: str = "> ", encoding: str = "utf-8") -> Iterable[str]:
    """Lines of standard input, with a prompt and line editing on a terminal. A line that cannot be decoded is skipped
    with an error message."""
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                yield inputs.decode(line, f"line {number} of standard input", encoding)
            except RequestError as error:
                print(f"error: {error}", file=sys.stderr)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines with it)
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except UnicodeDecodeError as error:
            print(f"error: the line is not {error.encoding} text", file=sys.stderr)
