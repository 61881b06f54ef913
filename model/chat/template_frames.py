"""What goes between a chat template and the process that renders it: a length, four bytes, and that much JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from struct import Struct
from typing import Any, Final

FRAME_LENGTH: Final = Struct("<I")


def frame_of(values: Mapping[str, Any]) -> bytes:
    """A frame in plain ASCII. TypeError, ValueError or RecursionError for values that JSON cannot hold."""
    data = json.dumps(values).encode()
    return FRAME_LENGTH.pack(len(data)) + data
