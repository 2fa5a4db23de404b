"""The two phases as pure jitted functions over one cache, which is donated and returned.

1. A step checks its arguments on the host, then dispatches one compiled program.
2. The program is `pdx.model.forward`: `prefill` appends a chunk per row, `decode_step` one token, `verify` a draft;
   `mixed_step` takes packed decode rows and prompt chunks of many requests over pages.
3. It returns logits (of the last token; for `verify`, of all) and the cache. `decode_many` loops over decode and
   sampling on the device, and returns tokens.
"""

from pdx.steps import dense, packed
from pdx.steps.dense import Decoded, decode_many, decode_step, prefill, verify
from pdx.steps.packed import mixed_step

__all__ = ["PROGRAMS", "Decoded", "decode_many", "decode_step", "mixed_step", "prefill", "verify"]

# The jitted programs of the steps, for `.lower(...)`. They check nothing.
PROGRAMS = dense.PROGRAMS | packed.PROGRAMS
