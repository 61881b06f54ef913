"""Converts messages to token ids. Only the template can produce control tokens. The text of a message cannot."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from llamaclust.core.errors import RequestError
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from llamaclust.model.tokenizers.word_finder import WordFinder

GUARD: Final = "\ufdd0"
"""A Unicode noncharacter, which is inserted into control words of user text to hide them from the tokenizer."""
_NAMING: Final = ("role", "type")


class Guard:
    """Inserts GUARD into each of `words` that a text contains. Follows the order of `words`."""

    def __init__(self, words: Sequence[str]) -> None:
        self._places = {word: place for place, word in enumerate(words)}
        self._finder = WordFinder(words)
        self._sorted = sorted(words)
        self._firsts = frozenset(word[0] for word in words)
        self._longest = max(map(len, words), default=1)

    def guarded(self, text: str) -> str:
        hidden = self._hidden(text)
        # Later text could complete a word whose beginning is the end of this text.
        return hidden + GUARD if self._ends_in_start(hidden) else hidden

    def guarded_name(self, name: str) -> str:
        """Guards a key or role. An identifier, such as `user`, changes only if it contains a word to hide."""
        return self._hidden(name) if name.isidentifier() else self.guarded(name)

    def _hidden(self, text: str) -> str:
        if GUARD in text:
            raise RequestError("the messages contain U+FDD0, which is not a valid character; remove it")
        for word in sorted(self._finder.found_in(text), key=self._places.__getitem__):
            text = text.replace(word, word[0] + GUARD + word[1:])
        return text

    def _ends_in_start(self, text: str) -> bool:
        tail = text[-self._longest :]
        return any(self._is_start(tail[place:]) for place, first in enumerate(tail) if first in self._firsts)

    def _is_start(self, text: str) -> bool:
        place = bisect_right(self._sorted, text)
        return place < len(self._sorted) and self._sorted[place].startswith(text)


def guard_messages(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Inserts GUARD into control words and marks (such as <channel|>) in messages. Keeps marks in an assistant's
    content, because templates need them to remove reasoning. Raises RequestError if a message contains GUARD."""
    guard, of_answers = _guard(tokenizer.control_texts), _guard(tokenizer.control_words)
    guarded = [_with_texts(message, guard) for message in messages]
    for message, own in zip(messages, guarded, strict=True):
        if message.get("role") == "assistant" and "content" in message:
            own["content"] = _with_texts(message["content"], of_answers)
    return guarded


@lru_cache(maxsize=8)
def _guard(words: tuple[str, ...]) -> Guard:
    return Guard([word for word in words if len(word) > 1])


def _with_texts(value: Any, guard: Guard) -> Any:
    if isinstance(value, str):
        return guard.guarded(value)
    if isinstance(value, Mapping):
        return {guard.guarded_name(key): _with_field(key, item, guard) for key, item in value.items()}
    return [_with_texts(item, guard) for item in value] if isinstance(value, list | tuple) else value


def _with_field(key: str, value: Any, guard: Guard) -> Any:
    return guard.guarded_name(value) if key in _NAMING and isinstance(value, str) else _with_texts(value, guard)


def encode_chat(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """Returns the token ids of a rendered prompt, including control tokens. BOS is added if the model needs it."""
    return tokenizer.with_bos(encode_text(tokenizer, rendered))


def encode_text(tokenizer: Tokenizer, rendered: str) -> list[int]:
    parts = tokenizer.split_special(rendered, parse_special=True)
    return tokenizer.encode_parts([unguarded(part) if isinstance(part, str) else part for part in parts])


def unguarded(rendered: str) -> str:
    return rendered.replace(GUARD, "")
