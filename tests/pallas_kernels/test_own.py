"""Implementations that nobody here made: functions, objects and modules in an op's place, and files that are found."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    decode_attention,
    flash_attention,
    implementation,
    paged_attention,
    quantized_matmul,
    write_pages,
)
from pallas_kernels.analysis import problems
from pallas_kernels.decode_attention.api import OP
from pallas_kernels.flash_attention import reference
from pallas_kernels.quant_array import dequantize, quantize
from tests.pallas_kernels.test_dispatch import arguments


def plain(q, k, v, *, starts, lengths, scale):
    """Attention of one query a row, as a researcher writes it first."""
    group = q.shape[2] // k.shape[1]
    logits = jnp.einsum("btkgh,bksh->bkgts", q.reshape(*q.shape[:2], k.shape[1], group, -1), k) * scale
    seen = jnp.arange(k.shape[2]) < lengths[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None, None], logits, -1e30))
    return jnp.einsum("bkgts,bksh->btkgh", weights, v).reshape(q.shape)


def numbers(**changes):
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = (jax.random.normal(key, (2, 2, 128, 8)) for key in keys[1:])
    q = jax.random.normal(keys[0], (2, 1, 4, 8))
    starts, lengths = jnp.array([9, 100]), jnp.array([10, 101])
    return {"q": q, "k": k, "v": v, "starts": starts, "lengths": lengths, "scale": 0.3} | changes


def test_a_function_of_the_arguments_it_knows():
    found = decode_attention(**numbers(), implementation=plain)
    np.testing.assert_allclose(found, decode_attention(**numbers(), implementation="xla"), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": 5}, "plain takes no window, which"),
        ({"softcap": 2.0, "return_lse": True}, "takes no softcap and no return_lse"),
        ({"sinks": jnp.zeros(4)}, "no sinks"),
        ({"tree": jnp.ones((2, 1, 1), bool)}, "no tree"),
        ({"layout": "heads_last", "k": jnp.zeros((2, 128, 2, 8)), "v": jnp.zeros((2, 128, 2, 8))}, "layout 'heads_f"),
        ({"causal": False}, "no causal"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_call_that_needs_an_argument_more_is_refused_with_its_name(changes, says):
    with pytest.raises(NotImplementedError, match=says):
        decode_attention(**numbers(**changes), implementation=plain)


def test_int8_needs_the_scales_and_folded_heads_their_number():
    k = jnp.zeros((2, 2, 128, 8), jnp.int8)
    scales = dict.fromkeys(("k_scale", "v_scale"), jnp.ones((2, 8, 128)))
    with pytest.raises(NotImplementedError, match="no k_scale and no v_scale"):
        decode_attention(**numbers(k=k, v=k) | scales, implementation=plain)

    def folded(q, k, v, starts, lengths, scale):
        return q

    folded.LAYOUTS = ("folded",)
    lanes = jnp.zeros((2, 128, 128))
    with pytest.raises(NotImplementedError, match="no kv_heads and no value_dim"):
        decode_attention(**numbers(k=lanes, v=lanes, layout="folded", kv_heads=2), implementation=folded)


def test_what_is_given_is_what_the_call_has():
    seen = {}

    def mine(q, k, v, **rest):
        seen.update(rest)
        return q

    decode_attention(**numbers(window=7), implementation=mine, interpret=True)
    assert (seen["window"], seen["causal"], seen["softcap"], seen["sinks"], seen["tree"]) == (7, True, None, None, None)
    assert (seen["scale"], seen["interpret"], seen["layout"], seen["kv_heads"]) == (0.3, True, "heads_first", 2)
    sinks = jnp.ones(4)
    decode_attention(**numbers(sinks=sinks, lengths=None), implementation=mine)
    np.testing.assert_array_equal(seen["sinks"], sinks)
    assert seen["lengths"] is None


def test_an_object_with_run_is_given_the_call():
    seen = {}

    def run(arrays, call, config, interpret):
        seen.update(call=call, config=config, names=set(arrays))
        return reference.attention(*(arrays[x] for x in "qkv"), starts=arrays["starts"], lengths=None, scale=call.scale)

    mine = SimpleNamespace(NAME="mine", run=run, supported=lambda call: "no windows" if call.window else None)
    decode_attention(**numbers(lengths=None), implementation=mine)
    assert (seen["call"].heads, seen["call"].scale, seen["config"]) == (4, 0.3, None)
    assert seen["names"] == {"q", "k", "v", "starts"}
    with pytest.raises(NotImplementedError, match="decode_attention: mine cannot do this call: no windows"):
        decode_attention(**numbers(window=5), implementation=mine)
    assert str(OP.explain(mine)) == "decode_attention: mine (given by the caller)"


def test_it_may_have_tiles():
    made = []
    mine = SimpleNamespace(
        Config=int,
        heuristic=lambda call, chip: 128,
        misfit=lambda call, config: "too large" if config > call.slots else None,
        run=lambda arrays, call, config, interpret: made.append(config) or arrays["q"],
    )
    decode_attention(**numbers(), implementation=mine)
    decode_attention(**numbers(), implementation=mine, config=64)
    assert made == [128, 64]
    with pytest.raises(ValueError, match="512 does not fit: too large"):
        decode_attention(**numbers(), implementation=mine, config=512)


def test_a_kernel_for_a_platform_that_is_not_here_is_refused_unless_interpreted():
    mine = SimpleNamespace(NAME="mine", PLATFORM=("tpu", "gpu"), run=lambda arrays, *rest: arrays["q"])
    with pytest.raises(NotImplementedError, match=r"mine implementation .* a kernel for tpu or gpu, .* traced for cpu"):
        decode_attention(**numbers(), implementation=mine)
    assert decode_attention(**numbers(), implementation=mine, interpret=True).shape == (2, 1, 4, 8)


def test_what_is_no_implementation_is_named():
    with pytest.raises(ValueError, match=r"flash_attention: implementation 7 is neither one of auto, .*nor a function"):
        flash_attention(**arguments(), implementation=7)


def test_every_op_takes_them():
    q, pages = jnp.ones((3, 4, 8)), jnp.ones((4, 2, 16, 8))
    tables, lengths, starts = jnp.zeros((1, 2), jnp.int32), jnp.array([9]), jnp.array([0, 3])
    found = paged_attention(
        q,
        pages,
        pages,
        block_tables=tables,
        lengths=lengths,
        query_starts=starts,
        scale=1.0,
        layout="heads_first",
        implementation=lambda q, k, v, block_tables, lengths, query_starts, scale, layout: q + scale,
    )
    np.testing.assert_array_equal(found, q + 1)
    k_pages, v_pages = write_pages(
        pages,
        pages,
        jnp.zeros((3, 2, 8)),
        jnp.zeros((3, 2, 8)),
        slots=jnp.arange(3),
        layout="heads_first",
        implementation=lambda k_pages, v_pages, k, v, slots, layout: (k_pages.at[0, :, slots].set(0), v_pages),
    )
    assert not k_pages[0, :, :3].any()
    assert v_pages.all()
    w = quantize(jnp.ones((16, 32)), 8, activations="int8")
    x = jnp.full((3, 5, 32), 0.3)

    def product(x, w, out_dtype):
        return (x @ dequantize(w).T).astype(out_dtype)

    summed = x.sum(-1, keepdims=True) + jnp.zeros(16)
    np.testing.assert_allclose(quantized_matmul(x, w, implementation=product), summed, rtol=1e-5)
    mine = SimpleNamespace(run=lambda arrays, call, *_: jnp.full((call.rows, call.out), 2.0, call.out_dtype))
    assert (quantized_matmul(jnp.ones((3, 5, 32)), w, implementation=mine) == 2).all()


def test_a_file_that_declares_a_name_is_found(tmp_path, monkeypatch):
    package = tmp_path / "some_op"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "tpu_kernel": "X = 1\n",
        "later": 'NAME = "mosaic_gpu"\nPLATFORM = ("tpu", "gpu")\n',
        "gpu": 'NAME = "gpu"\nPLATFORM = "gpu"\ndef supported(call): return call\n',
        "xla": 'NAME = "xla"\n',
    }.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = implementation.InFolder("some_op")
    assert list(found) == ["xla", "gpu", "mosaic_gpu"]
    assert [found.platforms(name) for name in found] == [("any",), ("gpu",), ("tpu", "gpu")]
    from pallas_kernels.dispatch import choose

    assert choose("some_op", "auto", found, platform="gpu").implementation == "gpu"
    # The platform's own refuses: the next one takes the call.
    assert choose("some_op", "auto", found, "no such heads", platform="gpu").implementation == "mosaic_gpu"
    assert choose("some_op", "auto", found, platform="tpu").implementation == "mosaic_gpu"
    assert "cpu" in choose("some_op", "auto", found, platform="cpu").reason


def test_what_a_command_was_told_is_a_name_or_a_reference(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text("def run(arrays, call, config, interpret): return arrays['q']\n")
    monkeypatch.syspath_prepend(tmp_path)
    op = "decode_attention"
    assert problems.named(op, "gpu", None) == "gpu"
    assert problems.named(op, "gpu", "xla") == "xla"
    assert problems.named(op, "gpu", "my_module").__name__ == "my_module"
    assert problems.named(op, "gpu", "tests.pallas_kernels.test_own:plain") is plain
    with pytest.raises(ValueError, match="has no implementation 'nosuch'; it has xla, tpu, gpu"):
        problems.named(op, "gpu", "nosuch")


@pytest.mark.parametrize("reference", ["tests.pallas_kernels.test_own:plain", "pallas_kernels.decode_attention.xla"])
def test_another_process_can_load_it(reference):
    found = implementation.load(reference)
    assert implementation.reference_of(found) == reference


def test_what_cannot_be_loaded_is_named():
    assert implementation.reference_of(lambda: None) is None
    for wrong, says in (("tests.none:x", "No module named"), ("tests.pallas_kernels.test_own:no", "has no 'no'")):
        with pytest.raises(ValueError, match=says):
            implementation.load(wrong)
