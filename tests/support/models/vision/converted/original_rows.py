"""The rows of transformers' vision models for a tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from support.models.vision.converted.cases import DEVIATION, MEAN, Case


def rows_of(case: Case, model: Any, tile: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns the text model's rows [rows, channels]. DeepStack's levels follow in the channels."""
    found = getattr(model, "model", model).get_image_features(**_inputs(case, tile))
    if case.family.startswith("Llama4"):
        return np.asarray(model.multi_modal_projector(found.last_hidden_state)[0])
    rows = _joined(found.pooler_output)
    levels = [_joined(level) for level in getattr(found, "deepstack_features", None) or ()]
    return np.asarray(torch.cat((rows, *levels), dim=1))


def _joined(rows: Any) -> Any:
    parts = [rows] if isinstance(rows, torch.Tensor) else list(rows)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _inputs(case: Case, tile: NDArray[np.uint8]) -> dict[str, Any]:
    pixels = torch.tensor(((tile / 255 - np.array(MEAN)) / np.array(DEVIATION)).transpose(2, 0, 1)[None]).float()
    lines, columns = case.tile
    match case.call:
        case "list":
            return {"pixel_values": pixels[None]}
        case "sizes":
            return {"pixel_values": pixels, "image_sizes": torch.tensor([tile.shape[:2]])}
        case "places":
            places = torch.tensor([[(x, y) for y in range(lines) for x in range(columns)]])
            return {"pixel_values": _patches(case, pixels), "image_position_ids": places}
        case "spatial":
            mask = torch.ones(1, lines * columns, dtype=torch.int32)
            shapes = torch.tensor([case.tile])
            return {"pixel_values": _patches(case, pixels), "spatial_shapes": shapes, "pixel_attention_mask": mask}
        case "images":
            images = _patches(case, pixels).reshape(-1, case.side, case.side, 3).permute(0, 3, 1, 2)
            return {"pixel_values": images, "image_grid_thw": torch.tensor([[1, lines, columns]])}
        case "frames":
            return {"pixel_values": _frames(case, pixels), "image_grid_thw": torch.tensor([[1, lines, columns]])}
    return {"pixel_values": pixels}


def _patches(case: Case, pixels: Any) -> Any:
    """Returns patches [1, patches, size * size * 3], line by line, with each pixel's colours adjacent."""
    (lines, columns), side = case.tile, case.side
    cut = pixels[0].reshape(3, lines, side, columns, side).permute(1, 3, 2, 4, 0)
    return cut.reshape(1, lines * columns, -1)


def _frames(case: Case, pixels: Any) -> Any:
    """Returns patches, 2 x 2 by 2 x 2, each as two equal frames."""
    (lines, columns), side = case.tile, case.side
    cut = pixels[0].reshape(3, lines // 2, 2, side, columns // 2, 2, side).permute(1, 4, 2, 5, 0, 3, 6)
    return cut[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(lines * columns, -1)
