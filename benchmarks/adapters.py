"""What loaded adapters cost requests that use none: decode and prefill of a model with adapters relative to the model
alone, each in turns with the other, as ratios of pairs.

    python benchmarks/adapters.py 1.1b.gguf [--adapters 4] [--rank 16] [--threads 2] [--repeats 9]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.loader import Model
from llamaclust.model.program import MatMul
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.bench.limits import Spread
from llamaclust.tools.bench.stage import BenchStage, stage_limits
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.whole_model import load_whole
from llamaclust.worker.settings import WorkerSettings

_STEPS = 32
_PROMPT = 256
_SEQUENCES = 8


def write_adapter(path: Path, model: Path, rank: int) -> Path:
    """One of every matrix of the layers, with random weights."""
    with Model.open(model) as opened:
        steps = opened.program(0, opened.layer_count).steps
        products = [step for step in steps if isinstance(step, MatMul) and step.weight.startswith("blk.")]
    random = np.random.default_rng(1)
    sources = []
    for product in products:
        for half, shape in (("a", (rank, product.x.width)), ("b", (product.out.width, rank))):
            data = (random.standard_normal(shape, np.float32) / 64).astype(np.float16).tobytes()
            name = f"{product.weight}.lora_{half}"
            sources.append(TensorSource(name, QuantType.F16, shape, partial(bytes, data)))
    metadata: dict[str, WritableValue] = {
        "general.architecture": open_model(model).metadata_str("general.architecture"),
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(rank),
    }
    write_gguf(path, metadata, sources)
    return path


@contextmanager
def stage(path: Path, adapters: list[Path], sequences: int, threads: int) -> Iterator[BenchStage]:
    with Model.open(path, adapters=adapters) as model:
        device = Device.open(WorkerSettings(name="benchmark", threads=threads))
        opened = BenchStage(model, load_whole(device, model, stage_limits(sequences, _PROMPT + 1)))
        try:
            yield opened
        finally:
            opened.close()


def ratios(with_adapters: Callable[[], float], alone: Callable[[], float], repeats: int) -> Spread:
    """Of seconds, after a turn of each that does not count."""
    pairs = [(with_adapters(), alone()) for _ in range(repeats + 1)][1:]
    return Spread.of(one / other for one, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9, help="pairs")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adapters-") as folder:
        adapter = write_adapter(Path(folder) / "adapter.gguf", given.model, given.rank)
        for sequences in (1, _SEQUENCES):
            with ExitStack() as stack:
                loaded, alone = (
                    stack.enter_context(stage(given.model, adapters, sequences, given.threads))
                    for adapters in ([adapter] * given.adapters, [])
                )
                for name, run in (
                    ("decode", lambda stage: stage.decode(0, _STEPS)),
                    ("prefill", lambda stage: stage.prefill(_PROMPT, 1)),
                ):
                    spread = ratios(partial(run, loaded), partial(run, alone), given.repeats)
                    what = f"{name} with {given.adapters} unused adapters of rank {given.rank}, time relative to none"
                    print(f"{what}, {sequences} sequences: {spread:.3f}", flush=True)


if __name__ == "__main__":
    main()
