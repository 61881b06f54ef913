"""Checks that files, keys, options, commands and links in the documentation exist, and that its examples run."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import runpy
import subprocess
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from llamaclust.cli.app import app
from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.text_settings import TextSettings
from llamaclust.cluster.launchers.in_process import LocalPipeline, LocalSettings, LocalStage
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.model.architectures import ARCHITECTURES
from support.clusters.command_line import command_line
from support.clusters.served import serving
from support.models.tiny_model import build_tiny_model
from support.paths import ROOT
from support.several_models.api_models import api_model

pytestmark = pytest.mark.rule

README = ROOT / "README.md"
PAGES = (
    README,
    *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
PRESENT = tuple(page for page in PAGES if page.name != "roadmap.md")  # The roadmap describes what does not exist yet.
PACKAGES = ("cli", "tools", "cluster", "worker", "kernels", "model", "wire", "core", "proto")
FOLDERS = (*PACKAGES, "src", "tests", "benchmarks", "examples", "deploy", "docs", "cmake", ".ci")
MINIMAL = "model: smollm2-135m-instruct\nworkers: [{name: a}]\n"
NEEDED = {"placement": "[{tensors: exps, device: ram}]", "adapters": "[{name: a, path: a.gguf}]", "lease": "{name: a}"}
"""Values of sections with required keys."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page_id(page: Path) -> str:
    return page.name


def fences(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def code(page: Path) -> Iterator[str]:
    """Yields the lines of code blocks (except Python) and of inline code."""
    text = page.read_text()
    for language, block in FENCE.findall(text):
        if language != "python":
            yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def section(page: Path, heading: str) -> str:
    """Returns the text between a heading and the next heading of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#|\Z)", page.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page.name}: no heading {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """Returns the cells of a table without its header."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PRESENT, ids=page_id)
def test_paths_exist(page: Path) -> None:
    words = {word.strip("`'\",:;()") for line in code(page) for word in line.split()}
    paths = [word for word in words if re.fullmatch(r"[\w.-]+(/[\w.*-]+)+/?", word) and word.split("/")[0] in FOLDERS]
    assert [path for path in paths if not any(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.is_file(), f"{page.name} links to {target}"
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PRESENT, ids=page_id)
def test_named_tests_exist(page: Path) -> None:
    for file, test in set(re.findall(r"((?:\w+/)*test_\w+)::(test_\w+)", page.read_text())):
        path = ROOT / "tests" / f"{file}.py"
        assert path.is_file() and f"def {test}(" in path.read_text(), f"{page.name} names {file}::{test}"


def members(cls: ast.ClassDef) -> Iterator[str]:
    """Yields the names of methods and attributes, including attributes that methods set."""
    for node in ast.walk(cls):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))
                yield from (each.attr for each in ast.walk(target) if isinstance(each, ast.Attribute))


def test_named_methods_exist() -> None:
    known = {
        (node.name, member)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for member in members(node)
    }
    named = set(re.findall(r"`([A-Z]\w+)\.(\w+)`", (ROOT / "docs/internals/architecture.md").read_text()))
    assert len(named) >= 20 and named - known == set()


def test_every_dependency_has_a_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = {"Runtime": project["project"]["dependencies"]}
    groups |= {name.capitalize(): group for name, group in project["dependency-groups"].items()}
    for heading, wanted in groups.items():
        found = [row[0] for row in rows(section(ROOT / "docs/internals/dependencies.md", heading))]
        assert sorted(found) == sorted(re.split(r"[<>=,]", one)[0] for one in wanted), heading


# -- the command line --------------------------------------------------------------------------------------------------


def commands() -> dict[tuple[str, ...], Any]:
    """Returns the commands of the program by their words."""
    return dict(commands_below((), get_command(app)))


