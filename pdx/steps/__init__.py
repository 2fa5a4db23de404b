"""The two phases as pure jitted functions over one cache, which is donated and returned.

`prefill` appends a chunk, `decode_step` one token a row, `decode_many` decodes and samples on the device,
`verify` scores a draft, `mixed_step` takes packed tokens of many requests over pages, decode rows and chunks of prompts
in one. Each is `pdx.model.forward` with another T and another row of logits kept.
"""

from pdx.steps import dense, packed
from pdx.steps.dense import Decoded, decode_many, decode_step, prefill, verify
from pdx.steps.packed import mixed_step

__all__ = ["PROGRAMS", "Decoded", "decode_many", "decode_step", "mixed_step", "prefill", "verify"]

# The jitted programs behind the steps, for `.lower(...)`: they take every argument by name and check nothing.
PROGRAMS = dense.PROGRAMS | packed.PROGRAMS
