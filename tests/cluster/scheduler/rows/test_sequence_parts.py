"""Tests of the parts of a sequence, each alone."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.rows.prompt_outputs import PromptOutputs
from llamaclust.cluster.scheduler.rows.sampling_state import SamplingState
from llamaclust.cluster.scheduler.rows.tasks import sample_task, window_tasks
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.cluster.scheduler.speculation.sequence_drafting import Drafting
from llamaclust.cluster.scheduler.usage import Usage
from llamaclust.core.sampler.params import SamplerChain, SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import SamplingInputs

PROMPT = (1, 2, 3, 4)


def test_times_are_counted_from_arrival() -> None:
    usage = Usage(1_000_000)
    assert usage.timings(4, 0, 0, 0).ttft_ms == 0
    for now_ns in (3_000_000, 9_000_000):
        usage.started(now_ns)
    for now_ns in (5_000_000, 7_000_000, 15_000_000):
        usage.answered(now_ns)
    usage.cached_tokens = 1
    timings = usage.timings(4, 3, 2, 1)
    assert (timings.queue_ms, timings.ttft_ms) == (2, 4)
    assert timings.prefill_tok_s == pytest.approx(3 / 0.002) and timings.decode_tok_s == pytest.approx(2 / 0.010)
    assert (timings.drafted_tokens, timings.accepted_tokens) == (2, 1)


def test_drafted_tokens_are_under_way_until_a_window_comes_back() -> None:
    drafting = Drafting(next=(5, 6))
    assert drafting.take() == (5, 6)
    drafting.next = (7,)
    drafting.take()
    assert [*drafting.ahead] == [5, 6, 7] and not drafting.next and drafting.rows == 3
    assert drafting.settle([5, 6]) and [*drafting.ahead] == [7]
    assert not drafting.settle([8])
    branch = drafting.branch
    drafting.give_up()
    assert not drafting.ahead and drafting.branch == branch + 1 and drafting.rows == 3


def test_a_forced_token_is_expected_for_some_tokens() -> None:
    drafting = Drafting()
    assert not drafting.expects_forced(0)
    drafting.was_forced(10)
    assert drafting.expects_forced(25) and not drafting.expects_forced(26)


def test_outputs_of_a_prompt_are_sent_once_and_again_after_a_loss() -> None:
    outputs = PromptOutputs(2, 8, 2)
    outputs.take(1)
    assert outputs.next == 2
    outputs.take(5)
    outputs.take(9)
    assert outputs.next == 8
    outputs.answered = 5
    outputs.repeat()
    assert (outputs.next, outputs.answered) == (5, 5)


def test_samplers_keep_what_tokens_change() -> None:
    plain = SamplingState(
        GenerationRequest("r", PROMPT, 4, stop_token_ids=frozenset({9, 3}), late_token_ids=frozenset({5}))
    )
    assert plain.is_plain and plain.window == 0 and plain.delayed_ids == (3, 5, 9)
    repeating = SamplingParams(repetition_penalty=1.1)
    assert SamplingState(GenerationRequest("r", PROMPT, 4, repeating, penalty_window=7)).window == 7
    chain = SamplerChain(mirostat=2)
    state = SamplingState(GenerationRequest("r", PROMPT, 4, SamplingParams(temperature=1.0, chain=chain)))
    assert not state.is_plain and state.mu == chain.first_mu
    state.add(RowResult(5, -1.0, mu=2.5))
    state.add(RowResult(6, -1.0))
    assert state.mu == 2.5


class Read(array):  # type: ignore[type-arg]  # array has none at run time
    """An array that counts the tokens that Python reads one by one, also in its slices."""

    reads = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        Read.reads += not isinstance(place, slice)
        return Read("i", found) if isinstance(place, slice) else found

    def __iter__(self) -> Iterator[int]:
        for token in super().__iter__():
            Read.reads += 1
            yield token


class Unread(list[int]):
    def __iter__(self) -> Iterator[int]:
        raise AssertionError("all tokens are read")

    def __getitem__(self, place: Any) -> Any:
        assert not isinstance(place, slice), "tokens are copied"
        return super().__getitem__(place)


def test_no_token_is_read_again_for_penalties() -> None:
    """The history is copied as a whole, however long the sequence."""
    request = GenerationRequest("r", PROMPT * 100, 9, SamplingParams(frequency_penalty=0.5), penalty_window=1000)
    sequence = Sequence(1, request, 9, Usage(0))
    plain = [*request.prompt]
    sequence.tokens, sequence.sampler._seen = Unread(plain), Read("i", plain)
    for token in (7, 8):
        sequence.append(RowResult(token, -1.0))
        tasks = sample_task(sequence), sample_task(sequence, 1), *window_tasks(sequence, (5, 6))
        sent = encode_inputs(SamplingInputs(1, 2, tasks))
        assert Read.reads == 0
        plain.append(token)
        assert all(isinstance(task, SampleTask) for task in tasks)
        assert [[*task.history] for task in tasks] == [plain, plain, *[plain[:-1]] * 3]
        assert Read.reads > 0 and array("i", plain).tobytes() in sent
        Read.reads = 0


def test_a_restarted_sequence_keeps_its_tokens_and_nothing_that_lies_elsewhere() -> None:
    sequence = Sequence(1, GenerationRequest("r", PROMPT, 4, score_from=1), 4, Usage(0))
    sequence.outputs.take(3)
    sequence.append(RowResult(7, -1.0))
    sequence.kv.table.append(3)
    sequence.kv.states.is_begun, sequence.drafting.ahead, sequence.scheduled = True, (8,), 5
    sequence.restart()
    assert sequence.tokens == [*PROMPT, 7] and sequence.outputs.next == 0
    assert not (len(sequence.kv.table) or sequence.kv.states.is_begun or sequence.drafting.ahead or sequence.scheduled)
