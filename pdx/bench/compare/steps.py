"""Compares whole steps of a model: prefill and decode with XLA's attention, the Pallas kernels, and the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.hardware import Chip
from pdx import steps
from pdx.bench.compare.device_time import Loop
from pdx.bench.compare.expected import errors
from pdx.bench.compare.measure import FRESH, reason, timed, what_ran, why_not_measured
from pdx.bench.compare.paths import step_kernels
from pdx.bench.compare.rows import MEASURED, NOT_RUN, PALLAS, XLA, Row, limits
from pdx.cache.dense import init_cache
from pdx.config import ModelConfig
from pdx.cost import Setup
from pdx.layers.kernels import Kernels, as_kernels, layout_for
from pdx.model import Params, forward, init_params
from pdx.plan import published


@dataclass(frozen=True)
class Subject:
    """The model whose steps are compared, by name, and its dtype.

    `all_layers`: whether absent chips' compilers get the whole model. Compile time is proportional to the layers.
    """

    model: str
    dtype: str
    all_layers: bool = True

    def config(self) -> ModelConfig:
        return published.config(self.model)

    def compiled_config(self) -> ModelConfig:
        """What is compiled for absent chips: without `all_layers`, the first layers, at least two and one of each
        window. The others are like them."""
        cfg = self.config()
        if self.all_layers:
            return cfg
        count = min(cfg.num_layers, max(2, *(cfg.windows.index(w) + 1 for w in cfg.windows)))
        return replace(cfg, num_layers=count, windows=cfg.windows[:count])

    def setup(self) -> Setup:
        return Setup(self.config(), self.dtype)


@dataclass(frozen=True)
class Shape:
    """A prefill of `tokens` tokens per row into an empty cache, or a decode step after `tokens` - 1 tokens."""

    phase: str  # prefill | decode
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        rows = f"batch {self.batch}, " if self.batch > 1 or self.phase == "decode" else ""
        return f"{rows}{self.tokens} tokens" if self.phase == "prefill" else f"{rows}context {self.tokens}"

    @property
    def capacity(self) -> int:
        return max(256, self.tokens)


# By platform: small steps for two CPU cores, larger ones for an accelerator.
SHAPES = {
    "cpu": (Shape("prefill", 1, 128), Shape("decode", 1, 128), Shape("decode", 8, 128)),
    "": (Shape("prefill", 1, 1024), Shape("decode", 1, 1024), Shape("decode", 32, 1024)),
}


def shapes_for(platform: str, cfg: ModelConfig) -> list[Shape]:
    """The steps that are compared on a platform, cut to the model's context."""
    found = SHAPES.get(platform, SHAPES[""])
    return [replace(s, tokens=min(s.tokens, cfg.max_context)) for s in found]


def step_row(subject: Subject, shape: Shape, chip: Chip, device: str) -> Row:
    """The row of a step with the cost model's figures."""
    cost = getattr(subject.setup(), shape.phase)(shape.batch, shape.tokens)
    row = Row(
        shape.phase,
        f"{subject.model}, {shape.name}",
        "",
        device,
        NOT_RUN,
        dtype=subject.dtype,
        flops=cost.flops,
        bytes=cost.bytes,
        **limits(chip, cost.flops, cost.bytes, subject.dtype),
    )
    return replace(row, roofline_seconds=cost.seconds(chip), bound=cost.bound(chip))


def parameters(subject: Subject) -> Params:
    """The model's parameters; random ones for a shape of `configs/`."""
    if subject.model in published.names():
        return init_params(subject.config(), jax.random.key(0), jnp.dtype(subject.dtype))
    from pdx.weights.load import load

    return load(subject.model, dtype=jnp.dtype(subject.dtype)).params


