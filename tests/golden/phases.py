"""The logits of a batch by each way pdx has to them: one pass, chunks over a cache, one token a step."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pdx.cache.dense import init_cache
from pdx.config import ModelConfig
from pdx.model import Params, forward
from pdx.steps import decode_step, prefill, verify

# Stated once: f32 logits against another implementation's, wherever tests compare them.
TOLERANCE = 2e-4

whole_forward = jax.jit(partial(forward, cache=None), static_argnames=("cfg", "logits", "hidden_layers"))


def whole(params: Params, cfg: ModelConfig, tokens: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """[B, T, V] in one pass without a cache."""
    return np.asarray(whole_forward(params, cfg, jnp.asarray(tokens), lengths=jnp.asarray(lengths)).logits)


def chunked(params: Params, cfg: ModelConfig, tokens: np.ndarray, lengths: tuple[int, ...], chunk: int) -> np.ndarray:
    """[B, T, V] from chunks appended to a cache."""
    cache = init_cache(cfg, len(lengths), tokens.shape[1], chunk=chunk)
    parts = []
    for part, new in _chunks(tokens, lengths, chunk):
        logits, cache = verify(params, cfg, part, new, cache)
        parts.append(np.asarray(logits))
    return np.concatenate(parts, axis=1)


def chunk_ends(
    params: Params, cfg: ModelConfig, tokens: np.ndarray, lengths: tuple[int, ...], chunk: int
) -> list[tuple[int, int, np.ndarray]]:
    """(row, position, logits [V]) behind the last token of each row in each chunk, by `prefill`."""
    cache = init_cache(cfg, len(lengths), tokens.shape[1], chunk=chunk)
    found, held = [], np.zeros(len(lengths), int)
    for part, new in _chunks(tokens, lengths, chunk):
        logits, cache = prefill(params, cfg, part, new, cache)
        held += new
        found += [(row, int(held[row]) - 1, np.asarray(logits[row])) for row in np.flatnonzero(new)]
    return found


def prefilled_then_decoded(
    params: Params, cfg: ModelConfig, tokens: np.ndarray, lengths: tuple[int, ...], prompts: tuple[int, ...], chunk: int
) -> list[np.ndarray]:
    """For each row, logits [length - prompt + 1, V]: behind its prompt, then behind each token decoded after it.

    Prompts are prefilled in one chunk; one of length 0 is decoded from its first token on.
    """
    b, t = tokens.shape
    first, total = np.asarray(prompts), np.asarray(lengths)
    cache = init_cache(cfg, b, t, chunk=chunk)
    rows: list[list[np.ndarray]] = [[] for _ in lengths]
    if first.any():
        logits, cache = prefill(params, cfg, jnp.asarray(tokens[:, : first.max()]), first, cache)
        for row in np.flatnonzero(first):
            rows[row].append(np.asarray(logits[row]))
    for step in range(int((total - first).max())):
        position = first + step
        active = position < total
        column = tokens[np.arange(b), np.minimum(position, t - 1)]
        logits, cache = decode_step(params, cfg, jnp.asarray(column), jnp.asarray(active), cache)
        logits = np.asarray(logits)
        for row in np.flatnonzero(active):
            rows[row].append(logits[row])
    return [np.stack(r) for r in rows]


def _chunks(tokens: np.ndarray, lengths: tuple[int, ...], chunk: int):
    """The chunks of a ragged batch, each padded to `chunk` and with its new tokens a row."""
    for start in range(0, tokens.shape[1], chunk):
        part = tokens[:, start : start + chunk]
        part = np.pad(part, ((0, 0), (0, chunk - part.shape[1])))
        yield jnp.asarray(part), np.clip(np.asarray(lengths) - start, 0, chunk).astype(np.int32)


def difference(ours, reference: list[np.ndarray]) -> float:
    """The largest difference over every real position of every row; NaN stays NaN."""
    return float(np.max([np.abs(a[: len(b)] - b).max() for a, b in zip(ours, reference, strict=True)]))
