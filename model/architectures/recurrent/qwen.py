"""Qwen with a gated delta net in most layers: qwen3next, qwen35 (Qwen 3.5 and 3.6), qwen35moe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from llamaclust.model.architectures.experts import ExpertsVariant, read_experts
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.architectures.positions import rope_sections
from llamaclust.model.architectures.recurrent.delta_net import delta_net, read_delta_net
from llamaclust.model.architectures.recurrent.gated_attention import gated_attention
from llamaclust.model.model_keys import read_block_count
from llamaclust.model.steps.options import Gating

_FEED_FORWARD_NORM = "post_attention_norm"
_MAX_WIDTH, _MAX_PERIOD = 1 << 20, 1 << 10


def qwen3next(builder: ProgramBuilder) -> None:
    """Builds Qwen 3 Next, with experts and a gated shared expert. Value heads with the same key head are adjacent."""
    experts = _experts(builder)
    _layers(builder, lambda layer: builder.experts(layer, experts, norm=_FEED_FORWARD_NORM), tiled=False)


def qwen35(builder: ProgramBuilder) -> None:
    _layers(builder, lambda layer: builder.feed_forward(layer, norm=_FEED_FORWARD_NORM), tiled=True)


def qwen35moe(builder: ProgramBuilder) -> None:
    experts = _experts(builder)
    _layers(builder, lambda layer: builder.experts(layer, experts, norm=_FEED_FORWARD_NORM), tiled=True)


def _layers(builder: ProgramBuilder, feed_forward: Callable[[int], None], *, tiled: bool) -> None:
    net, table, sections = read_delta_net(builder.keys, tiled=tiled), builder.rope_table(), None
    if tiled:  # Qwen 3.5 and 3.6 read images.
        sections = rope_sections(builder.keys, builder.hyperparameters.rope.dimension_count // 2, interleaved=True)
    recurrent = _recurrent_layers(builder)
    for layer in builder.layers():
        if recurrent[layer]:
            builder.append(delta_net(builder, layer, net))
        else:
            builder.append(gated_attention(builder, layer, table, sections))
        feed_forward(layer)


def _recurrent_layers(builder: ProgramBuilder) -> list[bool]:
    """Returns, for each layer and the MTP head, True if it is recurrent."""
    keys, layers = builder.keys, read_block_count(builder.keys)
    period = keys.count("full_attention_interval", 4, maximum=_MAX_PERIOD)
    flags = keys.flags("attention.recurrent_layers", layers)
    flags = [(layer + 1) % period != 0 for layer in range(layers)] if flags is None else flags
    return [*flags, False]


def _experts(builder: ProgramBuilder) -> ExpertsVariant:
    hp, keys = builder.hyperparameters, builder.keys
    if not hp.expert_count:
        raise keys.error("expert_count", "expected 1 expert or more, found 0")
    width = keys.count("expert_shared_feed_forward_length", 0, minimum=0, maximum=_MAX_WIDTH) or hp.feed_forward_length
    return replace(read_experts(keys, hp, gating=Gating.SOFTMAX, shared_width=width), shared_gate=True)
