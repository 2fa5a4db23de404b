"""The rows of the report: what each optimization is, off and on, in either phase, and what is claimed of it.

A feature adds its row with `@row(name, prefill=..., decode=...)` over a function of an `Experiment` that yields
`Comparison`s; it raises `NotBuilt` or `NotApplicable` where there is nothing to measure. `verdicts` says what a claim
means.
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
    compare: Callable[[Experiment], Iterator[Comparison]]


ROWS: list[Row] = []


def row(name: str, *, prefill: str, decode: str):
    """Register a function as a row, with the claims of the table."""
    claims: dict[Phase, str] = {"prefill": prefill, "decode": decode}
    if unknown := set(claims.values()) - set(CLAIMS):
        raise ValueError(f"{name}: no claim {unknown.pop()!r}; there are {', '.join(CLAIMS)}")

    def register(compare: Callable[[Experiment], Iterator[Comparison]]):
        ROWS.append(Row(name, claims, compare))
        return compare

    return register


@dataclass(frozen=True)
class Experiment:
    """A model, this device and the loads that rows are to use."""

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


def measure(row: Row, experiment: Experiment, chips: dict[str, Chip]) -> Outcome:
    """Run a row: off and on in turn, round by round."""
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
    """Without it: the reference, which holds all scores in memory, over a cache that is exactly full."""
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
    raise NotBuilt(
        "proposing and accepting drafts; what `verify` costs already, and from which acceptance on it would "
        "pay, is under the pitfalls"
    )
    yield


@row("GQA / MQA", prefill="small", decode="yes")
def grouped_queries(experiment: Experiment):
    """Without it: the same model with its KV heads repeated, which must say the same."""
    if experiment.cfg.group_size == 1:
        raise NotApplicable("this model has a KV head for each query head")
    s, whole = experiment.sizes, experiment.multihead
    _check_same_logits(whole, experiment.plain)
    yield Comparison(whole.prefill(1, s.long_prompt), experiment.plain.prefill(1, s.long_prompt))
    yield Comparison(whole.decode(s.few_rows, s.long_context), experiment.plain.decode(s.few_rows, s.long_context))


def _check_same_logits(one: ModelUnderTest, other: ModelUnderTest, tokens: int = 32) -> None:
    """Raise unless both give the same next token at every place of a prompt, or nearly the same logits."""
    found = []
    for model in (one, other):
        ids = token_ids(model.cfg, 1, tokens)
        logits, _ = steps.verify(model.params, model.cfg, ids, np.array([tokens]), model.cache(1, tokens), check=False)
        found.append(np.asarray(logits, np.float32))
    far = float(np.abs(found[0] - found[1]).max())
    if (found[0].argmax(-1) != found[1].argmax(-1)).any() and far > 1e-3 * float(np.abs(found[0]).max()):
        raise PdxError(f"repeated KV heads must say the same, but logits differ by up to {far}")


@row("continuous batching", prefill="small", decode="huge")
def continuous_batching(experiment: Experiment):
    """Many requests of mixed length at once, whose prompts and answers are timed as a whole. Without it: batches that
    end with their longest answer."""
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
    """The chunks are calls of `prefill`. What other rows wait for a token is timed as an engine without mixed steps
    would do it: a prefill call, then a step of theirs."""
    s = experiment.sizes
    whole = experiment.plain.prefill(1, s.long_prompt)
    yield Comparison(whole, experiment.plain.prefill(1, s.long_prompt, chunk=s.chunk))
    step, chunk = experiment.plain.decode(s.few_rows, s.context), experiment.plain.last_chunk(s.long_prompt, s.chunk)
    yield Comparison(_in_turn(whole, step), _in_turn(chunk, step), "the longest wait for a token of the other rows")


def _in_turn(first: TimedWork, step: TimedWork) -> TimedWork:
    """A call of prefill and one decode step, as one wait."""

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
