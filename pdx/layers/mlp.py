"""The gated feed-forward block."""

from __future__ import annotations

from jaxtyping import Array, Float

from pdx.config import ModelConfig
from pdx.layers.linear import ACTIVATIONS, linear, projections
from pdx.meshes import ANY_DEVICES, Devices


def mlp(p: dict, cfg: ModelConfig, x: Float[Array, "B T D"], mesh: Devices = ANY_DEVICES) -> Float[Array, "B T D"]:
    """down(act(gate(x)) * up(x)). Shazeer 2020."""
    specs = projections(cfg)
    gate = linear(x, p["gate_proj"], p.get("gate_bias"), specs["gate_proj"], mesh)
    up = linear(x, p["up_proj"], p.get("up_bias"), specs["up_proj"], mesh)
    x = ACTIVATIONS[cfg.activation](gate) * up
    return linear(x, p["down_proj"], p.get("down_bias"), specs["down_proj"], mesh)
