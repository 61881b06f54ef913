"""Tests of stop strings: positions in texts that arrive in pieces, and cost of their analysis."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaclust.cluster.front.text.image_rows import RowLeases
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.stop_strings import StopPattern, StopStrings
from support.clusters.served import ScriptedEngine, make_service, says

GENERATION = CompletionRequest("Hello", seed=7)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Returns the text before the stop string that is complete first, and this string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=6), max_size=4), st.data())
def test_stop_strings_do_not_depend_on_how_the_text_comes(text: str, stops: list[str], data: st.DataObject) -> None:
    search = StopStrings([*map(StopPattern, stops)])
    shown, at = "", 0
    while at < len(text):
        end = at + data.draw(st.integers(1, 5))
        shown += search.push(text[at:end])
        longest = max(map(len, stops), default=1)
        assert len(text[:end]) - len(shown) < longest or search.matched is not None, "held back too much"
        at = end
    expected, stopped_by = naive(text, stops)
    assert (shown + search.flush(), search.matched) == (expected, stopped_by)


def test_every_short_stop_string_in_every_short_text() -> None:
    words = ["".join(letters) for length in range(1, 9) for letters in product("ab", repeat=length)]
    for stop in words[:30]:
        for text in words:
            search = StopStrings([StopPattern(stop)])
            assert search.push(text) + search.flush() == text.partition(stop)[0]


def test_long_stop_strings_cost_little() -> None:
    search = StopStrings([StopPattern("a" * 4095 + "b")] * 16)
    shown = "".join(search.push("a" * 8) for _ in range(1000))
    assert len(shown) == 8000 - 4095
    assert search.matched is None


class CountedText(str):
    """A text class that counts the reads of characters in all its instances."""

    reads = 0

    def __getitem__(self, place: Any) -> str:
        CountedText.reads += 1
        return super().__getitem__(place)


async def test_choices_and_prompts_share_the_analysis_of_stop_strings() -> None:
    stop = CountedText("ab" * 1000 + "z")
    service, request = make_service(ScriptedEngine(says("a"))), replace(GENERATION, n=100, stop=(stop,))
    generation = await service.prepare(request, RowLeases())
    before = CountedText.reads
    for _ in range(3):
        assert len(service._choices(request, generation)) == 100
    assert 0 < CountedText.reads - before < 10 * len(stop)


async def test_long_stop_strings_are_analysed_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, choices = [], TextService._choices

    def spied(*given: Any) -> Any:
        threads.append(threading.get_ident() == threading.main_thread().ident)
        return choices(*given)

    monkeypatch.setattr(TextService, "_choices", spied)
    for length in (4000, 1):
        async with await make_service(ScriptedEngine(says("a"))).start(replace(GENERATION, stop=("z" * length,))):
            pass
    assert threads == [False, True]
