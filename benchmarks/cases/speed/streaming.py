from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from runner.case import Case, Group, Measures, argument, option
from runner.clusters import Bench, Layout, processor_s, running
from runner.llama import json_of
from runner.options import listed, positive
from runner.processes import counted_instructions

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.core.errors import LlamaclustError

_DEADLINE_S = 300


@dataclass(frozen=True)
class Streaming(Case):
    """Compares answers that are streamed to curl with `llamaclust bench`, for the same number of sequences.
    `tok/s` uses the coordinator's clock, and `client tok/s` uses the time until curl ends. `coordinator ms` is the
    coordinator's processor time per token. `k instr` is thousands of instructions per token, if `perf` is installed."""

    model: str = argument("catalog name or path of a .gguf", str, default="smollm2-135m-instruct")
    threads: int = option(2, "number of threads of the worker", positive)
    streams: tuple[int, ...] = option((1,), "numbers of simultaneous streams", listed(positive))
    tokens: int = option(256, "number of tokens in an answer", positive)

    async def groups(self) -> AsyncIterator[Group]:
        for streams in self.streams:
            workers = [{"name": "a", "threads": self.threads}]
            keys = {"workers": workers, "max_sequences": max(streams, 8)}
            async with running(resolve_model(self.model), Layout(workers=1, keys=keys)) as (bench, _):
                await self._curl(bench, streams, 0)
                variants = {"bench": partial(self._bench, streams), "HTTP": partial(self._curl, bench, streams)}
                yield Group(f"{streams} at a time", variants)

    async def _bench(self, streams: int, turn: int) -> Measures:
        options = ["-t", str(self.threads), "-p", "16", "-n", str(self.tokens), "-b", str(streams), "-r", "3", "--json"]
        command = [str(Path(sys.executable).parent / "llamaclust"), "bench", self.model, *options]
        speed = float((await asyncio.to_thread(json_of, command))["decode"]["tok_s"])
        return {"tok/s": speed, "client tok/s": speed}

    async def _curl(self, bench: Bench, streams: int, turn: int) -> Measures:
        with TemporaryDirectory(prefix="llamaclust-") as folder:
            paths = [Path(folder) / str(number) for number in range(streams)]
            command = [
                "curl",
                "-s",
                "--no-progress-meter",
                "-Z",
                "--parallel-immediate",
                "--parallel-max",
                str(streams),
            ]
            for path in paths:
                command += [*self._request(bench.api), "-o", str(path), "--next"]
            async with counted_instructions(bench.coordinator.pid) as instructions:
                begun_s, used_s = perf_counter(), processor_s(bench.coordinator)
                process = await asyncio.create_subprocess_exec(*command[:-1])
                if (code := await process.wait()) != 0:
                    raise LlamaclustError(
                        f"curl failed with exit status {code} (28 means no complete answer in {_DEADLINE_S} s)"
                    )
                took_s, used_s = perf_counter() - begun_s, processor_s(bench.coordinator) - used_s
            engine, tokens = sum(self._decode_tok_s(path) for path in paths), streams * self.tokens
        costs = {"coordinator ms": 1e3 * used_s / tokens, **instructions.per(tokens)}
        return {"tok/s": engine, "client tok/s": tokens / took_s, **costs}

    def _request(self, api: str) -> list[str]:
        tokens = {"max_tokens": self.tokens, "min_tokens": self.tokens, "temperature": 0, "speculative": False}
        body = {"prompt": "Once upon a time", **tokens, "stream": True, "stream_options": {"include_usage": True}}
        words = ["-N", "--max-time", str(_DEADLINE_S), f"{api}/v1/completions"]
        return [*words, "-H", "Content-Type: application/json", "-d", json.dumps(body)]

    def _decode_tok_s(self, path: Path) -> float:
        timings, usage = None, None
        for line in path.read_bytes().splitlines():
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                for choice in event.get("choices", ()):
                    timings = choice.get("timings", timings)
                usage = event.get("usage") or event.get("error")
        if timings is None or usage is None or usage.get("completion_tokens") != self.tokens:
            raise LlamaclustError(f"the answer is incomplete: {usage}")
        return float(timings["decode_tok_s"])
