"""The XLA path of decode attention: all queries of a row at once against blocks of keys."""

from __future__ import annotations

from pallas_kernels.attention.blocked import blocked_attention
from pallas_kernels.attention.call import Call
from pallas_kernels.hardware import platform_of

NAME = "xla"
PLATFORM = "any"
# A row reads at most one block too much; smaller blocks cost more in loop overhead.
KEY_BLOCK = 128
# On a GPU each turn of the loop costs a round trip between host and device: few large blocks.
KEY_BLOCK_GPU = 4096


def run(arrays, call: Call, config=None, interpret=False):
    """See `api.decode_attention`. It takes every call, and has no tiles."""
    return blocked_attention(arrays, call, call.queries, KEY_BLOCK_GPU if platform_of() == "gpu" else KEY_BLOCK)
