"""The one `forward` by itself: what it may see, what it hands out, what research code does with it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdx.cache.dense import init_cache
from pdx.model import forward, init_params, param_specs
from pdx.sharding import is_spec
from tests.support.models import ALL, GEMMA, LLAMA, QWEN, bits, close, params, tokens, whole

pytestmark = pytest.mark.thin(6)

each = pytest.mark.parametrize("cfg", ALL.values(), ids=ALL)


@each
def test_causality(cfg):
    ids = tokens(cfg, 2, 24)
    changed = ids.copy()
    changed[:, 11] = (ids[:, 11] + 1) % cfg.vocab_size
    a, b = (np.asarray(whole(params(cfg), cfg, x).logits) for x in (ids, changed))
    np.testing.assert_array_equal(bits(a[:, :11]), bits(b[:, :11]))
    assert (np.abs(a - b).max(-1)[:, 11:] > 1e-3).all()


@each
def test_a_token_counts_for_all_that_can_see_it(cfg):
    """With every layer a window, a change is not seen further than the windows reach together."""
    if all(w is None for w in cfg.windows):
        cfg = replace(cfg, windows=(5,) * cfg.num_layers)
    cfg = replace(cfg, windows=tuple(w or 6 for w in cfg.windows))
    reach = sum(w - 1 for w in cfg.windows)
    ids = tokens(cfg, 1, 40)
    changed = ids.copy()
    changed[0, 3] = (ids[0, 3] + 1) % cfg.vocab_size
    a, b = (np.asarray(whole(params(cfg), cfg, x).logits[0]) for x in (ids, changed))
    differs = (a != b).any(-1)
    assert differs[3 : 3 + reach + 1].all()
    assert not differs[3 + reach + 1 :].any()


@each
def test_padding_is_not_seen(cfg):
    ids, lengths = tokens(cfg, 3, 24), np.array([24, 7, 1], np.int32)
    other = np.where(np.arange(24) < lengths[:, None], ids, (ids + 5) % cfg.vocab_size)
    run = jax.jit(lambda x: forward(params(cfg), cfg, x, lengths=lengths).logits)
    a, b = np.asarray(run(ids)), np.asarray(run(other))
    alone = np.asarray(whole(params(cfg), cfg, ids).logits)
    for row, n in enumerate(lengths):
        np.testing.assert_array_equal(bits(a[row, :n]), bits(b[row, :n]))
        close(a[row, :n], alone[row, :n])


@each
def test_without_a_cache_equals_with_one(cfg):
    ids = tokens(cfg, 2, 24)
    run = jax.jit(lambda cache: forward(params(cfg), cfg, ids, cache).logits)
    close(run(init_cache(cfg, 2, 128, chunk=24)), whole(params(cfg), cfg, ids).logits)


@each
def test_what_is_kept_of_the_logits(cfg):
    ids, lengths = tokens(cfg, 3, 24), np.array([24, 7, 1], np.int32)

    @partial(jax.jit, static_argnames="keep")
    def run(keep):
        return forward(params(cfg), cfg, ids, lengths=lengths, logits=keep)

    every, last, none = run("all"), run("last"), run("none")
    assert every.logits.shape == (3, 24, cfg.vocab_size)
    assert last.logits.shape == (3, cfg.vocab_size)
    assert none.logits is None
    assert every.cache is None
    close(last.logits, np.asarray(every.logits)[np.arange(3), lengths - 1])
    close(none.final_hidden, every.final_hidden)


def test_hidden_layers():
    cfg = GEMMA
    ids = tokens(cfg, 2, 24)
    out = whole(params(cfg), cfg, ids, hidden_layers=(0, 2, 3))
    assert sorted(out.hidden) == [0, 2, 3]
    close(out.hidden[0], np.asarray(params(cfg)["embed"])[ids] * np.float32(cfg.embed_scale), 1e-6)
    top = np.asarray(out.hidden[3], np.float64)
    norm = top / np.sqrt((top**2).mean(-1, keepdims=True) + cfg.norm_eps) * np.asarray(params(cfg)["final_norm"])
    close(out.final_hidden, norm, 1e-5)
    # The stream behind layer 2 is the top of a model of two layers.
    two = replace(cfg, num_layers=2, windows=cfg.windows[:2])
    shorter = params(cfg) | {"layers": params(cfg)["layers"][:2]}
    close(out.hidden[2], whole(shorter, two, ids, hidden_layers=(2,)).hidden[2], 1e-5)
    assert whole(params(cfg), cfg, ids).hidden == {}


def test_hidden_layers_over_a_cache_are_the_same():
    ids = tokens(GEMMA, 2, 24)
    run = jax.jit(lambda cache: forward(params(GEMMA), GEMMA, ids, cache, hidden_layers=(0, 2, 3)).hidden)
    with_cache, without = run(init_cache(GEMMA, 2, 128, chunk=24)), whole(params(GEMMA), GEMMA, ids, (0, 2, 3)).hidden
    for layer in (0, 2, 3):
        close(with_cache[layer], without[layer])


SWITCHES = {
    "windows": (GEMMA, {"windows": (None, None, None)}),
    "window width": (GEMMA, {"windows": (9, None, 9)}),
    "rope base": (GEMMA, {"rope": GEMMA.rope_window}),
    "rope base of windows": (GEMMA, {"rope_window": None}),
    "rope divisors": (QWEN, {"rope": replace(QWEN.rope, divisors=None)}),
    "rope attention factor": (QWEN, {"rope": replace(QWEN.rope, attention_factor=1.0)}),
    "attention scale": (GEMMA, {"attn_scale": 0.25}),
    "attention soft cap": (GEMMA, {"attn_softcap": None}),
    "logit soft cap": (GEMMA, {"logit_softcap": None}),
    "embedding scale": (GEMMA, {"embed_scale": 1.0}),
    "norm epsilon": (LLAMA, {"norm_eps": 1e-2}),
    "activation": (GEMMA, {"activation": "silu"}),
    "QK norm": (GEMMA, {"qk_norm": False}),
    "post norms": (GEMMA, {"post_norms": False}),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_does_something(switch):
    """So that agreement elsewhere is agreement about this switch too."""
    cfg, change = SWITCHES[switch]
    ids = tokens(cfg, 2, 24)
    a, b = (whole(params(cfg), c, ids).logits for c in (cfg, replace(cfg, **change)))
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-2


@pytest.mark.parametrize("leaf", [*sorted(param_specs(QWEN)["layers"][0]), "embed", "final_norm", "lm_head"])
def test_every_parameter_does_something(leaf):
    ids, weights = tokens(QWEN, 2, 24), params(QWEN)
    if leaf in weights:
        changed = weights | {leaf: weights[leaf] * 1.5}
    else:
        first, *others = weights["layers"]
        changed = weights | {"layers": [first | {leaf: first[leaf] * 1.5}, *others]}
    assert np.abs(np.asarray(whole(changed, QWEN, ids).logits - whole(weights, QWEN, ids).logits)).max() > 1e-3


@each
def test_the_gradient_is_that_of_finite_differences(cfg):
    ids, lengths = tokens(cfg, 2, 24), np.array([24, 9], np.int32)

    @jax.jit
    def loss(p):
        logits = forward(p, cfg, ids, lengths=lengths).logits[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)[..., 0]
        real = np.arange(23) < (lengths - 1)[:, None]
        return -(chosen * real).sum() / real.sum()

    weights = params(cfg)
    grads = jax.jit(jax.grad(loss))(weights)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        g = np.asarray(g)
        assert np.isfinite(g).all(), path
        # A key's bias adds the same to every logit of a query but for the rotation: small, and not zero.
        assert np.abs(g).max() > 1e-7, path
    rng = np.random.default_rng(0)
    for path in (("embed",), ("final_norm",), *(("layers", 0, n) for n in ("q_proj", "v_proj", "down_proj"))):
        leaf, g = weights, grads
        for key in path:
            leaf, g = leaf[key], g[key]
        direction = rng.standard_normal(leaf.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        step = 1e-2

        def moved(size, path=path, leaf=leaf, direction=direction):
            return loss(_with(weights, path, leaf + size * direction))

        measured = (float(moved(step)) - float(moved(-step))) / (2 * step)
        assert measured == pytest.approx(float((g * direction).sum()), abs=2e-4), path


def _with(tree, path, value):
    if not path:
        return value
    copy = list(tree) if isinstance(tree, list) else dict(tree)
    copy[path[0]] = _with(tree[path[0]], path[1:], value)
    return copy


def test_vmap_over_prompts_and_over_models():
    ids = tokens(LLAMA, 4, 24)
    one_by_one = jax.jit(jax.vmap(lambda x: forward(params(LLAMA), LLAMA, x[None]).logits[0]))(ids)
    close(one_by_one, whole(params(LLAMA), LLAMA, ids).logits)
    pair = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), params(LLAMA))
    two = jax.jit(jax.vmap(lambda p: forward(p, LLAMA, ids).logits))(pair)
    close(two[1], whole(jax.tree.map(lambda x: x * 1.1, params(LLAMA)), LLAMA, ids).logits)


def test_bf16_stays_close_to_f32():
    ids = tokens(GEMMA, 2, 24)
    low = whole(params(GEMMA, "bfloat16"), GEMMA, ids).logits
    assert low.dtype == jnp.float32
    off = np.abs(np.asarray(low - whole(params(GEMMA), GEMMA, ids).logits))
    assert 0 < off.mean() < 0.05


@each
def test_parameters_are_as_declared(cfg):
    specs, made = param_specs(cfg, jnp.bfloat16), init_params(cfg, jax.random.key(0), jnp.bfloat16)
    assert ("lm_head" in specs) == (not cfg.tie_embeddings)
    assert len(specs["layers"]) == cfg.num_layers

    def check(spec, x):
        assert x.shape == spec.shape
        assert x.dtype == spec.dtype
        if spec.init == "normal":
            assert float(x.astype(jnp.float32).std()) == pytest.approx(x.shape[-1] ** -0.5, rel=0.1)
        else:
            assert (x == (1 if spec.init == "ones" else 0)).all()

    jax.tree.map(check, specs, made, is_leaf=is_spec)
    # Norms stay f32 whatever the model is in.
    assert specs["final_norm"].dtype == jnp.float32


def test_bad_calls_are_refused():
    ids, weights = tokens(LLAMA, 2, 24), params(LLAMA)
    with pytest.raises(ValueError, match=r"hidden_layers \(3,\): a model of 2 layers has 0 to 2"):
        forward(weights, LLAMA, ids, hidden_layers=(3,))
    with pytest.raises(ValueError, match="logits 'first' is not one of last, all, none"):
        forward(weights, LLAMA, ids, logits="first")
    with pytest.raises(ValueError, match=r"chunk of 24 .*16.*chunk=24"):
        forward(weights, LLAMA, ids, init_cache(LLAMA, 2, 128, chunk=16))
    with pytest.raises(ValueError, match=r"tokens \(2, 0\) are empty"):
        forward(weights, LLAMA, ids[:, :0])
    with pytest.raises(NotImplementedError, match=r"this one lies heads_first.*layout='folded'.*kernels='xla'"):
        forward(weights, LLAMA, ids, init_cache(LLAMA, 2, 128), kernels="pallas")
