"""A tokenizer from a Hugging Face directory.

As in transformers 5, `tokenizer.json` alone decides how text becomes ids and which special tokens are added; flags such
as `add_bos_token` in `tokenizer_config.json` are not read. Added tokens are also read from `added_tokens_decoder` of
`tokenizer_config.json` or, if it has none, from the files of older versions: `added_tokens.json` and
`special_tokens_map.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdx.errors import ModelFileError
from pdx.tokenizer.control import end_tokens
from pdx.tokenizer.settings import Settings, read_json

if TYPE_CHECKING:
    import tokenizers

_OTHER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json", "tiktoken.model")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Read a `tokenizer.json`. Truncation and padding that it configures are switched off.

    Raises ModelFileError that names the file.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        others = [name for name in _OTHER_FILES if (path.parent / name).is_file()]
        beside = f", only {' and '.join(others)}" if others else ""
        raise ModelFileError(
            f"{path} does not exist{beside}. pdx needs a tokenizer.json: load the directory with transformers' "
            "AutoTokenizer and call its save_pretrained, which writes one."
        )
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelFileError(f"{path}: not a tokenizer.json that the tokenizers library reads ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def build_from_hf(directory: Path) -> tuple[tokenizers.Tokenizer, Settings]:
    """The backend and the settings of a Hugging Face directory. Raises ModelFileError that names the file."""
    backend = read_backend(directory / "tokenizer.json")
    config = read_json(directory / "tokenizer_config.json")
    files, added = "tokenizer_config.json", config.get("added_tokens_decoder")
    try:
        if added is None:
            old = {name: read_json(directory / name) for name in ("special_tokens_map.json", "added_tokens.json")}
            config.update(old["special_tokens_map.json"])
            added = _decoder_of(old["added_tokens.json"], config, backend)
            files = ", ".join([files, *(name for name, data in old.items() if data)])
        named = _add_named_tokens(backend, config, added)
        split, control = _chat_settings(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelFileError(f"{directory}: malformed special tokens in {files} ({error})") from error
    model = read_json(directory / "config.json")
    generation = read_json(directory / "generation_config.json")
    model |= {key: value for key, value in generation.items() if value is not None}
    for key in ("bos", "eos", "pad"):
        first = next(iter(_ids(directory, model.get(f"{key}_token_id"))), None)
        token = None if first is None else backend.id_to_token(first)
        if token is not None:
            named.setdefault(f"{key}_token", token)
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    spelled = end_tokens(lambda token: backend.token_to_id(token) is not None, special.__contains__)
    ends = {backend.token_to_id(token) for token in (*spelled, named.get("eos_token", ""))}
    ends.update(_ids(directory, model.get("eos_token_id")))
    templates = _templates(directory, config)
    eos_ids = frozenset(token_id for token_id in ends if token_id is not None)
    return backend, Settings(named, eos_ids, templates, split, control, str(directory))


def _ids(directory: Path, value: Any) -> list[int]:
    """The ids of a field, which is one id, a list or null. -1 means no id (`pad_token_id` in LLaMA's own files)."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and -1 <= i < 2**32 for i in ids):
        raise ModelFileError(f"{directory}: a token id in config.json or generation_config.json is {value!r}")
    return [i for i in ids if i != -1]


def _decoder_of(added: Mapping[str, Any], config: Mapping[str, Any], backend: Any) -> dict[str, Any]:
    """`added_tokens.json` (token -> id) as an `added_tokens_decoder` (id -> token with its flags)."""
    special = {_added(token, special=True).content for _, token in _named_entries(config)}
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    entries = {}
    for token, index in added.items():
        if not isinstance(index, int):
            raise TypeError(f"added_tokens.json gives {token!r} the id {index!r}")
        flags = known.get(token)
        entries[str(index)] = {
            "content": token,
            "special": flags.special if flags else token in special,
            "normalized": flags.normalized if flags else token not in special,
            **{flag: getattr(flags, flag) for flag in _FLAGS if flags and flag != "normalized"},
        }
    return entries


def _chat_settings(config: Mapping[str, Any]) -> tuple[bool, frozenset[str] | None]:
    """`split_special_tokens`, and the added tokens that are control tokens in chats (None: not configured)."""
    split, control = config.get("split_special_tokens"), config.get("chat_control_tokens")
    if not isinstance(split, (bool, type(None))):
        raise TypeError(f"split_special_tokens is {split!r}, not true or false")
    if control is not None and not (isinstance(control, list) and all(isinstance(x, str) for x in control)):
        raise TypeError(f"chat_control_tokens is {control!r}, not a list of strings")
    return bool(split), None if control is None else frozenset(control)


def _add_named_tokens(backend: Any, config: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, str]:
    """Add the tokens that only the configuration has, and make the named ones special. Returns name -> token.

    The flags of a token are taken from `added` (id -> token), else from `tokenizer.json`, else from its named entry.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for index, entry in sorted(added.items(), key=lambda item: int(item[0])):
        token = _added(entry, special=isinstance(entry, Mapping) and bool(entry.get("special")))
        if repr(token) != repr(known.get(token.content)):
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != int(index):
            raise ValueError(f"{token.content!r} is listed as token {index}, but tokenizer.json gives it another id")
        known[token.content] = token
    named: dict[str, str] = {}
    special = []
    for name, entry in _named_entries(config):
        token = _added(entry, special=True)
        if name is not None:
            named[name] = token.content
            flags = {flag: getattr(known.get(token.content, token), flag) for flag in _FLAGS}
            special.append(_added({"content": token.content, **flags}, special=True))
        elif token.content not in known:
            special.append(token)
    backend.add_special_tokens(special)
    return named


def _named_entries(config: Mapping[str, Any]) -> Iterator[tuple[str | None, Any]]:
    for name, token in config.items():
        if name.endswith("_token") and isinstance(token, (str, Mapping)):
            yield name, token
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        extra = config.get(key)
        if extra is not None and not isinstance(extra, (list, Mapping)):
            raise TypeError(f"{key} is {extra!r}, neither a list of tokens nor an object of names and tokens")
        yield from extra.items() if isinstance(extra, Mapping) else ((None, token) for token in extra or ())


def _added(token: str | Mapping[str, Any], *, special: bool) -> Any:
    from tokenizers import AddedToken

    content = token if isinstance(token, str) else token["content"]
    if not isinstance(content, str) or not content:
        raise TypeError(f"{token!r} is not a token")
    flags = {} if isinstance(token, str) else {flag: bool(token[flag]) for flag in _FLAGS if flag in token}
    return AddedToken(content, special=special, **flags)


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> chat template. Those of the configuration are replaced by `chat_template.jinja` (the default one) and by
    files of their name in `additional_chat_templates/`."""
    inline = config.get("chat_template")
    if inline is None:
        inline = read_json(directory / "chat_template.json").get("chat_template")
    templates = _inline(directory, inline)
    files = {"default": directory / "chat_template.jinja"}
    files.update({path.stem: path for path in sorted(directory.glob("additional_chat_templates/*.jinja"))})
    for name, path in files.items():
        if not path.is_file():
            continue
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{path}: cannot be read as text ({error})") from error
    return templates


def _inline(directory: Path, templates: Any) -> dict[str, str]:
    """Name -> template, from a `chat_template` field: one template, a list of {name, template}, or an object."""
    if isinstance(templates, str):
        return {"default": templates}
    try:
        pairs = (
            templates.items()
            if isinstance(templates, Mapping)
            else ((entry["name"], entry["template"]) for entry in templates or ())
        )
        named = dict(pairs)
    except (TypeError, KeyError) as error:
        raise ModelFileError(f"{directory / 'tokenizer_config.json'}: malformed chat_template ({error})") from error
    wrong = next((name for name, text in named.items() if not (isinstance(name, str) and isinstance(text, str))), None)
    if wrong is not None:
        raise ModelFileError(
            f"{directory / 'tokenizer_config.json'}: malformed chat_template ({wrong!r} is not a string)"
        )
    return named
