"""Control tokens by their spelling: which of them end a generation, and which a file typed wrongly.

A file often names only one end of generation as its eos: Gemma's `<eos>` but not `<end_of_turn>`, Llama 3's
`<|end_of_text|>` but not `<|eot_id|>`, and not `<|eom_id|>` at all. The spellings are those of published models, most
of which llama.cpp knows too.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# Nobody writes these by accident: whatever a file says of them, they close a turn, a message or a document.
_ENDS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<|eom|>",
        "<end_of_turn>",
        "<turn|>",
        "<end_of_utterance>",
        "<|end|>",
        "<|end_of_turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|endofturn|>",
        "[|endofturn|]",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<|tool_response>",
        "<|eos|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)
# These can be text (`</s>` closes HTML's strike): they end a generation where the file types them as control tokens.
_ENDS_IF_CONTROL = frozenset({"</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~["})
# Models that have all of these close only messages with `<|end|>`, and go on.
_MESSAGES_END = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})
# What opens turns, and fills in the middle, beside names between bars.
_OTHERS = frozenset(
    {
        "<start_of_turn>",
        "<|turn>",
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        "<fim_pad>",
        "<fim-prefix>",
        "<fim-suffix>",
        "<fim-middle>",
        "<fim-pad>",
        "<fim-repo>",
        "<PRE>",
        "<SUF>",
        "<MID>",
        "\u2581<PRE>",
        "\u2581<SUF>",
        "\u2581<MID>",
    }
)
_BARS = re.compile(r"<\|\w+\|>|<\uff5c[\w\u2581]+\uff5c>")


def end_tokens(is_known: Callable[[str], bool], is_control: Callable[[str], bool]) -> frozenset[str]:
    """The tokens of a vocabulary that end a generation. is_known: it has the token; is_control: and types it so."""
    ends = {token for token in _ENDS if is_known(token)} | {token for token in _ENDS_IF_CONTROL if is_control(token)}
    if any(all(map(is_known, others)) for others in _MESSAGES_END):
        ends.discard("<|end|>")
    if is_known("<|tool_response>"):  # Gemma 4 has `</s>` for HTML
        ends.discard("</s>")
    return frozenset(ends)


def looks_like_control(token: str) -> bool:
    """Whether a token is a control token by its spelling, so that a file that types it as text is mistaken."""
    return token in _ENDS or token in _OTHERS or _BARS.fullmatch(token) is not None
