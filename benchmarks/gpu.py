"""A model on a GPU: decode beside the bandwidth of its memory, prefill beside the peak of its 8-bit products, eight
sequences beside one, and the same bits as on the processor.

    python benchmarks/gpu.py MODEL.gguf --device cuda:0

Needs a GPU and the extra `cuda`. What the GPU can do at best is measured before and after each run; shares are of the
mean of both.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import closing
from pathlib import Path
from statistics import median

from llamaclust.errors import LlamaclustError


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-graphs", action="store_true", help="every launch anew")
    given = parser.parse_args(arguments)
    try:
        print(json.dumps(measured(given), indent=2))
    except LlamaclustError as error:
        sys.exit(f"error: {error}")


def measured(given: argparse.Namespace) -> dict[str, object]:
    """Figures by name; GB are 10^9 bytes."""
    from llamaclust.model.loader import Model
    from llamaclust.tools.bench import BenchTask, Work
    from llamaclust.tools.bench_stage import BenchStage, Sampling
    from llamaclust.worker.backends import open_card

    threads = len(os.sched_getaffinity(0))
    with Model.open(given.model) as model, closing(open_card(given.device, threads, None)) as card:
        found: dict[str, object] = {"model": given.model.stem, "gpu": card.card().name}
        for batch in (1, 8):
            task = BenchTask(given.model, threads, given.prompt, given.generate, batch)
            work = Work.of(model, task)
            stage = BenchStage(model, card, batch, task.context, Sampling(threads))
            decodes, prefills, shares = [], [], []
            stage.prefill(given.prompt)
            stage.decode(0, 4)
            for _ in range(given.repeats):
                before = card.limits()
                prefills.append(work.prefill_macs / stage.prefill(given.prompt))
                decodes.append(given.generate / stage.decode(0, given.generate))
                after = card.limits()
                read = (before.read_bytes_s + after.read_bytes_s) / 2
                macs = (before.int8_macs_s + after.int8_macs_s) / 2
                shares.append((decodes[-1] * work.decode_bytes / read, prefills[-1] / macs))
            stage.close()
            found[f"batch {batch}"] = {
                "decode_tok_s": batch * median(decodes),
                "decode_share_of_bandwidth": median(share for share, _ in shares),
                "prefill_gmac_s": median(prefills) / 1e9,
                "prefill_share_of_peak": median(share for _, share in shares),
            }
        return found


if __name__ == "__main__":
    main(sys.argv[1:])
