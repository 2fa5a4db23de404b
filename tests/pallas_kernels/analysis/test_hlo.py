"""Reading compiled programs: copies are found and prefetches are not, aliases, collectives, precision, cycles."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.analysis import hlo

# Shortened from what libtpu 0.0.50 compiled for v5e: a kernel over an array whose last axis is no multiple of 128,
# a pad, a dot, a prefetched weight, and an update in place.
TEXT = """HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {2, 1}: (3, {}, must-alias) }, x={}

%fused_computation.1 (param_0: bf16[192,512], param_1: f32[256,192]) -> f32[256,512] {
  %param_0 = bf16[192,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1 = f32[256,192]{1,0:T(8,128)} parameter(1)
  %convert.1 = f32[192,512]{1,0:T(8,128)} convert(%param_0)
  ROOT %convolution.1 = f32[256,512]{1,0:T(8,128)} convolution(%param_1, %convert.1), dim_labels=bf_io->bf, operand_precision={highest,highest}
}

%fused_copy (p: bf16[8,4096,256]) -> bf16[4096,8,256] {
  %p = bf16[8,4096,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %transpose.3 = bf16[4096,8,256]{2,1,0:T(8,128)(2,1)} transpose(%p), dimensions={1,0,2}
  ROOT %bitcast.2 = bf16[4096,8,256]{2,1,0:T(8,128)(2,1)} bitcast(%transpose.3)
}

ENTRY %main.2 (x: bf16[8,4096,192], w: bf16[192,512]) -> (bf16[8,4096,192], f32[256,512]) {
  %w = bf16[192,512]{1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="w"}
  %copy-start = (bf16[192,512]{1,0:T(8,128)(2,1)S(1)}, bf16[192,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w), cross_program_prefetch_index=0
  %x = bf16[8,4096,192]{1,2,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %copy.x = bf16[8,4096,192]{2,1,0:T(8,128)(2,1)S(1)} copy(%x), metadata={op_name="x"}, backend_config={"window_config":{"estimated_cycles":"94556"},"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"2752512"}]}
  %constant = bf16[]{:T(256)} constant(0)
  %pad.0 = bf16[8,4096,256]{2,1,0:T(8,128)(2,1)} pad(%copy.x, %constant), padding=0_0x0_0x0_64, metadata={op_name="jit(f)/pad"}
  %copy_fusion = bf16[4096,8,256]{2,1,0:T(8,128)(2,1)} fusion(%pad.0), kind=kLoop, calls=%fused_copy
  %f.1 = (f32[256,192]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) custom-call(%copy.x), custom_call_target="tpu_custom_call", backend_config={"window_config":{"estimated_cycles":"474"},"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"},{"memory_space":"6","offset":"0","size":"99999999"}]}
  %copy-done = bf16[192,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %get-tuple-element = f32[256,192]{1,0:T(8,128)S(1)} get-tuple-element(%f.1), index=0
  %fusion = f32[256,512]{1,0:T(8,128)} fusion(%copy-done, %get-tuple-element), kind=kOutput, calls=%fused_computation.1
  %all-gather-start.1 = (bf16[128,1024]{1,0}, bf16[1024,1024]{1,0}) all-gather-start(%w), channel_id=1, dimensions={0}
  %all-gather.7 = bf16[1024,1024]{1,0} all-gather(%w), channel_id=1, dimensions={0}
  %all-reduce = (f32[256,512]{1,0}, f32[4]{0}) all-reduce(%fusion), channel_id=3, to_apply=%add.clone
  ROOT %tuple = (bf16[8,4096,192]{1,2,0:T(8,128)(2,1)}, f32[256,512]{1,0:T(8,128)}) tuple(%x, %fusion)
}
"""  # noqa: E501


def test_copies_pads_and_transposes_of_large_buffers_are_found():
    found = hlo.moved(TEXT, at_least=1_000_000)
    assert [i.name for i in found] == ["copy.x", "pad.0", "copy_fusion"]
    module = hlo.Module(TEXT)
    assert [module.acts_as(i) for i in found] == ["copy", "pad", "transpose"]
    assert {module.source(i).name for i in found} == {"x"}
    assert "copy, 12.6 MB, x" in str(found[0])
    assert hlo.moved(TEXT, at_least=20_000_000) == []


def test_a_prefetch_that_keeps_the_layout_is_no_copy():
    assert [i.name for i in hlo.moved(TEXT, at_least=100)] == ["copy.x", "pad.0", "copy_fusion"]
    elsewhere = TEXT.replace("(bf16[192,512]{1,0:T(8,128)(2,1)S(1)}", "(bf16[192,512]{0,1:T(8,128)(2,1)S(1)}")
    assert "copy-start" in [i.name for i in hlo.moved(elsewhere, at_least=100)]


def test_padding_is_counted_where_the_layout_makes_it():
    assert hlo.Shape("bf16", (8, 4096, 192), "2,1,0:T(8,128)(2,1)").padded_bytes == 8 * 4096 * 256 * 2
    assert hlo.Shape("bf16", (8, 4096, 192), "1,2,0:T(8,128)(2,1)").padded_bytes == 8 * 4096 * 192 * 2
    assert hlo.Shape("s4", (3, 100), "").padded_bytes == 150
    assert hlo.Shape("f32", (5,), "0:T(128)").padded_bytes == 512
    assert hlo.Shape("f8e4m3fn", (16,)).bytes == 16
    assert hlo.Shape("f32", (4,), "0:S(1)").memory_space == 1


def test_aliases():
    assert hlo.aliases(TEXT) == {(0,): 0, (2, 1): 3}
    assert hlo.aliases("HloModule jit_g\n") == {}


def test_collectives_that_share_a_channel_are_all_listed():
    """As `shard_map` makes them."""
    line = "  %psum.{} = f32[8,16]{{1,0}} all-reduce(%x), channel_id=1, to_apply=%add"
    text = "\n".join(["ENTRY %main (x: f32[8,16]) -> f32[8,16] {", *(line.format(i) for i in range(3)), "}"])
    assert hlo.collectives(text) == [("all-reduce", 512)] * 3


def test_collectives_are_listed_once_with_their_bytes():
    assert hlo.collectives(TEXT) == [("all-gather", 2 * 1024 * 1024), ("all-reduce", 4 * (256 * 512 + 4))]


def test_precision():
    (dot,) = hlo.dots(TEXT)
    assert dot == hlo.Dot("convolution.1", ("f32", "f32"), ("highest", "highest"))
    assert dot.ieee
    (lower,) = hlo.dots(TEXT.replace(", operand_precision={highest,highest}", ""))
    assert not lower.ieee
    assert hlo.Dot("d", ("bf16", "bf16"), ("default", "default")).ieee
    gemm = """ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %g = (f32[8,8]{1,0}, s8[4]{0}) custom-call(%a, %a), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"precision_config":{"operand_precision":["HIGHEST","DEFAULT"],"algorithm":"ALG_UNSET"}}}
}"""  # noqa: E501
    (dot,) = hlo.dots(gemm)
    assert dot.precision == ("highest", "default")
    assert not dot.ieee


def test_vmem_and_cycles_of_kernels():
    assert hlo.vmem_bytes(TEXT) == 2752512
    assert hlo.estimated_cycles(TEXT) == {"f.1": 474}


@pytest.mark.parametrize("precision", ["highest", None])
def test_a_program_compiled_here_is_read(precision):
    def step(cache, x):
        return cache.at[3].set(x[0]), jnp.dot(x, cache.T, precision=precision)

    compiled = jax.jit(step, donate_argnums=0).lower(jnp.zeros((64, 64)), jnp.zeros((8, 64))).compile()
    text = compiled.as_text()
    assert hlo.aliases(text) == {(0,): 0}
    module = hlo.Module(text)
    assert module.entry
    assert [i.opcode for i in module.computations[module.entry].values()].count("parameter") == 2
