"""Memory of stages as `plan`, `model info` and a loaded stage (as `status` has it) name it, beside what is resident.

    python benchmarks/public_shape.py gemma-3-4b-it:q4_k_m /tmp/gemma.gguf --layers 6
    python benchmarks/clusters/memory.py /tmp/gemma.gguf

The model is planned for one worker and for two with half of the layers each. Each stage is loaded in a process of its
own without the packed-weight cache, so that all weights are private, and runs microbatches of as many rows and outputs
as its limits allow, until all KV blocks are in use. "resident" is what the process takes more than before the load
(RssAnon of /proc/self/status). Exits 1 where a figure is more than 5 % away from that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.sizes import MIB

if TYPE_CHECKING:
    from llamaclust.core.limits import StageLimits
    from llamaclust.wire.microbatch.messages import Chunk

_DEADLINE_S = 600
_MOST = 0.05
_ROOM_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class Stage:
    """`info_bytes`: what `model info` says of the whole model; None of a part of it."""

    model: Path
    name: str
    plan_bytes: int
    info_bytes: int | None
    status_bytes: int
    resident_bytes: int

    @property
    def errors(self) -> list[float]:
        said = (self.plan_bytes, self.info_bytes, self.status_bytes)
        return [value / self.resident_bytes - 1 for value in said if value is not None]

    @property
    def row(self) -> str:
        said = (self.plan_bytes, self.info_bytes, self.status_bytes, self.resident_bytes)
        cells = "".join("       -" if value is None else f"{value / MIB:8.0f}" for value in said)
        return f"{self.model.stem:24} {self.name:14} {cells}  {max(self.errors, key=abs):+7.1%}"


def stages_of(path: Path, threads: int, context: int) -> Iterator[Stage]:
    from llamaclust.cluster.config.cluster_config import ClusterConfig
    from llamaclust.cluster.control.limits import plan_limits
    from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
    from llamaclust.cluster.control.resources.resource_shares import WorkerResources
    from llamaclust.model.loader import Model
    from llamaclust.tools.model_fit import fit

    info_bytes = fit(path, _ROOM_BYTES, threads, context).total_bytes
    with closing(Model.open(path)) as model:
        for cut in ((0, model.layer_count), (0, model.layer_count // 2, model.layer_count)):
            names = [f"w{number}" for number in range(len(cut) - 1)]
            entries = [{"worker": name, "layers": [*cut[at : at + 2]]} for at, name in enumerate(names)]
            values = {"model": str(path), "workers": [{"name": name} for name in names], "plan": entries}
            config = ClusterConfig.model_validate(values | {"context_length": context})
            workers = {name: WorkerResources("m", _ROOM_BYTES, threads=threads) for name in names}
            plan = plan_cluster(config, model, ClusterResources(workers, {}))
            limits = asdict(plan_limits(config, plan))
            for stage in plan.stages:
                asked: dict[str, object] = {"model": str(path), "start": stage.start, "end": stage.end}
                asked |= {"limits": limits, "threads": threads}
                status_bytes, resident_bytes = elsewhere(asked)
                whole = info_bytes if len(names) == 1 else None
                span = f"[{stage.start}, {stage.end})"
                yield Stage(path, f"{len(names)}: {span}", stage.bytes, whole, status_bytes, resident_bytes)


def elsewhere(asked: Mapping[str, object]) -> tuple[int, int]:
    """What a process of its own says of the stage: its bytes, and resident ones."""
    words = [sys.executable, __file__, "--child", json.dumps(asked)]
    said = subprocess.run(words, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    if said.returncode:
        raise LlamaclustError(said.stderr.strip().splitlines()[-1])
    status_bytes, resident_bytes = json.loads(said.stdout)
    return status_bytes, resident_bytes


def here(asked: Mapping[str, Any]) -> tuple[int, int]:
    """Loads the stage in this process and runs a microbatch that uses all of its buffers."""
    import numpy as np

    from llamaclust.core.limits import StageLimits
    from llamaclust.kernels.cpu.backend import CpuBackend
    from llamaclust.model.loader import Model
    from llamaclust.wire.microbatch.messages import Microbatch
    from llamaclust.worker.devices.system_info import release_freed_memory
    from llamaclust.worker.stage.stage_runner import StageOptions, StageRunner

    limits, threads = StageLimits(**asked["limits"]), asked["threads"]
    model, backend, start, end = Model.open(asked["model"]), CpuBackend(threads), asked["start"], asked["end"]
    release_freed_memory()
    before_bytes = private_bytes()
    runner = StageRunner(backend, model, start, end, limits, StageOptions(threads=threads))
    hidden = np.full((limits.max_batch_tokens, runner.program.hidden.width), 0.01, np.float32)
    for number, chunk in enumerate(chunks_of(limits, runner.program.window, is_last=runner.program.is_last)):
        rows = hidden[: len(chunk.tokens)] if start else None
        runner.run(Microbatch(model.model_id, 1, number, (chunk,)), rows)
    release_freed_memory()
    return runner.memory.total_bytes, private_bytes() - before_bytes


def chunks_of(limits: StageLimits, window: int | None, *, is_last: bool) -> Iterator[Chunk]:
    """Sequences that together use all KV blocks, in chunks as large as limits allow."""
    from llamaclust.wire.microbatch.messages import Chunk

    states = count()
    for first in range(0, limits.kv_blocks, blocks := limits.max_context_tokens // 16):
        for position in range(0, limits.max_context_tokens, limits.max_batch_tokens):
            end = min(position + limits.max_batch_tokens, limits.max_context_tokens)
            reach = max(0, position - (window or 0)) // 16
            held = -(-end // 16) - reach
            at = first // blocks * held % max(limits.window_blocks - held + 1, 1)
            state = next(states) % limits.state_blocks if limits.state_blocks else None
            yield Chunk(
                (1,) * (end - position),
                position,
                (first, -(-end // 16)),
                min(end - position, limits.max_outputs) if is_last else 0,
                window_table=(at, held) if limits.window_blocks else (),
                window_start=reach if limits.window_blocks else 0,
                state_from=None if state is None or not position else (state - 1) % limits.state_blocks,
                state_to=() if state is None else (end - position, state),
            )


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Planned memory beside resident memory.")
    parser.add_argument("models", type=Path, nargs="*", metavar="MODEL")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(here(arguments.child)))
        return 0
    print(f"{'MiB':24} {'workers':14} {'plan':>8}{'info':>8}{'status':>8}{'resident':>8}  {'worst':>7}")
    found = []
    for model in arguments.models:
        for stage in stages_of(model, arguments.threads, arguments.context):
            print(stage.row, flush=True)
            found.append(stage)
    return int(any(abs(error) > _MOST for stage in found for error in stage.errors))


if __name__ == "__main__":
    with ends_in_one_line():
        sys.exit(main())
