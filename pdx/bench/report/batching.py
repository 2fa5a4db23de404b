"""Requests of mixed length in static batches and on the engine, to measure continuous batching."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pdx import steps
from pdx.bench.timed_work import ModelUnderTest, TimedWork, token_ids
from pdx.bench.timing import Timing, once
from pdx.cost import Cost, Phase, Setup
from pdx.engine.config import EngineConfig
from pdx.engine.engine import Engine
from pdx.engine.request import EngineRequest
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import SamplingState
from pdx.shapes import round_up
from pdx.weights.loaded import Model


def mixed_lengths(count: int, mean: int, seed: int = 0) -> list[int]:
    """`count` lengths of answers with this mean, many short and a few long, in random order.

    They are quantiles of an exponential distribution, at least 1.
    """
    parts = (np.arange(count) + 0.5) / count
    lengths = np.maximum(1, np.rint(-mean * np.log(1 - parts))).astype(int)
    return np.random.default_rng(seed).permutation(lengths).tolist()


def static_batches(model: ModelUnderTest, prompt: int, outputs: list[int], rows: int) -> TimedWork:
    """Batches of `rows` requests in order, each decoded until its longest answer is finished; seconds of all."""
    groups = [outputs[at : at + rows] for at in range(0, len(outputs), rows)]
    longest = max(outputs)
    capacity = round_up(prompt + longest, 128)
    ids, lengths = token_ids(model.cfg, rows, prompt), np.full(rows, prompt)
    state = {
        "cache": model.cache(rows, capacity, chunk=prompt),
        "sampling": SamplingState.create([SamplingOptions()] * rows, model.cfg.vocab_size),
    }

    def serve():
        for group in groups:
            cache = state["cache"].truncate(np.zeros(rows, np.int32))
            logits, state["cache"] = steps.prefill(model.params, model.cfg, ids, lengths, cache, check=False)
            out = steps.decode_many(
                model.params,
                model.cfg,
                jnp.argmax(logits, -1).astype(jnp.int32),
                state["cache"],
                state["sampling"],
                longest,
                steps=max(group) - 1,
                check=False,
            )
            state["cache"], state["sampling"] = out.cache, out.sampling
            jax.block_until_ready(out.tokens)

    def work() -> Timing:
        jax.block_until_ready(state["cache"])
        return once(serve)

    def load(setup: Setup) -> list[Cost]:
        found = []
        for group in groups:
            found.append(setup.prefill(rows, prompt))
            found += [setup.decode(rows, prompt + i) for i in range(1, max(group))]
        return found

    return TimedWork(f"static batches of {rows}", _phase(outputs), work, sum(outputs), model.setup, load)


def engine(model: Model, prompt: int, longest: int, rows: int) -> Engine:
    """An engine whose steps have room for the prompts of all rows."""
    config = EngineConfig(
        slots=rows,
        prefill_rows=rows,
        token_budget=rows * prompt,
        prefix_cache=False,
        max_context=min(model.config.max_context, round_up(prompt + longest, 128)),
    )
    return Engine(model, config)


def continuous(running: Engine, model: ModelUnderTest, prompt: int, outputs: list[int]) -> TimedWork:
    """The same requests on an engine, which admits each as soon as a slot is free."""
    rows = running.config.slots
    ids = tuple(token_ids(model.cfg, 1, prompt)[0].tolist())
    requests = [EngineRequest(ids, SamplingOptions(max_tokens=n, ignore_eos=True)) for n in outputs]

    def load(setup: Setup) -> list[Cost]:
        return [setup.mixed(step) for step in _schedule(prompt, outputs, rows)]

    return TimedWork(
        f"an engine of {rows} slots",
        _phase(outputs),
        lambda: once(lambda: running.generate(requests)),
        sum(outputs),
        model.setup,
        load,
    )


def _schedule(prompt: int, outputs: list[int], rows: int) -> Iterator[list[tuple[int, int]]]:
    """The rows (new tokens, held tokens) of each step, if a free slot takes the next request at once."""
    waiting, slots = list(outputs), []
    while waiting or slots:
        joined = [[prompt, 0, n] for n in waiting[: rows - len(slots)]]
        waiting = waiting[len(joined) :]
        slots += joined
        yield [(new, held) for new, held, _ in slots]
        slots = [[1, held + new, left - 1] for new, held, left in slots if left > 1]


def _phase(outputs: list[int]) -> Phase:
    """The phase that dominates: answers of one token need no decode steps."""
    return "prefill" if max(outputs) == 1 else "decode"