def commands_below(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    nested = getattr(command, "commands", None)
    if nested is None:
        yield words, command
    for name, one in (nested or {}).items():
        yield from commands_below((*words, name), one)


def options(command: Any) -> dict[str, Any]:
    shown = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    return {name: one for one in shown for name in one.opts if name != "--help"}


def documented_options(page: Path, words: tuple[str, ...]) -> dict[str, str]:
    """Returns the documented options of a command and their defaults, including common options and those of another
    command that the section refers to."""
    heading = re.search(rf"^## (llamaclust {' '.join(words)}\b(?!-).*)$", page.read_text(), re.MULTILINE)
    assert heading is not None
    text = section(page, heading[1])
    found: dict[str, str] = {}
    for other, listed in re.findall(r"has the options of `(\w+)` except ((?:`--[\w-]+`(?: and )?)+)", text):
        missing = re.findall(r"--[\w-]+", listed)
        found |= {name: default for name, default in documented_options(page, (other,)).items() if name not in missing}
    common = rows(section(page, "Common options"))
    for paragraph in re.findall(r"^Common options: (.*?)\.$", text, re.MULTILINE | re.DOTALL):
        for wanted in re.findall(r"`(--[\w-]+)`", paragraph):
            (row,) = (row for row in common if first_words(row[0])[0] == wanted)
            found |= dict.fromkeys(first_words(row[0]), row[1])
    return found | {name: row[1] for row in rows(text) for name in first_words(row[0])}


def first_words(cell: str) -> list[str]:
    return [name.split()[0] for name in names(cell)]


def is_placeholder(word: str) -> bool:
    return word.strip("[]").isupper()


def test_every_command_has_a_section() -> None:
    page = ROOT / "docs/command-line.md"
    headings = [line.split()[2:] for line in page.read_text().splitlines() if line.startswith("## llamaclust ")]
    found = {tuple(takewhile(lambda word: not is_placeholder(word), words)): words for words in headings}
    assert found.keys() == commands().keys()
    for name, words in found.items():
        arguments = [one for one in commands()[name].params if one.param_type_name == "argument"]
        assert [word.startswith("[") for word in words[len(name) :]] == [not one.required for one in arguments], name


def test_every_option_has_a_row_with_its_default() -> None:
    page = ROOT / "docs/command-line.md"
    for words, command in commands().items():
        documented = documented_options(page, words)
        assert documented.keys() == options(command).keys(), words
        for name, default in documented.items():
            actual = options(command)[name].default
            if isinstance(actual, int | float | str) and not isinstance(actual, bool) and actual != "":
                assert default.strip("`") == str(actual), (words, name)


def test_exit_codes_and_variables_are_those_of_the_program() -> None:
    page = ROOT / "docs/command-line.md"
    kinds: list[type[LlamaclustError]] = [LlamaclustError, *LlamaclustError.__subclasses__()]
    codes = {kind.exit_code for kind in kinds}
    listed = re.findall(r"^\| (\d+) \|", section(page, "Exit codes"), re.MULTILINE)
    assert {int(one) for one in listed} == codes | {0, 130}
    read = set(re.findall(r"\b(?:LLAMACLUST|HF|XDG)_[A-Z_]*", (ROOT / "cluster/config/environment.py").read_text()))
    listed = rows(section(page, "Environment"))
    named = {name for row in listed for name in (*names(row[0]), *re.findall(r"\bXDG_[A-Z_]*", row[1]))}
    assert named == read - {"LLAMACLUST_", "HF_"}


@pytest.mark.parametrize("page", PRESENT, ids=page_id)
def test_commands_in_examples_exist(page: Path) -> None:
    for line in code(page):
        for part in re.split(r"&&|\| ", line.partition(" #")[0]):
            found = re.search(r"(?:^|[\s'])llamaclust ([a-z].*)", part)
            if found is not None:
                check_command(found[1].split())


def check_command(words: list[str]) -> None:
    known = commands()
    name = next((tuple(words[:n]) for n in (3, 2, 1) if tuple(words[:n]) in known), None)
    assert name is not None or words in (["model"], ["model", "cache"]), f"no command: llamaclust {' '.join(words)}"
    given = [word for word in words if word.startswith("-") and word != "-"]
    assert name is None or [one for one in given if one not in options(known[name])] == [], words


@pytest.mark.parametrize("page", [README, ROOT / "CHANGELOG.md", ROOT / "docs/comparison.md"], ids=page_id)
def test_architectures_are_counted(page: Path) -> None:
    assert re.findall(r"(\d+) architectures", page.read_text()) == [str(len(ARCHITECTURES))]


def test_the_readme_and_the_docs_are_short() -> None:
    assert len(README.read_text().split()) <= 1000
    assert len((ROOT / "CHANGELOG.md").read_text().split()) <= 600
    words = (word for page in PAGES if "docs" in page.parts for word in page.read_text().split())
    assert sum(any(map(str.isalnum, word)) for word in words) <= 45_000


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_cells_of_tables_are_short(page: Path) -> None:
    lines = (line for line in page.read_text().splitlines() if line.startswith("|"))
    cells = (cell.strip() for line in lines for cell in re.split(r"(?<!\\)\|", line))
    assert [cell for cell in cells if len(cell) > 120] == []


@pytest.mark.parametrize("page", PRESENT, ids=page_id)
def test_make_targets_and_scripts_exist(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in code(page):
        for target in re.findall(r"(?:^|sudo |then )make ([\w-]+)", line):
            assert target in targets, line
        script = re.search(r"python benchmarks/(run\.py )?([\w/]+)(?:\.py)?(.*)", line.partition(" #")[0])
        paths = sorted((ROOT / "benchmarks").glob(f"cases/*/{script[2]}.py")) if script and script[1] else []
        paths = paths or ([ROOT / f"benchmarks/{script[2]}.py"] if script else [])
        source = "".join(path.read_text() for path in [*paths, ROOT / "benchmarks/run.py"])
        for option in re.findall(r"--[\w-]+", script[3]) if script else ():
            is_field = re.search(rf"^    {option[2:].replace('-', '_')}: ", source, re.MULTILINE)
            assert is_field or f'"{option}"' in source, line


def test_the_readmes_demo_runs_what_the_demo_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", "restored by this")
    done = subprocess.CompletedProcess([], 0, stdout="Paris\na [0, 16)\nb [16, 30)\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    demo = runpy.run_path(str(ROOT / "examples/demo.py"))
    demo["main"]()
    shown = capsys.readouterr().out.splitlines()
    excerpt = fences(README, "text")[0].splitlines()
    asked = [re.sub(r"demo-\d+", "demo", line) for line in excerpt if line.startswith("$ ")]
    ran = [line.replace(demo["NAME"], "demo") for line in shown if line.startswith("$ ")]
    assert asked and asked == ran[-len(asked) :]
    assert excerpt[-1] == shown[-1]


# -- the cluster file --------------------------------------------------------------------------------------------------


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


SECTIONS = (
    *(("Keys", None), ("models", "ModelEntry"), ("workers", "WorkerConfig"), ("plan", "PlanEntry"), ("join", "Join")),
    *(("speculative", "Speculative"), ("timeouts", "Timeouts"), ("ray", "Ray"), ("api", "Api"), ("lease", "Lease")),
    *(("listen_tls", "ListenTls"), ("placement", "PlacementEntry"), ("adapters", "AdapterConfig")),
    *(("telemetry", "Telemetry"),),
)


@pytest.mark.parametrize(("heading", "definition"), SECTIONS)
def test_keys_and_defaults_are_those_of_the_schema(heading: str, definition: str | None, minimal: Path) -> None:
    schema = json.loads((ROOT / "deploy/cluster.schema.json").read_text())
    part = schema if definition is None else schema["$defs"][definition]
    is_list = heading in ("models", "workers", "plan", "placement", "adapters")
    prefix = "" if definition is None else f"{heading}.{'0.' if is_list else ''}"
    listed = {names(row[0])[0]: row[1] for row in rows(section(ROOT / "docs/cluster-file.md", heading))}
    assert listed.keys() == part["properties"].keys()
    assert {key for key, default in listed.items() if default == "required"} == set(part.get("required", ()))
    if definition == "ModelEntry":
        minimal.write_text(MINIMAL.replace("model: smollm2-135m-instruct", "models: [{model: smollm2-135m-instruct}]"))
    else:
        minimal.write_text(MINIMAL + (f"{heading}: {NEEDED[heading]}\n" if heading in NEEDED else ""))
    plain = load_config(minimal).model_dump()
    for key, default in listed.items():
        if names(default):
            assert load_config(minimal, [f"{prefix}{key}={names(default)[0]}"]).model_dump() == plain, key
        else:
            value = part["properties"][key].get("default")
            assert not isinstance(value, str | int | float | list) or (default, value) == ("all", []), key


def test_reserved_values_are_refused(minimal: Path) -> None:
    listed = rows(section(ROOT / "docs/cluster-file.md", "Errors"))
    assert len(listed) >= 1
    for key, values in listed:
        for value in names(values):
            with pytest.raises(UsageError, match="is not supported yet"):
                load_config(minimal, [f"{names(key)[0]}={value}"])


def test_cluster_files_can_be_loaded(tmp_path: Path) -> None:
    pages = (
        README,
        *(
            ROOT / f"docs/{name}.md"
            for name in ("cluster-file", "several-machines", "gpu", "operations", "internals/speculation")
        ),
    )
    written = [text for page in pages for text in fences(page, "yaml")]
    assert len(written) >= 4
    for text in written:
        path = tmp_path / "written.yaml"
        path.write_text(text)
        assert load_config(path).workers
    assert load_config(ROOT / "examples/group.yaml").workers
    several = load_config(ROOT / "examples/two-models.yaml").models
    assert [Path(entry.model).parent.name for entry in several] == ["", "examples"]
    assert [adapter.path.parent for adapter in several[0].adapters] == [ROOT / "examples"]
    two = yaml.safe_load((ROOT / "examples/two-workers.yaml").read_text())
    assert yaml.safe_load(fences(README, "yaml")[0]) == two


@pytest.mark.parametrize(("file", "workers"), [("two-workers.yaml", 2), ("three-workers.yaml", 3)])
def test_examples_can_be_planned(file: str, workers: int, demo_model: Path, tmp_path: Path) -> None:
    with command_line() as line:  # A new process, because a plan assumes that a worker is as large as this process.
        settings = ("--set", f"model={demo_model}", "--set", f"state_dir={tmp_path}")
        planned = line.run("plan", ROOT / "examples" / file, "--json", *settings)
    assert planned.code == 0, planned.err
    stages = json.loads(planned.out)["stages"]
    assert len(stages) == workers
    assert (stages[0]["start"], stages[-1]["end"]) == (0, 30)


# -- Python ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def demo_api(folder: Path) -> AsyncIterator[str]:
    """Yields the address of an API like the demo's, with a tiny model of random weights."""
    model = build_tiny_model(folder / "tiny.gguf", layers=2, hidden=64, heads=4, ffn=96)
    stage = LocalStage(model, 1, None, LocalSettings(context_length=512))
    async with stage.serve(), Engine(LocalPipeline(stage), stage.scheduling) as engine:
        text = TextSettings("smollm2-135m-instruct", 512)
        service = TextService(engine, stage.model.tokenizer, stage.model.chat_template, text)
        async with serving(create_app([api_model(service, engine)])) as url:
            yield url


async def test_python_of_the_pages_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = [snippet for page in (README, ROOT / "docs/get-started.md") for snippet in fences(page, "python")]
    assert len(snippets) >= 3
    async with demo_api(tmp_path) as url:
        for snippet in snippets:
            assert "http://127.0.0.1:8080" in snippet
            here = compile(snippet.replace("http://127.0.0.1:8080", url), "snippet", "exec")
            await asyncio.to_thread(exec, here, {})
            assert len(capsys.readouterr().out) > 1
