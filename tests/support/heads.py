"""An EAGLE head for a tiny target, and what it drafts by the definition: from a whole text at once, without a cache."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pdx.cache.rows import TokenRows
from pdx.layers.linear import embed
from pdx.model import forward
from pdx.sharding import is_spec
from pdx.speculative.eagle import head_config, head_specs, own_logits, predict
from pdx.weights.loaded import Model

LONGEST = 128


def make(model: Model, seed: int = 5) -> Model:
    """Random weights in every leaf, on top of one that predicts the hidden state it is given: it drafts repetitions. It
    can draft the even ids."""
    width, ids = model.config.d_model, jnp.arange(0, model.config.vocab_size, 2, dtype=jnp.int32)
    leaves, tree = jax.tree.flatten(head_specs(model.config, len(ids)), is_leaf=is_spec)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [0.05 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, made)
    params["fc"] += jnp.concatenate([jnp.zeros((width, width)), jnp.eye(width)], axis=1)
    params |= {"vocabulary": ids, "lm_head": params["lm_head"] + model.params["embed"][ids]}
    return Model(params, head_config(model.config), "head", Path("head"), model.dtype)


def entries(model: Model, text: list[int]) -> tuple[jax.Array, jax.Array]:
    """What the entry of each token is made of, [1, LONGEST, D] each: its embedding, and the target's hidden state of
    the token before; zeros before the first one."""
    ids = jnp.asarray([text + [0] * (LONGEST - len(text))])
    return _entries(model.params, model.config, ids)


@partial(jax.jit, static_argnames="cfg")
def _entries(params, cfg, ids):
    hidden = forward(params, cfg, ids, logits="none").final_hidden
    return embed(params["embed"], ids, cfg.embed_scale), jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))


def drafts(model: Model, head: Model, text: list[int], count: int) -> list[int]:
    """The greedy drafts behind a text. The entries of drafted tokens are made of the head's own predictions."""
    embedded, hidden = entries(model, text)
    found: list[int] = []
    for held in range(len(text), len(text) + count):
        x = _predict(head.params, head.config, embedded, hidden, jnp.array([held]))[0, held - 1]
        best = int(np.argmax(own_logits(head.params, head.config, x)))
        found.append(int(head.params["vocabulary"][best]))
        one = embed(model.params["embed"], jnp.asarray([[found[-1]]]), model.config.embed_scale)[0, 0]
        embedded, hidden = embedded.at[0, held].set(one), hidden.at[0, held].set(x)
    return found


@partial(jax.jit, static_argnames="cfg")
def _predict(params, cfg, embedded, hidden, held):
    rows = TokenRows.behind(jnp.zeros(1, jnp.int32), held, LONGEST)
    return predict(params, cfg, embedded, hidden, rows)[0]
