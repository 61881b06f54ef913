from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from uuid import uuid4

from llamaclust.core.disk_cache.cache import DiskCache

_SUFFIX = ".kv"


class KvFolder(DiskCache):
    """A folder of KV files. Each name begins with a digest of all that the content depends on, such as the model."""

    suffixes = (_SUFFIX,)
    content, limit = "KV memory", "kv_disk"
    most_files = 1 << 13
    is_secret = True  # Prompts can be reconstructed roughly from the content.
    is_synced = False  # Files need no fsync. Their digests reveal damage by a power failure.

    def names(self, content: str) -> set[str]:
        return {path.name for path in self.path.glob(f"{content}-*{_SUFFIX}")}

    def new_name(self, content: str) -> str:
        return f"{content}-{uuid4().hex}{_SUFFIX}"

    def mark_used(self, names: Sequence[str]) -> None:
        """Marks files as used. The cache deletes names[0] last, because the other files are useless without it."""
        for name in reversed(names):
            with suppress(OSError):
                file = self.open(name)
                if file is not None:
                    file.close()
