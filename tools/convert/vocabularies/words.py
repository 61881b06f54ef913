from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.values import shown
from llamaclust.model.gguf.writer import WritableValue
from llamaclust.model.tokenizers.vocabulary import END_OF_GENERATION_TEXTS, SUPPRESSED, TokenType, key
from llamaclust.tools.convert.settings import MAX_WORDS
from llamaclust.tools.convert.vocabularies.templates import DEFAULT

ADDED_SCORE: Final = -1000.0
_TEMPLATE: Final = "tokenizer.chat_template"
_PADDING_SCORE: Final = -10000.0
_MOST_NAMED: Final = 8
_FREE_ROWS: Final = 256
_FREE_SHARE: Final = 0.05
_MARKED_CONTROL: Final = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


@dataclass(slots=True)
class Words:
    """A vocabulary. `kind` is GGUF's `tokenizer.ggml.model`. SentencePiece has `scores`, and BPE has `merges`."""

    kind: str
    pre: str
    origin: Path
    texts: list[str]
    types: list[TokenType]
    scores: list[float] | None = None
    merges: list[str] | None = None
    ids: dict[str, int] = field(default_factory=dict)
    """Ids of special tokens, by role: bos, eos, eot, unknown, padding, ..."""
    flags: dict[str, bool] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    """Ids of tokens, other than EOS, that end an answer. Some of these tokens may have no role."""
    suppressed: tuple[int, ...] = ()
    """Ids of tokens that are never generated."""
    templates: dict[str, str] = field(default_factory=dict)
    """Chat templates by name. The name of a model's only template is `default`."""
    charsmap: bytes = b""

    def add(self, token_id: int, text: str, special: bool) -> None:
        """Adds a control or user-defined token, or replaces the token with this id. Keeps the unknown token."""
        if token_id == self.ids.get("unknown"):
            return
        if not 0 <= token_id < MAX_WORDS:
            raise ModelFileError(f"{self.origin}: token {shown(text)} has id {token_id}, expected 0 to {MAX_WORDS - 1}")
        while len(self.texts) <= token_id:
            self._append(f"[PAD{len(self.texts)}]", TokenType.UNUSED, _PADDING_SCORE)
        control = special or _looks_special(text)
        self.texts[token_id] = text if control else text.replace("▁", " ")
        self.types[token_id] = TokenType.CONTROL if control else TokenType.USER_DEFINED
        if self.scores is not None:
            self.scores[token_id] = ADDED_SCORE

    def is_control(self, token_id: int, text: str) -> bool:
        known = 0 <= token_id < len(self.texts) and self.texts[token_id] == text
        return known and self.types[token_id] is TokenType.CONTROL

    def fit(self, rows: int) -> None:
        """Adds or drops unused tokens until there are `rows` tokens. Raises ModelFileError if the number of tokens
        is so far from `rows` that the vocabulary must belong to another model."""
        while len(self.texts) > rows and self.types[-1] is TokenType.UNUSED:
            self._drop()
        count = len(self.texts)
        if count > rows:
            more = f"there are {count} tokens, but the embedding has {rows} rows"
            raise ModelFileError(f"{self.origin}: {more}: use the tokenizer that belongs to the model")
        if rows - count > max(_FREE_ROWS, rows * _FREE_SHARE):
            fewer = f"there are only {count} tokens, but the embedding has {rows} rows"
            raise ModelFileError(f"{self.origin}: {fewer}: use the tokenizer that belongs to the model")
        for number in range(count, rows):
            self._append(f"[PAD{number}]", TokenType.UNUSED, _PADDING_SCORE)
        self.ids = {name: token_id for name, token_id in self.ids.items() if 0 <= token_id < rows}

    @property
    def notes(self) -> tuple[str, ...]:
        """Advice for the user about end-of-answer tokens for which GGUF has no key."""
        written = self.ids.values()
        left = [shown(self.texts[end]) for end in self.ends if end not in written and not self._ends_by_text(end)]
        if not left:
            return ()
        named = ", ".join(left[:_MOST_NAMED]) + (", ..." if len(left) > _MOST_NAMED else "")
        return (f"GGUF has keys for only 3 tokens that end an answer; give requests {named} as `stop`",)

    def _ends_by_text(self, token_id: int) -> bool:
        return self.texts[token_id] in END_OF_GENERATION_TEXTS

    def metadata(self) -> dict[str, WritableValue]:
        self._check_distinct()
        found: dict[str, WritableValue] = {key("model"): self.kind, key("pre"): self.pre, key("tokens"): self.texts}
        if self.scores is not None:
            found[key("scores")] = np.array(self.scores, np.float32)
        found[key("token_type")] = np.array(self.types, np.int32)
        if self.merges is not None and self.kind != "llama":
            found[key("merges")] = self.merges
        if self.charsmap:
            found[key("precompiled_charsmap")] = np.frombuffer(self.charsmap, np.uint8)
        found |= {key(f"{name}_token_id"): token_id for name, token_id in self.ids.items()}
        found |= {key(name): value for name, value in self.flags.items()}
        if self.suppressed:
            found[key(SUPPRESSED)] = np.array(self.suppressed, np.int32)
        others = [name for name in self.templates if name != DEFAULT]
        found |= {f"{_TEMPLATE}.{name}": self.templates[name] for name in others}
        if DEFAULT in self.templates:
            found[_TEMPLATE] = self.templates[DEFAULT]
        if others:
            found["tokenizer.chat_templates"] = others
        return found

    def _append(self, text: str, kind: TokenType, score: float) -> None:
        self.texts.append(text)
        self.types.append(kind)
        if self.scores is not None:
            self.scores.append(score)

    def _drop(self) -> None:
        self.texts.pop()
        self.types.pop()
        if self.scores is not None:
            self.scores.pop()

    def _check_distinct(self) -> None:
        first: dict[str, int] = {}
        for token_id, text in enumerate(self.texts):
            if first.setdefault(text, token_id) != token_id:
                again = f"{shown(text)} occurs twice, as {first[text]} and as {token_id}"
                raise ModelFileError(f"{self.origin}: {again}")


def _looks_special(text: str) -> bool:
    """Returns True if `text` looks like a control token. Some tokenizers do not mark their control tokens."""
    marks = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in _MARKED_CONTROL or any(text.startswith(left) and text.endswith(right) for left, right in marks)