def rows(
    subject: Subject,
    params: Params,
    shape: Shape,
    chip: Chip,
    device: str,
    rounds: int,
    targets: tuple[str, ...] = (),
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Row]:
    """The rows of a step with each kind of kernels, timed in turn. A CPU has times for XLA only.

    Args:
      extra: the user's kernels by op and label; each runs in the step that uses its op.
    """
    cfg, base = subject.config(), step_row(subject, shape, chip, device)
    right = expected(cfg, params, shape)
    found: dict[str, Row] = {}
    loops: dict[str, Loop] = {}
    if chip.platform not in ("tpu", "gpu"):
        found[PALLAS] = replace(base, path=PALLAS, note=why_not_measured(targets))
    for path, kernels in _kernels(shape.phase, chip.platform, extra or {}).items():
        row = replace(base, path=path)
        try:
            loop = make_loop(cfg, params, shape, kernels)
            loop.run(1)
        except Exception as error:  # the kernels do not support the model
            found[path] = replace(row, note=reason(error))
            continue
        worst, relative = errors(loop.state[1], right, np.ones(shape.batch, bool))
        found[path] = replace(
            row,
            rung=MEASURED,
            ran=what_ran(loop.text),
            auto=path == _auto(chip.platform),
            max_error=worst,
            relative_error=relative,
            compile_seconds=loop.compile_seconds,
        )
        loops[path] = loop
    for path, times in timed(loops, rounds).items():
        found[path] = replace(found[path], **times)
    order = [XLA, PALLAS, *(path for path in found if path not in (XLA, PALLAS))]
    return [found[path] for path in order]


def _kernels(phase: str, platform: str, extra: Mapping[str, Mapping[str, Any]]) -> dict[str, Kernels]:
    """Path -> `kernels=` of the step."""
    ours = {XLA: XLA, PALLAS: PALLAS} if platform in ("tpu", "gpu") else {XLA: XLA}
    return ours | step_kernels(phase, extra, platform)


def _auto(platform: str) -> str:
    return PALLAS if platform in ("tpu", "gpu") else XLA


def prompts(cfg: ModelConfig, shape: Shape) -> np.ndarray:
    """Token ids [B, T] of the prompts, or of the contexts of a decode step."""
    return (np.arange(shape.batch * shape.tokens, dtype=np.int32).reshape(shape.batch, -1) * 7) % cfg.vocab_size


def expected(cfg: ModelConfig, params: Params, shape: Shape) -> np.ndarray:
    """Logits [B, V] of each prompt's last token, in f32, by `forward` without cache and kernels."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
    return np.concatenate([np.asarray(_plain_logits(wide, cfg, row[None])) for row in prompts(cfg, shape)])


@partial(jax.jit, static_argnames="cfg")
def _plain_logits(params: Params, cfg: ModelConfig, tokens: jax.Array) -> jax.Array:
    return forward(params, cfg, tokens, logits="last").logits


def make_loop(cfg: ModelConfig, params: Params, shape: Shape, kernels: Kernels) -> Loop:
    """A loop of steps. Each truncates the cache and changes its first token by the argmax of the previous logits.

    The state is (tokens [B, T], logits [B, V], cache). The first logits are zero; their argmax, 0, changes nothing.
    """
    tokens, batch, kernels = jnp.asarray(prompts(cfg, shape)), shape.batch, as_kernels(kernels)
    dtype = params["embed"].dtype
    cache = init_cache(cfg, batch, shape.capacity, chunk=shape.tokens, dtype=dtype, layout=layout_for(kernels))
    held = 0
    if shape.phase == "decode":
        held = shape.tokens - 1
        _, cache = steps.prefill(params, cfg, tokens[:, :held], np.full(batch, held), cache, kernels=kernels)
        tokens = tokens[:, held:]
    logits = jnp.zeros((batch, cfg.vocab_size), jnp.float32)
    fresh = [jax.block_until_ready((tokens + i) % cfg.vocab_size) for i in range(FRESH)]
    return Loop(_turn(cfg, shape, held, kernels), (tokens, logits, cache), fresh, params)


def _turn(cfg: ModelConfig, shape: Shape, held: int, kernels: Kernels) -> Callable[[Any, Any], Any]:
    def turn(state, params):
        given, logits, cache = state
        # The weights depend on the previous logits too, so that no work on them is hoisted out of the loop.
        logits, params = lax.optimization_barrier((logits, params))
        chosen = jnp.argmax(logits, -1).astype(jnp.int32)
        tokens = given.at[:, 0].set((given[:, 0] + chosen) % cfg.vocab_size)
        cache = cache.truncate(jnp.full(shape.batch, held, jnp.int32))
        settings = {"cfg": cfg, "cache": cache, "kernels": kernels}
        if shape.phase == "decode":
            rows = jnp.ones(shape.batch, bool)
            return given, *steps.PROGRAMS["decode_step"](params, tokens=tokens[:, 0], active=rows, **settings)
        lengths = jnp.full(shape.batch, shape.tokens)
        return given, *steps.PROGRAMS["prefill"](params, tokens=tokens, lengths=lengths, **settings)

    return turn
