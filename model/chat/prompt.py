"""Converts messages to token ids. Only the template can produce control tokens. The text of a message cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from llamaclust.core.errors import RequestError
from llamaclust.model.tokenizers.tokenizer import Tokenizer

GUARD: Final = "\ufdd0"
"""A Unicode noncharacter, which is inserted into control words of user text to hide them from the tokenizer."""


def guard_messages(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Inserts GUARD into every control word of the messages. Raises RequestError if a message contains GUARD."""
    words = tuple(text for text in tokenizer.control_texts if len(text) > 1)
    starts = _starts_of(words)
    longest = max(map(len, words), default=1) - 1

    def guarded(text: str) -> str:
        if GUARD in text:
            raise RequestError("the messages contain U+FDD0, which is not a valid character; remove it")
        return _guard_end(_guard_words(text, words), starts, longest)

    return [_with_texts(message, guarded) for message in messages]


def _with_texts(value: Any, changed: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return changed(value)
    if isinstance(value, Mapping):
        return {_with_texts(key, changed): _with_texts(item, changed) for key, item in value.items()}
    return [_with_texts(item, changed) for item in value] if isinstance(value, list | tuple) else value


def encode_chat(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """Returns the token ids of a rendered prompt, including control tokens. BOS is added if the model needs it."""
    ids = encode_text(tokenizer, rendered)
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        return [tokenizer.bos_id, *ids]
    return ids


def encode_text(tokenizer: Tokenizer, rendered: str) -> list[int]:
    parts = tokenizer.split_special(rendered, parse_special=True)
    return tokenizer.encode_parts([unguarded(part) if isinstance(part, str) else part for part in parts])


def unguarded(rendered: str) -> str:
    return rendered.replace(GUARD, "")


@lru_cache(maxsize=8)
def _starts_of(words: tuple[str, ...]) -> frozenset[str]:
    return frozenset(word[:length] for word in words for length in range(1, len(word)))


def _guard_words(text: str, words: Sequence[str]) -> str:
    for word in words:
        if word in text:
            text = text.replace(word, word[0] + GUARD + word[1:])
    return text


def _guard_end(text: str, starts: frozenset[str], longest: int) -> str:
    """Appends GUARD if the text ends with the beginning of a control word, which later text could complete."""
    ends = (text[-length:] for length in range(1, min(longest, len(text)) + 1))
    return text + GUARD if any(end in starts for end in ends) else text
