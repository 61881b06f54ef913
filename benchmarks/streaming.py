"""Streaming overhead of the HTTP server: answers streamed by a cluster's HTTP server to curl, and `llamaclust bench`
decoding as many tokens of as many sequences in one process, in turns, as ratios of pairs.

    python benchmarks/streaming.py [MODEL] [--threads 2] [--streams 1,64] [--tokens 256] [--repeats 5]

The cluster has one worker. Tokens a second are counted at curl's end: of one stream from the first piece of the answer
to the last, of several from the requests to the end. Beside them stands what the coordinator measured: between the two
are text, JSON, HTTP and curl; and processor time of the coordinator's process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import psutil
from measuring.options import listed, positive

from llamaclust.tools.bench.limits import Spread

_DEADLINE_S = 300
_PROGRAM = str(Path(sys.executable).parent / "llamaclust")


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens per second of the same tokens, in all streams together."""

    bench: float
    engine: float  # by the coordinator's clock
    client: float  # at curl's end
    coordinator_ms: float  # of processor time, a token


@dataclass(frozen=True, slots=True)
class Served:
    """A cluster's address, and its coordinator's process."""

    api: str
    coordinator: psutil.Process

    @property
    def processor_s(self) -> float:
        times = self.coordinator.cpu_times()
        return float(times.user + times.system)


@contextmanager
def server(model: str, threads: int, streams: int, more: Sequence[str] = ()) -> Iterator[Served]:
    """A cluster of one worker. `more`: fields that are set."""
    with TemporaryDirectory(prefix="llamaclust-") as folder:
        environment = {**os.environ, "LLAMACLUST_STATE_DIR": folder}
        workers = f"workers=[{{name: a, threads: {threads}}}]"
        options = ["--set", f"model={model}", "--set", workers, "--set", f"state_dir={folder}", "--port", "0"]
        options += ["--set", f"max_sequences={max(streams, 8)}"]
        options += [word for field in more for word in ("--set", field)]
        _output([_PROGRAM, "up", "--detach", *options], environment)
        try:
            status = json.loads(_output([_PROGRAM, "status", "--json"], environment))
            yield Served(str(status["api"]), psutil.Process(status["pid"]))
        finally:
            _output([_PROGRAM, "down"], environment)


def bench(model: str, threads: int, tokens: int, streams: int) -> float:
    options = ["-t", str(threads), "-p", "16", "-n", str(tokens), "-b", str(streams), "-r", "3", "--json"]
    return float(json.loads(_output([_PROGRAM, "bench", model, *options]))["decode"]["tok_s"])


def stream(api: str, tokens: int) -> tuple[float, float]:
    """Of one stream (tokens per second at curl's end, by the coordinator's clock)."""
    with subprocess.Popen(_curl(api, tokens), stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        lines = [(perf_counter(), line) for line in curl.stdout]  # read later: this program shares the cores
    _check(api, curl.returncode)
    times = [time_s for time_s, line in lines if (found := _read(api, line)) is not None and found["choices"]]
    return (tokens - 1) / (times[-1] - times[0]), _decode_tok_s(api, tokens, [line for _, line in lines])


def parallel_streams(api: str, tokens: int, streams: int) -> tuple[float, float]:
    """Of several, from one curl, which writes each into a file."""
    with TemporaryDirectory(prefix="llamaclust-") as folder:
        paths = [Path(folder) / str(number) for number in range(streams)]
        command = ["curl", "-s", "--no-progress-meter", "-Z", "--parallel-immediate", "--parallel-max", str(streams)]
        for path in paths:
            command += [*_curl(api, tokens)[1:], "-o", str(path), "--next"]
        begun = perf_counter()
        _check(api, subprocess.run(command[:-1], timeout=_DEADLINE_S, check=False).returncode)
        client = streams * tokens / (perf_counter() - begun)
        return client, sum(_decode_tok_s(api, tokens, path.read_bytes().splitlines()) for path in paths)


def _curl(api: str, tokens: int) -> list[str]:
    body = {
        "prompt": "Once upon a time",
        "max_tokens": tokens,
        "min_tokens": tokens,
        "temperature": 0,
        "speculative": False,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    command = ["curl", "-sN", "--max-time", str(_DEADLINE_S), f"{api}/v1/completions"]
    return [*command, "-H", "Content-Type: application/json", "-d", json.dumps(body)]


def _check(api: str, code: int) -> None:
    if code != 0:
        raise SystemExit(f"{api}: curl failed with {code} (28: no whole answer in {_DEADLINE_S} s)")


def _read(api: str, line: bytes) -> dict[str, Any] | None:
    """An event's data; None for other lines."""
    if not line.startswith(b"data: {"):
        return None
    answer: dict[str, Any] = json.loads(line[6:])
    if "error" in answer:
        raise SystemExit(f"{api}: {answer['error']['message']}")
    return answer


def _decode_tok_s(api: str, tokens: int, lines: Iterable[bytes]) -> float:
    """Of one answer, by the coordinator's clock."""
    ending, usage = None, None
    for answer in filter(None, (_read(api, line) for line in lines)):
        if answer["choices"]:
            ending = answer["choices"][0].get("timings", ending)
        usage = answer["usage"]
    if ending is None or usage is None or usage["completion_tokens"] != tokens:
        raise SystemExit(f"{api}: the answer is not whole: {usage}")
    return float(ending["decode_tok_s"])


def measure(model: str, threads: int, tokens: int, streams: int, repeats: int) -> Iterator[Turn]:
    with server(model, threads, streams) as served:
        _streamed(served.api, tokens, streams)
        for _ in range(repeats):
            best = bench(model, threads, tokens, streams)
            before_s = served.processor_s
            client, engine = _streamed(served.api, tokens, streams)
            yield Turn(best, engine, client, (served.processor_s - before_s) * 1e3 / (tokens * streams))


def _streamed(api: str, tokens: int, streams: int) -> tuple[float, float]:
    return stream(api, tokens) if streams == 1 else parallel_streams(api, tokens, streams)


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:2])} failed: {done.stderr.strip()}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct", help="catalog name or path of a .gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=listed(positive), default=[1], help="at a time")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5, help="pairs")
    given = parser.parse_args()
    for streams in given.streams:
        turns = []
        for turn in measure(given.model, given.threads, given.tokens, streams, given.repeats):
            turns.append(turn)
            print(f"bench {turn.bench:7.1f} tok/s   engine {turn.engine:7.1f}   curl {turn.client:7.1f}", flush=True)
        print(f"{streams} at a time, engine / bench: {Spread.of(turn.engine / turn.bench for turn in turns):.3f}")
        print(f"{streams} at a time, curl / bench:   {Spread.of(turn.client / turn.bench for turn in turns):.3f}")
        times = Spread.of(turn.coordinator_ms for turn in turns)
        print(f"{streams} at a time, coordinator:    {times:.3f} ms of processor time a token", flush=True)


if __name__ == "__main__":
    main()
