"""Reading what XLA compiled: the text of an optimized HLO module."""

from __future__ import annotations

import re


def vmem_bytes(text: str) -> int:
    """The most scoped VMEM that one instruction of a TPU program uses, in bytes."""
    used = re.findall(r'"used_scoped_memory_configs":\[(.*?)\]', text)
    sizes = [int(n) for part in used for n in re.findall(r'"memory_space":"1"[^}]*?"size":"(\d+)"', part)]
    return max(sizes, default=0)
