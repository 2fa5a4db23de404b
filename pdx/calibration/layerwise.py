"""Quantizing with a calibration text, layer by layer: activation-aware scaling (AWQ) and GPTQ.

Both run the text through the layers quantized so far, and record the inputs of each product:

- `awq` (Lin et al. 2023; for int8 activations Xiao et al. 2022, SmoothQuant) multiplies the columns that meet large
  activations, and divides the source of those activations: a norm's weights, or the rows of the previous projection.
  It searches the exponent and each group's scale.
- `gptq` (Frantar et al. 2022) rounds column by column, the most important first, and corrects the remaining columns
  for the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import QuantArray
from pallas_kernels.quant_array import dequantize, quantize_rows
from pdx.cache.rows import TokenRows
from pdx.calibration.rounding import HIGHEST, gptq, searched
from pdx.config import ModelConfig
from pdx.errors import RequestError
from pdx.layers.linear import watching
from pdx.layers.norm import rms_norm
from pdx.layers.rope import rotation
from pdx.meshes import ANY_DEVICES
from pdx.model import Params, forward, layer
from pdx.quant import Kind, Policy, check_policy, rounded
from pdx.weights.loaded import Model

Method = Literal["rtn", "awq", "gptq"]
# Products that share an input, in the order in which a layer computes them, and the source of that input.
STAGES = (
    (("q_proj", "k_proj", "v_proj"), "attn_norm"),
    (("o_proj",), "v_proj"),
    (("gate_proj", "up_proj"), "mlp_norm"),
    (("down_proj",), "up_proj"),
)
LENGTH = 512  # tokens of a calibration sequence
ROWS = 8  # sequences in one call of a layer
EXPONENTS = tuple(i / 10 for i in range(11))


def check_method(method: str) -> None:
    """Raise RequestError for a method that does not exist."""
    if method not in get_args(Method):
        raise RequestError(f"method {method!r} is not one of {', '.join(get_args(Method))}")


def quantize_model(
    model: Model,
    policy: str | Policy,
    text: str,
    method: Method = "gptq",
    *,
    sequences: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Quantize a model with `sequences` sequences of 512 tokens of a calibration text.

    Raises:
      RequestError: an unknown method, a text that is too short; as `calibrate`.
    """
    check_method(method)
    opening = model.tokenizer.opening
    length = min(LENGTH, model.config.max_context)
    size = length - len(opening)
    ids = model.tokenizer.encode(text[: 16 * sequences * size], add_special=False)
    count = min(sequences, len(ids) // size)
    if count < 1:
        raise RequestError(f"a calibration text of {len(ids)} tokens is too short: at least {size} are needed")
    tokens = np.array(ids[: count * size], np.int32).reshape(count, size)
    tokens = np.concatenate([np.tile(np.array(opening, np.int32), (count, 1)), tokens], axis=1)
    return replace(model, params=calibrate(model.params, model.config, policy, tokens, method, progress))


def calibrate(
    params: Params,
    cfg: ModelConfig,
    policy: str | Policy,
    tokens: Int[np.ndarray, "n T"],
    method: Method,
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """Quantize parameters as `policy` says, calibrated on `tokens`, sequences of a calibration text.

    Embedding and head are rounded to nearest: they are most of a small model's bytes and little of its error. With
    `awq`, a head with int8 activations is scaled too, and then stored apart from a tied embedding.

    Raises:
      RequestError: as `pdx.quant.quantize_params`.
    """
    params, kinds = check_policy(params, policy)
    if method == "rtn":
        return rounded(params, kinds)
    everything = jnp.full(ROWS, tokens.shape[1], jnp.int32)
    rows = TokenRows.behind(jnp.zeros_like(everything), everything, tokens.shape[1])
    padded = np.zeros((-len(tokens) % ROWS, tokens.shape[1]), tokens.dtype)
    batches = np.split(np.concatenate([tokens, padded]), -(-len(tokens) // ROWS))
    real = len(tokens) * tokens.shape[1]  # activation rows of all batches; padding comes last
    start = jax.jit(lambda p, ids: forward(p, cfg, ids, logits="none", hidden_layers=(0,)).hidden[0])
    streams = [start(params, ids) for ids in batches]
    layers = []
    for i, p in enumerate(params["layers"]):
        run = partial(_through, cfg=cfg, window=cfg.windows[i], rope=cfg.layer_rope(i), rows=rows)
        p, own = dict(p), {name: kinds.get(f"layers.{i}.{name}") for name in p}
        for names, source in STAGES:
            wanted = [name for name in names if own[name] is not None]
            if wanted:
                x = jnp.concatenate([run(p, stream, watch=wanted[0])[1] for stream in streams])[:real]
                _quantize_stage(p, names, source, own, x, method, cfg)
        streams = [run(p, stream, watch=None)[0] for stream in streams]
        layers.append(p)
        if progress is not None:
            progress(i + 1, len(params["layers"]))
    params = params | {"layers": layers}
    head = kinds.get("lm_head", kinds.get("embed") if cfg.tie_embeddings else None)
    if method == "awq" and head is not None and head.activations == "int8":
        params, kinds = _scaled_head(params, kinds, head, jnp.concatenate(streams), real, cfg)
    return rounded(params, kinds)


@partial(jax.jit, static_argnames=("cfg", "window", "rope", "watch"))
def _through(p, x, *, cfg: ModelConfig, window: int | None, rope, rows: TokenRows, watch: str | None):
    """A layer's output, and the input of the product named `watch`, as a matrix of one row per token."""
    seen = []

    def see(weight, given):
        if watch is not None and weight is p[watch]:
            seen.append(given.reshape(-1, given.shape[-1]))

    with watching(see):
        y, _ = layer.__wrapped__(
            p,
            x,
            None,
            rows,
            rotation(rope, cfg.head_dim, rows.positions),
            cfg=cfg,
            window=window,
            mesh=ANY_DEVICES,
            kernels="xla",
        )
    return y, seen[0] if seen else None


def _quantize_stage(
    p: dict, names: Sequence[str], source: str, own: dict, x: Float[Array, "n in"], method: Method, cfg: ModelConfig
) -> None:
    """Quantize the matrices of a stage in place; `awq` first scales them and the source of their input."""
    if method == "awq":
        # A KV head's values go to all of its query heads, so those columns share their scales.
        shared = (cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads, cfg.head_dim) if source == "v_proj" else None
        scale = _best_scale(x, [(p[n], own[n]) for n in names], shared)
        x = x / scale
        for name in names:
            p[name] = (p[name].astype(jnp.float32) * scale).astype(p[name].dtype)
        _divide_rows(p, source, _of_source(scale, shared))
    moments = _gram(x)
    for name in names:
        if own[name] is None:
            continue
        w, dtype = p[name], str(p[name].dtype)
        p[name] = (
            gptq(w, moments, own[name], dtype) if method == "gptq" else searched(w, jnp.diag(moments), own[name], dtype)
        )


@jax.jit
def _gram(x: Float[Array, "n in"]) -> Float[Array, "in in"]:
    x = x.astype(jnp.float32)
    return jnp.dot(x.T, x, precision=HIGHEST) / x.shape[0]


def _of_source(scale: Float[Array, " in"], shared) -> Float[Array, " rows"]:
    """The columns' scales, mapped to the rows of their source."""
    return scale if shared is None else scale.reshape(shared)[:, 0].reshape(-1)


def _divide_rows(p: dict, name: str, scale: Float[Array, " rows"]) -> None:
    """Divide a norm's weights or a projection's rows, and its bias, in place."""
    w = p[name]
    if isinstance(w, QuantArray):
        p[name] = replace(w, scales=w.scales / scale, offsets=None if w.offsets is None else w.offsets / scale)
    else:
        wide = w.astype(jnp.float32) / (scale if w.ndim == 1 else scale[:, None])
        p[name] = wide.astype(w.dtype)
    bias = name.replace("_proj", "_bias")
    if bias != name and bias in p:
        p[bias] = (p[bias].astype(jnp.float32) / scale).astype(p[bias].dtype)


def _best_scale(x: Float[Array, "n in"], weights: list[tuple[Array, Kind | None]], shared) -> Float[Array, " in"]:
    """The scale of each column for which the quantized products are closest to the exact ones, over all exponents.

    With float activations it grows with a column's mean magnitude; with int8 activations with its largest, which sets
    the quantization step of the row.
    """
    kinds = [kind for _, kind in weights if kind is not None]
    peaks = any(kind.activations == "int8" for kind in kinds)
    size = jnp.abs(x).max(0) if peaks else jnp.abs(x).mean(0)
    size = jnp.maximum(size.astype(jnp.float32), 1e-6)
    heaviest = jnp.stack([jnp.abs(w).max(0) for w, _ in weights]).max(0).astype(jnp.float32)
    if shared is not None:
        size, heaviest = (
            jnp.broadcast_to(v.reshape(shared).max(1, keepdims=True), shared).reshape(-1) for v in (size, heaviest)
        )
    # A thousand rows suffice to choose the exponent.
    some = x[:: max(1, len(x) // 1024)].astype(jnp.float32)
    squares = jnp.square(x.astype(jnp.float32)).mean(0)
    exact = [_product(some, w) for w, _ in weights]
    best, found = None, None
    for exponent in EXPONENTS:
        scale = size**exponent
        if peaks:
            scale = scale / jnp.maximum(heaviest, 1e-6) ** (1 - exponent)
        scale = scale / jnp.sqrt(scale.max() * scale.min())
        error = sum(
            float(_error(some, y, squares, w, scale, kind))
            for y, (w, kind) in zip(exact, weights, strict=True)
            if kind is not None
        )
        if best is None or error < best:
            best, found = error, scale
    return found


@jax.jit
def _product(x: Float[Array, "n in"], w: Float[Array, "out in"]) -> Float[Array, "n out"]:
    return jnp.dot(x, w.astype(jnp.float32).T, precision=HIGHEST)


@partial(jax.jit, static_argnames=("kind",))
def _error(x, exact, squares, w, scale, kind: Kind) -> Float[Array, ""]:
    """Mean squared error of a product whose columns are multiplied by `scale` and quantized."""
    q = dequantize(searched(w.astype(jnp.float32) * scale, squares / scale**2, kind, "float32"))
    given = x / scale
    if kind.activations == "int8":
        values, steps = quantize_rows(given)
        given = values.astype(jnp.float32) * steps
    return jnp.square(_product(given, q) - exact).mean()


def _scaled_head(params: Params, kinds: dict, kind: Kind, stream: Array, real: int, cfg: ModelConfig):
    """Scale the head's columns and divide the final norm; the head becomes a parameter of its own."""
    head = params.get("lm_head", params["embed"])
    x = rms_norm(stream.reshape(-1, stream.shape[-1])[:real], params["final_norm"], cfg.norm_eps)
    scale = _best_scale(x, [(head[:: max(1, len(head) // 8192)], kind)], None)
    scaled = {
        "lm_head": (head.astype(jnp.float32) * scale).astype(head.dtype),
        "final_norm": params["final_norm"] / scale,
    }
    return params | scaled, kinds | {"lm_head": kind}
