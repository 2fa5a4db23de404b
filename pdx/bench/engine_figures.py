"""`pdx bench engine`: what the engine is held to. Four figures, each a ratio of things that ran in turn in one process.

- `throughput`: tokens a second at full slots against the bare `decode_step` loop and against static batches in
  transformers; the gain over one slot beside what the cost model says.
- `gap`: the longest that requests wait for their next token while a long prompt comes in, with chunked prefill and
  without.
- `prefix`: TTFT of a prompt whose beginning is cached, against that of the first one.
- `overhead`: TPOT of a request alone against the bare loop.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hardware import Chip
from pdx import steps
from pdx.bench.peer import transformers_or_reason
from pdx.bench.timing import Timing, interleaved, matmul_rate, once, read_bandwidth
from pdx.bench.workload import Lengths, Prompts
from pdx.cache.dense import init_cache
from pdx.completion import Completion
from pdx.cost import Setup
from pdx.engine.config import EngineConfig
from pdx.engine.engine import Engine
from pdx.engine.request import EngineRequest
from pdx.errors import RequestError
from pdx.layers.attention import layout_for
from pdx.quant import Policy
from pdx.sampling_options import SamplingOptions
from pdx.shapes import round_up
from pdx.tables import Table
from pdx.weights.load import Model


@dataclass(frozen=True)
class Sizes:
    """How large the loads are; those of the targets unless a test asks for less."""

    slots: int = 8
    prompt: int = 32
    budget: int | None = None  # tokens of a step; None: the engine's own choice
    context: int = 2048  # of every engine, so that they share programs
    outputs: str = "uniform:64:256"
    requests: int = 24
    alone: int = 2  # requests of that load that one slot is given
    steps: int = 160  # of a bare loop at most: as many as an answer has on average, so that contexts are alike
    long_prompt: int = 2000
    before: int = 8  # tokens that each request has had when the long prompt comes
    prefix: int = 1000
    own: int = 24  # tokens of a prompt behind a shared prefix
    rounds: int = 3


@dataclass(frozen=True)
class Figure:
    """One ratio beside its target. `at_least`: it should be at least the target, else at most; without a target it is
    only reported."""

    name: str
    what: str
    value: float
    target: float | None = None
    at_least: bool = True
    seen: dict[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"holds": self.holds}


_VERDICTS = {None: "", True: "holds", False: "falls short"}


def table(figures: Sequence[Figure]) -> Table:
    """A row a figure, with what it was made of."""
    rows = []
    for f in figures:
        seen = "; ".join(f"{name} {value:.4g}" for name, value in f.seen.items())
        rows.append((f.what, f"{f.value:.2f}", _target(f), _VERDICTS[f.holds], seen))
    return Table(("figure", "measured", "target", "", "seen"), rows, left=("", "seen"))


def _target(figure: Figure) -> str:
    return "" if figure.target is None else f"{'>=' if figure.at_least else '<='} {figure.target:g}"


def check_names(only: Sequence[str]) -> None:
    """Raises RequestError for a name that is no figure."""
    if unknown := set(only) - FIGURES.keys():
        raise RequestError(f"{', '.join(sorted(unknown))} is no figure: there are {', '.join(FIGURES)}")


def run(
    model: Model, only: Sequence[str] = (), *, peer: bool = True, sizes: Sizes | None = None
) -> tuple[list[Figure], list[str]]:
    """Measure; returns the figures and notes on what did not run. Raises RequestError for a name that is no figure."""
    check_names(only)
    sizes, figures, notes = sizes or Sizes(), [], []
    for name, measure in FIGURES.items():
        if only and name not in only:
            continue
        print(f"measuring {name}", file=sys.stderr, flush=True)
        if name == "throughput":
            other, reason = transformers_or_reason(model.path) if peer else (None, "")
            notes += [reason] if reason else []
            figures += measure(model, sizes, other)
        else:
            figures += measure(model, sizes)
    return figures, notes


def throughput(model: Model, sizes: Sizes, peer=None) -> Iterator[Figure]:
    """All requests at once, decode-heavy, of mixed length, greedy."""
    prompts, rng = Prompts.of(model), np.random.default_rng(0)
    outputs = Lengths.parse(sizes.outputs).sample(rng, sizes.requests)
    requests = [_request(prompts.cut(sizes.prompt), n) for n in outputs]
    mean = sum(outputs) / len(outputs)
    full: list[float] = []
    bandwidth, multiply = read_bandwidth(), matmul_rate()
    with ExitStack() as stack:
        many, one = (stack.enter_context(_engine(model, sizes, slots=s, prefix_cache=False)) for s in (sizes.slots, 1))

        def served() -> Timing:
            done, seconds = _serve(many, requests)
            full.append(_full_rate(done, sizes.slots))
            return Timing((seconds,)).per(sum(outputs))

        def alone() -> Timing:
            done, seconds = _serve(one, requests[: sizes.alone])
            return Timing((seconds,)).per(sum(len(c.token_ids) for c in done))

        contestants = {
            "engine": served,
            "one slot": alone,
            "read": bandwidth,
            "multiply": multiply,
            "loop": bare_loop(model, sizes.slots, sizes.prompt, min(int(mean), sizes.steps)),
        }
        if peer:
            contestants["peer"] = peer.generate([r.prompt for r in requests], outputs, sizes.slots)
            peer.generate([requests[0].prompt], [2], 1)()
        contestants["loop"]()  # the engines are warm
        times = interleaved(contestants, sizes.rounds, warm_up=False)
        metrics = many.metrics()
    rate, single, loop = (1 / times[x].median for x in ("engine", "one slot", "loop"))
    loop *= sizes.slots
    steady = median(full)
    yield Figure(
        "throughput",
        f"tokens/s with all {sizes.slots} slots taken, against the bare decode_step loop",
        steady / loop,
        0.9,
        seen={
            "engine tok/s": steady,
            "loop tok/s": loop,
            "whole run tok/s": rate,
            "occupancy": metrics.occupancy,
            "idle share": metrics.idle_share,
            "mean step ms": metrics.step_s[0] * 1e3,
            "compiles": metrics.compiles,
        },
    )
    if peer:
        static = sum(outputs) / times["peer"].median
        yield Figure(
            "peer",
            f"tokens/s of {sizes.requests} requests, against transformers in static batches of {sizes.slots}",
            rate / static,
            1.5,
            seen={"engine tok/s": rate, "transformers tok/s": static},
        )
    chip = _chip(bandwidth.bytes_read / times["read"].median, multiply.flops / times["multiply"].median)
    setup = Setup(model.config, jnp.dtype(model.dtype).name, Policy.of(model.params))
    context = sizes.prompt + int(mean) // 2
    floors = {batch: setup.decode(batch, context).seconds(chip) for batch in (1, sizes.slots)}
    yield Figure(
        "gain",
        f"tokens/s at {sizes.slots} slots over 1 slot",
        rate / single,
        seen={
            "predicted": sizes.slots * floors[1] / floors[sizes.slots],
            "one slot tok/s": single,
            "GB/s": chip.hbm_gbps,
            "GFLOP/s": chip.f32_tflops * 1e3,
        },
    )


def gap(model: Model, sizes: Sizes) -> Iterator[Figure]:
    """A long prompt comes while all slots but one decode."""
    prompts = Prompts.of(model)
    worst: dict[bool, list[float]] = {True: [], False: []}
    first: dict[bool, list[float]] = {True: [], False: []}
    with ExitStack() as stack:
        engines = {
            chunked: stack.enter_context(_engine(model, sizes, slots=sizes.slots, chunked_prefill=chunked))
            for chunked in worst
        }
        for _ in range(sizes.rounds + 1):
            for chunked, engine in engines.items():
                gap_s, ttft_s = _interrupted(engine, prompts, sizes)
                worst[chunked].append(gap_s)
                first[chunked].append(ttft_s)
    on, off = (median(worst[chunked][1:]) for chunked in (True, False))
    yield Figure(
        "gap",
        f"worst gap between tokens when a prompt of {sizes.long_prompt} comes, chunked against whole",
        on / off,
        0.25,
        at_least=False,
        seen={
            "chunked s": on,
            "whole s": off,
            "TTFT chunked s": median(first[True][1:]),
            "TTFT whole s": median(first[False][1:]),
        },
    )


def prefix(model: Model, sizes: Sizes) -> Iterator[Figure]:
    """Two prompts with a common beginning, one after the other."""
    cold, warm, hits = [], [], []
    with _engine(model, sizes, slots=sizes.slots) as engine:
        for seed in range(sizes.rounds + 2):
            prompts = Prompts.of(model, seed + 1, shared=sizes.prefix)
            first, second = (
                engine.submit(_request(prompts.cut(sizes.prefix + sizes.own), 8)).result() for _ in range(2)
            )
            cold.append(first.timing.ttft_s)
            warm.append(second.timing.ttft_s)
            hits.append(second.timing.hit_tokens)
    yield Figure(
        "prefix",
        f"TTFT of a prompt of which {sizes.prefix} tokens are cached, against the first one's",
        median(warm[1:]) / median(cold[1:]),
        0.2,
        at_least=False,
        seen={"first ms": median(cold[1:]) * 1e3, "second ms": median(warm[1:]) * 1e3, "found tokens": median(hits)},
    )


def overhead(model: Model, sizes: Sizes) -> Iterator[Figure]:
    """One request on an engine of one slot."""
    prompts = Prompts.of(model)
    with _engine(model, sizes, slots=1, prefix_cache=False) as engine:

        def served() -> Timing:
            done = engine.submit(_request(prompts.cut(sizes.prompt), sizes.steps)).result()
            return Timing((done.timing.tpot_s,))

        loop = bare_loop(model, 1, sizes.prompt, sizes.steps)
        times = interleaved({"engine": served, "loop": loop}, 2 * sizes.rounds + 1)
        metrics = engine.metrics()
    mine, bare = times["engine"].median, times["loop"].median
    yield Figure(
        "overhead",
        "TPOT of a request alone, against the bare decode_step loop",
        mine / bare,
        1.15,
        at_least=False,
        seen={"engine ms": mine * 1e3, "loop ms": bare * 1e3, "idle share": metrics.idle_share},
    )


FIGURES: dict[str, Callable[..., Iterator[Figure]]] = {
    "throughput": throughput,
    "gap": gap,
    "prefix": prefix,
    "overhead": overhead,
}


def bare_loop(model: Model, batch: int, prompt: int, count: int) -> Callable[[], Timing]:
    """A contestant: `decode_step` and argmax in a plain Python loop over a dense cache; seconds a step."""
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


def _engine(model: Model, sizes: Sizes, **settings) -> Engine:
    context = min(sizes.context, model.config.max_context)
    return Engine(model, EngineConfig(max_context=context, token_budget=sizes.budget, **settings))


def _request(prompt: tuple[int, ...], tokens: int) -> EngineRequest:
    return EngineRequest(prompt, SamplingOptions(max_tokens=tokens, ignore_eos=True))


def _serve(engine: Engine, requests: Sequence[EngineRequest]) -> tuple[list[Completion], float]:
    done: list[Completion] = []
    seconds = once(lambda: done.extend(engine.generate(list(requests)))).median
    return done, seconds


def _full_rate(done: Sequence[Completion], slots: int) -> float:
    """Tokens a second from when all slots were first taken until the last request got its slot."""
    admitted = sorted(c.timing.queue_s for c in done)
    begin, end = admitted[slots - 1], admitted[-1]
    times = [t for c in done for t in accumulate((c.timing.ttft_s, *c.timing.gaps_s))]
    return sum(begin < t <= end for t in times) / (end - begin)


def _interrupted(engine: Engine, prompts: Prompts, sizes: Sizes) -> tuple[float, float]:
    """Seconds of the longest gap between two tokens of the requests that decode, and TTFT of the long prompt."""
    answer = engine.config.max_context - 16  # longer than the long prompt will take
    decoding = [engine.submit(_request(prompts.cut(16), answer)) for _ in range(sizes.slots - 1)]
    for stream in decoding:
        for _ in range(sizes.before):
            next(stream)
    long = engine.submit(_request(prompts.cut(sizes.long_prompt), 4)).result()
    for stream in decoding:
        stream.cancel()
    return max(max(stream.result().timing.gaps_s[sizes.before - 1 :]) for stream in decoding), long.timing.ttft_s


def _chip(bytes_per_s: float, flops_per_s: float) -> Chip:
    """This device, as it was during the run, for the cost model."""
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
