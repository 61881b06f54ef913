"""Per-layer embeddings in Gemma's E2B and E4B models: the matrix that computes them, and tensors of each layer."""

from __future__ import annotations

from llamaclust.tools.convert.converted_model import ConvertedModel


def projected_inputs(model: ConvertedModel, width: int) -> None:
    model.copy("per_layer_model_proj", "model.per_layer_model_projection", model.layers * width, model.width)
    model.copy("per_layer_proj_norm", "model.per_layer_projection_norm", width)


def layer_input(model: ConvertedModel, layer: int, width: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    model.copy(f"{place}.inp_gate", f"{source}.per_layer_input_gate", width, model.width)
    model.copy(f"{place}.proj", f"{source}.per_layer_projection", model.width, width)
    model.copy(f"{place}.post_norm", f"{source}.post_per_layer_input_norm", model.width)
