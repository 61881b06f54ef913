"""Lists of byte strings with ranks, as tiktoken keeps them (Llama 3, Qwen): the merges follow from the ranks."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.byte_pairs import stand_ins
from llamaclust.model.tokenizers.vocabulary import TokenType
from llamaclust.tools.convert.vocabularies.words import Words

_MOST_WORDS: Final = 1 << 20
_MOST_BYTES: Final = 1 << 10  # of a word: Llama 3's longest has 128
_MOST_PAIRS: Final = 1 << 26  # sum of squares of lengths, which finding merges takes; Llama 3 has 1 << 23
_LLAMA3_WORDS: Final = 128_000
_GLM4_WORDS: Final = 151_329
_LLAMA3_SPECIAL: Final = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_LETTERS: Final = {byte[0]: letter for letter, byte in stand_ins().items()}
_QWEN_SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))


def is_ranks(data: bytes) -> bool:
    """Whether a file begins with a line of base64 and a number."""
    word, _, rank = data[:512].split(b"\n", 1)[0].partition(b" ")
    try:
        return bool(word) and rank.strip().isdigit() and bool(base64.b64decode(word, validate=True))
    except binascii.Error:
        return False


def read_ranks(path: Path, data: bytes) -> Words:
    """Words, merges, and the control tokens that the model's own program adds behind them."""
    ranks = _parse(path, data)
    texts = spelled(ranks)
    pre = _model_of(path, len(texts))
    llama = pre == "llama-bpe"
    words = Words(
        kind="gpt2",
        pre=pre,
        origin=path,
        texts=texts,
        types=[TokenType.NORMAL] * len(texts),
        merges=merges_of(ranks, path),
    )
    words.flags["add_bos_token"] = llama
    if pre == "chatglm-bpe":  # tokenizer_config.json beside it has the others
        return words
    _add_special(words, _llama3_special() if llama else _QWEN_SPECIAL)
    names = ("<|begin_of_text|>", "<|end_of_text|>") if llama else ("<|endoftext|>", "<|endoftext|>")
    words.ids |= {part: words.texts.index(name) for part, name in zip(("bos", "eos"), names, strict=True)}
    if llama:
        words.ids["eot"] = words.texts.index("<|eot_id|>")
    return words


def spelled(ranks: Mapping[bytes, int]) -> list[str]:
    """Words by rank, in the letters that stand for bytes."""
    return [_spell(word) for word in sorted(ranks, key=ranks.__getitem__)]


def merges_of(ranks: Mapping[bytes, int], path: Path) -> list[str]:
    """The merges that make the words, by rank; ModelFileError where none lead to one of them."""
    pairs = (_split(word, ranks, path) for word in sorted(ranks, key=ranks.__getitem__) if len(word) > 1)
    return [f"{_spell(left)} {_spell(right)}" for left, right in pairs]


def _spell(word: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in word)


def _model_of(path: Path, count: int) -> str:
    """How the model cuts text, which such files do not say."""
    if path.suffix == ".tiktoken":
        return "qwen2"
    known = {_LLAMA3_WORDS: "llama-bpe", _GLM4_WORDS: "chatglm-bpe"}
    if count not in known:
        listed = f"Llama 3 has {_LLAMA3_WORDS}, GLM-4 {_GLM4_WORDS}"
        raise ModelFileError(f"{path}: {count} ranks; {listed}, others are not known")
    return known[count]


def _parse(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        word, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except ValueError:
            raise ModelFileError(f"{path}: line {number} is not a word in base64 and its rank") from None
    check_ranks(path, ranks)
    return ranks


def check_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    """ModelFileError where they are not numbered from 0 on, or cannot write every text."""
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) > _MOST_WORDS:
        raise ModelFileError(f"{path}: its {len(ranks)} ranks are not the numbers from 0 on, each once")
    if max(map(len, ranks)) > _MOST_BYTES:
        raise ModelFileError(f"{path}: a word of {max(map(len, ranks))} bytes, {_MOST_BYTES} at most")
    if sum(len(word) ** 2 for word in ranks) > _MOST_PAIRS:
        raise ModelFileError(f"{path}: its {len(ranks)} words are too long to find their merges")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ModelFileError(f"{path}: not all 256 bytes are words")


def _split(word: bytes, ranks: Mapping[bytes, int], path: Path) -> tuple[bytes, bytes]:
    """The last two parts that merging by rank makes of a word before it is whole."""
    parts = [word[place : place + 1] for place in range(len(word))]
    own = ranks[word]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, own) for left, right in pairwise(parts)]
        best = min(pairs)
        if best >= own:
            raise ModelFileError(f"{path}: no merges lead to the word of rank {own}")
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _llama3_special() -> tuple[str, ...]:
    """256 in all, the rest reserved."""
    reserved = range(2, 2 + 256 - len(_LLAMA3_SPECIAL))
    return (*_LLAMA3_SPECIAL, *(f"<|reserved_special_token_{number}|>" for number in reserved))


def _add_special(words: Words, names: tuple[str, ...]) -> None:
    first = len(words.texts)
    for number, name in enumerate(names):
        words.add(first + number, name, special=True)
