"""Damages keys and tensors of every family: the model must run, or be refused in one line that names the file. Accepted
models are computed and planned for a GPU, since kernels rely on the checks."""

from __future__ import annotations

import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import available_levels
from llamaclust.kernels.backend import kv_bytes
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import most_workspace_bytes
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.arithmetic.batches import Chain
from support.models.tiny_architectures import MODELS, TOKENS, build_architecture
from support.seed import SEED

DAMAGES = 20  # per model, different in each run
SMALL_BYTES = 2048
MEMORY_LIMIT_BYTES = 1 << 25
RUN_LIMITS = StageLimits(max_batch_tokens=32, max_outputs=32, max_sequences=2, max_context_tokens=64, kv_blocks=8)
LARGEST_RUN_BYTES = 1 << 28
"""The bytes that a run of 30 rows may need; larger models are not run."""

WHOLE_NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    31,
    33,
    255,
    256,
    257,
    1023,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    -1,
    -(1 << 31),
]
REAL_NUMBERS = [0.0, -0.0, -1.0, 1e-30, 1e30, 3.4e38, float("nan"), float("inf"), -float("inf")]


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Asserts that Python objects and NumPy arrays stay below a memory limit."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY_LIMIT_BYTES
    finally:
        tracemalloc.stop()


def other_value(random: Random, value: Any) -> Any:
    """Returns another number, a value of another kind, or an array of another length or with other numbers."""
    choice = random.randrange(10)
    if choice < 4:
        return random.choice(WHOLE_NUMBERS)
    if choice < 6:
        return random.choice(REAL_NUMBERS)
    if choice < 7:
        return random.choice(["", "none", "yarn", True, False])
    length = random.choice([0, 1, 2, 3, 5, 64, 1 << 12])
    numbers: list[Any] = WHOLE_NUMBERS if choice < 9 else REAL_NUMBERS
    array = np.array([random.choice(numbers) for _ in range(length)], np.int64 if choice < 9 else np.float32)
    if isinstance(value, np.ndarray) and len(value) and choice == 7:
        array = value.copy()
        array[random.randrange(len(array))] = random.choice(WHOLE_NUMBERS) % 128
    return array


def with_damaged_key(random: Random, model: ModelFile, keys: list[str]) -> ModelFile:
    """Replaces or removes a key of this or another family."""
    name = random.choice(keys)
    value = model.metadata.get(name)
    metadata = dict(model.metadata)
    if value is not None and random.randrange(4) == 0:
        del metadata[name]
    else:
        metadata[name] = other_value(random, value)
    return replace(model, metadata=metadata)


