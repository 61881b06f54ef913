"""Tests which drafters pipelines have, by the cluster file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest

from llamaclust.cli.plans.plan import planned, show_plan
from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.cluster.control.limits import speculation_settings
from llamaclust.cluster.launchers.models.draft_model import plan_draft_model
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafters
from llamaclust.cluster.scheduler.drafting.shared import SharedDrafters
from llamaclust.cluster.scheduler.kv.prefix_cache import BlockKeys
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.server.drafting import draft_model_memory, drafting
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sizes import mib
from llamaclust.model.loader import Model
from llamaclust.worker.devices.cores import read_cores
from support.clusters.recovering import answer_of, config, model_in, recovering
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model

FREE_BYTES = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("model"))


def _config(**keys: object) -> ClusterConfig:
    return ClusterConfig.model_validate({"model": "m.gguf", "workers": [{"name": "a"}], **keys})


def test_the_cluster_file_chooses_drafters_and_window() -> None:
    plain, shared = speculation_settings(_config(), None), {"max_window": 7, "shared_answers": 4096}
    assert plain is not None and isinstance(plain.drafters, NgramDrafters) and plain.max_window == 32
    known = speculation_settings(_config(speculative=shared), None)
    assert known is not None and isinstance(known.drafters, SharedDrafters) and known.max_window == 7
    assert speculation_settings(_config(speculative="off"), None) is None


async def test_shared_answers_outlive_pipelines(model: Path, tmp_path: Path) -> None:
    settings = config(model, tmp_path, speculative={"max_window": 7, "shared_answers": 4096})
    request = GenerationRequest("r", tuple(range(3, 40)), 40, SamplingParams(temperature=0.9), seed=1)
    async with recovering(settings) as run:
        engine = run.cluster.engine
        before, epoch = engine.scheduler.settings.speculation, run.cluster.supervisor.epoch.number
        assert before is not None
        answer = await answer_of(engine.submit(request))
        run.hurt("b")
        await run.until("the loss", lambda: any("is lost" in text for text in run.told))
        assert await answer_of(engine.submit(request)) == answer
        await run.until("another epoch", lambda: run.cluster.supervisor.epoch.number > epoch)
        assert engine.scheduler.settings.speculation is before
        tokens = [*request.prompt, *(token for token, _ in answer)]
        drafted = before.drafters.of(BlockKeys().salt).draft(tokens[:50], 7)
        assert drafted.tokens == tuple(tokens[50:57])


async def test_a_cluster_file_turns_speculation_off(model: Path, tmp_path: Path) -> None:
    async with recovering(config(model, tmp_path, 2, speculative="off")) as run:
        assert run.cluster.engine.scheduler.settings.speculation is None
        await asyncio.gather(*run.start([GenerationRequest("r", (5, 6, 7) * 9, 30)]))


def test_a_plan_counts_the_draft_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(tmp_path))
    monkeypatch.setattr("llamaclust.cli.plans.plan.available_memory_bytes", lambda: FREE_BYTES)
    given = [f"model={model}", "context_length=64", "workers=[{name: a}]"]
    drafting = [*given, f"speculative={{model: {model}, threads: 1}}"]
    plain, beside = planned(load_config(None, given)), planned(load_config(None, drafting))
    assert plain.draft_model is None and beside.draft_model is not None
    (before,), (after,) = plain.plan.stages, beside.plan.stages
    assert before.memory_bytes is not None and after.memory_bytes is not None
    taken = beside.draft_model.bytes
    assert (before.memory_bytes, before.memory_bytes - after.memory_bytes) == (FREE_BYTES, taken) and taken > 0
    show_plan(None, drafting, as_json=False)
    line = f"  draft model {model.name}: {mib(taken)} MiB of this machine, which workers do not have\n"
    assert line in capsys.readouterr().out
    show_plan(None, drafting, as_json=True)
    shown = json.loads(capsys.readouterr().out)["draft_model"]
    remarks = shown.pop("remarks")
    assert len(remarks) == 1 and remarks[0].startswith(f"draft model {model.name} is not small: ")
    assert shown == {"name": model.name, "bytes": taken, "models": [model.stem], "others": []}
    monkeypatch.setattr("llamaclust.cli.plans.plan.available_memory_bytes", lambda: taken + after.bytes // 2)
    with pytest.raises(InsufficientMemoryError, match=f"; draft model {model.name}: {mib(taken)} MiB of this machine"):
        planned(load_config(None, drafting))


def test_a_draft_model_has_no_more_threads_than_there_are(model: Path, tmp_path: Path) -> None:
    small = build_tiny_model(tmp_path / "small.gguf", layers=1, hidden=32, ffn=32, heads=4)
    given = [f"model={model}", "context_length=64", "workers=[{name: a}]"]
    beside = planned(load_config(None, [*given, f"speculative={{model: {small}, threads: 1000}}"])).draft_model
    assert beside is not None
    most = len(read_cores().hardware_threads)
    assert beside.remarks == (f"draft model: {most} threads instead of 1000: this process can use no more cores",)


async def test_memory_that_drafts_have_not_written_to_is_not_for_workers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system counts such memory as free."""
    monkeypatch.setattr("llamaclust.cluster.launchers.local.available_memory_bytes", lambda: FREE_BYTES)
    settings = config(model, tmp_path, 1, speculative={"model": str(model), "threads": 1})
    with Model.open(model) as opened:
        kv_bytes = plan_draft_model(model, [opened], 1, settings.context_length or 0).memory.kv_bytes
    async with recovering(settings) as run:
        (stage,) = run.cluster.plan.stages
    assert stage.memory_bytes == FREE_BYTES - kv_bytes and kv_bytes > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            partial(build_tiny_model, vocabulary=1024),
            "draft model .*draft.gguf: its 1024 tokens differ from the 320 tokens of",
        ),
        (partial(build_architecture, name="falcon-h1"), "draft model .*draft.gguf: recurrent models"),
        (lambda path: path.write_bytes(b"GGML"), "draft model .*draft.gguf: "),
        (lambda path: None, "draft model .*draft.gguf: no such file"),
    ],
)
def test_a_plan_refuses_a_draft_model_as_a_start_does(
    model: Path, tmp_path: Path, build: Callable[[Path], object], message: str
) -> None:
    build(tmp_path / "draft.gguf")
    given = [f"model={model}", "context_length=64", "workers=[{name: a}]", f"speculative.model={tmp_path}/draft.gguf"]
    with pytest.raises(UsageError, match=message):
        planned(load_config(None, given))


