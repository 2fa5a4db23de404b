"""The rows of the report: what each optimization is, off and on, in either phase, and what is claimed of it.

A feature adds its row with `@row(name, prefill=..., decode=...)` over a function of a `Lab` that yields `Comparison`s;
it raises `NotBuilt` or `NotApplicable` where there is nothing to measure. What a claim means: `pdx.bench.verdicts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from pallas_kernels.hardware import Chip
from pdx import steps
from pdx.bench import served
from pdx.bench.lab import Side, Stand, some_ids
from pdx.bench.timing import Timing, interleaved
from pdx.bench.verdicts import CLAIMS, Comparison, Finding, judge
from pdx.config import ModelConfig
from pdx.cost import Phase
from pdx.errors import PdxError
from pdx.quant import quantize_params
from pdx.weights.loaded import Model


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
    requests: int = 24
    answer_prompt: int = 16
    answer: int = 16  # tokens, on average
    prompts: tuple[int, ...] = (32, 128, 256, 512, 1024)
    batches: tuple[int, ...] = (1, 4, 8)
    contexts: tuple[int, ...] = (128, 2048)
    rounds: int = 3

    def within(self, max_context: int) -> Sizes:
        """The same, with what a model cannot hold left out."""
        return dataclasses.replace(
            self,
            long_prompt=min(self.long_prompt, max_context),
            long_context=min(self.long_context, max_context),
            prompts=tuple(p for p in self.prompts if p <= max_context),
            contexts=tuple(c for c in self.contexts if c <= max_context),
        )


QUICK = Sizes(2, 2, 16, 32, 128, 128, 16, 4, 4, 8, 4, (16, 32), (1, 2), (128,), 2)


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

    model: Model
    chip: Chip
    sizes: Sizes

    @cached_property
    def plain(self) -> Stand:
        return Stand(self.model.config, self.model.params, self.model.dtype)

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
    raise NotBuilt(
        "proposing and accepting drafts; what `verify` costs already, and from which acceptance on it would "
        "pay, is under the pitfalls"
    )
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
    """Many requests of mixed length at once, whose prompts and answers are timed as a whole. Without it: batches that
    end with their longest answer."""
    s = lab.sizes
    outputs = served.mixed_lengths(s.requests, s.answer)
    measures = f"{s.requests} requests of {s.answer_prompt} tokens, "
    with served.engine(lab.model, s.answer_prompt, max(outputs), s.rows) as running:
        for lengths, answers in (([1] * s.requests, "answers of one"), (outputs, f"answers of 1 to {max(outputs)}")):
            yield Comparison(
                served.static_batches(lab.plain, s.answer_prompt, lengths, s.rows),
                served.continuous(running, lab.plain, s.answer_prompt, lengths),
                measures + answers,
            )


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

    return Side(
        f"{first.label}, then a step",
        "decode",
        work,
        step.tokens,
        step.setup,
        lambda setup: first.load(setup) + step.load(setup),
    )
