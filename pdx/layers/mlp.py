"""The gated feed-forward block."""

from __future__ import annotations

from jaxtyping import Array, Float

from pdx.config import ModelConfig
from pdx.layers.linear import ACTIVATIONS, linear, projections


def mlp(p: dict, cfg: ModelConfig, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """down(act(gate(x)) * up(x)). Shazeer 2020."""
    specs = projections(cfg)
    gate = linear(x, p["gate_proj"], p.get("gate_bias"), specs["gate_proj"])
    up = linear(x, p["up_proj"], p.get("up_bias"), specs["up_proj"])
    return linear(ACTIVATIONS[cfg.activation](gate) * up, p["down_proj"], p.get("down_bias"), specs["down_proj"])
