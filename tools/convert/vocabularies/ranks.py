"""Reads byte strings with ranks: tiktoken files (Llama 3, GLM-4, Qwen, Hunyuan, Kimi), and Mistral's tekken.json."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import pre_tokenizers

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.json_file import read_json
from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.gguf.values import shown
from llamaclust.model.tokenizers.byte_pairs import stand_ins
from llamaclust.model.tokenizers.vocabulary import TokenType
from llamaclust.tools.convert.settings import MAX_WORDS
from llamaclust.tools.convert.vocabularies.probe import recognised
from llamaclust.tools.convert.vocabularies.words import Words

_MOST_WORDS: Final = 1 << 20
_MOST_BYTES: Final = 1 << 10  # Maximum bytes of a word. The longest word of Llama 3 has 128.
# Maximum sum of squared word lengths. It limits the time to find merges. For Llama 3, the sum is 1 << 23.
_MOST_PAIRS: Final = 1 << 26
_LLAMA3_WORDS: Final = 128_000
_GLM4_WORDS: Final = 151_329
_KIMI_WORDS: Final = 163_584
_LLAMA3_SPECIAL: Final = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{number}|>" for number in range(2, 247)),
)
_LETTERS: Final = {byte[0]: letter for letter, byte in stand_ins().items()}
_EXTRA: Final = tuple(f"<|extra_{number}|>" for number in range(205))
_QWEN_SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *_EXTRA)
_HUNYUAN_SPECIAL: Final = ("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>", *_EXTRA)
_HUNYUAN_FILE: Final = "hy.tiktoken"
_BEHIND: Final = {
    "llama-bpe": (_LLAMA3_SPECIAL, {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "eot": "<|eot_id|>"}),
    "qwen2": (_QWEN_SPECIAL, {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}),
    "hunyuan": (_HUNYUAN_SPECIAL, {"bos": "<|startoftext|>", "eos": "<|eos|>", "padding": "<|pad|>"}),
}
"""Maps a pre-tokenizer to the control tokens that follow the file's words, and to the roles of some tokens."""
_OLD_SPECIAL: Final = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""Special tokens of tekken.json files before version 7, which do not list their special tokens."""
_PARTS: Final = {"unknown": "<unk>", "bos": "<s>", "eos": "</s>", "padding": "<pad>"}


def is_ranks(data: bytes) -> bool:
    word, _, rank = data[:512].split(b"\n", 1)[0].partition(b" ")
    try:
        return bool(word) and rank.strip().isdigit() and bool(base64.b64decode(word, validate=True))
    except binascii.Error:
        return False


def read_ranks(path: Path, data: bytes) -> Words:
    """Reads words and merges of a tiktoken file, and adds the model's control tokens."""
    ranks = _parse(path, data)
    texts = spelled(ranks)
    pre = _model_of(path, len(texts))
    types = [TokenType.NORMAL] * len(texts)
    words = Words(kind="gpt2", pre=pre, origin=path, texts=texts, types=types, merges=merges_of(ranks, path))
    words.flags["add_bos_token"] = pre == "llama-bpe"
    special, parts = _BEHIND.get(pre, ((), {}))
    for token_id, text in enumerate(special, len(texts)):
        words.add(token_id, text, special=True)
    words.ids |= {part: words.texts.index(text) for part, text in parts.items()}
    return words


def spelled(ranks: Mapping[bytes, int]) -> list[str]:
    """Returns the words in order of rank. Each byte becomes the letter that stands for it in byte-level BPE."""
    return [_spell(word) for word in sorted(ranks, key=ranks.__getitem__)]


def merges_of(ranks: Mapping[bytes, int], path: Path) -> list[str]:
    """Returns a merge for each word of several bytes, in order of rank. Raises ModelFileError if a word has none."""
    pairs = (_split(word, ranks, path) for word in sorted(ranks, key=ranks.__getitem__) if len(word) > 1)
    return [f"{_spell(left)} {_spell(right)}" for left, right in pairs]


def _spell(word: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in word)


