"""Plans on paper in docs/models.md are those that the program prints."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from typer.testing import CliRunner

from llamaclust.cli.app import app
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError
from llamaclust.tools.assume.answer import KEYS, answer
from llamaclust.tools.assume.shapes import SHAPES
from support.paths import ROOT

PAGE = (ROOT / "docs/models.md").read_text()
EXAMPLES = re.findall(r"^```console\n\$ llamaclust (plan --assume [^\n]*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ROWS = re.findall(r"^\| `([\w.:-]+)`: .*? \| ([\d.]+) GB \| ([\d.]+) \| ([\d.]+) s \|$", PAGE, re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])")


def output(words: list[str]) -> str:
    done = CliRunner().invoke(app, words)
    if done.exception is not None:
        assert isinstance(done.exception, LlamaclustError), done.exception
        return f"error: {done.exception}\n"
    return done.stdout


@pytest.mark.parametrize(("command", "printed"), EXAMPLES)
def test_examples_print_what_the_page_shows(command: str, printed: str) -> None:
    """Words exactly; figures to a hundredth, so that a kernel may change its workspace by a MiB."""
    found = output(shlex.split(command))
    assert NUMBER.sub("N", found) == NUMBER.sub("N", printed)
    figures = [[float(number) for number in NUMBER.findall(text)] for text in (found, printed)]
    assert figures[0] == pytest.approx(figures[1], rel=0.01, abs=1.01)


def test_the_page_has_examples_of_both_kinds() -> None:
    assert len(EXAMPLES) == 3 and len(ROWS) == 4
    assert sum(printed.startswith("error: ") for _, printed in EXAMPLES) == 1


@pytest.mark.parametrize(("model", "size_gb", "tok_s", "ttft_s"), ROWS)
def test_rows_are_those_of_the_program(model: str, size_gb: str, tok_s: str, ttft_s: str) -> None:
    found = answer("3x16GB@40GB/s,1Gbit", model, ())
    assert found.plan.prediction is not None
    assert found.model.file.size_bytes / 1e9 == pytest.approx(float(size_gb), abs=0.06)
    assert 1 / found.plan.prediction.token_s == pytest.approx(float(tok_s), abs=0.06)
    assert found.plan.prediction.ttft_s == pytest.approx(float(ttft_s), abs=0.06)


def test_the_pages_name_every_shape_and_key() -> None:
    (listed,) = re.findall(r"^- \*\*MODEL\*\* is (.*?);", PAGE, re.MULTILINE | re.DOTALL)
    assert {name.lower() for name in re.findall(r"`([^`:]+)`", listed)} == SHAPES.keys()
    (row,) = re.findall(r"^\| `--assume MACHINES` .*$", (ROOT / "docs/command-line.md").read_text(), re.MULTILINE)
    assert {*KEYS} <= {*re.findall(r"`(\w+)`", row)}


def test_the_command_refuses_what_it_would_ignore() -> None:
    example = ["plan", "--assume", "16GB@40GB/s"]
    assert "leave out FILE and --workers" in output([*example, "--model", "8b", "--workers", "2"])
    assert "leave out FILE and --workers" in output(["plan", "cluster.yaml", "--assume", "16GB@40GB/s"])
    assert "give the model too: --model PATH, or one of 7b," in output(example)
    assert "--model: is for --assume MACHINES" in output(["plan", "--model", "8b"])
    values = json.loads(output([*example, "--model", "8b", "--json"]))
    assert values["stages"][0]["worker"] == "m1" and values["model"] == "LLaMA 3.1 8B"
    with pytest.raises(InsufficientMemoryError):
        answer("8GB@40GB/s", "70b", ())
