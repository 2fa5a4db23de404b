"""Layers that pdx can plan but not run yet: a mixture of experts, and multi-head latent attention.

`pdx.model` has neither. They are declared here in the same way as its own layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdx.config import ModelConfig
from pdx.model import Params, param_specs
from pdx.sharding import ArraySpec


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP. Shazeer et al. 2017.

    Attributes:
      num_experts, experts_per_token: E, and k of them for each token.
      d_expert: feed-forward width of one expert.
      d_shared: feed-forward width of all shared experts together, which every token passes; 0: none.
      dense_layers: the number of first layers that have the config's MLP instead.
      stored_bits: bits per expert weight as published, scales included, if that is no float (MXFP4: 4.25).
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
        """The share of the experts that a layer reads for `tokens` tokens, if each token picks at random:
        1 - (1 - k/E)^tokens."""
        return 1 - (1 - self.experts_per_token / self.num_experts) ** tokens


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: one cached vector per token gives the keys and values of all heads.
    DeepSeek-V2, arXiv 2405.04434.

    Attributes:
      q_rank, kv_rank: of the two low-rank projections; kv_rank + rope_dim values per token and layer are cached.
      nope_dim, rope_dim: the parts of a query or key head without and with RoPE.
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
        """FLOPs of `pairs` of a query and a key after `held` cached tokens: the cheaper of two orders.

        Absorbed (decode): scores and sums are computed in the latent space. Expanded (prefill): heads are as small as
        in other models, but the keys and values of held tokens are computed again.
        """
        absorbed = 2 * pairs * heads * (2 * self.kv_rank + self.rope_dim)
        expanded = 2 * pairs * heads * (self.nope_dim + self.rope_dim + self.value_dim)
        return min(absorbed, expanded + 2 * held * heads * (self.nope_dim + self.value_dim) * self.kv_rank)


def planned_specs(cfg: ModelConfig, dtype, experts: Experts | None = None, latent: Latent | None = None) -> Params:
    """The declarations of `param_specs`, with experts and latent attention in place of its MLP and attention.

    Matrices of experts are stacked, `[num_experts, out, in]`.
    """
    specs = param_specs(cfg, dtype)
    layers = specs["layers"]
    if latent:
        attention = _latent_attention(cfg, latent, dtype)
        layers = [_without(p, "q_proj", "k_proj", "v_proj") | attention for p in layers]
    if experts:
        mixture, dense = _mixture(cfg, experts, dtype), experts.dense_layers
        gone = [f"{x}_{kind}" for x in ("gate", "up", "down") for kind in ("proj", "bias")]
        layers = layers[:dense] + [_without(p, *gone) | mixture for p in layers[dense:]]
    return specs | {"layers": layers}


def _without(layer: Params, *names: str) -> Params:
    return {name: spec for name, spec in layer.items() if name not in names}


def _latent_attention(cfg: ModelConfig, latent: Latent, dtype) -> Params:
    d, n = cfg.d_model, cfg.num_heads

    def matrix(out, columns):
        return ArraySpec((out, columns), (None, None), dtype, part="projections")

    def norm(size):
        return ArraySpec((size,), (None,), "float32", init="ones", part="norms")

    return {
        "q_a_proj": matrix(latent.q_rank, d),
        "q_b_proj": matrix(n * (latent.nope_dim + latent.rope_dim), latent.q_rank),
        "kv_a_proj": matrix(latent.cached, d),
        "kv_b_proj": matrix(n * (latent.nope_dim + latent.value_dim), latent.kv_rank),
        "o_proj": matrix(d, n * latent.value_dim),
        "q_a_norm": norm(latent.q_rank),
        "kv_a_norm": norm(latent.kv_rank),
    }


def _mixture(cfg: ModelConfig, experts: Experts, dtype) -> Params:
    """The router, the experts, and the shared experts."""
    d, count = cfg.d_model, experts.num_experts

    def gated(f, part, stack=()):
        shapes = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
        return {name: declared((*stack, *shape), part) for name, shape in shapes.items()}

    def declared(shape, part):
        return ArraySpec(shape, (None,) * len(shape), dtype, part=part)

    p: Params = {"router": declared((count, d), "routing"), "experts": gated(experts.d_expert, "experts", (count,))}
    if experts.d_shared:
        p["shared"] = gated(experts.d_shared, "mlp")
    if cfg.mlp_bias:
        p["router_bias"] = declared((count,), "biases")
        sizes = {"gate_bias": experts.d_expert, "up_bias": experts.d_expert, "down_bias": d}
        p["experts"] |= {name: declared((count, size), "biases") for name, size in sizes.items()}
    return p
