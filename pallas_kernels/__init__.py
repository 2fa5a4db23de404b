"""A library of inference kernels: arrays in, arrays out; each op in XLA and, where it exists, in Pallas."""

from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.flash_attention.reference import attention as reference_attention
from pallas_kernels.paged_attention.api import paged_attention

__all__ = ["decode_attention", "flash_attention", "paged_attention", "reference_attention"]
