"""Rewrites checkpoints that transformers saved to the form in which the models are published."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Names = Mapping[str, str]

_TOWER: Names = {r"vision_tower\.(?=embeddings|encoder|post_layernorm)": "vision_tower.vision_model."}
_INTERNVL: Names = {
    r"vision_tower\.": "vision_model.",
    r"embeddings\.cls_token": "embeddings.class_embedding",
    r"embeddings\.position_embeddings": "embeddings.position_embedding",
    r"patch_embeddings\.projection": "patch_embedding",
    r"encoder\.layer\.": "encoder.layers.",
    r"attention\.projection_layer": "attn.proj",
    r"lambda_": "ls",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"multi_modal_projector\.layer_norm": "mlp1.0",
    r"multi_modal_projector\.linear_1": "mlp1.1",
    r"multi_modal_projector\.linear_2": "mlp1.3",
}
_KIMIVL: Names = {
    r"(model\.)?mm_projector\.pre_norm": "multi_modal_projector.pre_norm",
    r"mm_projector\.proj\.0": "multi_modal_projector.linear_1",
    r"mm_projector\.proj\.2": "multi_modal_projector.linear_2",
    r"encoder\.patch_embed": "patch_embed",
}
_NAMES: Mapping[str, Names] = {
    "Gemma3ForConditionalGeneration": _TOWER,
    "Lfm2VlForConditionalGeneration": _TOWER,
    "InternVLForConditionalGeneration": _INTERNVL,
    "Kimi_K25ForConditionalGeneration": _KIMIVL,
}


def publish(family: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = {_renamed(name, _NAMES.get(family, {})): tensor for name, tensor in load_file(path).items()}
    if family.startswith("InternVL"):
        tensors = _fused(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(_published(family, config)))


def _renamed(name: str, names: Names) -> str:
    for pattern, new in names.items():
        name = re.sub(pattern, new, name)
    return name


def _fused(tensors: dict[str, Any]) -> dict[str, Any]:
    """Joins the weights, and the biases, of queries, keys and values."""
    for name in [name for name in tensors if ".attention.q_proj." in name]:
        parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        tensors[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return tensors


def _published(family: str, config: dict[str, Any]) -> dict[str, Any]:
    if family.startswith("InternVL"):
        vision = config["vision_config"] | {"architectures": ["InternVisionModel"]}
        dynamic = {"min_dynamic_patch": 1, "max_dynamic_patch": 12}
        return config | dynamic | {"architectures": ["InternVLChatModel"], "vision_config": vision}
    if family.startswith("Kimi"):
        names = {"architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl"}
        return config | names
    if family.startswith("Qwen2_5"):
        return config | {"vision_config": config["vision_config"] | {"image_size": 112}}
    return config
