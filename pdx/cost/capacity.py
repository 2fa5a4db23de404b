"""What fits a chip, and from which batch on the chip is busy."""

from __future__ import annotations

import math

from pallas_kernels.hardware import Chip
from pdx.cost.phases import Setup

# The share of a chip's memory that is kept for programs, temporaries and fragmentation.
RESERVE = 0.05


def critical_batch(setup: Setup, chip: Chip) -> float:
    """The batch from which on a decode step's products take longer to compute than their weights to read.

    peak / bandwidth x bytes per weight / 2; with experts, all of which such a batch reads, about E / k times that.
    Activations are not counted, since they mostly stay on the chip.
    """
    return setup.streamed(math.inf) / (chip.hbm_gbps * 1e9) / setup.decode(1, 1).parts(chip)["products"][0]


def room(setup: Setup, chip: Chip, chips: int = 1) -> int:
    """Bytes for caches on `chips` chips beside the weights; negative if the weights alone do not fit."""
    return int(chip.hbm_bytes * (1 - RESERVE)) * chips - sum(setup.weights.values())


def largest_batch(setup: Setup, chip: Chip, context: int, chips: int = 1) -> int:
    """Rows of `context` tokens that fit, 0 if none does."""
    return max(0, room(setup, chip, chips) // setup.cache_bytes(1, context))


def largest_context(setup: Setup, chip: Chip, batch: int, chips: int = 1) -> int:
    """Tokens per row that fit for `batch` rows, up to the model's context."""
    low, high, left = 0, setup.cfg.max_context, room(setup, chip, chips)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if setup.cache_bytes(batch, middle) <= left else (low, middle - 1)
    return low


def best_batch(setup: Setup, chip: Chip, context: int, tpot: float, chips: int = 1) -> int:
    """The most rows that fit and decode a token within `tpot` seconds, 0 if not even one."""
    low, high = 0, largest_batch(setup, chip, context, chips)
    while low < high:
        middle = (low + high + 1) // 2
        ok = setup.decode(middle, context).seconds(chip, chips) <= tpot
        low, high = (middle, high) if ok else (low, middle - 1)
    return low


def end_to_end(ttft: float, tpot: float, tokens: int) -> float:
    """E2E = TTFT + (n - 1) TPOT."""
    return ttft + (tokens - 1) * tpot
