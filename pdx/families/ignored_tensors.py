"""Tensors of published files that the text model does not need, by name: buffers, and parts beside the text model.

Only names that no weight of a decoder has are listed. Everything else is refused by `pdx.weights.opening.check_names`:
a bias, a norm or a scale that the configuration does not ask for changes what the model computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pdx.families.fields import counted

MERGE = "merge it into the model first (peft: merge_and_unload)"  # what to do with a LoRA adapter
# Values that a model computes from its configuration, kept by older versions of the published classes.
BUFFERS = (
    r"(.*\.)?rotary(_pos)?_emb(_local|_global)?\.(\w*inv_freq|_?(cos|sin)(_cache|_cached)?|cos_sin_cache)",
    r"(.*\.)?(rope\.freqs|freqs_cis)",
    r"(.*\.)?(self_attn|attn|attention|self_attention)\.masked_bias",
    r"(.*\.)?(causal_mask|position_ids|_extra_state)",
    r"(.*\.)?embed_tokens\.embed_scale",
    r"blk\.\d+\.attn_rot_embd(\.weight)?",
    r"rope_freqs\.weight",  # read with the configuration
)
# The causal mask of an attention module; a vector of this name would be a bias.
MASK = r"(.*\.)?(self_attn|attn|attention|self_attention)\.bias"
# What stands beside a text model, and its tensors in Hugging Face and GGUF names.
PARTS = {
    "an image encoder": (
        r"(model\.|language_model\.)?(vision\w*|visual|image_\w+|multi_modal_projector|mm_projector|embed_vision"
        r"|patch_merger)(\..*)?",
        r"(v|mm|clip)\..*",
    ),
    "an audio encoder": (r"(model\.|language_model\.)?(audio\w*|embed_audio)\..*", r"a\..*"),
    "draft heads": (r"(model\.)?(mtp\w*|medusa_heads?|eagle\w*|draft_\w+)\..*",),
}
# What an unknown tensor is, by its name; the first match counts.
_KNOWN = (
    (r".*lora_\w+.*", f"it is of a LoRA adapter; {MERGE}"),
    (
        r".*(scale|scales|scale_inv|zero_point|qweight|qzeros|g_idx|absmax|quant_map|quant_state\S*)",
        "it is of a checkpoint quantized by another tool, which pdx does not read",
    ),
)


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds what a model computes from its configuration.

    >>> is_buffer("model.layers.0.self_attn.rotary_emb.inv_freq", (64,))
    True
    >>> is_buffer("model.layers.0.attn.bias", (1, 1, 512, 512)), is_buffer("model.layers.0.attn.bias", (64,))
    (True, False)
    """
    return _fits(name, BUFFERS) or (len(shape) > 1 and _fits(name, (MASK,)))


def part_of(name: str, draft_layers: range = range(0)) -> str | None:
    """The part beside the text model that a tensor belongs to; None: it is of the text model.

    `draft_layers` are layers behind the model's own that only predict further tokens (DeepSeek's MTP).

    >>> part_of("vision_tower.blocks.0.weight"), part_of("v.blk.0.attn_q.weight"), part_of("mtp.fc.weight")
    ('an image encoder', 'an image encoder', 'draft heads')
    >>> part_of("model.layers.0.self_attn.q_proj.bias")
    """
    layer = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    if layer and int(layer[1]) in draft_layers:
        return "draft heads"
    return next((part for part, patterns in PARTS.items() if _fits(name, patterns)), None)


def parts_said(names: Iterable[str], draft_layers: range = range(0)) -> list[str]:
    """A sentence for each part that tensors of a file belong to."""
    found: dict[str, list[str]] = {}
    for name in names:
        if (part := part_of(name, draft_layers)) is not None:
            found.setdefault(part, []).append(name)
    return [
        f"{counted(len(group), 'tensor')} of {part} passed over, such as {group[0]}: pdx runs the text model"
        for part, group in found.items()
    ]


def told_to_be(name: str) -> str:
    """What an unexpected tensor is, as far as its name tells."""
    return next(
        (said for pattern, said in _KNOWN if re.fullmatch(pattern, name)),
        "the two do not belong together, or it is of a variant that pdx does not have",
    )


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
