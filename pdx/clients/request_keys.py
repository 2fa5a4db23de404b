"""Finding misspelled or foreign names of settings among the keys of a request."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pdx.errors import RequestError

# difflib's ratio from which two names count as similar: max_token and temprature are misspellings, topic is not.
SIMILARITY = 0.86
# Names of pdx's settings in other programs.
_OTHER_NAMES = {
    "max_tokens": (
        "max_new_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "max_length",
        "num_predict",
        "n_predict",
    ),
    "temperature": ("temp", "do_sample"),
    "repetition_penalty": ("repeat_penalty", "rep_penalty"),
    "stop": ("stop_sequences", "stop_strings", "stop_words"),
    "stop_token_ids": ("eos_token_id",),
    "logprobs": ("top_logprobs", "n_probs"),
}
# Fields of OpenAI's API that pdx does not serve. They are refused, since ignoring them would change the answer.
_UNSUPPORTED = ("n", "best_of", "tools", "response_format", "min_tokens", "reasoning_effort")


def closest(key: str, names: Iterable[str]) -> str | None:
    """The name that `key` is probably a misspelling of; None if it is similar to none of them.

    >>> closest("temprature", ["temperature", "top_p"])
    'temperature'
    """
    plain = {_plain(name): name for name in names}
    found = difflib.get_close_matches(_plain(key), plain, 1, SIMILARITY)
    return plain[found[0]] if found else None


def check_keys(row: Mapping[str, Any], settings: Iterable[str]) -> None:
    """Raises RequestError for a key of a plain row that looks like a setting but is not one. Other keys are allowed."""
    elsewhere = {other: name for name, others in _OTHER_NAMES.items() for other in others}
    settings = set(settings)
    for key in row.keys() - settings:
        if name := elsewhere.get(key) or closest(key, settings):
            raise RequestError(f"{key!r} is no setting, but {name} is: write that, or rename your own key")
        if key in _UNSUPPORTED and row[key] not in (None, [], 1, {"type": "text"}):
            raise RequestError(f"{key!r} is no setting of pdx: leave it out, or rename your own key")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
