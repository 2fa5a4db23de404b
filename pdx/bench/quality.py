"""`pdx eval ppl`: what quantization costs in quality, on a text, against the model as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdx import steps
from pdx.cache.dense import init_cache
from pdx.errors import NotFiniteError, RequestError
from pdx.generation.generator import cache_dtype
from pdx.layers.kernels import layout_for
from pdx.weights.loaded import Model

# Tokens that go through the model together: a vocabulary of 262144 makes 134 MB of f32 logits of them.
CHUNK = 128


@dataclass(frozen=True)
class Quality:
    """Of the scored tokens: exp of the mean negative log-likelihood; and beside the reference, both following the same
    text, mean KL(reference || model) in nats and the share of positions with the same most likely token."""

    perplexity: float
    reference_perplexity: float
    kl: float
    top1_agreement: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def windows(
    tokens: Sequence[int], length: int, stride: int, first: Sequence[int] = ()
) -> Iterator[tuple[list[int], int]]:
    """Sliding windows over a text: tokens, and how many of its first ones are context that was scored before.

    Args:
      first: what each window opens with: the token that a model was trained to see at the start, if there is one.

    Raises:
      RequestError: a text with nothing to score, or a stride that a window does not hold.
    """
    size = length - len(first)
    scored, at = (0 if first else 1), 0  # a token that follows nothing is not scored
    if len(tokens) <= scored:
        raise RequestError(f"a text of {len(tokens)} tokens has nothing to score: at least two are needed")
    if not 1 <= stride < length:
        raise RequestError(f"a stride of {stride} does not fit a window of {length}: use 1 to {length - 1}")
    while scored < len(tokens):
        part = tokens[at : at + size]
        yield [*first, *part], len(first) + scored - at
        scored, at = at + len(part), at + stride


def evaluate(
    model: Model,
    reference: Model,
    text: str,
    *,
    kv_dtype=None,
    length: int = 512,
    stride: int = 256,
    max_tokens: int | None = None,
    kernels: str = "auto",
) -> Quality:
    """Perplexity of `model` over a text in sliding windows, and how far it is from `reference`.

    Args:
      reference: the same model unquantized; its cache is of its own type. The model itself: only its cache differs.
      kv_dtype: of the model's cache.
      length, stride: tokens of a window and from one to the next; each token is scored once.
      max_tokens: of the text; None: all.

    Raises:
      RequestError: a text too short, a window that does not fit the context.
      NotFiniteError: logits that are NaN or infinite, so that there is no perplexity.
    """
    if length > model.config.max_context:
        raise RequestError(f"windows of {length} tokens do not fit the context of {model.config.max_context}")
    tokens = model.tokenizer.encode(text, add_special=False)[: max_tokens or None]
    sums, count = np.zeros(4), 0
    first = _Scorer(model, length, kv_dtype, kernels)
    same = reference is model and cache_dtype(kv_dtype, model) == cache_dtype(None, model)
    second = None if same else _Scorer(reference, length, None, kernels)
    for number, (part, known) in enumerate(windows(tokens, length, stride, model.tokenizer.bos_prefix)):
        pairs = ((x, x) for x in first.logits(part))
        if second is not None:
            pairs = zip(first.logits(part), second.logits(part), strict=True)
        for i, (mine, theirs) in enumerate(pairs):
            at = i * CHUNK + np.arange(CHUNK) + 1  # logits behind a token score the next one
            scored = (known <= at) & (at < len(part))
            targets = np.asarray(part, np.int32)[np.minimum(at, len(part) - 1)]
            found = np.asarray(_compare(mine, theirs, targets, scored), np.float64)
            _check_finite(found, model, reference, f"window {number}, chunk {i} of {CHUNK} tokens")
            sums += found
            count += int(scored.sum())
    means = sums / count
    with np.errstate(over="ignore"):
        _check_finite(np.exp(means), model, reference, f"the {count} tokens together")
    return Quality(math.exp(means[0]), math.exp(means[1]), *means[2:].tolist(), count)


def _check_finite(found: np.ndarray, model: Model, reference: Model, where: str) -> None:
    """Raise NotFiniteError for the model whose figure is NaN or infinite."""
    for value, scored in zip(found[[1, 0, 2]], (reference, model, model), strict=True):
        if not np.isfinite(value):
            raise NotFiniteError(
                f"{where}: the logits of {scored.name} in {jnp.dtype(scored.dtype).name} are NaN or infinite, or leave "
                "a token of the text no chance: there is no perplexity (try another dtype)"
            )


class _Scorer:
    """Runs windows through a model, a chunk at a time, over a cache of its own."""

    def __init__(self, model: Model, length: int, kv_dtype, kernels: str):
        self.model, self.kernels = model, kernels
        self.cache = init_cache(
            model.config,
            1,
            -(-length // CHUNK) * CHUNK,
            chunk=CHUNK,
            mesh=model.mesh,
            dtype=cache_dtype(kv_dtype, model),
            layout=layout_for(kernels),
        )

    def logits(self, part: Sequence[int]) -> Iterator[jax.Array]:
        """Of every position, [CHUNK, V] at a time; the last chunk is padded."""
        self.cache = self.cache.truncate(np.zeros(1, np.int32))
        for at in range(0, len(part), CHUNK):
            ids, some = np.zeros((1, CHUNK), np.int32), part[at : at + CHUNK]
            ids[0, : len(some)] = some
            out, self.cache = steps.verify(
                self.model.params,
                self.model.config,
                ids,
                np.array([len(some)], np.int32),
                self.cache,
                kernels=self.kernels,
                check=False,
            )
            yield out[0]


@jax.jit
def _compare(mine, theirs, targets, scored):
    """Sums over the scored positions: both negative log-likelihoods, the divergence, the agreements."""
    ours, reference = jax.nn.log_softmax(mine), jax.nn.log_softmax(theirs)
    pick = lambda x: -jnp.take_along_axis(x, targets[:, None], axis=1)[:, 0]  # noqa: E731
    # A token that the reference excludes (-inf) has no part in the divergence.
    divergence = jnp.where(jnp.isneginf(reference), 0.0, jnp.exp(reference) * (reference - ours)).sum(-1)
    agreed = mine.argmax(-1) == theirs.argmax(-1)
    found = jnp.stack([pick(ours), pick(reference), divergence, agreed.astype(jnp.float32)])
    return jnp.where(scored, found, 0.0).sum(1)
