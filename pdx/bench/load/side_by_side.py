"""Compares engines with different settings under the same loads.

Each load is run on every engine in turn, with the same prompts and arrival times, so that a disturbance of the machine
affects all engines alike.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import NoneType
from typing import Any

from pdx.bench.load.measure import LoadResult, check_fits, run
from pdx.bench.load.workload import Load
from pdx.engine.config import EngineConfig, types_of
from pdx.engine.engine import Engine
from pdx.errors import RequestError
from pdx.metrics import Objectives
from pdx.sampling.options import SamplingOptions
from pdx.shapes import round_up
from pdx.weights.load import Model
from pdx.weights.progress import Report, progress_bar

# Settings of the model, not of the engine, that `--vary` accepts too.
MODEL_SETTINGS = ("quantize",)


@dataclass(frozen=True)
class Variant:
    """Settings to compare: the engine's `config` and the model's `quantize`, with a name."""

    name: str
    config: EngineConfig
    quantize: str | None = None


def variants(base: EngineConfig, quantize: str | None, vary: Iterable[str]) -> list[Variant]:
    """All combinations of the values in `vary`: `chunked_prefill=on,off`, `slots=1,4,8`, `kv_dtype=auto,int8`,
    `quantize=none,int8`, or of any other setting of an engine. Other settings are those of `base`.

    Raises RequestError for an unknown setting or an invalid value.
    """
    axes: dict[str, list[tuple[str, Any]]] = {}
    known = [*(f.name for f in dataclasses.fields(EngineConfig)), *MODEL_SETTINGS]
    for text in vary:
        name, _, values = text.partition("=")
        if name not in known:
            raise RequestError(f"{name!r} is no setting of an engine: there are {', '.join(known)}")
        if not values or name in axes:
            raise RequestError(f"--vary {text}: give it once, with its values, such as {name}=A,B")
        axes[name] = [(value, _value(name, value)) for value in values.split(",")]
    found = []
    for combination in itertools.product(*axes.values()):
        changes = {name: value for name, (_, value) in zip(axes, combination, strict=True)}
        label = ", ".join(f"{name} {text}" for name, (text, _) in zip(axes, combination, strict=True))
        stored = changes.pop("quantize", quantize)
        found.append(Variant(label, dataclasses.replace(base, **changes), stored))
    return found


def _value(name: str, text: str) -> Any:
    """The value of a setting, of the type that it is declared with, from its text."""
    if name in MODEL_SETTINGS:
        return None if text in ("none", "off") else text
    kind, *others = types_of(name)
    if kind not in (bool, int, float):
        return text
    try:
        if kind is bool:
            return {"on": True, "true": True, "off": False, "false": False}[text]
        return None if NoneType in others and text in ("none", "auto") else kind(text)
    except (KeyError, ValueError):
        wanted = "on or off" if kind is bool else "a number"
        raise RequestError(f"{name}={text}: it must be {wanted}") from None


def compare(
    models: Mapping[str | None, Model],
    each: Sequence[Variant],
    loads: Sequence[Load],
    objectives: Objectives | None = None,
    *,
    sampling: SamplingOptions | None = None,
) -> list[LoadResult]:
    """Run every load on every variant: one load after the other, on the variants in turn.

    Args:
      models: `quantize` of the variants -> the model quantized like that.
    """
    longest = max(load.longest for load in loads)
    for variant in each:
        check_fits(longest, variant.config.max_context or models[variant.quantize].config.max_context)
    results: list[LoadResult] = []
    with ExitStack() as stack:
        engines = []
        with progress_bar(unit="programs") as report:
            for variant in each:
                engine = _engine(variant, models[variant.quantize], longest, len(each), report)
                engines.append((variant, stack.enter_context(engine)))
        with progress_bar(unit="requests") as report:
            for load in loads:
                for variant, engine in engines:
                    done = run(engine, load, objectives, settings=variant.name, sampling=sampling, report=report)
                    results.append(done)
    return results


def _engine(variant: Variant, model: Model, longest: int, beside: int, report: Report) -> Engine:
    """A variant's engine, compiled. It gets an equal share of the memory of all `beside` engines."""
    context = variant.config.max_context or min(round_up(longest, 128), model.config.max_context)
    share = variant.config.memory_share / beside
    engine = Engine(model, dataclasses.replace(variant.config, max_context=context, memory_share=share))
    engine.start(lambda label, at, total: report(f"{variant.name}: {label}".lstrip(": "), at, total))
    return engine
