"""Sampling once more, independently: one row at a time, in numpy, by sorting. And what the tests share."""

import jax.numpy as jnp
import numpy as np

from pdx.sampling.options import SamplingOptions


def adjust(logits: np.ndarray, options: SamplingOptions, prompt=(), output=()) -> np.ndarray:
    """Penalties and bias on one row, token by token."""
    x = np.array(logits, np.float64)
    for token in set(prompt) | set(output):
        penalty = options.repetition_penalty
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in set(output):
        x[token] -= options.presence_penalty + options.frequency_penalty * list(output).count(token)
    for token, bias in (options.logit_bias or {}).items():
        x[token] += bias
    return x


def keep(x: np.ndarray, options: SamplingOptions) -> tuple[np.ndarray, float]:
    """Which tokens of an adjusted row survive, and how far the top-p sum stays from p at its nearest."""
    order = np.lexsort((np.arange(len(x)), -x))
    if options.top_k:
        order = order[: options.top_k]
    weights = np.exp((x[order] - x[order[0]]) / options.temperature)
    margin = np.inf
    if options.top_p < 1:
        share = np.cumsum(weights) / weights.sum()
        margin = np.abs(share[:-1] - options.top_p).min(initial=np.inf)
        order = order[: np.searchsorted(share, options.top_p) + 1]
    order = order[weights[: len(order)] >= options.min_p]
    kept = np.zeros(len(x), bool)
    kept[order] = True
    return kept, margin


def probabilities(logits: np.ndarray, options: SamplingOptions, prompt=(), output=()) -> np.ndarray:
    """The distribution that one row's token must follow."""
    x = adjust(logits, options, prompt, output)
    if options.temperature == 0:
        return np.eye(len(x))[np.argmax(x)]
    kept, _ = keep(x, options)
    weights = np.where(kept, np.exp((x - x.max()) / options.temperature), 0.0)
    return weights / weights.sum()


PENALTIES = {"repetition_penalty": 1.5, "presence_penalty": 0.4, "frequency_penalty": 0.3}
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.2, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 1e-4},
    {"temperature": 1.0, "min_p": 0.15},
    {"temperature": 1.0, **PENALTIES},
    {"temperature": 1.0, "logit_bias": {0: 2.0, 3: -float("inf"), 11: 1.5}},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 8, "top_p": 0.85, "min_p": 0.02, "logit_bias": {1: 1.0}, **PENALTIES},
]


def mixed_batch(rows=8, vocab=9000):
    """Rows of every kind, some of which need the search and some of which do not."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(rows, vocab)) * np.linspace(0.5, 4, rows)[:, None]
    kinds = [
        {"temperature": 1.0, "top_p": 0.9},
        {},
        {"temperature": 0.7, "top_k": 40},
        {"temperature": 1.0},
        {"temperature": 1.3, "top_k": 500, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"repetition_penalty": 1.3, "logit_bias": {5: 3.0}},
        {"temperature": 0.9, "top_p": 0.99, **PENALTIES},
    ]
    options = [SamplingOptions(seed=100 + i, logprobs=3, **kinds[i % len(kinds)]) for i in range(rows)]
    prompts = [list(rng.integers(0, vocab, 50)) for _ in range(rows)]
    return jnp.asarray(logits, jnp.float32), options, prompts
