"""Whatever decides is in the contract that keeps it from clocks, event loops and the network."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
DECIDING = (
    "planner*",
    "scheduler*",
    "sequences",
    "kv_*",
    "prefix_cache",
    "stage_times",
    "plan",
    "plan_text",
    "costs",
    "links",
)


def test_every_module_that_decides_is_in_the_contract() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [one for one in settings["contracts"] if one["name"] == "deciding is pure"]
    found = {path.stem for pattern in DECIDING for path in (ROOT / "cluster").glob(f"{pattern}.py")}
    assert len(found) > 15
    assert sorted(contract["source_modules"]) == sorted(f"llamaclust.cluster.{name}" for name in found)
    assert set(contract["forbidden_modules"]) == {"asyncio", "grpc", "time"}
