"""From logits to tokens: one pure function for a batch in which every row has its own settings.

The settings apply in this order, as in Hugging Face transformers:

1. repetition penalty (prompt and output), then presence and frequency penalties (output only);
2. logit bias, so that it is added as given;
3. temperature; at 0 the best token is taken here and nothing below matters;
4. top-k, then top-p over the probabilities that top-k leaves, then min-p.

Top-k keeps exactly k tokens, top-p the smallest set of mass >= p and at least one token; of equal logits the lower id
comes first. min-p compares with the best token, so it may come after top-p without changing what it removes.

All settings are arrays, so one compiled program serves every mix of them. Expensive parts run under a `lax.cond` on
whether any row needs them: a step of plain greedy rows runs an argmax and nothing else.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from pdx.errors import RequestError
from pdx.meshes import on_own_mesh
from pdx.sampling.filters import CANDIDATES, Boundary, best, candidates, draw, first_k, nucleus, pad
from pdx.sampling.options import MAX_LOGIT_BIAS, SamplingOptions

__all__ = ["SampleOutput", "SamplingOptions", "SamplingState", "filtered_logits", "sample"]

# Lower temperatures are raised to this one: it already separates f32 logits that differ by a rounding error.
COLDEST = 1e-6
# The token of a row that has none: see `sample`.
NO_TOKEN = -1
# The range of f32: settings beyond it, or a penalty that would round to 0, are replaced by these.
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


@struct.dataclass
class SamplingState:
    """The settings of a batch and the tokens its rows have seen, on the device: one pytree for all settings.

    It takes 5 bytes per row and vocabulary entry (10 MB for 8 rows of 262144). Rows without a request are greedy.

    Example:
      >>> state = pdx.SamplingState.create([pdx.SamplingOptions(temperature=0.7, seed=1)], vocab_size=64, batch=2)
      >>> state.observe(jnp.array([5, 9]), jnp.array([True, False])).output_counts.sum(-1).tolist()
      [1, 0]
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition: Float[Array, " B"]
    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]
    seeds: UInt[Array, "B 2"]
    bias_ids: Int[Array, "B M"]  # V where there is no entry; entries come first
    bias_values: Float[Array, "B M"]
    output_counts: Int[Array, "B V"]
    in_prompt: Bool[Array, "B V"]
    logprobs: Bool[Array, " B"]

    @classmethod
    @on_own_mesh
    def create(
        cls,
        options: Sequence[SamplingOptions],
        vocab_size: int,
        *,
        prompts: Sequence[Sequence[int]] | None = None,
        outputs: Sequence[Sequence[int]] | None = None,
        batch: int | None = None,
        on_host: bool = False,
    ) -> SamplingState:
        """The state of `batch` rows (None: one per option); the first rows get the options.

        Args:
          prompts: the token ids of each prompt, for the repetition penalty.
          outputs: the tokens that each request has generated so far, when it continues in another batch.
          on_host: return numpy arrays, for callers that must not wait for the device.

        Raises:
          RequestError: a prompt, output or logit bias names a token outside the vocabulary.
          ValueError: more options than rows, or another number of prompts or outputs than of options.
        """
        batch = len(options) if batch is None else batch
        if len(options) > batch:
            raise ValueError(f"{len(options)} requests do not fit a batch of {batch} rows")
        rows = [*options, *[SamplingOptions(seed=0)] * (batch - len(options))]

        def column(values, dtype):
            return np.array(list(values), dtype)

        def setting(name):
            return column((min(getattr(o, name), LARGEST) for o in rows), np.float32)

        seeds = [secrets.randbits(64) if o.seed is None else o.seed for o in rows]
        bias_ids, bias_values = _bias_arrays(rows, vocab_size)
        in_prompt, output_counts = np.zeros((batch, vocab_size), bool), np.zeros((batch, vocab_size), np.int32)
        for row, ids in _histories("prompts", prompts, options, vocab_size):
            in_prompt[row, ids] = True
        for row, ids in _histories("outputs", outputs, options, vocab_size):
            np.add.at(output_counts[row], ids, 1)
        made = cast(Any, cls)(  # with numpy arrays, which become jax's below
            temperature=setting("temperature"),
            top_k=column((o.top_k if o.top_k < vocab_size else 0 for o in rows), np.int32),
            top_p=setting("top_p"),
            min_p=setting("min_p"),
            repetition=np.maximum(setting("repetition_penalty"), np.float32(SMALLEST)),
            presence=setting("presence_penalty"),
            frequency=setting("frequency_penalty"),
            seeds=column(([seed >> 32, seed & 0xFFFFFFFF] for seed in seeds), np.uint32).reshape(batch, 2),
            bias_ids=bias_ids,
            bias_values=bias_values,
            output_counts=output_counts,
            in_prompt=in_prompt,
            logprobs=column((o.logprobs is not None for o in rows), bool),
        )
        return made if on_host else jax.tree.map(jnp.asarray, made)

    def observe(self, tokens: Int[Array, " B"], active: Bool[Array, " B"]) -> SamplingState:
        """The state after `tokens` were emitted in the active rows; updated in place where it is donated."""
        counts = self.output_counts
        # A negative token means none; its index past the end is dropped.
        column = jnp.where(active & (tokens >= 0), tokens, counts.shape[1])
        return cast(Any, self).replace(output_counts=counts.at[jnp.arange(tokens.shape[0]), column].add(1, mode="drop"))

    def put(self, row: int | Int[Array, ""], one: SamplingState) -> SamplingState:
        """The state with row `row` replaced by the only row of `one`."""
        return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, row, 0), self, one)


