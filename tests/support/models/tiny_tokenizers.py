"""Small vocabularies as GGUF metadata: SentencePiece with byte fallback and byte-level BPE, which can write any text;
WordPiece and unigrams."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from llamaclust.model.gguf.writer import WritableValue

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6

_TEXT = (
    "the and of to in is that it he was for on are as with his they at be this have from or one had by word but not "
    "what all were we when your can said there use an each which she do how their if will up other about out many then "
    "them these so some her would make like him into time has look two more write go see number no way could people my "
    "than first water been call who oil its now find long down day did get come made may part"
)


def _pieces(space: str) -> list[str]:
    """Returns pieces by rank; each is a letter or joins two earlier ones, so that BPE can reach it."""
    pieces = [space, *"etaoinshrdlucmfwgypbvk", ",", "."]
    for word in _TEXT.split():
        for end in range(2, len(word) + 2):
            piece = (space + word)[:end]
            if piece not in pieces and all(letter in pieces for letter in piece):
                pieces.append(piece)
    return pieces


def sentencepiece(vocabulary: int) -> dict[str, WritableValue]:
    """Builds `<unk>`, `<s>`, `</s>`, 256 byte tokens, then pieces; plain English letters need 284 tokens."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    count = vocabulary - len(special) - len(byte_tokens)
    assert count >= 0
    words = _filled(_pieces("▁"), count)
    kinds = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256 + [_NORMAL] * count
    scores = [0.0] * (vocabulary - count) + [-float(rank) for rank in range(count)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*special, *byte_tokens, *words],
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": _PLAIN_TEMPLATE,
    }


def spaced_byte_pairs(vocabulary: int) -> dict[str, WritableValue]:
    """Builds a vocabulary like Gemma 4's: control and user-defined words, 256 bytes, line ends, pieces and merges."""
    special = {"<pad>": 3, "<eos>": 3, "<bos>": 3, "<unk>": 2, "<turn|>": 3, "<|tool>": 4}
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    first = len(special) + len(byte_tokens)
    words = _filled(["\n", "\n\n", *_pieces("▁")], vocabulary - first)
    kinds = [*special.values()] + [_BYTE] * 256 + [_NORMAL] * len(words)
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": [*special, *byte_tokens, *words],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [f"{word[:-1]} {word[-1]}" for word in words if len(word) > 1],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": _PLAIN_TEMPLATE,
    }


def word_pieces(vocabulary: int) -> dict[str, WritableValue]:
    """Builds `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]`, English letters at the start of words and within them, then words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = "etaoinshrdlucmfwgypbvkjqxz"
    pieces = [*(f"▁{letter}" for letter in letters + ".,!?"), *letters]
    pieces += [f"▁{word}" for word in dict.fromkeys(_TEXT.split()) if len(word) > 1]
    words = _filled(pieces, vocabulary - len(special))
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.tokens": [*special, *words],
        "tokenizer.ggml.token_type": np.array(
            [_CONTROL, _UNKNOWN, _CONTROL, _CONTROL] + [_NORMAL] * len(words), np.int32
        ),
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
    }


def unigrams(vocabulary: int) -> dict[str, WritableValue]:
    """Builds a vocabulary like XLM-RoBERTa's: `<s>`, `<pad>`, `</s>`, `<unk>`, letters, pieces; short ones are rare."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = ["▁", *"etaoinshrdlucmfwgypbvkjqxzTNAW", ",", ".", "!", "?"]
    pieces = [piece for piece in _pieces("▁") if len(piece) > 1]
    count = vocabulary - len(special)
    words = _filled([*letters, *pieces], count)
    scores = [0.0] * len(special) + [-9.0 + 1.5 * min(len(word), 5) - rank / 1000 for rank, word in enumerate(words)]
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.tokens": [*special, *words],
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array([_CONTROL] * 3 + [_UNKNOWN] + [_NORMAL] * count, np.int32),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.seperator_token_id": 2,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }


def byte_level(vocabulary: int, pre: str = "qwen2") -> dict[str, WritableValue]:
    """Builds 256 byte letters, merged pieces, then `<|endoftext|>`, `<|im_start|>` and `<|im_end|>`."""
    letters = byte_letters()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    count = vocabulary - len(letters) - len(special)
    assert count >= 0
    merged = _filled([piece for piece in _pieces("Ġ") if len(piece) > 1], count)
    merges = [f"{piece[:-1]} {piece[-1]}" for piece in merged if not piece.startswith("[")]
    first_special = vocabulary - len(special)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*letters, *merged, *special],
        "tokenizer.ggml.token_type": np.array([_NORMAL] * first_special + [_CONTROL] * 3, np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": first_special,
        "tokenizer.ggml.eos_token_id": first_special + 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": _CHATML_TEMPLATE,
    }


def byte_letters() -> list[str]:
    """Returns byte-level BPE's printable letter of each byte, in order of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _filled(pieces: list[str], count: int) -> list[str]:
    """Returns `count` pieces, padded with words that no text contains."""
    return [*pieces, *(f"[unused{number}]" for number in range(count - len(pieces)))][:count]


_PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_json(vocabulary: int = 320, **changes: object) -> str:
    """Returns the vocabulary of `byte_level` as Hugging Face's tokenizer.json with GPT-2's pre-tokenizer."""
    said = byte_level(vocabulary)
    tokens, merges = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.merges"]
    assert isinstance(tokens, Sequence) and isinstance(merges, Sequence)
    special = [{"id": vocabulary - 3 + i, "content": str(word), "special": True} for i, word in enumerate(tokens[-3:])]
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    cutter = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    whole = {
        "version": "1.0",
        "added_tokens": [{**one, **plain} for one in special],
        "pre_tokenizer": cutter,
        "decoder": cutter,
        "model": {
            "type": "BPE",
            "vocab": {str(word): i for i, word in enumerate(tokens[:-3])},
            "merges": list(merges),
        },
    }
    return json.dumps(whole | changes)
