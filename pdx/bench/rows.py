"""The rows of the report: what each optimization is, off and on, in either phase, and what is claimed of it.

A feature adds its row with `@row(name, prefill=..., decode=...)` over a function of a `Lab` that yields `Comparison`s;
it raises `NotBuilt` or `NotApplicable` where there is nothing to measure. What a claim means in numbers is `CLAIMS`,
and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from pallas_kernels.hardware import Chip
from pdx import steps
from pdx.bench.lab import Side, Stand, some_ids
from pdx.bench.timing import Timing, interleaved
from pdx.config import ModelConfig
from pdx.cost import Phase
from pdx.errors import PdxError
from pdx.quant import quantize_params

# Speed of a phase with the optimization over that without it, for which a claim holds.
CLAIMS = {
    "no": (0.95, 1.05),
    "small": (0.95, 1.5),
    "yes": (1.05, math.inf),
    "huge": (2.0, math.inf),
    "costs a little": (0.67, 1.05),
    "protects the others": (2.0, math.inf),
}
HOLDS, FAILS = "holds", "does not hold"


class NotBuilt(Exception):
    """What a row would measure does not exist in pdx yet."""


class NotApplicable(Exception):
    """What a row would measure changes nothing here: the text says why."""


@dataclass(frozen=True)
class Sizes:
    """Loads of the rows and of the grid."""

    rows: int = 8
    few_rows: int = 4
    prompt: int = 128
    long_prompt: int = 1024
    context: int = 256
    long_context: int = 2048
    chunk: int = 256
    draft: int = 4
    prompts: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    contexts: tuple[int, ...] = (128, 512, 2048)
    rounds: int = 5

    def within(self, max_context: int) -> Sizes:
        """The same, with what a model cannot hold left out."""
        return dataclasses.replace(
            self, long_prompt=min(self.long_prompt, max_context), long_context=min(self.long_context, max_context),
            prompts=tuple(p for p in self.prompts if p <= max_context),
            contexts=tuple(c for c in self.contexts if c <= max_context),
        )  # fmt: skip


QUICK = Sizes(2, 2, 16, 32, 128, 128, 16, 4, (16, 32), (1, 2), (128,), 2)


@dataclass(frozen=True)
class Comparison:
    """One phase without and with an optimization. `measures` is what the seconds are, where they are not a step's."""

    off: Side
    on: Side
    measures: str = ""

    @property
    def phase(self) -> Phase:
        return self.off.phase

    def gain(self, off_s: float, on_s: float) -> float:
        """Tokens a second with over without."""
        return off_s / on_s * self.on.tokens / self.off.tokens


@dataclass(frozen=True)
class Finding:
    """A phase of a row: claimed, measured, predicted, judged."""

    phase: Phase
    claim: str
    load: str
    off_s: Timing
    on_s: Timing
    gains: tuple[float, ...]  # round by round
    predicted: dict[str, float]  # gain, by chip
    verdict: str
    why: str

    @property
    def gain(self) -> float:
        return statistics.median(self.gains)


@dataclass(frozen=True)
class Outcome:
    """A row of the report. Without findings, `verdict` says why: not built, or not applicable here."""

    name: str
    claims: dict[Phase, str]
    findings: tuple[Finding, ...] = ()
    verdict: str = ""
    why: str = ""


@dataclass(frozen=True)
class Row:
    name: str
    claims: dict[Phase, str]
    compare: Callable[[Lab], Iterator[Comparison]]


ROWS: list[Row] = []


def row(name: str, *, prefill: str, decode: str):
    """Register a function as a row, with the claims of the table."""
    claims: dict[Phase, str] = {"prefill": prefill, "decode": decode}
    if unknown := set(claims.values()) - set(CLAIMS):
        raise ValueError(f"{name}: no claim {unknown.pop()!r}; there are {', '.join(CLAIMS)}")

    def register(compare: Callable[[Lab], Iterator[Comparison]]):
        ROWS.append(Row(name, claims, compare))
        return compare

    return register


