"""The page write: new keys and values into a pool of pages, in place where the pool is donated."""

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
    """Write one token's K and V a slot.

    Args:
      k_pages, v_pages: the pool, see `paged_attention`.
      k, v: the new tokens; for int8 pages already quantized (see `quantize_kv`).
      slots: page * p + offset of each token; negative or past the pool: the token is dropped. The kept slots
        must be distinct: what a slot holds that was given two tokens is undefined.
      layout: of the pages.
      k_scale, v_scale: for int8 pages, their scales [P, Kp, p]; new_k_scale, new_v_scale: those of the tokens.
      implementation, interpret: see `pallas_kernels.dispatch`. XLA's scatter is in place but for int8 on a TPU,
        where it would re-lay the pool; `auto` takes a Pallas kernel for that, and for nothing else.

    Returns:
      (k_pages, v_pages), for int8 pages (k_pages, v_pages, k_scale, v_scale). In place if the caller's jit
      donates the pools: the compiled program holds no copy of them.

    Raises:
      ValueError: shapes or types that do not fit; two tokens for one slot, in an array that is not traced.
      NotImplementedError: a named implementation that cannot take this call.
    """
    arrays = {
        **{"k_pages": k_pages, "v_pages": v_pages, "k": k, "v": v, "slots": slots},
        **{"k_scale": k_scale, "v_scale": v_scale, "new_k_scale": new_k_scale, "new_v_scale": new_v_scale},
    }
    call = make_call(arrays, layout)
    check_slots(call.pages * call.page, slots)
    return OP.run(implementation, arrays | {"slots": as_int32(slots)}, call, interpret=interpret)
