"""The XLA path of decode attention: all queries of a row at once against blocks of keys."""

from __future__ import annotations

from pallas_kernels.attention.blocked import blocked_attention
from pallas_kernels.attention.call import Call
from pallas_kernels.hardware import platform_of

NAME = "xla"
PLATFORM = "any"
# What a step reads too much is at most one block a row; smaller ones pay in loop overhead.
KEY_BLOCK = 128
# A GPU's host asks the device before each turn of such a loop whether there is another: few large blocks.
KEY_BLOCK_GPU = 4096


def run(arrays, call: Call, config=None, interpret=False):
    """See `api.decode_attention`: takes every call, and has no tiles."""
    return blocked_attention(arrays, call, call.queries, KEY_BLOCK_GPU if platform_of() == "gpu" else KEY_BLOCK)
