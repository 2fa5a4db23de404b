"""The XLA path of prefill attention: blocks of queries against blocks of keys."""

from __future__ import annotations

from pallas_kernels.attention.blocked import blocked_attention
from pallas_kernels.attention.call import Call
from pallas_kernels.hardware import platform_of

NAME = "xla"
PLATFORM = "any"
# At 1024 tokens on a CPU, blocks of 256 keys were a little faster than blocks of 128.
QUERY_BLOCK = 256
KEY_BLOCK = 256
# On a GPU each turn of the loop costs a round trip between host and device: few large blocks. The logits of one block
# take 4 MiB per head and row.
QUERY_BLOCK_GPU = 512
KEY_BLOCK_GPU = 2048
# Short prompts take smaller key blocks: less is computed past their end.
SMALLEST_KEY_BLOCK = 128


def run(arrays, call: Call, config=None, interpret=False):
    """See `api.flash_attention`. It takes every call, and has no tiles."""
    if platform_of() == "gpu":
        return blocked_attention(arrays, call, QUERY_BLOCK_GPU, KEY_BLOCK_GPU)
    return blocked_attention(
        arrays, call, QUERY_BLOCK, KEY_BLOCK if call.queries > SMALLEST_KEY_BLOCK else SMALLEST_KEY_BLOCK
    )
