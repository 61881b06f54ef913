"""tekken.json, Mistral's own form: an expression to cut by, byte strings by rank, special tokens before them."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import pre_tokenizers

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.values import shown
from llamaclust.model.tokenizers.vocabulary import TokenType
from llamaclust.tools.convert.formats.source_files import read_json
from llamaclust.tools.convert.settings import MAX_WORDS, Settings
from llamaclust.tools.convert.vocabularies.probe import recognised
from llamaclust.tools.convert.vocabularies.ranks import check_ranks, merges_of, spelled
from llamaclust.tools.convert.vocabularies.words import Words

_OLD_SPECIAL: Final = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""What files before the seventh version do not say."""
_PARTS: Final = {"unknown": "<unk>", "bos": "<s>", "eos": "</s>", "padding": "<pad>"}


def read_tekken(path: Path) -> Words:
    """ModelFileError where it is damaged, or cuts text like no pre-tokenizer that is known."""
    said = read_json(path)
    config = Settings(said, str(path)).inner("config")
    count = config.count("default_num_special_tokens", minimum=0, maximum=MAX_WORDS)
    size = config.count("default_vocab_size", minimum=count + 256, maximum=MAX_WORDS)
    special = _special(said, path, count)
    ranks = _ranks(said, path, size - count)
    words = Words(
        kind="gpt2",
        pre=_pre_tokenizer(path, config.text("pattern")),
        origin=path,
        texts=[*special, *spelled(ranks)],
        types=[TokenType.CONTROL] * count + [TokenType.NORMAL] * len(ranks),
        merges=merges_of(ranks, path),
    )
    words.ids |= {part: special.index(text) for part, text in _PARTS.items() if text in special}
    words.flags |= {"add_bos_token": True, "add_eos_token": False}
    return words


def _special(said: dict[str, Any], path: Path, count: int) -> list[str]:
    """By their ids, which come before all others; those that have no part to play are numbered."""
    texts = [f"<SPECIAL_{number}>" for number in range(count)]
    listed = said.get("special_tokens")
    if listed is None:
        listed = [{"rank": rank, "token_str": text} for rank, text in enumerate(_OLD_SPECIAL)]
    for entry in _objects(listed, path, "special_tokens"):
        rank, text = entry.get("rank"), entry.get("token_str")
        if type(rank) is not int or not 0 <= rank < count or not isinstance(text, str):
            raise ModelFileError(f"{path}: the special token {shown(str(text))} has the rank {rank} of {count}")
        texts[rank] = text
    return texts


def _ranks(said: dict[str, Any], path: Path, count: int) -> dict[bytes, int]:
    """The first `count` words; the file may have more than the model."""
    ranks: dict[bytes, int] = {}
    for entry in _objects(said.get("vocab"), path, "vocab"):
        rank, word = entry.get("rank"), entry.get("token_bytes")
        if type(rank) is not int or not isinstance(word, str):
            raise ModelFileError(f"{path}: a word without rank or bytes")
        if rank >= count:
            continue
        try:
            ranks[base64.b64decode(word, validate=True)] = rank
        except (binascii.Error, ValueError):
            raise ModelFileError(f"{path}: the word of rank {rank} is not base64") from None
    if len(ranks) != count:
        raise ModelFileError(f"{path}: {len(ranks)} words, {count} expected")
    check_ranks(path, ranks)
    return ranks


def _pre_tokenizer(path: Path, pattern: str) -> str:
    try:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    except Exception as error:  # noqa: BLE001 - the library has no class of its own
        raise ModelFileError(f"{path}: its pattern is none: {shown(str(error))}") from None
    whole = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    name = recognised(whole, ignore_merges=True, adds_bos=True)
    if name is None:
        raise ModelFileError(f"{path}: its pattern cuts text like none of those that are known")
    return name


def _objects(value: Any, path: Path, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ModelFileError(f"{path}: {name} is no list of objects")
    return value
