"""The rows of the report: for each optimization, each phase without and with it, and the claimed gain.

A row is a function under `@row(name, prefill=..., decode=...)`. It takes an `Experiment` and yields `Comparison`s, or
raises `NotBuilt` or `NotApplicable` if there is nothing to measure. `verdicts.CLAIMS` defines the claims.
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
from pdx.bench.report import batching
from pdx.bench.report.verdicts import CLAIMS, Comparison, Finding, judge
from pdx.bench.timed_work import ModelUnderTest, TimedWork, token_ids
from pdx.bench.timing import Timing, interleaved
from pdx.config import ModelConfig
from pdx.cost import Phase
from pdx.errors import PdxError
from pdx.quant import quantize_params
from pdx.weights.loaded import Model

# Assumed, of each drafted token by itself.
ACCEPTANCE = 0.8


class NotBuilt(Exception):
    """The optimization of a row does not exist in pdx yet."""


class NotApplicable(Exception):
    """The optimization of a row changes nothing for this model; the text says why."""


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
        """The sizes without loads that exceed a model's context."""
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
    """The result of a row. If it could not be measured, `verdict` is `not built` or `not applicable here`."""

    name: str
    claims: dict[Phase, str]
    findings: tuple[Finding, ...] = ()
    verdict: str = ""
    why: str = ""


@dataclass(frozen=True)
class Row:
    name: str
    claims: dict[Phase, str]
    compare: Callable[[Experiment], Iterator[Comparison]]


ROWS: list[Row] = []


def row(name: str, *, prefill: str, decode: str):
    """Register a function as a row with the claimed gain of each phase. Raises ValueError for an unknown claim."""
    claims: dict[Phase, str] = {"prefill": prefill, "decode": decode}
    if unknown := set(claims.values()) - set(CLAIMS):
        raise ValueError(f"{name}: no claim {unknown.pop()!r}; there are {', '.join(CLAIMS)}")

    def register(compare: Callable[[Experiment], Iterator[Comparison]]):
        ROWS.append(Row(name, claims, compare))
        return compare

    return register


@dataclass(frozen=True)
class Experiment:
    """The model, this device and the sizes of the loads, for the functions of the rows."""

    model: Model
    chip: Chip
    sizes: Sizes

    @cached_property
    def plain(self) -> ModelUnderTest:
        return ModelUnderTest(self.model.config, self.model.params, self.model.dtype)

    @property
    def cfg(self) -> ModelConfig:
        return self.plain.cfg

    def quantized(self, policy: str) -> ModelUnderTest:
        return dataclasses.replace(self.plain, params=quantize_params(self.plain.params, policy), quantize=policy)

    @cached_property
    def multihead(self) -> ModelUnderTest:
        """The model without GQA: each query head gets its own copy of its KV head."""
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


def measure(row: Row, experiment: Experiment, chips: dict[str, Chip]) -> Outcome:
    """Run a row: its phases without and with the optimization in turn, in rounds."""
    findings = []
    try:
        for comparison in row.compare(experiment):
            times = interleaved({"off": comparison.off.work, "on": comparison.on.work}, experiment.sizes.rounds)
            findings.append(
                judge(row.claims[comparison.phase], comparison, times["off"], times["on"], experiment.chip, chips)
            )
    except NotBuilt as reason:
        return Outcome(row.name, row.claims, tuple(findings), "not built", str(reason))
    except NotApplicable as reason:
        return Outcome(row.name, row.claims, tuple(findings), "not applicable here", str(reason))
    return Outcome(row.name, row.claims, tuple(findings))


@row("larger batch", prefill="small", decode="huge")
def larger_batch(experiment: Experiment):
    s = experiment.sizes
    yield Comparison(experiment.plain.prefill(1, s.prompt), experiment.plain.prefill(s.rows, s.prompt))
    yield Comparison(experiment.plain.decode(1, s.context), experiment.plain.decode(s.rows, s.context))


@row("FlashAttention", prefill="yes", decode="yes")
def flash_attention(experiment: Experiment):
    """Without it: the dense reference, which keeps all scores in memory, over an exactly full cache."""
    s, dense = experiment.sizes, dataclasses.replace(experiment.plain, kernels="dense")
    yield Comparison(dense.prefill(1, s.long_prompt), experiment.plain.prefill(1, s.long_prompt))
    yield Comparison(dense.decode(s.few_rows, s.long_context), experiment.plain.decode(s.few_rows, s.long_context))


def _weights(experiment: Experiment, policy: str):
    s, small = experiment.sizes, experiment.quantized(policy)
    yield Comparison(experiment.plain.prefill(1, s.prompt), small.prefill(1, s.prompt))
    yield Comparison(experiment.plain.decode(1, s.context), small.decode(1, s.context))


