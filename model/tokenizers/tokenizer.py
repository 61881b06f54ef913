"""Converts text to token ids, and token ids to text, as a whole or as a stream."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

from llamaclust.core.errors import RequestError
from llamaclust.model.tokenizers.vocabulary import TokenType, Vocabulary
from llamaclust.model.tokenizers.word_finder import WordFinder

CONTROL_TYPES = (TokenType.CONTROL, TokenType.UNKNOWN)
_NOT_SPELLED = frozenset((*CONTROL_TYPES, TokenType.USER_DEFINED, TokenType.BYTE))
"""Types of tokens whose words are literal text. Words of other types are encoded, for example with ▁ for a space."""

_WHITE_SPACE = " \t\n\v\f\r"


class Tokenizer(ABC):
    """A model's tokenizer. Thread-safe. Ids outside the vocabulary raise RequestError. `longest_word` is in characters.
    `end_of_generation` has the file's eos, eot and eom tokens, and tokens whose text is a known end marker."""

    def __init__(self, vocabulary: Vocabulary, *, add_bos: bool, add_eos: bool, add_space_prefix: bool) -> None:
        self.vocabulary = vocabulary
        self.vocabulary_size = len(vocabulary)
        self.longest_word = max(map(len, vocabulary.words))
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.end_of_generation = vocabulary.end_of_generation
        self.add_bos = add_bos and self.bos_id is not None
        self.add_eos = add_eos and self.eos_id is not None
        self.add_space_prefix = add_space_prefix
        self._user_defined = SpecialTokens(vocabulary, TokenType.USER_DEFINED)
        self._special = SpecialTokens(vocabulary, TokenType.USER_DEFINED, *CONTROL_TYPES)
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def control_words(self) -> tuple[str, ...]:
        """The texts of control tokens, longest first."""
        return tuple(text for text, token_id in self._special.ids.items() if self.is_control(token_id))

    @cached_property
    def control_texts(self) -> tuple[str, ...]:
        """The texts of control tokens and marks, longest first. A user's text must not become one of these tokens."""
        words, marks = {*self.control_words}, self.vocabulary.marks
        return tuple(text for text, token_id in self._special.ids.items() if text in words or token_id in marks)

    @property
    def control_ids(self) -> Sequence[int]:
        return [token_id for token_id, kind in enumerate(self.vocabulary.types) if kind in CONTROL_TYPES]

    def is_control(self, token_id: int) -> bool:
        """Returns True for control tokens and unknown tokens, which have no text."""
        return self._type_of(token_id) in CONTROL_TYPES

    def token_id(self, word: str) -> int | None:
        return self.vocabulary.ids.get(word)

    def token_text(self, token_id: int) -> str:
        self._type_of(token_id)
        return self.vocabulary.words[token_id]

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Returns token ids. If `add_special`, adds BOS and EOS if the model needs them and the text does not spell
        them. If `parse_special`, text that spells a control token becomes this token. Callers must never set
        `parse_special` for a user's text."""
        ids = self.encode_parts(self.split_special(text, parse_special))
        return self.with_eos(self.with_bos(ids)) if add_special else ids

    def with_bos(self, ids: list[int]) -> list[int]:
        """Returns the ids, and BOS before them if the model needs it and they do not begin with it."""
        return [self.bos_id, *ids] if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def with_eos(self, ids: list[int]) -> list[int]:
        return [*ids, self.eos_id] if self.add_eos and self.eos_id is not None and ids[-1:] != [self.eos_id] else ids

    def split_special(self, text: str, parse_special: bool) -> list[str | int]:
        """Splits a text into plain text and ids of special tokens. User-defined tokens are always recognized."""
        return (self._special if parse_special else self._user_defined).split(_without_surrogates(text))

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        after_special = True
        for part in parts:
            ids += self.encode_plain(part, after_special) if isinstance(part, str) else [part]
            after_special = isinstance(part, int)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int], skip_special: bool = False) -> bytes:
        """Returns the bytes of tokens, without the space that `encode` adds at the beginning."""
        data = b"".join(self.token_bytes(i) for i in ids if not (skip_special and self.is_control(i)))
        return data[1:] if self.add_space_prefix and data.startswith(b" ") else data

    def token_bytes(self, token_id: int) -> bytes:
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._bytes_of(token_id)
        return data

    def all_bytes(self) -> list[bytes]:
        words, types = self.vocabulary.words, self.vocabulary.types
        return [
            self._bytes_of(token_id) if kind in _NOT_SPELLED else self.word_bytes(word)
            for token_id, (word, kind) in enumerate(zip(words, types, strict=True))
        ]

    @abstractmethod
    def encode_plain(self, text: str, after_special: bool) -> list[int]:
        """Returns the ids of plain text. `after_special` is True after a special token or at the start of a prompt."""

    @abstractmethod
    def word_bytes(self, word: str) -> bytes:
        """Returns the bytes of a vocabulary word of type NORMAL."""

    def _bytes_of(self, token_id: int) -> bytes:
        kind = self._type_of(token_id)
        word = self.vocabulary.words[token_id]
        if kind == TokenType.BYTE:
            return bytes([int(word[3:5], 16)])
        if kind in _NOT_SPELLED:
            return word.encode()
        return self.word_bytes(word)

    def _type_of(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocabulary_size:
            raise RequestError(f"token id {token_id} is outside the vocabulary [0, {self.vocabulary_size})")
        return self.vocabulary.types[token_id]


class Detokenizer:
    """Converts a stream of tokens to text without incomplete characters. If `text_start`, the stream is a whole text,
    and its leading space is removed. Otherwise, it continues a text. Control tokens in `shown` are not skipped."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special: bool = True,
        *,
        text_start: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._shown = shown
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_space = text_start and tokenizer.add_space_prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Returns the characters that this token completes. Invalid UTF-8 becomes U+FFFD."""
        if self._skip_special and self._tokenizer.is_control(token_id) and token_id not in self._shown:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class SpecialTokens:
    """Splits texts at tokens of the types `kinds`. The keys of `ids` are the tokens' texts, longest first."""

    def __init__(self, vocabulary: Vocabulary, *kinds: TokenType) -> None:
        wanted = bytes(kinds)
        found = [(vocabulary.words[i], i) for i, kind in enumerate(vocabulary.types) if kind in wanted]
        self.ids = dict(sorted(found, key=lambda pair: (-len(pair[0].encode()), pair[1])))
        self._places = {text: place for place, text in enumerate(self.ids)}
        self._finder = WordFinder(self.ids)
        self._stripping = vocabulary.stripping

    def split(self, text: str) -> list[str | int]:
        parts: list[str | int] = [text] if text else []
        for word in sorted(self._finder.found_in(text), key=self._places.__getitem__):
            parts = [piece for part in parts for piece in self._cut(part, word)]
        return parts

    def _cut(self, part: str | int, word: str) -> Iterator[str | int]:
        if isinstance(part, int):
            yield part
            return
        token_id = self.ids[word]
        for index, piece in enumerate(part.split(word)):
            if index:
                yield token_id
            kept = piece.lstrip(_WHITE_SPACE) if index and token_id in self._stripping else piece
            if kept:
                yield kept


def _without_surrogates(text: str) -> str:
    """Joins the halves of surrogate pairs, which JSON may contain. A single half becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
