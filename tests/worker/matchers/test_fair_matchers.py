"""Tests of clients that share the threads that make matchers: many large grammars of one delay no other client."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from random import Random
from time import process_time

import pytest

from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from llamaclust.worker.stage.matched_answer import MatchedAnswer
from llamaclust.worker.stage.matchers import StageMatchers
from support.chat.matching import ABC, VOCABULARY, inputs_of, task
from support.seed import SEED

HEAVY = 31
_CPU_S = 1.0
_WAIT_S = 120.0


def _objects(count: int) -> object:
    properties = {f"k{i}": {"type": "object", "properties": {f"a{i}": {"type": "string"}}} for i in range(count)}
    return {"type": "object", "properties": properties}


def _choices(count: int) -> object:
    words = Random(SEED)
    return {"enum": ["".join(words.choices("abcdefgh", k=20)) for _ in range(count)]}


def _patterns(count: int) -> object:
    strings = {"type": "string", "minLength": 1, "maxLength": 40}
    return {"type": "object", "properties": {f"p{i}": strings for i in range(count)}, "required": ["p0"]}


def _grammar(schema: object) -> Grammar:
    return Grammar(json.dumps({"grammars": [{"json_schema": schema}]}))


@pytest.fixture
def stage() -> Iterator[StageMatchers]:
    made = StageMatchers(lambda: VOCABULARY, most=HEAVY + 1)
    yield made
    made.close()


def _start(stage: StageMatchers, number: int, *tasks: object) -> list[MatchedAnswer]:
    before = set(stage._changes)
    stage.receive(inputs_of(number, *tasks))  # type: ignore[arg-type]
    return [answer for change, answer in stage._changes.items() if change not in before and answer is not None]


@pytest.mark.parametrize("schema", [_objects(400), _choices(4000), _patterns(300)], ids=["objects", "enum", "lengths"])
@pytest.mark.parametrize("owners", [1, HEAVY])
def test_a_small_grammar_takes_little_cpu_time_beside_many_large_ones(
    stage: StageMatchers, schema: object, owners: int
) -> None:
    """The large grammars belong to one client, or to as many clients as grammars."""
    print(f"seed {SEED}")
    heavy = [task(key, 0, _grammar(schema), owner=1 + key % owners) for key in range(HEAVY)]
    _start(stage, 0, *heavy)
    began_s = process_time()
    (light,) = _start(stage, 1, task(HEAVY, 0, ABC, owner=1000))
    light.ready.result(_WAIT_S)
    assert process_time() - began_s < _CPU_S


class Held:
    """Holds the threads that make matchers until `go_on` is set, and records the owners of matchers in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.owners: list[int] = []
        self.go_on = threading.Event()
        make = MatchedAnswer.make_matcher

        def held(answer: MatchedAnswer, read_vocabulary: Callable[[], GrammarVocabulary]) -> None:
            self.owners.append(answer.owner)
            assert self.go_on.wait(_WAIT_S)
            make(answer, read_vocabulary)

        monkeypatch.setattr(MatchedAnswer, "make_matcher", held)


@pytest.mark.parametrize("late", [1, 3])
def test_an_owner_has_one_matcher_in_the_making(
    stage: StageMatchers, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    held = Held(monkeypatch)
    first = _start(stage, 0, *[task(key, 0, ABC, owner=7) for key in range(8)])
    others = _start(stage, 1, *[task(10 + key, 0, ABC, owner=8 + key) for key in range(late)])
    while len(held.owners) < 2:
        threading.Event().wait(0.001)
    assert held.owners == [7, 8]
    held.go_on.set()
    for answer in (*first, *others):
        answer.ready.result(_WAIT_S)
    assert max(map(held.owners.index, range(8, 8 + late))) <= late + 1, "after at most two of the first client"
