"""Checks that the sampler chooses the same tokens from a GPU's records of ranked logits as from the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import RowTask, SampleTask, ScoreTask
from llamaclust.kernels.backend import Float32, RankedLogits, RanksLogits
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.launches.sampling import (
    piece_count,
    rank_logits,
    record_words,
    sum_weights,
    sums_of_row,
)
from llamaclust.kernels.multi_device import BackendLayers, MultiDeviceBackend
from llamaclust.kernels.sampling import Sampler
from support.arithmetic.batches import batch_of, load_stage
from support.arithmetic.sampling_cases import random_logits, random_task
from support.cuda.launching import Bench
from support.cuda.random_numbers import generator
from support.cuda.stages import LIMITS, Open, random_tokens

GREEDY = SamplingParams(temperature=0.0)


class Ranker:
    """Logits that a device has ranked; `read` lists the rows that were read."""

    def __init__(self, bench: Bench, logits: Float32) -> None:
        self._logits = logits
        self.read: list[int] = []
        rows, vocabulary = logits.shape
        unused = np.full((2, vocabulary), np.nan, np.float32)
        at, count = bench.put(np.concatenate([logits, unused])), bench.put(np.array([rows], np.int32))
        words = record_words(vocabulary)
        records = bench.room(8 * words * (rows + 2))
        pieces = bench.room(4 * piece_count(vocabulary) * (rows + 2))
        counted = RowCount(rows + 2, count.at())
        for launch in rank_logits(at.at(), vocabulary, pieces.at(), records.at(), counted):
            bench.device.launch(launch)
        self.divisors: list[list[float]] = []

        def totals(divisors: Sequence[float]) -> NDArray[np.int64]:
            self.divisors.append([*divisors])
            parts = sums_of_row(vocabulary)
            by, to = bench.put(np.array([*divisors, 1, 1], np.float32)), bench.room(8 * parts * (rows + 2))
            bench.device.launch(sum_weights(at.at(), vocabulary, records.at(), by.at(), to.at(), counted))
            return bench.get(to, (rows, parts), np.int64)

        self.ranked = RankedLogits(bench.get(records, (rows, words), np.int64), self._rows, totals)

    def _rows(self, rows: Sequence[int]) -> Float32:
        self.read += rows
        return self._logits[[*rows]]


def check(bench: Bench, logits: Float32, tasks: Sequence[RowTask]) -> list[int]:
    """Checks that ranked and plain logits give the same bits, and returns the rows whose logits were read."""
    sampler, ranker = Sampler(logits.shape[1], threads=2), Ranker(bench, logits)
    found, wanted = sampler.run(ranker.ranked, tuple(tasks)), sampler.run(logits, tuple(tasks))
    assert list(map(_bits, found)) == list(map(_bits, wanted))
    return ranker.read


def _bits(row: RowResult) -> tuple[object, ...]:
    numbers = (row.logprob, *(logprob for _, logprob in row.top_logprobs))
    ids = (row.token, *(token for token, _ in row.top_logprobs))
    return ids, np.array(numbers, np.float32).tobytes(), row.failure, row.mu


@pytest.mark.parametrize("vocabulary", [1, 15, 64, 65, 1024, 1025, 5_000, 40_001])
def test_any_task(bench: Bench, vocabulary: int) -> None:
    source = generator()
    for _ in range(4):
        logits = np.stack([random_logits(source, vocabulary) for _ in range(8)])
        tasks = [random_task(source, vocabulary) for _ in range(7)]
        if vocabulary == 1:
            tasks = [replace(task, suppressed=()) for task in tasks]
        check(bench, logits, [*tasks, ScoreTask(int(source.integers(vocabulary)), top_logprobs=3)])


def test_usual_tasks_read_no_logits(bench: Bench) -> None:
    """Usual logits, like those of models, give few tokens most of the weight."""
    source = generator()
    logits = source.normal(0, 2, (9, 40_000)).astype(np.float32)
    logits[:, ::4_000] += np.float32(14)
    usual = [
        GREEDY,
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=40),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=0.8, min_p=0.05),
        SamplingParams(temperature=1.3, top_k=100, top_p=0.95, min_p=0.02),
    ]
    tasks = [SampleTask(params, 5, 0, at, top_logprobs=at) for at, params in enumerate(usual)]
    best = int(logits[6].argmax())
    assert check(bench, logits, [*tasks, ScoreTask(best, 20), ScoreTask(0, 0), SampleTask(GREEDY, 1, 0, 0)]) == []
    least = int(logits[8].argmin())
    others: list[RowTask] = [
        SampleTask(replace(GREEDY, logit_bias=((3, 1.0),)), 1, 0, 0),
        SampleTask(GREEDY, 1, 0, 0),
        SampleTask(GREEDY, 1, 0, 0, suppressed=(4,)),
        SampleTask(SamplingParams(temperature=1.0, frequency_penalty=0.5), 1, 0, 0, history=(3, 3, 5)),
        SampleTask(GREEDY, 1, 0, 0, top_logprobs=900),
        SampleTask(SamplingParams(temperature=1.0, top_k=39_999, top_p=0.9999999), 1, 0, 0),
        ScoreTask(int(logits[6].argmin()), 0),
        SampleTask(GREEDY, 1, 0, 0),
        ScoreTask(least, 0),
    ]
    assert check(bench, logits, others) == [0, 2, 3, 4, 5, 6, 8]


def test_other_temperatures(bench: Bench) -> None:
    """The GPU sums weights again, once for all rows that need it, and no logits are read."""
    source = generator()
    logits = source.normal(0, 2, (4, 20_000)).astype(np.float32)
    logits[:, ::4_000] += np.float32(40)
    temperatures = (0.7, 1.0, 0.0, 1.6)
    tasks = tuple(SampleTask(SamplingParams(temperature=one), 7, 0, 1) for one in temperatures)
    ranker, sampler = Ranker(bench, logits), Sampler(20_000)
    assert sampler.run(ranker.ranked, tasks) == sampler.run(logits, tasks)
    assert ranker.read == []
    assert ranker.divisors == [[np.float32(0.7), 0, 0, np.float32(1.6)]]
    sampler.run(ranker.ranked, (SampleTask(GREEDY, 1, 0, 0),) * 4)
    assert len(ranker.divisors) == 1


def test_ties_zeros_and_infinities(bench: Bench) -> None:
    """Covers more candidates than a record holds, zeros of both signs, and logits that are not candidates."""
    logits = np.zeros((6, 3_000), np.float32)
    logits[1, 1_500:] = -0.0
    logits[2] = -np.inf
    logits[2, [7, 2_999]] = 1.0, 1.0
    logits[3] = -np.inf
    logits[3, 100] = -0.0
    logits[4, :] = np.float32(-1e30)
    logits[4, 64] = np.float32(3e38)
    logits[5, 5:] = np.linspace(-200, 0, 2_995, dtype=np.float32)
    for params in (GREEDY, SamplingParams(temperature=1.0), SamplingParams(temperature=0.5, top_p=0.5)):
        tasks = [SampleTask(params, seed, 0, 3, top_logprobs=2) for seed in range(6)]
        assert set(check(bench, logits, tasks)) <= {0, 1, 4, 5}


def test_rows_that_are_no_numbers_fail_alone(bench: Bench) -> None:
    source = generator()
    logits = np.stack([random_logits(source, 9_000) for _ in range(5)])
    logits[0, 8_999] = np.nan
    logits[1, 4_100] = np.inf
    logits[2] = -np.inf
    logits[3, 3] = -np.nan
    assert check(bench, logits, [SampleTask(GREEDY, 1, 0, 0)] * 5) == []


def test_a_record_is_as_long_as_the_sampler_reads_it() -> None:
    for vocabulary in (1, 4_096, 4_097, 151_936):
        assert record_words(vocabulary) == Sampler(vocabulary).record_words


@pytest.mark.parametrize("parts", [1, 2], ids=["one device", "CPU and GPU"])
def test_stages_give_the_logits_that_are_asked_for(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, parts: int
) -> None:
    """Covers logits of some rows and of no rows; a stage on a processor does not rank logits."""
    model = opened("llama")
    count = model.layer_count
    both = MultiDeviceBackend([BackendLayers(cpu, 0, 1), BackendLayers(cuda, 1, count)])
    tokens, outputs = random_tokens(model, 12), [2, 3, 7, 11]
    batch = batch_of([(tokens, range(12), range(1))], outputs=outputs)
    plain, stage = load_stage(cpu, model, limits=LIMITS), load_stage(both if parts == 2 else cuda, model, limits=LIMITS)
    wanted = plain.run(batch, None).copy()
    assert not isinstance(plain, RanksLogits)
    assert isinstance(stage, RanksLogits) and stage.ranks_logits
    for _ in range(3):
        ranked = stage.run_ranked(batch, None)
        assert len(ranked) == 4
        for rows in ([0, 1, 2, 3], [1], [3, 0], [2, 3]):
            np.testing.assert_array_equal(ranked.rows(rows), wanted[rows])
        sampler = Sampler(wanted.shape[1])
        for temperature in (0.0, 1.0, 0.8):
            params = SamplingParams(temperature=temperature)
            tasks = tuple(SampleTask(params, 1, 0, 0, top_logprobs=5) for _ in outputs)
            assert sampler.run(ranked, tasks) == sampler.run(wanted, tasks)
    assert len(stage.run_ranked(batch_of([(tokens, range(12), range(1))], outputs=[]), None)) == 0
    plain.close()
    stage.close()
