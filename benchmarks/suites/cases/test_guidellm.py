"""guidellm, which sends vLLM's fields: a minute of 16 concurrent streams."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_GUIDELLM = Path(sys.executable).with_name("guidellm")


def test_concurrent_streams(api: str, model: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Tell a story of {number} foxes.", "output_tokens_count": 64} for number in range(400)]
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    report = tmp_path / "report.json"
    words = ["benchmark", "run", "--target", api, "--model", model, "--profile", "concurrent", "--rate", "16"]
    words += ["--max-seconds", "60", "--data", str(prompts), "--output-path", str(report), "--disable-console"]
    made = subprocess.run([str(_GUIDELLM), *words], capture_output=True, text=True, timeout=600, check=False)
    assert made.returncode == 0, made.stderr[-2000:] + made.stdout[-2000:]
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["errored"] == 0 and totals["successful"] > 0
