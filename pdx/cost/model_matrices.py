"""What a model consists of, matrix by matrix: what the cost model counts.

`Experts` and `Latent` describe layers that pdx plans with and does not run yet; `pdx.model` knows neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp

from pdx.config import ModelConfig
from pdx.quant import STORED, Kind

SCALE_BYTES = 4
PARTS = ("embedding", "projections", "mlp", "experts", "routing", "head")


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of the MLP. Shazeer et al. 2017.

    Attributes:
      num_experts, experts_per_token: E, and k of them for each token.
      d_expert: feed-forward width of one.
      d_shared: width of what every token passes beside them, all shared experts together; 0: none.
      dense_layers: so many of the first layers have the config's MLP instead.
      stored_bits: bits a weight of an expert takes as published, scales included, where that is no float (MXFP4: 4.25).
    """

    num_experts: int
    experts_per_token: int
    d_expert: int
    d_shared: int = 0
    dense_layers: int = 0
    stored_bits: float | None = None

    def __post_init__(self):
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} is not one of 1 to {self.num_experts}")
        if self.d_expert < 1 or self.d_shared < 0 or self.dense_layers < 0:
            raise ValueError("d_expert must be at least 1, d_shared and dense_layers at least 0")

    def read(self, tokens: int) -> float:
        """The share of the experts that a layer reads for `tokens` tokens, if each picks its own at random:
        1 - (1 - k/E)^tokens."""
        return 1 - (1 - self.experts_per_token / self.num_experts) ** tokens


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: keys and values of all heads are made from one cached vector a token.
    DeepSeek-V2, arXiv 2405.04434.

    Attributes:
      q_rank, kv_rank: of the two low-rank projections; kv_rank + rope_dim numbers a token and layer are cached.
      nope_dim, rope_dim: of a query and key head, without and with a position.
      value_dim: of a value head.
    """

    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def __post_init__(self):
        if min(self.q_rank, self.kv_rank, self.nope_dim, self.rope_dim, self.value_dim) < 1:
            raise ValueError(f"{self}: every size must be at least 1")

    @property
    def cached(self) -> int:
        return self.kv_rank + self.rope_dim

    def attention_flops(self, heads: int, pairs: int, held: int) -> int:
        """Of `pairs` of a query and a key, behind `held` cached tokens: the cheaper of two orders.

        Absorbed (decode), scores and sums are taken in the latent space. Expanded (prefill), heads are as small as in
        any other model, but the keys and values of held tokens are made again.
        """
        absorbed = 2 * pairs * heads * (2 * self.kv_rank + self.rope_dim)
        expanded = 2 * pairs * heads * (self.nope_dim + self.rope_dim + self.value_dim)
        return min(absorbed, expanded + 2 * held * heads * (self.nope_dim + self.value_dim) * self.kv_rank)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a model, [out, in], or one of every expert; `part` is what tables call the group it belongs to."""

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
        """Copies that one token is multiplied with."""
        return self.experts.experts_per_token if self.experts else 1

    @property
    def size(self) -> int:
        """Parameters, all copies together."""
        return self.out * self.columns * self.copies

    @property
    def active(self) -> int:
        """Parameters that one token meets."""
        return self.out * self.columns * self.used

    def bytes(self, kind: Kind | None, dtype: str) -> int:
        """In memory, scales and offsets included."""
        if kind == STORED and self.experts and self.experts.stored_bits:
            return int(self.size * self.experts.stored_bits / 8)
        if kind is None or kind == STORED:
            return self.size * jnp.dtype(dtype).itemsize
        scales = self.copies * self.out * self.groups(kind) * (1 if kind.symmetric else 2)
        return self.size * kind.bits // 8 + SCALE_BYTES * scales

    def groups(self, kind: Kind) -> int:
        """Of columns that share a scale."""
        return self.columns // (kind.group_for(self.columns) or self.columns)


def matrices(cfg: ModelConfig, experts: Experts | None = None, latent: Latent | None = None) -> Iterator[Matrix]:
    """All matrices as `pdx.model.param_specs` declares them, the head too where it is tied to the embedding."""
    d = cfg.d_model
    for i in range(cfg.num_layers):
        for name, out, columns in _projections(cfg, latent):
            yield Matrix(f"layers.{i}.{name}_proj", "projections", out, columns)
        if experts is None or i < experts.dense_layers:
            yield from _gated(f"layers.{i}", "mlp", cfg.d_ff, d)
            continue
        yield Matrix(f"layers.{i}.router", "routing", experts.num_experts, d)
        yield from _gated(f"layers.{i}.experts", "experts", experts.d_expert, d, experts)
        if experts.d_shared:
            yield from _gated(f"layers.{i}.shared", "mlp", experts.d_shared, d)
    yield Matrix("embed", "embedding", cfg.vocab_size, d)
    yield Matrix("lm_head", "head", cfg.vocab_size, d)


def _projections(cfg: ModelConfig, latent: Latent | None) -> Iterator[tuple[str, int, int]]:
    d, n = cfg.d_model, cfg.num_heads
    if latent is None:
        q, kv = n * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        yield from (("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q))
        return
    yield from (("q_a", latent.q_rank, d), ("q_b", n * (latent.nope_dim + latent.rope_dim), latent.q_rank))
    yield from (("kv_a", latent.cached, d), ("kv_b", n * (latent.nope_dim + latent.value_dim), latent.kv_rank))
    yield "o", d, n * latent.value_dim


def _gated(where: str, part: str, f: int, d: int, experts: Experts | None = None) -> Iterator[Matrix]:
    for name, out, columns in (("gate", f, d), ("up", f, d), ("down", d, f)):
        yield Matrix(f"{where}.{name}_proj", part, out, columns, experts)


def vectors(cfg: ModelConfig, experts: Experts | None = None, latent: Latent | None = None) -> tuple[int, int]:
    """Values of norms, which are f32, and of biases."""
    d, h, layers = cfg.d_model, cfg.head_dim, cfg.num_layers
    norms = layers * d * (4 if cfg.post_norms else 2) + d + (layers * 2 * h if cfg.qk_norm else 0)
    norms += layers * (latent.q_rank + latent.kv_rank) if latent else 0
    biases = layers * (cfg.num_heads + 2 * cfg.num_kv_heads) * h if cfg.qkv_bias else 0
    biases += layers * d if cfg.o_bias else 0
    if cfg.mlp_bias:
        dense = layers if experts is None else experts.dense_layers
        biases += dense * (2 * cfg.d_ff + d)
        if experts:
            biases += (layers - dense) * experts.num_experts * (2 * experts.d_expert + d + 1)
    return norms, biases
