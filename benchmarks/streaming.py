"""Streaming overhead of the HTTP server: one answer streamed by a cluster's HTTP server to `curl -N`, and
`llamaclust bench` decoding as many tokens in one process, in turns, as ratios of pairs.

    python benchmarks/streaming.py [MODEL] [--threads 2] [--tokens 256] [--repeats 5]

The cluster has one worker. Tokens a second are counted at curl's end, from the first piece of the answer to the last;
beside it stands what the coordinator measured: between the two are text, JSON, HTTP and curl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from llamaclust.tools.bench.limits import Spread

_DEADLINE_S = 300
_PROGRAM = str(Path(sys.executable).parent / "llamaclust")


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens per second of the same tokens."""

    bench: float
    engine: float  # by the coordinator's clock
    client: float  # at curl's end


@contextmanager
def server(model: str, threads: int) -> Iterator[str]:
    """The address of a cluster of one worker."""
    with TemporaryDirectory(prefix="llamaclust-") as folder:
        environment = {**os.environ, "LLAMACLUST_STATE_DIR": folder}
        workers = f"workers=[{{name: a, threads: {threads}}}]"
        options = ["--set", f"model={model}", "--set", workers, "--set", f"state_dir={folder}", "--port", "0"]
        _output([_PROGRAM, "up", "--detach", *options], environment)
        try:
            status = json.loads(_output([_PROGRAM, "status", "--json"], environment))
            yield str(status["api"])
        finally:
            _output([_PROGRAM, "down"], environment)


def bench(model: str, threads: int, tokens: int) -> float:
    options = ["-t", str(threads), "-p", "16", "-n", str(tokens), "-r", "3", "--json"]
    return float(json.loads(_output([_PROGRAM, "bench", model, *options]))["decode"]["tok_s"])


def stream(api: str, tokens: int) -> tuple[float, float]:
    """(tokens per second at curl's end, by the coordinator's clock)."""
    body = {
        "prompt": "Once upon a time",
        "max_tokens": tokens,
        "min_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    command = ["curl", "-sN", "--max-time", str(_DEADLINE_S), f"{api}/v1/completions"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        lines = [(perf_counter(), line) for line in curl.stdout]  # read later: this program shares the cores
    if curl.returncode != 0:
        raise SystemExit(f"{api}: curl failed with {curl.returncode} (28: no whole answer in {_DEADLINE_S} s)")
    times, ending, usage = [], None, None
    for time_s, line in lines:
        if line.startswith(b"data: {"):
            answer = json.loads(line[6:])
            if "error" in answer:
                raise SystemExit(f"{api}: {answer['error']['message']}")
            if answer["choices"]:
                times.append(time_s)
                ending = answer["choices"][0].get("timings", ending)
            usage = answer["usage"]
    if ending is None or usage is None or usage["completion_tokens"] != tokens:
        raise SystemExit(f"{api}: the answer is not whole: {usage}")
    return (tokens - 1) / (times[-1] - times[0]), ending["decode_tok_s"]


def measure(model: str, threads: int, tokens: int, repeats: int) -> Iterator[Turn]:
    with server(model, threads) as api:
        stream(api, tokens)
        for _ in range(repeats):
            best = bench(model, threads, tokens)
            client, engine = stream(api, tokens)
            yield Turn(best, engine, client)


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:2])} failed: {done.stderr.strip()}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct", help="catalog name or path of a .gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5, help="pairs")
    given = parser.parse_args()
    turns = []
    for turn in measure(given.model, given.threads, given.tokens, given.repeats):
        turns.append(turn)
        print(f"bench {turn.bench:7.1f} tok/s   engine {turn.engine:7.1f}   curl {turn.client:7.1f}", flush=True)
    print(f"engine / bench: {Spread.of(turn.engine / turn.bench for turn in turns):.3f}")
    print(f"curl / bench:   {Spread.of(turn.client / turn.bench for turn in turns):.3f}")


if __name__ == "__main__":
    main()
