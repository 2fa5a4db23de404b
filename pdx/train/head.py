"""An EAGLE head: what it is trained on, and its loss (`pdx.speculative.eagle` says what it is)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pdx.cache.rows import TokenRows
from pdx.layers.linear import embed
from pdx.model import Params, init_params
from pdx.speculative.eagle import head_config, own_logits, predict
from pdx.train.config import Eagle
from pdx.train.data import Lessons, Vocabulary
from pdx.train.draft import as_floats, scaled_down
from pdx.train.losses import divergence, mean
from pdx.weights.loaded import Model

# The share of each diagonal element that a regression adds to it.
RIDGE = 0.01


class HeadStudent:
    """What `loop.train` trains: see `Student`.

    Entry t of a sequence takes token t + 1 and hidden state t, and shall predict hidden state t + 1. In a share of the
    entries hidden state t is the head's own prediction, as it will be from the second token of a draft on.
    """

    # They begin as a regression and as the target's.
    SLOW = ("fc", "lm_head")

    def __init__(self, target: Model, settings: Eagle, lessons: Lessons):
        self.target, self.settings, self.config = target, settings, head_config(target.config)
        self.lessons = lessons
        self.vocabulary = Vocabulary.likeliest(lessons, settings.vocabulary, target.config.vocab_size)

    @property
    def frozen(self) -> Params:
        return {"embed": self.target.params["embed"], "index": self.vocabulary.index}

    def init(self, key: jax.Array) -> Params:
        target = self.target.params
        head = as_floats(target.get("lm_head", target["embed"]))
        layers = scaled_down(init_params(self.config, key))["layers"]
        table = as_floats(target["embed"]) * self.config.embed_scale
        fc = best_linear(table, self.lessons)
        return {"fc": jnp.asarray(fc), "layers": layers, "lm_head": jnp.asarray(head[self.vocabulary.ids])}

    def loss(self, params: Params, frozen: Params, batch: Lessons, key: jax.Array) -> tuple[Array, dict[str, Array]]:
        cfg, count = self.config, batch.tokens.shape[1] - 1
        embedded = embed(frozen["embed"], jnp.asarray(batch.tokens)[:, 1:], cfg.embed_scale)
        hidden = jnp.asarray(batch.hidden, jnp.float32)
        given, wanted = hidden[:, :-1], hidden[:, 1:]
        lengths = jnp.asarray(batch.lengths) - 1
        rows = TokenRows.behind(jnp.zeros_like(lengths), lengths, count)

        def run(given):
            return predict(params, cfg, embedded, given, rows, kernels="xla")[0]

        own = jnp.roll(jax.lax.stop_gradient(run(given)), 1, axis=1)
        fed = jax.random.uniform(key, given.shape[:2]) < self.settings.feedback
        fed = fed.at[:, 0].set(False)
        found = run(jnp.where(fed[..., None], own, given))
        logits = own_logits(params, cfg, found)
        ids = frozen["index"][batch.top_ids[:, 1:]]
        kl = mean(divergence(logits, ids, batch.top_logprobs[:, 1:]), rows.real)
        regression = mean(smooth_l1(found - wanted).mean(-1), rows.real)
        agreed = mean((logits.argmax(-1) == ids[..., 0]).astype(jnp.float32), rows.real)
        loss = kl + self.settings.regression * regression
        return loss, {"divergence": kl, "regression": regression, "agreement": agreed}

    def finished(self, params: Params) -> Params:
        return params | {"vocabulary": jnp.asarray(self.vocabulary.ids, jnp.int32)}


def best_linear(table: np.ndarray, lessons: Lessons) -> np.ndarray:
    """The matrix [D, 2D] that predicts hidden state t + 1 best from embedding t + 1 and hidden state t: the ridge
    regression over the lessons, from which training begins."""
    width = table.shape[1]
    squares, products = np.zeros((2 * width, 2 * width)), np.zeros((2 * width, width))
    for tokens, length, hidden in zip(lessons.tokens, lessons.lengths, lessons.hidden, strict=True):
        states = hidden[:length].astype(np.float32)
        given = np.concatenate([table[tokens[1:length]], states[:-1]], axis=1)
        squares += given.T @ given
        products += given.T @ states[1:]
    # Columns of embeddings are much smaller than those of hidden states: each is held back by its own size.
    squares[np.diag_indices_from(squares)] *= 1 + RIDGE
    squares[np.diag_indices_from(squares)] += 1e-6
    return np.linalg.solve(squares, products).T.astype(np.float32)


def smooth_l1(x: Array) -> Array:
    """x^2 / 2 near zero, |x| - 1/2 beyond one."""
    size = jnp.abs(x)
    return jnp.where(size < 1, 0.5 * x**2, size - 0.5)
