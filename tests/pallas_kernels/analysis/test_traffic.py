"""Counting what a Pallas call moves: against small kernels whose traffic is known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.analysis.scalars import UnknownControl
from pallas_kernels.analysis.traffic import count, dots

BLOCK = 8 * 128 * 4  # bytes of one f32 block of these tests
X = jax.ShapeDtypeStruct((32, 256), jnp.float32)


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def test_a_block_counts_when_its_index_changes():
    def kernel(x, y, o):
        o[...] = x[...] + y[...]

    def fn(x, y):
        return pl.pallas_call(
            kernel,
            out_shape=shape(32, 128),
            grid=(4, 2),
            in_specs=[pl.BlockSpec((8, 128), lambda i, j: (i, j)), pl.BlockSpec((8, 128), lambda i, j: (0, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, 0)),
            cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=13 * BLOCK),
            name="add",
        )(x, y)

    counted = count(fn, X, X)
    (call,) = counted.calls
    assert call.name == "add"
    assert call.grid == (4, 2)
    assert sorted(call.operands.values()) == [1 * BLOCK, 4 * BLOCK, 8 * BLOCK]
    assert counted.bytes == counted.declared_bytes == 13 * BLOCK
    assert counted.flops == 0


def test_blocks_that_come_back_are_fetched_again():
    def kernel(x, o):
        o[...] = x[...]

    def fn(x):
        return pl.pallas_call(
            kernel,
            out_shape=shape(8, 128),
            grid=(6,),
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i % 2, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        )(x)

    assert count(fn, X).bytes == 7 * BLOCK


def test_blocks_are_clipped_to_the_array_and_half_bytes_count_half():
    def kernel(x, o):
        o[...] = x[...].astype(jnp.float32)

    def fn(x):
        return pl.pallas_call(
            kernel,
            out_shape=shape(100, 128),
            grid=(2,),
            in_specs=[pl.BlockSpec((64, 128), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((64, 128), lambda i: (i, 0)),
        )(x)

    assert count(fn, shape(100, 128, dtype=jnp.int4)).bytes == 100 * 128 // 2 + 100 * 128 * 4


def test_index_maps_clamped_by_scalar_prefetch():
    def kernel(lengths, x, o):
        @pl.when(pl.program_id(1) * 8 < lengths[pl.program_id(0)])
        def _():
            o[...] = jnp.dot(x[0], x[0].T)

    def fn(lengths, x):
        def clamped(b, i, lengths):
            return b, jnp.minimum(i, jnp.maximum(lengths[b] - 1, 0) // 8), 0

        return pl.pallas_call(
            kernel,
            out_shape=shape(8, 8),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(4, 4),
                in_specs=[pl.BlockSpec((1, 8, 128), clamped)],
                out_specs=pl.BlockSpec((8, 8), lambda b, i, lengths: (0, 0)),
            ),
        )(lengths * 2, x)

    lengths = np.array([16, 1, 0, 4], np.int32)  # doubled: 4, 1, 0 and 1 blocks; the empty row still fetches its first
    counted = count(fn, lengths, shape(4, 32, 128))
    assert counted.bytes == 7 * BLOCK + 8 * 8 * 4 + 4 * 4
    assert counted.flops == (4 + 1 + 0 + 1) * 2 * 8 * 8 * 128
    with pytest.raises(ValueError, match="not known"):
        count(fn, shape(4, dtype=jnp.int32), shape(4, 32, 128))


def paged(lengths, tables, q, pages):
    """Double-buffered pages of 8 tokens, a loop with dynamic bounds, a counter in scalar memory."""

    def kernel(lengths, tables, q, pages, o, buffer, count, sem):
        row = pl.program_id(0)

        @pl.when(row == 0)
        def _():
            count[0] = 0

        def copy(i, slot):
            return pltpu.make_async_copy(pages.at[tables[row, i]], buffer.at[slot], sem.at[slot])

        n = pl.cdiv(lengths[row], 8)

        @pl.when(n > 0)
        def _():
            copy(0, count[0] % 2).start()

        def body(i, acc):
            slot = (count[0] + i) % 2

            @pl.when(i + 1 < n)
            def _():
                copy(i + 1, 1 - slot).start()

            copy(i, slot).wait()
            return acc + jnp.dot(q[...], buffer[slot].T, precision="highest")

        o[...] = jax.lax.fori_loop(0, n, body, jnp.zeros((8, 8), jnp.float32))
        count[0] = count[0] + n

    return pl.pallas_call(
        kernel,
        out_shape=shape(24, 8),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(3,),
            in_specs=[pl.BlockSpec((8, 128), lambda r, *_: (r, 0)), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec((8, 8), lambda r, *_: (r, 0)),
            scratch_shapes=[
                pltpu.VMEM((2, 8, 128), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
    )(lengths, tables, q, pages)


def test_manual_dmas_in_a_loop_with_dynamic_bounds():
    lengths, tables = np.array([17, 0, 8], np.int32), np.zeros((3, 4), np.int32)
    counted = count(jax.jit(paged), lengths, tables, shape(24, 128), shape(16, 8, 128))
    (call,) = counted.calls
    assert call.operands["args[3]"] == (3 + 0 + 1) * BLOCK
    assert counted.bytes == 4 * BLOCK + 3 * BLOCK + 3 * 8 * 8 * 4 + 15 * 4
    assert counted.flops == 4 * 2 * 8 * 8 * 128
    assert all("HIGHEST" in p for p in call.precisions)
    with pytest.raises(UnknownControl, match="depends on data"):
        count(paged, shape(3, dtype=jnp.int32), tables, shape(24, 128), shape(16, 8, 128))


def test_dmas_of_parts_and_between_two_places_in_hbm():
    def kernel(x, o, sem):
        @pl.loop(0, 3)
        def _(i):
            pltpu.make_async_copy(x.at[pl.ds(i * 8, 8), pl.ds(0, 128)], o.at[pl.ds(0, 8)], sem).start()

    def fn(x):
        return pl.pallas_call(
            kernel,
            out_shape=shape(32, 128),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.SemaphoreType.DMA(())],
        )(x)

    assert count(fn, X).bytes == 3 * 2 * BLOCK


def test_what_depends_on_an_axis_is_run_again_and_the_rest_is_not():
    def kernel(x, o):
        i = pl.program_id(1)

        @pl.when(i < 3)
        def _():
            o[...] = jnp.dot(x[...], x[...].T)

    def fn(x):
        return pl.pallas_call(
            kernel,
            out_shape=shape(8, 8),
            grid=(1000, 4),
            in_specs=[pl.BlockSpec((8, 128), lambda b, i: (0, 0))],
            out_specs=pl.BlockSpec((8, 8), lambda b, i: (0, 0)),
        )(x)

    assert count(fn, X).flops == 3000 * 2 * 8 * 8 * 128


def test_a_scan_over_calls_counts_each_run():
    def kernel(x, o):
        o[...] = x[...]

    def fn(x):
        def step(carry, _):
            return pl.pallas_call(kernel, out_shape=shape(8, 128))(carry), None

        return jax.lax.scan(step, x, None, length=5)[0]

    counted = count(fn, shape(8, 128))
    assert len(counted.calls) == 5
    assert counted.bytes == 10 * BLOCK


def test_gpu_loads_and_stores_count_without_masked_lanes():
    def kernel(lengths, x, o):
        row = pl.program_id(0)
        n = lengths[row]

        def body(i, acc):
            tokens = i * 16 + jnp.arange(16)
            return acc + plgpu.load(x.at[row, tokens], mask=(tokens < n)[:, None] & (jnp.arange(64) >= 0), other=0.0)

        o[row] = jax.lax.fori_loop(0, pl.cdiv(n, 16), body, jnp.zeros((16, 64), jnp.float32)).sum(axis=0)

    def fn(lengths, x):
        return pl.pallas_call(
            kernel, out_shape=shape(3, 64), grid=(3,), compiler_params=plgpu.CompilerParams(num_warps=4)
        )(lengths, x)

    lengths = np.array([5, 0, 33], np.int32)
    counted = count(fn, lengths, shape(3, 64, 64), platform="gpu")
    assert counted.bytes == (5 + 33) * 64 * 4 + 3 * 64 * 4 + 3 * 4


def test_every_dot_of_a_program_is_found():
    jaxpr = jax.make_jaxpr(paged)(
        jnp.zeros(3, jnp.int32), jnp.zeros((3, 4), jnp.int32), jnp.zeros((24, 128)), jnp.zeros((16, 8, 128))
    )
    (dot,) = dots(jaxpr)
    assert "HIGHEST" in str(dot.params["precision"])
