"""Records the results of transformers' image processors for `pictures` in data/tiles.json. Run it again if a family or
an image changes, in an environment with PyTorch and this project:

    pip install torch==2.13.0 torchvision==0.28.0 transformers==5.24.0 pillow==12.3.0
    PYTHONPATH=tests:src python tests/support/record_tiles.py
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from support.pictures import REFERENCES, SETTINGS, SIZES, Pixels, picture, runs, samples_of, sizes_of

Result = tuple[list[Pixels], str]
PLAIN = {
    "do_rescale": False,
    "do_normalize": False,
    "return_tensors": "pt",
    "input_data_format": "channels_last",
}


def _pixels(tensor: Any) -> Pixels:
    """Converts [3, height, width] to [height, width, 3]."""
    array: Pixels = tensor.numpy().transpose(1, 2, 0)
    assert array.min() >= 0 and array.max() <= 255 and (array == array.round()).all()
    return array.astype(np.uint8)


def _tensor(pixels: Pixels) -> Any:
    """Returns a tensor [1, 3, height, width]."""
    import torch

    return torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())


def _size(**values: int) -> Any:
    from transformers.image_utils import SizeDict

    return SizeDict(**values)


def _rows(start: str, tiles: list[Pixels], side: int, end: str) -> str:
    return start + "".join(f"[{t.shape[0] // side * (t.shape[1] // side)}]" for t in tiles) + end


def _gemma3(pixels: Pixels) -> Result:
    from transformers import Gemma3ImageProcessor

    made = Gemma3ImageProcessor(size={"height": 896, "width": 896})(pixels, **PLAIN)
    tiles = [_pixels(tile) for tile in made["pixel_values"]]
    return tiles, "<start_of_image>[256]<end_of_image>"


def _gemma4(pixels: Pixels) -> Result:
    from torchvision.transforms import InterpolationMode
    from transformers import Gemma4ImageProcessor

    resize = Gemma4ImageProcessor().aspect_ratio_preserving_resize
    tiles = [_pixels(resize(_tensor(pixels), 16, 280 * 9, 3, InterpolationMode.BICUBIC)[0])]
    return tiles, _rows("<|image>", tiles, 48, "<image|>")


def _qwen(patch: int, shortest: int, longest: int) -> Callable[[Pixels], Result]:
    def prepare(pixels: Pixels) -> Result:
        from transformers import Qwen2VLImageProcessor

        processor = Qwen2VLImageProcessor()
        size = _size(shortest_edge=shortest, longest_edge=longest)
        tiles = [_pixels(processor.resize(_tensor(pixels), size, processor.resample, patch * 2)[0])]
        return tiles, _rows("<|vision_start|>", tiles, patch * 2, "<|vision_end|>")

    return prepare


def _glm4v(pixels: Pixels) -> Result:
    from transformers import Glm4vImageProcessor

    processor = Glm4vImageProcessor()
    size = _size(shortest_edge=112 * 112, longest_edge=9633792)
    tiles = [_pixels(processor.resize(_tensor(pixels), size, processor.resample, 28, 2)[0])]
    return tiles, _rows("<|begin_of_image|>", tiles, 28, "<|end_of_image|>")


def _idefics3(pixels: Pixels) -> Result:
    from transformers import Idefics3ImageProcessor
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    numbers = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}, "return_row_col_info": True}
    made = Idefics3ImageProcessor(**numbers)([pixels], **PLAIN)
    inputs = {"rows": made["rows"], "cols": made["cols"]}
    names = SimpleNamespace(
        image_seq_len=64,
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        global_image_tag="<global-img>",
        global_image_token="<global-img>",
    )
    text = Idefics3Processor.replace_image_token(names, inputs, 0)
    return [_pixels(tile) for tile in made["pixel_values"][0]], text.replace("<image>" * 64, "[64]")


def _internvl(pixels: Pixels) -> Result:
    from transformers import GotOcr2ImageProcessor

    processor = GotOcr2ImageProcessor()
    size = _size(height=448, width=448)
    made = processor.crop_image_to_patches(_tensor(pixels), 1, 12, patch_size=size, resample=processor.resample)
    tiles = [_pixels(tile) for tile in made[0]]
    return tiles, _rows("<img>", tiles, 28, "</img>")


def _lfm2(pixels: Pixels) -> Result:
    from transformers import Lfm2VlImageProcessor
    from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor

    processor = Lfm2VlImageProcessor()
    made, rows, columns, sizes = processor.resize_and_split(
        _tensor(pixels), 2, 2, 10, True, 64, 256, 16, 512, 2.0, processor.resample
    )
    names = SimpleNamespace(
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
        image_token="*",
    )
    overview = sizes[0][0] // 32 * (sizes[0][1] // 32)
    text = Lfm2VlProcessor._build_image_tokens(names, rows[0], columns[0], 256, overview, True, True)
    tiles = [_pixels(tile) for tile in made[0]]
    return tiles, _counted(text, "*")


def _counted(text: str, token: str) -> str:
    """Replaces runs of a one-character token by their length, such as `[3]`."""
    parts, count = [], 0
    for character in [*text, ""]:
        if character == token:
            count += 1
            continue
        parts += [f"[{count}]"] if count else []
        count = 0
        parts.append(character)
    return "".join(parts)


def _llama4(pixels: Pixels) -> Result:
    from transformers import Llama4ImageProcessor
    from transformers.models.llama4.processing_llama4 import Llama4Processor

    made = Llama4ImageProcessor()([pixels], **PLAIN)
    ratio = [int(value) for value in made["aspect_ratios"].reshape(-1)]
    text = Llama4Processor._prompt_split_image(None, ratio, 144)
    tiles = [_pixels(tile) for tile in made["pixel_values"].reshape(-1, 3, 336, 336)]
    return tiles, text.replace("<|patch|>" * 144, "[144]")


def _pixtral(pixels: Pixels) -> Result:
    from transformers import PixtralImageProcessor
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    processor = PixtralImageProcessor(size={"longest_edge": 1540}, patch_size={"height": 28, "width": 28})
    made = processor([pixels], **PLAIN)
    names = SimpleNamespace(
        patch_size=14,
        spatial_merge_size=2,
        image_token="*",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )
    text = PixtralProcessor.replace_image_token(names, {"image_sizes": made["image_sizes"]}, 0)
    return [_pixels(made["pixel_values"][0])], _counted(text, "*")


PREPARERS: dict[str, Callable[[Pixels], Result]] = {
    "gemma3": _gemma3,
    "gemma4v": _gemma4,
    "glm4v": _glm4v,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "lfm2": _lfm2,
    "llama4": _llama4,
    "pixtral": _pixtral,
    "qwen2vl_merger": _qwen(14, 56 * 56, 28 * 28 * 1280),
    "qwen2.5vl_merger": _qwen(14, 56 * 56, 28 * 28 * 16384),
    "qwen3vl_merger": _qwen(16, 1 << 16, 1 << 24),
}
"""All families except Kimi-VL, which transformers does not support."""


def _recorded(family: str, number: int) -> dict[str, Any]:
    tiles, prompt = PREPARERS[family](picture(number))
    samples = samples_of(tiles, number)
    return {"tiles": runs(sizes_of(tiles)), "prompt": prompt, "samples": b64encode(samples.tobytes()).decode()}


def main() -> None:
    assert {*PREPARERS} == {*SETTINGS} - {"kimivl"}
    found = {family: [_recorded(family, number) for number in range(len(SIZES))] for family in PREPARERS}
    lines = ",\n".join(
        f" {json.dumps(family)}: [\n  " + ",\n  ".join(map(json.dumps, each)) + "\n ]" for family, each in found.items()
    )
    REFERENCES.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