@struct.dataclass
class SampleOutput:
    """One token per row. Rows that asked for no log-probabilities have inf there, and ids of -1."""

    tokens: Int[Array, " B"]
    logprob: Float[Array, " B"]
    top_ids: Int[Array, "B n"]
    top_logprobs: Float[Array, "B n"]


@partial(jax.jit, static_argnames=("num_logprobs", "mark_broken"))
def sample(
    logits: Float[Array, "B V"],
    state: SamplingState,
    positions: Int[Array, " B"],
    *,
    num_logprobs: int = 0,
    allowed: Bool[Array, "B V"] | None = None,
    mark_broken: bool = False,
) -> SampleOutput:
    """Choose the next token of every row.

    A row depends only on its own logits, settings, seed and position, not on its slot, other rows or the batch
    size. The token is drawn from the distribution of `filtered_logits` by two Gumbel draws: a group of 128 tokens by
    its total mass, then a token in it. A row whose best logit is not finite (NaN, or every token banned) is not
    drawn: it gets the argmax, which is a token id in any case, or -1 with `mark_broken`.

    Args:
      positions: the position of each row's new token in its sequence.
      num_logprobs: the width n of the alternatives reported (static, at most 64).
      allowed: tokens that may be chosen, at least one per row; the others are banned, after penalties and bias.
      mark_broken: give -1 (`NO_TOKEN`) to rows with a NaN or +inf among their logits, or with only -inf, so that no
        such token is taken for an answer (static). It costs no pass over the logits, except with `allowed`.

    Returns:
      Tokens int32. Log-probabilities are those of the logits as given, before any setting.
    """
    most = min(CANDIDATES, logits.shape[1])
    if not 0 <= num_logprobs <= most:
        raise ValueError(f"num_logprobs is {num_logprobs}: it must be from 0 to {most}")
    logits = logits.astype(jnp.float32)

    def choose_drawn(x, top) -> Int[Array, " B"]:
        weights, kept = _weights(x, top, state)
        return draw(jnp.where(kept, weights, 0.0), state.seeds, positions)

    def choose() -> tuple[Float[Array, " B"], Int[Array, " B"]]:
        x = _adjusted(logits, state)
        x = pad(x if allowed is None else jnp.where(allowed, x, -jnp.inf))
        top, token = best(x)
        drawn = _is_drawn(state, top)
        return top, lax.cond(jnp.any(drawn), lambda: jnp.where(drawn, choose_drawn(x, top), token), lambda: token)

    if allowed is None:
        plain = ~jnp.any(_is_adjusted(state) | (state.temperature > 0))
        top, tokens = lax.cond(plain, lambda: best(pad(logits)), choose)
    else:
        top, tokens = choose()
    tokens = jnp.minimum(tokens, logits.shape[1] - 1).astype(jnp.int32)
    out = SampleOutput(tokens, *logprobs_of(logits, tokens, state.logprobs, num_logprobs))
    if not mark_broken:
        return out
    finite = jnp.isfinite(top)
    if allowed is not None:  # a mask may hide a NaN
        finite &= jnp.isfinite(logits.max(-1))
    return cast(Any, out).replace(tokens=jnp.where(finite, tokens, NO_TOKEN))


@jax.jit
def filtered_logits(logits: Float[Array, "B V"], state: SamplingState) -> Float[Array, "B V"]:
    """The logits whose softmax is the distribution that `sample` draws from: f32, -inf for dropped tokens.

    Greedy rows keep one token.
    """
    x = pad(_adjusted(logits.astype(jnp.float32), state))
    top, token = best(x)
    drawn = _is_drawn(state, top)
    kept = _weights(x, top, state)[1]
    kept = jnp.where(drawn[:, None], kept, jnp.arange(x.shape[1]) == token[:, None])
    scale = jnp.where(drawn, _inverse_temperature(state), 1.0)
    return jnp.where(kept, x * scale[:, None], -jnp.inf)[:, : logits.shape[1]]


