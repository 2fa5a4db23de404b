"""Which tokens a filter keeps, found without sorting the vocabulary.

Each filter orders the tokens: larger score first, and of equal scores the lower id first. Top-k keeps the first
k by logit; top-p keeps the shortest prefix by probability whose mass reaches p. Both keep the shortest prefix of
total weight >= target, and a prefix is described by its last token, a `Boundary`. That token is mostly among the
best few, which the maxima of groups give cheaply. If it is not, bisection brackets its score, with one masked sum
per step, until few tokens are left in the bracket. No step depends on other rows, and the path taken does not
change the result.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

GROUP = 128  # tokens with consecutive ids; the lane width of a TPU
CANDIDATES = 64
# Bisection first halves the distance between logits, which is quick for typical logits. After this many steps it halves
# the number of floats in between, which ends within 32 steps for any input.
VALUE_STEPS = 16

Weigh = Callable[[jax.Array], jax.Array]  # the nonnegative weight of a score, element by element


@struct.dataclass
class Boundary:
    """The last token kept in each row: larger values are kept, and of equal values those up to `id`."""

    value: Float[Array, " B"]
    id: Int[Array, " B"]

    @classmethod
    def everything(cls, rows: int) -> Boundary:
        return cls(jnp.full(rows, -jnp.inf), jnp.full(rows, jnp.iinfo(jnp.int32).max))

    def keeps(self, x: Float[Array, "B V"]) -> Bool[Array, "B V"]:
        value, last = self.value[:, None], self.id[:, None]
        return (x > value) | ((x == value) & (jnp.arange(x.shape[1]) <= last))

    def where(self, rows: Bool[Array, " B"], other: Boundary) -> Boundary:
        """This boundary in `rows`, the other one elsewhere."""
        return Boundary(jnp.where(rows, self.value, other.value), jnp.where(rows, self.id, other.id))


def pad(x: Float[Array, "B V"], value: float = -jnp.inf) -> Float[Array, "B W"]:
    """Pad the vocabulary to whole groups with tokens that cannot be chosen: logits by -inf, weights by 0."""
    extra = -x.shape[1] % GROUP
    return jnp.pad(x, ((0, 0), (0, extra)), constant_values=value) if extra else x


def best(x: Float[Array, "B W"]) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """The largest logit of each row and its lowest id.

    It goes by groups: on the CPU an argmax over the whole row runs element by element, ten times slower than a
    maximum. x is padded.
    """
    groups = x.reshape(x.shape[0], -1, GROUP)
    tops = groups.max(-1)
    group = jnp.argmax(tops, axis=-1)
    return tops.max(-1), group * GROUP + jnp.argmax(take_group(groups, group), axis=-1)


def take_group(groups: Float[Array, "B n g"], index: Int[Array, " B"]) -> Float[Array, "B g"]:
    return jnp.take_along_axis(groups, index[:, None, None], axis=1)[:, 0]


def candidates(
    x: Float[Array, "B W"], count: int = CANDIDATES, below: Float[Array, " B"] | None = None
) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    """The best `count` tokens of each row in order, among those smaller than `below`: scores and ids. x is padded.

    The best C tokens are in the C groups with the largest maxima. This holds for ties too: groups with equal maxima
    come in the order of their ids, and each holds at least one of the tied tokens.
    """

    def eligible(values):
        if below is not None:
            values = jnp.where(values < below.reshape(-1, *[1] * (values.ndim - 1)), values, -jnp.inf)
        return jnp.where(values == 0, 0.0, values)  # top_k would put 0.0 before -0.0

    rows, width = x.shape
    if width <= count * GROUP:
        return lax.top_k(eligible(x), count)
    groups = x.reshape(rows, -1, GROUP)
    chosen = lax.top_k(eligible(groups).max(-1), count)[1]
    chosen = -lax.top_k(-chosen, count)[0]  # back in the order of ids, by which top_k breaks ties
    inside = jnp.take_along_axis(groups, chosen[:, :, None], axis=1)
    values, at = lax.top_k(eligible(inside).reshape(rows, -1), count)
    return values, jnp.take_along_axis(chosen, at // GROUP, axis=1) * GROUP + at % GROUP


def first_k(x: Float[Array, "B W"], k: Int[Array, " B"], rows: Bool[Array, " B"]) -> Boundary:
    """The end of the k largest logits of `rows`; elsewhere everything is kept. x is padded, without NaN."""
    return _prefix(x, jnp.ones_like, k.astype(jnp.float32), rows, jnp.full(x.shape[0], -jnp.inf), _halve_logits)


def nucleus(
    weights: Float[Array, "B W"], p: Float[Array, " B"], rows: Bool[Array, " B"], least: Float[Array, " B"]
) -> Boundary:
    """The end of the smallest set with a share p of the weights of `rows`; elsewhere everything is kept.

    Exact up to the f32 rounding of the sum. A negative weight means no token; no weight is between 0 and `least`.
    """
    mass = jnp.maximum(weights, 0.0).reshape(weights.shape[0], -1, GROUP).sum(-1).sum(-1)
    # All weights below this add up to less than the share left out. The factor 0.5 leaves room for rounding.
    low = jnp.maximum(0.5 * (1 - p) * mass / weights.shape[1], least)
    # A sum reaches negative weights only after it has passed the target, or every other weight.
    return _prefix(weights, lambda w: w, p * mass, rows, low, _halve_floats)


def _prefix(x, weigh: Weigh, target, rows: Bool[Array, " B"], low, halve) -> Boundary:
    """The shortest prefix of total weight >= target, at least one token; it ends at `low` or above."""
    first = candidates(x)
    found, near = _among(*first, weigh, jnp.zeros_like(target), target)
    near = near.where(rows & found, Boundary.everything(x.shape[0]))
    missing = rows & ~found

    def search() -> Boundary:
        return _search(x, weigh, target, missing, low, first[0], halve).where(missing, near)

    return lax.cond(jnp.any(missing), search, lambda: near)


def _among(values, ids, weigh: Weigh, above, target) -> tuple[Bool[Array, " B"], Boundary]:
    """Look for the boundary among candidates; `above` is the total weight of the tokens that precede them."""
    enough = above[:, None] + jnp.cumsum(weigh(values), axis=1) >= target[:, None]
    at = jnp.argmax(enough, axis=1)[:, None]
    value, last = (jnp.take_along_axis(a, at, axis=1)[:, 0] for a in (values, ids))
    return jnp.any(enough, axis=1), Boundary(value, last)


@struct.dataclass
class _Bracket:
    """low <= the boundary's score < high, as order-preserving integers, and the weight at or above each."""

    step: Int[Array, ""]
    low: Int[Array, " B"]
    high: Int[Array, " B"]
    weight_low: Float[Array, " B"]
    weight_high: Float[Array, " B"]


