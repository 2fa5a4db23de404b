"""The XLA path of prefill attention: blocks of queries against blocks of keys."""

from __future__ import annotations

from pallas_kernels.blocked import blocked_attention

# 256 x 256 scores of a head group stay in a CPU's second-level cache and fill a matrix unit.
QUERY_BLOCK = 256
KEY_BLOCK = 256


def attention(q, k, v, **kwargs):
    """See `api.flash_attention`."""
    return blocked_attention(q, k, v, query_block=QUERY_BLOCK, key_block=KEY_BLOCK, **kwargs)
