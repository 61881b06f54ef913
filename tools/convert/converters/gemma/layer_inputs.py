"""Per-layer embeddings in Gemma's E2B and E4B models: the matrix that computes them, and tensors of each layer."""

from __future__ import annotations

from llamaclust.tools.convert.page import Page


def projected_inputs(page: Page, width: int) -> None:
    page.copy("per_layer_model_proj", "model.per_layer_model_projection", page.layers * width, page.width)
    page.copy("per_layer_proj_norm", "model.per_layer_projection_norm", width)


def layer_input(page: Page, layer: int, width: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    page.copy(f"{place}.inp_gate", f"{source}.per_layer_input_gate", width, page.width)
    page.copy(f"{place}.proj", f"{source}.per_layer_projection", page.width, width)
    page.copy(f"{place}.post_norm", f"{source}.post_per_layer_input_norm", page.width)
