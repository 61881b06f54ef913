"""Drafters without a model: bytes of their index, times of a draft, and how much of a text they foresee.

    python benchmarks/models/drafting.py [MODEL] [--tokens 1024,8192,32768] [--answer 1000] [--most 8] [--seed 1]

Texts: random tokens, repetitions, this repository's documents (English) and programs (code), edited copies of these.
The last ones are drafted as an answer to those before it. Times are of a draft behind one new token; `prompt` is the
longest of the calls that took in the prompt. Then drafts are verified: `tokens a step` are the accepted ones and one
more. A table shows how many are accepted by class of confidence. MODEL: a file whose tokenizer cuts English and code;
without it, words and signs are tokens. Shared: a store of answers has the text that comes after it.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from time import perf_counter_ns

sys.path.insert(0, str(Path(__file__).parent.parent))
from measuring.options import listed, positive

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.cluster.scheduler.drafting.drafter import NO_DRAFT, Drafter
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafter
from llamaclust.cluster.scheduler.drafting.shared import SharedAnswers, SharedDrafter
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.worker.devices.system_info import processor_name

_ROOT = Path(__file__).resolve().parents[2]
_PIECE = re.compile(r" ?[A-Za-z]{1,6}| ?\d| ?[^\sA-Za-z\d]|\s+")
_VOCABULARY = 50_000
_EDITED = 0.02
"""Share of a copy's tokens that differ; half of them are left out."""

Accepted = defaultdict[int, list[int]]
"""Of each draft, by its class of confidence."""


@dataclass(frozen=True, slots=True)
class Text:
    name: str
    tokens: list[int]
    others: list[int]  # answers of the store; empty: none


def natural(pattern: str, model: Path | None) -> list[int]:
    """Tokens of the files of the pattern, all of them."""
    text = "\n".join(path.read_text() for path in sorted(_ROOT.glob(pattern)))
    if model is not None:
        return load_tokenizer(open_model(model).metadata).encode(text, add_special=False)
    ids: dict[str, int] = {}
    return [ids.setdefault(piece, len(ids)) for piece in _PIECE.findall(text)]


def edited(tokens: list[int], draw: random.Random) -> Iterator[int]:
    for token in tokens:
        chance = draw.random()
        if chance >= _EDITED:
            yield token
        elif chance >= _EDITED / 2:
            yield draw.randrange(_VOCABULARY)


def texts(size: int, answer: int, draw: random.Random, found: dict[str, list[int]]) -> Iterator[Text]:
    end = size + answer
    yield Text("random", [draw.randrange(_VOCABULARY) for _ in range(end)], [])
    yield Text("two at random", [draw.randrange(2) for _ in range(end)], [])
    yield Text("one token", [7] * end, [])
    yield Text("one pair", [token for number in range(end) for token in (number + 2, 0, 1)][:end], [])
    yield Text("31 alike", [token for number in range(end) for token in (number + 31, *range(31))][:end], [])
    for name, tokens in found.items():
        yield Text(name, tokens[:end], [])
        yield Text(f"{name}, shared", tokens[:end], tokens[end : end + size])
        yield Text(f"{name}, edited copy", [*tokens[:size], *edited(tokens[:answer], draw)], [])


def times_us(drafter: Drafter, text: Text, prompt: int, most: int) -> tuple[list[float], float]:
    """Of each token of the answer, and the longest for a part of the prompt."""
    seen = text.tokens[:prompt]
    times = []
    for token in [None] * (prompt // 1024 + 1) + text.tokens[prompt:]:
        seen += [] if token is None else [token]
        began = perf_counter_ns()
        drafter.draft(seen, most)
        times.append((perf_counter_ns() - began) / 1e3)
    return times[prompt // 1024 + 1 :], max(times[: prompt // 1024 + 1])


def verified(drafter: Drafter, text: Text, prompt: int, most: int) -> Accepted:
    seen, accepted = text.tokens[:prompt], Accepted(list)
    for _ in range(prompt // 1024):
        drafter.draft(seen, most)
    while len(seen) < len(text.tokens):
        draft, rest = drafter.draft(seen, most), text.tokens[len(seen) :]
        pairs = enumerate(zip(draft.tokens, rest, strict=False))
        count = next(
            (number for number, (drafted, token) in pairs if drafted != token), min(len(draft.tokens), len(rest))
        )
        accepted[draft.confidence].append(count)
        seen += rest[: count + 1]
    return accepted


def measure(text: Text, prompt: int, most: int) -> tuple[str, Accepted]:
    """A line, and what was accepted."""
    answers = SharedAnswers(4 * len(text.others))
    for start in range(0, len(text.others), 500):
        answers.add(text.others[start : start + 500], "")

    def drafter() -> NgramDrafter | SharedDrafter:
        return SharedDrafter(answers, "") if text.others else NgramDrafter()

    timed = drafter()
    times, prompt_us = times_us(timed, text, prompt, most)
    size_bytes = timed.size_bytes if isinstance(timed, NgramDrafter) else answers.size_bytes
    held = len(text.others) if text.others else len(text.tokens)
    accepted = verified(drafter(), text, prompt, most)
    steps = sum(map(len, accepted.values()))
    figures = f"{size_bytes / held:8.1f} {median(times):8.1f} {sorted(times)[-len(times) // 100]:8.1f} {prompt_us:8.0f}"
    return f"{prompt:7} {text.name:22} {figures} {(len(text.tokens) - prompt) / steps:8.2f}", accepted


def show_classes(accepted: Accepted) -> None:
    print("\nclass   drafts  first accepted  tokens accepted, of English and code")
    for confidence, counts in sorted(accepted.items()):
        print(f"{confidence:5} {len(counts):8} {mean(count > 0 for count in counts):15.2f} {mean(counts):16.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--tokens", type=listed(positive), default=[1024, 8192, 32768], help="lengths of the prompts")
    parser.add_argument("--answer", type=positive, default=1000, help="tokens of each answer")
    parser.add_argument("--most", type=positive, default=8, help="tokens of a draft at most")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    patterns = (("English", "docs/*.md"), ("code", "cluster/*/*.py"))
    found = {name: natural(pattern, given.model) for name, pattern in patterns}
    print(processor_name())
    print(f"{'prompt':>7} {'text':22} bytes/tok   median      p99   prompt us   tokens a step of {given.most}")
    classes = Accepted(list)
    for size in given.tokens:
        for text in texts(size, given.answer, draw, found):
            line, accepted = measure(text, size, given.most)
            print(line, flush=True)
            for confidence, counts in accepted.items():
                if text.name in found and confidence != NO_DRAFT.confidence:
                    classes[confidence] += counts
    show_classes(classes)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