def _search(x, weigh: Weigh, target, rows: Bool[Array, " B"], low, first, halve) -> Boundary:
    """The boundary of `rows` where it is not below `low` and not among the best candidates, `first`."""

    def weight_from(key):
        return jnp.sum(jnp.where(x >= _value(key)[:, None], weigh(x), 0.0), axis=1)

    def is_open(b: _Bracket):
        # Each token in the bracket weighs at least as much as its lowest score, which bounds their number.
        few = b.weight_low - b.weight_high <= CANDIDATES * weigh(_value(b.low))
        return rows & ~few & (b.high - 1 > b.low)

    def narrow(b: _Bracket) -> _Bracket:
        key = jnp.clip(halve(b), b.low + 1, b.high - 1)
        weight = weight_from(key)
        up, down = is_open(b) & (weight >= target), is_open(b) & ~(weight >= target)
        return _Bracket(
            b.step + 1,
            jnp.where(up, key, b.low),
            jnp.where(down, key, b.high),
            jnp.where(up, weight, b.weight_low),
            jnp.where(down, weight, b.weight_high),
        )

    last = first[:, -1:]
    above_last = jnp.sum(jnp.where(first > last, weigh(first), 0.0), axis=1)
    high = _key(last[:, 0]) + 1
    start = _Bracket(jnp.int32(0), _key(low), high, jnp.full_like(target, jnp.inf), above_last)
    b = lax.while_loop(lambda b: jnp.any(is_open(b)), narrow, start)
    low, high = _value(b.low), _value(b.high)
    found, boundary = _among(*candidates(x, below=high), weigh, b.weight_high, target)
    # Otherwise more tokens tie at one score than there are candidates. (Or the same weights, added in another order,
    # stay a rounding error below the target: then the whole bracket is kept.)
    each = jnp.maximum(weigh(low), jnp.finfo(jnp.float32).tiny)
    tied = x == low[:, None]
    needed = jnp.ceil((target - b.weight_high) / each)
    return boundary.where(found, Boundary(low, _nth(tied, needed)))


