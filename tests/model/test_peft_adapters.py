"""Checks that adapters in PEFT's format give the same tensors as in GGUF, and that others are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.modules import matrix_name
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.loader import Model
from llamaclust.model.model_keys import read_architecture
from llamaclust.model.program import Adapt
from llamaclust.model.quant_types import QuantType
from support.models.checkpoint_files import safetensors_bytes
from support.models.tiny_adapter import build_adapter, build_peft
from support.models.tiny_architectures import MODELS, build_architecture
from support.models.tiny_model import build_tiny_model

Arrays = dict[str, NDArray[Any]]
PREFIX = "base_model.model.model.layers.0"
HIDDEN, HEADS, KV_HEADS = 64, 4, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    return build_tiny_model(path, hidden=HIDDEN, heads=HEADS, kv_heads=KV_HEADS, ffn=96, layers=2)


def adapter_tensors(model: ModelFile) -> dict[str, bytes]:
    return {name: tensor.read() for name, tensor in model.tensors.items() if name.startswith("adapter.")}


@pytest.mark.parametrize("kind", [QuantType.F32, QuantType.F16, QuantType.BF16])
def test_the_tensors_are_those_of_the_same_adapter_in_gguf(model: Path, tmp_path: Path, kind: QuantType) -> None:
    gguf = build_adapter(tmp_path / "a.gguf", model, quant_type=kind)
    peft = build_peft(tmp_path / "a", model, gguf)
    expected, found = (Model.open(model, adapters=[path]) for path in (gguf, peft))
    assert adapter_tensors(found.file) == adapter_tensors(expected.file) and adapter_tensors(found.file)
    assert found.program(0, 2) == expected.program(0, 2), "with the same factors"
    assert found.adapters[0].path == peft
    by_weights = Model.open(model, adapters=[peft / "adapter_model.safetensors"])
    assert by_weights.adapter_digests == found.adapter_digests


def test_parts_of_reordered_rows_are_parts_of_the_whole(model: Path, tmp_path: Path) -> None:
    gguf = build_adapter(tmp_path / "a.gguf", model, rank=3)
    opened = Model.open(model, adapters=[build_peft(tmp_path / "a", model, gguf)])
    for part in ("attn_q", "attn_k"):
        tensor = opened.file.tensor(f"adapter.0.blk.1.{part}.weight.lora_b")
        whole = tensor.read()
        for start, end in ((0, 1), (5, 350), (191, 193), (len(whole) - 7, len(whole)), (40, 40)):
            assert tensor.read_range(start, end) == whole[start:end]


def test_the_digest_depends_on_weights_and_settings(model: Path, tmp_path: Path) -> None:
    gguf = build_adapter(tmp_path / "a.gguf", model)
    folders = [build_peft(tmp_path / "a", model, gguf), build_peft(tmp_path / "b", model, gguf, use_rslora=True)]
    folders.append(build_peft(tmp_path / "c", model, build_adapter(tmp_path / "c.gguf", model, seed=2)))
    assert len({Model.open(model, adapters=[folder]).adapter_digests[0] for folder in folders}) == 3


def test_a_rank_stabilized_adapter_divides_by_the_root_of_its_rank(model: Path, tmp_path: Path) -> None:
    gguf = build_adapter(tmp_path / "a.gguf", model, rank=4, alpha=6, parts=("attn_v",))
    opened = Model.open(model, adapters=[build_peft(tmp_path / "a", model, gguf, use_rslora=True)])
    assert next(step for step in opened.program(0, 1).steps if hasattr(step, "factor")).factor == 3.0


def factors(module: str = "self_attn.v_proj", rows: int = 32, halves: str = "AB") -> Arrays:
    shapes = {"A": (4, HIDDEN), "B": (rows, 4)}
    return {f"{PREFIX}.{module}.lora_{half}.weight": np.full(shapes[half], 0.5, np.float32) for half in halves}


CANDIDATES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj", "mlp.c_fc", "mlp.c_proj"),
    *("attn.c_attn", "attn.c_proj"),
)
"""Names of a layer's modules in any architecture."""
SUPPORTED = [
    name
    for name, tiny in MODELS.items()
    if any(matrix_name(tiny.architecture, f"model.layers.1.{module}") for module in CANDIDATES)
]


@pytest.mark.parametrize("name", SUPPORTED)
def test_modules_of_each_architecture_are_products_of_its_programs(name: str, tmp_path: Path) -> None:
    path = build_architecture(tmp_path / "m.gguf", name)
    model, tensors = open_model(path), {}
    architecture = read_architecture(model)
    for module in CANDIDATES:
        matrix = matrix_name(architecture, f"model.layers.1.{module}")
        if matrix is not None and f"{matrix}.weight" in model.tensors:
            rows, columns = model.tensor(f"{matrix}.weight").shape
            for half, shape in (("A", (4, columns)), ("B", (rows, 4))):
                weights = np.full(shape, 0.5, np.float32)
                tensors[f"base_model.model.model.layers.1.{module}.lora_{half}.weight"] = weights
    opened = Model.open(path, adapters=[write(tmp_path / "a", tensors, {})])
    steps = opened.program(0, opened.layer_count).steps
    assert sum(isinstance(step, Adapt) for step in steps) == len(tensors) // 2 > 2


