"""Records transformers' results for the tiles of `tiny_projectors` in data/projectors: the text model's rows, float32
[rows, channels], little-endian. Run it again after a projector is added or changed, with its name as an argument (all
without one), where the project and PyTorch are installed:

    pip install torch==2.15.0 transformers==5.24.0
    python tests/support/models/vision/record_projectors.py NAME ...
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.models.vision.recording import (
    FOLDER,
    LAYER,
    Weights,
    layer_names,
    loaded,
    pixels,
    read_weights,
    recorded_at,
    renamed,
)
from support.models.vision.tiny_projectors import (
    FFN,
    HEADS,
    PATCH,
    PROJECTORS,
    TEXT_WIDTH,
    WIDTH,
    TinyProjector,
    build_projector,
    tile_of,
)

_SIGLIP_PARTS = {
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


def _siglip(tiny: TinyProjector, weights: Weights) -> dict[str, NDArray[np.float32]]:
    ends = {
        "v.patch_embd": "embeddings.patch_embedding",
        "v.position_embd": "embeddings.position_embedding",
        "v.post_ln": "post_layernorm",
    }
    return renamed(weights, ends | layer_names(tiny, _SIGLIP_PARTS, "encoder.layers"))


def _siglip_keys(tiny: TinyProjector) -> dict[str, Any]:
    size = {"image_size": tiny.side * PATCH, "patch_size": PATCH, "layer_norm_eps": 1e-5}
    return LAYER | size | {"num_hidden_layers": tiny.layers, "hidden_act": "gelu_pytorch_tanh"}


def idefics3(tiny: TinyProjector, weights: Weights, tile: NDArray[np.uint8]) -> Any:
    import torch
    from transformers import SmolVLMConfig, SmolVLMVisionConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer

    vision = SmolVLMVisionConfig(**_siglip_keys(tiny))
    text = {"model_type": "llama", "hidden_size": TEXT_WIDTH}
    config = SmolVLMConfig(vision_config=vision.to_dict(), text_config=text, scale_factor=tiny.merge)
    tower = loaded(SmolVLMVisionTransformer(vision), _siglip(tiny, weights))
    connector = loaded(SmolVLMConnector(config), renamed(weights, {"mm.model.fc": "modality_projection.proj"}))
    return connector(tower(torch.tensor(pixels(tile))).last_hidden_state)[0]


def gemma3(tiny: TinyProjector, weights: Weights, tile: NDArray[np.uint8]) -> Any:
    import torch
    from transformers import Gemma3Config, SiglipVisionConfig, SiglipVisionModel
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    keys = _siglip_keys(tiny) | {"vision_use_head": False}
    config = Gemma3Config(
        vision_config=keys | {"model_type": "siglip_vision_model"},
        text_config={"hidden_size": TEXT_WIDTH},
        mm_tokens_per_image=(tiny.side // tiny.merge) ** 2,
    )
    tower = loaded(SiglipVisionModel(SiglipVisionConfig(**keys)), _siglip(tiny, weights))
    projector = {
        "mm_input_projection_weight": weights["mm.input_projection.weight"],
        "mm_soft_emb_norm.weight": weights["mm.soft_emb_norm.weight"] - 1,
    }
    return loaded(Gemma3MultiModalProjector(config), projector)(tower(torch.tensor(pixels(tile))).last_hidden_state)[0]


def _qwen_patches(tiny: TinyProjector, tile: NDArray[np.uint8]) -> tuple[Any, Any]:
    """Returns a tile's patches, group by group, each as two frames, and the numbers of frames, lines and columns."""
    import torch

    (lines, columns), merge = tiny.tile, tiny.merge
    cut = pixels(tile)[0].reshape(3, lines // merge, merge, PATCH, columns // merge, merge, PATCH)
    ordered = cut.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None].repeat(2, axis=5)
    return torch.tensor(ordered.reshape(lines * columns, -1)), torch.tensor([[1, lines, columns]])


def _qwen(tiny: TinyProjector, weights: Weights, parts: Mapping[str, str]) -> dict[str, NDArray[np.float32]]:
    kernels = [weights[name] for name in ("v.patch_embd.weight", "v.patch_embd.weight.1")]
    found = {"patch_embed.proj.weight": np.stack(kernels, axis=2)}
    if "v.patch_embd.bias" in weights:
        found["patch_embed.proj.bias"] = weights["v.patch_embd.bias"]
    common = {"ln1": "norm1", "ln2": "norm2", "attn_qkv": "attn.qkv", "attn_out": "attn.proj"}
    return found | renamed(weights, layer_names(tiny, common | dict(parts), "blocks"))


