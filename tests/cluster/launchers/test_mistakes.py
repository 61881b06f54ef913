"""Tests of mistakes in the cluster files of launchers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.core.errors import UsageError

MISTAKES = {
    "launcher: static\nworkers: [{name: a, threads: 2}]": "command line: llamaclust worker ... --threads 2",
    "launcher: static\nworkers: [{name: a, memory: 8GiB}]": "command line: llamaclust worker ... --memory 8GiB",
    "launcher: static\nworkers: [{name: a, gpu_layers: 3}]": "command line: llamaclust worker ... --gpu-layers 3",
    "launcher: static\nworkers: [{name: a, device: [cuda:0, cuda:1], gpu_layers: 3}]": "cuda:0,cuda:1 --gpu-layers 3",
    "launcher: static\nworkers: 0": "workers: 0 is not possible; give 1 to 256",
    "launcher: static\nworkers: 257": "257 is not possible",
    "launcher: static\nworkers: true": "workers: true is not possible",
    "launcher: static\nworkers: [{name: a}]\njoin: {listen: 7100}": "is not an address",
    "launcher: static\nworkers: [{name: a}]\njoin: {port: 1}": "unknown key 'port' in join",
    "launcher: mpi\nworkers: 3": "list them: `workers: ",
    "launcher: mpi\nworkers: [{name: a}]\ninsecure: true": "is for `launcher: static`",
    "launcher: mpi\nworkers: [{name: a}]\ntimeouts: {coordinator: 60s}": "`launcher: static` or `ray`; mpi workers end",
    "launcher: ray\nworkers: [{name: a}]": "needs `threads`, since launcher ray",
    "launcher: ray\nworkers: [{name: a, threads: 1, device: cuda:1}]": "from 0: set cuda:0",
    "launcher: ray\nworkers: 3": "list them: `workers: ",
    "launcher: ray\nworkers: [{name: a, threads: 1}]\nray: {address: here}": "auto and none are also possible",
    "launcher: ray\nworkers: [{name: a, threads: 1}]\nray: {strategy: ALL}": "strategy",
    "launcher: ray\nworkers: [{name: a, threads: 1}]\ninsecure: true": "is for `launcher: static`",
    "workers: [{name: a}]\nray: {address: none}": "is for `launcher: ray`, but `launcher` is local",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: m\n{text}\n")
    with pytest.raises(UsageError, match=re.escape(MISTAKES[text])):
        load_config(path)
