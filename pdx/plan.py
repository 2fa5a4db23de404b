"""`pdx plan`: does a model fit a chip, how fast can it be there, what should be switched on?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pallas_kernels.hardware import Chip
from pdx import cost
from pdx.chips import MeasuredChip, chip
from pdx.config import ModelConfig
from pdx.cost import Setup
from pdx.errors import RequestError
from pdx.model import param_specs
from pdx.quant import quantized_specs

DRAFT, DRAFT_COST = 4, 0.1  # a draft of four tokens by a model of a tenth of the cost


@dataclass(frozen=True)
class Plan:
    """A model on some chips under a load, predicted."""

    model: str
    setup: Setup
    chip: Chip
    chips: int
    batch: int
    prompt: int
    context: int
    slo_ttft: float | None = None
    slo_tpot: float | None = None

    @property
    def capacity(self) -> int:
        return self.chip.hbm_bytes * self.chips

    @property
    def needed(self) -> int:
        """Bytes of weights and of the whole batch's cache."""
        return sum(self.setup.weights.values()) + self.setup.cache_bytes(self.batch, self.context)

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity * (1 - cost.RESERVE)

    @property
    def prefill(self) -> cost.Cost:
        """Of one prompt."""
        return self.setup.prefill(1, self.prompt)

    @property
    def decode(self) -> cost.Cost:
        return self.setup.decode(self.batch, self.context)

    def seconds(self, step: cost.Cost) -> float:
        return step.seconds(self.chip, self.chips)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""

        def phase(step: cost.Cost) -> dict[str, Any]:
            return {"flops": step.flops, "bytes": step.bytes, "intensity": step.intensity,
                    "bound": step.bound(self.chip), "seconds": self.seconds(step),
                    "flops_by_part": step.flops_by_part, "bytes_by_part": dict(step.bytes_by_part)}  # fmt: skip

        return {
            "model": self.model, "chip": self.chip.name, "chips": self.chips, "batch": self.batch,
            "prompt": self.prompt, "context": self.context, "fits": self.fits, "hbm_bytes": self.needed,
            "hbm_capacity_bytes": self.capacity, "weights_by_part": self.setup.weights,
            "cache_bytes": self.setup.cache_bytes(self.batch, self.context),
            "prefill": phase(self.prefill), "decode": phase(self.decode),
            "critical_batch": cost.critical_batch(self.setup, self.chip),
            "largest_batch": cost.largest_batch(self.setup, self.chip, self.context, self.chips),
            "largest_context": cost.largest_context(self.setup, self.chip, self.batch, self.chips),
            "batch_within_slo": self.within_slo, "advice": advice(self),
        }  # fmt: skip

    @property
    def within_slo(self) -> int | None:
        """The most rows that fit and keep the TPOT asked for; None where none is asked for."""
        if self.slo_tpot is None:
            return None
        return cost.best_batch(self.setup, self.chip, self.context, self.slo_tpot, self.chips)


def make(
    model: str, cfg: ModelConfig, on: str, *, quantize: str | None = None, kv_dtype: str | None = None,
    dtype: str = "bfloat16", batch: int = 1, prompt: int = 1024, context: int = 2048, slo_ttft: float | None = None,
    slo_tpot: float | None = None,
) -> Plan:  # fmt: skip
    """A plan on `on`: a chip, or so many of it (`v5e-8`); objectives in seconds.

    Raises:
      RequestError: an unknown chip, a load that makes no sense, a policy that does not fit the model.
    """
    name, _, count = on.rpartition("-")
    try:
        found, chips = (chip(name), int(count)) if name and count.isdigit() and not _is_chip(on) else (chip(on), 1)
    except RequestError as error:
        raise RequestError(f"{error}; several as v5e-8") from None
    if chips < 1 or batch < 1 or prompt < 1 or context < 1:
        raise RequestError("chips, batch, prompt and context must be at least 1")
    if max(prompt, context) > cfg.max_context:
        raise RequestError(f"{model} has a context of {cfg.max_context} tokens, not of {max(prompt, context)}")
    setup = Setup(cfg, dtype, quantize, kv_dtype)
    quantized_specs(param_specs(cfg, dtype), setup.policy)  # raises what does not fit the model
    return Plan(model, setup, found, chips, batch, prompt, context, slo_ttft, slo_tpot)


def _is_chip(name: str) -> bool:
    try:
        return bool(chip(name))
    except RequestError:
        return name.endswith(".toml")


