"""Image encoders by the projector's name in GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from llamaclust.model.architectures.vision import classes, gemma4, grids, pixtral, qwen, siglip
from llamaclust.model.architectures.vision.family import Positions, VisionFamily
from llamaclust.model.steps.options import ActivationFunction

_MERGE_KEY = "vision.spatial_merge_size"

FAMILIES: Mapping[str, VisionFamily] = MappingProxyType(
    {
        "gemma3": VisionFamily(
            siglip.gemma3,
            merge=4,
            positions=Positions.TABLE,
            bidirectional=True,
            transposed=(("mm.input_projection.weight", False),),
        ),
        "gemma4v": VisionFamily(
            gemma4.gemma4v,
            merge=3,
            plain=ActivationFunction.GELU_TANH,
            positions=Positions.AXES,
            turns=True,
            bidirectional=True,
            tokens=(252, 280),
            signed=True,
            as_row=(gemma4.STANDARD_BIAS,),
        ),
        "glm4v": VisionFamily(
            grids.glm4v,
            _MERGE_KEY,
            2,
            positions=Positions.BICUBIC,
            optional_positions=True,
            turns=True,
            sections=True,
            tokens=(8, 4096),
            transposed=(("mm.patch_merger.weight", True),),
        ),
        "idefics3": VisionFamily(siglip.idefics3, positions=Positions.TABLE),
        "internvl": VisionFamily(
            classes.internvl, gelu=ActivationFunction.GELU_ERF, positions=Positions.TABLE, class_place=0
        ),
        "kimivl": VisionFamily(
            grids.kimivl, merge=2, positions=Positions.BICUBIC, turns=True, tokens=(8, 1024), pads=True
        ),
        "lfm2": VisionFamily(siglip.lfm2, merge=2, positions=Positions.ANTIALIASED, tokens=(64, 256)),
        "llama4": VisionFamily(
            classes.llama4,
            gelu=ActivationFunction.GELU_ERF,
            positions=Positions.TABLE,
            turns=True,
            class_place=-1,
            first_place=1,
        ),
        "pixtral": VisionFamily(
            pixtral.pixtral,
            _MERGE_KEY,
            1,
            turns=True,
            tokens=(8, 1024),
            transposed=(("mm.patch_merger.weight", True),),
            unread=("v.token_embd.img_break",),
        ),
        "qwen2.5vl_merger": VisionFamily(
            qwen.qwen25vl,
            _MERGE_KEY,
            2,
            turns=True,
            windows=True,
            sections=True,
            tokens=(8, 4096),
            unused_keys=("vision.feature_layer", "vision.image_grid_pinpoints", "vision.mm_patch_merge_type"),
        ),
        "qwen3vl_merger": VisionFamily(
            qwen.qwen3vl,
            _MERGE_KEY,
            2,
            positions=Positions.BILINEAR_CORNERS,
            turns=True,
            sections=True,
            tokens=(8, 4096),
        ),
    }
)