def _nth(mask: Bool[Array, "B W"], n: Float[Array, " B"]) -> Int[Array, " B"]:
    """The position of the n-th (from 1) true element of each row; n is at most the number of true elements."""
    # Counted in f32, exact below 2**24: XLA turns integer sums of this size into slow windowed ones on the CPU.
    groups = mask.astype(jnp.float32).reshape(mask.shape[0], -1, GROUP)
    counts = jnp.cumsum(groups.sum(-1), axis=1)
    n = jnp.clip(n, 1, counts[:, -1])
    group = jnp.argmax(counts >= n[:, None], axis=1)
    inside = take_group(groups, group)
    before = jnp.take_along_axis(counts, group[:, None], axis=1)[:, 0] - inside.sum(-1)
    return group * GROUP + jnp.argmax(jnp.cumsum(inside, axis=1) >= (n - before)[:, None], axis=1)


def _halve_logits(b: _Bracket) -> Int[Array, " B"]:
    """The next score to try: down in doubling strides, then half way between, at last as `_halve_floats`."""
    low, high = _value(b.low), _value(b.high)
    stride = jnp.exp2(b.step.astype(jnp.float32))
    logit = jnp.where(jnp.isneginf(low), high - stride, low + (high - low) * 0.5)
    return jnp.where((b.step < VALUE_STEPS) & jnp.isfinite(logit), _key(logit), _halve_floats(b))


def _halve_floats(b: _Bracket) -> Int[Array, " B"]:
    """Halve the number of floats in the bracket: ends within 32 steps for any input, and halves ratios of weights."""
    return (b.low >> 1) + (b.high >> 1) + (b.low & b.high & 1)


def _key(value: jax.Array) -> jax.Array:
    """Integers in the order of floats."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(key: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)


def random_key(seed: UInt[Array, " 2"], position: Int[Array, ""]) -> jax.Array:
    """The key of a row's randomness at a position."""
    return jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)


def draw(weights: Float[Array, "B W"], seeds: UInt[Array, "B 2"], positions: Int[Array, " B"]) -> Int[Array, " B"]:
    """Draw a token of each row with a probability in proportion to its weight, by two Gumbel draws: a group, by its
    total weight, then a token in it. `weights` are padded, not negative, and one of a row is above 0.

    The randomness of a row depends on its seed and position only. Noise per group and per place in a group is 100
    times less noise than per token. Unlike an inverse CDF, the choice does not change when all logits change by a
    rounding error.
    """
    groups = weights.reshape(weights.shape[0], -1, GROUP)
    count = groups.shape[1]

    def noise(seed, position):
        # mode "high": with 23 random bits a token of probability below 1e-7 would never be chosen.
        return jax.random.gumbel(random_key(seed, position), (count + GROUP,), mode="high")

    drawn = jax.vmap(noise)(seeds, positions)
    group = jnp.argmax(jnp.log(groups.sum(-1)) + drawn[:, :count], axis=-1)
    return group * GROUP + jnp.argmax(jnp.log(take_group(groups, group)) + drawn[:, count:], axis=-1)
