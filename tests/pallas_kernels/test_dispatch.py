"""Who runs: auto says which path and why, a named implementation never falls back, bad arguments are named."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import decode_attention, dispatch, flash_attention, hardware
from pallas_kernels.decode_attention.api import explain as explain_decode
from pallas_kernels.flash_attention.api import explain as explain_flash

OPS = {"flash_attention": flash_attention, "decode_attention": decode_attention}
EXPLAIN = {"flash_attention": explain_flash, "decode_attention": explain_decode}


def arguments(**changes) -> dict:
    k = jnp.zeros((2, 2, 128, 8))
    return {
        "q": jnp.zeros((2, 1, 4, 8)),
        "k": k,
        "v": k,
        "starts": jnp.zeros((2,), jnp.int32),
        "lengths": jnp.ones((2,), jnp.int32),
        "scale": 1.0,
    } | changes


def shape(op, given: dict, **settings) -> tuple[int, ...]:
    """Of the result, without running it: what is chosen and checked is settled while tracing."""
    arrays = {name: x for name, x in given.items() if name != "scale"}
    return jax.eval_shape(lambda x: op(**x, scale=1.0, **settings), arrays).shape


@pytest.mark.parametrize("op", OPS)
def test_auto_and_xla_run_on_the_cpu(op):
    for name in ("auto", "xla"):
        assert shape(OPS[op], arguments(), implementation=name) == (2, 1, 4, 8)
    choice = EXPLAIN[op]("auto")
    assert (choice.op, choice.implementation) == (op, "xla")
    assert "cpu" in choice.reason
    assert str(choice).startswith(f"{op}: xla (")
    assert "caller" in EXPLAIN[op]("xla").reason


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_name_is_an_error_that_lists_the_known(op):
    for call in (lambda: OPS[op](**arguments(), implementation="cuda"), lambda: EXPLAIN[op]("cuda")):
        with pytest.raises(ValueError, match="'cuda' is not one of auto, xla, tpu, gpu"):
            call()


def test_choose_takes_the_kernel_of_the_device_where_there_is_one():
    module = SimpleNamespace(supported=lambda call: call)
    have = {"xla": module, "gpu": module}
    assert dispatch.choose("op", "auto", have, platform="gpu").implementation == "gpu"
    assert dispatch.choose("op", "auto", have, platform="cuda").implementation == "gpu"
    assert dispatch.choose("op", "auto", have, platform="tpu").implementation == "xla"
    assert "no Pallas kernel of op for tpu" in dispatch.choose("op", "auto", have, platform="tpu").reason
    assert dispatch.choose("op", "gpu", have, platform="cpu").implementation == "gpu"
    with pytest.raises(NotImplementedError, match="it has xla, gpu"):
        dispatch.choose("op", "tpu", have)


def test_a_call_that_a_kernel_cannot_do():
    """The stand-in for a call is the reason that its module gives."""
    have = {"xla": SimpleNamespace(supported=lambda call: None), "gpu": SimpleNamespace(supported=lambda call: call)}
    choice = dispatch.choose("op", "auto", have, "heads of 7", platform="gpu")
    assert (choice.implementation, choice.reason) == ("xla", "heads of 7")
    with pytest.raises(NotImplementedError, match="op has no gpu implementation for this call: heads of 7; use"):
        dispatch.choose("op", "gpu", have, "heads of 7")


def test_a_kernel_for_another_platform_says_so():
    with pytest.raises(NotImplementedError, match=r"flash_attention: the tpu .*named by the caller.* traced for cpu"):
        shape(
            flash_attention,
            arguments(k=jnp.zeros((2, 128, 128)), v=jnp.zeros((2, 128, 128))),
            layout="folded",
            kv_heads=2,
            implementation="tpu",
        )


@pytest.mark.parametrize(
    ("device", "runs"),
    [
        (SimpleNamespace(platform="gpu", device_kind="Tesla T4"), "xla"),
        (SimpleNamespace(platform="gpu", device_kind="a card of tomorrow", compute_capability="7.0"), "xla"),
        (SimpleNamespace(platform="gpu", device_kind="a card of tomorrow", compute_capability="12.0"), "gpu"),
        (SimpleNamespace(platform="gpu", device_kind="a card of another make", compute_capability="gfx90a"), "gpu"),
        (SimpleNamespace(platform="gpu", device_kind="NVIDIA L4"), "gpu"),
    ],
)
def test_a_gpu_older_than_pallas_gets_xla(device, runs, monkeypatch):
    monkeypatch.setattr(hardware, "_default_device", lambda: device)
    choice = explain_flash("auto")
    assert choice.implementation == runs
    assert ("compute capability 8.0 or newer" in choice.reason) == (runs == "xla")
    call = {"layout": "heads_last", "implementation": "gpu"}
    if runs == "xla":
        with pytest.raises(NotImplementedError, match="cannot run here: Pallas needs a GPU of compute capability"):
            shape(flash_attention, arguments(k=jnp.zeros((2, 128, 2, 8)), v=jnp.zeros((2, 128, 2, 8))), **call)


def test_a_helper_follows_what_auto_means_only_where_that_exists():
    have = {"xla": SimpleNamespace(supported=lambda call: None), "tpu": SimpleNamespace(supported=lambda call: call)}
    with dispatch.use("gpu"):
        assert dispatch.choose("op", "auto", have, platform="tpu", helper=True).implementation == "tpu"
        with pytest.raises(NotImplementedError, match="it has xla, tpu"):
            dispatch.choose("op", "auto", have, platform="tpu")
    with dispatch.use("tpu"):
        assert dispatch.choose("op", "auto", have, "floats", platform="tpu", helper=True).implementation == "xla"
        assert dispatch.choose("op", "auto", have, platform="cpu", helper=True).implementation == "tpu"
    with pytest.raises(NotImplementedError, match="it has xla, tpu"):
        dispatch.choose("op", "gpu", have, helper=True)


def test_what_auto_means_can_be_set(monkeypatch):
    have = {name: SimpleNamespace(supported=lambda call: None) for name in ("xla", "gpu", "tpu")}

    def chosen(name="auto"):
        return dispatch.choose("op", name, have, platform="tpu").implementation

    assert chosen() == "tpu"
    monkeypatch.setenv("PDX_KERNELS", "gpu")
    assert (chosen(), chosen("tpu")) == ("gpu", "tpu")
    with dispatch.use("xla"):
        assert (chosen(), chosen("tpu")) == ("xla", "tpu")
    assert chosen() == "gpu"
    monkeypatch.setenv("PDX_KERNELS", "cuda")
    with pytest.raises(ValueError, match="PDX_KERNELS 'cuda' is not one of"):
        chosen()


def test_decode_takes_a_draft_but_not_a_prompt():
    for queries in (16, 17):
        changed = arguments(q=jnp.zeros((2, queries, 4, 8)))
        if queries == 16:
            assert shape(decode_attention, changed) == (2, 16, 4, 8)
        else:
            with pytest.raises(ValueError, match="1 to 16 queries a row, got 17: use flash_attention"):
                decode_attention(**changed)
