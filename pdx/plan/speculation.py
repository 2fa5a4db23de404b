"""What speculation is worth on a chip: by acceptance, cost of a draft, batch, context and length of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pdx.arguments import number
from pdx.cost import tradeoffs
from pdx.errors import RequestError
from pdx.io.tables import Table
from pdx.plan import published
from pdx.plan.figures import Plan
from pdx.speculative.options import Speculation
from pdx.speculative.trees import LONGEST_DRAFT, Tree

# Acceptances that are shown where none is given.
ACCEPTANCES = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Prediction:
    """Speculation at one acceptance, with the draft length that makes the answer end first; 0: none does.

    Attributes:
      tokens_per_round: (1 - a^(g+1)) / (1 - a); Leviathan et al. 2023.
      round_s, tpot_s: seconds of a round, and of a token.
      ttft_s, e2e_s: a draft model reads the prompt too.
      decode_speed, e2e_speed: over plain decoding.
    """

    acceptance: float
    draft_length: int
    tokens_per_round: float
    round_s: float
    tpot_s: float
    ttft_s: float
    e2e_s: float
    decode_speed: float
    e2e_speed: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def predict(plan: Plan, speculation: Speculation, acceptances: Sequence[float] = ()) -> list[Prediction]:
    """A prediction for each acceptance; none given: several.

    Args:
      speculation: by n-grams, whose drafts cost nothing, or with a draft model, a shape of `configs/` or a model.

    Raises:
      RequestError: an acceptance outside of 0 to 1, another proposer, or a token tree.
    """
    asked = [number("acceptance", a, 0, 1) for a in acceptances] or list(ACCEPTANCES)
    token_s, prompt_s = _draft_costs(plan, speculation)
    length = speculation.draft_length
    if isinstance(length, Tree):
        raise RequestError(f"draft_length {length}: a plan predicts chains of tokens; give a number of them, or auto")
    lengths = range(1, LONGEST_DRAFT + 1) if isinstance(length, str) else (length,)
    verify = {g: plan.setup.verify(plan.batch, plan.context, g).seconds(plan.chip, plan.chips) for g in lengths}
    found = []
    for a in asked:
        each = [_prediction(plan, a, g, verify[g] + g * token_s, prompt_s) for g in lengths]
        if speculation.draft_length == "auto":
            each.append(_prediction(plan, a, 0, plan.tpot, 0.0))
        found.append(min(each, key=lambda p: p.e2e_s))
    return found


def table(predictions: Sequence[Prediction]) -> Table:
    """A row for each acceptance."""
    head = ("acceptance", "draft length", "tokens a round", "round", "TPOT", "TTFT", "E2E", "decode", "E2E speed")
    rows = [
        (
            f"{p.acceptance:.2f}",
            str(p.draft_length),
            f"{p.tokens_per_round:.2f}",
            f"{p.round_s * 1e3:.2f} ms",
            f"{p.tpot_s * 1e3:.2f} ms",
            f"{p.ttft_s * 1e3:.1f} ms",
            f"{p.e2e_s:.2f} s",
            f"{p.decode_speed:.2f}x",
            f"{p.e2e_speed:.2f}x",
        )
        for p in predictions
    ]
    return Table(head, rows)


def _draft_costs(plan: Plan, speculation: Speculation) -> tuple[float, float]:
    """Seconds of one drafted token in all rows, and of a prompt."""
    if speculation.proposer == "ngram":
        return 0.0, 0.0
    if speculation.proposer == "self" and speculation.layers is not None:
        return plan.tpot * speculation.layers / plan.setup.cfg.num_layers, 0.0
    if speculation.proposer != "draft" or not isinstance(speculation.model, str):
        raise RequestError(
            "a plan knows the cost of ngram, self:LAYERS and draft:SHAPE, where SHAPE is one of configs/ or a model"
        )
    shape = published.shape(speculation.model)
    setup = shape.setup(plan.setup.dtype, None, plan.setup.kv_dtype, plan.setup.layout)
    draft: Any = replace(plan, model=speculation.model, setup=setup)
    return draft.tpot, draft.ttft


def _prediction(plan: Plan, acceptance: float, length: int, round_s: float, prompt_s: float) -> Prediction:
    tokens = tradeoffs.tokens_per_round(acceptance, length)
    tpot, ttft = round_s / tokens, plan.ttft + prompt_s
    e2e = ttft + (plan.output_tokens - 1) * tpot
    return Prediction(acceptance, length, tokens, round_s, tpot, ttft, e2e, plan.tpot / tpot, plan.e2e / e2e)
