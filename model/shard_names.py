"""Names of parts of tensors: the tensor's name, followed by a range of its slowest or second slowest dimension."""

from __future__ import annotations

import re

_SHARD = re.compile(r"(?P<whole>.+)\[(?P<inner>:,)?(?P<start>\d+):(?P<end>\d+)\]")


def shard_name(name: str, part: range) -> str:
    """Names a part of a tensor, or of a part, along the slowest dimension (experts, or rows of a matrix)."""
    found = _SHARD.fullmatch(name)
    if found is not None:
        assert found["inner"] is None, name
        name, start = found["whole"], int(found["start"])
        part = range(start + part.start, start + part.stop)
    return f"{name}[{part.start}:{part.stop}]"


def rows_name(name: str, rows: range) -> str:
    """Names some rows of each expert's matrix, or some channels of each expert's bias."""
    assert _SHARD.fullmatch(name) is None, name
    return f"{name}[:,{rows.start}:{rows.stop}]"


def whole_name(name: str) -> str:
    found = _SHARD.fullmatch(name)
    return name if found is None else found["whole"]


def named_range(name: str) -> tuple[int, range] | None:
    """Returns the divided dimension (0 is the slowest) and the range, or None if the name is a whole tensor's name."""
    found = _SHARD.fullmatch(name)
    return None if found is None else (int(found["inner"] is not None), range(int(found["start"]), int(found["end"])))
