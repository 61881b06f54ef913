"""A projector file, opened and checked: its numbers, its encoder's program, and the program's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt, prod
from pathlib import Path
from types import MappingProxyType

from llamaclust.core.errors import ModelFileError, RequestError
from llamaclust.model.architectures.tensors import CheckedTensors
from llamaclust.model.architectures.vision import FAMILIES
from llamaclust.model.architectures.vision.family import Positions, VisionFamily
from llamaclust.model.architectures.vision.layers import (
    PATCH_BIAS,
    PATCH_WEIGHT,
    POSITIONS,
    SECOND_PATCH_WEIGHT,
    VisionBuilder,
    VisionHyperparameters,
)
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.values import shown
from llamaclust.model.hyperparameters import Hyperparameters
from llamaclust.model.model_keys import ModelKeys
from llamaclust.model.program import Clamp, Program
from llamaclust.model.projectors.keys import (
    ImageNumbers,
    family_name,
    projector_keys,
    read_hyperparameters,
    read_image_numbers,
)
from llamaclust.model.projectors.positions import check_readable

CLASS_ROW = "v.class_embd"
_AUDIO = ("a.", "mm.a.")
_DEEPSTACK_KEY = "n_deepstack_layers"


@dataclass(frozen=True, slots=True)
class Projector:
    """An opened projector file. For each position, the encoder makes `levels` rows of `width` channels: the text
    model's input, and rows that the text model's first layers add to the hidden state (DeepStack). `file` has the
    tensors in the program's shapes, and `plain` has them in the file's shapes."""

    name: str
    file: ModelFile
    hyperparameters: VisionHyperparameters
    images: ImageNumbers
    program: Program
    levels: int
    plain: ModelFile

    @property
    def family(self) -> VisionFamily:
        return FAMILIES[self.name]

    @property
    def identity(self) -> str:
        return self.file.identity

    @property
    def width(self) -> int:
        return self.program.out.width // self.levels

    @property
    def patch_size(self) -> int:
        return self.hyperparameters.patch_size

    @property
    def merge(self) -> int:
        return self.hyperparameters.merge

    @property
    def is_bidirectional(self) -> bool:
        """True if the rows of an image attend to each other in the text model. Rows of Gemma 4 E2B and E4B, whose
        encoders have clamps, do not."""
        has_clamps = any(isinstance(step, Clamp) for step in self.program.steps)
        return self.family.bidirectional and not has_clamps

    @property
    def read_names(self) -> tuple[str, ...]:
        return (*self.program.weights, *_read_for_inputs(self))

    @property
    def most_patches(self) -> int:
        """The maximum number of patches of a tile, without the class row and rows of zeros."""
        return self.max_tile_pixels // self.patch_size**2

    @property
    def most_program_rows(self) -> int:
        """The maximum number of input rows: a tile's patches, and one more merge group if there is a class row."""
        return self.most_patches + (0 if self.family.class_place is None else self.hyperparameters.merged)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: self.file.tensor(name) for name in self.program.weights}

    @property
    def max_rows(self) -> int:
        return self.most_patches // self.hyperparameters.merged

    @property
    def max_tile_pixels(self) -> int:
        most = max(self.images.max_pixels, self.images.image_size**2)
        # Kimi-VL's original code limits pixels before it pads. Padding adds less than half of the limit.
        return most * 3 // 2 if self.family.pads else most

    def rows_of(self, height: int, width: int) -> int:
        """Returns the number of rows for a tile of this size in pixels. Raises RequestError if the size is wrong."""
        side, size = self.patch_size * self.merge, self.images.image_size
        if self.family.tokens is None and (height, width) != (size, size):
            raise RequestError(
                f"an image tile must have {size} x {size} pixels, but has {width} x {height}; send the image again"
            )
        most = self.max_tile_pixels
        if height % side or width % side or not 0 < height * width <= most:
            what = f"sides in multiples of {side} and at most {most} pixels, but has {width} x {height}"
            raise RequestError(f"an image tile must have {what}; send a smaller image")
        return height * width // (side * side)

    def check_text_model(self, model: ModelFile, hyperparameters: Hyperparameters) -> None:
        """Raises ModelFileError if the text model has another width, or another number of layers with image rows."""
        found, path = hyperparameters.embedding_length, self.file.path
        advice = f"give the projector of {model.path.name}"
        if found != self.width:
            what = f"its rows have {self.width} channels, but the text model's have {found}"
            raise ModelFileError(f"{path}: the projector does not fit the model, because {what}; {advice}")
        levels = ModelKeys(model).count(_DEEPSTACK_KEY, 0, minimum=0, maximum=1 << 10)
        if levels != self.levels - 1:
            what = f"it has rows for {self.levels - 1} first layers (deepstack), but the text model takes {levels}"
            raise ModelFileError(f"{path}: the projector does not fit the model, because {what}; {advice}")


def open_projector(path: Path | str) -> Projector:
    """Reads the header of a projector file. Raises ModelFileError, which names the file and the place, if the file is
    damaged, hostile, not a projector, or not supported."""
    return projector_of(open_model(path))


