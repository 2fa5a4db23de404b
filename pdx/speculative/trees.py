"""Token trees: the shape of a draft that offers several tokens at a place. No jax.

A chain of g tokens is lost behind its first wrong one. A tree offers the next best ones too, each with tokens of its
own behind it; one verification scores them all. Miao et al. 2024 (SpecInfer, arXiv 2305.09781).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pdx.errors import RequestError

# The most tokens of a draft: with the newest token they are what the attention op for decoding takes at once.
LONGEST_DRAFT = 15


@dataclass(frozen=True)
class Tree:
    """The shape of a token tree. Node 0 is the row's newest token; the others are drafted.

    Nodes are numbered level by level, and siblings from the best down.

    Attributes:
      parents: of the drafted nodes 1, 2, ..., up to 15.

    Raises:
      RequestError: no node, more than 15, or nodes in another order.

    Example: two tokens, and one behind each.
      >>> from pdx.speculative.trees import Tree
      >>> tree = Tree.of((2, 1))
      >>> tree.parents, tree.depths, tree.children
      ((0, 0, 1, 2), (0, 1, 1, 2, 2), ((1, 2), (3,), (4,), (), ()))
      >>> str(tree), Tree.parse("2x1") == tree
      ('2x1', True)
    """

    parents: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "parents", tuple(self.parents))
        drafted = len(self.parents)
        if not 1 <= drafted <= LONGEST_DRAFT:
            raise RequestError(
                f"a token tree of {drafted} tokens: 1 to {LONGEST_DRAFT} are verified at once, such as 3x2x1, "
                "which has 3 + 6 + 6"
            )
        in_order = all(0 <= p <= node for node, p in enumerate(self.parents))
        if not in_order or list(self.parents) != sorted(self.parents):
            raise RequestError(
                f"parents {self.parents} of a token tree: a parent comes before its children, and nodes are numbered "
                "level by level, so parents never descend"
            )

    @classmethod
    def of(cls, branching: Sequence[int]) -> Tree:
        """The tree in which each node of level i has `branching[i]` children. Raises RequestError."""
        parents: list[int] = []
        level = [0]
        for count in branching:
            if count < 1 or len(parents) > LONGEST_DRAFT:
                break
            first = len(parents) + 1
            parents += [node for node in level for _ in range(count)]
            level = list(range(first, len(parents) + 1))
        if any(count < 1 for count in branching):
            raise RequestError(f"a token tree of {'x'.join(map(str, branching))}: every number must be at least 1")
        return cls(tuple(parents))

    @classmethod
    def parse(cls, text: str) -> Tree:
        """The tree of a text such as `3x2x1`: three tokens, two behind each, one behind each of those.

        Raises RequestError.
        """
        numbers = text.split("x")
        if not all(n.isdecimal() for n in numbers):
            raise RequestError(f"a token tree is written as 3x2x1, got {text!r}")
        return cls.of([int(n) for n in numbers])

    def __str__(self) -> str:
        counts = [{len(self.children[node]) for node in level} for level in self.levels[:-1]]
        if all(len(of_level) == 1 for of_level in counts):
            return "x".join(str(*of_level) for of_level in counts)
        return f"tree {','.join(map(str, self.parents))}"

    @property
    def size(self) -> int:
        """Nodes, the newest token included."""
        return len(self.parents) + 1

    @property
    def depth(self) -> int:
        """The most drafted tokens that a round can keep."""
        return self.depths[-1]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Of each node; the newest token has depth 0."""
        found = [0]
        for parent in self.parents:
            found.append(found[parent] + 1)
        return tuple(found)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Of each node."""
        return tuple(tuple(i for i, p in enumerate(self.parents, 1) if p == node) for node in range(self.size))

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The nodes of each depth, from 0."""
        return tuple(tuple(i for i, d in enumerate(self.depths) if d == depth) for depth in range(self.depth + 1))

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes from the newest token to `node`, both included."""
        return (0,) if node == 0 else (*self.path(self.parents[node - 1]), node)

    @cached_property
    def mask(self) -> tuple[tuple[bool, ...], ...]:
        """mask[i][j]: whether node i sees node j, that is, j is i or one of its ancestors."""
        return tuple(tuple(j in self.path(i) for j in range(self.size)) for i in range(self.size))


def depth_of(level: int | Tree) -> int:
    """The most tokens that a round of this draft length, or of this tree, can keep."""
    return level.depth if isinstance(level, Tree) else level
