"""Models on paper: as large as files would be, and built into the same programs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import UsageError
from llamaclust.core.limits import StageLimits
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Moe
from llamaclust.tools.assume import paper_model as paper
from llamaclust.tools.assume.paper_model import PaperModel
from llamaclust.tools.assume.paper_model import paper_model as model_of
from llamaclust.tools.assume.shapes import SHAPES, Shape
from llamaclust.tools.quantize.mixes import MIXES
from llamaclust.tools.quantize.quantize import plan_quantizing, write_quantized
from llamaclust.tools.quantize.type_choice import Wishes
from llamaclust.worker.devices.workspace import planned_workspace_bytes
from support.models.tiny_model import build_tiny_model
from support.seed import SEED

PUBLISHED = {  # billions of parameters, as their publishers say; heads that predict further tokens left out
    "7b": 6.74,
    "8b": 8.03,
    "70b": 70.55,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "qwen3-30b-a3b": 30.5,
    "glm-4.5-air": 106.9,
    "qwen3.5-35b-a3b": 34.66,
}
FILES = {  # GB of public files of these mixes
    "7b": ("Q4_K_M", 4.08),
    "8b": ("Q4_K_M", 4.92),
    "70b": ("Q4_K_M", 42.52),
    "gpt-oss-20b": ("MXFP4_MOE", 12.11),
    "qwen3-30b-a3b": ("Q4_K_M", 18.56),
}
SMALL = {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocabulary": 320, "ffn": 512}
LIMITS = StageLimits(max_batch_tokens=64, max_outputs=4, max_sequences=4, max_context_tokens=512, kv_blocks=64)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_published_models(name: str) -> None:
    assert SHAPES[name].parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)


@pytest.mark.parametrize("name", FILES)
def test_files_on_paper_are_as_large_as_public_ones(name: str) -> None:
    mix, size_gb = FILES[name]
    found = model_of(name)
    assert found.mix == mix
    assert found.file.size_bytes / 1e9 == pytest.approx(size_gb, rel=0.01)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_model_of_its_architecture(name: str) -> None:
    shape = SHAPES[name]
    model = Model(model_of(name).file)
    assert model.layer_count == shape.layers
    mixtures = [step for step in model.program(0, shape.layers).steps if isinstance(step, Moe)]
    assert len(mixtures) == (shape.layers - shape.leading_layers if shape.experts else 0)
    assert all((step.experts, step.used) == (shape.experts, shape.used) for step in mixtures)


def small(name: str) -> Shape:
    shape = SHAPES[name]
    changed = replace(shape, **SMALL)  # type: ignore[arg-type]
    if shape.experts:
        changed = replace(changed, experts=8, used=2, expert_ffn=256, shared_ffn=256 if shape.shared_ffn else 0)
    return replace(changed, keys={key: value for key, value in shape.keys.items() if key != "rope.dimension_count"})


@pytest.mark.parametrize(("name", "mix"), [("8b", "Q4_K_M"), ("glm-4.5-air", "Q3_K_M"), ("gpt-oss-20b", "MXFP4_MOE")])
def test_paper_and_file_cost_the_same(name: str, mix: str, tmp_path: Path) -> None:
    """The same shape written, and quantized by `quantize`."""
    source, floats = np.random.default_rng(SEED), paper._file_of(name, small(name))
    written = [
        TensorSource(tensor.name, tensor.quant_type, tensor.shape, partial(drawn, source, tensor.n_bytes))
        for tensor in floats.tensors.values()
    ]
    write_gguf(tmp_path / "floats.gguf", floats.metadata, written)
    job = plan_quantizing(open_model(tmp_path / "floats.gguf"), Wishes(MIXES[mix]), None, allow_requantize=False)
    write_quantized(job, tmp_path / "quantized.gguf", 1, keep_split=False, progress=lambda *done: None)
    file, on_paper = Model.open(tmp_path / "quantized.gguf"), Model(PaperModel("", floats, None).quantized(mix).file)
    assert on_paper.costs(KvType.F16) == file.costs(KvType.F16)
    workspaces = [planned_workspace_bytes(model, 0, 4, LIMITS, 2) for model in (file, on_paper)]
    assert workspaces[0] == workspaces[1]


def drawn(source: np.random.Generator, n_bytes: int) -> memoryview:
    """Finite numbers, as F16 and as F32."""
    return np.full(n_bytes // 2, source.integers(0x2C00, 0x3000), np.uint16).data


def test_a_file_is_taken_as_it_is_and_quantized_on_paper(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "m.gguf")
    as_is, smaller = model_of(str(path)), model_of(f"{path}:q4_k")
    assert as_is.mix is None and as_is.file.identity == open_model(path).identity and as_is.title == "m"
    assert smaller.mix == "Q4_K_M"
    costs = [Model(one.file).costs(KvType.F16) for one in (as_is, smaller)]
    assert costs[1].layers[0].weight_bytes < costs[0].layers[0].weight_bytes / 3
    assert [cost.layers[0].kv_bytes_per_token for cost in costs] == [2 * 2 * 2 * 32] * 2


def test_models_of_the_catalog_are_quantized_on_paper_to_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACLUST_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="run: llamaclust model pull qwen3-8b; or one of the shapes"):
        model_of("qwen3-8b:q2_k")
    folder = tmp_path / "models/qwen3-8b-q4_k_m"
    folder.mkdir(parents=True)
    build_tiny_model(folder / "Qwen3-8B-Q4_K_M.gguf")
    assert model_of("qwen3-8b:q2_k").mix == "Q2_K"
    assert model_of("qwen3-8b:q4_k_m").mix is None  # the file that is there
    with pytest.raises(UsageError, match="qwen3-8b:q9: no such quantization; the catalog has q4_k_m"):
        model_of("qwen3-8b:q9")


def test_unknown_models_and_mixes_are_refused_with_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"--model: .*8c.*; or one of the shapes 7b, 8b, 70b, gpt-oss-20b"):
        model_of("8c")
    with pytest.raises(UsageError, match=r"--model: 'q4_k_x' is no quantization; known: f32, f16, .*q4_k_m"):
        model_of("8b:q4_k_x")
    with pytest.raises(UsageError, match=r"llamaclust model pull qwen3-8b:q4_k_m; or one of the shapes"):
        model_of("qwen3-8b:q4_k_m")
    assert model_of("GPT-OSS-20B:q8_0").mix == "Q8_0"
