"""Checks of a step's arguments over a dense cache, before the step is dispatched.

Types and shapes are always checked: that takes a microsecond. Values are checked with `check` only, since the host
would have to wait for a device that is still computing them.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from pdx.cache.dense import DenseCache
from pdx.cache.given import check_cache, flags, whole_numbers
from pdx.config import ModelConfig
from pdx.errors import RequestError


def chunk(cfg: ModelConfig, cache: DenseCache, tokens: Any, lengths: Any, check: bool) -> tuple[Any, Any]:
    """Check `tokens` [B, T] and `lengths` [B] of a chunk and return them, lists as arrays. Raises as `prefill`."""
    _check_kinds(cfg, cache)
    tokens = whole_numbers("tokens", tokens, (cache.batch, None), "[B, T]")
    lengths = whole_numbers("lengths", lengths, (cache.batch,), "[B]")
    if check and not _is_traced(cache.lengths, lengths):
        width, new = tokens.shape[1], np.asarray(lengths)
        if wrong := [int(n) for n in new if not 0 <= n <= width]:
            raise ValueError(f"a row is said to have {wrong[0]} new tokens, but the chunk is {width} wide")
        cache.check_room(new)
        if not _is_traced(tokens):
            _check_ids(np.asarray(tokens)[np.arange(width) < new[:, None]], cfg)
    return tokens, lengths


def newest(
    cfg: ModelConfig, cache: DenseCache, tokens: Any, active: Any, check: bool, steps: Any = 1
) -> tuple[Any, Any]:
    """Check `tokens` [B] and `active` [B] for `steps` decode steps and return them. Raises as `decode_step`."""
    _check_kinds(cfg, cache)
    tokens = whole_numbers("tokens", tokens, (cache.batch,), "[B]")
    active = flags("active", active, (cache.batch,), "[B]")
    if check and not _is_traced(cache.lengths, active, steps):
        taking_part = np.asarray(active)
        cache.check_room(taking_part * np.asarray(steps))
        if not _is_traced(tokens):
            _check_ids(np.asarray(tokens)[taking_part], cfg)
    return tokens, active


def _check_kinds(cfg: ModelConfig, cache: DenseCache) -> None:
    if not isinstance(cfg, ModelConfig):
        raise RequestError(f"cfg is {type(cfg).__name__}: it must be a ModelConfig, such as the config of a model")
    check_cache(cache, DenseCache)


def _is_traced(*values: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in values)


def _check_ids(ids: np.ndarray, cfg: ModelConfig) -> None:
    if ids.size and not (ids.min() >= 0 and ids.max() < cfg.vocab_size):
        wrong = ids[(ids < 0) | (ids >= cfg.vocab_size)][0]
        raise RequestError(f"tokens hold {wrong}, but the model's tokens are 0 to {cfg.vocab_size - 1}")
