"""Names that settings of a request are given by mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pdx.errors import RequestError

# At least so alike (difflib's ratio): max_token and temprature are, topic and token_ids are not.
ALIKE = 0.86
# What other programs call the settings of pdx.
_ELSEWHERE = {
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
# Fields of OpenAI's rows that ask for something, which a plain row would lose in silence.
_NOT_HERE = ("n", "best_of", "tools", "response_format", "min_tokens", "reasoning_effort")


def closest(key: str, names: Iterable[str]) -> str | None:
    """The name that `key` most likely stands for; None if it is like none of them."""
    plain = {_plain(name): name for name in names}
    found = difflib.get_close_matches(_plain(key), plain, 1, ALIKE)
    return plain[found[0]] if found else None


def check_keys(row: Mapping[str, Any], settings: Iterable[str]) -> None:
    """Raises RequestError for a key of a plain row that looks like a setting and is none; other keys are free."""
    elsewhere = {other: name for name, others in _ELSEWHERE.items() for other in others}
    settings = set(settings)
    for key in row.keys() - settings:
        if name := elsewhere.get(key) or closest(key, settings):
            raise RequestError(f"{key!r} is no setting: {name} is. Write that, or give a key of your own another name")
        if key in _NOT_HERE and row[key] not in (None, [], 1, {"type": "text"}):
            raise RequestError(f"{key!r} is no setting of pdx: leave it out, or give a key of your own another name")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
