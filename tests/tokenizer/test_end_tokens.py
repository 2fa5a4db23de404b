"""What ends a generation: end tokens that a file forgets, mistypes, or names beside another."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pdx.errors import ModelFileError
from pdx.tokenizer import Tokenizer
from tests.support.tokenizer_fixtures import SPECIAL, byte_level, byte_level_metadata, sentencepiece_metadata

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
HI = [{"role": "user", "content": "Hi"}]


def with_tokens(tokens: dict[str, int], **fields) -> Tokenizer:
    """A byte-level GGUF whose last tokens are these, of these types."""
    metadata = byte_level_metadata("gpt-2")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *tokens]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], *tokens.values()]
    return Tokenizer.from_gguf(metadata | {f"tokenizer.ggml.{key}": value for key, value in fields.items()})


def ends(tokenizer: Tokenizer) -> set[str]:
    return {tokenizer.token_text(i) for i in tokenizer.eos_ids}


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED, UNUSED])
@pytest.mark.parametrize(
    "token",
    [
        "<|eom_id|>",
        "<|eot_id|>",
        "<|eot|>",
        "<|eom|>",
        "<end_of_turn>",
        "<turn|>",
        "<|end|>",
        "<|end_of_text|>",
        "<|return|>",
        "<end_of_utterance>",
        "<|END_OF_TURN_TOKEN|>",
        "[|endofturn|]",
        "<｜end▁of▁sentence｜>",
    ],
)
def test_an_end_of_a_turn_or_message_ends_whatever_its_type(token, kind):
    tokenizer = with_tokens({token: kind})
    index = tokenizer.token_id(token)
    assert index in tokenizer.eos_ids
    assert 2 in tokenizer.eos_ids, "the one that the file names stays"
    # It is one token of a prompt, and no part of an answer's text.
    assert tokenizer.encode(f"a{token}b").count(index) == 1
    assert tokenizer.decode([index]) == ""


@pytest.mark.parametrize("token", ["</s>", "<eos>", "[EOS]", "<EOT>"])
def test_what_can_be_text_ends_only_where_it_is_typed_as_control(token):
    for kind in (NORMAL, USER_DEFINED):
        tokenizer = with_tokens({token: kind})
        assert tokenizer.token_id(token) not in tokenizer.eos_ids
    control = with_tokens({token: CONTROL})
    assert control.token_id(token) in control.eos_ids


def test_messages_of_models_that_return_and_call_do_not_end_generation():
    assert "<|end|>" in ends(with_tokens({"<|end|>": CONTROL, "<|return|>": CONTROL}))
    harmony = with_tokens({"<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL})
    assert {"<|return|>", "<|call|>"} <= ends(harmony)
    assert "<|end|>" not in ends(harmony)
    named = with_tokens({"<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL}, eot_token_id=801)
    assert named.token_text(801) == "<|end|>" in ends(named)


@pytest.mark.parametrize(
    "token",
    [
        "<|im_start|>x",
        "<|start_header_id|>",
        "<start_of_turn>",
        "<|fim_prefix|>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<|tool|>",
        "<｜User｜>",
    ],
)
def test_control_looking_tokens_typed_as_text_become_control_tokens(token):
    shape = token != "<|im_start|>x"
    tokenizer = with_tokens({token: NORMAL})
    assert (tokenizer.token_id(token) in tokenizer.special_ids) is shape
    assert (tokenizer.token_id(token) in tokenizer.encode(f"a{token}b")) is shape
    assert tokenizer.token_id(token) not in tokenizer.eos_ids
    kept = with_tokens({token: USER_DEFINED})
    assert kept.token_id(token) not in kept.special_ids, "a file that says user-defined means it"


def test_without_types_control_tokens_are_found_by_their_spelling():
    metadata = byte_level_metadata("gpt-2")
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode_chat(HI) == Tokenizer.from_gguf(byte_level_metadata("gpt-2")).encode_chat(HI)


def test_sentencepiece_pieces_never_merge_into_a_mistyped_control_token():
    metadata = sentencepiece_metadata(prefix=False)
    for token in ("<end_of_turn>", "<end_of_", "turn>"):
        metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], token]
        metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], NORMAL]
        metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], 0.0]
    tokenizer = Tokenizer.from_gguf(metadata)
    index = tokenizer.token_id("<end_of_turn>")
    assert index in tokenizer.encode("a<end_of_turn>")
    assert index not in tokenizer.encode("a<end_of_turn>", parse_special=False)


def test_a_list_of_end_tokens_and_ids_that_mean_none():
    tokenizer = with_tokens(
        {},
        eos_token_ids=np.array([2, 7]),
        eot_token_id=np.uint32(2**32 - 1),
        eom_token_id=-1,
        padding_token_id=2**32 - 1,
    )
    assert {2, 7} <= tokenizer.eos_ids
    assert tokenizer.pad_id is None
    for wrong in ([801], 7, ["a"], [True]):
        with pytest.raises(ModelFileError, match="eos_token_ids"):
            with_tokens({}, eos_token_ids=wrong)


@pytest.mark.parametrize("special", [True, False])
def test_directories_end_at_tokens_that_their_configuration_does_not_name(tmp_path, special):
    backend = json.loads(byte_level("qwen2").to_str())
    added = {
        "id": 801,
        "content": "<|eom_id|>",
        "special": special,
        "normalized": False,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
    }
    backend["added_tokens"].append(added)
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    tokenizer = Tokenizer.from_hf_dir(tmp_path)
    ids = {tokenizer.token_id(token) for token in ("<|eom_id|>", "<|im_end|>", SPECIAL[0])}
    assert tokenizer.eos_ids == ids | {5}, "null says nothing"


def test_the_tokenizers_eos_counts_beside_that_of_the_generation_config(tmp_path):
    # A fine-tune that ends turns with a token of its own, whose generation_config.json is the base model's.
    byte_level("qwen2").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|over|>"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    tokenizer = Tokenizer.from_hf_dir(tmp_path)
    assert {0, tokenizer.token_id("<|over|>")} <= tokenizer.eos_ids


def test_an_id_of_minus_one_is_no_token_in_directories_too(tmp_path):
    byte_level("qwen2").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": -1, "eos_token_id": [-1, 5], "pad_token_id": -1}')
    tokenizer = Tokenizer.from_hf_dir(tmp_path)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (None, None)
    assert 5 in tokenizer.eos_ids
    assert -1 not in tokenizer.eos_ids
