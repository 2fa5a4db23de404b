"""`Tokenizer`, the tokenizer of one model: text to ids, ids to text, chats to prompts."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdx.errors import ModelFileError, RequestError, UnsupportedModelError
from pdx.tokenizer.chat import Tools, template_and_inputs
from pdx.tokenizer.gguf import build_from_gguf
from pdx.tokenizer.hf import build_from_hf, read_backend
from pdx.tokenizer.messages import Messages
from pdx.tokenizer.render import render
from pdx.tokenizer.sanitize import ControlTokens, removing_marks
from pdx.tokenizer.settings import Settings
from pdx.tokenizer.stream import DecodeRule, StreamDecoder, decoder_state
from pdx.tokenizer.traits import names_in

if TYPE_CHECKING:
    import tokenizers

_BACKEND_FILE = "tokenizer.json"
_SETTINGS_FILE = "pdx_tokenizer.json"
_BAD_ID = "token ids must be 0 or more and fit 32 bits"


class Tokenizer:
    """The tokenizer of one model, on the `tokenizers` library. Threads may share one.

    Create it with `from_hf_dir`, `from_gguf` or `load`.

    Example, with GGUF metadata of three tokens and one merge:
      >>> tokenizer = pdx.Tokenizer.from_gguf({
      ...     "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
      ...     "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]})
      >>> tokenizer.encode("abba"), tokenizer.decode([2, 1, 0])
      ([2, 1, 0], 'abba')
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: Settings):
        self._backend = backend
        self._settings = settings
        # The backend stores whether special tokens are parsed, so calls from several threads take turns.
        self._lock = threading.Lock()
        self._controls: dict[str, ControlTokens] = {}  # by template
        self._without_marks: dict[tuple[str, frozenset[str]], tokenizers.Tokenizer] = {}

    @classmethod
    def from_hf_dir(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """From a Hugging Face directory with a `tokenizer.json`.

        If they exist, `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`, `config.json` and
        `chat_template.jinja` are read too. Raises ModelFileError that names the broken or missing file.
        """
        return cls(*build_from_hf(Path(path)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, source: str = "the GGUF file") -> Tokenizer:
        """From the metadata of a GGUF file.

        Args:
          metadata: key -> string, number, bool, list of strings, or list or numpy array of numbers
            (`tokenizer.ggml.scores`, `tokenizer.ggml.token_type`).
          source: the file's name in errors.

        Raises ModelFileError for missing or inconsistent fields, UnsupportedModelError for a
        `tokenizer.ggml.model` or a `tokenizer.ggml.pre` that pdx does not know.
        """
        return cls(*build_from_gguf(metadata, source))

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """From a directory that `save` wrote. Raises ModelFileError that names the broken or missing file."""
        settings_file = Path(directory) / _SETTINGS_FILE
        try:
            text = settings_file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{settings_file}: cannot be read ({error}); convert the model again") from error
        settings = Settings.from_json(text, str(settings_file))
        return cls(read_backend(Path(directory) / _BACKEND_FILE), settings)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `pdx_tokenizer.json` into the directory, each of them atomically."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _write_atomically(directory / _BACKEND_FILE, self._backend.to_str())
        _write_atomically(directory / _SETTINGS_FILE, self._settings.to_json())

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool | None = None) -> list[int]:
        """The token ids of a text. Warns if the text begins with BOS and another BOS is added.

        Args:
          add_special: add the tokens that the model expects around a text, such as BOS.
          parse_special: whether text that spells a special token becomes that token, or stays plain text. None: as the
            model's files say, which is True unless they set `split_special_tokens`.

        Raises RequestError for a value that is not Unicode text.
        """
        if not isinstance(text, str):
            raise RequestError(f"a prompt must be text, got {type(text).__name__}")
        parse = not self._settings.split_special_tokens if parse_special is None else parse_special
        with self._lock:
            self._backend.encode_special_tokens = not parse
            ids = _ids(self._backend, text, add_special=add_special)
        if add_special and ids[:2] == [self.bos_id] * 2 and self.opening:
            bos = self.token_text(ids[0])
            warnings.warn(
                f"the prompt begins with {bos}, and the tokenizer adds another: the model sees it twice. "
                f"Remove {bos} from the text",
                stacklevel=2,
            )
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids. Ids beyond the vocabulary have no text; bytes that are not UTF-8 become U+FFFD.

        Raises RequestError for a negative id.
        """
        try:
            return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)
        except OverflowError as error:
            raise RequestError(_BAD_ID) from error

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes one token at a time. Its texts add up to what `decode` returns.

        Raises UnsupportedModelError for a vocabulary whose decoder needs the whole sequence.
        """
        return StreamDecoder(self._rule, self._piece, self._special_pieces if skip_special else frozenset())

    def apply_chat_template(
        self, messages: Messages, *, add_generation_prompt: bool = True, tools: Tools | None = None, **extra: Any
    ) -> str:
        """The prompt for a chat, made by the model's own template.

        Args:
          messages: a list of objects with `role` and `content`.
          add_generation_prompt: end with the beginning of an assistant's turn.
          tools: JSON schemas of functions.
          extra: further variables of the template, such as `enable_thinking=False`.

        Raises RequestError for malformed messages or a model without a template, ModelFileError for a template that
        fails, or exceeds the limits on time and memory.
        """
        template, inputs = template_and_inputs(**self._chat(messages, add_generation_prompt, tools, extra))
        return render(template, inputs, self._settings.source)

    def encode_chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        tools: Tools | None = None,
        sanitize_control_tokens: bool = True,
        **extra: Any,
    ) -> list[int]:
        """The token ids of `apply_chat_template`. Templates write BOS themselves, so none is added.

        sanitize_control_tokens: control tokens that users, tools, documents or tool calls spell stay plain text. So
        only the template, and system and assistant messages, begin and end turns. False: text that spells a control
        token becomes that token, whoever wrote it.

        Raises as `apply_chat_template`, and RequestError if a message spells a control token that the vocabulary also
        forms by merging plain text.
        """
        template, inputs = template_and_inputs(**self._chat(messages, add_generation_prompt, tools, extra))
        source = self._settings.source
        prompt = render(template, inputs, source)
        if sanitize_control_tokens:
            control = self._control_tokens(template)
            separated = control.separate_users(prompt, inputs, lambda marked: render(template, marked, source))
            if separated.tokens:
                return self._encode_marked(separated.text, separated.tokens, separated.mark)
            prompt = separated.text
        return self.encode(prompt, add_special=False, parse_special=True)

    def _chat(
        self, messages: Messages, add_generation_prompt: bool, tools: Tools | None, extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        settings = self._settings
        return {
            "templates": settings.templates,
            "named": settings.named,
            "source": settings.source,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "extra": extra,
        }

    def _control_tokens(self, template: str) -> ControlTokens:
        """The control tokens of chats with this template: the special tokens, and the added ones that it contains."""
        if template not in self._controls:
            added = self._backend.get_added_tokens_decoder().values()
            chosen = self._settings.control
            if chosen is None:
                # In some models, runs of spaces and line feeds are added tokens. Every template contains them.
                chosen = frozenset(t.content for t in added if t.content in template and not t.content.isspace())
            self._controls[template] = ControlTokens(t.content for t in added if t.special or t.content in chosen)
        return self._controls[template]

    def _encode_marked(self, text: str, tokens: frozenset[str], mark: str) -> list[int]:
        """The ids of a text in which `mark` breaks up the spellings of `tokens` that must stay plain text."""
        key = mark, tokens
        with self._lock:
            if key not in self._without_marks:
                self._without_marks.clear()  # each is as large as the tokenizer itself
                self._without_marks[key] = removing_marks(self._backend, mark, tokens)
            backend = self._without_marks[key]
        for token in tokens:
            if self.token_id(token) in backend.encode(mark.join(token), add_special_tokens=False).ids:
                raise RequestError(
                    f"the messages hold {token!r}, which this model's vocabulary also forms from "
                    "plain text: leave it out, or pass sanitize_control_tokens=False"
                )
        return _ids(backend, text, add_special=False)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._settings.templates)

    @cached_property
    def template_names(self) -> frozenset[str]:
        """All names in the chat templates, including those of variables: `messages`, `enable_thinking`, ..."""
        return frozenset().union(*map(names_in, self._settings.templates.values()))

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token id that ends a generation: end of text, of turn, of message."""
        return self._settings.eos_ids

    @cached_property
    def bos_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def opening(self) -> list[int]:
        """The ids that `encode` adds before every text: [BOS], or [] if it adds none."""
        return [x for x in self.encode("")[:1] if x == self.bos_id]

    @cached_property
    def pad_id(self) -> int | None:
        return self._named_id("pad_token")

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that `decode` leaves out."""
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _special_pieces(self) -> frozenset[str]:
        # `decode` skips tokens by spelling, and a vocabulary may have two tokens with the spelling of a special one.
        return frozenset(token.content for token in self._backend.get_added_tokens_decoder().values() if token.special)

    @cached_property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, including added ones. The model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary, such as `<|im_end|>`; None if there is none."""
        return self._backend.token_to_id(token)

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself. A leading space is kept, special tokens have their spelling, incomplete
        characters become U+FFFD, and an id beyond the vocabulary gives "". Raises RequestError for a negative id."""
        piece = self._piece(token_id)
        if piece is None:
            return ""
        try:
            return self._rule.piece_alone(piece)
        except UnsupportedModelError:
            return self.decode([token_id], skip_special=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one token, which may be part of a character; b"" for an id beyond the vocabulary."""
        piece = self._piece(token_id)
        if piece is None:
            return b""
        if piece in self._special_pieces:
            return piece.encode("utf-8")
        try:
            return self._rule.bytes_alone(piece)
        except UnsupportedModelError:
            return self.decode([token_id], skip_special=False).encode("utf-8")

    def _piece(self, token_id: int) -> str | None:
        try:
            return self._backend.id_to_token(int(token_id))
        except OverflowError as error:
            raise RequestError(_BAD_ID) from error

    def _named_id(self, name: str) -> int | None:
        token = self._settings.named.get(name)
        return None if token is None else self._backend.token_to_id(token)

    @cached_property
    def _rule(self) -> DecodeRule:
        return DecodeRule.from_decoder(decoder_state(self._backend))


def _ids(backend: tokenizers.Tokenizer, text: str, *, add_special: bool) -> list[int]:
    try:
        return backend.encode(text, add_special_tokens=add_special).ids
    except TypeError as error:
        raise RequestError("the text holds half a surrogate pair, which is not a character") from error


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
