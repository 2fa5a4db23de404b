"""One call of an attention op over a dense cache: described, checked, dispatched."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from pallas_kernels.attention.call import check_scale, describe
from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.gradients import raising_under_grad
from pallas_kernels.layouts import as_int32
from pallas_kernels.masking import sink_logits
from pallas_kernels.values import check_rows


def attend(
    op: str,
    modules: Mapping[str, ModuleType],
    q,
    k,
    v,
    *,
    starts,
    lengths,
    scale,
    causal,
    window,
    softcap,
    sinks,
    k_scale,
    v_scale,
    tree,
    layout,
    kv_heads,
    value_dim,
    return_lse,
    implementation: Implementation,
    interpret,
    config,
):
    """Run `op`, whose implementations are `modules`; the arguments are those of `flash_attention`."""
    check_scale(op, scale)
    call = describe(
        op,
        q,
        k,
        v,
        starts=starts,
        lengths=lengths,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        tree=tree,
        layout=layout,
        kv_heads=kv_heads,
        value_dim=value_dim,
        return_lse=return_lse,
    )
    check_rows(op, starts, lengths)
    chosen = select(op, implementation, modules, call, interpret)
    module = modules[chosen]

    def run(q, k, v, starts, lengths, sinks, k_scale, v_scale, tree):
        return module.attention(
            q,
            k,
            v,
            starts=starts,
            lengths=lengths,
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
            tree=tree,
            layout=layout,
            kv_heads=call.kv_heads,
            value_dim=call.value_dim,
            return_lse=return_lse,
            config=config,
            interpret=interpret,
        )

    if chosen != "xla":
        run = raising_under_grad(run, op)
    return run(q, k, v, as_int32(starts), as_int32(lengths), sink_logits(sinks), k_scale, v_scale, tree)
