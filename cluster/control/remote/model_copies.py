"""Compares the copies of a model's file on several machines, and decides which version the cluster uses."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.weights.file_manifests import FileManifest, FileManifests
from llamaclust.wire.control.weights import WeightsFound
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.worker.weights.giver import WeightGiver

_READ_S = 3600.0


@dataclass(frozen=True, slots=True)
class OwnCopy:
    """The coordinator's own copy of a file. `giver` sends the file to workers that lack it."""

    file: ModelFile
    manifests: FileManifests = field(default_factory=FileManifests)
    giver: WeightGiver | None = None

    async def manifest(self) -> FileManifest:
        """Returns the file's manifest, and reads the file if necessary. Raises ModelFileError if reading fails."""
        async with deadline(f"reading {self.file.path} on the coordinator's machine", _READ_S):
            return await asyncio.to_thread(self.manifests.of, self.file)

    @property
    def can_give(self) -> bool:
        return self.giver is not None and self.giver.gives

    async def gives(self, manifest: str) -> bool:
        if self.giver is None or not self.can_give:
            return False
        async with deadline(f"reading the manifest of {self.file.path}", _READ_S):
            await asyncio.to_thread(self.giver.add, self.file, manifest)
        return True


def chosen_manifest(found: Mapping[str, WeightsFound], own: FileManifest | None) -> FileManifest | None:
    """Returns the manifest that most copies of the file have. On a tie, the coordinator's manifest wins."""
    known = {weights.manifest: weights.manifest_bytes for weights in found.values() if weights.manifest is not None}
    files = {
        weights.file or name: weights.manifest
        for name, weights in found.items()
        if weights.has_file and weights.manifest is not None
    }
    ordered = [*(() if own is None else (own.content,)), *files.values()]
    ordered = ordered or [weights.manifest for weights in found.values() if weights.manifest is not None]
    if not ordered:
        return None
    ((content, _),) = Counter(ordered).most_common(1)  # If several are equally frequent, returns the first.
    return own if own is not None and own.content == content else FileManifest(content, known[content])


def other_copies(
    found: Mapping[str, WeightsFound], own: FileManifest | None, chosen: FileManifest, path: str
) -> list[str]:
    same = [
        f"worker {name}" for name, weights in found.items() if weights.has_file and weights.manifest == chosen.content
    ]
    if own is not None and own.content == chosen.content:
        same.insert(0, "the coordinator")
    where = " and ".join(filter(None, (", ".join(same[:-1]), *same[-1:])))
    others = f"the {'copy' if len(same) == 1 else 'copies'} of {where}"
    copy, unlike = f"copy of {Path(path).name}", f"differs from {others}: it is damaged or was changed"
    lines = [
        f"worker {name}: its {copy} {unlike}; it is not used; replace it by a good copy"
        for name, weights in found.items()
        if weights.has_file and weights.manifest not in (None, chosen.content)
    ]
    if own is not None and own.content != chosen.content:
        lines.append(f"the coordinator's {copy} {unlike}; the workers' copies are used")
    return lines
