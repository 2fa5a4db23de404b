"""Pitfalls of treating the two phases as one, shown with times of this device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pdx import cost, steps
from pdx.bench.report.optimizations import ACCEPTANCE, Experiment
from pdx.bench.timed_work import ModelUnderTest, set_held, token_ids
from pdx.bench.timing import Timing, interleaved, once
from pdx.cost import tradeoffs
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import SamplingState

SMALL_DRAFT = 0.1  # assumed: TTFT and TPOT of a draft model relative to the target's


@dataclass(frozen=True)
class Request:
    """A request's time: measured, predicted from a single rate, and predicted from TTFT and TPOT."""

    prompt: int
    output: int
    measured_s: float
    one_number_s: float  # all tokens times the seconds per token of the first request
    two_phases_s: float  # TTFT + (n - 1) TPOT

    def error(self, seconds: float) -> float:
        return seconds / self.measured_s - 1


@dataclass(frozen=True)
class Speculation:
    """Speculative decoding, computed from measured times of its parts."""

    draft: str
    verify_steps: float  # time of a verification in decode steps
    break_even: float | None  # acceptance rate from which on decoding is faster; None: never
    speed: float  # of decoding at ACCEPTANCE, relative to plain decoding
    shortest: float | None  # answer length in tokens from which on the request is faster, with the draft's prefill


@dataclass(frozen=True)
class Pitfalls:
    requests: tuple[Request, ...]
    draft: int
    rows: tuple[int, ...]
    speculation: tuple[tuple[Speculation, ...], ...]  # for each number of rows
    prompt: int
    ttft_s: float
    tpot_s: tuple[float, ...]


def shortest_answer(ttft_draft: float, tpot: float, speed: float) -> float | None:
    """The answer length in tokens from which on the time saved by speculation exceeds the draft's prefill."""
    return 1 + ttft_draft / (tpot * (1 - 1 / speed)) if speed > 1 else None


def run(experiment: Experiment) -> Pitfalls:
    """Measure the parts and compute the pitfalls."""
    s = experiment.sizes
    draft = experiment.quantized("w8a8")
    works = {
        "ttft": experiment.plain.prefill(1, s.long_prompt // 2),
        "draft ttft": draft.prefill(1, s.long_prompt // 2),
    }
    for rows in (1, s.rows):
        works |= {
            f"tpot {rows}": experiment.plain.decode(rows, s.context),
            f"draft {rows}": draft.decode(rows, s.context),
            f"verify {rows}": experiment.plain.verify(rows, s.context, s.draft),
        }
    seen = {name: t.median for name, t in interleaved({n: x.work for n, x in works.items()}, s.rounds).items()}
    found = []
    for rows in (1, s.rows):
        tpot, verify = seen[f"tpot {rows}"], seen[f"verify {rows}"] / seen[f"tpot {rows}"]
        drafts = (
            ("the model itself with int8 weights and activations", seen[f"draft {rows}"] / tpot, seen["draft ttft"]),
            (f"a model of {SMALL_DRAFT:.0%} of the cost (assumed)", SMALL_DRAFT, SMALL_DRAFT * seen["ttft"]),
        )
        row = []
        for name, share, ttft in drafts:
            speed = tradeoffs.speculation(ACCEPTANCE, s.draft, share, verify)
            row.append(
                Speculation(
                    name,
                    verify,
                    tradeoffs.break_even(s.draft, share, verify),
                    speed,
                    shortest_answer(ttft, tpot, speed),
                )
            )
        found.append(tuple(row))
    return Pitfalls(
        _requests(experiment),
        s.draft,
        (1, s.rows),
        tuple(found),
        s.long_prompt // 2,
        seen["ttft"],
        tuple(seen[f"tpot {rows}"] for rows in (1, s.rows)),
    )


def _requests(experiment: Experiment) -> tuple[Request, ...]:
    """Three requests: a balanced one, whose seconds per token predict the others; one with a long prompt; one with a
    long answer."""
    s = experiment.sizes
    shapes = ((s.prompt, s.prompt), (s.long_prompt - s.prompt // 8, s.prompt // 8), (s.prompt // 4, 2 * s.prompt))
    runs = _request_works(experiment.plain, shapes, 2 * s.prompt)
    times = interleaved(runs, max(2, s.rounds // 2))
    first = times[shapes[0]].median / sum(shapes[0])
    found = []
    ttft = {p: times[p].median for p, _ in shapes}
    # TPOT is taken from the request with the longest answer.
    longest = max(shapes, key=lambda x: x[1])
    tpot = (times[longest].median - ttft[longest[0]]) / (longest[1] - 1)
    for shape in shapes:
        measured = times[shape].median
        two = cost.end_to_end(ttft[shape[0]], tpot, shape[1])
        found.append(Request(*shape, measured, first * sum(shape), two))
    return tuple(found)


def _request_works(
    model: ModelUnderTest, shapes: tuple[tuple[int, int], ...], most: int
) -> dict[object, Callable[[], Timing]]:
    """Timed functions: each prompt's prefill, and each whole request. They share a cache and a decode program."""
    capacity = max(p + n for p, n in shapes)
    state = {
        "cache": model.cache(1, capacity),
        "sampling": SamplingState.create([SamplingOptions()], model.cfg.vocab_size, batch=1),
    }

    def prefill(prompt: int):
        state["cache"] = set_held(state["cache"], 0)
        logits, state["cache"] = steps.prefill(
            model.params, model.cfg, token_ids(model.cfg, 1, prompt), np.full(1, prompt), state["cache"], check=False
        )
        return jnp.argmax(logits, -1).astype(jnp.int32)

    def whole(prompt: int, output: int):
        first = jax.block_until_ready(prefill(prompt))
        out = steps.decode_many(
            model.params, model.cfg, first, state["cache"], state["sampling"], most - 1, steps=output - 1, check=False
        )
        state["cache"], state["sampling"] = out.cache, out.sampling
        return out.tokens

    works: dict[object, Callable[[], Timing]] = {}
    for prompt, output in shapes:
        works[prompt] = lambda p=prompt: once(lambda: prefill(p))
        works[prompt, output] = lambda p=prompt, n=output: once(lambda: whole(p, n))
    return works
