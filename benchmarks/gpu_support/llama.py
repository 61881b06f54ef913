"""Measures llama.cpp's CUDA backend with llama-bench, all layers on one GPU.

docs/internals/gpu-kernels.md says how to build it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.llama import Speed, their_answers, their_speed

from llamaclust.core.errors import UsageError

_ALL_LAYERS = 999


@dataclass(slots=True)
class LlamaCpp:
    """Measures prefill and decode with llama-bench. Takes the faster of two runs, with and without flash attention."""

    program: Path
    gpu: int  # The GPU's number in CUDA.
    prompt: int
    generate: int
    runs: int = 2
    build: dict[str, Any] = field(default_factory=dict)  # Filled by the first run.

    def measure(self, model: Path) -> Speed:
        ways = {"-ngl": _ALL_LAYERS, "-sm": "none", "-mg": self.gpu, "-fa": "0,1"}
        sizes = {"-p": self.prompt, "-n": self.generate, "-r": self.runs}
        options = [str(word) for option in (ways | sizes).items() for word in option]
        answers = their_answers(self.program, model, options)
        speed = their_speed(self.program, answers)
        backends = str(answers[0].get("backends", ""))
        if "CUDA" not in backends.split(","):
            raise UsageError(
                f"{self.program} is built for {backends or 'unknown backends'}; build it with GGML_CUDA=ON"
            )
        if not answers[0].get("gpu_info"):
            raise UsageError(f"{self.program}: llama-bench finds no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")
        names = ("build_commit", "build_number", "backends", "gpu_info")
        self.build = {name: answers[0].get(name) for name in names} | {"options": options}
        return speed
