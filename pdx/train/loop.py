"""The training loop: AdamW, a schedule, clipping, asynchronous checkpoints, and a log of one line a step.

A run that is killed goes on at its last checkpoint: the sequences of a step depend on the seed and the step only, so
the loss curve is that of a run that was not killed.

    checkpoints/   orbax: parameters and optimizer state, the last two
    log.jsonl      {"step", "loss", "rate", "seconds", ...}; at evaluations also "held_out_divergence", ...
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from pdx.errors import RequestError
from pdx.io import outputs
from pdx.model import Params
from pdx.train.config import Train
from pdx.train.data import Lessons
from pdx.weights.progress import Report, silent

# The rate of embeddings and heads that begin as the target's: rare tokens have small gradients, which AdamW enlarges.
SLOW_RATE = 0.25
# Checkpoints that are kept: one may be unfinished when the run is killed.
KEPT = 2


class Student(Protocol):
    """What is trained.

    Attributes:
      settings: its own.
      SLOW: parameters at the top of the tree that learn at `SLOW_RATE`.
      frozen: arrays of the target that its loss needs.
    """

    settings: Any
    SLOW: ClassVar[tuple[str, ...]]

    @property
    def frozen(self) -> Params: ...

    def init(self, key: jax.Array) -> Params: ...

    def loss(self, params: Params, frozen: Params, batch: Lessons, key: jax.Array) -> tuple[Array, dict[str, Array]]:
        """The loss over a batch, and what is logged beside it: `divergence` and `agreement` at least."""
        ...

    def finished(self, params: Params) -> Params:
        """The parameters to store."""
        ...


def train(
    student: Student, settings: Train, lessons: Lessons, held_out: Lessons, folder: Path, progress: Report = silent
) -> tuple[Params, list[dict]]:
    """Train in `folder`, or go on there; returns the parameters and the log.

    Raises RequestError where the folder holds a run of other settings, or where the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder(folder, student, settings)
    optimizer = make_optimizer(settings, student.SLOW)
    params = student.init(jax.random.key(settings.seed))
    state = {"params": params, "optimizer": optimizer.init(params)}
    step, evaluate = make_step(student, optimizer)
    with _Checkpoints(folder / "checkpoints") as checkpoints:
        state, done = checkpoints.restore(state)
        log = _Log(folder / "log.jsonl", done)
        for at in range(done, settings.steps):
            progress("steps", at, settings.steps)
            begin = time.perf_counter()
            batch = lessons.take(rows_of(at, settings, len(lessons.lengths)))
            key = jax.random.fold_in(jax.random.key(settings.seed), at)
            state, seen = step(state, student.frozen, batch, key)
            line = {"step": at + 1, **{name: float(x) for name, x in seen.items()}}
            if not np.isfinite(line["loss"]):
                raise RequestError(f"the loss of step {at + 1} is {line['loss']}: lower train.learning_rate")
            if (at + 1) % settings.evaluate_every == 0 or at + 1 == settings.steps:
                line |= _held_out(evaluate, state["params"], student.frozen, held_out, settings)
            log.add(line | {"seconds": time.perf_counter() - begin})
            if (at + 1) % settings.checkpoint_every == 0 or at + 1 == settings.steps:
                checkpoints.save(at + 1, state)
        progress("steps", settings.steps, settings.steps)
    return student.finished(state["params"]), log.lines


def make_optimizer(settings: Train, slow: tuple[str, ...]) -> optax.GradientTransformation:
    """Clipping, then AdamW whose rate rises over `warmup` steps and falls to a tenth along a cosine."""
    warmup = min(settings.warmup, settings.steps - 1)
    rate = optax.warmup_cosine_decay_schedule(
        settings.learning_rate if warmup == 0 else 0.0,
        settings.learning_rate,
        warmup,
        settings.steps,
        settings.learning_rate / 10,
    )

    def rates(params: Params) -> Params:
        return {name: jax.tree.map(lambda _, n=name: n in slow, x) for name, x in params.items()}

    def matrices(params: Params) -> Params:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(rate, b2=0.98, weight_decay=settings.weight_decay, mask=matrices),
        optax.masked(optax.scale(SLOW_RATE), rates),
    )


def make_step(student: Student, optimizer: optax.GradientTransformation) -> tuple[Callable, Callable]:
    """One step of the optimizer, and the loss alone, both compiled."""

    @jax.jit
    def step(state: dict[str, Any], frozen: Params, batch: Lessons, key: jax.Array):
        losses = jax.value_and_grad(student.loss, has_aux=True)
        (loss, seen), gradients = losses(state["params"], frozen, batch, key)
        updates, kept = optimizer.update(gradients, state["optimizer"], state["params"])
        seen = {"loss": loss, **seen, "gradient_norm": optax.tree.norm(gradients)}
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": kept}, seen

    return step, jax.jit(lambda *of: student.loss(*of)[1])


def rows_of(step: int, settings: Train, count: int) -> np.ndarray:
    """The sequences of a step: each epoch goes through all of them in an order of its own."""
    at = step * settings.batch + np.arange(settings.batch)
    orders = {int(e): np.random.default_rng((settings.seed, int(e))).permutation(count) for e in np.unique(at // count)}
    return np.array([orders[int(i // count)][i % count] for i in at])


def _held_out(evaluate: Callable, params: Params, frozen: Params, lessons: Lessons, settings: Train) -> dict:
    """The mean over all held-out sequences, weighted by their tokens."""
    totals: dict[str, float] = {}
    key, weight = jax.random.key(0), 0
    for at in range(0, len(lessons.lengths), settings.batch):
        rows = np.arange(at, at + settings.batch)
        part = lessons.take(np.minimum(rows, len(lessons.lengths) - 1))
        part = part.replace(lengths=np.where(rows < len(lessons.lengths), part.lengths, 0))
        tokens = int(part.lengths.sum())
        for name, x in evaluate(params, frozen, part, key).items():
            totals[name] = totals.get(name, 0.0) + float(x) * tokens
        weight += tokens
    return {f"held_out_{name}": total / weight for name, total in totals.items()}


def _check_folder(folder: Path, student: Student, settings: Train) -> None:
    parts = (settings, student.settings)
    wanted = {f"{p.SECTION}.{name}": x for p in parts for name, x in dataclasses.asdict(p).items()}
    file = folder / "settings.json"
    if not file.is_file():
        outputs.write_text(file, json.dumps(wanted, indent=1))
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    if other := [name for name, x in wanted.items() if there.get(name) != x]:
        raise RequestError(f"{folder} holds a run with another {', '.join(other)}: name a new folder, or remove it")


class _Log:
    """Lines of JSON; those behind the checkpoint that a run goes on from are dropped."""

    def __init__(self, file: Path, done: int):
        self.file = file
        text = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        whole = [json.loads(line) for line in text if line.endswith("}")]
        self.lines: list[dict] = [line for line in whole if line["step"] <= done]
        outputs.write_text(file, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, line: dict) -> None:
        self.lines.append(line)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class _Checkpoints:
    """Checkpoints of the training state, written in the background."""

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager, self._args = ocp.CheckpointManager(folder.absolute(), options=options), ocp.args

    def __enter__(self) -> _Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def restore(self, state: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The last state and its step; without a checkpoint, `state` and 0."""
        step = self._manager.latest_step()
        if step is None:
            return state, 0
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.asarray(x).dtype), state)
        return self._manager.restore(step, args=self._args.StandardRestore(wanted)), step

    def save(self, step: int, state: dict[str, Any]) -> None:
        self._manager.save(step, args=self._args.StandardSave(state), force=True)
