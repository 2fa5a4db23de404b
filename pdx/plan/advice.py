"""What to switch on, in words, with the numbers behind it."""

from __future__ import annotations

from collections.abc import Iterator

from pdx import cost
from pdx.cost import tradeoffs
from pdx.plan.figures import Plan

DRAFT, DRAFT_COST = 4, 0.1  # a draft of four tokens by a model of a tenth of the cost


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
    """What is not switched on yet, and the plan with it."""
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
        f"It does not fit: {plan.needed / 2**30:.1f} GiB of {plan.capacity / 2**30:.0f}, of which "
        f"{cost.RESERVE:.0%} are kept for programs and temporaries. "
        + (f"It does with {' or '.join(fitting)}; or take" if fitting else "Take")
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
            f"A larger batch: {to} rows decode {to / plan.batch * plan.tpot / step:.1f}x the tokens a second, at a "
            f"TPOT of {step * 1e3:.2f} ms instead of {plan.tpot * 1e3:.2f}."
        )


def _speculation(plan: Plan) -> str:
    verify = tradeoffs.verify_cost(plan.setup, plan.chip, plan.batch, plan.context, DRAFT, plan.chips)
    even = tradeoffs.break_even(DRAFT, DRAFT_COST, verify)
    said = f"Speculation with {DRAFT} drafted tokens at a tenth of a step each: a verification costs {verify:.2f} steps"
    if even is None:
        return f"{said}, so it loses at every acceptance."
    gain = tradeoffs.speculation(0.8, DRAFT, DRAFT_COST, verify)
    return f"{said}, so it loses below an acceptance of {even:.2f} and makes {gain:.2f}x at 0.8."


def _chunks(plan: Plan) -> Iterator[str]:
    cut = plan.chunking
    if cut.whole > 2 * plan.tpot and plan.batch > 1 and cut.chunk < plan.prompt:
        steps = cut.whole / plan.tpot
        yield (
            f"Chunked prefill: a whole prompt of {plan.prompt} tokens makes the other rows wait "
            f"{cut.whole * 1e3:.1f} ms for a token ({steps:.0f} TPOT), in chunks of {cut.chunk} no more than "
            f"{cut.longest * 1e3:.1f} ms; its own TTFT grows {cut.ttft / plan.ttft:.2f}x."
        )
    if plan.largest_chunk is not None:
        yield (
            f"Beside {plan.batch} decoding rows a step has room for {plan.largest_chunk} prompt tokens within the "
            "TPOT asked for" + ("." if plan.largest_chunk else ": prompts must wait or run elsewhere.")
        )


def _objectives(plan: Plan) -> Iterator[str]:
    for name, asked, got in (("TTFT", plan.slo_ttft, plan.ttft), ("TPOT", plan.slo_tpot, plan.tpot)):
        if asked is not None and got > asked:
            yield f"The {name} asked for, {asked * 1e3:.1f} ms, is below the floor of {got * 1e3:.1f} ms."
