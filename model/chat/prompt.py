"""Converts messages to token ids. Only the template can produce control tokens. The text of a message cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from llamaclust.core.errors import RequestError
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from llamaclust.model.tokenizers.word_finder import WordFinder

GUARD: Final = "\ufdd0"
"""A Unicode noncharacter, which is inserted into control words of user text to hide them from the tokenizer."""


class Guard:
    """Hides words in texts. `words` are in the order in which they are replaced."""

    def __init__(self, words: Sequence[str]) -> None:
        self._places = {word: place for place, word in enumerate(words)}
        self._finder = WordFinder(words)
        self._starts = frozenset(word[:length] for word in words for length in range(1, len(word)))
        self._longest = max(map(len, words), default=1) - 1

    def guarded(self, text: str) -> str:
        if GUARD in text:
            raise RequestError("the messages contain U+FDD0, which is not a valid character; remove it")
        for word in sorted(self._finder.found_in(text), key=self._places.__getitem__):
            text = text.replace(word, word[0] + GUARD + word[1:])
        # Later text could complete a word whose beginning is the end of this text.
        ends = (text[-length:] for length in range(1, min(self._longest, len(text)) + 1))
        return text + GUARD if any(end in self._starts for end in ends) else text


def guard_messages(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Inserts GUARD into every control word of the messages. The marks in an answer's text stay, because templates
    remove its reasoning by them. Raises RequestError if a message contains GUARD."""
    guard, of_answers = _guard(tokenizer.control_texts), _guard(tokenizer.control_words)
    guarded = [_with_texts(message, guard.guarded) for message in messages]
    for message, own in zip(messages, guarded, strict=True):
        if message.get("role") == "assistant" and "content" in message:
            own["content"] = _with_texts(message["content"], of_answers.guarded)
    return guarded


@lru_cache(maxsize=8)
def _guard(words: tuple[str, ...]) -> Guard:
    return Guard([word for word in words if len(word) > 1])


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
