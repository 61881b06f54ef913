"""Gain of n-gram drafts on real text: every prompt in turns with plain decode and with drafted tokens, on one engine.

    python benchmarks/speculation/texts.py MODEL [--prompts 200] [--stages 1,2]

Kinds of prompts, built from this repository's files with a seed: `copy`, a file and its beginning again; `edit`, a
program and the beginning of the same with a name changed; `quote`, a summary with quotations; `prose`, open questions
at temperature 0.8. Of copies and edits, the exact ones have 90 % of their tokens from the text that was asked for: a
small model loses its place. A prompt below 0.95 is measured up to three times more, and counts as slower where all of
them are. Both ways must have the same tokens and logprobs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
from llamaclust.wire.rpc.grpc_options import tune_grpc

tune_grpc()

from corpus import KINDS, Prompt, answer_tokens, prompts  # noqa: E402
from measuring.lines import report  # noqa: E402
from measuring.options import chosen, listed, positive  # noqa: E402
from row_costs import machine, measured  # noqa: E402
from turns import Pair, Served, pair, served  # noqa: E402

from llamaclust.cli.interrupts import ends_in_one_line  # noqa: E402
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafters  # noqa: E402
from llamaclust.cluster.scheduler.requests import GenerationRequest  # noqa: E402
from llamaclust.core.sampling import SamplingParams  # noqa: E402

SLOWER = 0.95
GOALS = {"copy": ">= 3", "edit": ">= 3", "quote": ">= 1.3", "prose": ">= 0.97"}
_AGAIN = 3
_LEAST_TOKENS = 32
"""Of an answer: of a shorter one no rate can be told."""


@dataclass(frozen=True, slots=True)
class Measured:
    prompt: Prompt
    pairs: tuple[Pair, ...]

    @property
    def gain(self) -> float:
        return median(each.gain for each in self.pairs)

    @property
    def is_exact(self) -> bool:
        return self.prompt.is_exact(self.pairs[0].plain.tokens)

    @property
    def is_slower(self) -> bool:
        return all(each.gain < SLOWER for each in self.pairs)


def request_of(model: Served, prompt: Prompt, tokens: int, number: int) -> GenerationRequest:
    most = answer_tokens(prompt, tokens, model.engine.scheduler.settings.max_sequence_tokens)
    return GenerationRequest(
        f"{prompt.kind}-{number}",
        prompt.tokens,
        most,
        SamplingParams(temperature=prompt.temperature),
        prompt.seed,
        stop_token_ids=frozenset(model.model.tokenizer.end_of_generation),
        min_tokens=min(most, _LEAST_TOKENS),
    )


async def gains(model: Served, asked: list[Prompt], tokens: int) -> list[Measured]:
    """Of those that fit in the context. The first one of each kind is computed once more before."""
    found: list[Measured] = []
    for number, prompt in enumerate(asked):
        request = request_of(model, prompt, tokens, number)
        if request.max_new_tokens < 2:
            report(f"{request.request_id}: {len(prompt.tokens)} tokens do not fit in the context")
            continue
        if prompt.kind not in {each.prompt.kind for each in found}:
            await pair(model.engine, request, number)
        pairs = [await pair(model.engine, request, number)]
        while pairs[-1].gain < SLOWER and len(pairs) <= _AGAIN:
            pairs.append(await pair(model.engine, request, number + len(pairs)))
        found.append(Measured(prompt, tuple(pairs)))
        report(f"{number + 1} of {len(asked)}: {prompt.kind} {found[-1].gain:.2f}")
    return found


HEADER = f"{'kind':8}{'prompts':>8}{'median':>8}{'worst':>8}{'accepted/drafted':>20}{'below 0.95':>12}   goal, below 0"


def lines(kind: str, found: list[Measured]) -> Iterator[str]:
    """Of the prompts of one kind."""
    own = [each for each in found if each.prompt.kind == kind]
    yield line(kind, own, GOALS[kind])
    if exact := [each for each in own if each.is_exact]:
        yield line("  exact", exact, "")


def line(kind: str, own: list[Measured], goal: str) -> str:
    if not own:
        return f"{kind:8}{0:8}   no prompt fits in the context"
    drafted = [each.drafted for one in own for each in one.pairs]
    counts = f"{sum(each.accepted for each in drafted)}/{sum(each.drafted for each in drafted)}"
    ratios, slower = [each.gain for each in own], sum(each.is_slower for each in own)
    worst = min(max(pair.gain for pair in each.pairs) for each in own)
    return f"{kind:8}{len(own):8}{median(ratios):8.2f}{worst:8.2f}{counts:>20}{slower / len(own):12.3f}   {goal}"


async def measure(path: Path, stages: int, given: argparse.Namespace) -> None:
    threads = given.threads if stages == 1 else 1
    costs = measured(path, threads, given.characters // 4)
    print(f"\n{path.name}, {stages} {'stage' if stages == 1 else 'stages'} of {threads} threads")
    print(f"one token of an answer / one row of a prefill: {costs.prefill_to_decode:.1f}")
    async with served(path, stages, threads, NgramDrafters()) as model:
        asked = list(prompts(model.model, tuple(given.kinds), given.prompts, given.characters, given.seed))
        found = await gains(model, asked, given.tokens)
    print(HEADER)
    for kind in given.kinds:
        for shown in lines(kind, found):
            print(shown, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="path of a .gguf")
    parser.add_argument("--prompts", type=positive, default=200, help="%(default)s by default")
    parser.add_argument("--kinds", type=listed(chosen("--kinds", {k: k for k in KINDS})), default=list(KINDS))
    parser.add_argument("--stages", type=listed(positive), default=[1], help="1: in this process; more: workers")
    parser.add_argument("--tokens", type=positive, default=200, help="of an answer, at most; %(default)s by default")
    parser.add_argument("--characters", type=positive, default=1200, help="of a text in a prompt")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="of one stage")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(machine(given.threads), f"seed {given.seed}", sep=", ")
    for stages in given.stages:
        asyncio.run(measure(given.model, stages, given))


if __name__ == "__main__":
    with ends_in_one_line():
        main()