def qwen25vl(tiny: TinyProjector, weights: Weights, tile: NDArray[np.uint8]) -> Any:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    config = Qwen2_5_VLVisionConfig(
        depth=tiny.layers,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_heads=HEADS,
        patch_size=PATCH,
        out_hidden_size=TEXT_WIDTH,
        window_size=4 * PATCH,
        fullatt_block_indexes=[1, 3],
        spatial_merge_size=tiny.merge,
    )
    parts = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    found = _qwen(tiny, weights, parts)
    for layer in range(tiny.layers):
        for end in ("weight", "bias"):
            each = [weights[f"v.blk.{layer}.attn_{part}.{end}"] for part in "qkv"]
            found[f"blocks.{layer}.attn.qkv.{end}"] = np.concatenate(each)
    found |= renamed(weights, {"v.post_ln": "merger.ln_q", "mm.0": "merger.mlp.0", "mm.2": "merger.mlp.2"})
    tower = loaded(qwen.Qwen2_5_VisionTransformerPretrainedModel(config), found)
    return tower(*_qwen_patches(tiny, tile)).pooler_output


def qwen3vl(tiny: TinyProjector, weights: Weights, tile: NDArray[np.uint8]) -> Any:
    import torch
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    config = Qwen3VLVisionConfig(
        depth=tiny.layers,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_heads=HEADS,
        patch_size=PATCH,
        out_hidden_size=TEXT_WIDTH,
        spatial_merge_size=tiny.merge,
        num_position_embeddings=tiny.side**2,
        deepstack_visual_indexes=list(tiny.kept),
    )
    found = _qwen(tiny, weights, {"ffn_up": "mlp.linear_fc1", "ffn_down": "mlp.linear_fc2"})
    ends = {"v.position_embd": "pos_embed", "v.post_ln": "merger.norm"}
    ends |= {"mm.0": "merger.linear_fc1", "mm.2": "merger.linear_fc2"}
    for number, layer in enumerate(tiny.kept):
        merger = f"deepstack_merger_list.{number}"
        to = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}
        ends |= {f"v.deepstack.{layer}.{part}": f"{merger}.{name}" for part, name in to.items()}
    result = loaded(Qwen3VLVisionModel(config), found | renamed(weights, ends))(*_qwen_patches(tiny, tile))
    return torch.cat((result.pooler_output, *result.deepstack_features), dim=1)


