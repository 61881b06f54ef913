"""Names of tensor parts, such as `X[0:8]` (a range of the slowest dimension) and `X[:,0:8]` (the second slowest)."""

from __future__ import annotations

import re

_SHARD = re.compile(r"(?P<whole>.+)\[(?P<inner>:,)?(?P<start>\d+):(?P<end>\d+)\]")


def shard_name(name: str, part: range) -> str:
    """Returns the name of a range of a tensor's experts or rows. If `name` has a range, `part` is relative to it."""
    found = _SHARD.fullmatch(name)
    if found is not None:
        assert found["inner"] is None, name
        name, start = found["whole"], int(found["start"])
        part = range(start + part.start, start + part.stop)
    return f"{name}[{part.start}:{part.stop}]"


def rows_name(name: str, rows: range) -> str:
    """Returns `name[:,0:8]` for rows 0 to 7 of each expert's matrix, or for channels 0 to 7 of each expert's bias."""
    assert _SHARD.fullmatch(name) is None, name
    return f"{name}[:,{rows.start}:{rows.stop}]"


def whole_name(name: str) -> str:
    found = _SHARD.fullmatch(name)
    return name if found is None else found["whole"]


def named_range(name: str) -> tuple[int, range] | None:
    """Returns the dimension (0 is the slowest) and the range in a name, or None if the name has no range."""
    found = _SHARD.fullmatch(name)
    return None if found is None else (int(found["inner"] is not None), range(int(found["start"]), int(found["end"])))
