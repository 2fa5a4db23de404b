"""The sampling settings that a model's files recommend: `generation_config.json`, or `general.sampling.*` in GGUF.

`pdx chat` and the chats of `pdx batch` use them unless told otherwise; everything else is greedy by default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from pdx.errors import RequestError
from pdx.sampling.options import FILTERS, SamplingOptions

# Of a GGUF file: llama.cpp's name -> the field of SamplingOptions.
_GGUF = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_DRAWN = ("temperature", *FILTERS)  # of no effect while the best token is taken
# Settings that would change an answer but that pdx lacks, each with the value that switches it off.
_OTHERS: dict[str, Any] = {
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "dola_layers": None,
    "typical_p": 1,
    "top_h": None,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "guidance_scale": 1,
    "watermarking_config": None,
    "constraints": None,
    "force_words_ids": None,
    "token_healing": False,
}
_GGUF_OTHERS: dict[str, Any] = {"xtc_probability": 0, "mirostat": 0, "sequence": ""}


@dataclass(frozen=True)
class Recommended:
    """Settings of `SamplingOptions` by name, and sentences about them for the user."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def from_generation_config(config: Mapping[str, Any]) -> Recommended:
    """What a `generation_config.json` says. As in transformers the best token is taken unless `do_sample` is true."""
    found = {name: config.get(name) for name in (*_DRAWN, "repetition_penalty")}
    found["stop"] = config.get("stop_strings")
    if not config.get("do_sample"):
        found |= dict.fromkeys(_DRAWN)
    elif found["temperature"] is None:
        found["temperature"] = 1.0
    return _recommended(found, _unsupported(config, _OTHERS), "generation_config.json")


def from_gguf(metadata: Mapping[str, Any]) -> Recommended:
    """What the `general.sampling.*` of a GGUF file say."""
    prefix = "general.sampling."
    said = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    found = {name: said.get(key) for key, name in _GGUF.items()}
    # The file holds 32-bit floats: 0.95 comes as 0.949999988.
    found = {
        name: value if isinstance(value, Integral | str | None) else float(f"{value:.6g}")
        for name, value in found.items()
    }
    if said.get("penalty_last_n") == 0:  # llama.cpp penalizes the last n tokens, pdx all of them
        found["repetition_penalty"] = None
    if found["temperature"] is None and any(found[name] is not None for name in _DRAWN):
        found["temperature"] = 1.0
    return _recommended(found, _unsupported(said, _GGUF_OTHERS), "the GGUF file")


def from_saved(settings: Any) -> Recommended:
    """What a checkpoint of pdx kept of them."""
    return _recommended(dict(settings) if isinstance(settings, Mapping) else {}, [], "the model's own files")


def _unsupported(config: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    unknown = {name: off for name, off in others.items() if name not in FILTERS}
    return [name for name, off in unknown.items() if (value := config.get(name)) is not None and value != off]


def _recommended(found: Mapping[str, Any], unsupported: list[str], source: str) -> Recommended:
    defaults, settings, wrong = SamplingOptions(), {}, []
    for name, value in found.items():
        if value is None or (name == "top_k" and value == -1):  # -1 is vLLM's off
            continue
        try:
            value = getattr(dataclasses.replace(defaults, **{name: value}), name)
        except RequestError as error:
            wrong.append(str(error))
            continue
        if value != getattr(defaults, name):
            settings[name] = value
    notes = []
    if settings:
        said = ", ".join(f"{name} {value}" for name, value in settings.items())
        notes.append(
            f"{source} recommends {said}: pdx chat and chats in pdx batch do so unless told otherwise, "
            "everything else is greedy unless asked"
        )
    if unsupported:
        notes.append(
            f"{source} sets {', '.join(unsupported)}, which pdx does not have: answers may differ from those "
            "of other programs"
        )
    notes += [f"{source} is not followed: {problem}" for problem in wrong]
    return Recommended(settings, tuple(notes))