LAYER_1 = {name.replace("layers.0", "layers.1"): value for name, value in factors().items()}
BAD: dict[str, tuple[Arrays, dict[str, Any], str]] = {
    "another kind": (factors(), {"peft_type": "LOHA"}, "'LOHA' is not supported; expected LORA"),
    "DoRA": (factors(), {"use_dora": True}, "'use_dora': this setting is not supported"),
    "bias": (factors(), {"bias": "all"}, "'bias': 'all' is not supported; expected 'none'"),
    "whole matrices": (
        factors(),
        {"modules_to_save": ["lm_head"]},
        "'modules_to_save': whole matrices are not supported",
    ),
    "a changed base": (factors(), {"init_lora_weights": "pissa"}, "changes the base model"),
    "parameters": (
        factors(),
        {"target_parameters": ["mlp.experts"]},
        "'target_parameters': this setting is not supported",
    ),
    "rank": (factors(), {"r": 8}, "expected rank 8 as in adapter_config.json, found 4"),
    "no alpha": (factors(), {"lora_alpha": 0}, "'lora_alpha': expected more than 0 (also in float32), found 0"),
    "alpha null": (factors(), {"lora_alpha": None}, "'lora_alpha': expected a number, found null or NaN"),
    "alpha nan": (factors(), {"lora_alpha": float("nan")}, "'lora_alpha': expected 0 to 1e+12, found nan"),
    "alpha too small": (
        factors(),
        {"lora_alpha": 1e-60},
        "'lora_alpha': expected more than 0 (also in float32), found 1e-60",
    ),
    "no rows": (factors("self_attn.q_proj", rows=0), {}, "expected a matrix, found shape [0, 4]"),
    "no columns": (
        factors() | {f"{PREFIX}.self_attn.v_proj.lora_A.weight": np.ones((4, 0), np.float32)},
        {},
        "expected a matrix, found shape [4, 0]",
    ),
    "several scales": (
        factors() | LAYER_1,
        {"alpha_pattern": {"1.self_attn.v_proj": 3}},
        "values are not supported: 6 for",
    ),
    "module": (factors("self_attn.r_proj"), {}, "adapters of llama cannot change this module"),
    "head": (
        {"base_model.model.lm_head.lora_A.weight": np.ones((4, HIDDEN), np.float32)},
        {},
        "cannot change this module",
    ),
    "embedding": (
        {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 320), np.float32)},
        {},
        "cannot change this module",
    ),
    "magnitudes": (
        {f"{PREFIX}.mlp.up_proj.lora_magnitude_vector": np.ones(4, np.float32)},
        {},
        "cannot change this module",
    ),
    "a half": (factors(halves="A"), {}, "it has no matching lora_b tensor"),
    "heads": (
        factors("self_attn.q_proj", rows=65),
        {},
        "expected a multiple of 8 rows for 4 heads of the model, found 65",
    ),
    "width": (factors(rows=31), {}, "expected shape [32, 4], found [31, 4]"),
    "layer": (
        {name.replace("layers.0", "layers.9"): value for name, value in factors().items()},
        {},
        "the model has no matrix product with this weight",
    ),
    "not a number": (
        factors() | {f"{PREFIX}.mlp.up_proj.lora_A.weight": np.full((4, 64), np.nan, np.float32)},
        {},
        "nan",
    ),
    "type": ({name: value.astype(np.float64) for name, value in factors().items()}, {}, "found F64"),
    "two names": (
        factors() | {name.replace("weight", "default.weight"): value for name, value in factors().items()},
        {},
        "the file has it under two names",
    ),
    "a vector": ({f"{PREFIX}.self_attn.v_proj.lora_A.weight": np.ones(4, np.float32)}, {}, "expected a matrix"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_adapters_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    tensors, config, message = BAD[name]
    folder = write(tmp_path / "a", tensors, config)
    with pytest.raises(ModelFileError) as caught:
        Model.open(model, adapters=[folder])
    text = str(caught.value)
    assert text.startswith(f"{folder}/") and message in text and "\n" not in text, text


def write(folder: Path, tensors: Arrays, config: dict[str, Any]) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


def test_damaged_files_are_refused(model: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", factors(), {})
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    for cut in (0, 7, 40, len(data) - 1):
        weights.write_bytes(data[:cut])
        with pytest.raises(ModelFileError, match="cut short"):
            Model.open(model, adapters=[folder])
    weights.unlink()
    with pytest.raises(ModelFileError, match=r"adapter_model\.safetensors: no such file"):
        Model.open(model, adapters=[folder])
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(ModelFileError, match="expected a JSON object"):
        Model.open(model, adapters=[folder])
