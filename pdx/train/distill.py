"""`distill`: a draft model, or an EAGLE head, made from a target's own outputs and measured on held-out prompts."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from pdx.generation.offline import stream
from pdx.io import outputs
from pdx.metrics import SpeculationCounts
from pdx.model import Params
from pdx.quant import Kind as Stored
from pdx.quant import name_of, rounded
from pdx.speculative.options import Speculation
from pdx.train import card, texts
from pdx.train.card import MEASURED_DRAFT, MEASURED_TOKENS, Distilled
from pdx.train.config import DistillConfig, Kind, check_kind
from pdx.train.data import make
from pdx.train.draft import DraftStudent
from pdx.train.head import HeadStudent
from pdx.train.loop import train
from pdx.weights.checkpoint import save
from pdx.weights.loaded import Model
from pdx.weights.progress import Report, silent

# Prompts that are measured together.
MEASURED_ROWS = 8


def distill(
    model: Model,
    out: str | Path,
    config: DistillConfig | None = None,
    *,
    kind: Kind = "draft",
    progress: Report = silent,
) -> Distilled:
    """Make a draft model (`draft`) or a head (`eagle`) for a target, in the folder `out`.

    `out/data` holds the target's outputs, which both share; `out/draft` and `out/eagle` the training and, in `model`,
    the result in int8. What is there already is not made again: a run that was killed goes on.

    Raises:
      RequestError: a setting out of range, a folder that holds work of other settings or cannot be written.

    Example:
      >>> model = pdx.load()  # doctest: +SKIP
      >>> made = distill(model, "out")  # doctest: +SKIP
      >>> pdx.generate(model, "Bees find", speculate=f"draft:{made.path}")  # doctest: +SKIP
    """
    check_kind(kind)
    config, out = config or DistillConfig(), Path(out).expanduser()
    outputs.check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    with outputs.locked(out / "data", "pdx distill"):
        lessons, held_out = make(model, config.data, out / "data", progress)
    with outputs.locked(out / kind, "pdx distill"):
        made_of = (DraftStudent, config.draft) if kind == "draft" else (HeadStudent, config.eagle)
        student = made_of[0](model, made_of[1], lessons)
        params, log = train(student, config.train, lessons, held_out, out / kind, progress)
        path = out / kind / "model"
        shutil.rmtree(path, ignore_errors=True)  # of a run before: it is made from the checkpoint
        small = Model(in_int8(params), student.config, f"{kind} for {model.name}", path, jnp.dtype(jnp.float32))
        save(replace(small, license=model.license, terms=model.terms), path)
        made = Distilled(
            path=path,
            kind=kind,
            target=model.name,
            config=config,
            parameters=sum(x.size for x in jax.tree.leaves(params)),
            size_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            tokens=lessons.count,
            held_out_tokens=held_out.count,
            device=device(),
            log=log,
            accepted=measure(model, Speculation(kind, MEASURED_DRAFT, model=small), config, progress),
        )
        card.write(made)
    return made


def device() -> str:
    """The device that trains, in words."""
    first = jax.devices()[0]
    return f"{os.cpu_count()} cores of a CPU" if first.platform == "cpu" else first.device_kind


def in_int8(params: Params) -> Params:
    """Parameters whose matrices of floats are in int8, one scale a row."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return rounded(params, {name_of(path): Stored(8) for path, x in leaves if x.ndim == 2})


def measure(
    model: Model, speculation: Speculation, config: DistillConfig, progress: Report = silent
) -> dict[str, SpeculationCounts]:
    """What is accepted over the held-out prompts, by kind, in greedy answers."""
    by_kind = texts.held_out(model, config.data)
    kinds = [kind for kind, prompts in by_kind.items() for _ in prompts]
    prompts = [ids for every in by_kind.values() for ids in every]
    found = dict.fromkeys(by_kind, SpeculationCounts())
    progress("held-out prompts", 0, len(prompts))
    # In batches of one shape: another one would be compiled again.
    settings = {"max_tokens": MEASURED_TOKENS, "speculate": speculation, "batch_size": MEASURED_ROWS}
    for piece in stream(model, prompts, **settings):
        if piece.completion is not None:
            found[kinds[piece.index]] += piece.completion.speculation or SpeculationCounts()
            progress("held-out prompts", piece.index + 1, len(prompts))
    return found
