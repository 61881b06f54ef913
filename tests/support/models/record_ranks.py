"""Records token ids of a text by OpenAI's tiktoken and Mistral's mistral-common in data/tokenizers/ranks.json, with the
vocabulary: a small one of ranks, pre-tokenized as in Llama 3, GLM-4 and Qwen, and as in tekken.json. Run it again after
the probe changes, where the project is installed:

    pip install tiktoken==0.14.0 mistral-common==1.13.1
    python tests/support/models/record_ranks.py
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, trainers

from llamaclust.model.tokenizers.byte_pairs import splitter, stand_ins
from llamaclust.model.tokenizers.pre_tokenizers import pre_tokenizer
from llamaclust.tools.convert.vocabularies.probe import PROBE
from support.paths import DATA

WORDS = 700
_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"llama3": _CUT % "{1,3}", "glm4": _CUT % "{1,3}", "qwen": _CUT % ""}
"""Pre-tokenizer patterns of these models' own programs."""
_ONE, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"{_ONE}{_UPPER}*{_LOWER}+|{_ONE}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = 30


def trained() -> list[bytes]:
    """Returns byte strings by rank, single bytes first, trained on the probe and the start of WikiText-2's test set."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter(pre_tokenizer("llama-bpe"))
    tokenizer.decoder = decoders.ByteLevel()
    letters = stand_ins()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=list(letters), show_progress=False)
    tokenizer.train_from_iterator([(DATA / "text/wiki.test.head.raw").read_text(), PROBE * 3], trainer)
    words = tokenizer.get_vocab()
    made = [b"".join(letters[one] for one in word) for word in sorted(words, key=words.__getitem__) if len(word) > 1]
    return [*(bytes([byte]) for byte in range(256)), *made]


def tekken_json(words: list[bytes]) -> str:
    """Returns a tekken.json of version 7 whose vocabulary leaves out four words."""
    special = [
        {"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(("<unk>", "<s>", "</s>"))
    ]
    config = {
        "pattern": TEKKEN,
        "num_vocab_tokens": len(words),
        "default_vocab_size": len(words) - 4 + SPECIAL,
        "default_num_special_tokens": SPECIAL,
        "version": "v7",
    }
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode(errors="replace")}
        for rank, word in enumerate(words)
    ]
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": special})


def main() -> None:
    import tempfile

    import tiktoken
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    words = trained()
    ranks = {word: rank for rank, word in enumerate(words)}
    found = {
        name: tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary(PROBE)
        for name, pattern in PATTERNS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tekken.json"
        path.write_text(tekken_json(words))
        found["tekken"] = Tekkenizer.from_file(path).encode(PROBE, bos=True, eos=False)
    said = {"words": [base64.b64encode(word).decode() for word in words], "ids": found}
    (DATA / "tokenizers/ranks.json").write_text(json.dumps(said) + "\n")
    print({name: len(ids) for name, ids in found.items()})


if __name__ == "__main__":
    main()