@dataclass(frozen=True)
class Lab:
    """A model, this device and the loads that rows are to use."""

    plain: Stand
    chip: Chip
    sizes: Sizes

    @property
    def cfg(self) -> ModelConfig:
        return self.plain.cfg

    def quantized(self, policy: str) -> Stand:
        return dataclasses.replace(self.plain, params=quantize_params(self.plain.params, policy), quantize=policy)

    @cached_property
    def multihead(self) -> Stand:
        """The model with a KV head for each query head: those that were shared, repeated."""
        cfg, group, h = self.cfg, self.cfg.group_size, self.cfg.head_dim

        def repeated(p: dict) -> dict:
            again = {}
            for name in ("k_proj", "v_proj", "k_bias", "v_bias"):
                if name in p:
                    heads = p[name].reshape(cfg.num_kv_heads, h, *p[name].shape[1:])
                    again[name] = jnp.repeat(heads, group, axis=0).reshape(-1, *p[name].shape[1:])
            return p | again

        params = self.plain.params | {"layers": [repeated(p) for p in self.plain.params["layers"]]}
        return dataclasses.replace(self.plain, params=params, cfg=dataclasses.replace(cfg, num_kv_heads=cfg.num_heads))


def measure(row: Row, lab: Lab, chips: dict[str, Chip]) -> Outcome:
    """Run a row: off and on in turn, round by round."""
    findings = []
    try:
        for comparison in row.compare(lab):
            times = interleaved({"off": comparison.off.work, "on": comparison.on.work}, lab.sizes.rounds)
            findings.append(judge(row.claims[comparison.phase], comparison, times["off"], times["on"], lab.chip, chips))
    except NotBuilt as reason:
        return Outcome(row.name, row.claims, tuple(findings), "not built", str(reason))
    except NotApplicable as reason:
        return Outcome(row.name, row.claims, tuple(findings), "not applicable here", str(reason))
    return Outcome(row.name, row.claims, tuple(findings))


def judge(claim: str, of: Comparison, off: Timing, on: Timing, chip: Chip, chips: dict[str, Chip]) -> Finding:
    """A claim holds if the middle half of the rounds' gains reaches into its range."""
    gains = tuple(of.gain(a, b) for a, b in zip(off.seconds, on.seconds, strict=True))
    quarter, _, third = statistics.quantiles(gains, n=4, method="inclusive") if len(gains) > 1 else gains * 3
    low, high = CLAIMS[claim]
    predicted = {name: of.gain(of.off.seconds(c), of.on.seconds(c)) for name, c in chips.items()}
    verdict = HOLDS if quarter < high and third >= low else FAILS
    load = of.off.label if of.off.label == of.on.label else f"{of.off.label} → {of.on.label}"
    load += f" ({of.measures})" if of.measures else ""
    return Finding(of.phase, claim, load, off, on, gains, predicted, verdict, because(of, off, on, chip))


def because(of: Comparison, off: Timing, on: Timing, chip: Chip) -> str:
    """The bound that explains a gain: what the time without goes to, what the optimization changes of it, and how near
    both come to what the device could do."""
    share, what = _dominant(of.off, chip)
    per_token = [[sum(getattr(c, x) for c in side.costs()) / side.tokens for side in (of.off, of.on)]
                 for x in ("bytes", "flops")]  # fmt: skip
    moved, computed = (b / a for a, b in per_token)
    floors = [side.floor(chip) for side in (of.off, of.on)]
    text = (f"Without it {share:.0%} of the floor is {what}. It moves {moved:.2f}x the bytes and computes "
            f"{computed:.2f}x the FLOPs a token, which allows {of.gain(*floors):.2f}x")  # fmt: skip
    reached = [floor / t.median for floor, t in zip(floors, (off, on), strict=True)]
    return text + f"; the device came to {reached[0]:.0%} of its floor's speed without and {reached[1]:.0%} with it."


def _dominant(side: Side, chip: Chip) -> tuple[float, str]:
    """The largest part of a floor: its share, and in words."""
    words = {("products", 0): "computing products", ("products", 1): "reading weights",
             ("attention", 0): "computing attention", ("attention", 1): "reading the cache"}  # fmt: skip
    if not side.setup.flash:
        words["attention", 1] = "moving scores and the cache"
    spent = dict.fromkeys(words, 0.0)
    for c in side.costs():
        for part, pair in c.parts(chip).items():
            slower = int(pair[1] > pair[0])
            spent[part, slower] += pair[slower]
    most = max(spent, key=spent.get)
    return spent[most] / sum(spent.values()), words[most]


@row("larger batch", prefill="small", decode="huge")
def larger_batch(lab: Lab):
    s = lab.sizes
    yield Comparison(lab.plain.prefill(1, s.prompt), lab.plain.prefill(s.rows, s.prompt))
    yield Comparison(lab.plain.decode(1, s.context), lab.plain.decode(s.rows, s.context))


@row("FlashAttention", prefill="yes", decode="yes")
def flash_attention(lab: Lab):
    """Without it: the reference, which holds all scores in memory, over a cache that is exactly full."""
    s, dense = lab.sizes, dataclasses.replace(lab.plain, kernels="dense")
    yield Comparison(dense.prefill(1, s.long_prompt), lab.plain.prefill(1, s.long_prompt))
    yield Comparison(dense.decode(s.few_rows, s.long_context), lab.plain.decode(s.few_rows, s.long_context))


