"""Tests of grammar vocabularies, which a worker reads while it loads a stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from llamaclust.model.grammars import vocabulary as vocabulary_module
from llamaclust.model.grammars.vocabulary import GrammarVocabulary, read_vocabulary
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.wire.control.messages import Deadlines, Quiet, WorkerMessage
from llamaclust.worker.loads import Loads
from llamaclust.worker.session import Session
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.stage.matchers import StageMatchers
from support.chat.large_vocabulary import large_vocabulary
from support.chat.matching import ABC, VOCABULARY

_WAIT_S = 60.0


def _loads(sent: list[WorkerMessage]) -> Loads:
    async def send(message: WorkerMessage) -> None:
        sent.append(message)

    anything: Any = SimpleNamespace(exclusive=None)
    return Loads(Session(anything, anything, Deadlines(), Counters(), send))


def _broken() -> GrammarVocabulary:
    raise ValueError("no vocabulary")


@pytest.mark.parametrize("read", [lambda: VOCABULARY, _broken], ids=["sound", "broken"])
async def test_a_worker_announces_silence_around_the_reading_of_a_vocabulary(read: Any) -> None:
    """A vocabulary that cannot be read fails no load."""
    sent: list[WorkerMessage] = []
    runner: Any = SimpleNamespace(samples=True, matchers=StageMatchers(read, most=3))
    await _loads(sent)._prepare_matchers(runner)
    begin, end = sent
    assert isinstance(begin, Quiet) and begin.seconds > 0 and end == Quiet(0.0)
    assert runner.matchers.has_vocabulary is (read is not _broken)
    runner.matchers.close()


async def test_a_kept_stage_and_a_stage_without_matchers_read_nothing() -> None:
    sent: list[WorkerMessage] = []
    kept = StageMatchers(lambda: VOCABULARY, most=3)
    kept.prepare().result(_WAIT_S)
    for samples, matchers in ((True, kept), (False, StageMatchers(_broken, most=3))):
        runner: Any = SimpleNamespace(samples=samples, matchers=matchers)
        await _loads(sent)._prepare_matchers(runner)
        matchers.close()
    assert not sent


def test_a_vocabulary_that_is_built_in_two_parts_allows_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads run between the parts."""
    pauses: list[float] = []
    monkeypatch.setattr(vocabulary_module, "sleep", pauses.append)
    vocabulary = read_vocabulary(load_tokenizer(large_vocabulary(1 << 14)), 1 << 14)
    words = vocabulary_module._Words(vocabulary.words, vocabulary.end_ids, vocabulary._encode)
    ends = [*vocabulary.end_ids]
    whole = LLTokenizer(words, eos_token=ends, slices=vocabulary_module._SLICES)  # type: ignore[arg-type]
    assert vocabulary.native.eos_tokens == whole.eos_tokens and len(pauses) == 1
    for grammar in ('{"grammars": [{"json_schema": {}}]}', ABC.definition):
        made = [LLMatcher(tokenizer, grammar, log_level=0) for tokenizer in (vocabulary.native, whole)]
        for byte in (*b'{"a', *b"ac"):
            masks = [matcher.compute_bitmask() for matcher in made]
            assert masks[0] == masks[1]
            token = whole.tokenize_bytes(bytes([byte]))
            assert len({matcher.try_consume_tokens(token) for matcher in made}) == 1