def _unpermuted(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns rows of Q or K in the checkpoint's order, where rotation pairs the halves of a head."""
    return weight.reshape(HEADS, -1, 2, WIDTH).swapaxes(1, 2).reshape(WIDTH, WIDTH)


def pixtral(tiny: TinyProjector, weights: Weights, tile: NDArray[np.uint8]) -> Any:
    import torch
    from transformers import Mistral3Config, PixtralVisionConfig, PixtralVisionModel
    from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

    keys = LAYER | {"num_hidden_layers": tiny.layers, "image_size": tiny.side * PATCH, "patch_size": PATCH}
    vision = PixtralVisionConfig(**keys, hidden_act="silu", rope_parameters={"rope_type": "axial", "rope_theta": 1e4})
    text = {"model_type": "mistral", "hidden_size": TEXT_WIDTH, "rms_norm_eps": 1e-5}
    config = Mistral3Config(
        vision_config=vision.to_dict(),
        text_config=text,
        spatial_merge_size=tiny.merge,
        multimodal_projector_bias=False,
        projector_hidden_act="gelu",
    )
    parts = {f"attn_{of}": f"attention.{to}_proj" for of, to in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))}
    parts |= {f"ffn_{part}": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")}
    parts |= {"ln1": "attention_norm", "ln2": "ffn_norm"}
    ends = {"v.patch_embd": "patch_conv", "v.pre_ln": "ln_pre"}
    found = renamed(weights, ends | layer_names(tiny, parts, "transformer.layers"))
    found = {name: _unpermuted(w) if ".q_proj" in name or ".k_proj" in name else w for name, w in found.items()}
    ends = {"mm.input_norm": "norm", "mm.patch_merger": "patch_merger.merging_layer"}
    ends |= {"mm.1": "linear_1", "mm.2": "linear_2"}
    rows = loaded(PixtralVisionModel(vision), found)(torch.tensor(pixels(tile))).last_hidden_state[0]
    return loaded(Mistral3MultiModalProjector(config), renamed(weights, ends))(rows, torch.tensor([tile.shape[:2]]))


def _patches(tile: NDArray[np.uint8]) -> Any:
    """Returns patches [1, patches, size * size * 3], line by line, with each pixel's colours adjacent."""
    import torch

    lines, columns = tile.shape[0] // PATCH, tile.shape[1] // PATCH
    cut = pixels(tile)[0].reshape(3, lines, PATCH, columns, PATCH).transpose(1, 3, 2, 4, 0)
    return torch.tensor(cut.reshape(1, lines * columns, -1))


def _by_pixel(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    return kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1)


def gemma4v(tiny: TinyProjector, weights: Weights, tile: NDArray[np.uint8]) -> Any:
    import torch
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig, Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder, Gemma4VisionModel

    config = Gemma4VisionConfig(
        **LAYER | {"num_hidden_layers": tiny.layers, "num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS},
        patch_size=PATCH,
        pooling_kernel_size=tiny.merge,
        position_embedding_size=tiny.side,
        standardize=True,
        rms_norm_eps=1e-5,
    )
    parts = {"ln1": "input_layernorm", "ln2": "pre_feedforward_layernorm"}
    parts |= {"attn_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}
    parts |= {f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"}
    parts |= {
        f"attn_{of}": f"self_attn.{to}_proj.linear" for of, to in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
    }
    parts |= {f"ffn_{part}": f"mlp.{part}_proj.linear" for part in ("gate", "up", "down")}
    found = renamed(weights, layer_names(tiny, parts, "encoder.layers"))
    found["patch_embedder.input_proj.weight"] = _by_pixel(weights["v.patch_embd.weight"])
    found["patch_embedder.position_embedding_table"] = weights["v.position_embd.weight"]
    found |= {"std_bias": weights["v.std_bias"], "std_scale": weights["v.std_scale"]}
    lines, columns = tiny.tile
    places = torch.tensor([[(x, y) for y in range(lines) for x in range(columns)]])
    rows = loaded(Gemma4VisionModel(config), found)(_patches(tile), places).last_hidden_state
    embedder = Gemma4MultimodalEmbedder(config, Gemma4TextConfig(hidden_size=TEXT_WIDTH))
    return loaded(embedder, renamed(weights, {"mm.input_projection": "embedding_projection"}))(rows)


def glm4v(tiny: TinyProjector, weights: Weights, tile: NDArray[np.uint8]) -> Any:
    from transformers.models.glm4v.configuration_glm4v import Glm4vVisionConfig
    from transformers.models.glm4v.modeling_glm4v import Glm4vVisionModel

    config = Glm4vVisionConfig(
        depth=tiny.layers,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        out_hidden_size=TEXT_WIDTH,
        num_heads=HEADS,
        patch_size=PATCH,
        image_size=tiny.side * PATCH,
        spatial_merge_size=tiny.merge,
        rms_norm_eps=1e-5,
    )
    found = _qwen(tiny, weights, {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")})
    ends = {"v.norm_embd": "post_conv_layernorm", "v.position_embd": "embeddings.position_embedding"}
    ends |= {"v.post_ln": "post_layernorm", "mm.patch_merger": "downsample", "mm.model.fc": "merger.proj"}
    ends |= {"mm.post_norm": "merger.post_projection_norm"}
    ends |= {f"mm.{part}": f"merger.{part}_proj" for part in ("gate", "up", "down")}
    tower = loaded(Glm4vVisionModel(config), found | renamed(weights, ends))
    return tower(*_qwen_patches(tiny, tile)).pooler_output


def internvl(tiny: TinyProjector, weights: Weights, tile: NDArray[np.uint8]) -> Any:
    import torch
    from transformers import InternVLConfig, InternVLVisionConfig, InternVLVisionModel
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    keys = LAYER | {"num_hidden_layers": tiny.layers, "layer_norm_eps": 1e-5, "attention_bias": True}
    vision = InternVLVisionConfig(**keys, image_size=tiny.side * PATCH, patch_size=PATCH)
    text = {"model_type": "qwen2", "hidden_size": TEXT_WIDTH}
    config = InternVLConfig(vision_config=vision.to_dict(), text_config=text, downsample_ratio=1 / tiny.merge)
    parts = {f"attn_{part}": f"attention.{part}_proj" for part in "qkv"}
    parts |= {"attn_out": "attention.projection_layer", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
    parts |= {"ln1": "layernorm_before", "ln2": "layernorm_after"}
    ends = {"v.patch_embd": "embeddings.patch_embeddings.projection"}
    found = renamed(weights, ends | layer_names(tiny, parts, "encoder.layer"))
    found["embeddings.cls_token"] = weights["v.class_embd"][None, None]
    found["embeddings.position_embeddings"] = weights["v.position_embd.weight"][None]
    for layer in range(tiny.layers):
        for number in (1, 2):
            found[f"encoder.layer.{layer}.lambda_{number}"] = weights[f"v.blk.{layer}.ls{number}.weight"]
    ends = {"mm.model.mlp.0": "layer_norm", "mm.model.mlp.1": "linear_1", "mm.model.mlp.3": "linear_2"}
    rows = loaded(InternVLVisionModel(vision), found)(torch.tensor(pixels(tile))).last_hidden_state[:, 1:]
    shuffled = InternVLModel.pixel_shuffle(None, rows.reshape(1, *tiny.tile, WIDTH), 1 / tiny.merge)
    projector = loaded(InternVLMultiModalProjector(config), renamed(weights, ends))
    return projector(shuffled.reshape(1, -1, shuffled.shape[-1]))[0]


def lfm2(tiny: TinyProjector, weights: Weights, tile: NDArray[np.uint8]) -> Any:
    import torch
    from transformers import Lfm2VlConfig, Siglip2VisionConfig, Siglip2VisionModel
    from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlMultiModalProjector

    keys = _siglip_keys(tiny) | {"num_patches": tiny.side**2, "vision_use_head": False}
    config = Lfm2VlConfig(
        vision_config=keys | {"model_type": "siglip2_vision_model"},
        text_config={"model_type": "lfm2", "hidden_size": TEXT_WIDTH},
        downsample_factor=tiny.merge,
        projector_hidden_size=WIDTH * tiny.merge**2,
    )
    found = _siglip(tiny, weights)
    found["embeddings.patch_embedding.weight"] = _by_pixel(weights["v.patch_embd.weight"])
    count, shape = tiny.tile[0] * tiny.tile[1], torch.tensor([tiny.tile])
    tower = loaded(Siglip2VisionModel(Siglip2VisionConfig(**keys)), found)
    rows = tower(_patches(tile), torch.ones(1, count, dtype=torch.int32), shape).last_hidden_state
    ends = {"mm.input_norm": "layer_norm", "mm.1": "linear_1", "mm.2": "linear_2"}
    projector = loaded(Lfm2VlMultiModalProjector(config), renamed(weights, ends))
    return projector(rows.reshape(1, *tiny.tile, WIDTH)).reshape(-1, TEXT_WIDTH)


def llama4(tiny: TinyProjector, weights: Weights, tile: NDArray[np.uint8]) -> Any:
    import torch
    from transformers import Llama4Config, Llama4VisionConfig, Llama4VisionModel
    from transformers.models.llama4.modeling_llama4 import Llama4MultiModalProjector

    vision = Llama4VisionConfig(
        **LAYER | {"num_hidden_layers": tiny.layers, "intermediate_size": tiny.ffn},
        image_size=tiny.side * PATCH,
        patch_size=PATCH,
        pixel_shuffle_ratio=1 / tiny.merge,
        projector_input_dim=WIDTH,
        projector_output_dim=WIDTH,
        vision_output_dim=WIDTH,
    )
    config = Llama4Config(vision_config=vision.to_dict(), text_config={"hidden_size": TEXT_WIDTH})
    parts = _SIGLIP_PARTS | {
        "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm",
        "attn_out": "self_attn.o_proj",
    }
    ends = {"v.pre_ln": "layernorm_pre", "v.post_ln": "layernorm_post"}
    ends |= {f"mm.model.mlp.{number}": f"vision_adapter.mlp.fc{number}" for number in (1, 2)}
    found = renamed(weights, ends | layer_names(tiny, parts, "model.layers"))
    found["patch_embedding.linear.weight"] = weights["v.patch_embd.weight"].reshape(WIDTH, -1)
    found["class_embedding"] = weights["v.class_embd"]
    found["positional_embedding_vlm"] = weights["v.position_embd.weight"]
    rows = loaded(Llama4VisionModel(vision), found)(torch.tensor(pixels(tile)), return_dict=True).last_hidden_state[0]
    return loaded(Llama4MultiModalProjector(config), renamed(weights, {"mm.model.fc": "linear_1"}))(rows)


REFERENCES: Mapping[str, Callable[[TinyProjector, Weights, NDArray[np.uint8]], Any]] = {
    "idefics3": idefics3,
    "gemma3": gemma3,
    "qwen2.5vl_merger": qwen25vl,
    "qwen3vl_merger": qwen3vl,
    "pixtral": pixtral,
    "gemma4v": gemma4v,
    "glm4v": glm4v,
    "internvl": internvl,
    "lfm2": lfm2,
    "llama4": llama4,
}
"""All families except Kimi VL, which transformers lacks."""


def main() -> None:
    import torch

    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or REFERENCES:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            weights = read_weights(build_projector(Path(folder) / "projector.gguf", name))
            rows = REFERENCES[name](PROJECTORS[name], weights, tile_of(name)).numpy()
        assert np.isfinite(rows).all() and rows.std() > 0.3, rows.std()
        recorded_at(name).write_bytes(rows.astype("<f4").tobytes())
        print(name, rows.shape)


if __name__ == "__main__":
    main()
