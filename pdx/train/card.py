"""What was made, its model card (README.md beside the parameters) and the picture of the loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from pdx.io import outputs
from pdx.metrics import SpeculationCounts
from pdx.train.config import DistillConfig

# How the acceptance is measured: tokens of an answer, and of a draft.
MEASURED_TOKENS, MEASURED_DRAFT = 64, 3
NAMES = {"draft": "Draft model", "eagle": "EAGLE head"}


@dataclass(frozen=True)
class Distilled:
    """What `distill` made.

    Attributes:
      path: the checkpoint, for `--speculate draft:PATH` or `eagle:PATH`; its model card is README.md.
      tokens, held_out_tokens: of the data.
      log: a line for each step.
      accepted: by kind of held-out prompts, greedily.
    """

    path: Path
    kind: str
    target: str
    config: DistillConfig
    parameters: int
    size_bytes: int
    tokens: int
    held_out_tokens: int
    device: str
    log: list[dict] = field(repr=False)
    accepted: dict[str, SpeculationCounts]

    def to_dict(self) -> dict:
        """Without the log."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "target": self.target,
            "parameters": self.parameters,
            "size_bytes": self.size_bytes,
            "tokens": self.tokens,
            "held_out_tokens": self.held_out_tokens,
            "device": self.device,
            "last": self.log[-1],
            "accepted": {
                name: {"acceptance": c.acceptance, "tokens_per_round": c.tokens_per_round}
                for name, c in self.accepted.items()
            },
            "config": asdict(self.config),
        }


def write(made: Distilled) -> None:
    """Write `README.md` into the checkpoint, and `loss.png` beside it."""
    outputs.write_text(made.path / "README.md", text(made))
    plot(made.log, made.path.parent / "loss.png", f"{NAMES[made.kind]} for {made.target}")


TEXT = """# {title} for {target}

It drafts tokens that {target} verifies. It is of no use alone.

- {parameters:,} parameters in int8, {size:.1f} MB; it has the target's tokenizer.
- `pdx generate --model {target} --speculate {kind}:FOLDER`, where FOLDER is this one.

## How it was made

`pdx distill {target} OUT{option}`, with these settings:

{settings}

- **Data**: {tokens:,} tokens of prompts, pieces of a text, and what the target wrote behind them, greedily and at
  temperatures 0.7 and 1. {held_out:,} more are held out.
- **Loss**: the KL divergence from the target's {top_k} likeliest tokens{regression}.
- **Training**: {steps} steps in {minutes:.0f} minutes, on {device}.
- **Held-out KL divergence**: {first:.3f} nats at step {first_step}, {last:.3f} at the end. Its likeliest token is the
  target's at {agreement:.0%} of the positions.

## What is accepted

Held-out prompts, greedy, drafts of {length} tokens, answers of up to {answer} tokens:

| prompts | kept | tokens a round |
|---|---|---|
{rows}

It was trained on sequences of up to {longest} tokens; longer ones were not measured.
"""


def text(made: Distilled) -> str:
    """The model card."""
    evaluated = [line for line in made.log if "held_out_divergence" in line]
    regression = f", and {made.config.eagle.regression:g} times the smooth L1 distance from its hidden states"
    lines = [
        f"| {name} | {_percent(c.acceptance)} | {_number(c.tokens_per_round)} |" for name, c in made.accepted.items()
    ]
    return TEXT.format(
        title=NAMES[made.kind],
        target=made.target,
        kind=made.kind,
        parameters=made.parameters,
        size=made.size_bytes / 1e6,
        option=" --head eagle" if made.kind == "eagle" else "",
        settings="\n".join(f"- `[{name}]` {line}" for name, line in settings(made)),
        tokens=made.tokens,
        held_out=made.held_out_tokens,
        top_k=made.config.data.top_k,
        regression=regression if made.kind == "eagle" else "",
        steps=len(made.log),
        minutes=sum(line["seconds"] for line in made.log) / 60,
        device=made.device,
        first=evaluated[0]["held_out_divergence"],
        first_step=evaluated[0]["step"],
        last=evaluated[-1]["held_out_divergence"],
        agreement=evaluated[-1]["held_out_agreement"],
        length=MEASURED_DRAFT,
        answer=MEASURED_TOKENS,
        rows="\n".join(lines),
        longest=made.config.data.length,
    )


def settings(made: Distilled) -> list[tuple[str, str]]:
    """The tables of the configuration, each in one line."""
    tables = ("data", made.kind, "train")
    chosen = [(name, getattr(made.config, name)) for name in tables]
    return [
        (
            name,
            ", ".join(
                f"{f.name} = {Path(x).name if f.name in ('prompts', 'text') else x}"
                for f in fields(table)
                if (x := getattr(table, f.name)) is not None
            ),
        )
        for name, table in chosen
    ]


def plot(log: list[dict], file: Path, title: str) -> None:
    """The loss by step: each one, their running mean, and the held-out one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = np.array([x["step"] for x in log]), np.array([x["divergence"] for x in log])
    held_out = [(x["step"], x["held_out_divergence"]) for x in log if "held_out_divergence" in x]
    width = max(1, len(log) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, "valid")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="a step")
    axes.plot(steps[width - 1 :], smooth, label=f"mean of {width} steps")
    axes.plot(*zip(*held_out, strict=True), marker="o", markersize=3, label="held out")
    axes.set(xlabel="step", ylabel="KL divergence, nats", title=title, ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=120)


def _percent(x: float | None) -> str:
    return "" if x is None else f"{x:.0%}"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"
