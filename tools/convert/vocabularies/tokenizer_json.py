"""Reads Hugging Face's tokenizer.json with byte-level BPE, or with the BPE or Unigram of a SentencePiece model."""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any, Final

import tokenizers

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.json_file import read_json
from llamaclust.model.gguf.values import shown
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.sentence_pieces import check_charsmap
from llamaclust.model.tokenizers.vocabulary import TokenType
from llamaclust.tools.convert.settings import MAX_WORDS
from llamaclust.tools.convert.vocabularies.probe import PROBE, recognised
from llamaclust.tools.convert.vocabularies.words import Words

_HARMLESS: Final = ("NFC", "NFKC")
"""Normalizers that are ignored, because they do not change usual text and GGUF has no key for them."""
_TEXTS: Final = ("a", " a", "  a  b ", " ", "a \n b", "\n a\t", *PROBE.splitlines())
_BYTES: Final = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def read_tokenizer_json(path: Path) -> Words:
    document = read_json(path)
    model = _object(document.get("model"), path, "model")
    is_unigram = model.get("type") == "Unigram"
    words = _unigrams(path, model, document) if is_unigram else _merged(path, model, document)
    for entry in _list(document.get("added_tokens"), path, "added_tokens"):
        _add(words, _object(entry, path, "added_tokens"))
    if is_unigram:
        _check_alike(words, _library(path))
    _read_ends(words, document)
    return words


def _merged(path: Path, model: dict[str, Any], document: dict[str, Any]) -> Words:
    texts = _texts(model, path)
    merges = _merges(model, path)
    is_bytes = model.get("byte_fallback") is True and set(texts) >= _BYTES
    return _sentence_pieces(path, texts, merges, document) if is_bytes else _byte_level(path, texts, merges, document)


def _texts(model: dict[str, Any], path: Path) -> list[str]:
    """Returns the words by id. An id without a word belongs to an added token, and gets a placeholder."""
    if model.get("type", "BPE") != "BPE":
        raise ModelFileError(
            f"{path}: a tokenizer of kind {shown(str(model.get('type')))} is not supported; supported: BPE, Unigram"
        )
    vocabulary = _object(model.get("vocab"), path, "vocab")
    ids = list(vocabulary.values())
    if not ids or not all(type(token_id) is int and 0 <= token_id < MAX_WORDS for token_id in ids):
        raise ModelFileError(
            f"{path}: the vocabulary is empty, or has ids that are not whole numbers below {MAX_WORDS}"
        )
    if len(set(ids)) != len(ids):
        raise ModelFileError(f"{path}: two words of the vocabulary have the same id")
    texts = [f"[PAD{number}]" for number in range(max(ids) + 1)]
    for text, token_id in vocabulary.items():
        texts[token_id] = text
    return texts


def _merges(model: dict[str, Any], path: Path) -> list[tuple[str, str]]:
    found = []
    for merge in _list(model.get("merges"), path, "merges"):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise ModelFileError(f"{path}: the merge {shown(str(merge))} is not a pair of words")
        found.append((pair[0], pair[1]))
    return found


def _byte_level(path: Path, texts: list[str], merges: list[tuple[str, str]], document: dict[str, Any]) -> Words:
    normalizers = _parts(document.get("normalizer"), "normalizers")
    strange = next((entry.get("type") for entry in normalizers if entry.get("type") not in _HARMLESS), None)
    if strange is not None:
        raise ModelFileError(f"{path}: the normalizer {shown(str(strange))} is not supported for byte-level BPE")
    name = _pre_tokenizer_name(_library(path), document)
    if name is None:
        raise ModelFileError(
            f"{path}: the pre-tokenizer splits text unlike any known pre-tokenizer (docs/models.md lists them); "
            "a converted file would give wrong tokens"
        )
    return Words(
        kind="gpt2",
        pre=name,
        origin=path,
        texts=texts,
        types=[TokenType.NORMAL] * len(texts),
        merges=[f"{left} {right}" for left, right in merges],
        flags={"add_bos_token": False} if _has_template(document) else {},
    )


def _pre_tokenizer_name(library: Any, document: dict[str, Any]) -> str | None:
    ignores_merges, has_bos = document["model"].get("ignore_merges") is True, _template_ends(document)[0] is not None
    name = recognised(library.pre_tokenizer, ignores_merges, has_bos)
    if name is not None:
        return name
    # If merges produce every word, `ignore_merges` makes no difference.
    name = recognised(library.pre_tokenizer, not ignores_merges, has_bos)
    return name if name is not None and _merges_reach_words(library, document) else None


def _merges_reach_words(library: Any, document: dict[str, Any]) -> bool:
    added = {entry.get("content") for entry in document.get("added_tokens") or () if isinstance(entry, dict)}
    model = library.model
    model.ignore_merges = False
    return all(len(model.tokenize(word)) == 1 for word in document["model"]["vocab"] if word not in added)


