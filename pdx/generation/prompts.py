"""Preparing requests: prompts (texts, chat messages, token ids) to checked token ids, and the settings of each."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pdx.errors import ContextLengthError, PdxError, RequestError
from pdx.generation.completion import Row
from pdx.sampling.options import SamplingOptions
from pdx.tokenizer.messages import Messages
from pdx.weights.load import Model

Prompt = str | Sequence[int] | Sequence[Mapping[str, object]]
_ACCEPTED = "a text, chat messages or token ids (a list or a one-dimensional array of whole numbers)"


def encode(model: Model, prompt: Prompt) -> list[int]:
    """Token ids of a text or of chat messages (through the model's template). Token ids are returned as they are.

    Raises RequestError for anything else, and for ids outside the vocabulary.
    """
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt) if prompt else []
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        return model.tokenizer.encode_chat(cast(Messages, prompt))
    ids = _integers(prompt)
    if bad := [t for t in ids if not 0 <= t < model.config.vocab_size]:
        raise RequestError(f"token id {bad[0]} is outside the vocabulary of {model.config.vocab_size}")
    return ids


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list of prompts. Raises RequestError for any other type."""
    if isinstance(prompts, str):
        return [prompts]
    ndim, given = getattr(prompts, "ndim", None), cast(Any, prompts)
    given = given.tolist() if ndim == 1 else given
    if isinstance(given, bytes) or not (isinstance(given, Sequence) or ndim == 2):
        raise RequestError(f"a prompt is {_ACCEPTED}, not {_described(given)}; give one, or a list of them")
    # A zero-dimensional array is a token id.
    first = given[0] if len(given) else None
    is_one = isinstance(first, int | float | Mapping) or getattr(first, "ndim", None) == 0
    return [given] if is_one else list(given)


def options_with(options: SamplingOptions | None, settings: Mapping[str, Any]) -> SamplingOptions:
    """`options` (None: the defaults) with single fields changed. Raises RequestError for an unknown field."""
    if not isinstance(options, SamplingOptions | None):
        raise RequestError(f"options must be SamplingOptions, not {_described(options)}")
    known = [f.name for f in dataclasses.fields(SamplingOptions)]
    if unknown := [name for name in settings if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise RequestError(f"{unknown[0]} is no setting: {meant}")
    return dataclasses.replace(options or SamplingOptions(), **settings)


def options_of_each(
    options: SamplingOptions | Sequence[SamplingOptions] | None, settings: Mapping[str, Any], count: int
) -> list[SamplingOptions]:
    """The options of each of `count` prompts: one set for all, with single fields changed, or one set per prompt.

    Raises RequestError for anything else, and for `settings` together with one set per prompt.
    """
    if options is None or isinstance(options, SamplingOptions):
        return [options_with(options, settings)] * count
    if settings:
        raise RequestError(f"give {', '.join(settings)} in each request's options, or one set for all")
    if not isinstance(options, list | tuple) or not all(isinstance(o, SamplingOptions) for o in options):
        raise RequestError(
            f"options must be SamplingOptions or a list of them, one per prompt, not {_described(options)}"
        )
    if len(options) != count:
        raise RequestError(f"{len(options)} options for {count} prompts: give one set for all, or one per prompt")
    return list(options)


def check_bias(model: Model, options: SamplingOptions) -> None:
    """Raises RequestError for a logit_bias that names a token outside the vocabulary, or bans every token."""
    if bad := [i for i in options.logit_bias or () if i >= model.config.vocab_size]:
        raise RequestError(
            f"logit_bias names token {bad[0]}, but the model's tokens are 0 to {model.config.vocab_size - 1}"
        )
    if sum(v == -math.inf for v in (options.logit_bias or {}).values()) == model.config.vocab_size:
        raise RequestError("logit_bias bans every token of the model: leave at least one")


def prepared_rows(model: Model, prompts: Sequence[Prompt], options: Sequence[SamplingOptions]) -> list[Row]:
    """Tokenize and check requests. Raises RequestError or ContextLengthError that names the prompt."""
    rows = []
    for i, (prompt, option) in enumerate(zip(prompts, options, strict=True)):
        try:
            ids = servable_ids(model, prompt, option)
        except PdxError as error:
            raise type(error)(f"prompt {i}: {error}") from error
        rows.append(row_of(model, i, ids, option))
    return rows


def servable_ids(model: Model, prompt: Prompt, options: SamplingOptions) -> list[int]:
    """The token ids of a prompt, checked with its options.

    Raises RequestError for an empty or invalid prompt, ContextLengthError where the context is too short.
    """
    context, ids = model.config.max_context, encode(model, prompt)
    check_bias(model, options)
    if not ids:
        raise RequestError("the prompt is empty: give it at least one token")
    if len(ids) >= context:
        raise ContextLengthError(f"{len(ids)} tokens, but the context of {model.name} is {context}: shorten it")
    if len(ids) + options.max_tokens > context:
        raise ContextLengthError(
            f"{len(ids)} tokens and {options.max_tokens} more asked for, but the context of {model.name} is "
            f"{context}: ask for at most {context - len(ids)} (max_tokens)"
        )
    return ids


def row_of(model: Model, index: int, ids: list[int], options: SamplingOptions) -> Row:
    """A new request without generated tokens."""
    ends = frozenset(options.stop_token_ids) | (frozenset() if options.ignore_eos else model.tokenizer.eos_ids)
    return Row(index, ids, options, model.tokenizer.stream(), ends)


def _integers(prompt: Any) -> list[int]:
    array = getattr(prompt, "tolist", None)
    items = array() if array and getattr(prompt, "ndim", None) == 1 else prompt
    if not isinstance(items, Sequence) or isinstance(items, bytes):
        raise RequestError(f"a prompt is {_ACCEPTED}, not {_described(prompt)}")
    try:
        if any(isinstance(x, bool) for x in items):
            raise TypeError
        return [operator.index(x) for x in items]
    except TypeError:
        raise RequestError(f"a prompt is {_ACCEPTED}, not {_described(prompt)}") from None


def _described(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"
