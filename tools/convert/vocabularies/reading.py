"""Reads a checkpoint's tokenizer, and the files in its folder: added tokens, BOS and EOS, chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.json_file import read_json
from llamaclust.model.checkpoints.source_file import SourceFile
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.vocabularies.ranks import is_ranks, read_ranks, read_tekken
from llamaclust.tools.convert.vocabularies.sentence_piece import read_llama2c_words, read_sentence_piece
from llamaclust.tools.convert.vocabularies.templates import read_templates
from llamaclust.tools.convert.vocabularies.tokenizer_json import read_tokenizer_json
from llamaclust.tools.convert.vocabularies.words import Words

_TEKKEN: Final = "tekken.json"
_RANKS: Final = ("qwen.tiktoken", "hy.tiktoken", "tiktoken.model")
NAMES: Final = ("tokenizer.model", "tokenizer.json", *_RANKS, _TEKKEN, "tokenizer.bin")
_MAX_BYTES: Final = 1 << 28
_PARTS: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
"""Maps Hugging Face's names for roles of special tokens to GGUF's names. The spelling "seperator" is GGUF's."""
_ENDS: Final = ("eot", "eom")
_NUMBER: Final = re.compile("[0-9]{1,9}")


def read_words(
    files: SourceFiles, place: Path, rows: int, behind: Sequence[str] = (), names: Sequence[str] = NAMES
) -> Words:
    """Reads the vocabulary from a file or a Hugging Face folder, and fits it to an embedding of `rows` rows. The
    control tokens in `behind` are appended to a SentencePiece vocabulary. `names` are tokenizer files, best first."""
    path = _find(place, names) if place.is_dir() else place
    words = _read(files.open(path))
    if words.kind == "llama":
        for token_id, text in enumerate(behind, len(words.texts)):
            words.add(token_id, text, special=True)
    if place.is_dir():
        config = _json(place / "config.json") | _json(place / "generation_config.json")
        _read_special(words, place, config, rows)
    words.fit(rows)
    return words


def _find(folder: Path, names: Sequence[str]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ModelFileError(f"{folder}: has no tokenizer ({', '.join(names)}); name a tokenizer with --tokenizer")
    return found


def _read(file: SourceFile) -> Words:
    if file.path.name == _TEKKEN:
        return read_tekken(file.path)
    if file.path.suffix == ".json":
        return read_tokenizer_json(file.path)
    if file.size_bytes > _MAX_BYTES:
        raise file.error(f"the tokenizer has {file.size_bytes >> 20} MiB; the limit is {_MAX_BYTES >> 20} MiB")
    data = file.read(0, file.size_bytes)
    if file.path.suffix == ".bin":
        return read_llama2c_words(file.path, data)
    return read_ranks(file.path, data) if is_ranks(data) else read_sentence_piece(file.path, data)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_special(words: Words, folder: Path, config: dict[str, Any], rows: int) -> None:
    stated = _json(folder / "tokenizer_config.json")
    for text, token_id in _json(folder / "added_tokens.json").items():
        if type(token_id) is int and token_id >= 0:
            words.add(token_id, text, special=words.is_control(token_id, text))
    added = stated.get("added_tokens_decoder")
    for number, token in added.items() if isinstance(added, dict) else ():
        if _NUMBER.fullmatch(number) and isinstance(token, dict) and isinstance(token.get("content"), str):
            words.add(int(number), token["content"], token.get("special") is True)
    _read_parts(words, stated, _json(folder / "special_tokens_map.json"), config)
    _read_ends(words, config, rows)
    suppressed = config.get("suppress_tokens")
    if isinstance(suppressed, list):
        words.suppressed = tuple(token for token in suppressed if type(token) is int and 0 <= token < rows)
    for name in ("bos", "eos"):
        flag = f"add_{name}_token"
        if isinstance(stated.get(flag), bool):
            words.flags.setdefault(flag, stated[flag])
            if words.kind in ("llama", "t5"):
                words.flags[flag] = stated[flag]
    if words.kind == "gpt2":
        words.flags.setdefault("add_bos_token", False)
    if isinstance(stated.get("add_prefix_space"), bool) and words.kind == "llama":
        words.flags["add_space_prefix"] = stated["add_prefix_space"]
    words.templates |= read_templates(folder, stated)


def _read_parts(words: Words, stated: dict[str, Any], named: dict[str, Any], config: dict[str, Any]) -> None:
    """Reads the ids of BOS, EOS and so on. The tokenizer's files take precedence over the model's configuration."""
    places = {text: token_id for token_id, text in enumerate(words.texts)}
    for short, name in _PARTS.items():
        text = _content(stated.get(f"{short}_token")) or _content(named.get(f"{short}_token"))
        token_id = config.get(f"{short}_token_id")
        first = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if text is not None and text in places:
            words.ids[name] = places[text]
        elif type(first) is int and first >= 0:
            words.ids[name] = first


def _read_ends(words: Words, config: dict[str, Any], rows: int) -> None:
    """Reads the tokens, other than EOS, that end an answer."""
    listed = config.get("eos_token_id")
    stated = [config.get("eod_token_id"), *(listed if isinstance(listed, list) else ())]
    # The list is read backwards, because chats use the tokens at its end.
    ends = dict.fromkeys(end for end in reversed(stated) if type(end) is int and 0 <= end < rows)
    known = {words.ids.get(role) for role in ("eos", *_ENDS)}
    others = [end for end in ends if end not in known]
    for role, end in zip([role for role in _ENDS if role not in words.ids], others, strict=False):
        words.ids[role] = end
    words.ends = tuple(others)


def _content(entry: Any) -> str | None:
    found = entry.get("content") if isinstance(entry, dict) else entry
    return found if isinstance(found, str) else None
