"""The benchmark of groups: the bits of the product, however the rows of products are divided."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import pytest

from llamaclust.core.errors import LlamaclustError
from llamaclust.kernels._native import tls_library
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.arithmetic.batches import Chain, batch_of
from support.clusters.forked_commands import forked_script
from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "benchmarks" / "groups"))
from group import CHECKED_TOKENS, SEED, Group
from links import Links, compiler, missing
from member import FIRST_TOKEN, WARM, Run
from shape import SHAPES, write_shape

SCRIPT = ROOT / "benchmarks" / "groups" / "group.py"
OPTIONS = ("--hidden", "512", "--layers", "2", "--tokens", "2", "--pairs", "1", "--round-trips", "0,0.1")


def group(folder: Path, *arguments: str) -> str:
    done = forked_script(SCRIPT, "1.1b", *arguments, *OPTIONS, folder=folder, within_s=240.0)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def digest_of_the_product(folder: Path, quant_type: QuantType) -> str:
    """Of the logits of a model with the same weights, token by token."""
    shape = replace(SHAPES["1.1b"], hidden=512, ffn=1024, vocabulary=512, layers=2)
    write_shape(folder / "shape.gguf", "1.1b", shape, quant_type, SEED, alike=True)
    seen, token = hashlib.sha256(), FIRST_TOKEN
    with Model.open(folder / "shape.gguf") as model:
        chain = Chain(CpuBackend(1), model)
        for position in range(CHECKED_TOKENS + WARM):
            logits = chain.run(batch_of([([token], [position], range(4))]))
            seen.update(logits.tobytes())
            token = int(logits[0].argmax())
    return seen.hexdigest()


@pytest.mark.parametrize(
    ("quant_type", "shares", "more"),
    [
        (QuantType.Q8_0, "2,1", ()),
        (QuantType.IQ1_S, "1,1", ("--gbit", "10")),
        (QuantType.Q8_0, "2,1,1", ("--speeds", "1,0.9,0.8", "--json", "rows.jsonl")),
    ],
)
def test_a_group_has_the_bits_of_the_product(
    tmp_path: Path, quant_type: QuantType, shares: str, more: tuple[str, ...]
) -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    text = group(tmp_path, quant_type.name, "--shares", shares, *more)
    assert re.findall(r"^same bits \((\w+)\)", text, re.MULTILINE) == [digest_of_the_product(tmp_path, quant_type)[:16]]
    assert len(re.findall(r"^ +0(?:\.1)? +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+$", text, re.MULTILINE)) == 2
    if "--json" in more:
        rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        assert [row["round_trip_ms"] for row in rows] == [0, 0.1]
        assert all(row["group_ms"] > row["gathers_ms"] > 0 for row in rows)


def test_a_prompt_has_the_bits_of_one_process(tmp_path: Path) -> None:
    if not tls_library():
        pytest.skip("built without OpenSSL")
    script, small = ROOT / "benchmarks" / "groups" / "prefill.py", ("--hidden", "512", "--rows", "256", "--pairs", "1")
    done = forked_script(script, "1.1b", "Q8_0", *small, folder=tmp_path, within_s=240.0)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"speedup [\d.]+; [\d.]+ MB sent; same bits$", done.stdout.strip())


def test_what_a_gather_costs(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "groups" / "link.py"
    if compiler() is None:
        pytest.skip("no C++ compiler found")
    sizes = ("--kib", "1", "--gathers", "20", "--turns", "1", "--late-ms", "1")
    done = forked_script(script, *sizes, "--json", "costs.jsonl", folder=tmp_path, within_s=120.0)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "costs.jsonl").read_text().splitlines()]
    ways = ["loop", "plain", "TLS"] if tls_library() else ["loop", "plain"]
    assert [row["way"] for row in rows] == ways * 2
    assert all(row["p99_us"] >= row["median_us"] > 0 and row["processor_us"] >= 0 for row in rows)


def test_a_member_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("group._ANSWER_S", 0.05)
    with subprocess.Popen(["sleep", "60"], stdin=PIPE, stdout=PIPE, text=True) as silent:
        given = Group([])
        given._processes = [silent]
        with pytest.raises(LlamaclustError, match=r"member 0 has not answered in 0\.05 s"):
            given.run(Run(1))
        silent.kill()


def test_a_member_that_does_not_connect_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("links._CONNECT_S", 0.05)
    given = object.__new__(Links)  # without the library
    given._member, given._listener = 0, socket.create_server(("127.0.0.1", 0))
    with given._listener, pytest.raises(LlamaclustError, match="member 0 has no link to another: timed out"):
        given.connect([0, 0], ["a", "b"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Q8_0", "--shares", "1"), "two or more members"),
        (("Q8_0", "--speeds", "1"), "as many of each"),
        (("Q8_0", "--speeds", "1,2"), "must be 0.01 to 1"),
        (("Q8_0", "--layers", "1"), "--layers: 2 or more"),
        (("Q8_0", "--round-trips", "-1"), "must be 0 to 1000"),
        (("Q9",), "choose from F32"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = forked_script(SCRIPT, "1.1b", *arguments, folder=tmp_path)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and done.stdout == ""
