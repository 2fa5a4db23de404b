"""A tokenizer from a Hugging Face directory.

`tokenizer.json` decides how text becomes ids, its special tokens included, as in transformers 5: flags such
as `add_bos_token` in `tokenizer_config.json` describe the same thing and are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdx.errors import ModelFileError
from pdx.tokenizer.settings import END_OF_TURN, Settings, read_json

if TYPE_CHECKING:
    import tokenizers

_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Reads a `tokenizer.json`, without the truncation and padding it may ask for.

    Raises ModelFileError that names the file.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        raise ModelFileError(
            f"{path} does not exist. pdx needs a tokenizer.json; where a model has only a tokenizer.model, "
            "load it once with transformers' AutoTokenizer and call save_pretrained on the directory."
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
    if "added_tokens_decoder" not in config:
        config.update(read_json(directory / "special_tokens_map.json"))
    try:
        named = _add_named_tokens(backend, config)
    except (TypeError, ValueError, KeyError) as error:
        raise ModelFileError(f"{directory / 'tokenizer_config.json'}: malformed special tokens ({error})") from error
    model = {**read_json(directory / "config.json"), **read_json(directory / "generation_config.json")}
    for key in ("bos", "eos", "pad"):
        first = next(iter(_ids(directory, model.get(f"{key}_token_id"))), None)
        token = None if first is None else backend.id_to_token(first)
        if token is not None:
            named.setdefault(f"{key}_token", token)
    ends = {backend.token_to_id(named["eos_token"])} if "eos_token" in named else set()
    ends.update(_ids(directory, model.get("eos_token_id")))
    ends.update(i for i, token in backend.get_added_tokens_decoder().items() if token.content in END_OF_TURN)
    return backend, Settings(named, frozenset(ends - {None}), _templates(directory, config), str(directory))


def _ids(directory: Path, value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise ModelFileError(f"{directory}: a token id in config.json or generation_config.json is {value!r}")
    return ids


def _add_named_tokens(backend: Any, config: Mapping[str, Any]) -> dict[str, str]:
    """Adds the tokens that only the configuration has and makes those it names special; their texts by name.

    A token's flags are those of `added_tokens_decoder`, else of `tokenizer.json`, else of where it is named.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for index, entry in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        token = _added(entry, special=bool(entry.get("special")))
        if repr(token) != repr(known.get(token.content)):
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != int(index):
            raise ValueError(f"{token.content!r} is listed as token {index}, which it is not in tokenizer.json")
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
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(key) or ()
        yield from extra.items() if isinstance(extra, Mapping) else ((None, token) for token in extra)


def _added(token: str | Mapping[str, Any], *, special: bool) -> Any:
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=special)
    flags = {flag: bool(token[flag]) for flag in _FLAGS if flag in token}
    return AddedToken(token["content"], special=special, **flags)


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    templates: dict[str, str] = {}
    inline = config.get("chat_template", read_json(directory / "chat_template.json").get("chat_template"))
    try:
        if isinstance(inline, str):
            templates["default"] = inline
        elif inline is not None:
            templates.update({entry["name"]: entry["template"] for entry in inline})
    except (TypeError, KeyError) as error:
        raise ModelFileError(f"{directory / 'tokenizer_config.json'}: malformed chat_template ({error})") from error
    files = {"default": directory / "chat_template.jinja"}
    files.update({path.stem: path for path in sorted(directory.glob("additional_chat_templates/*.jinja"))})
    found = {name: path for name, path in files.items() if path.is_file()}
    if found:  # template files replace what the configuration holds
        templates = {}
    for name, path in found.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{path}: cannot be read as text ({error})") from error
    return templates