@row("weight quantization int8", prefill="small", decode="huge")
def weights_int8(experiment: Experiment):
    yield from _weights(experiment, "int8")


@row("weight quantization int8, activations too", prefill="small", decode="huge")
def weights_w8a8(experiment: Experiment):
    yield from _weights(experiment, "w8a8")


@row("weight quantization int4", prefill="small", decode="huge")
def weights_int4(experiment: Experiment):
    yield from _weights(experiment, "int4")


@row("KV-cache quantization int8", prefill="no", decode="yes")
def kv_int8(experiment: Experiment):
    s, small = experiment.sizes, dataclasses.replace(experiment.plain, kv_dtype=jnp.int8)
    yield Comparison(experiment.plain.prefill(1, s.long_prompt), small.prefill(1, s.long_prompt))
    yield Comparison(experiment.plain.decode(s.few_rows, s.long_context), small.decode(s.few_rows, s.long_context))


@row("speculative decoding", prefill="no", decode="huge")
def speculation(experiment: Experiment):
    """With drafts that are free and kept by chance: over real texts, `pdx bench speculation` measures it."""
    s = experiment.sizes
    prefill = experiment.plain.prefill(1, s.prompt)  # the same program with it and without
    yield Comparison(prefill, prefill)
    yield Comparison(
        experiment.plain.decode(1, s.context), experiment.plain.speculate(1, s.context, s.draft, ACCEPTANCE)
    )


@row("GQA / MQA", prefill="small", decode="yes")
def grouped_queries(experiment: Experiment):
    """Without it: the same model with repeated KV heads, which must compute the same."""
    if experiment.cfg.group_size == 1:
        raise NotApplicable("this model has a KV head for each query head")
    s, whole = experiment.sizes, experiment.multihead
    _check_same_logits(whole, experiment.plain)
    yield Comparison(whole.prefill(1, s.long_prompt), experiment.plain.prefill(1, s.long_prompt))
    yield Comparison(whole.decode(s.few_rows, s.long_context), experiment.plain.decode(s.few_rows, s.long_context))


def _check_same_logits(one: ModelUnderTest, other: ModelUnderTest, tokens: int = 32) -> None:
    """Raise PdxError unless both give the same next token at every position of a prompt, or nearly equal logits."""
    found = []
    for model in (one, other):
        ids = token_ids(model.cfg, 1, tokens)
        logits, _ = steps.verify(model.params, model.cfg, ids, np.array([tokens]), model.cache(1, tokens), check=False)
        found.append(np.asarray(logits, np.float32))
    far = float(np.abs(found[0] - found[1]).max())
    if (found[0].argmax(-1) != found[1].argmax(-1)).any() and far > 1e-3 * float(np.abs(found[0]).max()):
        raise PdxError(f"repeated KV heads must not change the logits, which differ by up to {far}")


@row("continuous batching", prefill="small", decode="huge")
def continuous_batching(experiment: Experiment):
    """Many requests of mixed length, sent at once and timed as a whole. Without it: static batches, which run until
    their longest answer is finished."""
    s = experiment.sizes
    outputs = batching.mixed_lengths(s.requests, s.answer)
    measures = f"{s.requests} requests of {s.answer_prompt} tokens, "
    with batching.engine(experiment.model, s.answer_prompt, max(outputs), s.rows) as running:
        for lengths, answers in (([1] * s.requests, "answers of one"), (outputs, f"answers of 1 to {max(outputs)}")):
            yield Comparison(
                batching.static_batches(experiment.plain, s.answer_prompt, lengths, s.rows),
                batching.continuous(running, experiment.plain, s.answer_prompt, lengths),
                measures + answers,
            )


@row("chunked prefill", prefill="costs a little", decode="protects the others")
def chunked_prefill(experiment: Experiment):
    """Chunks are calls of `prefill`. The wait of other rows for a token is that of an engine without mixed steps: one
    prefill call, then a decode step."""
    s = experiment.sizes
    whole = experiment.plain.prefill(1, s.long_prompt)
    yield Comparison(whole, experiment.plain.prefill(1, s.long_prompt, chunk=s.chunk))
    step, chunk = experiment.plain.decode(s.few_rows, s.context), experiment.plain.last_chunk(s.long_prompt, s.chunk)
    yield Comparison(_in_turn(whole, step), _in_turn(chunk, step), "the longest wait for a token of the other rows")


def _in_turn(first: TimedWork, step: TimedWork) -> TimedWork:
    """A call of prefill followed by one decode step."""

    def work() -> Timing:
        return Timing((first.work().median + step.work().median,))

    return TimedWork(
        f"{first.label}, then a step",
        "decode",
        work,
        step.tokens,
        step.setup,
        lambda setup: first.load(setup) + step.load(setup),
    )
