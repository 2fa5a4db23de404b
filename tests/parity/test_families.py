"""Each family against transformers, live: tiny random models, f32, every position of a ragged batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import pdx
from pdx.config import ModelConfig
from pdx.model import Params, forward
from pdx.shapes import layer_slots, round_up
from tests.golden import phases
from tests.golden.phases import TOLERANCE, difference
from tests.parity import tiny

pytestmark = pytest.mark.parity

# Past the windows, past the ring that holds one, a row of one token; no multiple of a block.
LENGTHS = (171, 133, 37, 1)
CHUNK = 80
PROMPTS = (80, 61, 6, 1)
# What a switched-off feature must change at least, in units of the logits: 50 times the tolerance.
VISIBLE = 50 * TOLERANCE


@pytest.fixture(scope="module", params=list(tiny.PUBLISHED))
def pair(request, tmp_path_factory):
    """One family: the model loaded by pdx, and transformers' logits and hidden states."""
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp(request.param)
    theirs = tiny.make_model(tiny.PUBLISHED[request.param], directory)
    model = pdx.load(directory, dtype="float32")
    tokens = tiny.tokens_of(LENGTHS, model.config.vocab_size)
    return SimpleNamespace(
        name=request.param,
        directory=directory,
        theirs=theirs,
        params=model.params,
        cfg=model.config,
        tokens=tokens,
        reference=tiny.whole_logits(theirs, tokens, LENGTHS),
    )


def test_the_reference_is_worth_comparing(pair):
    """Logits of a size where an error would show, not the same at every position."""
    longest = pair.reference[0]
    assert 1 < longest.std() < 10
    assert longest.std(axis=0).min() > 0.5


def test_the_windows_wrap(pair):
    """A window layer's ring is shorter than the sequences, so that its slots are used again."""
    slots = {layer_slots(w, round_up(max(LENGTHS), 128), CHUNK) for w in pair.cfg.windows if w is not None}
    assert all(s < LENGTHS[1] for s in slots)
    published = tiny.PUBLISHED[pair.name]
    assert bool(slots) == (published.get("sliding_window") is not None and published.get("use_sliding_window", True))


def test_published_and_saved_configurations_are_one(pair):
    """config.json as published models carry it, and as transformers writes it today."""
    (pair.directory / "published" / "model.safetensors").write_bytes(
        (pair.directory / "model.safetensors").read_bytes()
    )
    assert pdx.load(pair.directory / "published", dtype="float32").config == pair.cfg


