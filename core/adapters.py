"""Adapters of LoRA as every layer names them: numbers with scales, and their bounds."""

from __future__ import annotations

MAX_ADAPTERS = 16
"""Of a model."""
MAX_ADAPTER_RANK = 1024
MAX_ADAPTER_SCALE = 1000.0
"""Positive or negative."""

AdapterScales = tuple[tuple[int, float], ...]
"""(number, scale) of each adapter that a sequence is computed with, ascending; no scale is 0."""
