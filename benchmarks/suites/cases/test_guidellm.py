"""Tests the load generator guidellm with vLLM's request fields: 16 and 64 concurrent streams for a minute each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_GUIDELLM = Path(sys.executable).with_name("guidellm")


@pytest.mark.parametrize("streams", [16, 64])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_concurrent_streams(api: str, model: str, tmp_path: Path, path: str, streams: int) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Tell a story of {number} foxes.", "output_tokens_count": 64} for number in range(4000)]
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    report = tmp_path / "report.json"
    backend = f"kind=openai_http,target={api},model={model},request_format={path}"
    words = ["run", "--backend", backend, "--profile", f"kind=concurrent,streams={streams}"]
    words += ["--constraint", "kind=max_duration,seconds=60", "--data", f"kind=json_file,path={prompts}"]
    words += ["--output", f"kind=json,path={report}", "--disable-console"]
    made = subprocess.run([str(_GUIDELLM), *words], capture_output=True, text=True, timeout=600, check=False)
    assert made.returncode == 0, made.stderr[-2000:] + made.stdout[-2000:]
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["errored"] == 0 and totals["successful"] > 0
