"""Unigrams as Hugging Face's library keeps them in tokenizer.json: SentencePiece's pieces and map of characters, with
what is done to spaces said in steps of its own. Whether those steps are SentencePiece's is told by what they make of a
text."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any, Final

import tokenizers

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.values import shown
from llamaclust.model.tokenizers.charsmap import check_charsmap
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.vocabulary import TokenType
from llamaclust.tools.convert.vocabularies.probe import PROBE
from llamaclust.tools.convert.vocabularies.words import Words

_TEXTS: Final = ("a", " a", "  a  b ", " ", "a \n b", "\n a\t", *PROBE.splitlines())
_BYTES: Final = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def read_unigrams(path: Path, model: dict[str, Any], steps: list[dict[str, Any]], spaces: dict[str, Any]) -> Words:
    """`steps` normalize, `spaces` cuts. ModelFileError for entries that are none, without a way to write all texts."""
    entries = model.get("vocab")
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise ModelFileError(f"{path}: vocab is no list of words with their scores")
    texts = [entry[0] for entry in entries]
    in_bytes = model.get("byte_fallback") is True
    types = [TokenType.BYTE if in_bytes and text in _BYTES else TokenType.NORMAL for text in texts]
    words = Words(
        kind="t5",
        pre="default",
        origin=path,
        texts=texts,
        types=types,
        scores=[float(entry[1]) for entry in entries],
        charsmap=_charsmap(path, steps),
    )
    unknown = model.get("unk_id")
    if type(unknown) is not int or not 0 <= unknown < len(texts):
        raise ModelFileError(f"{path}: no piece for unknown text")
    words.ids["unknown"] = unknown
    types[unknown] = TokenType.UNKNOWN
    scheme = spaces.get("prepend_scheme", "always" if spaces.get("add_prefix_space", True) else "never")
    words.flags = {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_space_prefix": scheme != "never",
        "remove_extra_whitespaces": any(step.get("type") == "Replace" and "{2,}" in str(step) for step in steps),
    }
    return words


def check_alike(words: Words, library: tokenizers.Tokenizer) -> None:
    """ModelFileError where SentencePiece's way to do it gives other tokens than the library's."""
    own = load_tokenizer(words.metadata())
    for text in _TEXTS:
        if own.encode(text, add_special=False) != library.encode(text, add_special_tokens=False).ids:
            raise ModelFileError(f"{words.origin}: it cuts {shown(text[:40])} otherwise than SentencePiece would")


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], int | float)
        and abs(entry[1]) < 1e30
    )


def _charsmap(path: Path, steps: list[dict[str, Any]]) -> bytes:
    said = next((step.get("precompiled_charsmap") for step in steps if step.get("type") == "Precompiled"), None)
    if said is None:
        return b""
    try:
        data = base64.b64decode(said, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise ModelFileError(f"{path}: its map of characters is not base64") from None
    check_charsmap(data, f"{path}: its map of characters")
    return data
