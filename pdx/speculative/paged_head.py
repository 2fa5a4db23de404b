"""An EAGLE head in an engine: its one layer lies in the pages, behind the target's.

The entry of position t is made of token t and the target's hidden state of token t - 1. So what a page holds depends on
the tokens up to its last one, and page copies, shared prefixes and preemption treat it as any other layer. It is
written in the step that reads token t; only the hidden state of each slot's last token waits for the next step. An
entry is the keys and values of one layer, so it takes the products in front of the attention and no more: the compiler
drops the rest of the layer, whose result nobody reads.

A draft writes entries of predicted hidden states. The step that verifies it writes them again, from the target's own;
those of rejected tokens are overwritten as their keys and values are.

A hidden state that nobody knows counts as zeros: that of the token before a shared prefix ends, and before the first
one. That costs acceptance, and is never wrong, since every draft is verified.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import QuantArray
from pallas_kernels.quant_array import dequantize
from pdx.cache.paged import PagedCache
from pdx.config import ModelConfig
from pdx.layers.linear import embed
from pdx.model import Params
from pdx.sharding import constrain_rows, place_rows
from pdx.speculative.drawing import Prepared, Rows, decode
from pdx.speculative.eagle import Eagle, own_logits, predict
from pdx.speculative.options import Speculation
from pdx.speculative.proposers import always_available
from pdx.speculative.reading import Reader, ReadTokens
from pdx.speculative.slots import SlotPages


def paged_layers(cfg: ModelConfig, speculation: Speculation | None) -> ModelConfig:
    """The layers that an engine's pages hold: the target's, and behind them the head's, which sees everything.

    It shares the block table of the layers without a window. Where there are none, it has a page group of its own.
    """
    if speculation is None or speculation.proposer != "eagle":
        return cfg
    return dataclasses.replace(cfg, num_layers=cfg.num_layers + 1, windows=(*cfg.windows, None))


def with_float_entries(head: Params) -> Params:
    """The head with floats for the matrices that every step multiplies.

    They are small. On two cores of an AMD EPYC the entries of 8 rows took 1.0 ms from int8 matrices, 0.4 ms from
    floats.
    """
    layer = dict(head["layers"][0])
    layer |= {name: _as_float(layer[name]) for name in ("k_proj", "v_proj")}
    return head | {"fc": _as_float(head["fc"]), "layers": [layer]}


def _as_float(w: Any) -> Any:
    return dequantize(w) if isinstance(w, QuantArray) else w


@struct.dataclass
class HeadState:
    """The target's hidden state of the last token of each slot's request; zeros: nobody knows it."""

    hidden: Float[Array, "S D"]
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def create(cls, slots: int, width: int, dtype: Any, mesh: Mesh | None) -> HeadState:
        """Behind nothing. `width`: of a hidden state."""
        return cls(place_rows(jnp.zeros((slots, width), dtype), mesh), mesh)

    def emptied(self, slots: Bool[Array, " S"]) -> HeadState:
        """The state in which these slots are empty, for other requests."""
        return self.replace(hidden=jnp.where(slots[:, None], 0, self.hidden))

    def placed(self) -> HeadState:
        """The state constrained to its placement on the mesh."""
        return self.replace(hidden=constrain_rows(self.hidden, self.mesh))


@struct.dataclass
class HeadPages:
    """The head's pages of each slot, and the hidden state that its next entry is made of."""

    pages: SlotPages
    hidden: Float[Array, "S D"]

    def append(self, params: Params, cfg: ModelConfig, tokens: Int[Array, "S 1"], lengths: Int[Array, " S"], kernels):
        """Append an entry to the slots of length 1; returns the logits behind it, and the pages with the hidden states
        that the head predicts. `params`: the head's, and the target's embedding."""
        cache, rows = self.pages.cache, self.pages.one_each(lengths)
        embedded = embed(params["embed"], tokens.T, cfg.embed_scale, cache.mesh)
        x, cache = predict(params, cfg, embedded, self.hidden[None], rows, cache, kernels=kernels)
        after = HeadPages(self.pages.advanced(cache, lengths), x[0].astype(self.hidden.dtype))
        return own_logits(params, cfg, x[0]), after


@dataclass(frozen=True)
class PagedEagle(Reader):
    """Drafts with an EAGLE head over an engine's pages, the last layer of which is the head's; its state is a
    `HeadState`.

    Attributes:
      cfg: as `head_config`.
    """

    cfg: ModelConfig
    prior: ClassVar[tuple[float, ...]] = Eagle.prior

    def prepare(self, rows: Rows, state: HeadState, most: int) -> Prepared:
        return always_available(rows, most)

    def draft(self, rows: Rows, state: HeadState, prepared: Prepared, length: int, cfg: ModelConfig, kernels: Any):
        pages: SlotPages = rows.cache
        own = HeadPages(pages.replace(cache=pages.cache.last_layer()), state.hidden)
        params = {**(rows.draft_params or {}), "embed": rows.params["embed"]}
        feed = rows.newest[:, None], rows.active.astype(jnp.int32)
        drafted, own = decode(params, self.cfg, own, feed, rows, prepared, length, kernels)
        return drafted, pages.replace(cache=pages.cache.with_last(own.pages.cache)), state

    def read(
        self, read: ReadTokens, state: HeadState, cache: PagedCache, params, draft_params, cfg: ModelConfig, kernels
    ) -> PagedCache:
        last = cache.last_layer()
        at = jnp.arange(read.tokens.shape[0])
        owner = read.rows.owner[0]
        is_first = (at == read.rows.query_starts[owner])[:, None]
        before = jnp.where(is_first, state.hidden[read.slot_of[owner]], jnp.roll(read.hidden, 1, axis=0))
        embedded = embed(params["embed"], read.tokens[None], cfg.embed_scale, cache.mesh)
        _, last = predict(draft_params, self.cfg, embedded, before[None], read.rows, last, kernels=kernels)
        return cache.with_last(last)

    def hidden_at(
        self, read: ReadTokens, state: HeadState, at: Int[Array, "S g1"], took_part: Bool[Array, " S"]
    ) -> Float[Array, "S g1 D"]:
        found = read.hidden[at].astype(state.hidden.dtype)
        return jnp.where(took_part[:, None, None], found, state.hidden[:, None])

    def keep(self, state: HeadState, hidden: Float[Array, "S g1 D"], counts: Int[Array, " S"]) -> HeadState:
        last = jnp.maximum(counts - 1, 0)[:, None, None]
        return state.replace(hidden=jnp.take_along_axis(hidden, last, axis=1)[:, 0])
