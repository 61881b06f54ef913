"""Adds data that vocabulary files of some architectures lack, such as the end-of-turn token."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.vocabulary import GEMMA4_VISIBLE, TokenType
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.vocabularies.reading import NAMES, read_words
from llamaclust.tools.convert.vocabularies.words import Words

_CHATGLM_TURN: Final = "<|user|>"
_CHATGLM_WORDS: Final = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", _CHATGLM_TURN, "<|assistant|>", "<|observation|>"),
)
_GLM_PARTS: Final = {
    "chatglm": {"eot": _CHATGLM_TURN},
    "glm4": {"eot": _CHATGLM_TURN},
    "glm4moe": {"bos": "[gMASK]", "eot": _CHATGLM_TURN, "eom": "<|observation|>", "unknown": "<|endoftext|>"},
}
"""Special tokens by role, for models whose files do not state the roles."""
_HUNYUAN_BOS: Final = {"hunyuan-dense": "<|startoftext|>", "hunyuan-moe": "<|bos|>"}
"""BOS tokens of Hunyuan's tiktoken files, which take precedence over the ids in the configurations."""
_GEMMA4: Final = "gemma4"
_LIBRARY_FILE: Final = "tokenizer.json"


def vocabulary_of(architecture: str, files: SourceFiles, place: Path, rows: int) -> Words:
    """Reads the vocabulary at `place`. Raises ModelFileError if it does not fit an embedding of `rows` rows."""
    behind = _CHATGLM_WORDS if architecture == "chatglm" else ()
    names = (_LIBRARY_FILE,) if architecture == _GEMMA4 else NAMES
    words = read_words(files, place, rows, behind, names)
    if architecture in _GLM_PARTS:
        words.flags["add_bos_token"] = False
        for part, text in _GLM_PARTS[architecture].items():
            if text in words.texts:
                words.ids[part] = words.texts.index(text)
    if words.pre == "hunyuan" and architecture in _HUNYUAN_BOS:
        words.ids["bos"] = words.texts.index(_HUNYUAN_BOS[architecture])
    if architecture.startswith("gemma") and words.kind == "llama":
        if architecture == _GEMMA4:
            _become_gemma4(words)
        words.flags["add_space_prefix"] = False
    return words


def _become_gemma4(words: Words) -> None:
    """Turns a SentencePiece vocabulary into gemma4's BPE, which needs the merges of tokenizer.json."""
    if not words.merges:
        raise ModelFileError(f"{words.origin}: has no merges; gemma4 needs the merges of {_LIBRARY_FILE}")
    if words.flags["add_space_prefix"]:
        raise ModelFileError(f"{words.origin}: the vocabulary puts a space before a text, but gemma4 does not")
    words.kind = _GEMMA4
    words.flags["add_bos_token"] = True
    for token_id, text in enumerate(words.texts):
        if text in GEMMA4_VISIBLE:
            words.types[token_id] = TokenType.USER_DEFINED
