"""The page write: new keys and values into a pool of pages, in place where the pool is donated.

The way of a call:
  arguments       `call.make_call` checks them and gathers the static facts in a `Call`; `check_slots` checks the slots
  Call            `OP.run` (`dispatch`) chooses the implementation; there are no tiles
  implementation  `xla` scatters; `tpu`, for int8 only, sorts the tokens by slot and aliases the pool to the result
  kernel          in `tpu`: reads, changes and writes one tile of 32 tokens
  result          the pools, those of the scales included
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int, Num

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.layouts import Layout, as_int32
from pallas_kernels.paged_write.call import check_slots, make_call

OP = Op("write_pages", "paged_write", helper=True)
explain = OP.explain


def write_pages(
    k_pages: Array,
    v_pages: Array,
    k: Num[Array, "T K H"],
    v: Num[Array, "T K Hv"],
    *,
    slots: Int[Array, " T"],
    layout: Layout,
    k_scale: Float[Array, "P Kp p"] | None = None,
    v_scale: Float[Array, "P Kp p"] | None = None,
    new_k_scale: Float[Array, "T K"] | None = None,
    new_v_scale: Float[Array, "T K"] | None = None,
    implementation: Implementation = "auto",
    interpret=False,
) -> tuple[Array, ...]:
    """Write the K and V of each token into its slot.

    Args:
      k_pages, v_pages: the pool, see `paged_attention`.
      k, v: the new tokens; for int8 pages already quantized (`quantize_kv`).
      slots: page * p + offset of each token. A token with a slot below zero or past the pool is dropped. The other
        slots must be distinct; a slot that is given two tokens holds an undefined value.
      layout: of the pages.
      k_scale, v_scale: scales of int8 pages, [P, Kp, p].
      new_k_scale, new_v_scale: scales of int8 tokens.
      implementation, interpret: see `pallas_kernels.dispatch`. `auto` takes the Pallas kernel for int8 on a TPU only:
        everywhere else XLA's scatter is in place, there it would re-lay the pool.

    Returns:
      (k_pages, v_pages); for int8 pages (k_pages, v_pages, k_scale, v_scale). The write is in place if the caller's
      jit donates the pools: the compiled program then holds no copy of them.

    Raises:
      ValueError: shapes or types that do not fit; two tokens for one slot, in an array that is not traced.
      NotImplementedError: a named implementation that cannot take this call.

    Example: two pages of four tokens; the first token goes to page 1, offset 2, the second is dropped.
      >>> from functools import partial
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import write_pages
      >>> k_pages, v_pages = jnp.zeros((2, 1, 4, 1)), jnp.zeros((2, 1, 4, 1))  # [P, K, p, H]
      >>> k = v = jnp.array([[[7.0]], [[8.0]]])  # [T, K, H]
      >>> write = jax.jit(partial(write_pages, layout="heads_first"), donate_argnums=(0, 1))
      >>> k_pages, v_pages = write(k_pages, v_pages, k, v, slots=jnp.array([6, -1]))
      >>> k_pages[:, 0, :, 0].tolist()
      [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 7.0, 0.0]]
    """
    pools = dict(k_pages=k_pages, v_pages=v_pages, k_scale=k_scale, v_scale=v_scale)
    arrays = pools | dict(k=k, v=v, slots=slots, new_k_scale=new_k_scale, new_v_scale=new_v_scale)
    call = make_call(arrays, layout)
    check_slots(call.pages * call.page, slots)
    return OP.run(implementation, arrays | {"slots": as_int32(slots)}, call, interpret=interpret)
