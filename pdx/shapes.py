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


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


def bucket(n: int, ladder: tuple[int, ...]) -> int:
    """The smallest rung of `ladder` (ascending) that holds `n`. Raises ValueError above the last one."""
    for rung in ladder:
        if n <= rung:
            return rung
    raise ValueError(f"{n} is more than the largest bucket, {ladder[-1]}")
