"""The XLA path of decode attention: all queries of a row at once against blocks of keys."""

from __future__ import annotations

from pallas_kernels.blocked import blocked_attention

# What a step reads too much is at most one block a row; smaller ones pay in loop overhead.
KEY_BLOCK = 128


def attention(q, k, v, **kwargs):
    """See `api.decode_attention`."""
    return blocked_attention(q, k, v, query_block=q.shape[1], key_block=KEY_BLOCK, **kwargs)
