"""Checks that valid adapter files are read, and that others are refused in one line that names file and place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.core.limits import MAX_ADAPTER_RANK, MAX_ADAPTERS
from llamaclust.model.adapters import read_adapter
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Adapt
from llamaclust.model.quant_types import QuantType
from support.models.tiny_adapter import build_adapter
from support.models.tiny_model import build_tiny_model

SMALL = {"hidden": 64, "heads": 2, "kv_heads": 1, "ffn": 96, "layers": 2}
Q = "blk.0.attn_q.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "m.gguf", **SMALL)  # type: ignore[arg-type]


def tensor(name: str, *shape: int, value: float = 0.5, kind: QuantType = QuantType.F32) -> TensorSource:
    data = np.full(shape, value, np.float16 if kind is QuantType.F16 else np.float32).tobytes()
    return TensorSource(name, kind, shape, lambda: data)


def pair(name: str = Q, rank: int = 4, value: float = 0.5) -> list[TensorSource]:
    return [tensor(f"{name}.lora_a", rank, 64, value=value), tensor(f"{name}.lora_b", 64, rank)]


METADATA: dict[str, WritableValue] = {
    "general.architecture": "llama",
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": np.float32(8),
}


def test_steps_stand_behind_the_products_of_one_input(model: Path, tmp_path: Path) -> None:
    first = build_adapter(tmp_path / "1.gguf", model, rank=4, alpha=8)
    second = build_adapter(tmp_path / "2.gguf", model, rank=2, alpha=0, parts=("attn_k",))
    opened = Model.open(model, adapters=[first, second])
    assert [adapter.path for adapter in opened.adapters.values()] == [first, second]
    steps = opened.program(0, 1).steps
    adapts = [step for step in steps if isinstance(step, Adapt)]
    assert [(step.adapter, step.down.split(".")[4], step.factor) for step in adapts[:4]] == [
        (0, "attn_q", 2.0),
        (0, "attn_k", 2.0),
        (0, "attn_v", 2.0),
        (1, "attn_k", 1.0),
    ]
    at = steps.index(adapts[0])
    assert len(adapts) == 8 and steps[at : at + 4] == tuple(adapts[:4])
    plain = Model.open(model)
    assert tuple(step for step in steps if not isinstance(step, Adapt)) == plain.program(0, 1).steps
    with_cost, without = opened.costs(KvType.F16).layers[0], plain.costs(KvType.F16).layers[0]
    assert with_cost.weight_bytes > without.weight_bytes and with_cost.macs_per_token > without.macs_per_token


def test_the_model_id_is_that_of_the_plain_model(model: Path, tmp_path: Path) -> None:
    first, second = (build_adapter(tmp_path / f"{seed}.gguf", model, seed=seed) for seed in (1, 2))
    plain, both = Model.open(model), Model.open(model, adapters=[first, second])
    assert both.model_id == plain.model_id and both.plain.tensors == plain.file.tensors != both.file.tensors
    assert len({*both.adapter_digests.values()}) == 2


def test_adapters_keep_their_numbers_where_others_are_not_there(model: Path, tmp_path: Path) -> None:
    first, second = (build_adapter(tmp_path / f"{seed}.gguf", model, seed=seed) for seed in (1, 2))
    both = Model.open(model, adapters=[first, second])
    alone = both.adapted_by({1: both.adapters[1]})
    assert [*alone.adapter_digests] == [1]
    of_second = [step for step in both.program(0, 1).steps if not isinstance(step, Adapt) or step.adapter == 1]
    assert list(alone.program(0, 1).steps) == of_second


def test_a_chosen_chat_template_stays(model: Path, tmp_path: Path) -> None:
    chosen, plain = (Model.open(model, name) for name in ("chatml", None))
    adapter = Model.open(model, adapters=[build_adapter(tmp_path / "a.gguf", model, seed=1)]).adapters[0]
    kept = chosen.adapted_by({0: adapter}).chat_template.source
    assert kept == chosen.chat_template.source != plain.chat_template.source


def test_a_change_of_any_tensor_changes_the_digest(model: Path, tmp_path: Path) -> None:
    """Checks that the digests of adapters with equal names, shapes and sizes differ if any one tensor differs."""
    path, plain = build_adapter(tmp_path / "a.gguf", model, rank=64, quant_type=QuantType.F16), open_model(model)
    trained = path.read_bytes()
    digests = {read_adapter(path, plain).identity}
    tensors = open_model(path).tensors.values()
    for changed in tensors:
        start = changed.offset
        path.write_bytes(trained[:start] + bytes(changed.n_bytes) + trained[start + changed.n_bytes :])
        digests.add(read_adapter(path, plain).identity)
    assert len(digests) == 1 + len(tensors)


BAD: dict[str, tuple[Callable[[], list[TensorSource]], dict[str, WritableValue], str]] = {
    "a model": (pair, {"general.type": "model"}, "metadata 'general.type': expected 'adapter', found 'model'"),
    "another kind": (pair, {"adapter.type": "ia3"}, "metadata 'adapter.type': expected 'lora', found 'ia3'"),
    "architecture": (pair, {"general.architecture": "qwen2"}, "the model's architecture 'llama', found 'qwen2'"),
    "no alpha": (
        pair,
        {"adapter.lora.alpha": "8"},
        "metadata 'adapter.lora.alpha': expected a decimal number, found text",
    ),
    "infinite alpha": (pair, {"adapter.lora.alpha": np.float32(np.inf)}, "'adapter.lora.alpha': expected "),
    "activated": (
        pair,
        {"adapter.alora.invocation_tokens": np.array([1], np.uint32)},
        "certain tokens activate (aLoRA) are not supported",
    ),
    "nothing": (list, {}, "tensors: the adapter has no tensors"),
    "head": (lambda: pair("output.weight"), {}, "only lora_a and lora_b tensors of the layers' matrices are supported"),
    "norm": (
        lambda: [tensor("blk.0.attn_norm.weight", 64)],
        {},
        "only lora_a and lora_b tensors of the layers' matrices are supported",
    ),
    "name": (
        lambda: pair("blk.0.a/../b.weight"),
        {},
        "only lora_a and lora_b tensors of the layers' matrices are supported",
    ),
    "no product": (lambda: pair("blk.0.attn_norm.weight"), {}, "the model has no matrix product with this weight"),
    "no layer": (lambda: pair("blk.7.attn_q.weight"), {}, "the model has no matrix product with this weight"),
    "half": (lambda: pair()[:1], {}, "it has no matching lora_b tensor"),
    "other half": (lambda: pair()[1:], {}, "it has no matching lora_a tensor"),
    "rank": (lambda: pair(rank=MAX_ADAPTER_RANK + 1), {}, f"expected a rank of 1 to {MAX_ADAPTER_RANK}, found 1025"),
    "ranks": (
        lambda: [tensor(f"{Q}.lora_a", 4, 64), tensor(f"{Q}.lora_b", 64, 3)],
        {},
        "expected shape [64, 4], found [64, 3]",
    ),
    "width": (
        lambda: [tensor(f"{Q}.lora_a", 4, 32), tensor(f"{Q}.lora_b", 64, 4)],
        {},
        "expected shape [4, 64], found [4, 32]",
    ),
    "dimensions": (lambda: [tensor(f"{Q}.lora_a", 1, 4, 64)], {}, "expected a matrix, found shape [1, 4, 64]"),
    "not a number": (lambda: pair(value=np.nan), {}, "a weight of nan"),
    "infinite": (lambda: pair(value=-np.inf), {}, "a weight of inf"),
    "large": (lambda: pair(value=1e30), {}, "a weight of 1e+30"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_adapters_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    make, metadata, message = BAD[name]
    path = tmp_path / "bad.gguf"
    write_gguf(path, METADATA | metadata, make())
    with pytest.raises(ModelFileError) as caught:
        Model.open(model, adapters=[path])
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text, text


def test_quantized_adapters_are_refused(model: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "bad.gguf", bytes(4 * 2 * 34)
    write_gguf(path, METADATA, [TensorSource(f"{Q}.lora_a", QuantType.Q8_0, (4, 64), lambda: data)])
    with pytest.raises(ModelFileError, match="expected type F32, F16, BF16, found Q8_0"):
        Model.open(model, adapters=[path])


WEIGHTS = {
    QuantType.F32: {0x477FE000: "", 0xC77FE000: "", 0x47800000: "65536", 0xFF800000: "inf", 0xFFC00000: "nan"},
    QuantType.F16: {0x7BFF: "", 0xFBFF: "", 0xFC00: "inf", 0x7E00: "nan"},
    QuantType.BF16: {0x477F: "", 0xC77F: "", 0xC780: "65536", 0x7F80: "inf", 0xFFC0: "nan"},
}
"""Bits of a weight and the text that the error shows for it, empty if it is accepted."""


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_too_large_are_refused(model: Path, tmp_path: Path, kind: QuantType) -> None:
    path = build_adapter(tmp_path / "a.gguf", model, quant_type=kind, parts=("attn_q",))
    last = max(open_model(path).tensors.values(), key=lambda tensor: tensor.offset)
    data, end = path.read_bytes(), last.offset + last.n_bytes
    for bits, shown in WEIGHTS[kind].items():
        weight = bits.to_bytes(4 if kind is QuantType.F32 else 2, "little")
        path.write_bytes(data[: end - len(weight)] + weight + data[end:])
        with (
            nullcontext()
            if not shown
            else pytest.raises(ModelFileError, match=f"has a weight of {shown}; the limit is 65504")
        ):
            Model.open(model, adapters=[path])


def test_too_many_adapters_are_refused(model: Path, tmp_path: Path) -> None:
    path = build_adapter(tmp_path / "a.gguf", model, parts=("attn_q",))
    Model.open(model, adapters=[path] * MAX_ADAPTERS)
    with pytest.raises(ModelFileError, match="17 adapters exceed the limit of 16"):
        Model.open(model, adapters=[path] * (MAX_ADAPTERS + 1))
