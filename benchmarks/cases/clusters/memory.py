from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from runner.case import Case, Group, Measures, argument, option
from runner.llama import json_of
from runner.options import existing, positive

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import plan_limits
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.sizes import MIB
from llamaclust.model.loader import Model
from llamaclust.tools.model_fit import fit

_MOST = 0.05
_ROOM_BYTES = 1 << 40


@dataclass(frozen=True)
class Memory(Case):
    """Compares the memory that `plan`, `model info` and `status` report with the resident memory of stages.
    The stages of one worker and of two workers are loaded, each in its own process without the packed-weight cache.
    They run the largest microbatches until all KV blocks are in use. `resident` is the growth of a process's RssAnon
    (/proc/self/status) since before the load. The case fails if a reported size is more than 5 % off."""

    rounds = 1
    models: list[Path] = argument("paths of .gguf files", existing, nargs="+")
    threads: int = option(2, "number of threads of each stage", positive)
    context: int = option(1024, "context length in tokens", positive)

    async def groups(self) -> AsyncIterator[Group]:
        worst = 0.0
        for path in self.models:
            info_bytes = fit(path, _ROOM_BYTES, self.threads, self.context).total_bytes
            with closing(Model.open(path)) as model:
                layers = model.layer_count
                for cut in ((0, layers), (0, layers // 2, layers)):
                    for name, said, order in self._stages(path, model, cut):
                        said |= {"info": info_bytes} if len(cut) == 2 else {}
                        group = Group("MiB", {name: partial(self._measure, said, order)})
                        yield group
                        worst = max(worst, abs(group.values(name, "worst")[0]))
        if worst > _MOST:
            raise LlamaclustError(
                f"a reported size differs from resident memory by {worst:.1%}; the limit is {_MOST:.0%}"
            )

    def _stages(
        self, path: Path, model: Model, cut: tuple[int, ...]
    ) -> list[tuple[str, dict[str, int], dict[str, Any]]]:
        names = [f"w{number}" for number in range(len(cut) - 1)]
        entries = [{"worker": name, "layers": [*cut[at : at + 2]]} for at, name in enumerate(names)]
        values = {"model": str(path), "workers": [{"name": name} for name in names], "plan": entries}
        config = ClusterConfig.model_validate(values | {"context_length": self.context})
        workers = {name: WorkerResources("m", _ROOM_BYTES, threads=self.threads) for name in names}
        plan = plan_cluster(config, model, ClusterResources(workers, {}))
        order = {"model": str(path), "limits": asdict(plan_limits(config, plan)), "threads": self.threads}
        return [
            (
                f"{path.stem} {len(names)}: [{each.start}, {each.end})",
                {"plan": each.bytes},
                _of(order, each.start, each.end),
            )
            for each in plan.stages
        ]

    async def _measure(self, said: dict[str, int], order: dict[str, Any], turn: int) -> Measures:
        script = Path(__file__).parents[2] / "runner/stage_memory.py"
        found = await asyncio.to_thread(json_of, [sys.executable, str(script), json.dumps(order)])
        said = {**said, "status": found["status"]}
        errors = [value / found["resident"] - 1 for value in said.values()]
        sizes = {name: value / MIB for name, value in {**said, "resident": found["resident"]}.items()}
        return {"worst": max(errors, key=abs), **sizes}


def _of(order: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    return {**order, "start": start, "end": end}