def _weights(lab: Lab, policy: str):
    s, small = lab.sizes, lab.quantized(policy)
    yield Comparison(lab.plain.prefill(1, s.prompt), small.prefill(1, s.prompt))
    yield Comparison(lab.plain.decode(1, s.context), small.decode(1, s.context))


@row("weight quantization int8", prefill="small", decode="huge")
def weights_int8(lab: Lab):
    yield from _weights(lab, "int8")


@row("weight quantization int8, activations too", prefill="small", decode="huge")
def weights_w8a8(lab: Lab):
    yield from _weights(lab, "w8a8")


@row("weight quantization int4", prefill="small", decode="huge")
def weights_int4(lab: Lab):
    yield from _weights(lab, "int4")


@row("KV-cache quantization int8", prefill="no", decode="yes")
def kv_int8(lab: Lab):
    s, small = lab.sizes, dataclasses.replace(lab.plain, kv_dtype=jnp.int8)
    yield Comparison(lab.plain.prefill(1, s.long_prompt), small.prefill(1, s.long_prompt))
    yield Comparison(lab.plain.decode(s.few_rows, s.long_context), small.decode(s.few_rows, s.long_context))


@row("speculative decoding", prefill="no", decode="huge")
def speculation(lab: Lab):
    raise NotBuilt("proposing and accepting drafts; what `verify` costs already, and from which acceptance on it would "
                   "pay, is under the pitfalls")  # fmt: skip
    yield


@row("GQA / MQA", prefill="small", decode="yes")
def grouped_queries(lab: Lab):
    """Without it: the same model with its KV heads repeated, which must say the same."""
    if lab.cfg.group_size == 1:
        raise NotApplicable("this model has a KV head for each query head")
    s, whole = lab.sizes, lab.multihead
    _same(whole, lab.plain)
    yield Comparison(whole.prefill(1, s.long_prompt), lab.plain.prefill(1, s.long_prompt))
    yield Comparison(whole.decode(s.few_rows, s.long_context), lab.plain.decode(s.few_rows, s.long_context))


def _same(one: Stand, other: Stand, tokens: int = 32) -> None:
    """Raise unless both give the same next token at every place of a prompt, or nearly the same logits."""
    found = []
    for stand in (one, other):
        ids = some_ids(stand.cfg, 1, tokens)
        logits, _ = steps.verify(stand.params, stand.cfg, ids, np.array([tokens]), stand.cache(1, tokens), check=False)
        found.append(np.asarray(logits, np.float32))
    far = float(np.abs(found[0] - found[1]).max())
    if (found[0].argmax(-1) != found[1].argmax(-1)).any() and far > 1e-3 * float(np.abs(found[0]).max()):
        raise PdxError(f"repeated KV heads must say the same, but logits differ by up to {far}")


@row("continuous batching", prefill="small", decode="huge")
def continuous_batching(lab: Lab):
    raise NotBuilt("an engine that admits a request while others decode; a batch of the offline loop runs until its "
                   "longest answer is done")  # fmt: skip
    yield


@row("chunked prefill", prefill="costs a little", decode="protects the others")
def chunked_prefill(lab: Lab):
    """The chunks are calls of `prefill`. What other rows wait for a token is timed as an engine without mixed steps
    would do it: a prefill call, then a step of theirs."""
    s = lab.sizes
    whole = lab.plain.prefill(1, s.long_prompt)
    yield Comparison(whole, lab.plain.prefill(1, s.long_prompt, chunk=s.chunk))
    step, chunk = lab.plain.decode(s.few_rows, s.context), lab.plain.last_chunk(s.long_prompt, s.chunk)
    yield Comparison(_in_turn(whole, step), _in_turn(chunk, step), "the longest wait for a token of the other rows")


def _in_turn(first: Side, step: Side) -> Side:
    """A call of prefill and one decode step, as one wait."""

    def work() -> Timing:
        return Timing((first.work().median + step.work().median,))

    return Side(f"{first.label}, then a step", "decode", work, step.tokens, step.setup,
                lambda setup: first.load(setup) + step.load(setup))  # fmt: skip


def verification(lab: Lab, batch: int) -> tuple[Side, Side]:
    """A decode step, and the scoring of a draft."""
    s = lab.sizes
    return lab.plain.decode(batch, s.context), lab.plain.verify(batch, s.context, s.draft)
