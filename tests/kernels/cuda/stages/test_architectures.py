"""Checks that every architecture gives the CPU's bits on a GPU. `REFUSED` lists what GPUs do not support."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import LlamaclustError
from llamaclust.kernels.backend import Backend, Float32
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend, workspace_bytes
from llamaclust.kernels.multi_device import BackendLayers, MultiDeviceBackend
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Adapt, Buffer, Step
from llamaclust.model.quant_types import QuantType
from llamaclust.wire.microbatch.messages import Chunk, Microbatch
from support.arithmetic.batches import load_stage
from support.cuda.stages import LIMITS, MODELS, ROWS, Open, random_tokens, run, same
from support.models.tiny.llama4 import SHORT_CHUNKS
from support.models.tiny.shape import Tiny
from support.models.tiny_architectures import MODELS as ARCHITECTURES
from support.models.tiny_architectures import build_tiny
from support.models.tiny_encoders import RANK, build_encoder
from support.wire.frame_reader import build_batch

REFUSED = ("encoders are", "rerankers are", "adapters are")
OTHERS = [name for name in ARCHITECTURES if name not in MODELS]
"""Architectures outside of MODELS; `test_stage` has more tests of those in MODELS."""


@pytest.mark.parametrize("name", OTHERS)
def test_prompts_and_single_tokens(opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str) -> None:
    model = opened(name)
    tokens = random_tokens(model)
    same(run(cuda, model, tokens, 7), run(cpu, model, tokens, ROWS))


def refusal(model: Model, *further: Step) -> str:
    program = model.program(0, model.layer_count)
    try:
        workspace_bytes(replace(program, steps=(*program.steps, *further)), model.tensors_for(program), LIMITS)
    except LlamaclustError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_architecture_is_refused(opened: Open, name: str) -> None:
    assert refusal(opened(name)) == ""


def test_what_is_refused(opened: Open, tmp_path: Path) -> None:
    encoder = Model.open(build_encoder(tmp_path / "encoder.gguf", "modern-bert", pooling=1))
    reranker = Model.open(build_encoder(tmp_path / "reranker.gguf", "qwen3", pooling=RANK))
    x = Buffer("x", 64)
    messages = refusal(encoder), refusal(reranker), refusal(opened("llama"), Adapt(x, x, 0, "down", "up", 4, 1.0))
    for message, refused in zip(messages, REFUSED, strict=True):
        assert message.startswith(refused) and "set 'device: cpu'" in message


QUANTIZED = {
    "experts without a gate": (ARCHITECTURES["nemotron_h_moe"], QuantType.Q8_0),
    "experts of a latent width": (ARCHITECTURES["nemotron_h_moe-latent"], QuantType.Q4_0),
    "weighed inputs": (ARCHITECTURES["llama4"], QuantType.Q8_0),
    "one expert of many": (ARCHITECTURES["llama4-maverick"], QuantType.MXFP4),
    "weighed inputs, 256 columns": (
        replace(ARCHITECTURES["llama4"], hidden=256, ffn=256, shared_ffn=256),
        QuantType.Q4_K,
    ),
}


@pytest.mark.parametrize(("tiny", "kind"), QUANTIZED.values(), ids=QUANTIZED)
def test_quantized_experts(tmp_path: Path, cpu: CpuBackend, cuda: CudaBackend, tiny: Tiny, kind: QuantType) -> None:
    """Covers a prompt, in which an expert has several lines, and single tokens."""
    model = Model.open(build_tiny(tmp_path / "model.gguf", replace(tiny, expert_type=kind)))
    tokens = random_tokens(model)
    wanted = run(cpu, model, tokens, ROWS)
    for chunk in (ROWS, 3, 1):
        same(run(cuda, model, tokens[: 6 if chunk == 1 else ROWS], chunk), wanted[: 6 if chunk == 1 else ROWS])


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(build_tiny(tmp_path_factory.mktemp("chunks") / "model.gguf", SHORT_CHUNKS))


@pytest.mark.parametrize("kv_type", KvType)
def test_short_chunks(chunked: Model, cpu: CpuBackend, cuda: CudaBackend, kv_type: KvType) -> None:
    limits = replace(LIMITS, kv_type=str(kv_type))
    tokens = random_tokens(chunked, 40)
    wanted = run(cpu, chunked, tokens, ROWS, limits)
    for size in (25, 5, 1):
        same(run(cuda, chunked, tokens, size, limits), wanted)


def test_blocks_are_given_up_behind_chunks(chunked: Model, cpu: CpuBackend, cuda: CudaBackend) -> None:
    """Later chunks overwrite released blocks."""
    assert chunked.window == 6
    limits = replace(LIMITS, kv_blocks=6, window_blocks=3)
    tokens = random_tokens(chunked, 90)

    def rows(backend: Backend) -> Float32:
        stage, found = load_stage(backend, chunked, limits=limits), []
        for at in range(0, 90, 18):
            first, end = max(0, at - 5) // 16, -(-(at + 18) // 16)
            ring = tuple(n for block in range(first, end) for n in (block % 3, 1))
            chunk = Chunk(tuple(tokens[at : at + 18]), at, (0, 6), 18, None, ring, first)
            batch = build_batch(Microbatch("m", 1, 0, (chunk,)), limits, 320, chunked.window)
            found.append(stage.run(batch, None).copy())
        stage.close()
        return np.concatenate(found)

    same(rows(cuda), rows(cpu))


@pytest.mark.parametrize("on_gpu_first", [False, True])
def test_layers_that_share_keys_and_inputs_on_two_devices(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, on_gpu_first: bool
) -> None:
    """The split is at the only border that plans allow; inputs of later layers follow the hidden state."""
    model = opened("gemma4-inputs")
    assert model.costs(KvType.F16).borders == (0, 1, 6)
    first, last = (cuda, cpu) if on_gpu_first else (cpu, cuda)
    chain = MultiDeviceBackend([BackendLayers(first, 0, 1), BackendLayers(last, 1, 6)])
    tokens = random_tokens(model)
    wanted = run(cpu, model, tokens, ROWS)
    for chunk in (ROWS, 6):
        same(run(chain, model, tokens, chunk), wanted)
