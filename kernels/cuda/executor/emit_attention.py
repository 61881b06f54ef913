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
        for step in {attention.likeness(step): step for step in self.context.program.kv_layers}.values():
            yield self._launches.plan(step, self._plan(step))

    def launches(
        self,
        step: Attention,
        qkv: tuple[np.uint64, np.uint64, np.uint64],
        out: np.uint64,
        rotation: attention.Rotation = attention.NO_ROTATION,
        quantized: tuple[np.uint64, np.uint64] = (NULL, NULL),
    ) -> Iterator[Launch]:
        context, inputs = self.context, self.context.inputs
        places = attention.AttentionBuffers(
            *qkv,
            out=out,
            tables=inputs.window_tables if context.limits.gives_up(step.window) else inputs.block_tables,
            kv=context.kv[step.layer],
            slopes=NULL if step.slopes is None else context.layout.constant(np.array(step.slopes, np.float32)),
            plan=self._plan(step),
            partials=context.layout.at("partials", self.room.partial_bytes(step)),
            rotation=rotation,
            by_32=quantized[0],
            by_256=quantized[1],
        )
        return self._launches.step(step, places)

    @property
    def room(self) -> attention.Room:
        limits = self.context.limits
        return attention.room_of(self.context.program.kv_layers, limits.max_batch_tokens, limits.max_context_tokens)

    @property
    def _launches(self) -> attention.AttentionLaunches:
        context, shape = self.context, self.shape
        return attention.AttentionLaunches(
            context.gpu, self.room, context.inputs, shape.rows, context.limits.max_sequences, shape.decode
        )

    def _plan(self, step: Attention) -> np.uint64:
        return self.context.layout.at(("attention", attention.likeness(step)), self.room.plan_bytes)