def projector_of(opened: ModelFile) -> Projector:
    keys = projector_keys(opened)
    name = family_name(keys)
    family = FAMILIES[name]
    hyperparameters = read_hyperparameters(keys, family)
    images = read_image_numbers(keys, family, hyperparameters)
    file = _as_program_reads(opened, family, hyperparameters)
    program = encoder_program(file, family, hyperparameters)
    levels = 1 + sum(weight.endswith(".fc1.weight") for weight in program.weights)
    projector = Projector(name, file, hyperparameters, images, program, levels, opened)
    _check_levels(keys, projector)
    _check_tensors(projector)
    return projector


def encoder_program(file: ModelFile, family: VisionFamily, hyperparameters: VisionHyperparameters) -> Program:
    builder = VisionBuilder(file, hyperparameters)
    return builder.program(family.emit(builder))


def _as_program_reads(file: ModelFile, family: VisionFamily, hp: VisionHyperparameters) -> ModelFile:
    tensors = {name: _without_outer_ones(tensor) for name, tensor in file.tensors.items()}
    for name in (PATCH_WEIGHT, SECOND_PATCH_WEIGHT):
        if name in tensors:
            tensors[name] = _flattened(tensors[name])
    for name, of_group in family.transposed:
        if name in tensors:
            tensors[name] = _transposed(tensors[name], hp.merged if of_group else None)
    for name in family.as_row:
        if name in tensors:
            tensors[name] = replace(tensors[name], shape=(1, prod(tensors[name].shape)))
    return replace(file, tensors=MappingProxyType(tensors))


def _without_outer_ones(tensor: Tensor) -> Tensor:
    """Drops outer dimensions of 1, which files may have and ggml ignores."""
    shape = tensor.shape
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return replace(tensor, shape=shape)


def _flattened(tensor: Tensor) -> Tensor:
    return replace(tensor, shape=(tensor.shape[0], prod(tensor.shape[1:])))


def _transposed(tensor: Tensor, group: int | None) -> Tensor:
    """Transposes a matrix. If `group` is given, transposes the matrix [channels, group] in each row instead."""
    if tensor.quant_type.info.block_size != 1:
        what = f"expected a type without blocks such as F16, found {tensor.quant_type.name}"
        raise ModelFileError(f"{tensor.path}: tensor {tensor.name}: {what}; use another mmproj file")
    flat = _flattened(tensor)
    rows, columns = flat.shape
    if group is None:
        return replace(flat, shape=(columns, rows), stored=(rows, columns))
    if columns % group:
        what = f"expected a multiple of {group} columns, found {columns}"
        raise ModelFileError(f"{tensor.path}: tensor {tensor.name}: {what}; use another mmproj file")
    return replace(flat, stored=(columns // group, group)) if group > 1 else flat


def _check_levels(keys: ModelKeys, projector: Projector) -> None:
    key = "vision.is_deepstack_layers"
    flags = keys.flags(key, projector.hyperparameters.block_count)
    stated = 0 if flags is None else sum(flags)
    if stated != projector.levels - 1:
        raise keys.error(key, f"the key names {stated} layers, but {projector.levels - 1} layers have tensors")


def _check_tensors(projector: Projector) -> None:
    known = {*projector.program.weights, *projector.family.unread, *_read_for_inputs(projector)}
    unknown = {name for name in projector.file.tensors if name not in known and not name.startswith(_AUDIO)}
    if unknown:
        what = f"projector {projector.name} has no such tensor"
        raise ModelFileError(f"{projector.file.path}: tensor {shown(min(unknown))}: {what}; use another mmproj file")


def _read_for_inputs(projector: Projector) -> Iterator[str]:
    family, hp = projector.family, projector.hyperparameters
    tensors = CheckedTensors(projector.file)
    wanted: dict[str, tuple[int, ...]] = {}
    if hp.added_width:
        wanted[POSITIONS] = (*_table_shape(projector), hp.embedding_length)
    if family.class_place is not None:
        wanted[CLASS_ROW] = (hp.embedding_length,)
        if tensors.has(PATCH_BIAS):
            wanted[PATCH_BIAS] = (hp.embedding_length,)
    for name, shape in wanted.items():
        check_readable(projector.file.tensor(tensors.weight(name, shape)))
        yield name


def _table_shape(projector: Projector) -> tuple[int, ...]:
    """Returns the shape of the table of learned positions, without the last dimension (channels)."""
    family, hp = projector.family, projector.hyperparameters
    found = projector.file.tensor(POSITIONS).shape
    if family.positions is Positions.AXES:
        # The maximum number of patches in a row. The tile then has only one row of merge groups.
        most = projector.images.max_pixels // (hp.merge * hp.patch_size**2)
        return 2, max(found[-2], most) if len(found) > 1 else most
    side = projector.images.image_size // hp.patch_size
    if family.positions is not Positions.TABLE and len(found) == 2:
        side = isqrt(found[0])
    return (side * side + (family.class_place is not None),)
