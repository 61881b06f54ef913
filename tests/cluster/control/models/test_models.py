"""Tests of several models on the same workers: they sleep and wake, and answer as one undisturbed worker does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llamaclust.cluster.control import model_lifecycle
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.errors import WorkerError
from support.clusters.recovering import Answer, generations, undisturbed
from support.several_models.cluster import ASLEEP, AWAKE, BUDGET, model_files, models


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return model_files(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def requests() -> tuple[GenerationRequest, ...]:
    return generations(11, tokens=30)[:4]


@pytest.fixture(scope="module")
def expected(files: list[Path], requests: tuple[GenerationRequest, ...]) -> list[list[Answer]]:
    return [undisturbed(file, requests) for file in files]


async def test_models_that_do_not_fit_together_take_turns(
    files: list[Path], requests: tuple[GenerationRequest, ...], expected: list[list[Answer]], tmp_path: Path
) -> None:
    async with models(files, tmp_path, tight=True) as found:
        assert found.states == [AWAKE, ASLEEP]
        for number, model in enumerate((0, 1, 0, 1)):
            assert await found.answer(model, requests[number]) == expected[model][number]
            assert found.states[model] is AWAKE and found.states[1 - model] is ASLEEP
        together = [found.answer(model, request) for request in requests for model in (0, 1)]
        answers = await asyncio.gather(*together)
        assert [answers[0::2], answers[1::2]] == expected
        assert 0 < found.largest_bytes <= BUDGET // 2, "the plans' memory is not exceeded"
        assert found.cluster.supervisor.recoveries == 0


async def test_no_more_models_are_loaded_than_the_cluster_file_allows(
    files: list[Path], requests: tuple[GenerationRequest, ...], expected: list[list[Answer]], tmp_path: Path
) -> None:
    async with models(files, tmp_path, tight=False, keys={"max_loaded_models": 1}) as found:
        together = [found.answer(model, request) for request in requests for model in (0, 1)]
        answers = await asyncio.gather(*together)
        assert [answers[0::2], answers[1::2]] == expected
        assert found.most_models == 1
        (told,) = {text for text in found.run.told if "waiting until" in text}
        assert told.endswith("unloaded at the end of its turn: at most 1 model is loaded at a time (max_loaded_models)")


async def test_without_demand_models_sleep_until_they_are_loaded(
    files: list[Path], requests: tuple[GenerationRequest, ...], expected: list[list[Answer]], tmp_path: Path
) -> None:
    async with models(files, tmp_path, tight=False, keys={"load_on_demand": False}) as found:
        assert found.states == [ASLEEP, ASLEEP]
        found.cluster.rotation.lifecycles["b"].load()
        await found.until(ASLEEP, AWAKE)
        assert await found.answer(1, requests[0]) == expected[1][0]


async def test_a_model_with_requests_all_the_time_gives_way_after_its_turn(
    files: list[Path],
    requests: tuple[GenerationRequest, ...],
    expected: list[list[Answer]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_lifecycle, "_TURN_S", 0.2)
    async with models(files, tmp_path, tight=True) as found:
        is_answered = asyncio.Event()

        async def busy(number: int) -> int:
            """Sends requests to the first model one after the other; returns their number."""
            count = 0
            while not is_answered.is_set() or not count:
                assert await found.answer(0, requests[number]) == expected[0][number]
                count += 1
            return count

        working = [asyncio.create_task(busy(number)) for number in range(4)]
        await found.run.until("requests to the first model", lambda: not found.cluster.rotation.lifecycles["a"].is_idle)
        assert await found.answer(1, requests[0]) == expected[1][0]
        is_answered.set()
        assert min(await asyncio.gather(*working)) > 0
        assert any("sleeps: it is another model's turn" in text for text in found.run.told)
        assert found.largest_bytes <= BUDGET // 2


async def test_models_that_fit_together_stay_awake_and_recover_from_a_loss(
    files: list[Path], requests: tuple[GenerationRequest, ...], expected: list[list[Answer]], tmp_path: Path
) -> None:
    async with models(files, tmp_path, tight=False) as found:
        assert await found.answer(1, requests[0]) == expected[1][0]
        await found.until(AWAKE, AWAKE)
        answers = asyncio.gather(*(found.answer(model, request) for request in requests for model in (0, 1)))
        await found.run.at_work()
        found.run.hurt("b")
        assert [(await answers)[0::2], (await answers)[1::2]] == expected
        assert [served.supervisor.recoveries for served in found.cluster.models] == [1, 1]


async def test_a_worker_lost_while_a_model_wakes_delays_it(
    files: list[Path], requests: tuple[GenerationRequest, ...], expected: list[list[Answer]], tmp_path: Path
) -> None:
    async with models(files, tmp_path, tight=True) as found:
        answer = asyncio.create_task(found.answer(1, requests[0]))
        worker = found.run.worker("b")
        model_id = found.cluster.models[1].model.model_id
        await found.run.until("a load", lambda: worker.loading is not None and worker.loading.model_id == model_id)
        found.run.hurt("b")
        assert await answer == expected[1][0]
        assert await found.answer(0, requests[1]) == expected[0][1]


async def test_a_model_sleeps_after_its_time_without_requests(
    files: list[Path], requests: tuple[GenerationRequest, ...], expected: list[list[Answer]], tmp_path: Path
) -> None:
    async with models(files, tmp_path, tight=False, keep_alive="50ms") as found:
        await found.until(ASLEEP, ASLEEP)
        assert not any(worker.stages for worker in found.cluster.registry.workers.values())
        assert await found.answer(0, requests[0]) == expected[0][0]
        await found.until(ASLEEP, ASLEEP)
        lifecycle = found.cluster.rotation.lifecycles["a"]
        lifecycle.load()
        lifecycle.keep(None)
        await found.until(AWAKE, ASLEEP)
        await asyncio.sleep(0.2)
        assert found.states == [AWAKE, ASLEEP]
        assert await found.answer(0, requests[1]) == expected[0][1]
        await found.until(ASLEEP, ASLEEP)


async def test_requests_to_a_model_that_does_not_load_fail_and_others_are_answered(
    files: list[Path], requests: tuple[GenerationRequest, ...], expected: list[list[Answer]], tmp_path: Path
) -> None:
    hidden = files[1].with_suffix(".away")
    timeouts = {"recovery": "500ms"}
    async with models(files, tmp_path, tight=False, keys={"timeouts": timeouts}) as found:
        files[1].rename(hidden)
        try:
            with pytest.raises(WorkerError, match=r"within 0\.5 s"):
                await found.answer(1, requests[0])
            await found.until(AWAKE, ASLEEP)
            assert await found.answer(0, requests[0]) == expected[0][0]
            assert not any(worker.loss for worker in found.cluster.registry.workers.values())
        finally:
            hidden.rename(files[1])
        assert await found.answer(1, requests[1]) == expected[1][1]


async def test_a_model_that_did_not_load_for_no_request_is_tried_again_for_the_next(
    files: list[Path], requests: tuple[GenerationRequest, ...], expected: list[list[Answer]], tmp_path: Path
) -> None:
    hidden = files[1].with_suffix(".away")
    async with models(files, tmp_path, tight=False, keys={"timeouts": {"recovery": "500ms"}}) as found:
        files[1].rename(hidden)
        try:
            found.cluster.rotation.lifecycles["b"].load()
            await found.run.until("a load", lambda: not found.cluster.rotation.lifecycles["b"].is_asleep)
            await found.until(AWAKE, ASLEEP)
        finally:
            hidden.rename(files[1])
        assert await found.answer(1, requests[1]) == expected[1][1]


async def test_a_model_that_no_request_waits_for_any_more_puts_none_to_sleep(
    files: list[Path], requests: tuple[GenerationRequest, ...], expected: list[list[Answer]], tmp_path: Path
) -> None:
    async with models(files, tmp_path, tight=True) as found:
        first, second = found.cluster.rotation.lifecycles.values()
        first.enter()
        second.enter()
        text = "waiting for memory that other models hold"
        await found.run.until(text, lambda: any(text in told for told in found.run.told))
        second.leave()
        await found.until(AWAKE, ASLEEP)
        first.leave()
        assert await found.answer(0, requests[0]) == expected[0][0]
        assert found.states == [AWAKE, ASLEEP]