def advice(plan: Plan) -> list[str]:
    """What to switch on, in words, with the numbers behind it."""
    said, setup, on = [], plan.setup, plan.chip
    tpot = plan.seconds(plan.decode)
    others = {f"--quantize {q}": Setup(setup.cfg, setup.dtype, q, setup.kv_dtype) for q in ("int8", "int4")
              if not setup.policy}  # fmt: skip
    if (setup.kv_dtype or setup.dtype) != "int8":
        others["--kv-dtype int8"] = Setup(setup.cfg, setup.dtype, setup.quantize, "int8")
    if not plan.fits:
        fitting = [name for name, s in others.items() if sum(s.weights.values()) + s.cache_bytes(
            plan.batch, plan.context) <= plan.capacity * (1 - cost.RESERVE)]  # fmt: skip
        least = -(-plan.needed // int(on.hbm_bytes * (1 - cost.RESERVE)))
        said.append(f"It does not fit: {plan.needed / 2**30:.1f} GiB of {plan.capacity / 2**30:.0f}, of which "
                    f"{cost.RESERVE:.0%} are kept for programs and temporaries. "
                    + (f"It does with {' or '.join(fitting)}; or take" if fitting else "Take")
                    + f" {least} chips.")  # fmt: skip
    for name, other in others.items():
        new = other.decode(plan.batch, plan.context).seconds(on, plan.chips)
        first = other.prefill(1, plan.prompt).seconds(on, plan.chips)
        if new < 0.95 * tpot:
            said.append(f"{name}: TPOT {tpot / new:.2f}x faster ({new * 1e3:.2f} ms), TTFT "
                        f"{plan.seconds(plan.prefill) / first:.2f}x.")  # fmt: skip
    critical, most = cost.critical_batch(setup, on), cost.largest_batch(setup, on, plan.context, plan.chips)
    if plan.batch < min(critical, most) / 2:
        to = int(min(critical, most))
        step = setup.decode(to, plan.context).seconds(on, plan.chips)
        said.append(f"A larger batch: {to} rows decode {to / plan.batch * tpot / step:.1f}x the tokens a second, at a "
                    f"TPOT of {step * 1e3:.2f} ms instead of {tpot * 1e3:.2f}.")  # fmt: skip
    verify = cost.verify_cost(setup, on, plan.batch, plan.context, DRAFT, plan.chips)
    even = cost.break_even(DRAFT, DRAFT_COST, verify)
    gain = cost.speculation(0.8, DRAFT, DRAFT_COST, verify)
    said.append(f"Speculation with {DRAFT} drafted tokens at a tenth of a step each: a verification costs {verify:.2f} "
                + ("steps, so it loses at every acceptance." if even is None else
                   f"steps, so it loses below an acceptance of {even:.2f} and makes {gain:.2f}x at 0.8."))  # fmt: skip
    ttft = plan.seconds(plan.prefill)
    if ttft > 4 * tpot and plan.batch > 1:
        said.append(f"Chunked prefill: a prompt of {plan.prompt} tokens holds up the other rows for {ttft / tpot:.0f} "
                    "decode steps unless it is cut into chunks.")  # fmt: skip
    for name, asked, got in (("TTFT", plan.slo_ttft, ttft), ("TPOT", plan.slo_tpot, tpot)):
        if asked is not None and got > asked:
            said.append(f"The {name} asked for, {asked * 1e3:.1f} ms, is below the floor of {got * 1e3:.1f} ms.")
    return said


def show(plan: Plan) -> None:
    """The plan as tables on a terminal."""
    from rich.console import Console
    from rich.table import Table

    gib, console, setup = 2**30, Console(), plan.setup
    measured = isinstance(plan.chip, MeasuredChip) and plan.chips == 1
    figures = "estimates, at measured rates" if measured else "floors, from its peaks"
    console.print(f"[bold]{plan.model}[/bold] on {plan.chips} x {plan.chip.name}: batch {plan.batch}, prompt "
                  f"{plan.prompt}, context {plan.context}; figures are {figures}",
                  highlight=False)  # fmt: skip
    memory = Table("memory", "GiB", box=None, pad_edge=False)
    for part, size in setup.weights.items():
        if size:
            memory.add_row(f"weights: {part}", f"{size / gib:.2f}")
    memory.add_row("cache", f"{setup.cache_bytes(plan.batch, plan.context) / gib:.2f}")
    memory.add_row("left" if plan.fits else "[red]missing[/red]",
                   f"{abs(plan.capacity * (1 - cost.RESERVE) - plan.needed) / gib:.2f}")  # fmt: skip
    console.print(memory)
    phases = Table("phase", "GFLOP", "GB", "FLOP/B", "bound", "takes" if measured else "at least", "of peak",
                   "of bandwidth", box=None, pad_edge=False)  # fmt: skip
    rate, peak = plan.chip.hbm_gbps * 1e9 * plan.chips, plan.chip.tflops(setup.dtype) * 1e12 * plan.chips
    for step, name in ((plan.prefill, "prefill (TTFT)"), (plan.decode, "decode (TPOT)")):
        t = plan.seconds(step)
        phases.add_row(name, f"{step.flops / 1e9:.1f}", f"{step.bytes / 1e9:.2f}", f"{step.intensity:.1f}",
                       step.bound(plan.chip), f"{t * 1e3:.2f} ms", f"{step.flops / t / peak:.0%}",
                       f"{step.bytes / t / rate:.0%}")  # fmt: skip
    console.print(phases)
    found = plan.to_dict()
    line = f"critical batch {found['critical_batch']:.0f}, largest batch {found['largest_batch']}, largest context " \
           f"{found['largest_context']}"  # fmt: skip
    if plan.within_slo is not None:
        line += f", largest batch within the TPOT asked for {plan.within_slo}"
    console.print(line, highlight=False)
    for sentence in found["advice"]:
        console.print(f"- {sentence}", highlight=False)
