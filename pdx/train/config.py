"""The settings of `pdx distill`, as frozen data without jax: what is read, what is trained, and for how long.

A setting is declared once, with its limits: an `int` has least and most values, a `float` a range.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pdx.arguments import integer, number
from pdx.errors import RequestError

Kind = Literal["draft", "eagle"]


def whole(default: int, low: int = 1, high: int | None = None) -> Any:
    """A whole number from `low` to `high`."""
    return field(default=default, metadata={"check": lambda name, value: integer(name, value, low, high)})


def real(default: float, low: float, high: float, *, open_below: bool = False) -> Any:
    """A number from `low` to `high`; above `low` with `open_below`."""
    return field(
        default=default, metadata={"check": lambda name, value: number(name, value, low, high, open_below=open_below)}
    )


def file() -> Any:
    """A path, or None for what comes with pdx."""
    return field(default=None, metadata={"check": _file})


def _file(name: str, value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and value):
        raise RequestError(f"{name} is {value!r}: it must be the path of a file")
    return value


class _Checked:
    """Checks each field of a dataclass when it is made. `SECTION` begins its name in errors."""

    SECTION = ""

    def __post_init__(self):
        for declared in dataclasses.fields(self):  # type: ignore[arg-type]
            name = f"{self.SECTION}.{declared.name}"
            object.__setattr__(self, declared.name, declared.metadata["check"](name, getattr(self, declared.name)))


@dataclass(frozen=True)
class Data(_Checked):
    """What the target writes, and what is kept of it.

    Attributes:
      sequences: how many; `length`: the most tokens of each, start included.
      top_k: logits kept at each position.
      text_share: the share of sequences that begin with a piece of the text, and not with a prompt.
      prompts, text: files; None: those that come with pdx (`prompts.toml`, the standard library).
      rows: sequences that the target writes together.
    """

    SECTION = "data"
    sequences: int = whole(640)
    length: int = whole(192, 32)
    top_k: int = whole(32)
    text_share: float = real(0.3, 0, 1)
    rows: int = whole(32)
    seed: int = whole(0, 0)
    prompts: str | None = file()
    text: str | None = file()


@dataclass(frozen=True)
class Draft(_Checked):
    """The shape of a draft model; what is not named here is as in the target.

    `vocabulary`: the tokens that it can draft, those that the target finds likeliest over the data. It reads all.
    """

    SECTION = "draft"
    vocabulary: int = whole(8192, 2)
    d_model: int = whole(256, 8)
    num_layers: int = whole(3)
    num_heads: int = whole(8)
    num_kv_heads: int = whole(2)
    head_dim: int = whole(32, 2)
    d_ff: int = whole(704)


@dataclass(frozen=True)
class Eagle(_Checked):
    """The head on the target's hidden states.

    Attributes:
      vocabulary: the tokens that it can draft: those that the target finds likeliest over the data.
      feedback: the share of positions that are trained on the head's own hidden state in place of the target's.
      regression: the weight of the loss on hidden states beside the KL divergence.
    """

    SECTION = "eagle"
    vocabulary: int = whole(8192, 2)
    feedback: float = real(0.4, 0, 1)
    regression: float = real(0.5, 0, 1e6)


@dataclass(frozen=True)
class Train(_Checked):
    """AdamW with a linear warm-up and a cosine to a tenth; the norm of the gradients is clipped.

    Attributes:
      steps: of the optimizer; `batch`: sequences of a step.
      warmup: steps.
      checkpoint_every, evaluate_every: steps.
    """

    SECTION = "train"
    steps: int = whole(600)
    batch: int = whole(8)
    learning_rate: float = real(2e-3, 0, 1, open_below=True)
    warmup: int = whole(30, 0)
    weight_decay: float = real(0.01, 0, 1)
    clip: float = real(1.0, 0, 1e6, open_below=True)
    checkpoint_every: int = whole(50)
    evaluate_every: int = whole(50)
    seed: int = whole(0, 0)


@dataclass(frozen=True)
class DistillConfig:
    """All settings of `pdx distill`. Raises RequestError; the text names the field.

    Example:
      >>> from pdx.train.config import DistillConfig, Train
      >>> DistillConfig(train=Train(steps=10)).train.steps
      10
    """

    data: Data = Data()
    draft: Draft = Draft()
    eagle: Eagle = Eagle()
    train: Train = Train()

    @classmethod
    def from_toml(cls, path: Path | None) -> DistillConfig:
        """Read a file with the tables [data], [draft], [eagle] and [train]; what it leaves out has its default.

        `prompts` and `text` are relative to the file. None: all defaults.
        """
        if path is None:
            return cls()
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RequestError(f"{path} is no configuration of pdx distill: {error}") from None
        tables = {f.name: type(f.default) for f in dataclasses.fields(cls)}
        made = {}
        for name, values in found.items():
            if name not in tables:
                raise RequestError(f"{path} sets {name}, which pdx distill does not have; it has {', '.join(tables)}")
            if not isinstance(values, dict):
                raise RequestError(f"{path}: {name} is {values!r}: it must be a table, [{name}]")
            made[name] = _table(path, tables[name], values)
        return cls(**made)


def _table(path: Path, kind: type, values: dict[str, Any]) -> Any:
    known = [f.name for f in dataclasses.fields(kind)]
    if unknown := [name for name in values if name not in known]:
        raise RequestError(
            f"{path} sets {kind.SECTION}.{unknown[0]}, which pdx distill does not have; "  # type: ignore[attr-defined]
            f"[{kind.SECTION}] has {', '.join(known)}"  # type: ignore[attr-defined]
        )
    files = {name: str(path.parent / values[name]) for name in ("prompts", "text") if isinstance(values.get(name), str)}
    try:
        return kind(**values | files)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def check_kind(kind: str) -> None:
    """Raise RequestError for what cannot be trained."""
    if kind not in get_args(Kind):
        raise RequestError(f"head {kind!r} is not one of {', '.join(get_args(Kind))}")