def _is_adjusted(state: SamplingState) -> Bool[Array, " B"]:
    penalized = (state.repetition != 1) | (state.presence != 0) | (state.frequency != 0)
    return penalized | (state.bias_ids[:, 0] < state.output_counts.shape[1])


def _adjusted(logits: Float[Array, "B V"], state: SamplingState) -> Float[Array, "B V"]:
    """Penalties, then bias. A row without them keeps its logits bit for bit.

    There is no `lax.cond`: a branch that returns [B, V] copies the logits even where it is not taken.
    """
    count = state.output_counts
    repetition = jnp.where((count > 0) | state.in_prompt, state.repetition[:, None], 1.0)
    x = jnp.where(logits > 0, logits / repetition, logits * repetition)
    x -= state.frequency[:, None] * count + jnp.where(count > 0, state.presence[:, None], 0.0)
    return x.at[jnp.arange(x.shape[0])[:, None], state.bias_ids].add(state.bias_values, mode="drop")


def _is_drawn(state: SamplingState, top: Float[Array, " B"]) -> Bool[Array, " B"]:
    return (state.temperature > 0) & jnp.isfinite(top)


def _inverse_temperature(state: SamplingState) -> Float[Array, " B"]:
    return 1 / jnp.maximum(state.temperature, COLDEST)


def _weights(x, top, state: SamplingState) -> tuple[Float[Array, "B W"], Bool[Array, "B W"]]:
    """Probabilities relative to the best token's, of the padded logits, and which tokens the filters keep."""
    drawn, rows = _is_drawn(state, top), x.shape[0]
    by_k, by_p = drawn & (state.top_k > 0), drawn & (state.top_p < 1)
    everything = Boundary.everything(rows)

    def weigh(logits):
        return jnp.exp((logits - jnp.where(drawn, top, 0.0)[:, None]) * _inverse_temperature(state)[:, None])

    k = lax.cond(jnp.any(by_k), lambda: first_k(x, state.top_k, by_k), lambda: everything)
    # -1 and not 0, so that the weights alone show what top-k dropped. This saves a pass over the logits.
    weights = jnp.where(k.keeps(x), weigh(x), -1.0)
    least = weigh(k.value[:, None])[:, 0] * (1 - 1e-6)  # an exp of another shape may round otherwise
    p = lax.cond(jnp.any(by_p), lambda: nucleus(weights, state.top_p, by_p, least), lambda: everything)
    return weights, p.keeps(weights) & (weights >= state.min_p[:, None])


def logprobs_of(logits: Float[Array, "B V"], tokens: Int[Array, " B"], asked: Bool[Array, " B"], n: int):
    """Log-probabilities of the chosen tokens, and ids and log-probabilities of the n best, where they are asked for."""
    rows = logits.shape[0]

    # inf is no log-probability, and unlike NaN it does not trip `jax_debug_nans`.
    def compute():
        norm = jax.nn.logsumexp(logits, axis=1)
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - norm
        values, ids = (a[:, :n] for a in candidates(pad(logits), max(n, 1)))
        return (
            jnp.where(asked, chosen, jnp.inf),
            jnp.where(asked[:, None], ids, -1),
            jnp.where(asked[:, None], values - norm[:, None], jnp.inf),
        )

    def nothing():
        return jnp.full(rows, jnp.inf), jnp.full((rows, n), -1, jnp.int32), jnp.full((rows, n), jnp.inf)

    return lax.cond(jnp.any(asked), compute, nothing)


def _bias_arrays(rows: Sequence[SamplingOptions], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(rows), MAX_LOGIT_BIAS), vocab_size, np.int32)
    values = np.zeros((len(rows), MAX_LOGIT_BIAS), np.float32)
    for row, options in enumerate(rows):
        bias = options.logit_bias or {}
        _check_ids("logit_bias", list(bias), vocab_size)
        ids[row, : len(bias)] = list(bias)
        values[row, : len(bias)] = [v if v == -np.inf else min(max(v, -LARGEST), LARGEST) for v in bias.values()]
    return ids, values


def _histories(name: str, given, options: Sequence[SamplingOptions], vocab_size: int):
    if given is None:
        return
    if len(given) != len(options):
        raise ValueError(f"{len(given)} {name} for {len(options)} requests")
    for row, ids in enumerate(given):
        _check_ids(name, ids, vocab_size)
        yield row, np.asarray(ids, np.int64)


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise RequestError(f"{name} names token {wrong}, but the model's tokens are 0 to {vocab_size - 1}")
