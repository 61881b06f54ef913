"""Decodes damaged microbatch messages in native code with the compiler's sanitizers."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from llamaclust.core.sampler.matchers import Grammar, MatcherStart
from llamaclust.core.sampler.params import SamplerChain, SamplingParams
from llamaclust.core.sampler.tasks import MatcherRow, SampleTask, ScoreTask
from llamaclust.wire.microbatch.codec import encode_microbatch, encode_sampled_tokens
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Chunk, ImageRows, Microbatch, SampledTokens, SamplingInputs, StageTiming
from support.paths import ROOT
from support.seed import SEED
from support.wire.frame_reader import MODEL_ID
from support.wire.fuzzed import COUNT, damaged
from support.wire.slow_codec import encode_frame

NATIVE = ROOT / "kernels/cpu/native"
FLAGS = (
    "-std=c++20",
    "-O0",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-D_GLIBCXX_ASSERTIONS",
)
FRAME, HIDDEN_FRAME, STATEFUL_FRAME, INPUTS, TOKENS = range(5)  # Numbers of damaged_frames.cpp.

IMAGES = ImageRows(((0, 1), (2, 3)), bytes(16), ((1, 3),), bytes(36))
CHUNK = Chunk(
    (1, 2, 3), 4, (3, 1), 2, embedded=(0, 2), adapters=((0, 1.5), (2, -0.5)), next_token=9, drafts=2, images=IMAGES
)
TASK = SampleTask(SamplingParams(0.5, logit_bias=((3, 1.0), (4, -1.0))), 1, 0, 5, (1, 2), (7,), 3, 1, 4, 5)
CHAINED = replace(
    TASK, params=SamplingParams(chain=SamplerChain(unpenalized=(3,))), breakers=((3,), (4, 5)), matcher=MatcherRow(7, 2)
)


def frame(*chunks: Chunk, width: int = 0) -> bytes:
    microbatch = Microbatch(MODEL_ID, 1, 9, chunks)
    hidden = np.ones((microbatch.rows, width), np.float32) if width else None
    return encode_frame(encode_microbatch(microbatch), (StageTiming(1, 2, 3, 4),), hidden)


FOLLOWING = Chunk((0,), 4, (7, 1), 1, depends_on=(5, 1))
STATEFUL = replace(CHUNK, window_table=(0, 1), state_from=1, state_to=(2, 3, 3, 4))
GOOD = {
    FRAME: (
        frame(CHUNK, FOLLOWING),
        frame(FOLLOWING),
        encode_frame(encode_microbatch(Microbatch(MODEL_ID, 1, 9, (CHUNK,))), (), failure="no"),
    ),
    HIDDEN_FRAME: (frame(CHUNK, FOLLOWING, width=3),),
    STATEFUL_FRAME: (frame(STATEFUL, replace(STATEFUL, table=(9, 1), window_table=(2, 1), state_to=(3, 6))),),
    INPUTS: (
        encode_inputs(SamplingInputs(1, 9, (TASK, ScoreTask(4), CHAINED), (1, 2), (MatcherStart(7, Grammar("{}")),))),
        encode_inputs(SamplingInputs(1, 9, (TASK, TASK.next(), CHAINED))),
    ),
    TOKENS: (encode_sampled_tokens(SampledTokens(5, (3, 7))),),
}


def build(program: Path, *sources: Path) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = ["c++", *FLAGS, "-I", NATIVE, *sources, "-o", program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    empty, found = folder / "empty.cpp", folder / "frames"
    empty.write_text("int main() {}\n")
    has_sanitizer = shutil.which("c++") and build(found, empty).returncode == 0
    if not has_sanitizer or subprocess.run([found], capture_output=True, check=False).returncode != 0:
        pytest.skip("no C++ compiler with an address sanitizer that runs here")
    built = build(found, ROOT / "tests/kernels/native/damaged_frames.cpp", *sorted((NATIVE / "frames").glob("*.cpp")))
    assert built.returncode == 0, built.stderr
    return found


def run(program: Path, records: list[tuple[int, bytes]]) -> tuple[int, int]:
    """Returns the numbers of decoded and refused records."""
    data = b"".join(struct.pack("<BI", kind, len(one)) + one for kind, one in records)
    done = subprocess.run([program], input=data, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
    read, refused = done.stdout.split()
    return int(read), int(refused)


def test_undamaged_messages_are_read(program: Path) -> None:
    records = [(kind, one) for kind, good in GOOD.items() for one in good]
    assert run(program, records)[0] == len(records)


def test_damaged_messages_are_refused_or_read_within_their_bytes(program: Path) -> None:
    source = Random(SEED)
    records = [(kind, damaged(source, good)) for kind, good in GOOD.items() for _ in range(COUNT)]
    read, refused = run(program, records)
    assert min(read, refused) > COUNT // 10, (read, refused)
