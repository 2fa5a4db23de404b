"""The engines, requests and plain decode loops that `pdx bench engine` times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hardware import Chip
from pdx import steps
from pdx.bench.load.workload import Prompts
from pdx.bench.timing import Timing, once
from pdx.cache.dense import init_cache
from pdx.engine.config import EngineConfig
from pdx.engine.engine import Engine
from pdx.engine.request import EngineRequest
from pdx.generation.completion import Completion
from pdx.layers.kernels import layout_for
from pdx.sampling.options import SamplingOptions
from pdx.shapes import round_up
from pdx.weights.load import Model


@dataclass(frozen=True)
class Sizes:
    """The sizes of the loads. The defaults are those that the targets hold for; tests use smaller ones."""

    slots: int = 8
    prompt: int = 32
    budget: int | None = None  # the most tokens of a step; None: the engine's default
    context: int = 2048  # of every engine, so that they share programs
    outputs: str = "uniform:64:256"
    requests: int = 24
    alone: int = 2  # requests of that load that the engine with one slot serves
    steps: int = 160  # the most steps of the plain loop: the mean length of an answer, so that contexts are equal
    long_prompt: int = 2000
    before: int = 8  # tokens that each request has received when the long prompt arrives
    prefix: int = 1000
    own: int = 24  # tokens of a prompt after the shared prefix
    rounds: int = 3


def bare_loop(model: Model, batch: int, prompt: int, count: int) -> Callable[[], Timing]:
    """A timed function: `decode_step` and argmax in a plain Python loop over a dense cache; seconds per step."""
    capacity = round_up(prompt + count + 1, 128)
    state = {
        "cache": init_cache(
            model.config, batch, capacity, chunk=prompt, dtype=model.dtype, mesh=model.mesh, layout=layout_for("auto")
        )
    }
    ids = np.arange(batch * prompt, dtype=np.int32).reshape(batch, -1) % 1000 % model.config.vocab_size
    active, best = jnp.ones(batch, bool), jax.jit(lambda logits: jnp.argmax(logits, -1).astype(jnp.int32))

    def loop():
        for _ in range(count):
            logits, state["cache"] = steps.decode_step(
                model.params, model.config, state["tokens"], active, state["cache"], check=False
            )
            state["tokens"] = best(logits)
        return state["tokens"]

    def work() -> Timing:
        cache = jax.block_until_ready(state["cache"].truncate(np.zeros(batch, np.int32)))
        lengths = np.full(batch, prompt, np.int32)
        logits, state["cache"] = steps.prefill(model.params, model.config, ids, lengths, cache, check=False)
        state["tokens"] = jax.block_until_ready(best(logits))
        return once(loop).per(count)

    return work


def start_engine(model: Model, sizes: Sizes, **settings) -> Engine:
    context = min(sizes.context, model.config.max_context)
    return Engine(model, EngineConfig(max_context=context, token_budget=sizes.budget, **settings))


def request_of(prompt: tuple[int, ...], tokens: int) -> EngineRequest:
    return EngineRequest(prompt, SamplingOptions(max_tokens=tokens, ignore_eos=True))


def serve(engine: Engine, requests: Sequence[EngineRequest]) -> tuple[list[Completion], float]:
    done: list[Completion] = []
    seconds = once(lambda: done.extend(engine.generate(list(requests)))).median
    return done, seconds


def full_rate(done: Sequence[Completion], slots: int) -> float:
    """Tokens per second from when all slots were first taken until the last request got its slot."""
    admitted = sorted(c.timing.queue_s for c in done)
    begin, end = admitted[slots - 1], admitted[-1]
    times = [t for c in done for t in accumulate((c.timing.ttft_s, *c.timing.gaps_s))]
    return sum(begin < t <= end for t in times) / (end - begin)


def interrupted(engine: Engine, prompts: Prompts, sizes: Sizes) -> tuple[float, float]:
    """Seconds: the longest gap between two tokens of the decoding requests, and TTFT of the long prompt."""
    answer = engine.config.max_context - 16  # long enough to decode until the long prompt is answered
    decoding = [engine.submit(request_of(prompts.cut(16), answer)) for _ in range(sizes.slots - 1)]
    for stream in decoding:
        for _ in range(sizes.before):
            next(stream)
    long = engine.submit(request_of(prompts.cut(sizes.long_prompt), 4)).result()
    for stream in decoding:
        stream.cancel()
    return max(max(stream.result().timing.gaps_s[sizes.before - 1 :]) for stream in decoding), long.timing.ttft_s


def this_device(bytes_per_s: float, flops_per_s: float) -> Chip:
    """This device as a chip for the cost model, with the rates measured in this run."""
    tflops = flops_per_s / 1e12
    return Chip(
        name="this device",
        platform=jax.default_backend(),
        kinds=(),
        bf16_tflops=tflops,
        int8_tops=None,
        hbm_gbps=bytes_per_s / 1e9,
        hbm_gib=0.0,
        cores=1,
        clock_ghz=0.0,
        f32_tflops=tflops,
    )
