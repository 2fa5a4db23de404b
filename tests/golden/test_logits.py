"""Every family against logits that transformers computed and that are committed: no torch needed.

`tests/golden/make_logits.py` made the files; `tests/parity` makes the same comparison live, at more positions.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import pdx
from tests.golden.phases import TOLERANCE, difference, prefilled_then_decoded
from tests.golden.weights import digest, make_weights

pytestmark = pytest.mark.thin(6)

GOLDEN = {path.stem: path for path in sorted((Path(__file__).parent / "logits").glob("*.json"))}
# Compiling is what these tests spend their time on: these variants of a family are checked in one pass, uncompiled.
ONE_PASS = ("llama2", "llama_bias", "llama_linear", "qwen2", "qwen3_yarn", "gemma3")
STEPPED = sorted(GOLDEN.keys() - set(ONE_PASS))


def load_golden(name: str, directory: Path) -> SimpleNamespace:
    """The model, made from its seed and loaded as any other, and what transformers says about it."""
    golden = json.loads(GOLDEN[name].read_text())
    weights = make_weights(golden["shapes"], offset_norms=golden["offset_norms"])
    assert digest(weights) == golden["weights_sha256"], "the weights are not those that the logits were made with"
    (directory / "config.json").write_text(json.dumps(golden["config"]))
    save_file(weights, directory / "model.safetensors")
    model = pdx.load(directory, dtype="f32")

    lengths, prompts = tuple(golden["lengths"]), tuple(golden["prompts"])
    tokens = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, ids in zip(tokens, golden["tokens"], strict=True):
        row[: len(ids)] = ids
    kept = [n - p + 1 for n, p in zip(lengths, prompts, strict=True)]
    reference = np.split(np.load(GOLDEN[name].with_suffix(".npy")), np.cumsum(kept)[:-1])
    return SimpleNamespace(
        params=model.params, cfg=model.config, tokens=tokens, lengths=lengths, prompts=prompts, reference=reference
    )


@pytest.mark.parametrize("name", STEPPED)
def test_prefill_and_decode_give_the_golden_logits(name, tmp_path):
    """A ragged batch: logits behind each prompt, then behind every token decoded after it."""
    golden = load_golden(name, tmp_path)
    ours = prefilled_then_decoded(
        golden.params, golden.cfg, golden.tokens, golden.lengths, golden.prompts, chunk=max(golden.prompts)
    )
    assert difference(ours, golden.reference) < TOLERANCE
    # The comparison can fail: the logits of one step are not those of the next.
    assert difference([r[1:] for r in ours], [r[:-1] for r in golden.reference]) > 1


@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass_gives_the_golden_logits(name, tmp_path):
    golden = load_golden(name, tmp_path)
    out = pdx.forward(golden.params, golden.cfg, jnp.asarray(golden.tokens), lengths=jnp.asarray(golden.lengths))
    ours = [row[p - 1 : n] for row, p, n in zip(np.asarray(out.logits), golden.prompts, golden.lengths, strict=True)]
    assert difference(ours, golden.reference) < TOLERANCE


def test_every_family_is_stepped():
    from pdx.families import families

    covered = {json.loads(GOLDEN[name].read_text())["config"]["model_type"] for name in STEPPED}
    assert {family.model_types[0] for family in families()} <= covered
