"""Finds and reads the tokenizer of a checkpoint, whichever kind it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from llamaclust.core.errors import ModelFileError
from llamaclust.tools.convert.formats.source_files import SourceFile, SourceFiles, read_json
from llamaclust.tools.convert.vocabularies.llama2c import read_llama2c_words
from llamaclust.tools.convert.vocabularies.ranks import is_ranks, read_ranks
from llamaclust.tools.convert.vocabularies.sentence_piece import read_sentence_piece
from llamaclust.tools.convert.vocabularies.special import read_special
from llamaclust.tools.convert.vocabularies.tekken import read_tekken
from llamaclust.tools.convert.vocabularies.tokenizer_json import read_tokenizer_json
from llamaclust.tools.convert.vocabularies.words import Words

_TEKKEN: Final = "tekken.json"
_NAMES: Final = ("tokenizer.model", "tokenizer.json", "qwen.tiktoken", _TEKKEN, "tokenizer.bin")
_MAX_BYTES: Final = 1 << 28


def read_words(files: SourceFiles, place: Path, rows: int, behind: Sequence[str] = ()) -> Words:
    """The vocabulary in a file, or in a folder of Hugging Face's form, for an embedding of `rows` rows.

    `behind`: control words that the model's own program adds behind those of SentencePiece.
    """
    path = _find(place) if place.is_dir() else place
    words = _read(files.open(path))
    if words.kind == "llama":
        for token_id, text in enumerate(behind, len(words.texts)):
            words.add(token_id, text, special=True)
    if place.is_dir():
        config = _json(place / "config.json") | _json(place / "generation_config.json")
        read_special(words, place, config)
    words.fit(rows)
    return words


def _find(folder: Path) -> Path:
    found = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    if found is None:
        raise ModelFileError(f"{folder}: no tokenizer ({', '.join(_NAMES)}); name one with --tokenizer")
    return found


def _read(file: SourceFile) -> Words:
    if file.path.name == _TEKKEN:
        return read_tekken(file.path)
    if file.path.suffix == ".json":
        return read_tokenizer_json(file.path)
    if file.size_bytes > _MAX_BYTES:
        raise file.error(f"{file.size_bytes >> 20} MiB for a tokenizer, at most {_MAX_BYTES >> 20} are read")
    data = file.read(0, file.size_bytes)
    if file.path.suffix == ".bin":
        return read_llama2c_words(file.path, data)
    return read_ranks(file.path, data) if is_ranks(data) else read_sentence_piece(file.path, data)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
