"""`pdx eval ppl`: the quality of a quantized model on a text, compared with the unquantized model."""

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

# Tokens per call. With a vocabulary of 262144, their f32 logits take 134 MB.
CHUNK = 128


@dataclass(frozen=True)
class Quality:
    """Quality over the scored tokens of a text.

    Attributes:
      perplexity, reference_perplexity: exp of the mean negative log-likelihood of the model, and of the reference.
      kl: mean KL(reference || model) in nats.
      top1_agreement: the share of positions at which both have the same most likely token.
      tokens: the number of scored tokens.
    """

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
    """Sliding windows over a text: (tokens, how many of the first ones are context only and not scored).

    Args:
      length, stride: tokens of a window, and from one window to the next.
      first: tokens that every window begins with, such as BOS.

    Raises:
      RequestError: a text with nothing to score, or a stride outside 1 to length - 1.
    """
    size = length - len(first)
    scored, at = (0 if first else 1), 0  # a token without a previous one is not scored
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
      reference: the unquantized model, with a cache of its own type; or `model` itself, to compare its `kv_dtype`.
      kv_dtype: type of the model's cache.
      length, stride: tokens of a window, and from one to the next; each token is scored once.
      max_tokens: tokens of the text to score; None or 0: all.

    Raises:
      RequestError: the text is too short, or a window does not fit the context.
      NotFiniteError: logits are NaN or infinite.
    """
    if length > model.config.max_context:
        raise RequestError(f"windows of {length} tokens do not fit the context of {model.config.max_context}")
    tokens = model.tokenizer.encode(text, add_special=False)[: max_tokens or None]
    sums, count = np.zeros(4), 0
    first = _Scorer(model, length, kv_dtype, kernels)
    same = reference is model and cache_dtype(kv_dtype, model) == cache_dtype(None, model)
    second = None if same else _Scorer(reference, length, None, kernels)
    for number, (part, known) in enumerate(windows(tokens, length, stride, model.tokenizer.opening)):
        pairs = ((x, x) for x in first.logits(part))
        if second is not None:
            pairs = zip(first.logits(part), second.logits(part), strict=True)
        for i, (mine, theirs) in enumerate(pairs):
            at = i * CHUNK + np.arange(CHUNK) + 1  # the logits of a token score the next one
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
    """Raise NotFiniteError that names the model whose figure is NaN or infinite."""
    for value, scored in zip(found[[1, 0, 2]], (reference, model, model), strict=True):
        if not np.isfinite(value):
            raise NotFiniteError(
                f"{where}: the logits of {scored.name} in {jnp.dtype(scored.dtype).name} are NaN or infinite, or give "
                "a token of the text probability 0: there is no perplexity (try another dtype)"
            )


class _Scorer:
    """Computes the logits of windows, a chunk at a time, with its own cache."""

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
        """The logits of every position, in arrays [CHUNK, V]; the last one is padded."""
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
    """[4] sums over the scored positions: the two negative log-likelihoods, KL divergence, top-1 agreements."""
    ours, reference = jax.nn.log_softmax(mine), jax.nn.log_softmax(theirs)
    pick = lambda x: -jnp.take_along_axis(x, targets[:, None], axis=1)[:, 0]  # noqa: E731
    # A token with probability 0 under the reference (-inf) adds 0 to the divergence.
    divergence = jnp.where(jnp.isneginf(reference), 0.0, jnp.exp(reference) * (reference - ours)).sum(-1)
    agreed = mine.argmax(-1) == theirs.argmax(-1)
    found = jnp.stack([pick(ours), pick(reference), divergence, agreed.astype(jnp.float32)])
    return jnp.where(scored, found, 0.0).sum(1)
