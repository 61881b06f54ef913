"""Makes prompts from real text: open questions, and this repository's documents and programs to copy, edit or quote."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from llamaclust.model.chat.prompt import encode_chat
from llamaclust.model.loader import Model

_ROOT = Path(__file__).resolve().parents[2]
_NAME = re.compile(r"\b[a-z][a-z_]{3,}\b")
_WORDS = frozenset(("self", "return", "None", "import", "from", "class", "with", "else", "yield", "raise", "assert"))
_MARGIN = 16
_SUBJECTS = (
    "the sea", "a lonely lighthouse", "bread", "rain in a large city", "friendship", "the history of glass", "wolves",
    "learning to play the piano", "a garden in winter", "the first train", "honesty", "maps", "an old bridge", "tea",
    "the moon", "silence", "a small shop", "mountain villages", "paper", "growing old",
)  # fmt: skip
_QUESTIONS = (
    "Write a short story about {}.",
    "What comes to your mind when you think of {}?",
    "Explain to a child why {} matters.",
    "Write a letter to a friend about {}.",
    "What are different opinions that people have about {}?",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    kind: str
    tokens: tuple[int, ...]
    temperature: float = 0.0
    seed: int = 0
    most: int | None = None  # Maximum tokens of the answer; None for the requested number.


def prompts(model: Model, kinds: tuple[str, ...], count: int, characters: int, seed: int) -> Iterator[Prompt]:
    draw = random.Random(seed)
    for kind in islice(cycle(kinds), count):
        yield KINDS[kind](model, draw, characters)


def _copied(model: Model, draw: random.Random, characters: int) -> Prompt:
    text = _excerpt(draw, draw.choice(("docs/*.md", "cluster/*/*.py")), characters)
    return _continued(model, "copy", f"Original file:\n```\n{text}\n```\n\nExact copy of the file:\n```\n", text, 0)


def _edited(model: Model, draw: random.Random, characters: int) -> Prompt:
    text = _excerpt(draw, "cluster/*/*.py", characters)
    found = Counter(name for name in _NAME.findall(text) if name not in _WORDS)
    name = max(found, key=lambda each: (found[each], each), default="value")
    new = f"new_{name}"
    renamed = re.sub(rf"\b{name}\b", new, text)
    head = f"Original file:\n```\n{text}\n```\n\nThe file with `{name}` renamed to `{new}`:\n```\n"
    return _continued(model, "edit", head, renamed, renamed.find(new) + len(new))


def _continued(model: Model, kind: str, head: str, text: str, least: int) -> Prompt:
    """Makes a prompt of the head and the first third of the text, or at least `least` characters. The rest of the text
    is the expected answer."""
    head_ids = model.tokenizer.encode(head)
    ids = model.tokenizer.encode(text, add_special=False)
    shown = len(model.tokenizer.encode(text[:least], add_special=False)) if least else 0
    given = min(max(len(ids) // 3, shown), len(ids) - 1)
    return Prompt(kind, (*head_ids, *ids[:given]), most=max(len(ids) - given, _MARGIN))


def _quoted(model: Model, draw: random.Random, characters: int) -> Prompt:
    text = _excerpt(draw, "docs/*.md", characters)
    question = "Summarize this text. Quote its most important sentences word for word, in quotation marks."
    return Prompt("quote", _chat(model, f"{question}\n\n{text}"))


def _prose(model: Model, draw: random.Random, characters: int) -> Prompt:
    question = draw.choice(_QUESTIONS).format(draw.choice(_SUBJECTS))
    return Prompt("prose", _chat(model, question), 0.8, draw.randrange(1 << 32))


KINDS: dict[str, Callable[[Model, random.Random, int], Prompt]] = {
    "copy": _copied,
    "edit": _edited,
    "quote": _quoted,
    "prose": _prose,
}


def _chat(model: Model, text: str) -> tuple[int, ...]:
    if model.chat_template.source is None:
        return tuple(model.tokenizer.encode(f"{text}\n\n"))
    return tuple(encode_chat(model.tokenizer, model.chat_template.render([{"role": "user", "content": text}])))


def _excerpt(draw: random.Random, pattern: str, characters: int) -> str:
    text = draw.choice([path for path in sorted(_ROOT.glob(pattern)) if path.stat().st_size > 2 * characters])
    lines = text.read_text().splitlines(keepends=True)
    sizes = [len(line) for line in lines]
    last = next(place for place in range(len(lines), -1, -1) if sum(sizes[place:]) >= characters)
    start = draw.randrange(last + 1)
    stop = start + 1
    while stop < len(lines) and sum(sizes[start:stop]) < characters:
        stop += 1
    return "".join(lines[start:stop]).strip("\n")


def answer_tokens(prompt: Prompt, most: int, context: int) -> int:
    """Returns the maximum number of tokens of the answer. It is below 1 if the context has no room for an answer."""
    return min(most, prompt.most or most, context - len(prompt.tokens) - _MARGIN)
