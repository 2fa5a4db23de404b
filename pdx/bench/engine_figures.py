"""`pdx bench engine`: four figures of the engine with targets. Each is a ratio of times measured in one process.

- `throughput`: tokens per second with all slots taken, relative to a plain loop of `decode_step` and to static batches
  in transformers; the gain over one slot, beside the cost model's prediction.
- `gap`: the longest wait of the decoding requests for their next token while a long prompt is prefilled, with chunked
  prefill relative to without.
- `prefix`: TTFT of a prompt whose beginning is cached, relative to that of the first such prompt.
- `overhead`: TPOT of a single request, relative to the plain loop.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.hardware import Chip
from pdx.bench.engine_runs import Sizes, bare_loop, full_rate, interrupted, request_of, serve, start_engine, this_device
from pdx.bench.load.workload import Lengths, Prompts
from pdx.bench.peer import transformers_or_reason
from pdx.bench.timing import Timing, interleaved, matmul_rate, read_bandwidth
from pdx.cost import Setup
from pdx.errors import RequestError
from pdx.io.tables import Table
from pdx.metrics import EngineMetrics
from pdx.quant import Policy
from pdx.weights.load import Model


@dataclass(frozen=True)
class Figure:
    """A measured ratio and its target.

    Attributes:
      name, what: its short name, and a description.
      value: the ratio.
      target: what it should reach; None: it is only reported.
      at_least: `value` should be at least the target; False: at most.
      seen: the measurements behind it.
    """

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
    """One row per figure, with the measurements behind it."""
    rows = []
    for f in figures:
        seen = "; ".join(f"{name} {value:.4g}" for name, value in f.seen.items())
        rows.append((f.what, f"{f.value:.2f}", _target(f), _VERDICTS[f.holds], seen))
    return Table(("figure", "measured", "target", "", "seen"), rows, left=("", "seen"))


def _target(figure: Figure) -> str:
    return "" if figure.target is None else f"{'>=' if figure.at_least else '<='} {figure.target:g}"


def check_names(only: Sequence[str]) -> None:
    """Raises RequestError for an unknown figure."""
    if unknown := set(only) - FIGURES.keys():
        raise RequestError(f"{', '.join(sorted(unknown))} is no figure: there are {', '.join(FIGURES)}")


def run(
    model: Model, only: Sequence[str] = (), *, peer: bool = True, sizes: Sizes | None = None
) -> tuple[list[Figure], list[str]]:
    """Measure the figures named in `only` (none: all). `peer`: also run transformers.

    Returns the figures, and sentences about what did not run. Raises RequestError for an unknown figure.
    """
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
    """All requests are sent at once. They are greedy, with short prompts and answers of mixed length."""
    prompts, rng = Prompts.of(model), np.random.default_rng(0)
    outputs = Lengths.parse(sizes.outputs).sample(rng, sizes.requests)
    requests = [request_of(prompts.cut(sizes.prompt), n) for n in outputs]
    mean = sum(outputs) / len(outputs)
    full: list[float] = []
    bandwidth, multiply = read_bandwidth(), matmul_rate()
    with ExitStack() as stack:
        many, one = (
            stack.enter_context(start_engine(model, sizes, slots=s, prefix_cache=False)) for s in (sizes.slots, 1)
        )

        def served() -> Timing:
            done, seconds = serve(many, requests)
            full.append(full_rate(done, sizes.slots))
            return Timing((seconds,)).per(sum(outputs))

        def alone() -> Timing:
            done, seconds = serve(one, requests[: sizes.alone])
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
        contestants["loop"]()  # warm-up; the engines have compiled already
        times = interleaved(contestants, sizes.rounds, warm_up=False)
        metrics = many.metrics()
    rate, steady = 1 / times["engine"].median, median(full)
    yield _relative_to_loop(sizes, metrics, steady, sizes.slots / times["loop"].median, rate)
    if peer:
        yield _relative_to_peer(sizes, rate, sum(outputs) / times["peer"].median)
    chip = this_device(bandwidth.bytes_read / times["read"].median, multiply.flops / times["multiply"].median)
    yield _gain_of_slots(model, sizes, chip, rate, 1 / times["one slot"].median, sizes.prompt + int(mean) // 2)


def _relative_to_loop(sizes: Sizes, metrics: EngineMetrics, steady: float, loop: float, rate: float) -> Figure:
    """Rates in tokens per second: `steady` while all slots are taken, `rate` over the whole run."""
    return Figure(
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


def _relative_to_peer(sizes: Sizes, rate: float, peer: float) -> Figure:
    return Figure(
        "peer",
        f"tokens/s of {sizes.requests} requests, against transformers in static batches of {sizes.slots}",
        rate / peer,
        1.5,
        seen={"engine tok/s": rate, "transformers tok/s": peer},
    )


def _gain_of_slots(model: Model, sizes: Sizes, chip: Chip, rate: float, single: float, context: int) -> Figure:
    """The gain of several slots, with the cost model's prediction for rows of `context` tokens."""
    setup = Setup(model.config, jnp.dtype(model.dtype).name, Policy.of(model.params))
    floors = {batch: setup.decode(batch, context).seconds(chip) for batch in (1, sizes.slots)}
    return Figure(
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
    """A long prompt arrives while all slots but one decode."""
    prompts = Prompts.of(model)
    worst: dict[bool, list[float]] = {True: [], False: []}
    first: dict[bool, list[float]] = {True: [], False: []}
    with ExitStack() as stack:
        engines = {
            chunked: stack.enter_context(start_engine(model, sizes, slots=sizes.slots, chunked_prefill=chunked))
            for chunked in worst
        }
        for _ in range(sizes.rounds + 1):
            for chunked, engine in engines.items():
                gap_s, ttft_s = interrupted(engine, prompts, sizes)
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
    """Two prompts with a common beginning are sent one after the other."""
    cold, warm, hits = [], [], []
    with start_engine(model, sizes, slots=sizes.slots) as engine:
        for seed in range(sizes.rounds + 2):
            prompts = Prompts.of(model, seed + 1, shared=sizes.prefix)
            first, second = (
                engine.submit(request_of(prompts.cut(sizes.prefix + sizes.own), 8)).result() for _ in range(2)
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
    with start_engine(model, sizes, slots=1, prefix_cache=False) as engine:

        def served() -> Timing:
            done = engine.submit(request_of(prompts.cut(sizes.prompt), sizes.steps)).result()
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
