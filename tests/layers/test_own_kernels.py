"""Steps with attention kernels that nobody here made: that of docs/compare.md, and what cannot be one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pdx
from pallas_kernels import decode_attention
from pallas_kernels.attention.cases import Case
from pdx.errors import RequestError
from pdx.layers import kernels
from tests.support import own_kernel, tiny_model
from tests.support.attention_problems import make
from tests.support.models import LLAMA


@pytest.fixture
def decode(monkeypatch, tmp_path):
    return own_kernel.module(monkeypatch, tmp_path).decode


def test_the_documents_kernel_is_right_and_a_wrong_one_is_not(decode):
    case = Case("ragged", (9, 255, 0, 130), (1, 1, 0, 1), 1, 256, kv_heads=2, group=3, head_dim=64)
    problem = make(case)
    settings = {"implementation": decode, "interpret": True}
    problem.check(problem.run(decode_attention, **settings))
    with pytest.raises(AssertionError):
        problem.check(problem.run(decode_attention, k=-problem.arrays["k"], **settings))
    assert len(own_kernel.text().splitlines()) < 60


def test_it_says_what_it_cannot_do(decode):
    problem = make(Case("a draft", (9,), (3,), 3, 256))
    with pytest.raises(NotImplementedError, match="one query a row"):
        problem.run(decode_attention, implementation=decode, interpret=True)


def steps(kernels_, layout=None):
    """Logits of a prompt of 20 tokens, and of two decode steps behind it."""
    params = pdx.init_params(LLAMA, jax.random.key(0))
    cache = pdx.init_cache(LLAMA, 2, 128, layout=layout or kernels.layout_for(kernels_))
    tokens = np.arange(40).reshape(2, 20) % LLAMA.vocab_size
    logits, cache = pdx.prefill(params, LLAMA, tokens, np.array([20, 7]), cache, kernels=kernels_)
    found = [logits]
    for _ in range(2):
        logits, cache = pdx.decode_step(params, LLAMA, logits.argmax(-1), np.ones(2, bool), cache, kernels=kernels_)
        found.append(logits)
    return np.asarray(jnp.stack(found))


def test_it_runs_in_the_ops_place_in_whole_steps(decode):
    own = {"decode_attention": decode}
    np.testing.assert_allclose(steps(own), steps("xla"), atol=2e-4)
    assert kernels.layout_for(own) == "heads_first"
    said = kernels.explain(own)
    assert "decode_attention: decode (given by the caller), interpreted on the CPU" in said["decode"]
    assert "flash_attention: xla" in said["prefill"]

    def zeros(q, k, v, starts, lengths, scale):
        return jnp.zeros_like(q)

    assert np.abs(steps({"decode_attention": zeros}) - steps("xla"))[1:].max() > 1e-2


def test_nothing_is_compiled_twice_for_it(decode):
    own = {"decode_attention": decode}
    steps(own)
    before = pdx.steps.dense._decode_step._cache_size()
    steps(dict(own))
    assert pdx.steps.dense._decode_step._cache_size() == before


def test_generate_takes_it(decode, tmp_path):
    model = pdx.load(tiny_model.make(tmp_path / "tiny"))
    own, plain = (pdx.generate(model, "hello", max_tokens=4, kernels=k) for k in ({"decode_attention": decode}, "xla"))
    assert own[0].token_ids == plain[0].token_ids


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"attention": lambda q: q}, "the op 'attention': a step's own kernels are for flash_attention, decode_att"),
        ({"decode_attention": 3}, "implementation 3 is neither one of"),
        ({"decode_attention": "cuda"}, "'cuda' is not one of auto, xla"),
        ("cuda", "kernels 'cuda' is not one of auto, xla, pallas, nor a dict"),
    ],
)
def test_what_cannot_be_a_steps_kernels_is_named(wrong, says):
    with pytest.raises(RequestError, match=says):
        steps(wrong, layout="heads_first")


def test_kernels_that_read_no_layout_in_common_are_refused():
    with pytest.raises(RequestError, match=r"no layout in common: decode_attention reads heads_last; flash_.* folded"):
        kernels.layout_for({"flash_attention": "tpu", "decode_attention": "gpu"})
    assert kernels.layout_for({"flash_attention": "tpu"}) == "folded"
