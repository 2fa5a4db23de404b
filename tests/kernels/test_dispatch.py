"""Who runs: auto says which path and why, a named implementation never falls back, bad arguments are named."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import decode_attention, dispatch, flash_attention
from pallas_kernels.decode_attention.api import explain as explain_decode
from pallas_kernels.flash_attention.api import explain as explain_flash

OPS = {"flash_attention": flash_attention, "decode_attention": decode_attention}
EXPLAIN = {"flash_attention": explain_flash, "decode_attention": explain_decode}


def arguments(**changes) -> dict:
    k = jnp.zeros((2, 2, 128, 8))
    return {
        "q": jnp.zeros((2, 1, 4, 8)), "k": k, "v": k, "query_positions": jnp.zeros((2, 1), jnp.int32),
        "lengths": jnp.ones((2,), jnp.int32), "scale": 1.0,
    } | changes  # fmt: skip


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


def missing() -> list[tuple[str, str]]:
    have = {"flash_attention": flash_attention, "decode_attention": decode_attention}
    modules = {op: __import__(f"pallas_kernels.{op}.api", fromlist=["IMPLEMENTATIONS"]) for op in have}
    return [(op, name) for op in have for name in ("tpu", "gpu") if name not in modules[op].IMPLEMENTATIONS]


@pytest.mark.parametrize(("op", "name"), missing())
def test_a_named_implementation_that_is_missing_never_falls_back(op, name):
    for call in (lambda: OPS[op](**arguments(), implementation=name), lambda: EXPLAIN[op](name)):
        with pytest.raises(NotImplementedError, match=rf"{op} has no {name} implementation.*use implementation='xla'"):
            call()


def test_choose_takes_the_kernel_of_the_device_where_there_is_one():
    have = {"xla": 0, "gpu": 1}
    assert dispatch.choose("op", "auto", have, "gpu").implementation == "gpu"
    assert dispatch.choose("op", "auto", have, "cuda").implementation == "gpu"
    assert dispatch.choose("op", "auto", have, "tpu").implementation == "xla"
    assert "no Pallas kernel of op for tpu" in dispatch.choose("op", "auto", have, "tpu").reason
    assert dispatch.choose("op", "gpu", have, "cpu").implementation == "gpu"
    with pytest.raises(NotImplementedError, match="it has xla, gpu"):
        dispatch.choose("op", "tpu", have, "tpu")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"q": jnp.zeros((2, 4, 8))}, r"q must be \[B, T, N, H\]"),
        ({"k": jnp.zeros((3, 2, 128, 8))}, r"k \(3, 2, 128, 8\) does not fit"),
        ({"k": jnp.zeros((2, 3, 128, 8))}, "N a multiple of K"),
        ({"k": jnp.zeros((2, 2, 128, 16))}, "does not fit"),
        ({"v": jnp.zeros((2, 2, 64, 8))}, "must have the shape of k"),
        ({"query_positions": jnp.zeros((2, 3), jnp.int32)}, r"query_positions must be \[B, T\] = \(2, 1\)"),
        ({"lengths": jnp.zeros((3,), jnp.int32)}, r"lengths must be \[B\] = \(2,\)"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"softcap": 0.0}, "softcap must be positive"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(op, changes, says):
    with pytest.raises(ValueError, match=f"{op}: .*{says}"):
        OPS[op](**arguments(**changes))


def test_decode_takes_a_draft_but_not_a_prompt():
    for queries in (16, 17):
        changed = arguments(q=jnp.zeros((2, queries, 4, 8)), query_positions=jnp.zeros((2, queries), jnp.int32))
        if queries == 16:
            assert shape(decode_attention, changed) == (2, 16, 4, 8)
        else:
            with pytest.raises(ValueError, match="1 to 16 queries a row, got 17: use flash_attention"):
                decode_attention(**changed)
