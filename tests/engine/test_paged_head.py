"""A head in the engine's pages: it drafts as if it had read the whole text, and what the pages hold of it is right."""

import dataclasses
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pdx
from pallas_kernels.quant_array import dequantize
from pdx.cache.dense import init_cache
from pdx.cache.paged import init_paged_cache, paged_cache_specs
from pdx.engine import speculative_programs
from pdx.engine.engine import Engine
from pdx.engine.request import EngineRequest
from pdx.engine.sizing import fill_in
from pdx.quant import Kind, quantized
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import SamplingState
from pdx.speculative.eagle import predict
from pdx.speculative.options import Speculation
from pdx.speculative.paged_head import HeadState, PagedEagle, paged_layers, with_float_entries
from pdx.speculative.proposers import NGram
from pdx.speculative.slots import SlotState
from tests.support import heads, tiny_model
from tests.support.models import LLAMA, params
from tests.support.random_requests import same

SMALL = {"slots": 2, "token_budget": 16, "page_size": 8, "max_context": 112, "pages": 40}
TEXT = "the quick brown fox jumps over the lazy dog, "
ALL_WINDOWS = dataclasses.replace(LLAMA, windows=(20, 20))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.with_window(pdx.load(tiny_model.make(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def head(model):
    return heads.make(model)


@pytest.fixture(scope="module")
def engine(model, head):
    with Engine(model, pdx.EngineConfig(**SMALL, speculate=Speculation("eagle", 3, model=head))) as engine:
        yield engine


@pytest.fixture
def steps(engine, monkeypatch):
    """The steps that sample: drafted tokens and how many tokens each emitted, by slot."""
    drafted, counts = [], []
    sample, fetch = engine.runner.sample, engine.runner.fetch

    def sampled(plan, scored, allowed=None):
        if plan.samples.any():
            drafted.append(scored.drafted)
        return sample(plan, scored, allowed)

    def fetched(drawn, **settings):
        got = fetch(drawn, **settings)
        if got.counts.any():
            counts.append(got.counts)
        return got

    monkeypatch.setattr(engine.runner, "sample", sampled)
    monkeypatch.setattr(engine.runner, "fetch", fetched)
    return drafted, counts


@pytest.mark.parametrize("lengths", [(3,), (0, 0, 3, 1, 0, 2)], ids=["each step", "plain steps in between"])
def test_it_drafts_as_if_it_read_the_whole_text(engine, head, steps, lengths, monkeypatch):
    """Behind a prompt in chunks, behind plain steps, behind rejected drafts."""
    wanted, real = cycle(lengths), engine.scheduler.drafting.shares

    def some(*args):
        return [min(n, next(wanted)) for n in real(*args)]

    monkeypatch.setattr(engine.scheduler.drafting, "shares", some)
    engine.scheduler.memory.tree.clear()
    done = engine.generate([TEXT], max_tokens=40, ignore_eos=True)[0]
    same(done, pdx.generate(engine.model, [TEXT], max_tokens=40, ignore_eos=True)[0])
    text, answer, checked = engine.model.tokenizer.encode(TEXT), list(done.token_ids), 0
    for drafted, counts in zip(*steps, strict=True):
        count = int(drafted.lengths[0])
        if count and answer:
            assert np.asarray(drafted.tokens)[0, :count].tolist() == heads.drafts(engine.model, head, text, count)
            checked += count
        text, answer = text + answer[: counts[0]], answer[counts[0] :]
    assert not answer
    assert checked > 20 < done.speculation.rounds
    assert 0 < done.speculation.kept < done.speculation.drafted
    assert engine.metrics().compiles == 0


def test_the_tree_holds_what_the_head_makes_of_known_tokens(engine, head):
    """Key by key and value by value: rejected drafts, and entries made of predictions, leave no trace."""
    memory, model = engine.scheduler.memory, engine.model
    memory.tree.clear()
    prompts = [TEXT, "12 12 12 12 12 12", "a"]
    assert sum(c.timing.hit_tokens for c in engine.generate(prompts, max_tokens=40, ignore_eos=True)) == 0
    layer, group, checked = engine.runner.cache.layers[-1], engine.runner.cache.group_of_layer[-1], 0
    assert len(engine.runner.cache.layers) == model.config.num_layers + 1
    for node in memory.tree.nodes():
        path = [node]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        ids = [t for n in reversed(path) for t in n.key]
        dense = init_cache(head.config, 1, heads.LONGEST, chunk=heads.LONGEST, layout="heads_first")
        rows = dense.rows(jnp.array([len(ids)]), 1, heads.LONGEST)
        _, dense = predict(head.params, head.config, *heads.entries(model, ids), rows, dense)
        begin = len(ids) - len(node.key)
        for paged, whole in ((layer.k, dense.layers[0].k), (layer.v, dense.layers[0].v)):
            got = np.asarray(paged)[node.pages[group]][:, : len(node.key)]
            np.testing.assert_allclose(got, np.asarray(whole)[0][:, begin : len(ids)], atol=1e-4)
        checked += 1
    assert checked > 12


def test_behind_a_shared_prefix_requests_draft_on(engine):
    """They lack one hidden state. That costs drafts at most."""
    first = engine.generate([TEXT], max_tokens=20, ignore_eos=True)[0]
    again = engine.generate([TEXT + first.text, TEXT], max_tokens=20, ignore_eos=True)
    assert all(c.timing.hit_tokens > 0 < c.speculation.drafted for c in again)
    for got, text in zip(again, (TEXT + first.text, TEXT), strict=True):
        same(got, pdx.generate(engine.model, [text], max_tokens=20, ignore_eos=True)[0])


def flops(cfg, proposer, held, own, most, tokens=4):
    """Of a step of `tokens` rows over pages that hold the layers of `held`."""
    cache = init_paged_cache(held, 4, page_size=8)
    slots = SlotState.empty(tokens, 32, NGram(), most).replace(proposer=own)
    host = np.zeros(4 * tokens + 3 * tokens + len(cache.groups) * tokens * 4 - tokens, np.int32)
    shape = tokens, tokens, len(cache.groups)
    lowered = speculative_programs.score_step.lower(
        params(cfg),
        cache,
        slots,
        SamplingState.create([], cfg.vocab_size, batch=tokens),
        host,
        None if own is None else heads_of(cfg),
        speculative_programs.StepForm(cfg, shape, tokens, most, proposer, as_plain=False, mesh=None, kernels="xla"),
    )
    return lowered.compile().cost_analysis()["flops"]


def heads_of(cfg):
    return heads.make(dataclasses.replace(MODEL, config=cfg, params=params(cfg))).params


MODEL = pdx.Model({}, LLAMA, "tiny", heads.Path("tiny"), jnp.float32)


def test_a_plain_step_makes_the_heads_entries_and_no_more():
    """Not its attention, output projection or MLP: the projection of both inputs, keys and values."""
    cfg, rows = LLAMA, 4
    without = flops(cfg, NGram(), cfg, None, 0)
    own = HeadState.create(rows, cfg.d_model, jnp.float32, None)
    with_head = flops(cfg, PagedEagle(dataclasses.replace(cfg, num_layers=1, windows=(None,))), layers(cfg), own, 0)
    d, kv = cfg.d_model, cfg.num_kv_heads * cfg.head_dim
    products = 2 * rows * (2 * d * d + 2 * d * kv)
    whole_layer = 2 * rows * (2 * d * d + 2 * d * kv + 2 * d * d + 3 * d * cfg.d_ff)
    assert 0.9 * products < with_head - without < 1.5 * products < whole_layer


def test_on_a_cpu_what_every_step_multiplies_is_float(head):
    """And it is the same, but for rounding; what only drafts need stays as it is stored."""
    params = head.params | {"fc": quantized(head.params["fc"], Kind(8), "float32")}
    params["lm_head"] = quantized(params["lm_head"], Kind(8), "float32")
    made = with_float_entries(params)
    np.testing.assert_allclose(made["fc"], dequantize(params["fc"]))
    assert made["lm_head"] is params["lm_head"]
    assert jax.tree.structure(made["layers"]) == jax.tree.structure(head.params["layers"])


def layers(cfg):
    return paged_layers(cfg, Speculation("eagle"))


def test_its_layer_belongs_to_the_group_that_sees_everything():
    mixed = dataclasses.replace(LLAMA, windows=(20, None))
    assert init_paged_cache(layers(mixed), (3, 4), page_size=8).group_of_layer == (0, 1, 1)
    assert init_paged_cache(layers(ALL_WINDOWS), (3, 4), page_size=8).groups == (20, None)
    assert paged_layers(LLAMA, None) is LLAMA is paged_layers(LLAMA, Speculation("draft"))


def test_the_memory_plan_counts_its_layer(model, head, monkeypatch):
    monkeypatch.setattr("pdx.engine.sizing.free_bytes", lambda model: 4e5)
    config = pdx.EngineConfig(slots=8, token_budget=32, page_size=8, memory_share=1.0)

    def planned(**settings):
        filled = fill_in(dataclasses.replace(config, **settings), model, jnp.float32, head if settings else None)
        held = paged_layers(model.config, filled.speculate)
        size = paged_cache_specs(held, filled.pages, page_size=8).page_bytes
        return filled.pages, sum(n * b for n, b in zip(filled.pages, size, strict=True))

    (plain, _), (pages, held) = planned(), planned(speculate=Speculation("eagle", model=head))
    assert pages[0] < plain[0]
    assert held <= 4e5


@pytest.mark.slow
def test_a_draft_model_reads_a_prompt_before_the_first_token(model, tmp_path):
    draft = pdx.load(tiny_model.make(tmp_path, seed=1))
    ids = tuple(model.tokenizer.encode(TEXT * 2))
    with Engine(model, pdx.EngineConfig(**SMALL, speculate=Speculation("draft", 2, model=draft))) as engine:
        for speculate in (False, True):
            done = engine.submit(EngineRequest(ids, SamplingOptions(max_tokens=1), speculate=speculate)).result(60)
            assert len(done.token_ids) == 1
            read = int(engine.runner.slots.proposer.lengths.max())
            assert read == (len(ids) - 2 if speculate else 0)
        assert engine.metrics().compiles == 0


@pytest.mark.slow
def test_a_target_that_only_has_windows(model, head):
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, windows=(20, 20)))
    head = dataclasses.replace(head, config=heads.head_config(model.config))
    texts = [TEXT, TEXT + "and", "1 2 3 4 5 6"]
    with Engine(model, pdx.EngineConfig(**SMALL, speculate=Speculation("eagle", 3, model=head))) as engine:
        assert engine.runner.cache.groups == (20, None)
        got = engine.generate(texts, max_tokens=40, ignore_eos=True)
        assert engine.metrics().speculation.drafted > 0 == engine.metrics().compiles
    for done, want in zip(got, pdx.generate(model, texts, max_tokens=40, ignore_eos=True), strict=True):
        same(done, want)


@pytest.mark.slow
def test_a_hidden_state_that_is_not_finite_harms_no_later_request(engine):
    state = engine.runner.slots.proposer
    bad = state.replace(hidden=jnp.full_like(state.hidden, jnp.nan))
    engine.runner.slots = engine.runner.slots.replace(proposer=jax.device_put(bad))
    same(
        engine.generate(["x y z"], max_tokens=12, ignore_eos=True)[0],
        pdx.generate(engine.model, ["x y z"], max_tokens=12, ignore_eos=True)[0],
    )
