"""Formats sizes in messages as whole MiB. Needed memory is rounded up, and free memory is rounded down."""

from __future__ import annotations

from collections.abc import Mapping

MIB = 1 << 20


def mib(size_bytes: float) -> int:
    return -int(-size_bytes // MIB)


def gigabytes(size_bytes: int) -> str:
    """Formats a file's size as model hubs do, for example '4.9 GB' or '98 MB'."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def needed(parts: Mapping[str, int]) -> str:
    """Formats named sizes in bytes, for example '12 MiB (weights 8, KV memory 4)'."""
    return f"{mib(sum(parts.values()))} MiB ({', '.join(f'{name} {mib(size)}' for name, size in parts.items())})"


def missing(parts: Mapping[str, int], room_bytes: int, room: str = "{} MiB are free") -> str:
    """Formats a shortage, such as '12 MiB (weights 8, KV memory 4), 10 MiB are free: 2 MiB are missing'."""
    there = room.format(room_bytes // MIB)
    return f"{needed(parts)}, {there}: {mib(sum(parts.values()) - room_bytes)} MiB are missing"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun if number == 1 else f'{noun}s'}"
