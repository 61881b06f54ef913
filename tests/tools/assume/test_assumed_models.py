"""Checks that assumed models have the sizes and programs of real files."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llamaclust.cli.app import app
from llamaclust.cluster.config.catalog import catalog_names, find_entry
from llamaclust.cluster.config.public_models import public_models
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.limits import StageLimits
from llamaclust.core.sizes import gigabytes
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Moe
from llamaclust.tools.assume import assumed_model as module
from llamaclust.tools.assume.assumed_model import AssumedModel, shape_model, with_file_size
from llamaclust.tools.assume.assumed_model import assumed_model as model_of
from llamaclust.tools.assume.public_shapes import IN_CATALOG, no_file_hint, public_shapes
from llamaclust.tools.assume.shapes import SHAPES, ModelShape
from llamaclust.tools.quantize.mixes import FLOATS, MIXES
from llamaclust.tools.quantize.quantize import plan_quantizing, write_quantized
from llamaclust.tools.quantize.type_choice import MixChoice
from llamaclust.worker.devices.workspace import planned_workspace_bytes
from support.models.tiny_model import build_tiny_model
from support.seed import SEED

PUBLISHED = {  # billions of parameters of their files, from the publishers
    "7b": 6.74,
    "8b": 8.03,
    "70b": 70.55,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "qwen3-30b-a3b": 30.5,
    "glm-4.5-air": 110.5,  # 106.9 without the MTP head
    "qwen3.5-35b-a3b": 34.66,
}
FILES = {  # GB of public files in these mixes
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


@pytest.mark.parametrize("name", public_shapes())
def test_shapes_of_the_catalog_have_its_parameters_and_are_models(name: str) -> None:
    shape, model = public_shapes()[name], public_models().get(name)
    if model is not None:  # the table rounds to two or three digits
        assert shape.parameters / 1e9 == pytest.approx(model.billions, rel=0.02)
        assert model.name in catalog_names()
    opened = shape_model(name, shape).opened
    assert opened.layer_count == shape.layers
    assert (opened.window is not None) == any("sliding_window" in key for key in shape.keys)


def test_most_of_the_catalog_has_a_shape() -> None:
    known = set(public_models()) & set(public_shapes())
    assert len(known) > 0.75 * len(public_models())
    assert set(public_shapes()) <= {*catalog_names()}


@pytest.mark.parametrize("name", ["qwen3-8b", "gpt-oss-20b", "glm-4.5-air", "gemma-3-4b-it:q8_0", "qwen3-0.6b:q6_k"])
def test_sizes_in_the_list_are_those_of_plans(name: str) -> None:
    entry = find_entry(name)
    assert entry is not None
    listed = with_file_size(entry)
    assert listed.about_bytes == model_of(name).file.size_bytes != entry.about_bytes
    assert listed.shown_size == f"about {gigabytes(listed.about_bytes)}"


def test_sizes_without_a_shape_stay_estimates_and_known_ones_stay() -> None:
    for name in ("glm-4.7-flash", "smollm2-135m-instruct"):
        entry = find_entry(name)
        assert entry is not None and with_file_size(entry) == entry


@pytest.mark.parametrize("name", FILES)
def test_assumed_files_are_as_large_as_public_ones(name: str) -> None:
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


def small(name: str) -> ModelShape:
    shape = SHAPES[name]
    changed = replace(shape, **SMALL)  # type: ignore[arg-type]
    if shape.experts:
        changed = replace(changed, experts=8, used=2, expert_ffn=256, shared_ffn=256 if shape.shared_ffn else 0)
    return replace(changed, keys={key: value for key, value in shape.keys.items() if key != "rope.dimension_count"})


@pytest.mark.parametrize(("name", "mix"), [("8b", "Q4_K_M"), ("glm-4.5-air", "Q3_K_M"), ("gpt-oss-20b", "MXFP4_MOE")])
def test_assumed_model_and_file_cost_the_same(name: str, mix: str, tmp_path: Path) -> None:
    """Compares with a file of the same shape that `quantize` has quantized."""
    source, floats = np.random.default_rng(SEED), module._file_of(name, small(name))
    written = [
        TensorSource(tensor.name, tensor.quant_type, tensor.shape, partial(drawn, source, tensor.n_bytes))
        for tensor in floats.tensors.values()
    ]
    write_gguf(tmp_path / "floats.gguf", floats.metadata, written)
    job = plan_quantizing(open_model(tmp_path / "floats.gguf"), MixChoice(MIXES[mix]), None, allow_requantize=False)
    write_quantized(job, tmp_path / "quantized.gguf", 1, keep_split=False, progress=lambda *done: None)
    file, assumed = Model.open(tmp_path / "quantized.gguf"), Model(AssumedModel("", floats, None).quantized(mix).file)
    assert assumed.costs(KvType.F16) == file.costs(KvType.F16)
    workspaces = [planned_workspace_bytes(model, 0, 4, LIMITS, 2) for model in (file, assumed)]
    assert workspaces[0] == workspaces[1]


def drawn(source: np.random.Generator, n_bytes: int) -> memoryview:
    """Returns bytes that are finite numbers both as F16 and as F32."""
    return np.full(n_bytes // 2, source.integers(0x2C00, 0x3000), np.uint16).data


def test_a_file_is_taken_as_it_is_and_quantized_assumed(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "m.gguf")
    as_is, smaller = model_of(str(path)), model_of(f"{path}:q4_k")
    assert as_is.mix is None and as_is.file.identity == open_model(path).identity and as_is.title == "m"
    assert smaller.mix == "Q4_K_M"
    costs = [Model(one.file).costs(KvType.F16) for one in (as_is, smaller)]
    assert costs[1].layers[0].weight_bytes < costs[0].layers[0].weight_bytes / 3
    assert [cost.layers[0].kv_bytes_per_token for cost in costs] == [2 * 2 * 2 * 32] * 2


def test_models_of_the_catalog_are_planned_by_their_shape_until_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACLUST_HOME", str(tmp_path))
    by_shape = [model_of(name) for name in ("qwen3-8b", "Qwen3-8B:q4_k_m", "qwen3-8b:q4", "qwen3-8b:q2_k")]
    assert [(model.title, model.mix) for model in by_shape] == [("Qwen3 8B", mix) for mix in ["Q4_K_M"] * 3 + ["Q2_K"]]
    folder = tmp_path / "models/qwen3-8b-q4_k_m"
    folder.mkdir(parents=True)
    build_tiny_model(folder / "Qwen3-8B-Q4_K_M.gguf")
    assert [model_of(f"qwen3-8b:{mix}").mix for mix in ("q2_k", "q3")] == ["Q2_K", "Q3_K_M"]
    assert model_of("qwen3-8b:q2_k").title == "Qwen3-8B-Q4_K_M"
    assert model_of("qwen3-8b:q4_k_m").mix is None  # the existing file
    assert model_of("qwen3-8b:q8_0").title == "Qwen3 8B"  # another file of the catalog, which does not exist
    with pytest.raises(UsageError, match="--model: 'q9' is not a quantization; known: f32, f16"):
        model_of("qwen3-8b:q9")


def test_models_of_the_catalog_without_a_shape_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMACLUST_HOME", str(tmp_path))
    with pytest.raises(UsageError) as error:
        model_of("glm-4.7-flash:q6_k")
    text = str(error.value)
    assert text.startswith(
        "--model: glm-4.7-flash:q6_k: the file's size is about 24.7 GB, but the model's shape is unknown; similar "
    )
    assert "glm-4.5-air" in text and "`llamaclust plan --assume MACHINES` lists all" in text and len(text) < 300


@pytest.mark.parametrize("mix", MIXES)
def test_published_experts_in_mxfp4_never_grow(mix: str) -> None:
    own, other = (model_of(f"gpt-oss-20b:{name}") for name in ("mxfp4", mix))
    assert own.shown_mix == "MXFP4" and own.has_mxfp4 and other.has_mxfp4
    if MIXES[mix].base not in FLOATS:
        assert other.file.size_bytes <= own.file.size_bytes
    assert all(
        tensor.n_bytes <= own.file.tensors[name].n_bytes
        for name, tensor in other.file.tensors.items()
        if "_exps." in name
    )


def test_the_catalog_says_which_quantizations_can_be_pulled() -> None:
    found = {spec: model_of(spec).is_in_catalog for spec in ("8b:iq4_xs", "qwen3-8b:iq4_xs", "7b", "gpt-oss-20b")}
    assert found == {"8b:iq4_xs": True, "qwen3-8b:iq4_xs": False, "7b": False, "gpt-oss-20b": True}
    assert model_of("qwen3.5-35b-a3b").is_in_catalog is False
    assert {*IN_CATALOG.values()} <= {*catalog_names()}
    assert all(SHAPES[name].parameters == public_shapes()[same].parameters for name, same in IN_CATALOG.items())


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_without_a_file_of_the_catalog_say_what_to_pull(name: str) -> None:
    hint = no_file_hint(f"{name}:q4_k_m")
    assert (hint is None) == (find_entry(name) is not None)
    if hint is not None:
        assert hint.startswith(f"{name}: only `plan --assume` knows this shape; ") and "hf:OWNER/REPO/FILE.gguf" in hint
        of_catalog = re.search(r"a model of that size is ([^;]*);", hint)
        assert of_catalog is None or find_entry(of_catalog[1]) is not None
        with pytest.raises(LlamaclustError, match=re.escape(hint)):
            CliRunner().invoke(app, ["model", "pull", name], catch_exceptions=False)
        assert (hint in CliRunner().invoke(app, ["model", "list", name]).stdout) == (name == "qwen3.5-35b-a3b")


def test_unknown_models_and_mixes_are_refused_with_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"^--model: 8c: neither a file nor .*, did you mean 8b.*MACHINES` lists all"):
        model_of("8c")
    with pytest.raises(UsageError, match=r"shape, did you mean qwen3\.5-35b-a3b\?; `llamaclust plan --assume"):
        model_of("qwen3.5")
    for name in ("x" * 5000, "qwen3", "gemma-3:q4_k_m"):
        with pytest.raises(UsageError) as error:
            model_of(name)
        assert len(str(error.value)) < 330 and "--assume MACHINES" in str(error.value), name
    with pytest.raises(UsageError, match=r"^--model: no/such/file.gguf: no such file$"):
        model_of("no/such/file.gguf")
    with pytest.raises(UsageError, match=r"--model: 'q4_k_x' is not a quantization; known: f32, f16, .*q4_k_m"):
        model_of("8b:q4_k_x")
    assert [model_of(f"GPT-OSS-20B:{mix}").mix for mix in ("q8_0", "mxfp4", "Q4")] == ["Q8_0", "MXFP4_MOE", "Q4_K_M"]
