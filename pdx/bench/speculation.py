"""`pdx bench speculation`: decoding with drafts beside plain decoding, over kinds of prompts; what it cost, what it was
said to cost, and whether the tokens are the same.

Acceptance depends on the text, so prompts are real ones of five kinds. Each is answered both ways in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import cast

import jax.numpy as jnp
import numpy as np

from pdx.generation import generate
from pdx.generation.completion import Completion
from pdx.generation.kept import generator
from pdx.generation.programs import Clock
from pdx.generation.speculation import SpeculativeGenerator
from pdx.io.tables import Table
from pdx.metrics import SpeculationCounts
from pdx.model import forward
from pdx.speculative.options import Speculation
from pdx.speculative.trees import depth_of
from pdx.weights.load import Model
from pdx.weights.progress import Report, silent

# Two greedy answers may part where the two best logits are this close: kernels of another shape round otherwise.
TIE = 1e-3

PASSAGE = (
    "The committee met on Tuesday to consider the new timetable. It noted that the northern line had carried 412,000 "
    "passengers in March, eleven per cent more than a year earlier, and that the bridge at Harrow would be closed for "
    "repairs from 3 June to 19 August. It decided to run twelve additional buses on weekdays and to review the "
    "decision in September."
)
CODE = """def mean_and_spread(values):
    total = 0.0
    for value in values:
        total += value
    mean = total / len(values)
    spread = 0.0
    for value in values:
        spread += (value - mean) ** 2
    return mean, (spread / len(values)) ** 0.5
