"""The lessons: what the target wrote, and for each position its hidden state and its likeliest next tokens.

They lie in a folder, some sequences a file, and are made once: a run that is killed goes on at the file it was at.

    data.json   the settings, and the target
    00000.npz   tokens [n, T], lengths [n], hidden [n, T, D] in f16, top_ids and top_logprobs [n, T, k]
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from pdx.cache.dense import init_cache
from pdx.config import ModelConfig
from pdx.errors import RequestError
from pdx.io import outputs
from pdx.layers.linear import unembed
from pdx.model import Params, forward
from pdx.shapes import DEFAULT_CHUNK, round_up
from pdx.train.config import Data
from pdx.train.texts import Start, starts
from pdx.weights.loaded import Model
from pdx.weights.progress import Report, silent

# Of so many files, the last one is held out.
HELD_OUT_FILES = 8


@struct.dataclass
class Lessons:
    """What the target wrote and thought, on the host; a pytree.

    Attributes:
      hidden: after the last norm, f16.
      top_ids, top_logprobs: the likeliest next tokens behind each position.
    """

    tokens: Int[Array, "n T"]
    lengths: Int[Array, " n"]
    hidden: Float[Array, "n T D"]
    top_ids: Int[Array, "n T k"]
    top_logprobs: Float[Array, "n T k"]

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self.lengths.sum())

    def take(self, rows: Sequence[int] | np.ndarray) -> Lessons:
        """Some of the sequences."""
        return Lessons(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a student can draft: their `ids`, ascending, and the place of each token among them, or -1."""

    ids: Int[np.ndarray, " v"]
    index: Int[np.ndarray, " V"]

    @classmethod
    def likeliest(cls, lessons: Lessons, count: int, tokens: int) -> Vocabulary:
        """The `count` tokens, of `tokens`, that the target finds likeliest over all positions."""
        real = np.arange(lessons.tokens.shape[1]) < lessons.lengths[:, None]
        ids, mass = lessons.top_ids[real], np.exp(lessons.top_logprobs[real].astype(np.float32))
        weight = np.bincount(ids.reshape(-1), mass.reshape(-1), minlength=tokens)
        best = np.sort(np.argsort(-weight, kind="stable")[: min(count, tokens)]).astype(np.int32)
        index = np.full(tokens, -1, np.int32)
        index[best] = np.arange(len(best))
        return cls(best, index)


