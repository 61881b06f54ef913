"""Compares the token ids of random texts with those of another program. `texts` writes each text after its length in
bytes (uint32, little-endian). `compare` reads one line of ids for each text.

    python tests/support/random_texts.py texts --seed 1 --count 10000 > texts.bin
    other-program model.gguf < texts.bin > ids.txt
    python tests/support/random_texts.py compare model.gguf --seed 1 ids.txt
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.tokenizers.loading import load_tokenizer

_WORDS = "the of and to in is it that was for on are as with his they be at one have this from or had by hot word but"
_CODE = (
    *"(){}[];:=+-*/<>!&|^%~.,'\"#@\\_`$?",
    "def ",
    "return",
    "    ",
    "\t",
    "\n",
    "\r\n",
    "->",
    "==",
    "//",
    "0x1F",
    "'ll",
)
_EMOJI = ("😀", "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "👍🏽", "❤️", "🦙", "\u200d", "\ufe0f")
_SCRIPTS = (
    (0x20, 0x7F),
    (0xA0, 0x250),
    (0x370, 0x600),
    (0x900, 0xE00),
    (0x3040, 0x3100),
    (0x4E00, 0xA000),
    (0xAC00, 0xD7A4),
)
_SPACES = (" ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "\u00a0", "\u3000", "\u2028", "\u2009", "\r\n", "\x0b", "\x85")


def random_text(draw: random.Random) -> str:
    """Returns a text of up to 24 pieces of all kinds or of two kinds."""
    kinds: list[Callable[[random.Random], str]] = [_any, _any_script, _word, _code, _emoji, _space, _digits]
    chosen = kinds if draw.random() < 0.5 else draw.sample(kinds, 2)
    return "".join(draw.choice(chosen)(draw) for _ in range(draw.randrange(25)))


def _any(draw: random.Random) -> str:
    """Returns any Unicode character except surrogates."""
    point = draw.randrange(0x110000 - 0x800)
    return chr(point if point < 0xD800 else point + 0x800)


def _any_script(draw: random.Random) -> str:
    first, last = draw.choice(_SCRIPTS)
    return "".join(chr(draw.randrange(first, last)) for _ in range(draw.randrange(1, 6)))


def _word(draw: random.Random) -> str:
    word = draw.choice(_WORDS.split())
    return draw.choice((word, f" {word}", word.upper(), word.capitalize() + "'s", f"{word}n't"))


def _code(draw: random.Random) -> str:
    return "".join(draw.choice(_CODE) for _ in range(draw.randrange(1, 6)))


def _emoji(draw: random.Random) -> str:
    return draw.choice(_EMOJI)


def _space(draw: random.Random) -> str:
    return draw.choice(_SPACES)


def _digits(draw: random.Random) -> str:
    return str(draw.randrange(10 ** draw.randrange(1, 12))).rjust(draw.randrange(4), "0")


def random_texts(seed: int, count: int) -> Iterator[str]:
    """Returns the same texts for the same seed; a larger count only adds texts at the end."""
    draw = random.Random(seed)
    return (random_text(draw) for _ in range(count))


def compare(model: Path, seed: int, ids: Path) -> int:
    """Prints the first texts with different ids. Returns the number of such texts."""
    tokenizer = load_tokenizer(open_model(model).metadata)
    lines = ids.read_text().splitlines()
    differing = 0
    for text, line in zip(random_texts(seed, len(lines)), lines, strict=True):
        ours, theirs = tokenizer.encode(text), [int(one) for one in line.split()]
        if ours != theirs:
            differing += 1
            if differing <= 5:
                print(f"{text!a}\n  here  {ours}\n  there {theirs}")
    print(f"{model.name}: {differing} of {len(lines)} texts differ")
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("what", choices=("texts", "compare"))
    parser.add_argument("files", nargs="*", type=Path, help="for compare: the model, and the other program's ids")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=10_000)
    given = parser.parse_args()
    if given.what == "compare":
        sys.exit(1 if compare(given.files[0], given.seed, given.files[1]) else 0)
    for text in random_texts(given.seed, given.count):
        data = text.encode()
        sys.stdout.buffer.write(struct.pack("<I", len(data)) + data)


if __name__ == "__main__":
    main()
