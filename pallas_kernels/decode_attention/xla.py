"""The XLA path of decode attention: all queries of a row at once against blocks of keys."""

from __future__ import annotations

from pallas_kernels.attention.blocked import blocked_attention
from pallas_kernels.attention.call import Call
from pallas_kernels.hardware import platform_of

# What a step reads too much is at most one block a row; smaller ones pay in loop overhead.
KEY_BLOCK = 128
# A GPU's host asks the device before each turn of such a loop whether there is another: few large blocks.
KEY_BLOCK_GPU = 4096


def supported(call: Call) -> str | None:
    """Every call."""
    return None


def attention(q, k, v, *, config=None, interpret=False, **kwargs):
    """See `api.decode_attention`. There are no tiles to set, and nothing to interpret."""
    if config is not None:
        raise ValueError("decode_attention: the XLA path takes no config")
    key_block = KEY_BLOCK_GPU if platform_of() == "gpu" else KEY_BLOCK
    return blocked_attention(q, k, v, query_block=q.shape[1], key_block=key_block, **kwargs)
