"""Parts of a sequence, each alone."""

from __future__ import annotations

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.rows.prompt_outputs import PromptOutputs
from llamaclust.cluster.scheduler.rows.sampling_state import SamplingState
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.cluster.scheduler.speculation.sequence_drafting import Drafting
from llamaclust.cluster.scheduler.usage import Usage
from llamaclust.core.sampler_chain import SamplerChain
from llamaclust.core.sampling import RowResult, SamplingParams

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
    plain = SamplingState(GenerationRequest("r", PROMPT, 4, stop_token_ids=frozenset({9, 3})))
    assert plain.is_plain and plain.window == 0 and plain.stop_ids == (3, 9)
    repeating = SamplingParams(repetition_penalty=1.1)
    assert SamplingState(GenerationRequest("r", PROMPT, 4, repeating, penalty_window=7)).window == 7
    chain = SamplerChain(mirostat=2)
    state = SamplingState(GenerationRequest("r", PROMPT, 4, SamplingParams(temperature=1.0, chain=chain)))
    assert not state.is_plain and state.mu == chain.first_mu
    state.add(RowResult(5, -1.0, mu=2.5))
    state.add(RowResult(6, -1.0))
    assert state.mu == 2.5


def test_a_restarted_sequence_keeps_its_tokens_and_nothing_that_lies_elsewhere() -> None:
    sequence = Sequence(1, GenerationRequest("r", PROMPT, 4, score_from=1), 4, Usage(0))
    sequence.outputs.take(3)
    sequence.append(RowResult(7, -1.0))
    sequence.kv.table.append(3)
    sequence.kv.states.is_begun, sequence.drafting.ahead, sequence.scheduled = True, (8,), 5
    sequence.restart()
    assert sequence.tokens == [*PROMPT, 7] and sequence.outputs.next == 0
    assert not (len(sequence.kv.table) or sequence.kv.states.is_begun or sequence.drafting.ahead or sequence.scheduled)
