"""Checks that a model in this process with layers on GPUs gives the processor's answers bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.cli.models.perplexity import Source
from llamaclust.cli.options import Gpus
from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.cluster.scheduler.speculation import speculation
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.gpus import ranges
from llamaclust.kernels._native import MicrobatchFrame, RowOutcomes, SamplingTasks
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.model.placement import read_rules
from llamaclust.model.quant_types import QuantType
from llamaclust.worker.devices import backends
from llamaclust.worker.stage.nextn import NextnDrafter, Normed
from support.clusters.command_line import CommandLine, command_line
from support.cuda.shim_build import build
from support.cuda.shim_device import ShimDevice
from support.models.tiny.nextn_models import with_nextn
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model
from support.paths import TESTS
from support.plans.drafting import AnyWindows
from support.plans.mtp import order_any
from support.seed import SEED

PROMPT = [5, 9, 17, 33, 65, 3, 7]
MIB = 1 << 20
ROOM = 256 * MIB
ENOUGH = 1024
"""MiB that suffice for any tiny model and for the 1/256 of a GPU's memory that is left to kernels and graphs."""
Answer = tuple[list[int], list[bytes]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("local") / "tiny.gguf"
    small = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "vocabulary": 320}
    return build_tiny_model(path, layers=4, quant_type=QuantType.Q8_0, **small)  # type: ignore[arg-type]


