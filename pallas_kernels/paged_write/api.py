"""The page write: new keys and values into a pool of pages, in place where the pool is donated."""

from __future__ import annotations

from jaxtyping import Array, Float, Int, Num

from pallas_kernels.dispatch import Choice, Implementation, Implementations, choose, select
from pallas_kernels.layouts import Layout, as_int32
from pallas_kernels.paged_write.call import Call, make_call
from pallas_kernels.values import check_slots

IMPLEMENTATIONS = Implementations("pallas_kernels.paged_write", ("xla", "tpu"))


def explain(implementation: Implementation = "auto", platform: str | None = None, call: Call | None = None) -> Choice:
    """Which path a call takes, and why. Raises as `write_pages` does."""
    return choose("write_pages", implementation, IMPLEMENTATIONS, call, platform, helper=True)


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
    call = make_call(k_pages, v_pages, k, v, slots, layout, (k_scale, v_scale), (new_k_scale, new_v_scale))
    check_slots(call.pages * call.page, slots)
    pools, new = (k_pages, v_pages), (k, v)
    if call.scale_heads:
        pools, new = (*pools, k_scale, v_scale), (*new, new_k_scale, new_v_scale)
    name = select("write_pages", implementation, IMPLEMENTATIONS, call, interpret, helper=True)
    return IMPLEMENTATIONS[name].write(pools, new, as_int32(slots), call=call, interpret=interpret)
