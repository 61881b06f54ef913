"""Reads a projector's numbers from its metadata, and checks their ranges and their consistency."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.core.errors import ModelFileError
from llamaclust.core.limits import MAX_TILE_PATCHES, MAX_TILE_PIXELS
from llamaclust.model.architectures.vision import FAMILIES
from llamaclust.model.architectures.vision.family import Positions, VisionFamily
from llamaclust.model.architectures.vision.layers import POSITIONS, VisionHyperparameters
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.values import shown
from llamaclust.model.hyperparameters import MAX_LAYERS, PROJECTOR_ARCHITECTURE
from llamaclust.model.model_keys import ModelKeys, read_architecture
from llamaclust.model.steps.options import ActivationFunction

_MAX_WIDTH = 1 << 16
_MAX_HEADS = 1 << 10
_MAX_IMAGE_SIZE = 1 << 14
_MAX_PATCH_SIZE = 1 << 8
_MAX_MERGE = 8
_MAX_TILES = 1 << 8
_MAX_PIXELS = 1 << 28  # Maximum of the pixel limits that a file may have.
_COLOURS = 3
_WINDOW_PIXELS = 112

_UNSUPPORTED = (
    "vision.feature_layer",
    "vision.image_grid_pinpoints",
    "vision.mm_patch_merge_type",
    "vision.wa_layer_indexes",
)

Colours = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class ImageNumbers:
    """Numbers for the preparation of images. A colour c (0 to 255) becomes (c / 255 - mean) / deviation. `image_size`
    is a tile's side in pixels. If tiles differ in size, it is the side for which learned positions were trained.
    `longest_edge` is the longer side of a resized image. `longest_edge` and limits are 0 if missing."""

    image_size: int
    longest_edge: int
    min_pixels: int
    max_pixels: int
    min_tiles: int
    max_tiles: int
    mean: Colours
    deviation: Colours
    window_pixels: int


def family_name(keys: ModelKeys) -> str:
    """Returns the projector's name. Raises ModelFileError if the file has no encoder or no supported projector."""
    if not keys.flag("has_vision_encoder", True):
        raise keys.error("has_vision_encoder", "the value is false, so the file has no image encoder")
    name = keys.text("projector_type", "") or keys.text("vision.projector_type", "")
    if name not in FAMILIES:
        raise keys.error("projector_type", f"{shown(name)} is not supported; supported: {', '.join(FAMILIES)}")
    return name


def projector_keys(file: ModelFile) -> ModelKeys:
    found = read_architecture(file)
    if found != PROJECTOR_ARCHITECTURE:
        what = f"found {shown(found)}, but a projector has {PROJECTOR_ARCHITECTURE!r}"
        raise file.error("general.architecture", what, "give the mmproj file of the vision model")
    return ModelKeys(file)


def read_hyperparameters(keys: ModelKeys, family: VisionFamily) -> VisionHyperparameters:
    width = keys.count("vision.embedding_length", maximum=_MAX_WIDTH)
    heads = keys.count("vision.attention.head_count", maximum=_MAX_HEADS)
    if width % heads or (family.turns and width // heads % 4):
        what = f"{heads} heads do not divide a width of {width}" + " into multiples of 4 channels" * family.turns
        raise keys.error("vision.attention.head_count", what)
    has_positions = POSITIONS in keys.model.tensors or not family.optional_positions
    for key in _UNSUPPORTED:
        if keys.has(key) and key not in family.unused_keys:
            raise keys.error(key, "the key is not supported")
    return VisionHyperparameters(
        block_count=keys.count("vision.block_count", maximum=MAX_LAYERS),
        embedding_length=width,
        head_count=heads,
        epsilon=keys.real("vision.attention.layer_norm_epsilon", minimum=1e-13, maximum=0.1),
        activation=_activation(keys, family),
        patch_size=keys.count("vision.patch_size", maximum=_MAX_PATCH_SIZE),
        merge=keys.count(family.merge_key, family.merge, maximum=_MAX_MERGE),
        added_width=width if has_positions and family.positions is not Positions.NONE else 0,
    )


def _activation(keys: ModelKeys, family: VisionFamily) -> ActivationFunction:
    gelu, silu = keys.flag("use_gelu", False), keys.flag("use_silu", False)
    if gelu and silu:
        raise keys.error("use_gelu", "use_gelu and use_silu are both true")
    if gelu:
        return family.gelu
    return ActivationFunction.SILU if silu else family.plain


def read_image_numbers(keys: ModelKeys, family: VisionFamily, hp: VisionHyperparameters) -> ImageNumbers:
    least, most = family.tokens or (0, 0)
    row_pixels = (hp.merge * hp.patch_size) ** 2
    tile_pixels = min(MAX_TILE_PATCHES * hp.patch_size**2, MAX_TILE_PIXELS)
    min_pixels = keys.count("vision.image_min_pixels", least * row_pixels, minimum=0, maximum=_MAX_PIXELS)
    max_pixels = keys.count("vision.image_max_pixels", most * row_pixels, minimum=0, maximum=_MAX_PIXELS)
    max_pixels = min(max_pixels, tile_pixels)
    if min_pixels > max_pixels:
        raise keys.error("vision.image_min_pixels", f"found {min_pixels}; the limit is {max_pixels} (image_max_pixels)")
    image_size = keys.count("vision.image_size", minimum=1 if family.tokens is None else 0, maximum=_MAX_IMAGE_SIZE)
    side = hp.merge * hp.patch_size
    if family.tokens is None and image_size % side:
        what = f"expected a multiple of {side} (patches of {hp.patch_size}, groups of {hp.merge}), found {image_size}"
        raise keys.error("vision.image_size", what)
    if image_size**2 > tile_pixels:
        what = f"{image_size} x {image_size} pixels; the limit is {tile_pixels} pixels for patches of {hp.patch_size}"
        raise keys.error("vision.image_size", what)
    return ImageNumbers(
        image_size=image_size,
        longest_edge=keys.count("vision.preproc_image_size", 0, minimum=0, maximum=_MAX_IMAGE_SIZE),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        min_tiles=keys.count("vision.preproc_min_tiles", 0, minimum=0, maximum=_MAX_TILES),
        max_tiles=keys.count("vision.preproc_max_tiles", 0, minimum=0, maximum=_MAX_TILES),
        mean=_colours(keys, "vision.image_mean", minimum=-10.0),
        deviation=_colours(keys, "vision.image_std", minimum=1e-3),
        window_pixels=keys.count("vision.window_size", _WINDOW_PIXELS, maximum=_MAX_IMAGE_SIZE),
    )


def _colours(keys: ModelKeys, key: str, *, minimum: float) -> Colours:
    values = keys.reals(key, _COLOURS)
    if not all(minimum <= value <= 10.0 for value in values):
        raise _bad_colours(keys, key, values, minimum)
    red, green, blue = values
    return red, green, blue


def _bad_colours(keys: ModelKeys, key: str, values: tuple[float, ...], minimum: float) -> ModelFileError:
    found = ", ".join(f"{value:g}" for value in values)
    return keys.error(key, f"expected three numbers from {minimum:g} to 10, found {found}")
