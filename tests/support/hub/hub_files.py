"""Files of a server that behaves as the Hugging Face hub does."""

from __future__ import annotations

import hashlib

from support.hub.download_server import Server

COMMIT = "c" * 40


def offer(hub: Server, store: Server, repository: str, file: str, content: bytes, digest: str | None = None) -> None:
    """Offers a large file as the hub does: the answer tells size and SHA-256, the bytes are on another server."""
    sha256 = digest or hashlib.sha256(content).hexdigest()
    store.does.files[f"/lfs/{sha256}"] = content
    said = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": COMMIT}
    answer = (302, said | {"Location": f"{store.url}/lfs/{sha256}"})
    for revision in ("main", COMMIT):
        hub.does.answers[f"/{repository}/resolve/{revision}/{file}"] = answer
