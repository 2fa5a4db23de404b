"""The matrices of a model, read from its parameter declarations: what the cost model counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp

from pdx.cost.planned_layers import Experts
from pdx.quant import STORED, Kind
from pdx.sharding import ArraySpec

SCALE_BYTES = 4
# The values of `ArraySpec.part`: of matrices, then of vectors.
PARTS = ("embedding", "projections", "mlp", "experts", "routing", "head")
VECTORS = ("norms", "biases")


@dataclass(frozen=True)
class Matrix:
    """One matrix of a model, [out, in], or one per expert; `part` is its group's name in tables."""

    name: str
    part: str
    out: int
    columns: int
    experts: Experts | None = None

    @property
    def copies(self) -> int:
        return self.experts.num_experts if self.experts else 1

    @property
    def used(self) -> int:
        """How many of its copies one token is multiplied with."""
        return self.experts.experts_per_token if self.experts else 1

    @property
    def size(self) -> int:
        """Parameters, all copies together."""
        return self.out * self.columns * self.copies

    @property
    def active(self) -> int:
        """Parameters that one token is multiplied with."""
        return self.out * self.columns * self.used

    def bytes(self, kind: Kind | None, dtype: str) -> int:
        """Bytes in memory, scales and offsets included."""
        if kind == STORED and self.experts and self.experts.stored_bits:
            return int(self.size * self.experts.stored_bits / 8)
        if kind is None or kind == STORED:
            return self.size * jnp.dtype(dtype).itemsize
        scales = self.copies * self.out * self.groups(kind) * (1 if kind.symmetric else 2)
        return self.size * kind.bits // 8 + SCALE_BYTES * scales

    def groups(self, kind: Kind) -> int:
        """The number of groups of columns that share a scale."""
        return self.columns // (kind.group_for(self.columns) or self.columns)


def matrices(specs: dict, experts: Experts | None = None) -> Iterator[Matrix]:
    """All matrices that `specs` declares, and the head where it is tied to the embedding.

    Args:
      specs: parameters as declared, by `pdx.model.param_specs` or `planned_specs`.
      experts: the mixture that stacked matrices belong to.
    """
    for name, spec in declared(specs):
        if spec.part not in VECTORS:
            yield Matrix(name, spec.part, *spec.shape[-2:], experts if spec.part == "experts" else None)
    if "lm_head" not in specs:
        yield Matrix("lm_head", "head", *specs["embed"].shape)


def vectors(specs: dict) -> list[ArraySpec]:
    """Norms, which are f32, and biases."""
    return [spec for _, spec in declared(specs) if spec.part in VECTORS]


def declared(specs: dict) -> Iterator[tuple[str, ArraySpec]]:
    """Every leaf with its name, such as `layers.3.q_proj`, in the order of the declarations.

    Raises ValueError for a leaf without a `part`.
    """
    for path, spec in _leaves(specs, ()):
        name = ".".join(path)
        if spec.part not in (*PARTS, *VECTORS):
            raise ValueError(
                f"{name} is declared with part {spec.part!r}: it must be one of {', '.join(PARTS + VECTORS)}"
            )
        yield name, spec


def _leaves(tree, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ArraySpec]]:
    if isinstance(tree, ArraySpec):
        yield path, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _leaves(value, (*path, str(key)))
