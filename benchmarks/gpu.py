"""Measures a model on a GPU: decode as a share of memory bandwidth, prefill as a share of the peak of 8-bit products,
and eight sequences relative to one. Can also compare llama.cpp, and keep layers or experts in RAM.

    python benchmarks/gpu.py MODEL.gguf                              # these three figures
    python benchmarks/gpu.py MODEL.gguf --llama-bench PROGRAM        # in turns with llama.cpp's CUDA backend
    python benchmarks/gpu.py MODEL.gguf --gpu-memory 24GiB           # layers beyond that size in RAM
    python benchmarks/gpu.py MODEL.gguf --cpu-moe                    # experts in RAM, and copies of them on the GPU

The bytes of a decode step include only the experts that the step uses (for several sequences, an expected number).
Decode is measured with and without copies of experts. A GPU and the extra `cuda13` or `cuda12` are needed.
docs/internals/gpu-kernels.md says how to build llama-bench. The best rates of GPU and CPU are measured before and after
each round. Figures are medians with minimum and maximum. Progress goes to standard error, and all figures go to
standard output as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamaclust.cli.interrupts import ends_at_once, ends_in_one_line

with ends_at_once():
    from gpu_support.figures import Figures, Round
    from gpu_support.folders import ready_folder
    from gpu_support.llama import LlamaCpp
    from gpu_support.record import RecordFile, described
    from gpu_support.stage import Loaded, Task, report
    from runner.llama import check_program
    from runner.options import natural, positive

    from llamaclust.cluster.config.values import parse_size
    from llamaclust.core.bounds import MAX_LAYERS
    from llamaclust.core.errors import UsageError
    from llamaclust.core.gpus import CUDA


def measured(task: Task, llama: LlamaCpp | None, repeats: int, file: RecordFile | None = None) -> dict[str, Any]:
    with closing(Loaded(task, whole=llama is not None)) as loaded:
        report("warming up")
        loaded.warm_up()
        rounds: list[Round] = []
        about = described(loaded, sys.orig_argv)
        for number in range(1, repeats + 1):
            round_ = loaded.measure()
            report(f"round {number}/{repeats}: {_line(task, round_)}")
            if llama is not None:
                round_ = replace(round_, theirs=llama.measure(task.model))
                about["llama_bench"] = llama.build
                report(f"round {number}/{repeats}: llama.cpp {_their_line(round_)}")
            rounds.append(round_)
            figures = Figures(loaded.work, rounds)
            record = about | {"rounds": len(rounds)} | figures.as_json()
            if file is not None:
                file.write(record)
    for wanted in figures.wanted():
        report(str(wanted))
    return record


def _line(task: Task, round_: Round) -> str:
    rates = f"VRAM {round_.rates.read.gpu / 1e9:.0f} GB/s"
    if round_.rates.read.cpu:
        rates += f", RAM {round_.rates.read.cpu / 1e9:.0f} GB/s"
    speeds = f"decode {1 / round_.step_s:.1f} tok/s, prefill {task.prompt / round_.prefill_s:.0f} tok/s"
    speeds += f", decode after it {1 / round_.deep_s:.1f} tok/s"
    speeds += f", {task.sequences} sequences {task.sequences / round_.many_s:.1f} tok/s"
    for count, steps in round_.copied.items():
        speeds += f", {count} with copies {count / steps.step_s:.1f} tok/s ({steps.hit_share:.0%} hits)"
    return f"{speeds}; {rates}"


def _their_line(round_: Round) -> str:
    assert round_.theirs is not None
    return f"decode {round_.theirs.decode:.1f} tok/s, prefill {round_.theirs.prefill or 0:.0f} tok/s"


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _cache_size(text: str) -> int | None:
    return None if text == "auto" else 0 if text == "0" else _size(text)


def _device(text: str) -> str:
    number = text.removeprefix(CUDA)
    if not text.startswith(CUDA) or not (number.isascii() and number.isdecimal()):
        raise ArgumentTypeError(f"{text!r} is not a GPU; give one GPU, such as cuda:0")
    return text


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--device", type=_device, default="cuda:0", help="GPU to use (default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="number of CPU threads (default: one per core)")
    parser.add_argument(
        "--prompt", type=positive, default=512, help="number of tokens in a prefill (default: %(default)s)"
    )
    parser.add_argument(
        "--generate", type=positive, default=64, help="number of tokens to decode (default: %(default)s)"
    )
    parser.add_argument("--sequences", type=positive, default=8, help="number of sequences (default: %(default)s)")
    parser.add_argument("--repeats", type=positive, default=5, help="number of rounds (default: %(default)s)")
    parser.add_argument("--gpu-memory", type=_size, metavar="SIZE", help="maximum VRAM to use, such as 24GiB")
    in_ram = parser.add_mutually_exclusive_group()
    in_ram.add_argument(
        "--cpu-moe",
        dest="cpu_moe",
        action="store_const",
        const=MAX_LAYERS,
        help="keep the experts of all layers in RAM",
    )
    in_ram.add_argument(
        "--n-cpu-moe", dest="cpu_moe", type=natural, metavar="N", help="keep the experts of N layers in RAM"
    )
    parser.add_argument(
        "--experts-cache",
        type=_cache_size,
        metavar="SIZE|0|auto",
        help="maximum VRAM for copies of experts in RAM (default: auto, which takes all that is left)",
    )
    parser.add_argument("--no-graphs", action="store_true", help="launch kernels without CUDA graphs")
    parser.add_argument(
        "--llama-bench", type=Path, metavar="PROGRAM", help="path of llama.cpp's llama-bench, built for CUDA"
    )
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="write <gpu>-<model>.json to this folder")
    given = parser.parse_args(arguments)
    if not given.model.is_file():
        raise UsageError(f"{given.model}: no such file")
    task = Task(
        given.model,
        given.device,
        given.threads or len(os.sched_getaffinity(0)),
        given.prompt,
        given.generate,
        given.sequences,
        given.gpu_memory,
        not given.no_graphs,
        given.cpu_moe,
        given.experts_cache,
    )
    llama = None
    if given.llama_bench is not None:
        number = int(given.device.removeprefix(CUDA))
        llama = LlamaCpp(
            check_program(given.llama_bench, "docs/internals/gpu-kernels.md"), number, given.prompt, given.generate
        )
    file = None
    if given.record is not None:
        ready_folder(given.record)
        file = RecordFile(given.record)
    print(json.dumps(measured(task, llama, given.repeats, file), indent=2, allow_nan=False), flush=True)
    if file is not None and file.error is not None:
        raise file.error


if __name__ == "__main__":
    with ends_in_one_line():
        main(sys.argv[1:])
