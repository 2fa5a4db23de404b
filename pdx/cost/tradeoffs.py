"""Optimizations with a price, computed with `pdx.cost`: speculation and chunked prefill."""

from __future__ import annotations

from pallas_kernels.hardware import Chip
from pdx.cost import Setup


def speculation(acceptance: float, draft: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """The speed of speculative decoding relative to plain decoding.

    Args:
      acceptance: probability that a drafted token is accepted, independent of the others.
      draft: tokens drafted per round.
      draft_cost, verify_cost: of one drafted token and of a verification, in decode steps.
    """
    return tokens_per_round(acceptance, draft) / (draft * draft_cost + verify_cost)


def tokens_per_round(acceptance: float, draft: int) -> float:
    """Tokens that a round of `draft` drafted tokens emits: (1 - a^(g+1)) / (1 - a)."""
    return draft + 1 if acceptance == 1 else (1 - acceptance ** (draft + 1)) / (1 - acceptance)


def break_even(draft: int, draft_cost: float, verify_cost: float = 1.0) -> float | None:
    """The acceptance from which on speculation pays; None if it never does."""
    if speculation(1.0, draft, draft_cost, verify_cost) <= 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if speculation(middle, draft, draft_cost, verify_cost) >= 1 else (middle, high)
    return high


def verify_cost(setup: Setup, chip: Chip, batch: int, context: int, draft: int, chips: int = 1) -> float:
    """The cost of verifying `draft` + 1 tokens per row, in decode steps."""
    whole = setup.verify(batch, context, draft)
    return whole.seconds(chip, chips) / setup.decode(batch, context).seconds(chip, chips)


def chunked_prefill(setup: Setup, chip: Chip, prompt: int, chunk: int, chips: int = 1) -> float:
    """Seconds of a prompt in chunks, each a separate prefill that reads the weights, and the keys and values so far,
    again."""
    starts = range(0, prompt, chunk)
    return sum(setup.prefill(1, min(chunk, prompt - at), at).seconds(chip, chips) for at in starts)


def longest_step(setup: Setup, chip: Chip, batch: int, context: int, prompt: int, chunk: int, chips: int = 1) -> float:
    """The longest time that `batch` decode rows of `context` tokens wait for a token while a prompt is prefilled, one
    chunk per step. Chunking gains the difference to `chunk` = `prompt`."""
    decoding, starts = [(1, context - 1)] * batch, range(0, prompt, chunk)
    return max(setup.mixed([*decoding, (min(chunk, prompt - at), at)]).seconds(chip, chips) for at in starts)


def largest_chunk(setup: Setup, chip: Chip, decode_batch: int, context: int, tpot: float, chips: int = 1) -> int:
    """The most prompt tokens beside `decode_batch` decode rows for which a step takes at most `tpot` seconds.

    All rows are `context` tokens long, the prompt too. 0 if not one token fits.
    """
    decoding = [(1, context - 1)] * decode_batch
    low, high = 0, context
    while low < high:
        middle = (low + high + 1) // 2
        ok = setup.mixed([*decoding, (middle, context - middle)]).seconds(chip, chips) <= tpot
        low, high = (middle, high) if ok else (low, middle - 1)
    return low