def _library(path: Path) -> Any:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - The library raises plain Exception.
        raise ModelFileError(f"{path}: not usable as a tokenizer: {' '.join(str(error).split())[:160]}") from None
    if tokenizer.pre_tokenizer is None:
        raise ModelFileError(f"{path}: expected a pre-tokenizer, or BPE with byte_fallback and a token for each byte")
    return tokenizer


def _sentence_pieces(path: Path, texts: list[str], merges: list[tuple[str, str]], document: dict[str, Any]) -> Words:
    """Returns SentencePiece's words. The score of a word is higher if the merge that produces it comes earlier."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    types = [TokenType.BYTE if text in _BYTES else TokenType.NORMAL for text in texts]
    worst = float(len(merges))
    scores = [
        0.0 if kind is TokenType.BYTE else -float(ranks.get(text, worst))
        for text, kind in zip(texts, types, strict=True)
    ]
    words = Words(
        kind="llama",
        pre="default",
        origin=path,
        texts=texts,
        types=types,
        scores=scores,
        merges=[f"{left} {right}" for left, right in merges],
    )
    unknown = document["model"].get("unk_token")
    if isinstance(unknown, str) and unknown in texts:
        words.ids["unknown"] = texts.index(unknown)
        types[words.ids["unknown"]] = TokenType.UNKNOWN
    normalizers = json.dumps([document.get("normalizer"), document.get("pre_tokenizer")])
    prepends = '"Prepend"' in normalizers or '"prepend_scheme": "first"' in normalizers
    words.flags["add_space_prefix"] = prepends or '"prepend_scheme": "always"' in normalizers
    return words


def _add(words: Words, entry: dict[str, Any]) -> None:
    token_id, text = entry.get("id"), entry.get("content")
    if type(token_id) is not int or not isinstance(text, str):
        raise ModelFileError(f"{words.origin}: an added token has no id or no content")
    words.add(token_id, text, entry.get("special") is True)


def _read_ends(words: Words, document: dict[str, Any]) -> None:
    first, last = _template_ends(document)
    if first in words.texts:
        words.ids.setdefault("bos", words.texts.index(first))
        words.flags["add_bos_token"] = True
    if last in words.texts:
        words.ids.setdefault("eos", words.texts.index(last))
        words.flags["add_eos_token"] = True


def _has_template(document: dict[str, Any]) -> bool:
    processors = _parts(document.get("post_processor"), "processors")
    return any(processor.get("type") == "TemplateProcessing" for processor in processors)


def _template_ends(document: dict[str, Any]) -> tuple[str | None, str | None]:
    for processor in _parts(document.get("post_processor"), "processors"):
        single = processor.get("single")
        if processor.get("type") == "TemplateProcessing" and isinstance(single, list) and len(single) > 1:
            return _special(single[0]), _special(single[-1])
    return None, None


def _special(item: Any) -> str | None:
    token = item.get("SpecialToken") if isinstance(item, dict) else None
    found = token.get("id") if isinstance(token, dict) else None
    return found if isinstance(found, str) else None


def _parts(document: Any, inner: str) -> list[dict[str, Any]]:
    if not isinstance(document, dict):
        return []
    parts = document.get(inner) if document.get("type") == "Sequence" else [document]
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def _list(value: Any, path: Path, name: str) -> list[Any]:
    if not isinstance(value, list | None):
        raise ModelFileError(f"{path}: {name} is not a list")
    return value or []


def _object(value: Any, path: Path, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: {name} is not an object")
    return value


def _unigrams(path: Path, model: dict[str, Any], document: dict[str, Any]) -> Words:
    """Reads SentencePiece's pieces, character map and treatment of spaces from tokenizer.json. Raises
    ModelFileError if an entry is malformed, or if the piece for unknown text is missing."""
    steps = _parts(document.get("normalizer"), "normalizers")
    cutters = _parts(document.get("pre_tokenizer"), "pretokenizers")
    spaces = next((cutter for cutter in cutters if cutter.get("type") == "Metaspace"), {"prepend_scheme": "never"})
    entries = model.get("vocab")
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise ModelFileError(f"{path}: vocab is not a list of words with their scores")
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
        raise ModelFileError(f"{path}: the piece for unknown text is missing")
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


def _check_alike(words: Words, library: tokenizers.Tokenizer) -> None:
    own = load_tokenizer(words.metadata())
    for text in _TEXTS:
        if own.encode(text, add_special=False) != library.encode(text, add_special_tokens=False).ids:
            raise ModelFileError(f"{words.origin}: the tokenizer splits {shown(text[:40])} unlike SentencePiece")


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], int | float)
        and abs(entry[1]) < 1e30
    )


def _charsmap(path: Path, steps: list[dict[str, Any]]) -> bytes:
    document = next((step.get("precompiled_charsmap") for step in steps if step.get("type") == "Precompiled"), None)
    if document is None:
        return b""
    try:
        data = base64.b64decode(document, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise ModelFileError(f"{path}: the map of characters is not base64") from None
    check_charsmap(data, f"{path}: its map of characters")
    return data
