"""Control messages about KV blocks on disk. A key identifies a block by its content. A worker answers with `KvDone`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from llamaclust.core.bounds import UINT64, Integer, Size
from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import MAX_KV_BLOCKS

KEY_BYTES = 32
MAX_KEYS = 4096

_Epoch = Annotated[int, Integer(0, UINT64 - 1)]
_Keys = Annotated[bytes, Size(KEY_BYTES, MAX_KEYS * KEY_BYTES)]
_Blocks = Annotated[tuple[Annotated[int, Integer(0, MAX_KV_BLOCKS - 1)], ...], Size(1, MAX_KEYS)]


def joined(keys: Sequence[bytes]) -> bytes:
    return b"".join(keys)


def split_keys(keys: bytes) -> list[bytes]:
    if len(keys) % KEY_BYTES:
        raise ProtocolError(f"keys have {len(keys)} bytes; expected a multiple of {KEY_BYTES}")
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


@dataclass(frozen=True, slots=True)
class FindKv:
    """Asks how many blocks of `keys` are on disk, from the first key up to the first missing block."""

    epoch: _Epoch
    keys: _Keys
    request_id: int = 0


@dataclass(frozen=True, slots=True)
class RestoreKv:
    """Orders a worker to read the blocks of `keys` from disk, in order, until a block is missing or damaged."""

    epoch: _Epoch
    keys: _Keys
    blocks: _Blocks  # Numbers of the KV blocks to fill, one for each key.
    request_id: int = 0

    def check(self) -> None:
        if len(self.keys) != len(self.blocks) * KEY_BYTES:
            raise ProtocolError(
                f"RestoreKv has {len(self.keys)} key bytes, not {KEY_BYTES} for each of {len(self.blocks)} KV blocks"
            )


@dataclass(frozen=True, slots=True)
class SaveKv:
    """Orders a worker to write `blocks` to disk. `keys` cover the sequence up to the last of these blocks."""

    epoch: _Epoch
    keys: _Keys
    blocks: _Blocks
    request_id: int = 0

    def check(self) -> None:
        if len(self.keys) < len(self.blocks) * KEY_BYTES:
            raise ProtocolError(
                f"SaveKv has {len(self.keys)} key bytes, less than {KEY_BYTES} for each of {len(self.blocks)} KV blocks"
            )


@dataclass(frozen=True, slots=True)
class KvDone:
    """Answers a request with the number of leading blocks that were found, restored or saved."""

    blocks: Annotated[int, Integer(0, MAX_KEYS)]
    request_id: int = 0
