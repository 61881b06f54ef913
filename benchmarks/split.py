"""Cost and gain of a split: two workers of one thread each beside one worker of one thread, in turn, in one run.

    python benchmarks/split.py MODEL.gguf [--repeats 5] [--pin] [--json PATH]

Prints medians of the ratios of pairs: decode of one request, prefill of 8 prompts of 512 tokens, decode of 8 requests
together; the latter also beside the bound that the measured stage times give at the microbatch size that was chosen.
With `--pin`, each process has a core while there is one request; else the system chooses.
A turn takes about half a minute with a model of a hundred million parameters, and there is one more, to warm up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from llamaclust.wire.rpc.grpc_options import tune_grpc

tune_grpc()

import psutil  # noqa: E402
from measuring.answers import prompts, run  # noqa: E402
from measuring.lines import report, show  # noqa: E402
from measuring.options import positive  # noqa: E402
from measuring.placement import pinned_to_cores  # noqa: E402

from llamaclust.cli.interrupts import ends_in_one_line  # noqa: E402
from llamaclust.cluster.config.cluster_config import load_config  # noqa: E402
from llamaclust.cluster.engine.metrics import StageReport  # noqa: E402
from llamaclust.cluster.server.coordinator import Cluster, open_cluster  # noqa: E402
from llamaclust.cluster.state.directory import ClusterDir  # noqa: E402

_REQUESTS = 8
_PROMPT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Sample:
    """One cluster in one turn."""

    single_tok_s: float  # decode of one request alone
    prefill_s: float  # 8 prompts of 512 tokens, from the first submission to the last first token
    together_tok_s: float  # decode of 8 requests
    bound_tok_s: float  # what the stages' computing times allow at the microbatch size that was chosen
    microbatch_rows: float  # mean rows of a microbatch while 8 requests decoded
    stage_ms: tuple[float, ...]  # mean computing time of a microbatch on each stage meanwhile
    beside_ms: float  # of a token of these, the workers' processor time less their computing time: on idle cores


@asynccontextmanager
async def cluster_of(workers: int, model: Path, folder: Path, *more: str) -> AsyncIterator[Cluster]:
    names = ", ".join(f"{{name: w{index}, threads: 1}}" for index in range(workers))
    overrides = [f"model={model}", f"workers=[{names}]", "context_length=1024", "objective=throughput", *more]
    directory = ClusterDir(folder / f"{workers}")
    directory.create()
    async with open_cluster(load_config(None, overrides), [model], directory) as cluster:
        yield cluster


async def measure(cluster: Cluster, source: random.Random, tokens: int, *, is_pinned: bool) -> Sample:
    vocabulary = cluster.model.hyperparameters.vocabulary_size
    with pinned_to_cores(cluster) if is_pinned else nullcontext():
        alone = await run(cluster, prompts(source, 1, 16, vocabulary)[0], tokens)
    start = time.perf_counter()
    await asyncio.gather(
        *(run(cluster, prompt, 1) for prompt in prompts(source, _REQUESTS, _PROMPT_TOKENS, vocabulary))
    )
    prefill_s = time.perf_counter() - start
    requested = prompts(source, _REQUESTS, 1, vocabulary)
    before, used_s = cluster.engine.metrics.stage_report(), processor_s(cluster)
    start = time.perf_counter()
    await asyncio.gather(*(run(cluster, prompt, tokens) for prompt in requested))
    together_s = time.perf_counter() - start
    rows, stage_ms = difference(before, after := cluster.engine.metrics.stage_report())
    computed_ms = sum(stage_ms) * (after[0].microbatches - before[0].microbatches)
    rounds_ms = max(_REQUESTS / rows * max(stage_ms), sum(stage_ms))
    return Sample(
        single_tok_s=alone.timings.decode_tok_s,
        prefill_s=prefill_s,
        together_tok_s=_REQUESTS * tokens / together_s,
        bound_tok_s=_REQUESTS / rounds_ms * 1e3,
        microbatch_rows=rows,
        stage_ms=stage_ms,
        beside_ms=(1e3 * (processor_s(cluster) - used_s) - computed_ms) / (_REQUESTS * tokens),
    )


def processor_s(cluster: Cluster) -> float:
    """Of all workers, which have one thread each that computes."""
    times = [psutil.Process(worker.registration.pid).cpu_times() for worker in cluster.registry.present.values()]
    return float(sum(each.user + each.system for each in times))


def difference(before: Sequence[StageReport], after: Sequence[StageReport]) -> tuple[float, tuple[float, ...]]:
    """(mean rows of a microbatch, mean computing time on each stage) between two reports."""
    microbatches = after[0].microbatches - before[0].microbatches
    rows = (after[0].rows - before[0].rows) / microbatches
    pairs = zip(before, after, strict=True)
    return rows, tuple((b.compute_ms * b.microbatches - a.compute_ms * a.microbatches) / microbatches for a, b in pairs)


async def compare(model: Path, repeats: int, tokens: int, *, is_pinned: bool) -> list[tuple[Sample, Sample]]:
    """Pairs (one worker, two workers), after a turn that warms up both."""
    source = random.Random(7)
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        report("starting one worker, and two")
        async with cluster_of(1, model, path) as one, cluster_of(2, model, path) as two:
            for number in range(repeats + 1):
                report(f"turn {number} of {repeats}" if number else "warming up")
                samples = [await measure(cluster, source, tokens, is_pinned=is_pinned) for cluster in (one, two)]
                pairs.append((samples[0], samples[1]))
    return pairs[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="path of a .gguf")
    parser.add_argument("--repeats", type=positive, default=5, help="pairs; %(default)s by default")
    parser.add_argument("--tokens", type=positive, default=64, help="tokens of each answer; %(default)s by default")
    parser.add_argument("--json", type=Path, help="write every sample to this file, a JSON line a pair")
    parser.add_argument("--pin", action="store_true", help="one request: each process on a core")
    arguments = parser.parse_args()
    pairs = asyncio.run(compare(arguments.model, arguments.repeats, arguments.tokens, is_pinned=arguments.pin))
    if arguments.json is not None:
        lines = [json.dumps({"one": asdict(one), "two": asdict(two)}) for one, two in pairs]
        arguments.json.write_text("\n".join(lines) + "\n")
    one, two = pairs[-1]
    print(f"one worker: {one.single_tok_s:.0f} tok/s alone, {one.prefill_s:.2f} s, {one.together_tok_s:.0f} tok/s of 8")
    print(
        f"two workers: {two.single_tok_s:.0f} tok/s alone, {two.prefill_s:.2f} s, {two.together_tok_s:.0f} tok/s of 8"
    )
    print(
        f"two workers' microbatches: {two.microbatch_rows:.1f} rows, stages {[round(ms, 2) for ms in two.stage_ms]} ms"
    )
    print(f"two workers' processor time beside computing: {median(b.beside_ms for _, b in pairs):.2f} ms a token of 8")
    print(f"{'two workers / one worker':58}  median   min .. max")
    show("decode of one request, tok/s", [b.single_tok_s / a.single_tok_s for a, b in pairs], ">= 0.93 (1.1B: 0.985)")
    show("prefill of 8 x 512 tokens, time", [b.prefill_s / a.prefill_s for a, b in pairs], "<= 0.53")
    show("decode of 8 requests, tok/s", [b.together_tok_s / a.together_tok_s for a, b in pairs], ">= 1.15 (1.2)")
    show("the same beside the stage times' bound", [b.together_tok_s / b.bound_tok_s for _, b in pairs], ">= 0.90")


if __name__ == "__main__":
    with ends_in_one_line():
        main()
