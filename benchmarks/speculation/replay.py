"""Gain of drafted tokens by how many of them are right: recorded answers are replayed, in turns with plain decode.

    python benchmarks/speculation/replay.py MODEL... [--acceptance 0,0.5,0.8,0.95,1] [--stages 1,2] [--together 8]

First the cost of rows: times of a microbatch in which each row chooses a token. It allows a gain by acceptance, with
the best fixed number of drafted tokens; medians of pairs are shown beside it. Then acceptance changes within an answer:
time lost beside a change at once, in tokens of plain decode. With --together, so many random prompts are answered at
the same time, with n-gram drafts, beside the same without. Both ways must have the same tokens and logprobs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from llamaclust.wire.rpc.grpc_options import tune_grpc

tune_grpc()

from measuring.lines import show  # noqa: E402
from measuring.options import listed, positive  # noqa: E402
from recorded import RecordedDrafters, chosen_right  # noqa: E402
from row_costs import RowCosts, machine, measured  # noqa: E402
from turns import CONTEXT, Answered, Pair, Served, answer, check_same, pair, served, summary, together  # noqa: E402

from llamaclust.cli.interrupts import ends_in_one_line  # noqa: E402
from llamaclust.cluster.scheduler.requests import GenerationRequest  # noqa: E402

_PROMPT = 64
_AFTER = 60
"""Tokens of an answer after acceptance has changed."""
_GOOD, _BAD = 0.95, 0.0
_GOALS = {_GOOD: ">= 0.85", _BAD: ">= 0.97"}


@dataclass(frozen=True, slots=True)
class Sizes:
    tokens: int  # of each answer
    repeats: int


class Replay:
    """Measures one served model."""

    def __init__(self, served: Served, drafters: RecordedDrafters, sizes: Sizes, seed: int) -> None:
        self._served = served
        self._drafters = drafters
        self._sizes = sizes
        self._draw = random.Random(seed)
        self._requests = 0

    async def gains(self, acceptance: float) -> list[Pair]:
        """One prompt a pair; the first pair, from which the scheduler learns, does not count."""
        pairs = []
        for turn in range(self._sizes.repeats + 1):
            request, recorded = await self._recorded()
            self._record(request, recorded, chosen_right(self._sizes.tokens, acceptance, self._draw))
            both = await pair(self._served.engine, request, turn)
            check_same(recorded, both.plain)
            pairs.append(both)
        return pairs[1:]

    async def lost(self, before: float, after: float) -> list[float]:
        """Tokens of plain decode in the time lost where acceptance changes, beside a whole answer without a change."""
        tokens, found = self._sizes.tokens, []
        start = tokens - _AFTER
        for turn in range(self._sizes.repeats + 1):
            request, plain = await self._recorded()
            tail = chosen_right(_AFTER, after, self._draw)
            self._record(request, plain, chosen_right(start, after, self._draw) + tail)
            steady = await answer(self._served.engine, request)
            self._record(request, plain, chosen_right(start, before, self._draw) + tail)
            changed = await answer(self._served.engine, request)
            check_same(plain, changed)
            taken_ns = changed.arrived_ns[-1] - changed.arrived_ns[start]
            if turn:
                found.append((taken_ns - (_AFTER - 1) * steady.token_ns) / plain.token_ns)
        return found

    async def together(self, count: int) -> list[float]:
        """Ratios of tokens a second."""
        ratios = []
        for turn in range(self._sizes.repeats + 1):
            requests = [self._request() for _ in range(count)]
            ways = {0: [replace(each, max_drafted=0) for each in requests], None: requests}
            by_way = {}
            for most in sorted(ways, key=lambda most: most is None, reverse=turn % 2 == 1):
                by_way[most] = await together(self._served.engine, ways[most])
            (plain, plain_tok_s), (drafted, tok_s) = by_way[0], by_way[None]
            for a, b in zip(plain, drafted, strict=True):
                check_same(a, b)
            ratios.append(tok_s / plain_tok_s)
        return ratios[1:]

    async def _recorded(self) -> tuple[GenerationRequest, Answered]:
        request = self._request()
        return request, await answer(self._served.engine, replace(request, max_drafted=0))

    def _request(self) -> GenerationRequest:
        self._requests += 1
        prompt = tuple(self._draw.randrange(self._served.vocabulary) for _ in range(_PROMPT))
        return GenerationRequest(f"replay-{self._requests}", prompt, self._sizes.tokens)

    def _record(self, request: GenerationRequest, recorded: Answered, is_right: list[bool]) -> None:
        self._drafters.record(request.prompt, recorded.tokens, is_right, self._served.vocabulary)


async def measure(path: Path, stages: int, given: argparse.Namespace) -> None:
    threads = given.threads if stages == 1 else 1
    print(f"\n{path.name}, {stages} {'stage' if stages == 1 else 'stages'} of {threads} threads")
    costs = measured(path, threads, _PROMPT + given.tokens // 2)
    costs.show()
    drafters = RecordedDrafters()
    async with served(path, stages, threads, drafters) as model:
        replay = Replay(model, drafters, Sizes(given.tokens, given.repeats), given.seed)
        for acceptance in given.acceptance:
            show_gain(costs, acceptance, await replay.gains(acceptance))
        for before, after in ((_BAD, _GOOD), (_GOOD, _BAD)) if given.switching else ():
            show(f"acceptance {before:g}, then {after:g}: tokens lost", await replay.lost(before, after), "<= 3")
        if given.together:
            ratios = await replay.together(given.together)
            show(f"{given.together} together, n-gram drafts / plain", ratios, ">= 0.98")


def show_gain(costs: RowCosts, acceptance: float, pairs: list[Pair]) -> None:
    allowed = costs.allowed_gain(acceptance)
    print(f"acceptance {acceptance:g}: {summary(pairs)}")
    show(f"acceptance {acceptance:g}: gain; {allowed:.2f} allowed", [each.gain for each in pairs], "")
    ratios = [each.gain / allowed for each in pairs]
    show(f"acceptance {acceptance:g}: gain / allowed gain", ratios, _GOALS.get(acceptance, ""))


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give 0 to 1")
    return value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="path of a .gguf")
    parser.add_argument("--acceptance", type=listed(share), default=[0.0, 0.5, 0.8, 0.95, 1.0])
    parser.add_argument("--stages", type=listed(positive), default=[1], help="1: in this process; more: workers")
    parser.add_argument("--tokens", type=positive, default=260, help="of each answer; %(default)s by default")
    parser.add_argument("--repeats", type=positive, default=5, help="pairs; %(default)s by default")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="of one stage")
    parser.add_argument("--together", type=int, default=0, help="so many requests at the same time, too")
    parser.add_argument("--no-switching", dest="switching", action="store_false", help="no change within an answer")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    _check(parser.error, given)
    return given


def _check(error: Callable[[str], None], given: argparse.Namespace) -> None:
    least = 2 * _AFTER if given.switching else 2
    if not least <= given.tokens <= CONTEXT - _PROMPT:
        error(f"--tokens must be {least} to {CONTEXT - _PROMPT}")
    if not 0 <= given.together <= 8:
        error("--together must be 0 to 8")


def main() -> None:
    given = parse()
    print(machine(given.threads), f"seed {given.seed}", sep=", ")
    for path in given.models:
        for stages in given.stages:
            asyncio.run(measure(path, stages, given))


if __name__ == "__main__":
    with ends_in_one_line():
        main()
