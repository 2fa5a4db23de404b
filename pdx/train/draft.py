"""A draft model: a small one of the target's tokens, whose embedding begins as a projection of the target's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import QuantArray
from pallas_kernels.quant_array import dequantize
from pdx.config import ModelConfig, RopeConfig
from pdx.errors import RequestError
from pdx.model import Params, forward, init_params
from pdx.train.config import Draft
from pdx.train.data import Lessons, Vocabulary
from pdx.train.losses import divergence, mean
from pdx.weights.loaded import Model


def draft_config(target: ModelConfig, settings: Draft) -> ModelConfig:
    """The draft's configuration. Raises RequestError for sizes that do not fit together."""
    sizes = {name: size for name, size in asdict(settings).items() if name != "vocabulary"}
    try:
        return ModelConfig(
            family=target.family,
            vocab_size=target.vocab_size,
            max_context=target.max_context,
            rope=RopeConfig(target.rope.theta),
            norm_eps=target.norm_eps,
            activation=target.activation,
            embed_scale=settings.d_model**0.5,  # rows of the embedding have length one, entries of the stream size one
            tie_embeddings=False,
            **sizes,
        )
    except ValueError as error:
        raise RequestError(f"[draft] does not fit together: {error}") from None


class DraftStudent:
    """What `loop.train` trains: see `Student`."""

    # Embedding and head begin near where they shall be.
    SLOW = ("embed", "lm_head")

    def __init__(self, target: Model, settings: Draft, lessons: Lessons):
        self.target, self.settings, self.config = target, settings, draft_config(target.config, settings)
        self.vocabulary = Vocabulary.likeliest(lessons, settings.vocabulary, target.config.vocab_size)

    @property
    def frozen(self) -> Params:
        return {"index": self.vocabulary.index}

    def init(self, key: jax.Array) -> Params:
        params, target = scaled_down(init_params(self.config, key)), self.target.params
        table, head = target["embed"], target.get("lm_head", target["embed"])
        both = {"embed": projected(table, self.config.d_model, key)}
        return params | both | {"lm_head": projected(head, self.config.d_model, key)[self.vocabulary.ids]}

    def loss(self, params: Params, frozen: Params, batch: Lessons, key: jax.Array) -> tuple[Array, dict[str, Array]]:
        logits = forward(params, self.config, batch.tokens, logits="all", kernels="xla").logits
        real = jnp.arange(batch.tokens.shape[1]) < jnp.asarray(batch.lengths)[:, None]
        ids = frozen["index"][batch.top_ids]
        loss = mean(divergence(logits, ids, batch.top_logprobs), real)
        agreed = mean((logits.argmax(-1) == ids[..., 0]).astype(jnp.float32), real)
        return loss, {"divergence": loss, "agreement": agreed}

    def finished(self, params: Params) -> Params:
        return params | {"vocabulary": jnp.asarray(self.vocabulary.ids, jnp.int32)}


def scaled_down(params: Params) -> Params:
    """With projections back into the stream that begin small: each layer begins near the identity."""
    small = {"o_proj": 0.2, "down_proj": 0.2}
    layers = [{name: x * small.get(name, 1.0) for name, x in p.items()} for p in params["layers"]]
    return params | {"layers": layers}


def projected(table: Any, width: int, key: jax.Array) -> Float[Array, "V d"]:
    """The embedding on its `width` principal directions, turned at random, so that no column is the largest.

    Rows have a length of one in the mean. Where the target is narrower, the other columns are random.
    """
    rows = as_floats(table)
    _, directions = np.linalg.eigh(rows.T @ rows)
    kept = rows @ directions[:, ::-1][:, :width]
    first, second = jax.random.split(key)
    if kept.shape[1] < width:
        more = np.asarray(jax.random.normal(first, (len(rows), width - kept.shape[1])))
        kept = np.concatenate([kept, more * kept.std()], axis=1)
    turn, _ = np.linalg.qr(np.asarray(jax.random.normal(second, (width, width))))
    kept = kept @ turn
    return jnp.asarray(kept / np.linalg.norm(kept, axis=1).mean(), jnp.float32)


def as_floats(table: Any) -> np.ndarray:
    """A matrix on the host in f32, quantized or not."""
    return np.asarray(dequantize(table) if isinstance(table, QuantArray) else table, np.float32)
