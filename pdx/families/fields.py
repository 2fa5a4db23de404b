"""Reading a published configuration: a field's type is checked when it is read, and unread fields are reported."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from pdx.config import MOST_LAYERS
from pdx.errors import ModelFileError, UnsupportedModelError

# Fields of a Hugging Face config.json that do not change the result of inference.
INERT = frozenset(
    """
    architectures model_type auto_map transformers_version torch_dtype dtype _name_or_path name_or_path
    _attn_implementation _attn_implementation_internal attn_implementation _commit_hash id2label label2id problem_type
    num_labels finetuning_task task_specific_params tokenizer_class prefix use_cache cache_implementation
    initializer_range attention_dropout hidden_dropout pretraining_tp gradient_checkpointing bos_token_id eos_token_id
    pad_token_id unk_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores torchscript use_bfloat16
    tf_legacy_loss pruned_heads chunk_size_feed_forward is_decoder max_length min_length do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens is_llama_config is_gemma_config
    transformers.js_config unsloth_version unsloth_fixed keys_to_ignore_at_inference num_nextn_predict_layers
    """.split()  # noqa: SIM905
)

# Fields that change the computation in ways that pdx does not have, with the values that change nothing. Any other
# value is refused.
REFUSED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "cross_attention_hidden_size": (),
    "embedding_multiplier": (1, 1.0),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_lora_rank": (),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "n_routed_experts": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0, 1),
    "partial_rotary_factor": (1, 1.0),
    "q_lora_rank": (),
    "quantization_config": ({},),
    "residual_multiplier": (1, 1.0),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
}

PLAUSIBLE_LAYERS = 1000
_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = 100


def short(value: Any) -> str:
    """`repr`, shortened for an error message.

    >>> short(list(range(1000)))
    '[0, 1, 2, 3, 4, 5, 6, 7, ...]'
    """
    return _SHORT.repr(value)


def count_of(count: int, what: str) -> str:
    """A number with its noun.

    >>> count_of(1, "tensor"), count_of(2, "tensor")
    ('1 tensor', '2 tensors')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


class Fields:
    """A configuration that records which of its fields were read.

    Args:
      data: field -> value.
      where: the file's name in errors.
      prefix: what stands before each key in that file.
      held: the number of tensors in the model's files; None: unknown.
      notes: sentences for the user are appended here.
      per_layer: the field with the number of layers, in formats where a number may also be a list with one equal
        entry per layer (GGUF).
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        where: str,
        prefix: str = "",
        held: int | None = None,
        notes: list[str] | None = None,
        per_layer: str | None = None,
    ):
        self.data, self.where, self.prefix, self.held = data, where, prefix, held
        self.notes, self.per_layer = [] if notes is None else notes, per_layer
        self.used: set[str] = set()

    def inner(self, data: Any, prefix: str, key: str) -> Fields:
        """The fields of a nested object. Raises ModelFileError if the value `data` of `key` is not an object."""
        if not isinstance(data, dict):
            raise self.wrong(key, data, "an object")
        return Fields(data, self.where, f"{self.prefix}{prefix}", self.held, self.notes)

    def has(self, key: str) -> bool:
        return key in self.data

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` if the field is missing or null."""
        self.used.add(key)
        value = self.data.get(key)
        return default if value is None else value

    def _one(self, key: str, default: Any = None) -> Any:
        """As `get`, but a list with one equal entry per layer counts as that entry.

        Raises UnsupportedModelError if the entries differ.
        """
        value = self.get(key, default)
        if self.per_layer is None or not isinstance(value, list) or not value:
            return value
        if len(value) != self.data.get(self.per_layer):
            raise self.wrong(
                key,
                value,
                f"a number, or one for each of {self.prefix}{self.per_layer} = "
                f"{short(self.data.get(self.per_layer))} layers",
            )
        if any(x != value[0] for x in value):
            raise self.unsupported(key, value, "the same value in every layer")
        return value[0]

    def wrong(self, key: str, value: Any, expected: str) -> ModelFileError:
        """The error for a field that is missing or has a wrong type or value."""
        said = "is missing" if value is None else f"is {short(value)}"
        return ModelFileError(f"{self.where}: field {self.prefix}{key} {said}, expected {expected}")

    def integer(self, key: str, default: int | None = None, most: int | None = None, least: int = 1) -> int:
        """An integer from `least` to `most`. Raises ModelFileError for anything else."""
        value = self._one(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(key, value, "a positive integer" if least == 1 else f"an integer of at least {least}")
        if most is not None and value > most:
            raise self.wrong(key, value, f"at most {most}")
        return value

    def each_layer(self, key: str) -> list[int] | None:
        """A list with one integer of at least 0, or one flag, per layer; None if the field is not a list.

        Raises ModelFileError for a list of another length or of other values.
        """
        value = self.get(key)
        if not isinstance(value, list):
            return None
        layers = self.data.get(self.per_layer or "")
        if len(value) != layers or any(not isinstance(x, (int, float)) or x < 0 or x % 1 for x in value):
            raise self.wrong(key, value, f"an integer of at least 0 for each of {short(layers)} layers")
        return [int(x) for x in value]

    def layers(self, key: str, default: int | None = None) -> int:
        """The number of layers. Raises as `integer`, and for a number far above the number of tensors: a corrupted
        count would fill the memory with lists of that length. A plausible but wrong count is found later, by the
        tensors that are missing."""
        value = self.integer(key, default, MOST_LAYERS if self.held is None else None)
        if self.held is not None and value > max(self.held, PLAUSIBLE_LAYERS):
            raise self.wrong(
                key,
                value,
                f"fewer than the {self.held} tensors that the model's files hold: "
                "the file is corrupted, or it belongs to another model",
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0. Raises ModelFileError for anything else."""
        value = self._one(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def optional_number(self, key: str, default: float | None = None) -> float | None:
        """As `number`; an explicit null or 0 means None."""
        value = self._one(key)
        if value is None and key not in self.data:
            value = default
        return None if value is None or value == 0 else self.number(key, default)

    def flag(self, key: str, default: bool) -> bool:
        value = self._one(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def unsupported(self, key: str, value: Any, supported: str) -> UnsupportedModelError:
        said = f"{self.prefix}{key} = {short(value)}"
        return UnsupportedModelError(f"{self.where}: {said} is not supported; pdx has {supported}")

    def only(self, key: str, *harmless: Any) -> None:
        """Refuse a field unless it is missing, null or one of `harmless`. Raises UnsupportedModelError."""
        value = self._one(key)
        if value is not None and value not in harmless:
            allowed = " or ".join(map(repr, harmless)) or "models without it"
            raise self.unsupported(key, value, f"only {allowed}")

    def unused(self) -> dict[str, Any]:
        """Fields that were not read, are not in `INERT`, and are neither null, false nor empty."""
        return {
            k: v
            for k, v in self.data.items()
            if k not in self.used and k not in INERT and v is not None and v is not False and v != [] and v != {}
        }
