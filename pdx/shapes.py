"""The dimension legend, used in annotations, einsum strings and docstrings everywhere.

| letter | meaning                  | letter | meaning                            |
|--------|--------------------------|--------|------------------------------------|
| B      | batch rows               | K      | key/value heads                    |
| T      | query tokens of a call   | G      | query heads per KV head, N / K     |
| S      | cached tokens (capacity) | H      | head dimension                     |
| D      | model width              | V      | vocabulary                         |
| F      | feed-forward width       | L      | layers                             |
| N      | query heads              | E      | experts                            |
| P      | pages                    | p      | tokens of a page                   |

Shapes are written as strings for jaxtyping: ``Float[Array, "B T D"]``.
"""

from __future__ import annotations

# Of a cache: the multiple that slots are rounded to, the most drafted tokens that `truncate` can always take back, and
# the default for the most tokens that a call appends.
SLOT_MULTIPLE = 128
MAX_DRAFT = 16
DEFAULT_CHUNK = 512


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


def bucket(n: int, ladder: tuple[int, ...]) -> int:
    """The smallest rung of `ladder` (ascending) that holds `n`. Raises ValueError above the last one."""
    for rung in ladder:
        if n <= rung:
            return rung
    raise ValueError(f"{n} is more than the largest bucket, {ladder[-1]}")


def layer_slots(window: int | None, capacity: int, chunk: int) -> int:
    """Slots of a layer: the capacity, or what a window needs for chunks of `chunk` and drafts of 16."""
    if window is None:
        return capacity
    return min(capacity, round_up(window - 1 + max(chunk, MAX_DRAFT + 1), SLOT_MULTIPLE))
