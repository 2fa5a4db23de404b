"""Advice on a plan: sentences about which optimizations pay, with their figures."""

from __future__ import annotations

from collections.abc import Iterator

from pdx import cost
from pdx.cost import tradeoffs
from pdx.plan.figures import Plan

DRAFT, DRAFT_COST = 4, 0.1  # tokens per draft, and the cost of drafting one in decode steps of the model


def advice(plan: Plan) -> list[str]:
    """Sentences, the most urgent first."""
    others = _switches(plan)
    return [
        *_memory(plan, others),
        *_smaller(plan, others),
        *_batch(plan),
        _speculation(plan),
        *_chunks(plan),
        *_objectives(plan),
    ]


def _switches(plan: Plan) -> dict[str, Plan]:
    """Option -> plan with it, for the quantization options that the plan does not use yet."""
    setup, found = plan.setup, {}
    if not setup.policy:
        stored = ("stored",) if setup.experts and setup.experts.stored_bits else ()
        found = {f"--quantize {q}": plan.with_setup(quantize=q) for q in ("int8", "int4", *stored)}
    if (setup.kv_dtype or setup.dtype) != "int8":
        found["--kv-dtype int8"] = plan.with_setup(kv_dtype="int8")
    return found


def _memory(plan: Plan, others: dict[str, Plan]) -> Iterator[str]:
    if plan.fits:
        return
    fitting = [name for name, other in others.items() if other.fits]
    least = -(-plan.needed // int(plan.chip.hbm_bytes * (1 - cost.RESERVE)))
    yield (
        f"It does not fit: it needs {plan.needed / 2**30:.1f} GiB of {plan.capacity / 2**30:.0f}, of which "
        f"{cost.RESERVE:.0%} are reserved for programs and temporaries. "
        + (f"It fits with {' or '.join(fitting)}; or use" if fitting else "Use")
        + f" {least} chips."
    )


def _smaller(plan: Plan, others: dict[str, Plan]) -> Iterator[str]:
    for name, other in others.items():
        if other.tpot < 0.95 * plan.tpot:
            yield (
                f"{name}: TPOT {plan.tpot / other.tpot:.2f}x faster ({other.tpot * 1e3:.2f} ms), TTFT "
                f"{plan.ttft / other.ttft:.2f}x."
            )


def _batch(plan: Plan) -> Iterator[str]:
    critical = cost.critical_batch(plan.setup, plan.chip)
    to = int(min(critical, cost.largest_batch(plan.setup, plan.chip, plan.context, plan.chips)))
    if plan.batch < to / 2:
        step = plan.setup.decode(to, plan.context).seconds(plan.chip, plan.chips)
        yield (
            f"A larger batch: {to} rows decode {to / plan.batch * plan.tpot / step:.1f}x as many tokens per second, at "
            f"a TPOT of {step * 1e3:.2f} ms instead of {plan.tpot * 1e3:.2f}."
        )


def _speculation(plan: Plan) -> str:
    verify = tradeoffs.verify_cost(plan.setup, plan.chip, plan.batch, plan.context, DRAFT, plan.chips)
    even = tradeoffs.break_even(DRAFT, DRAFT_COST, verify)
    costs = (
        f"Speculation with {DRAFT} drafted tokens at a tenth of a step each: a verification costs {verify:.2f} steps"
    )
    if even is None:
        return f"{costs}, so it never pays."
    gain = tradeoffs.speculation(0.8, DRAFT, DRAFT_COST, verify)
    return f"{costs}, so it pays above an acceptance rate of {even:.2f}; at 0.8 decode is {gain:.2f}x as fast."


def _chunks(plan: Plan) -> Iterator[str]:
    cut = plan.chunking
    if cut.whole > 2 * plan.tpot and plan.batch > 1 and cut.chunk < plan.prompt:
        steps = cut.whole / plan.tpot
        yield (
            f"Chunked prefill: while a whole prompt of {plan.prompt} tokens is prefilled, the other rows wait "
            f"{cut.whole * 1e3:.1f} ms for a token ({steps:.0f} TPOT); with chunks of {cut.chunk} they wait at most "
            f"{cut.longest * 1e3:.1f} ms. The prompt's own TTFT becomes {cut.ttft / plan.ttft:.2f}x as long."
        )
    if plan.largest_chunk is not None:
        yield (
            f"With {plan.batch} decoding rows, a step has room for {plan.largest_chunk} prompt tokens within the "
            "TPOT objective" + ("." if plan.largest_chunk else ": prompts must wait or run elsewhere.")
        )


def _objectives(plan: Plan) -> Iterator[str]:
    for name, asked, got in (("TTFT", plan.slo_ttft, plan.ttft), ("TPOT", plan.slo_tpot, plan.tpot)):
        if asked is not None and got > asked:
            yield f"The {name} objective of {asked * 1e3:.1f} ms is below the floor of {got * 1e3:.1f} ms."
