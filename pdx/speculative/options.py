"""How speculation is asked for: `--speculate`, `--draft-length`, and `speculate=` in Python. No jax."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdx.arguments import integer, number
from pdx.errors import RequestError
from pdx.speculative.trees import LONGEST_DRAFT, Tree

if TYPE_CHECKING:
    from pdx.weights.loaded import Model

# Who can draft a token tree: their logits tell the next best tokens.
OF_TREES = ("draft", "eagle", "self")
CHOICES = "none, ngram, draft[:MODEL], eagle[:PATH], self:LAYERS, synthetic:ACCEPTANCE"


@dataclass(frozen=True)
class Speculation:
    """Who drafts tokens, and how many.

    Attributes:
      proposer: `ngram`: what followed the same words earlier in the text. `draft`: a smaller model of the same
        vocabulary. `eagle`: a head on the model's hidden states. `self`: the model's own first layers. `synthetic`:
        for benchmarks, accepts by chance; its answers mean nothing.
      draft_length: the most tokens a round, 1 to 15; `auto`: chosen each round, 0 where drafting does not pay. Or a
        token tree of up to 15 tokens, as a text such as `3x2x1` (the three best tokens, two behind each of them, one
        behind each of those) or as a `pdx.speculative.trees.Tree`: of `draft`, `eagle` and `self`.
      model: of `draft`: what `pdx.load` returns, or a name or path for it. Of `eagle`: the folder of a head that `pdx
        distill` made, or what `pdx.speculative.draft_file.load_draft` returns. None: the one that comes with pdx for
        the model.
      layers: of `self`, at least 1.
      acceptance: of `synthetic`, 0 to 1.

    Raises:
      RequestError: a setting that is missing, out of range, or of another proposer.

    Example:
      >>> pdx.Speculation("ngram").draft_length
      'auto'
      >>> pdx.Speculation.parse("self:8", draft_length=4)
      Speculation(proposer='self', draft_length=4, model=None, layers=8, acceptance=None)
    """

    proposer: str
    draft_length: int | str | Tree = "auto"
    model: Model | str | None = None
    layers: int | None = None
    acceptance: float | None = None

    def __post_init__(self):
        settings = {"ngram": None, "draft": "model", "eagle": "model", "self": "layers", "synthetic": "acceptance"}
        if self.proposer not in settings:
            raise RequestError(f"speculate {self.proposer!r} is not one of {CHOICES}")
        for name in ("model", "layers", "acceptance"):
            given, wanted = getattr(self, name) is not None, settings[self.proposer] == name
            if given and not wanted:
                raise RequestError(f"{name} does not belong to speculation by {self.proposer}")
            if wanted and not given and name != "model":
                raise RequestError(f"speculate {self.proposer!r} needs {name}: one of {CHOICES}")
        self._set("draft_length", as_length(self.draft_length))
        if isinstance(self.draft_length, Tree) and self.proposer not in OF_TREES:
            raise RequestError(
                f"draft_length {self.draft_length}: {self.proposer} drafts no token trees, but {', '.join(OF_TREES)} do"
            )
        if self.layers is not None:
            self._set("layers", integer("layers", self.layers, 1))
        if self.acceptance is not None:
            self._set("acceptance", number("acceptance", self.acceptance, 0, 1))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, text: str, draft_length: int | str | Tree = "auto") -> Speculation | None:
        """`none`, which is None, or `ngram`, `draft`, `draft:MODEL`, `eagle`, `eagle:PATH`, `self:LAYERS`,
        `synthetic:ACCEPTANCE`. Raises RequestError.

        `draft_length` may be a text, as on the command line.
        """
        name, _, rest = text.partition(":")
        length = as_length(draft_length)
        if text == "none":
            return None
        settings: dict[str, Any] = {}
        if name in ("draft", "eagle") and rest:
            settings["model"] = rest
        elif name == "self" and rest:
            if not rest.isdecimal():
                raise RequestError(f"speculate {text!r}: {rest!r} is not a number of layers")
            settings["layers"] = int(rest)
        elif name == "synthetic" and rest:
            try:
                settings["acceptance"] = float(rest)
            except ValueError:
                raise RequestError(f"speculate {text!r}: {rest!r} is not a number from 0 to 1") from None
        elif rest:
            raise RequestError(f"speculate {text!r} is not one of {CHOICES}")
        return cls(name, length, **settings)


def as_length(draft_length: Any) -> int | str | Tree:
    """`auto`, a number, or a tree; the last two may be texts as on the command line. Raises RequestError."""
    if isinstance(draft_length, Tree) or draft_length == "auto":
        return draft_length
    if isinstance(draft_length, str):
        if re.fullmatch(r"\d+(x\d+)+", draft_length):
            return Tree.parse(draft_length)
        if not draft_length.isdecimal():
            raise RequestError(
                f"draft_length {draft_length!r} is not auto, a number of tokens, or a token tree such as 3x2x1"
            )
        draft_length = int(draft_length)
    return integer("draft_length", draft_length, 1, LONGEST_DRAFT)


def asked(speculate: Speculation | str | None, draft_length: int | str | Tree = "auto") -> Speculation | None:
    """What a caller asked for, in words or as an object. Raises RequestError."""
    if speculate is None or speculate == "none":
        if draft_length != "auto":
            raise RequestError("draft_length has no effect without speculate")
        return None
    if isinstance(speculate, Speculation):
        if draft_length != "auto":
            raise RequestError("speculate has a draft_length of its own: give that one")
        return speculate
    if not isinstance(speculate, str):
        raise RequestError(f"speculate is {speculate!r}: it must be a Speculation or one of {CHOICES}")
    return Speculation.parse(speculate, draft_length)
