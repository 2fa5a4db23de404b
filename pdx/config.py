"""What a model is, as frozen data: no arrays, no mesh, no kernel choice, no jax.

One `ModelConfig` describes every family; `pdx/families` maps Hugging Face and GGUF
configurations onto it. It is hashable, so it is a static argument of the jitted steps.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

Activation = Literal["silu", "gelu_tanh"]
# More than any model has. The limit keeps a corrupted size from becoming a huge tuple.
MOST_LAYERS, MOST_HEAD_DIM = 10_000, 65_536


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding over halves: angle[t, i] = t * theta**(-2i/H) / divisors[i].

    Every published frequency scaling (linear, llama3, yarn) is a divisor per frequency. The family files convert
    theirs to `divisors`, and the layer has one rule.

    Example:
      >>> import dataclasses
      >>> longer = dataclasses.replace(cfg, rope=pdx.RopeConfig(theta=500_000.0, divisors=(1.0, 1.0, 2.0, 8.0)))
      >>> longer.layer_rope(0).theta
      500000.0
    """

    theta: float = 10_000.0
    divisors: tuple[float, ...] | None = None  # H/2 numbers; None means all ones
    attention_factor: float = 1.0  # multiplies cos and sin (yarn's mscale)


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the switches of a decoder-only transformer.

    Dimensions as in `pdx.shapes`: D `d_model`, L `num_layers`, N `num_heads`, K `num_kv_heads`,
    H `head_dim`, F `d_ff`, V `vocab_size`.

    Raises:
      ValueError: sizes that do not fit together; the text names the field.

    Example:
      >>> cfg.group_size, cfg.windows
      (2, (None, None))
      >>> pdx.ModelConfig.from_json(cfg.to_json()) == cfg
      True
    """

    family: str
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_context: int
    rope: RopeConfig = RopeConfig()
    # The RoPE of window layers (Gemma 3 has a separate base there); None: `rope` everywhere.
    rope_window: RopeConfig | None = None
    # One entry per layer: how many positions a query sees, itself included. None: all of them.
    windows: tuple[int | None, ...] = ()
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    attn_scale: float | None = None  # None: head_dim ** -0.5
    attn_softcap: float | None = None  # cap * tanh(logits / cap) inside attention
    logit_softcap: float | None = None  # the same on the vocabulary logits
    embed_scale: float = 1.0  # multiplies the embedding lookup (Gemma: sqrt(D))
    tie_embeddings: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head before RoPE
    post_norms: bool = False  # a norm after attention and after the MLP, before the residual sum

    def __post_init__(self):
        for name in (
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "d_ff",
            "max_context",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name} must be at least 1, got {getattr(self, name)}")
        for name, most in (("num_layers", MOST_LAYERS), ("head_dim", MOST_HEAD_DIM)):
            if getattr(self, name) > most:
                raise ValueError(f"ModelConfig.{name} must be at most {most}, got {getattr(self, name)}")
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if self.attn_scale is None:
            object.__setattr__(self, "attn_scale", self.head_dim**-0.5)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE needs halves")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.num_layers} layers")
        if any(w is not None and w < 1 for w in self.windows):
            raise ValueError(f"a window must be at least 1 position wide, got {self.windows}")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation {self.activation!r} is not one of 'silu', 'gelu_tanh'")
        for rope in (self.rope, self.rope_window):
            if rope and rope.divisors is not None and len(rope.divisors) != self.head_dim // 2:
                raise ValueError(
                    f"RopeConfig.divisors has {len(rope.divisors)} entries, "
                    f"head_dim {self.head_dim} needs {self.head_dim // 2}"
                )

    @property
    def group_size(self) -> int:
        """G, the query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def layer_rope(self, layer: int) -> RopeConfig:
        """The rotary embedding of one layer."""
        if self.windows[layer] is not None and self.rope_window is not None:
            return self.rope_window
        return self.rope

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """The inverse of `to_json`. Raises ValueError for an unknown or a missing field."""
        data: dict[str, Any] = json.loads(text)
        unknown = set(data) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown ModelConfig fields: {', '.join(sorted(unknown))}")
        for key in ("rope", "rope_window"):
            if data.get(key):
                rope = data[key]
                if rope.get("divisors") is not None:
                    rope["divisors"] = tuple(rope["divisors"])
                data[key] = RopeConfig(**rope)
        data["windows"] = tuple(data.get("windows", ()))
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"incomplete ModelConfig: {error}") from None
