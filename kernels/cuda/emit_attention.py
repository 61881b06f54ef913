"""Attention steps of a program as launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llamaclust.kernels.cuda import attention
from llamaclust.kernels.cuda.device import Launch
from llamaclust.kernels.cuda.place import NOWHERE, Place
from llamaclust.kernels.cuda.shapes import Shape
from llamaclust.model.program import Attention


@dataclass(frozen=True, slots=True)
class AttentionSteps:
    """Of one shape."""

    place: Place
    shape: Shape

    def plans(self) -> Iterator[Launch]:
        """How rows become tiles and spans: once for all layers that are alike."""
        alike = {_likeness(step): step for step in self.place.program.kv_layers}
        for step in alike.values():
            cut = attention.cut_of(step, self.place.gpu)
            yield attention.plan_launch(cut, self._room, self._inputs, self._plan(step))

    def can_quantize(self, step: Attention) -> bool:
        return attention.can_quantize(step, self._room, self.place.limits.max_context_tokens)

    def launches(
        self,
        step: Attention,
        q: np.uint64,
        k: np.uint64,
        v: np.uint64,
        out: np.uint64,
        rotation: attention.Rotation = attention.NO_ROTATION,
        quantized: tuple[np.uint64, np.uint64] = (NOWHERE, NOWHERE),
    ) -> tuple[Launch, ...]:
        place, limits = self.place, self.place.limits
        places = attention.Places(
            q=q,
            k=k,
            v=v,
            out=out,
            tables=place.inputs.window_tables if limits.gives_up(step.window) else place.inputs.block_tables,
            kv=place.kv[step.layer],
            slopes=NOWHERE if step.slopes is None else place.constant(np.array(step.slopes, np.float32)),
            plan=self._plan(step),
            partials=place.regions.at("partials", self._room.partial_bytes(step)),
            rotation=rotation,
            by_32=quantized[0],
            by_256=quantized[1],
        )
        return attention.attention_launches(
            step,
            place.gpu,
            self._room,
            self._inputs,
            places,
            rows=self.shape.rows,
            max_sequences=limits.max_sequences,
            max_context_tokens=limits.max_context_tokens,
            one_row_each=self.shape.decode,
        )

    @property
    def _room(self) -> attention.Room:
        limits = self.place.limits
        return attention.room_of(self.place.program.kv_layers, limits.max_tokens, limits.max_context_tokens)

    @property
    def _inputs(self) -> attention.Inputs:
        inputs = self.place.inputs
        return attention.Inputs(inputs.rows, inputs.positions, inputs.sequence_starts, inputs.table_starts)

    def _plan(self, step: Attention) -> np.uint64:
        return self.place.regions.at(("attention", _likeness(step)), self._room.plan_bytes)


def _likeness(step: Attention) -> tuple[object, ...]:
    """Equal for layers whose rows become the same tiles on any card."""
    return step.heads, step.kv_heads, step.head_dim, step.kv_type, step.window
