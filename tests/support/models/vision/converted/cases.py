"""Tiny vision models of transformers, by the name of their recorded projector files in data/converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.paths import DATA

FOLDER = DATA / "converted"
MEAN, DEVIATION = (0.5, 0.4, 0.3), (0.25, 0.3, 0.35)
WIDTH, HEADS, PATCH, TEXT_WIDTH, VOCABULARY = 16, 2, 4, 24, 64

Keys = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A vision model. `family`: transformers' class. `vision`, `keys`: its configuration. `side`: the encoder's patch
    size in pixels. `tile`: lines and columns of patches of the recorded tile. `call`: how the class gets its pixels."""

    family: str
    call: str
    vision: Keys
    tile: tuple[int, int]
    keys: Keys = field(default_factory=dict)
    text: Keys = field(default_factory=dict)
    processor: Keys = field(default_factory=dict)
    side: int = PATCH

    def random_tile(self) -> NDArray[np.uint8]:
        lines, columns = self.tile
        return np.random.default_rng(11).integers(0, 256, (lines * self.side, columns * self.side, 3), np.uint8)


_SQUARE: Keys = {"hidden_size": WIDTH, "intermediate_size": WIDTH}
_USUAL = _SQUARE | {"num_hidden_layers": 2, "num_attention_heads": HEADS}
_DEEP = _SQUARE | {"depth": 2, "num_heads": HEADS}
_WIDE = {"intermediate_size": 24}
_SIGLIP = _USUAL | {"image_size": 8 * PATCH, "patch_size": PATCH}
_GEMMA4 = _USUAL | {
    "num_key_value_heads": HEADS,
    "head_dim": WIDTH // HEADS,
    "patch_size": PATCH,
    "position_embedding_size": 840,
    "model_type": "gemma4_vision",
}
_PLAIN_TEXT = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 0}
_GLM = _DEEP | {"out_hidden_size": TEXT_WIDTH, "patch_size": PATCH, "spatial_merge_size": 2, "rms_norm_eps": 1e-5}
_ROPE = {"rope_type": "axial", "rope_theta": 1e4}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
_PIXTRAL = _SIGLIP | {"num_hidden_layers": 3, "head_dim": WIDTH // HEADS, "hidden_act": "silu", "model_type": "pixtral"}
_MISTRAL = {"model_type": "mistral", "rms_norm_eps": 1e-5, "head_dim": 12}

CASES: Mapping[str, Case] = MappingProxyType(
    {
        "gemma3": Case(
            "Gemma3ForConditionalGeneration",
            "pixels",
            _SIGLIP | {"vision_use_head": False},
            (8, 8),
            {"mm_tokens_per_image": 4},
            processor={"image_seq_length": 4},
        ),
        "gemma4v": Case(
            "Gemma4ForConditionalGeneration", "places", _GEMMA4 | {"standardize": True}, (6, 9), text=_PLAIN_TEXT
        ),
        "glm4v": Case("Glm4vForConditionalGeneration", "frames", _GLM | {"image_size": 16}, (6, 10), text=_SECTIONS),
        "idefics3": Case(
            "Idefics3ForConditionalGeneration", "list", _SIGLIP, (8, 8), {"scale_factor": 2}, {"model_type": "llama"}
        ),
        "internvl": Case(
            "InternVLForConditionalGeneration",
            "pixels",
            _SIGLIP | {"num_hidden_layers": 4, "attention_bias": True, "image_size": [32, 32], "patch_size": [4, 4]},
            (8, 8),
            {"image_seq_length": 16},
            {"model_type": "qwen2"},
        ),
        "kimivl": Case(
            "Kimi_K25ForConditionalGeneration",
            "images",
            _USUAL | {"num_hidden_layers": 3, "patch_size": 14, "pos_emb_height": 4, "pos_emb_width": 4},
            (6, 10),
            {"projection_hidden_size": WIDTH},
            {"model_type": "llama"},
            side=14,
        ),
        "lfm2": Case(
            "Lfm2VlForConditionalGeneration",
            "spatial",
            _USUAL
            | {"num_hidden_layers": 3, "num_patches": 16, "patch_size": 16}
            | {"model_type": "siglip2_vision_model", "vision_use_head": False},
            (6, 10),
            {"downsample_factor": 2, "projector_hidden_size": 40},
            {"model_type": "lfm2"},
            side=16,
        ),
        "llama4": Case(
            "Llama4ForConditionalGeneration",
            "pixels",
            _USUAL
            | {"num_hidden_layers": 3}
            | {"image_size": 8 * PATCH, "patch_size": PATCH, "pixel_shuffle_ratio": 0.5, "intermediate_size": 4 * WIDTH}
            | {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
            (8, 8),
        ),
        "llama4-unmerged": Case(
            "Llama4ForConditionalGeneration",
            "pixels",
            _USUAL
            | {"num_hidden_layers": 3}
            | {"image_size": 4 * PATCH, "patch_size": PATCH, "pixel_shuffle_ratio": 1.0}
            | {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
            (4, 4),
        ),
        "pixtral": Case(
            "Mistral3ForConditionalGeneration",
            "sizes",
            _PIXTRAL | {"rope_parameters": _ROPE},
            (6, 10),
            {"spatial_merge_size": 2, "projector_hidden_act": "gelu"},
            _MISTRAL,
        ),
        "qwen2.5vl": Case(
            "Qwen2_5_VLForConditionalGeneration",
            "frames",
            _DEEP
            | {"depth": 4, "out_hidden_size": TEXT_WIDTH, "patch_size": PATCH, "spatial_merge_size": 2}
            | {"window_size": 112, "fullatt_block_indexes": [1, 3]},
            (32, 8),
            text=_SECTIONS,
        ),
        "qwen3vl": Case(
            "Qwen3VLForConditionalGeneration",
            "frames",
            _DEEP
            | {"out_hidden_size": TEXT_WIDTH, "patch_size": PATCH, "spatial_merge_size": 2}
            | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            (6, 10),
            text=_SECTIONS,
        ),
        "gemma4v-clamped": Case(
            "Gemma4ForConditionalGeneration",
            "places",
            _GEMMA4 | _WIDE | {"use_clipped_linears": True},
            (6, 9),
            text=_PLAIN_TEXT,
        ),
        "glm-ocr": Case("GlmOcrForConditionalGeneration", "frames", _GLM, (6, 10), text=_SECTIONS),
        "pixtral-12b": Case(
            "LlavaForConditionalGeneration",
            "sizes",
            _PIXTRAL | _WIDE | {"rope_parameters": _ROPE},
            (6, 10),
            {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
            _MISTRAL,
        ),
        "smolvlm": Case(
            "SmolVLMForConditionalGeneration",
            "list",
            _SIGLIP | _WIDE,
            (8, 8),
            {"scale_factor": 4},
            {"model_type": "llama"},
        ),
    }
)
