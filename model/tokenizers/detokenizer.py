"""Tokens to text as they come, without ever showing half a character."""

from __future__ import annotations

import codecs

from llamaclust.model.tokenizers.tokenizer import Tokenizer


class Detokenizer:
    """One stream of tokens. By default the stream continues a text (a prompt), so a leading space stays; with
    `text_start` it is a whole text and reads as `Tokenizer.decode` would give it."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, *, text_start: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_space = text_start and tokenizer.add_space_prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; bytes that cannot be UTF-8 become U+FFFD."""
        if self._skip_special and self._tokenizer.is_control(token_id):
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left when the stream ends: U+FFFD for a character that was never completed. Starts anew after it."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