def with_damaged_tensor(random: Random, model: ModelFile) -> ModelFile:
    """Removes a tensor, renames it, or gives it fewer rows, columns, dimensions or bytes."""
    tensor = random.choice(sorted(model.tensors.values(), key=lambda each: each.name))
    tensors: dict[str, Tensor] = dict(model.tensors)
    del tensors[tensor.name]
    match random.randrange(5):
        case 0:
            other = random.choice(sorted(model.tensors))
            tensors[other] = replace(tensor, name=other)
        case 1:
            axis = random.randrange(len(tensor.shape))
            shape = tuple(max(1, size // 2) if i == axis else size for i, size in enumerate(tensor.shape))
            tensors[tensor.name] = replace(tensor, shape=shape)
        case 2:
            tensors[tensor.name] = replace(tensor, shape=tensor.shape[1:] or (1, *tensor.shape))
        case 3:
            tensors[tensor.name] = as_halves(tensor, random.choice([QuantType.F16, QuantType.BF16]))
        case _:
            pass
    return replace(model, tensors=tensors)


def as_halves(tensor: Tensor, kind: QuantType) -> Tensor:
    """Returns the tensor with another type, over the first of its bytes."""
    return replace(tensor, quant_type=kind, n_bytes=tensor.rows * kind.info.row_bytes(tensor.shape[-1]))


def plan_for_gpu(model: Model) -> None:
    """Plans a run without a GPU; only a ModelFileError of one line is allowed."""
    try:
        program = model.program(0, model.layer_count, context_tokens=RUN_LIMITS.max_context_tokens)
        assert most_workspace_bytes(program, model.tensors_for(program), RUN_LIMITS) > 0
    except ModelFileError as error:
        assert "\n" not in str(error)


def use(file: ModelFile) -> None:
    """Loads and runs the file; only a ModelFileError of one line is allowed."""
    try:
        with bounded_memory():
            model = Model(file)
        backend = CpuBackend(1)
        program = model.program(0, model.layer_count, context_tokens=RUN_LIMITS.max_context_tokens)
        tensors = model.tensors_for(program)
        run_bytes = kv_bytes(program, RUN_LIMITS) + backend.workspace_bytes(program, tensors, RUN_LIMITS)
        if run_bytes > LARGEST_RUN_BYTES:
            return
        plan_for_gpu(model)
        chain = Chain(backend, model, limits=RUN_LIMITS)
        try:
            assert chain.logits(TOKENS, chunk=9).shape[0] == len(TOKENS)
        finally:
            chain.close()
    except ModelFileError as error:
        line = str(error)
        assert "\n" not in line and str(file.path) in line and len(line) < 500


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFile]:
    folder = tmp_path_factory.mktemp("families")
    return lambda name: open_model(build_architecture(folder / f"{name}.gguf", name))


@pytest.fixture(scope="module")
def key_names(make: Callable[[str], ModelFile]) -> list[str]:
    """Returns the keys of all families, without the architecture's name."""
    found = {key.split(".", 1)[1] for name in sorted(MODELS) for key in own_keys(make(name).metadata)}
    assert len(found) > 40
    return sorted(found)


def own_keys(metadata: Mapping[str, object]) -> list[str]:
    architecture = metadata["general.architecture"]
    return [key for key in metadata if key.startswith(f"{architecture}.")]


@pytest.mark.parametrize("name", MODELS)
def test_damaged_keys_and_tensors(make: Callable[[str], ModelFile], key_names: list[str], name: str) -> None:
    model, random = make(name), Random(SEED ^ zlib.crc32(name.encode()))
    own = own_keys(model.metadata)
    others = [f"{model.metadata['general.architecture']}.{key}" for key in key_names]
    for damage in range(DAMAGES):
        damaged = model
        for _ in range(random.choice([1, 1, 2])):
            if random.randrange(3) == 0:
                damaged = with_damaged_tensor(random, damaged)
            else:
                damaged = with_damaged_key(random, damaged, random.choice([own, own, others]))
        try:
            use(damaged)
        except Exception as error:
            changed = {key: value for key, value in damaged.metadata.items() if value is not model.metadata.get(key)}
            gone = [key for key in model.metadata if key not in damaged.metadata]
            shapes = {
                each.name: each.shape for each in damaged.tensors.values() if each != model.tensors.get(each.name)
            }
            what = f"seed {SEED}, damage {damage}: keys {changed}, without {gone}, tensors {shapes}"
            raise AssertionError(f"{what}: {error!r}") from error


@pytest.mark.parametrize("name", MODELS)
def test_small_tensors_of_halves(make: Callable[[str], ModelFile], name: str) -> None:
    """Checks that tensors which GPU kernels read as float32 are refused in other types or can be planned. Each name is
    tried once."""
    file, seen = make(name), set[str]()
    for tensor in file.tensors.values():
        ending = tensor.name.removeprefix(f"{tensor.layer}.")
        if tensor.n_bytes > SMALL_BYTES or ending in seen:
            continue
        seen.add(ending)
        damaged = replace(file, tensors={**file.tensors, tensor.name: as_halves(tensor, QuantType.F16)})
        try:
            model = Model(damaged)
        except ModelFileError:
            continue
        plan_for_gpu(model)


@pytest.mark.parametrize("name", ["llama-experts", "gpt-oss", "bailingmoe2", "gemma4-experts", "deepseek2"])
@pytest.mark.parametrize("rows", ["one expert", "all experts"])
def test_router_without_numbers(make: Callable[[str], ModelFile], tmp_path: Path, name: str, rows: str) -> None:
    """Checks that a router with NaN rows chooses existing experts, the same on all CPUs; a router of only NaN makes
    logits NaN, which fails requests."""
    good = make(name)
    router = next(each for each in good.tensors.values() if each.name.endswith("ffn_gate_inp.weight"))
    content = bytearray(good.path.read_bytes())
    router_bytes = router.n_bytes if rows == "all experts" else router.n_bytes // router.shape[0]
    content[router.offset : router.offset + router_bytes] = np.full(router_bytes // 4, np.nan, "<f4").tobytes()
    path = tmp_path / "nan.gguf"
    path.write_bytes(content)
    model, found = Model.open(path), []
    for level in available_levels():
        chain = Chain(CpuBackend(2, level), model, limits=RUN_LIMITS)
        found.append(chain.logits(TOKENS))
        chain.close()
        np.testing.assert_array_equal(found[-1], found[0])
    assert np.isnan(found[0]).any() or rows == "one expert"
