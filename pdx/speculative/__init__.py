"""Speculative decoding: tokens are drafted cheaply and verified together, so that a step emits more than one.

Decode is bound by reading the weights; verifying g + 1 tokens reads them once. Leviathan et al. 2023,
Chen et al. 2023.

1. A proposer (`proposers`) drafts tokens for each row: from its text, by a draft model, or by the target's first
   layers.
2. The target scores the newest token and the draft in one `forward` (`rounds`).
3. `acceptance` keeps what plain decoding would have emitted; the cache is truncated to it.
   The draft may be a token tree (`trees`): then one path of it stays.
4. `lengths` chooses each round how many tokens are drafted, by what the rows accepted so far and what a round costs: 0,
   a plain step, where drafting does not pay.
"""
