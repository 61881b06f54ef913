"""baichuan: Baichuan and Baichuan 2, whose Q, K and V are one matrix."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.tools.convert.lazy import mapped, rows
from llamaclust.tools.convert.page import Page, neighbours
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import rotation

_WORDS_OF_2 = 125696
"""The second generation divides each row of its last matrix by its length; its configuration does not show it."""


def build(page: Page) -> None:
    width = decoder.feed_forward_width(page)
    page.usual_keys(width)
    page.rms_epsilon()
    rotation(page, page.head_width)
    page.metadata["baichuan.tensor_data_layout"] = "Meta AI original pth"
    decoder.ends(page)
    if page.words == _WORDS_OF_2:
        page.tensors["output.weight"] = mapped(page.tensors["output.weight"], _of_length_one)
    for layer in range(page.layers):
        decoder.norms(page, layer)
        _attention(page, layer)
        decoder.feed_forward(page, layer, width)


def _attention(page: Page, layer: int) -> None:
    place, source, width = f"blk.{layer}", f"model.layers.{layer}.self_attn", page.width
    packed = page.take(f"{source}.W_pack.weight", 3 * width, width)
    for number, part in enumerate(("q", "k", "v")):
        found = rows(packed, number * width, (number + 1) * width)
        page.put(f"{place}.attn_{part}.weight", found if part == "v" else neighbours(found, page.heads))
    page.copy(f"{place}.attn_output", f"{source}.o_proj", width, width)


def _of_length_one(values: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.sqrt(np.square(values, dtype=np.float64).sum(1, keepdims=True))
    result: NDArray[np.float32] = (values / np.maximum(lengths, 1e-7)).astype(np.float32)
    return result
