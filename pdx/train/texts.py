"""The starts that the target continues: prompts of several kinds, and pieces of a text."""

from __future__ import annotations

import ast
import sysconfig
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pdx.calibration import stdlib_texts
from pdx.errors import RequestError
from pdx.io import inputs
from pdx.train.config import Data
from pdx.weights.loaded import Model

BUILTIN_PROMPTS = Path(__file__).with_name("prompts.toml")
# Every so many prompts of a kind, the last one is held out.
HELD_OUT_EVERY = 8
# Least and most tokens of a piece of text that begins a sequence.
PIECE = (8, 56)
# The first answer to a prompt is the greedy one, the others are drawn.
TEMPERATURES = (0.0, 0.7, 1.0)
# Characters of source code beside the docstrings, in the text that comes with pdx.
CODE_CHARACTERS = 400_000


@dataclass(frozen=True)
class Start:
    """Tokens that the target continues, at a temperature."""

    tokens: tuple[int, ...]
    temperature: float
    seed: int


def read_prompts(path: str | None) -> dict[str, list[str]]:
    """Prompts by kind, from a TOML file of lists of texts; None: those that come with pdx. Raises RequestError."""
    file = BUILTIN_PROMPTS if path is None else Path(path)
    try:
        found = tomllib.loads(inputs.read(file))
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"data.prompts: {file} is no TOML file: {error}") from None
    for kind, prompts in found.items():
        good = isinstance(prompts, list) and prompts and all(isinstance(p, str) and p for p in prompts)
        if not good:
            raise RequestError(f"data.prompts: {kind} in {file} must be a list of texts")
    if not found:
        raise RequestError(f"data.prompts: {file} has no prompts")
    return found


def split(prompts: dict[str, list[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The prompts to train on, and those that are held out."""
    kept, held_out = {}, {}
    for kind, texts in prompts.items():
        last = [i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for i in range(len(texts))]
        kept[kind] = [t for t, out in zip(texts, last, strict=True) if not out]
        held_out[kind] = [t for t, out in zip(texts, last, strict=True) if out]
    return kept, {kind: texts for kind, texts in held_out.items() if texts}


def encode(model: Model, kind: str, prompt: str, templated: bool) -> list[int]:
    """Token ids of a prompt; a chat's as a plain dialogue, or `templated` with the model's chat template."""
    if kind != "chat":
        return model.tokenizer.encode(prompt)
    if templated and model.tokenizer.has_chat_template:
        return model.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    return model.tokenizer.encode(f"User: {prompt}\nAssistant:")


def starts(model: Model, data: Data) -> list[Start]:
    """The `data.sequences` starts, always the same ones for the same settings and model."""
    random = np.random.default_rng(data.seed)
    kept, _ = split(read_prompts(data.prompts))
    prompts = [
        tuple(encode(model, kind, text, templated))
        for kind, texts in kept.items()
        for text in texts
        for templated in ((False, True) if kind == "chat" else (False,))
    ]
    random.shuffle(prompts)
    text = np.array(model.tokenizer.encode(inputs.read(_path(data.text), lesson), add_special=False), np.int32)
    if len(text) <= PIECE[1]:
        raise RequestError(f"data.text has {len(text)} tokens: at least {PIECE[1] + 1} are needed")
    made, asked = [], 0
    for i in range(data.sequences):
        if random.random() < data.text_share:
            size = int(random.integers(*PIECE))
            at = int(random.integers(len(text) - size))
            tokens, turn = (*model.tokenizer.opening, *text[at : at + size].tolist()), int(random.integers(3))
        else:
            tokens, turn = prompts[asked % len(prompts)], asked // len(prompts)
            turn = turn if turn < len(TEMPERATURES) else 1 + turn % 2  # a second greedy answer would be the same
            asked += 1
        made.append(Start(tokens[: data.length - 1], TEMPERATURES[turn], data.seed * 1_000_003 + i))
    return made


def held_out(model: Model, data: Data) -> dict[str, list[Sequence[int]]]:
    """The token ids of the prompts that no sequence begins with, by kind."""
    _, out = split(read_prompts(data.prompts))
    return {kind: [encode(model, kind, text, False) for text in texts] for kind, texts in out.items()}


def lesson() -> str:
    """The text that comes with every Python: docstrings of the standard library, and source code of it."""
    found, size = [stdlib_texts.calibration()], 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            text = file.read_text(encoding="utf-8")
            ast.parse(text)
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        found.append(text[-20_000:])
        size += len(found[-1])
        if size > CODE_CHARACTERS:
            break
    return "\n\n".join(found)


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
