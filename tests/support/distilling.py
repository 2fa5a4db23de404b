"""A tiny target and the smallest settings of `pdx distill`."""

from __future__ import annotations

from pathlib import Path

from tests.support import tiny_model

PROMPTS = """prose = ["The sea", "A long walk", "Rain", "It was", "Once", "The old", "A new", "Then", "Now"]
chat = ["Who are you?", "What is this?"]
"""
CONFIG = """[data]
sequences = 16
length = 32
rows = 4
top_k = 8
prompts = "prompts.toml"
text = "text.txt"
[draft]
vocabulary = 64
d_model = 16
num_layers = 1
num_heads = 2
num_kv_heads = 1
head_dim = 8
d_ff = 16
[eagle]
vocabulary = 64
[train]
steps = 30
batch = 2
warmup = 4
learning_rate = 0.01
checkpoint_every = 5
evaluate_every = 10
"""


def make(folder: Path) -> tuple[Path, Path]:
    """Write the target and the configuration with its texts; returns both paths."""
    (folder / "prompts.toml").write_text(PROMPTS, encoding="utf-8")
    (folder / "text.txt").write_text("All that the wind and the water had left of the wall. " * 8, encoding="utf-8")
    (folder / "draft.toml").write_text(CONFIG, encoding="utf-8")
    return tiny_model.make(folder / "target"), folder / "draft.toml"
