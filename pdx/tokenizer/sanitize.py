"""Keeps control tokens that users spell as plain text, by finding who wrote each control token of a rendered chat.

The prompt is rendered normally. Then the template is rendered again with marks in the text of users ("their words"
below), to see which control tokens of the prompt come from there. Marks are noncharacters of Unicode, which do not
occur in text. The ends of a text are marked too if they could form a control token together with the template's text,
such as `end|>` after `<|im_`.

1. In the second rendering, a mark replaces each character of a control token. If the two renderings are otherwise
   equal, the marked tokens are the users'. If not, this is tried again without marking the ends of texts, since a
   template may compare with `function`, which is a part of `<|function|>`.
2. Otherwise the template acts on a control token in the users' words, such as `content.split('</think>')`. So marks are
   put before and after the tokens. If the two renderings have the same control tokens in the same order, those beside a
   mark are the users'.
3. Otherwise the prompt is rendered from words in which marks break up the control tokens.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pdx.errors import RequestError

if TYPE_CHECKING:
    import tokenizers

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# Roles whose messages may contain control tokens: all keys of operators' messages, and the model's own answers, since
# `<think>` is a control token of many models.
_OPERATORS = ("system", "developer")
_MODELS = ("assistant", "model")
_ANSWER_KEYS = ("role", "content", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Prompt:
    """A rendered chat. `tokens`: control tokens that users spelled. In `text`, `mark` separates their characters."""

    text: str
    tokens: frozenset[str] = frozenset()
    mark: str = ""


class ControlTokens:
    """The control tokens of chats with one template, as texts."""

    def __init__(self, tokens: Iterable[str]):
        self.tokens = frozenset(filter(None, tokens))
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _starts(self) -> frozenset[str]:
        return frozenset(token[:cut] for token in self.tokens for cut in range(1, len(token)))

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(token[cut:] for token in self.tokens for cut in range(1, len(token)))

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.tokens), default=0)

    def separate_users(self, prompt: str, inputs: Mapping[str, Any], render: Callable[[dict[str, Any]], str]) -> Prompt:
        """The prompt, in which marks break up the control tokens that users spelled.

        Args:
          prompt: the template's text for `inputs`.
          inputs: the template's variables, JSON values.
          render: renders the same template with other variables.

        Raises RequestError if the messages contain so many different noncharacters that too few are left for marks.
        """
        if not self.tokens or self._marked(inputs, _MarkInside(mark="\0", borders=True)) == inputs:
            return Prompt(prompt)
        given = json.dumps({k: v for k, v in inputs.items() if not k.endswith("_token")}, ensure_ascii=False)
        free = (c for c in _NONCHARACTERS if c not in prompt + given and f"u{ord(c):x}" not in (prompt + given).lower())
        mark, after, before = (next(free, "") for _ in range(3))
        if not before:
            raise RequestError("the messages hold Unicode's noncharacters U+FDD0 to U+FDEF: remove them")
        marks, spans = mark + after + before, self._spans(prompt)

        def marked(style: _MarkInside) -> str:
            try:
                return render(self._marked(inputs, style))
            except RequestError:  # the template refuses marked words, which says nothing about the words themselves
                return ""

        for borders in (True, False):
            hidden = _unescaped(marked(_MarkInPlace(mark=mark, borders=borders)), marks)
            if len(hidden) == len(prompt) and all(h in (p, mark) for h, p in zip(hidden, prompt, strict=True)):
                return _break_up(prompt, spans, [mark in hidden[a:b] for a, b in spans], mark)
        if self._marked(inputs, _MarkInside(mark=mark)) == inputs:  # no user spells a control token
            return Prompt(prompt)
        plain, users = self._users(marked(_MarkBeside(mark=mark, after=after, before=before)), mark, after, before)
        tokens = [plain[a:b] for a, b in self._spans(plain)]
        others = Counter(token for token, is_users in zip(tokens, users, strict=True) if not is_users)
        # The template must write the tokens that are not users' also when the users' are hidden.
        own = Counter(self._pattern.findall(hidden))
        if tokens == [prompt[a:b] for a, b in spans] and all(n <= own[t] or t not in given for t, n in others.items()):
            return _break_up(prompt, spans, users, mark)
        plain, users = self._users(render(self._marked(inputs, _MarkInside(mark=mark))), mark, after, before)
        return _break_up(plain, self._spans(plain), users, mark)

    def _spans(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in self._pattern.finditer(text)]

    def _users(self, text: str, mark: str, after: str, before: str) -> tuple[str, list[bool]]:
        """A marked rendering without its marks, and for each control token in it whether a mark touches it."""
        pieces = re.split(f"([{mark}{after}{before}])", _unescaped(text, mark + after + before))
        plain = "".join(pieces[::2])
        places: dict[str, set[int]] = {mark: set(), after: set(), before: set()}
        at = 0
        for piece, found in zip(pieces[::2], pieces[1::2], strict=False):
            at += len(piece)
            places[found].add(at)
        anywhere = set().union(*places.values())
        users = [
            not anywhere.isdisjoint(range(a + 1, b)) or b in places[after] or a in places[before]
            for a, b in self._spans(plain)
        ]
        return plain, users

    def _marked(self, inputs: Mapping[str, Any], style: _MarkInside) -> dict[str, Any]:
        return {
            key: [self._message(message, style) for message in value]
            if key == "messages"
            # Named tokens such as BOS are the model's own.
            else value
            if key.endswith("_token")
            else self._value(value, style)
            for key, value in inputs.items()
        }

    def _message(self, message: Mapping[str, Any], style: _MarkInside) -> dict[str, Any]:
        role = message["role"]
        trusted = message.keys() if role in _OPERATORS else _ANSWER_KEYS if role in _MODELS else ()
        # The ends of a role are not marked: templates form control tokens from roles, `<|` + role + `|>`.
        return {
            key: value
            if key in trusted
            else self._text(value, style, ends=False)
            if key == "role"
            else self._value(value, style)
            for key, value in message.items()
        }

    def _value(self, value: Any, style: _MarkInside) -> Any:
        if isinstance(value, str):
            return self._text(value, style)
        if isinstance(value, dict):
            return {self._text(key, style, ends=False): self._value(item, style) for key, item in value.items()}
        return [self._value(item, style) for item in value] if isinstance(value, list) else value

    def _text(self, text: str, style: _MarkInside, *, ends: bool = True) -> str:
        marked = self._pattern.sub(style.token, text)
        return self._mark_ends(marked, style) if ends and style.borders else marked

    def _mark_ends(self, text: str, style: _MarkInside) -> str:
        words = text.strip()
        before = len(text) - len(text.lstrip())
        after = before + len(words)
        sizes = range(1, min(self._longest, len(words) + 1))
        start = any(words[:size] in self._ends for size in sizes) or self._is_inside(words)
        end = any(words[len(words) - size :] in self._starts for size in sizes)
        return text[:before] + style.ends(words, start, end) + text[after:]

    def _is_inside(self, words: str) -> bool:
        return 0 < len(words) < self._longest and any(words in token for token in self.tokens)


@dataclass(frozen=True, kw_only=True)
class _MarkInside:
    """Marks between the characters of a control token and, with `borders`, at the ends of a text that could become part
    of one."""

    mark: str
    borders: bool = False

    def token(self, match: re.Match[str]) -> str:
        return self.mark.join(match[0])

    def ends(self, words: str, start: bool, end: bool) -> str:
        return self.mark * start + words + self.mark * end


@dataclass(frozen=True, kw_only=True)
class _MarkInPlace(_MarkInside):
    """Marks instead of characters, so that the length stays the same."""

    def token(self, match: re.Match[str]) -> str:
        return self.mark * len(match[0])

    def ends(self, words: str, start: bool, end: bool) -> str:
        words = self.mark * start + words[start:]
        return words[: len(words) - end] + self.mark * end


@dataclass(frozen=True, kw_only=True)
class _MarkBeside(_MarkInside):
    """Marks before and after a control token, but not at the ends of the text, where templates look for tokens."""

    after: str
    before: str

    def token(self, match: re.Match[str]) -> str:
        ends_text = not match.string[match.end() :].strip()
        starts_text = not match.string[: match.start()].strip()
        after = "" if ends_text and not starts_text else self.after
        return ("" if starts_text else self.before) + match[0] + after


def _unescaped(text: str, marks: str) -> str:
    """A rendering in which escaped marks (`\\ufdd0`), as Python and JSON write them in quoted text, are marks again."""
    for mark in marks:
        text = re.sub(rf"\\+u{ord(mark):x}", mark, text, flags=re.IGNORECASE)
    return text


def _break_up(text: str, spans: list[tuple[int, int]], users: list[bool], mark: str) -> Prompt:
    chosen = [span for span, is_users in zip(spans, users, strict=True) if is_users]
    parts, done = [], 0
    for start, end in chosen:
        parts += [text[done:start], mark.join(text[start:end])]
        done = end
    return Prompt("".join([*parts, text[done:]]), frozenset(text[a:b] for a, b in chosen), mark)


def removing_marks(backend: tokenizers.Tokenizer, mark: str, tokens: frozenset[str]) -> tokenizers.Tokenizer:
    """The same tokenizer for texts in which `mark` breaks up the spellings of `tokens`. Its normalizer removes the
    marks after added tokens have been matched, so that the text is otherwise encoded as without marks."""
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        # A `normalized` token is matched after the normalizer, which removes the marks.
        token["normalized"] = token["normalized"] and token["content"] not in tokens
    drop = {"type": "Replace", "pattern": {"String": mark}, "content": ""}
    own = state["normalizer"]
    state["normalizer"] = {"type": "Sequence", "normalizers": [drop, *([own] if own else [])]}
    return type(backend).from_str(json.dumps(state))
