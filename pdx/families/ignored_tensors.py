"""Tensors of published files that are ignored, by name: buffers, encoders, draft heads.

Only names that no weight of a text model has are listed. `pdx.weights.opening.check_names` refuses all others, since a
bias, norm or scale that the configuration does not ask for would change the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pdx.families.fields import count_of

MERGE = "merge it into the model first (peft: merge_and_unload)"  # advice for a LoRA adapter
# Values that a model computes from its configuration, saved by older versions of transformers.
BUFFERS = (
    r"(.*\.)?rotary(_pos)?_emb(_local|_global)?\.(\w*inv_freq|_?(cos|sin)(_cache|_cached)?|cos_sin_cache)",
    r"(.*\.)?(rope\.freqs|freqs_cis)",
    r"(.*\.)?(self_attn|attn|attention|self_attention)\.masked_bias",
    r"(.*\.)?(causal_mask|position_ids|_extra_state)",
    r"(.*\.)?embed_tokens\.embed_scale",
    r"blk\.\d+\.attn_rot_embd(\.weight)?",
    r"rope_freqs\.weight",  # read with the configuration
)
# The causal mask of an attention module if it has several dimensions; a vector of this name is a bias.
MASK = r"(.*\.)?(self_attn|attn|attention|self_attention)\.bias"
# Other parts of published models, with their tensor names in Hugging Face and GGUF files.
PARTS = {
    "an image encoder": (
        r"(model\.|language_model\.)?(vision\w*|visual|image_\w+|multi_modal_projector|mm_projector|embed_vision"
        r"|patch_merger)(\..*)?",
        r"(v|mm|clip)\..*",
    ),
    "an audio encoder": (r"(model\.|language_model\.)?(audio\w*|embed_audio)\..*", r"a\..*"),
    "draft heads": (r"(model\.)?(mtp\w*|medusa_heads?|eagle\w*|draft_\w+)\..*",),
}
# Explanations of unknown tensors by name pattern; the first match counts.
_KNOWN = (
    (r".*lora_\w+.*", f"it is of a LoRA adapter; {MERGE}"),
    (
        r".*(scale|scales|scale_inv|zero_point|qweight|qzeros|g_idx|absmax|quant_map|quant_state\S*)",
        "it is of a checkpoint quantized by another tool, which pdx does not read",
    ),
)


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds values that a model computes from its configuration.

    >>> is_buffer("model.layers.0.self_attn.rotary_emb.inv_freq", (64,))
    True
    >>> is_buffer("model.layers.0.attn.bias", (1, 1, 512, 512)), is_buffer("model.layers.0.attn.bias", (64,))
    (True, False)
    """
    return _fits(name, BUFFERS) or (len(shape) > 1 and _fits(name, (MASK,)))


def part_of(name: str, draft_layers: range = range(0)) -> str | None:
    """The part other than the text model that a tensor belongs to; None: it belongs to the text model.

    `draft_layers` are the layers after the model's own that predict further tokens (DeepSeek's MTP).

    >>> part_of("vision_tower.blocks.0.weight"), part_of("v.blk.0.attn_q.weight"), part_of("mtp.fc.weight")
    ('an image encoder', 'an image encoder', 'draft heads')
    >>> part_of("model.layers.0.self_attn.q_proj.bias")
    """
    layer = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    if layer and int(layer[1]) in draft_layers:
        return "draft heads"
    return next((part for part, patterns in PARTS.items() if _fits(name, patterns)), None)


def skipped_parts(names: Iterable[str], draft_layers: range = range(0)) -> list[str]:
    """A sentence for each part other than the text model that a file has tensors of."""
    found: dict[str, list[str]] = {}
    for name in names:
        if (part := part_of(name, draft_layers)) is not None:
            found.setdefault(part, []).append(name)
    return [
        f"ignored {count_of(len(group), 'tensor')} of {part}, such as {group[0]}: pdx runs the text model"
        for part, group in found.items()
    ]


def explain_unknown(name: str) -> str:
    """What an unexpected tensor probably is, judged by its name."""
    return next(
        (said for pattern, said in _KNOWN if re.fullmatch(pattern, name)),
        "the files belong to different models, or to a variant that pdx does not have",
    )


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
