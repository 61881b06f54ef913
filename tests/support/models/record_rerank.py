"""Records llama-server's scores of DOCUMENTS for QUERY by small rerankers with random weights, in data/rerank.json:
{architecture: {"scores": [...], "tokens": of all prompts}}. Run it again after a model or a text changes:

    python tests/support/models/record_rerank.py /path/to/llama-server
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from support.models.tiny_encoders import RANK, RERANKERS, build_encoder
from support.network.loopback import free_port
from support.paths import DATA

SCORES = DATA / "rerank.json"
QUERY = "Which of these people could find water?"
DOCUMENTS = (
    "the water of the people",
    "They were, at first, from one another!",
    "a",
    "no one could see how many of these would come down and find the long oil",
    "which people",
    "how would they find it, then?",
)
_START_S = 30.0


def recorded() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(SCORES.read_text())
    return found


def record(server: str, path: Path) -> dict[str, Any]:
    port = free_port()
    command = [server, "-m", str(path), "--rerank", "--port", str(port), "-c", "256", "-ctk", "f32", "-ctv", "f32"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            return _scores(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()


def _scores(address: str) -> dict[str, Any]:
    end = time.monotonic() + _START_S
    while not _is_ready(address):
        assert time.monotonic() < end, "llama-server does not answer"
        time.sleep(0.1)
    reply = httpx.post(f"{address}/rerank", json={"query": QUERY, "documents": DOCUMENTS}).json()
    scores = {result["index"]: result["relevance_score"] for result in reply["results"]}
    return {"scores": [scores[index] for index in range(len(DOCUMENTS))], "tokens": reply["usage"]["prompt_tokens"]}


def _is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").is_success
    except httpx.TransportError:
        return False


def main(server: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = {
            name: record(server, build_encoder(Path(folder) / f"{name}.gguf", name, pooling=RANK)) for name in RERANKERS
        }
    SCORES.write_text(json.dumps(ranks, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
