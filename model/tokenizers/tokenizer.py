"""Text to token ids and back, as the model file says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.vocabulary import read_vocabulary


class Tokenizer(Protocol):
    """A model's tokenizer; safe to use from several threads. Ids outside the vocabulary raise RequestError."""

    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    longest_word: int
    """Characters of the vocabulary's longest word; no token stands for more."""

    @property
    def vocabulary_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def end_of_generation(self) -> frozenset[int]:
        """Tokens that end an answer: the file's eos, eot and eom, and words known to mean the same."""
        ...

    @property
    def control_texts(self) -> Sequence[str]:
        """Texts that become control tokens where special tokens are parsed."""
        ...

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids; `add_special`: BOS and EOS where the model wants them; `parse_special`: control words in the text
        become their tokens (never set it for text from a user)."""
        ...

    def split_special(self, text: str, parse_special: bool) -> list[str | int]:
        """A text cut at special tokens: pieces of plain text and token ids."""
        ...

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of what `split_special` gives."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        ...

    def decode_bytes(self, ids: Sequence[int], skip_special: bool = False) -> bytes: ...
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token adds to a text."""
        ...

    def token_text(self, token_id: int) -> str:
        """The word as it stands in the file."""
        ...

    def token_id(self, word: str) -> int | None: ...
    def is_control(self, token_id: int) -> bool:
        """Whether the token stands for no text of its own (control and unknown tokens)."""
        ...


def load_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file. ModelFileError where the file has none, a damaged one or one of another kind."""
    from llamaclust.model.tokenizers.byte_pairs import BytePairTokenizer
    from llamaclust.model.tokenizers.sentence_pieces import SentencePieceTokenizer
    from llamaclust.model.tokenizers.unigrams import UnigramTokenizer

    kinds: dict[str, Callable[..., Tokenizer]] = {
        "llama": SentencePieceTokenizer,
        "gpt2": BytePairTokenizer,
        "t5": UnigramTokenizer,
    }
    name = metadata.get("tokenizer.ggml.model")
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        found = "no tokenizer" if name is None else f"a tokenizer of kind {ascii(name)[:66]}"
        raise ModelFileError(f"tokenizer.ggml.model: the file has {found}; supported: {', '.join(kinds)}")
    return kind(read_vocabulary(metadata), metadata)
