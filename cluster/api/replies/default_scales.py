"""Scales of adapters in requests that choose none."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.core.limits import AdapterScales


@dataclass(slots=True)
class DefaultScales:
    """Clients set `scales`; a request keeps those of its admission, also after a coordinator's end."""

    scales: AdapterScales = ()
