"""Attention steps of a program as launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llamaclust.kernels.cuda.executor.launch_context import LaunchContext
from llamaclust.kernels.cuda.executor.shapes import Shape
from llamaclust.kernels.cuda.launches import attention
from llamaclust.kernels.cuda.runtime.device import NULL, Launch
from llamaclust.model.program import Attention


@dataclass(frozen=True, slots=True)
class AttentionSteps:
    """Emits attention launches for one shape."""

    context: LaunchContext
    shape: Shape

    def plans(self) -> Iterator[Launch]:
        """Divides rows into tiles and spans, once for all layers of equal shape."""
        alike = {_likeness(step): step for step in self.context.program.kv_layers}
        for step in alike.values():
            cut = attention.cut_of(step, self.context.gpu)
            yield attention.plan_launch(cut, self._room, self._inputs, self._plan(step))

    def can_quantize(self, step: Attention) -> bool:
        return attention.can_quantize(step, self._room)

    def launches(
        self,
        step: Attention,
        qkv: tuple[np.uint64, np.uint64, np.uint64],
        out: np.uint64,
        rotation: attention.Rotation = attention.NO_ROTATION,
        quantized: tuple[np.uint64, np.uint64] = (NULL, NULL),
    ) -> tuple[Launch, ...]:
        context, limits = self.context, self.context.limits
        places = attention.AttentionBuffers(
            *qkv,
            out=out,
            tables=context.inputs.window_tables if limits.gives_up(step.window) else context.inputs.block_tables,
            kv=context.kv[step.layer],
            slopes=NULL if step.slopes is None else context.constant(np.array(step.slopes, np.float32)),
            plan=self._plan(step),
            partials=context.layout.at("partials", self._room.partial_bytes(step)),
            rotation=rotation,
            by_32=quantized[0],
            by_256=quantized[1],
        )
        batch = attention.BatchBounds(self.shape.rows, limits.max_sequences, self.shape.decode)
        return attention.attention_launches(step, context.gpu, self._room, self._inputs, places, batch)

    @property
    def _room(self) -> attention.Room:
        limits = self.context.limits
        return attention.room_of(self.context.program.kv_layers, limits.max_batch_tokens, limits.max_context_tokens)

    @property
    def _inputs(self) -> attention.Inputs:
        inputs = self.context.inputs
        return attention.Inputs(inputs.rows, inputs.positions, inputs.sequence_starts, inputs.table_starts)

    def _plan(self, step: Attention) -> np.uint64:
        return self.context.layout.at(("attention", _likeness(step)), self._room.plan_bytes)


def _likeness(step: Attention) -> tuple[object, ...]:
    """Equal for layers whose rows become the same tiles on any GPU."""
    return step.heads, step.kv_heads, step.head_dim, step.kv_type, step.window