"""
PROMPTS: dict[str, tuple[str, ...]] = {
    "copy": (
        f"Repeat this text word for word.\n\n{PASSAGE}\n\nThe text again:\n\n",
        f"Here is a function.\n\n{CODE}\nHere is the same function, with `values` renamed to `numbers`.\n\n",
        f'Quote the two sentences on the bridge and on the buses.\n\n{PASSAGE}\n\nThe quotes: "It noted that',
    ),
    "code": (
        "import json\n\n\ndef read_rows(path):\n    ",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
        "SELECT name, count(*) FROM orders\nWHERE ",
    ),
    "prose": (
        "The harbour was quiet when the last boat came in, and",
        "A short history of the printing press begins with",
        "Bees find their way home by",
    ),
    "chat": (
        "User: How do I keep bread fresh for longer?\nAssistant:",
        "User: Explain what a hash table is, for a beginner.\nAssistant:",
        "User: Plan a day in Lisbon for a family.\nAssistant:",
    ),
    "other scripts": (
        "\u041c\u043e\u0441\u043a\u0432\u0430 \u2014 \u044d\u0442\u043e \u0433\u043e\u0440\u043e\u0434,",
        "\u4e2d\u56fd\u7684\u9996\u90fd\u662f\u5317\u4eac\u3002",
        "La capitale de la France est Paris, et",
    ),
}


@dataclass(frozen=True)
class Row:
    """One kind of prompts at one batch size.

    Attributes:
      plain_s, drafted_s: seconds a token after the first, without and with speculation.
      speed: plain / drafted.
      predicted_speed: of the rounds that were run, from what a round of each draft length costs here.
      acceptance, tokens_per_round: None where nothing was drafted.
      ties, faults: answers that part from the plain one where the two best logits are closer than 1e-3, and others.
    """

    proposer: str
    kind: str
    batch: int
    plain_s: float
    drafted_s: float
    predicted_speed: float
    acceptance: float | None
    tokens_per_round: float | None
    by_length: dict[int, int]
    ties: int
    faults: int

    @property
    def speed(self) -> float:
        return self.plain_s / self.drafted_s

    def to_dict(self) -> dict:
        return asdict(self) | {"speed": self.speed}


def run(
    model: Model,
    speculation: Speculation,
    batches: Sequence[int] = (1,),
    *,
    kinds: Sequence[str] = tuple(PROMPTS),
    tokens: int = 128,
    repeats: int = 1,
    progress: Report = silent,
) -> list[Row]:
    """Answer every prompt with and without speculation, greedily; each kind at each batch size is a row.

    In a batch of n, n prompts of the kind run together, the same one again if there are too few.
    """
    found, total = [], len(kinds) * len(batches)
    for batch in batches:
        for kind in kinds:
            progress("answering with and without drafts", len(found), total)
            found.append(_row(model, speculation, kind, batch, tokens, repeats))
    progress("answering with and without drafts", total, total)
    return found


def _row(model: Model, speculation: Speculation, kind: str, batch: int, tokens: int, repeats: int) -> Row:
    prompts = PROMPTS[kind]
    groups = [[p] for p in prompts] if batch == 1 else [[prompts[i % len(prompts)] for i in range(batch)]]

    longest = max(len(model.tokenizer.encode(p)) for p in prompts) + tokens

    def answer(group: list[str], count: int = tokens, **settings) -> list[Completion]:
        settings |= {"batch_size": batch, "capacity": longest}
        return generate(model, group, max_tokens=count, ignore_eos=True, **settings)

    ways: dict[str, Callable[..., list[Completion]]] = {
        "plain": answer,
        "drafted": partial(answer, speculate=speculation),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}  # of each group
    counts, rounds, ties, faults = SpeculationCounts(), [], 0, 0
    for group in groups:
        for way in ways.values():
            way(group, 2)  # compiles
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            done = {name: way(group) for name, way in ways.items()}
            for name, answers in done.items():
                times[name].append(_tpot(answers))
        for name in ways:
            seconds[name].append(float(np.median(times[name])))
        rounds.append([answer.speculation or SpeculationCounts() for answer in done["drafted"]])
        for plain, drafted in zip(done["plain"], done["drafted"], strict=True):
            counts += rounds[-1][plain.index]
            gap = gap_where_they_part(model, group[plain.index], plain, drafted)
            ties, faults = ties + (gap is not None and gap < TIE), faults + (gap is not None and gap >= TIE)
    return Row(
        speculation.proposer,
        kind,
        batch,
        float(np.mean(seconds["plain"])),
        float(np.mean(seconds["drafted"])),
        _predicted(model, speculation, batch, longest, rounds),
        counts.acceptance,
        counts.tokens_per_round,
        dict(counts.by_length),
        ties,
        faults,
    )


def _tpot(answers: Sequence[Completion]) -> float:
    """Seconds from the first token of a batch to its last, over the tokens of a row."""
    timing = [a.timing for a in answers]
    return (max(t.e2e_s for t in timing) - max(t.ttft_s for t in timing)) / (timing[0].tokens - 1)


def _predicted(
    model: Model, speculation: Speculation, batch: int, longest: int, groups: Sequence[Sequence[SpeculationCounts]]
) -> float:
    """Plain decoding over the rounds that were run, at what a round costs by its draft length.

    The rows of a batch run together until the last one has its tokens, and that row took part in every round.
    """
    run = generator(model, rows=batch, tokens=longest, num_logprobs=0, kernels="auto", speculation=speculation)
    run = cast(SpeculativeGenerator, run)
    measured = run.costs
    if speculation.draft_length != "auto" or measured is None:  # then they were not needed
        measured, _ = run.measured_costs(run.new_cache(), Clock())
    costs = dict(zip(map(depth_of, run.levels), measured.tolist(), strict=True))

    def seconds(row: SpeculationCounts) -> float:
        return sum(n * costs[length] for length, n in row.by_length.items())

    spent = sum(max(map(seconds, rows)) for rows in groups)
    plain = sum((rows[0].rounds + rows[0].kept) * costs[0] for rows in groups)  # each row has as many tokens
    return plain / spent


def gap_where_they_part(model: Model, prompt: str, plain: Completion, drafted: Completion) -> float | None:
    """The distance of the two best logits where two greedy answers first differ; None where they are equal."""
    pairs = list(zip(plain.token_ids, drafted.token_ids, strict=True))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return None
    ids = [*model.tokenizer.encode(prompt), *plain.token_ids[:at]]
    logits = forward(model.params, model.config, jnp.asarray([ids]), logits="last").logits[0]
    first, second = np.sort(np.asarray(logits))[::-1][:2]
    return float(first - second)


HEAD = (
    "drafts",
    "prompts",
    "batch",
    "plain TPOT, ms",
    "TPOT, ms",
    "speed",
    "predicted",
    "kept",
    "tokens a round",
    "parted at a tie",
)


def table(rows: Sequence[Row]) -> Table:
    """A line for each kind of prompts and batch size."""
    lines = []
    for r in rows:
        cells = (
            r.proposer,
            r.kind,
            str(r.batch),
            f"{r.plain_s * 1e3:.1f}",
            f"{r.drafted_s * 1e3:.1f}",
            f"{r.speed:.2f}x",
            f"{r.predicted_speed:.2f}x",
            "" if r.acceptance is None else f"{r.acceptance:.0%}",
            "" if r.tokens_per_round is None else f"{r.tokens_per_round:.2f}",
            f"{r.ties}" + (f", {r.faults} FAULTS" if r.faults else ""),
        )
        lines.append(cells)
    return Table(HEAD, lines, keys=3)