@pytest.fixture
def shim(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces GPUs by the shim, unless a real GPU is tested."""
    if request.config.getoption("--gpu", default=False):
        return

    def open_gpu(
        name: str, threads: int, cap: int | None, packed_cache: PackedCacheFolder | None, kernels_dir: Path | None
    ) -> CudaBackend:
        return CudaBackend(name, ShimDevice(build(), memory_bytes=min(cap or ROOM, ROOM), sms=1), threads, packed_cache)

    monkeypatch.setattr(backends, "open_gpu", open_gpu)
    folders = [TESTS / "kernels" / "cuda" / "shim_site", TESTS]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")]))


def settings(device: str = "cpu", gpu_layers: int | None = None, gpu_memory_bytes: int | None = None) -> LocalSettings:
    return LocalSettings(
        context_length=64, max_sequences=2, device=device, gpu_layers=gpu_layers, gpu_memory_bytes=gpu_memory_bytes
    )


def answered(model: Path, given: LocalSettings, tokens: int = 6) -> tuple[Answer, str]:
    with LocalClient(model, 1, settings=given) as client:
        reply = client.generate(PROMPT, max_tokens=tokens, temperature=0.9, seed=3)
        return (list(reply.token_ids), [struct.pack("<f", one) for one in reply.logprobs]), client.placement


@pytest.fixture(scope="module")
def wanted(model: Path) -> Answer:
    answer, placement = answered(model, settings())
    assert placement == ""
    return answer


@pytest.mark.parametrize(
    ("device", "gpu_layers", "placement"),
    [
        ("cuda:0", None, "4 of 4 layers on GPUs: [0, 4) cuda:0"),
        ("cuda:0", 3, "3 of 4 layers on GPUs: [0, 1) cpu, [1, 4) cuda:0"),
        ("cuda:0", 99, "4 of 4 layers on GPUs: [0, 4) cuda:0"),
        ("cuda:0", 0, "0 of 4 layers on GPUs: [0, 4) cpu"),
    ],
)
def test_tokens_and_logprobs_are_those_of_the_processor(
    shim: None, model: Path, wanted: Answer, device: str, gpu_layers: int | None, placement: str
) -> None:
    assert answered(model, settings(device, gpu_layers)) == (wanted, placement)


@pytest.mark.parametrize(
    ("room", "placement"),
    [
        (4, "0 of 4 layers on GPUs: [0, 4) cpu"),
        (13, "4 of 4 layers on GPUs: [0, 3) cuda:0, [3, 4) cuda:1"),
        (15, "4 of 4 layers on GPUs: [0, 2) cuda:0, [2, 4) cuda:1"),
        (21, "4 of 4 layers on GPUs: [0, 4) cuda:1"),
    ],
)
def test_what_does_not_fit_stays_on_the_processor(
    shim: None, request: pytest.FixtureRequest, model: Path, wanted: Answer, room: int, placement: str
) -> None:
    if request.config.getoption("--gpu", default=False):
        pytest.skip("takes two cards")
    assert answered(model, settings("cuda:0,cuda:1", None, room * MIB)) == (wanted, placement)


@pytest.mark.parametrize(
    ("gpu_layers", "placement"),
    [
        (None, "6 of 6 layers on GPUs: [0, 6) cuda:0"),
        (5, "5 of 6 layers on GPUs: [0, 1) cpu, [1, 6) cuda:0"),
        (4, "0 of 6 layers on GPUs: [0, 6) cpu"),
    ],
)
def test_layers_that_share_keys_stay_together(
    shim: None, tmp_path: Path, gpu_layers: int | None, placement: str
) -> None:
    """The GPU gets fewer layers of Gemma 4 E2B than allowed if that number would separate layers that share keys."""
    path = build_architecture(tmp_path / "inputs.gguf", "gemma4-inputs")
    wanted, _ = answered(path, settings())
    assert answered(path, settings("cuda:0", gpu_layers)) == (wanted, placement)


def skip_on_a_gpu_with_other_workspace(request: pytest.FixtureRequest, room: int) -> None:
    if room < ENOUGH and request.config.getoption("--gpu", default=False):
        pytest.skip("the workspace of a GPU grows with its multiprocessors, and less is left for layers")


def share_kernels(line: CommandLine, request: pytest.FixtureRequest) -> None:
    """Lets commands use the kernels that this process has compiled, since compilation takes minutes on a GPU."""
    if request.config.getoption("--gpu", default=False):
        line.set_variables(LLAMACLUST_HOME=str(environment().home))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("local") / "mixture.gguf"
    small = {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 256, "vocabulary": 320, "experts": 16}
    return build_tiny_model(path, layers=4, quant_type=QuantType.Q8_0, **small)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cpu_moe", "room", "placement"),
    [
        (99, ENOUGH, "4 of 4 layers on GPUs: [0, 4) cuda:0, experts of [0, 4) cpu"),
        (2, ENOUGH, "4 of 4 layers on GPUs: [0, 4) cuda:0, experts of [0, 2) cpu"),
        (0, ENOUGH, "4 of 4 layers on GPUs: [0, 4) cuda:0"),
        (None, ENOUGH, "4 of 4 layers on GPUs: [0, 4) cuda:0"),
        (None, 33, "4 of 4 layers on GPUs: [0, 4) cuda:0, experts of [0, 2) cpu"),
        (None, 21, "3 of 4 layers on GPUs: [0, 1) cpu, [1, 4) cuda:0, experts of [1, 4) cpu"),
        (0, 32, "3 of 4 layers on GPUs: [0, 1) cpu, [1, 4) cuda:0"),
        (2, 29, "3 of 4 layers on GPUs: [0, 1) cpu, [1, 4) cuda:0, experts of [1, 2) cpu"),
    ],
)
def test_experts_in_ram(
    shim: None, request: pytest.FixtureRequest, mixture: Path, cpu_moe: int | None, room: int, placement: str
) -> None:
    """RAM holds the experts of as many layers as the user sets, or as do not fit on the GPU."""
    skip_on_a_gpu_with_other_workspace(request, room)
    wanted, _ = answered(mixture, settings())
    given = replace(settings("cuda:0", None, room * MIB), cpu_moe=cpu_moe)
    assert answered(mixture, given) == (wanted, placement)


@pytest.mark.parametrize(
    ("rules", "given", "placement"),
    [
        (r"blk\.[13]\.ffn_.*_exps=CPU", {}, "[0, 4) cuda:0, experts of [1, 2), [3, 4) cpu"),
        (r"blk\.[13]\.ffn_.*_exps=CPU", {"cpu_moe": 1}, "[0, 4) cuda:0, experts of [0, 2), [3, 4) cpu"),
        (r"blk\.0\.ffn_.*_exps=gpu", {"cpu_moe": 99}, "[0, 4) cuda:0, experts of [1, 4) cpu"),
        (r"blk\.[01]\.=CPU,blk\.3\.ffn_.*_exps=CPU", {}, "[0, 2) cpu, [2, 4) cuda:0, experts of [3, 4) cpu"),
        (r"blk\.2\.=CUDA0,exps=CPU", {"gpu_layers": 1}, "[0, 2) cpu, [2, 4) cuda:0, experts of [3, 4) cpu"),
        (".=CPU", {}, "[0, 4) cpu"),
        (r"blk\.3\.ffn_.*_exps=gpu", {"room": 33}, "[0, 4) cuda:0, experts of [0, 2) cpu"),
        (r"blk\.3\.ffn_.*_exps=CPU", {"room": 33}, "[0, 4) cuda:0, experts of [0, 1), [3, 4) cpu"),
    ],
)
def test_rules_for_tensors(
    shim: None,
    request: pytest.FixtureRequest,
    mixture: Path,
    rules: str,
    given: dict[str, int | None],
    placement: str,
) -> None:
    skip_on_a_gpu_with_other_workspace(request, given.get("room") or ENOUGH)
    wanted, _ = answered(mixture, settings())
    own = settings("cuda:0", given.get("gpu_layers"), (given.get("room") or ENOUGH) * MIB)
    ruled = replace(own, cpu_moe=given.get("cpu_moe"), placement=tuple(read_rules(rules)))
    answer, placed = answered(mixture, ruled)
    assert answer == wanted
    assert placed.partition(": ")[2] == placement


def test_random_rules_change_no_bit(shim: None, mixture: Path) -> None:
    """Random rules place the first layers, and experts of other layers, in RAM."""
    draws = random.Random(SEED)
    wanted, _ = answered(mixture, settings())
    for _ in range(4):
        first, moved = draws.randint(0, 3), sorted(draws.sample(range(4), draws.randint(1, 3)))
        rules = [rf"blk\.({'|'.join(map(str, moved))})\.ffn_.*_exps=CPU", r"blk\..*_exps=gpu"]
        rules = [rf"blk\.[0-{first - 1}]\.=CPU", *rules] if first else rules
        given = replace(settings("cuda:0"), placement=tuple(read_rules(",".join(rules))))
        answer, placed = answered(mixture, given)
        on_gpu = [layer for layer in moved if layer >= first]
        experts = f", experts of {ranges(on_gpu)} cpu" if on_gpu else ""
        assert (answer, placed) == (
            wanted,
            f"{4 - first} of 4 layers on GPUs: "
            + (f"[0, {first}) cpu, " if first else "")
            + f"[{first}, 4) cuda:0{experts}",
        ), (SEED, rules)


@pytest.mark.parametrize(
    ("device", "rules", "told"),
    [
        (
            "cuda:0",
            r"blk\.3\.=CPU",
            "placement: layer 3 in RAM comes after layer 0, which may be on a GPU; a worker's",
        ),
        ("cuda:0", "exps=CUDA1", "placement: there is no cuda:1 among cuda:0; name one of these, or `gpu` for any GPU"),
        ("cuda:0", "attn_q=CPU", "placement: 'attn_q=ram' puts blk.0.attn_q.weight in RAM, but not"),
        ("cpu", "exps=CPU", "placement is for GPUs; set device to cuda:0 as well"),
    ],
)
def test_rules_that_cannot_be(shim: None, mixture: Path, device: str, rules: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        answered(mixture, replace(settings(device), placement=tuple(read_rules(rules))))


def test_rules_on_the_command_line(shim: None, request: pytest.FixtureRequest, mixture: Path) -> None:
    given = Gpus(("cuda:0",), override_tensors=["exps=CPU,attn=CUDA0", "x=gpu"]).placement
    assert list(map(str, given)) == ["'exps=ram'", "'attn=cuda:0'", "'x=gpu'"]
    with pytest.raises(UsageError, match="--override-tensor is for models on a GPU: give --device cuda:0 as well"):
        assert Gpus(override_tensors=["exps=CPU"]).placement
    with pytest.raises(UsageError, match="--override-tensor: 'exps' is not a rule; write"):
        assert Gpus(("cuda:0",), override_tensors=["exps"]).placement
    with command_line() as line:
        share_kernels(line, request)
        words = ("generate", "--model", mixture, "-t", "1", "-n", "2", "Hello", "--device", "cuda:0")
        done = line.start(*words, "-ot", r"blk\.[13]\.ffn_.*_exps=CPU").wait()
        assert "[0, 4) cuda:0, experts of [1, 2), [3, 4) cpu" in done.err
        told = "-ot: set `placement` in the cluster file instead: --set 'placement=[\"exps=CPU\"]'"
        assert told in line.run("plan", "-ot", "exps=CPU").error


def test_experts_of_models_that_have_none(shim: None, model: Path, mixture: Path) -> None:
    with pytest.raises(UsageError, match=r"cpu_moe: .*tiny.gguf has no experts; remove cpu_moe"):
        answered(model, replace(settings("cuda:0"), cpu_moe=1))
    with pytest.raises(UsageError, match="cpu_moe is for GPUs; set device to cuda:0 as well"):
        answered(mixture, replace(settings(), cpu_moe=1))
    with pytest.raises(UsageError, match="--cpu-moe is for models on a GPU: give --device cuda:0 as well"):
        assert Gpus(all_cpu_moe=True).cpu_moe
    with pytest.raises(UsageError, match="--cpu-moe and --n-cpu-moe: give one of them"):
        assert Gpus(("cuda:0",), all_cpu_moe=True, n_cpu_moe=1).cpu_moe


@pytest.mark.parametrize(("name", "gpu_layers"), [("glm4moe", None), ("deepseek2", 1)])
def test_an_mtp_head_beside_layers_on_gpus(
    shim: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, gpu_layers: int | None
) -> None:
    """The processor computes the head from the same hidden states, so its drafts are the same. Timing decides which
    rows draft; of 24 tokens, some have drafts in both runs."""
    path, tokens = with_nextn(tmp_path / "head.gguf", name), 24
    wanted, _ = answered(path, settings(), tokens)
    order_any(random.Random(SEED), 3, monkeypatch)
    monkeypatch.setattr(speculation, "best_windows", AnyWindows(random.Random(SEED), 3))
    drafts = []
    for own in (settings(), settings("cuda:0", gpu_layers)):
        with noted_drafts() as noted:
            answer, placement = answered(path, replace(own, mtp=True), tokens)
        assert answer == wanted, f"seed {SEED}"
        drafts.append(noted)
    assert "on GPUs" in placement
    common = drafts[0].keys() & drafts[1].keys()
    assert common and all(drafts[0][place] == drafts[1][place] for place in common), f"seed {SEED}"


@contextmanager
def noted_drafts() -> Iterator[dict[int, int]]:
    """Yields the first token of each draft of an MTP head, by the position of the token that it follows."""
    noted, draft = dict[int, int](), NextnDrafter.draft

    def noting(
        self: NextnDrafter, frame: MicrobatchFrame, normed: Normed, outcomes: RowOutcomes, tasks: SamplingTasks
    ) -> None:
        draft(self, frame, normed, outcomes, tasks)
        _, positions, _, _, _, output_rows, *_ = frame.arrays
        for row, place in zip(outcomes.rows, output_rows, strict=True):
            if row.drafted:
                noted[int(positions[place]) + 1] = row.drafted[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NextnDrafter, "draft", noting)
        yield noted


def test_more_layers_than_fit_are_refused(shim: None, model: Path) -> None:
    told = r"tiny.gguf, layers \[0, 4\) on cuda:0, needs \d+ MiB .* are missing; use fewer layers on GPUs \(auto puts"
    with pytest.raises(InsufficientMemoryError, match=told):
        answered(model, settings("cuda:0", 4, 2 * MIB))


def test_logits_for_perplexity(shim: None, model: Path) -> None:
    found = []
    for gpus in (Gpus(), Gpus(("cuda:0",), "2")):
        with Source(model, 1, 1, None, None, None, gpus).local(64) as client:
            found.append(client.logits(PROMPT).tobytes())
    assert found[0] == found[1]
    with pytest.raises(UsageError, match="--device and --gpu-layers are for a model in this process"):
        Source(model, 1, 2, None, None, None, Gpus(("cuda:0",)))._open(64, 1)


def test_generate_on_the_command_line(shim: None, request: pytest.FixtureRequest, model: Path) -> None:
    with command_line() as line:
        share_kernels(line, request)
        words = ("generate", "--model", model, "-t", "1", "-n", "5", "--json", "Hello")
        # Not `run`, whose fork server another test may have started without the shim's GPUs.
        alone, gpu = line.run(*words), line.start(*words, "--device", "cuda:0", "-ngl", "3").wait()
        assert "3 of 4 layers on GPUs: [0, 1) cpu, [1, 4) cuda:0" in gpu.err
        both = [json.loads(one.out) for one in (alone, gpu)]
        assert both[0]["token_ids"] == both[1]["token_ids"] and both[0]["logprobs"] == both[1]["logprobs"]
        assert "set device to" not in (done := line.run(*words, "-ngl", "3")).error and done.code == 2
        assert "--gpu-layers is for workers with a GPU: give --device cuda:0 as well" in done.error
        assert "--device is for --model" in line.run("generate", "x", "--device", "cuda:0").error


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (settings("tpu"), "device: 'tpu' is not a device"),
        (settings(gpu_layers=3), "set device to cuda:0 as well"),
        (settings("cuda:0", -1), "gpu_layers is -1; set 0 or more"),
    ],
)
def test_mistakes_are_named(model: Path, given: LocalSettings, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        LocalClient(model, 1, settings=given)