def test_prefill_agrees_at_every_position(pair, measured):
    whole = difference(phases.whole(pair.params, pair.cfg, pair.tokens, LENGTHS), pair.reference)
    chunked = difference(phases.chunked(pair.params, pair.cfg, pair.tokens, LENGTHS, CHUNK), pair.reference)
    ends = phases.chunk_ends(pair.params, pair.cfg, pair.tokens, LENGTHS, CHUNK)
    assert len(ends) == sum(-(-n // CHUNK) for n in LENGTHS)
    prefill = max(float(np.abs(logits - pair.reference[row][at]).max()) for row, at, logits in ends)
    measured(
        f"{pair.name:14} largest logit difference: one pass {whole:.1e}, chunks {chunked:.1e}, "
        f"prefill {prefill:.1e} (logits up to {max(np.abs(r).max() for r in pair.reference):.1f})"
    )
    assert max(whole, chunked, prefill) < TOLERANCE


def test_token_by_token_decode_agrees_at_every_position(pair, measured):
    """Against transformers' own decode through its cache, and so against its sliding windows too."""
    reference = tiny.stepwise_logits(pair.theirs, pair.tokens, LENGTHS)
    batch = (pair.params, pair.cfg, pair.tokens, LENGTHS)
    decode = difference(phases.prefilled_then_decoded(*batch, (0,) * len(LENGTHS), chunk=CHUNK), reference)
    after = phases.prefilled_then_decoded(*batch, PROMPTS, chunk=CHUNK)
    mixed = difference(after, [r[n - 1 :] for r, n in zip(reference, PROMPTS, strict=True)])
    measured(f"{pair.name:14} largest logit difference: decode {decode:.1e}, decode behind a prefill {mixed:.1e}")
    assert max(decode, mixed) < TOLERANCE


def test_hidden_states_agree(pair):
    """The residual stream behind every layer, as research code asks for it."""
    import torch

    layers = tuple(range(pair.cfg.num_layers + 1))
    ours = phases.whole_forward(
        pair.params,
        pair.cfg,
        jnp.asarray(pair.tokens),
        lengths=jnp.asarray(LENGTHS),
        logits="none",
        hidden_layers=layers,
    )
    for row, n in enumerate(LENGTHS):
        with torch.inference_mode():
            out = pair.theirs.model(
                torch.from_numpy(pair.tokens[row : row + 1, :n].astype(np.int64)),
                output_hidden_states=True,
                use_cache=False,
            )
        # transformers hands out the last one behind the final norm.
        stream = [*(ours.hidden[i] for i in layers[:-1]), ours.final_hidden]
        for mine, theirs in zip(stream, out.hidden_states, strict=True):
            np.testing.assert_allclose(np.asarray(mine[row, :n]), theirs[0].numpy(), atol=TOLERANCE, rtol=0)


# Negative controls. A feature that is switched off, or set wrong, must break the agreement.
Control = Callable[[Params, ModelConfig], tuple[Params, ModelConfig]]


def _config(**changes) -> Control:
    return lambda params, cfg: (params, dataclasses.replace(cfg, **changes))


def _rope(field: str = "rope", **changes) -> Control:
    def control(params, cfg):
        return params, dataclasses.replace(cfg, **{field: dataclasses.replace(getattr(cfg, field), **changes)})

    return control


def _without(*leaves: str) -> Control:
    def control(params, cfg):
        layers = [{k: v for k, v in layer.items() if k not in leaves} for layer in params["layers"]]
        return {**{k: v for k, v in params.items() if k not in leaves}, "layers": layers}, cfg

    return control


def _shift_window(by: int) -> Control:
    return lambda params, cfg: (params, dataclasses.replace(cfg, windows=tuple(w and w + by for w in cfg.windows)))


def _reverse_windows(params, cfg):
    return params, dataclasses.replace(cfg, windows=cfg.windows[::-1])


def _controls(cfg: ModelConfig) -> dict[str, Control]:
    """Each feature that this configuration has, switched off or set wrong."""
    found = {
        "norm_eps": _config(norm_eps=1e-6),
        "rope base": _rope(theta=3_000.0),
        "attention scale": _config(attn_scale=0.1),
        "activation": _config(activation="gelu_tanh" if cfg.activation == "silu" else "silu"),
    }
    if any(cfg.windows):
        found["no window"] = _config(windows=())
        found |= {"window one wider": _shift_window(1), "window one less": _shift_window(-1)}
    if cfg.windows[::-1] != cfg.windows:
        found["window layers reversed"] = _reverse_windows
    if cfg.rope.divisors is not None:
        found["rope scaling"] = _rope(divisors=None)
    if cfg.rope.attention_factor != 1:
        found["yarn's factor on cos and sin"] = _rope(attention_factor=1.0)
    if cfg.rope_window is not None:
        found["one rope base"] = _config(rope_window=None)
        found["local rope base"] = _rope("rope_window", theta=3_000.0)
    # Fields that are off in most families.
    off = {"qk_norm": False, "post_norms": False, "embed_scale": 1.0, "attn_softcap": None, "logit_softcap": None}
    found |= {name: _config(**{name: value}) for name, value in off.items() if getattr(cfg, name) != value}
    if cfg.attn_scale != dataclasses.replace(cfg, attn_scale=None).attn_scale:
        found["query_pre_attn_scalar"] = _config(attn_scale=None)
    biases = {"qkv_bias": ("q", "k", "v"), "o_bias": ("o",), "mlp_bias": ("gate", "up", "down")}
    found |= {f"{x} bias": _without(f"{x}_bias") for name, xs in biases.items() if getattr(cfg, name) for x in xs}
    if not cfg.tie_embeddings:
        found["own output head"] = _without("lm_head")
    return found


def test_each_feature_matters(pair, measured):
    """Without it, or with it a little wrong, the logits differ by far more than the tolerance."""
    changes = {}
    for feature, control in _controls(pair.cfg).items():
        params, cfg = control(pair.params, pair.cfg)
        logits = forward(params, cfg, jnp.asarray(pair.tokens), lengths=jnp.asarray(LENGTHS)).logits
        changes[feature] = difference(np.asarray(logits), pair.reference)
    least = min(changes, key=changes.get)
    measured(f"{pair.name:14} {len(changes)} negative controls; the least changes {changes[least]:.2f} ({least})")
    assert changes[least] > VISIBLE, changes
