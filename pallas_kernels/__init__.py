"""A library of inference kernels: arrays in, arrays out; each op in XLA and, where it exists, in Pallas."""

from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.flash_attention.reference import attention as reference_attention
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_write.api import write_pages
from pallas_kernels.quant_array import QuantArray
from pallas_kernels.quantize_kv import quantize_kv
from pallas_kernels.quantized_matmul.api import quantized_matmul

__all__ = [
    "QuantArray",
    "decode_attention",
    "flash_attention",
    "paged_attention",
    "quantize_kv",
    "quantized_matmul",
    "reference_attention",
    "write_pages",
]
