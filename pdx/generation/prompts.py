"""What a caller may give as prompts, and the token ids that it is: texts, chat messages, ids."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pdx.errors import RequestError
from pdx.sampling.options import SamplingOptions
from pdx.weights.load import Model

Prompt = str | Sequence[int] | Sequence[Mapping[str, object]]
_KINDS = "a text, chat messages or token ids (a list or a one-dimensional array of whole numbers)"


def encode(model: Model, prompt: Prompt) -> list[int]:
    """Token ids of a text, of chat messages (through the model's template), or ids as they are.

    Raises RequestError for anything else, and for ids outside the vocabulary.
    """
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt) if prompt else []
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        return model.tokenizer.encode_chat(prompt)
    ids = _whole_numbers(prompt)
    if bad := [t for t in ids if not 0 <= t < model.config.vocab_size]:
        raise RequestError(f"token id {bad[0]} is outside the vocabulary of {model.config.vocab_size}")
    return ids


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list of them. Raises RequestError for what is neither."""
    if isinstance(prompts, str):
        return [prompts]
    ndim = getattr(prompts, "ndim", None)
    prompts = prompts.tolist() if ndim == 1 else prompts
    if isinstance(prompts, bytes) or not (isinstance(prompts, Sequence) or ndim == 2):
        raise RequestError(f"a prompt is {_KINDS}, not {_said(prompts)}; give one, or a list of them")
    # An array without dimensions is a number.
    first = prompts[0] if len(prompts) else None
    is_one = isinstance(first, int | float | Mapping) or getattr(first, "ndim", None) == 0
    return [prompts] if is_one else list(prompts)


def spread(options: SamplingOptions | Sequence[SamplingOptions], count: int) -> list[SamplingOptions]:
    """The options of each of `count` prompts. Raises RequestError unless they are one set for all, or one a prompt."""
    if isinstance(options, SamplingOptions):
        return [options] * count
    if not isinstance(options, list | tuple) or not all(isinstance(o, SamplingOptions) for o in options):
        raise RequestError(f"options must be SamplingOptions or a list of them, one a prompt, not {_said(options)}")
    if len(options) != count:
        raise RequestError(f"{len(options)} options for {count} prompts: give one set for all, or one a prompt")
    return list(options)


def options_with(options: SamplingOptions | None, settings: Mapping[str, Any]) -> SamplingOptions:
    """`options` (None: the defaults) with single fields changed. Raises RequestError for what is no field."""
    if not isinstance(options, SamplingOptions | None):
        raise RequestError(f"options must be SamplingOptions, not {_said(options)}")
    known = [f.name for f in dataclasses.fields(SamplingOptions)]
    if unknown := [name for name in settings if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise RequestError(f"{unknown[0]} is no setting: {meant}")
    return dataclasses.replace(options or SamplingOptions(), **settings)


def check_bias(model: Model, options: SamplingOptions) -> None:
    """Raises RequestError for a logit_bias of a token that the model does not have, or one that bans every token."""
    if bad := [i for i in options.logit_bias or () if i >= model.config.vocab_size]:
        raise RequestError(
            f"logit_bias names token {bad[0]}, but the model's tokens are 0 to {model.config.vocab_size - 1}"
        )
    if sum(v == -math.inf for v in (options.logit_bias or {}).values()) == model.config.vocab_size:
        raise RequestError("logit_bias bans every token of the model: leave at least one")


def _whole_numbers(prompt: Any) -> list[int]:
    array = getattr(prompt, "tolist", None)
    items = array() if array and getattr(prompt, "ndim", None) == 1 else prompt
    if not isinstance(items, Sequence) or isinstance(items, bytes):
        raise RequestError(f"a prompt is {_KINDS}, not {_said(prompt)}")
    try:
        if any(isinstance(x, bool) for x in items):
            raise TypeError
        return [operator.index(x) for x in items]
    except TypeError:
        raise RequestError(f"a prompt is {_KINDS}, not {_said(prompt)}") from None


def _said(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"
