"""Control tokens by their spelling: which of them end a generation, and which a file types as text by mistake.

Files often name only one of a model's end tokens as eos: `<eos>` but not `<end_of_turn>` for Gemma, `<|end_of_text|>`
but neither `<|eot_id|>` nor `<|eom_id|>` for Llama 3. The spellings are from published models; llama.cpp has most of
them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# These end a generation however the file types them, since they do not occur in ordinary text.
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
# These can be ordinary text (`</s>` is HTML). They end a generation only if the file types them as control tokens.
_ENDS_IF_CONTROL = frozenset({"</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~["})
# In models that have all tokens of one of these sets, `<|end|>` ends a message but not the generation.
_MESSAGES_END = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})
# Control tokens that begin turns or mark fill-in-the-middle, and that `_BARS` does not match.
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
    """The tokens that end a generation.

    is_known: whether the vocabulary has a token; is_control: whether it types it as a control token.
    """
    ends = {token for token in _ENDS if is_known(token)} | {token for token in _ENDS_IF_CONTROL if is_control(token)}
    if any(all(map(is_known, others)) for others in _MESSAGES_END):
        ends.discard("<|end|>")
    if is_known("<|tool_response>"):  # Gemma 4 has `</s>` for HTML
        ends.discard("</s>")
    return frozenset(ends)


def looks_like_control(token: str) -> bool:
    """Whether a token is a control token by its spelling, whatever type the file gives it.

    >>> looks_like_control("<|im_start|>"), looks_like_control("start")
    (True, False)
    """
    return token in _ENDS or token in _OTHERS or _BARS.fullmatch(token) is not None
