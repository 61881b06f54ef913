"""Finds the quantized format in which members of a group send a row: the format to which all readers quantize it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llamaclust.model.program import Buffer, Step
from llamaclust.model.quant_types import ActivationFormat, QuantType


def format_of_readers(
    steps: Sequence[Step], buffer: Buffer, results: Sequence[Buffer | None], type_of: Callable[[str], QuantType]
) -> ActivationFormat | None:
    """Returns the quantized format that all readers of `buffer` need, or None if they need floats or different
    formats."""
    formats = set[ActivationFormat | None]()
    for step in steps:
        if buffer in step.reads:
            formats.add(_format(step, type_of))
        if step.out.name == buffer.name:
            break
    else:
        formats |= {None for result in results if result == buffer}
    return formats.pop() if len(formats) == 1 else None


def _format(step: Step, type_of: Callable[[str], QuantType]) -> ActivationFormat | None:
    form = None if step.sent_format is None else type_of(step.sent_format).info.activation
    return None if form is ActivationFormat.F32 else form