def make(model: Model, data: Data, folder: Path, progress: Report = silent) -> tuple[Lessons, Lessons]:
    """The lessons in `folder`, those to train on and those held out; what is missing there is made.

    Raises RequestError where the folder holds those of other settings or another target.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder(model, data, folder)
    every = starts(model, data)
    groups = [every[at : at + data.rows] for at in range(0, len(every), data.rows)]
    for i, group in enumerate(groups):
        progress("sequences of the target", i * data.rows, len(every))
        file = folder / f"{i:05}.npz"
        if not _is_whole(file, len(group)):
            _store(file, _lesson(model, data, group))
    progress("sequences of the target", len(every), len(every))
    return _load(folder, len(groups))


def _check_folder(model: Model, data: Data, folder: Path) -> None:
    settings = dataclasses.asdict(data) | {"target": model.name, "config": json.loads(model.config.to_json())}
    del settings["sequences"]  # more of them begin with the same ones
    file = folder / "data.json"
    if not file.is_file():
        outputs.write_text(file, json.dumps(settings, indent=1))
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    if other := [name for name in settings if there.get(name) != settings[name]]:
        raise RequestError(
            f"{folder} was made with another {other[0]} ({there.get(other[0])!r}, not {settings[other[0]]!r}): "
            "name a new folder, or the settings it was made with"
        )


def _lesson(model: Model, data: Data, group: Sequence[Start]) -> Lessons:
    """Let the target continue the starts, and keep what it thought on the way."""
    lengths = np.array([len(s.tokens) for s in group], np.int32)
    tokens = np.zeros((len(group), data.length), np.int32)
    for row, start in enumerate(group):
        tokens[row, : lengths[row]] = start.tokens
    ends = np.array(sorted(model.tokenizer.eos_ids), np.int32)
    written = write(
        model.params,
        tokens,
        lengths,
        np.array([s.temperature for s in group], np.float32),
        np.array([s.seed for s in group], np.uint32),
        ends,
        cfg=model.config,
        width=round_up(int(lengths.max()), 16),
        top_k=min(data.top_k, model.config.vocab_size),
    )
    return jax.device_get(written)


@partial(jax.jit, static_argnames=("cfg", "width", "top_k"))
def write(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    temperatures: Float[Array, " B"],
    seeds: Int[Array, " B"],
    ends: Int[Array, " e"],
    *,
    cfg: ModelConfig,
    width: int,
    top_k: int,
) -> Lessons:
    """Continue each row of `tokens` from its `lengths` on, up to T tokens or one of `ends`, in one program.

    `width`: at least the longest start.
    """
    b, t = tokens.shape
    rows = jnp.arange(b)
    cache = init_cache(cfg, b, t, dtype=params["final_norm"].dtype, chunk=max(width, DEFAULT_CHUNK))
    keys = jax.vmap(jax.random.key)(seeds)

    def thought(hidden):
        """The hidden states, and the likeliest next tokens."""
        logits = unembed(hidden, params.get("lm_head", params["embed"]), cfg.logit_softcap)
        best, ids = lax.top_k(logits, top_k)
        logprobs = best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return hidden.astype(jnp.float16), ids.astype(jnp.int32), logprobs.astype(jnp.float16)

    def next_tokens(found, held):
        """Drawn among the likeliest: noise for the whole vocabulary would cost a seventh of a step."""
        _, ids, logprobs = found
        noise = jax.vmap(lambda key, at: jax.random.gumbel(jax.random.fold_in(key, at), (top_k,)))(keys, held)
        best = (logprobs.astype(jnp.float32) + temperatures[:, None] * noise).argmax(-1)
        return jnp.take_along_axis(ids, best[:, None], axis=1)[:, 0]

    def put(kept, new, at):
        return jax.tree.map(lambda whole, part: whole.at[rows, at].set(part, mode="drop"), kept, new)

    out = forward(params, cfg, tokens[:, :width], cache, lengths=lengths, logits="none", kernels="xla")
    # Some rows at a time: their logits over the whole vocabulary are in memory at once.
    first = lax.map(thought, out.final_hidden)
    kept = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, t - width), (0, 0))), first)
    last = jnp.take_along_axis(out.final_hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    newest = next_tokens(thought(last), lengths)

    def goes_on(carry):
        return jnp.any(carry[-1])

    def step(carry):
        cache, tokens, lengths, kept, newest, active = carry
        at = jnp.where(active, lengths, t)
        tokens = tokens.at[rows, at].set(newest, mode="drop")
        out = forward(
            params, cfg, newest[:, None], cache, lengths=active.astype(jnp.int32), logits="none", kernels="xla"
        )
        new = thought(out.final_hidden[:, 0])
        kept, lengths = put(kept, new, at), lengths + active
        active &= (lengths < t) & ~jnp.isin(newest, ends)
        return out.cache, tokens, lengths, kept, next_tokens(new, lengths), active

    start = (out.cache, jnp.asarray(tokens), jnp.asarray(lengths), kept, newest, lengths < t)
    _, tokens, lengths, kept, *_ = lax.while_loop(goes_on, step, start)
    return Lessons(tokens, lengths, *kept)


def _is_whole(file: Path, sequences: int) -> bool:
    """Whether a file of so many sequences is there; it was written as a whole, or not at all."""
    if not file.is_file():
        return False
    with np.load(file) as there:
        return len(there["lengths"]) == sequences


def _store(file: Path, lessons: Lessons) -> None:
    with outputs.unfinished(file) as part:
        with open(part, "wb") as stream:
            np.savez(stream, **{f.name: getattr(lessons, f.name) for f in dataclasses.fields(lessons)})
        os.replace(part, file)


def _load(folder: Path, count: int) -> tuple[Lessons, Lessons]:
    parts: list[dict[str, np.ndarray]] = []
    for i in range(count):
        with np.load(folder / f"{i:05}.npz") as file:
            parts.append({f.name: file[f.name] for f in dataclasses.fields(Lessons)})
    out = [i % HELD_OUT_FILES == min(HELD_OUT_FILES, count) - 1 for i in range(count)]

    def joined(which: bool) -> Lessons:
        chosen = [p for p, o in zip(parts, out, strict=True) if o is which] or parts
        return Lessons(*(np.concatenate([p[f.name] for p in chosen]) for f in dataclasses.fields(Lessons)))

    return joined(False), joined(True)