async def test_several_models_share_one_draft_model(model: Path, tmp_path: Path) -> None:
    """The draft model serves the models that have its tokens, and the start names them."""
    small = partial(build_tiny_model, layers=1, hidden=64, ffn=64, heads=4)
    paths = [model, small(tmp_path / "other.gguf", vocabulary=1024), small(tmp_path / "copy.gguf")]
    names = [{"model": str(path), "context_length": 64 + index} for index, path in enumerate(paths)]
    file = {"models": names, "workers": [{"name": "a"}], "speculative": {"model": str(model), "threads": 1}}
    configs = ClusterConfig.model_validate(file).of_each_model()
    events: list[Event] = []
    async with AsyncExitStack() as stack:
        opened = [(own, stack.enter_context(Model.open(path))) for own, path in zip(configs, paths, strict=True)]
        first, other, last = (await drafting(stack, opened, events.append)).settings
        assert first is not None and other is not None and last is not None
        assert first.draft_model is not None and last.draft_model is not None and other.draft_model is None
        assert first.draft_model.times is last.draft_model.times, "it is loaded once"
        memory = draft_model_memory(opened)
    remark, notice = events
    assert isinstance(remark, Notice) and isinstance(notice, Notice) and memory is not None
    assert remark.text.startswith(f"draft model {model.name} is not small: ")
    text = f"draft model {model.name}: {mib(memory.bytes)} MiB of this machine, for {model.stem}, copy"
    assert notice.text.startswith(f"{text} (not for other: another vocabulary), ")