def _model_of(path: Path, count: int) -> str:
    if path.suffix == ".tiktoken":
        return "hunyuan" if path.name == _HUNYUAN_FILE else "qwen2"
    known = {_LLAMA3_WORDS: "llama-bpe", _GLM4_WORDS: "chatglm-bpe", _KIMI_WORDS: "kimi-k2"}
    if count not in known:
        listed = f"Llama 3 has {_LLAMA3_WORDS}, GLM-4 {_GLM4_WORDS}, Kimi {_KIMI_WORDS}"
        raise ModelFileError(f"{path}: {count} ranks fit no known tokenizer; {listed}")
    return known[count]


def _parse(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        word, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except ValueError:
            raise ModelFileError(f"{path}: line {number}: expected a word in base64, a space and a rank") from None
    check_ranks(path, ranks)
    return ranks


def check_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    """Raises ModelFileError if ranks have gaps, if a byte has no rank, or if words are too long or too many."""
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) > _MOST_WORDS:
        raise ModelFileError(f"{path}: the {len(ranks)} ranks are not consecutive from 0, or exceed {_MOST_WORDS}")
    if max(map(len, ranks)) > _MOST_BYTES:
        raise ModelFileError(f"{path}: a word has {max(map(len, ranks))} bytes; the limit is {_MOST_BYTES}")
    if sum(len(word) ** 2 for word in ranks) > _MOST_PAIRS:
        raise ModelFileError(f"{path}: the {len(ranks)} words are too long to compute their merges")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ModelFileError(f"{path}: not all 256 bytes are words")


def _split(word: bytes, ranks: Mapping[bytes, int], path: Path) -> tuple[bytes, bytes]:
    parts = [word[place : place + 1] for place in range(len(word))]
    own = ranks[word]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, own) for left, right in pairwise(parts)]
        best = min(pairs)
        if best >= own:
            raise ModelFileError(f"{path}: no merges produce the word of rank {own}")
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def read_tekken(path: Path) -> Words:
    document = read_json(path)
    config = Settings(document, str(path)).inner("config")
    count = config.count("default_num_special_tokens", minimum=0, maximum=MAX_WORDS)
    size = config.count("default_vocab_size", minimum=count + 256, maximum=MAX_WORDS)
    special = _special(document, path, count)
    ranks = _ranks(document, path, size - count)
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


def _special(document: dict[str, Any], path: Path, count: int) -> list[str]:
    """Returns the texts of special tokens in order of id, from id 0. A token without a text gets a placeholder."""
    texts = [f"<SPECIAL_{number}>" for number in range(count)]
    listed = document.get("special_tokens")
    if listed is None:
        listed = [{"rank": rank, "token_str": text} for rank, text in enumerate(_OLD_SPECIAL)]
    for entry in _objects(listed, path, "special_tokens"):
        rank, text = entry.get("rank"), entry.get("token_str")
        if type(rank) is not int or not 0 <= rank < count or not isinstance(text, str):
            raise ModelFileError(
                f"{path}: the special token {shown(str(text))} has rank {rank}, expected a rank below {count}"
            )
        texts[rank] = text
    return texts


def _ranks(document: dict[str, Any], path: Path, count: int) -> dict[bytes, int]:
    """Returns the words with ranks below `count`. The file may have more words than the model."""
    ranks: dict[bytes, int] = {}
    for entry in _objects(document.get("vocab"), path, "vocab"):
        rank, word = entry.get("rank"), entry.get("token_bytes")
        if type(rank) is not int or not isinstance(word, str):
            raise ModelFileError(f"{path}: a word has no rank or no bytes")
        if rank >= count:
            continue
        try:
            ranks[base64.b64decode(word, validate=True)] = rank
        except (binascii.Error, ValueError):
            raise ModelFileError(f"{path}: the word of rank {rank} is not base64") from None
    if len(ranks) != count:
        raise ModelFileError(f"{path}: expected {count} words, found {len(ranks)}")
    check_ranks(path, ranks)
    return ranks


def _pre_tokenizer(path: Path, pattern: str) -> str:
    try:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    except Exception as error:  # noqa: BLE001 - The library raises plain Exception.
        raise ModelFileError(f"{path}: invalid pattern: {shown(str(error))}") from None
    whole = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    name = recognised(whole, ignore_merges=True, adds_bos=True)
    if name is None:
        raise ModelFileError(f"{path}: the pattern splits text unlike any known pre-tokenizer")
    return name


def _objects(value: Any, path: Path, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ModelFileError(f"{path}: {name} is not a list of objects")
    return value
