"""Tests of `generate` and `chat` with a scripted server, with a model in the process, and on a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamaclust import Client
from llamaclust.cli.main import main
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.cluster.state.adapters import ServedAdapter, ServedAdapters
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
from support.clusters import served
from support.clusters.scripted_command import Ended, command, scripted
from support.clusters.served import END, ids, logprob
from support.models.tiny.nextn_models import with_right_nextn
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector

Here = Callable[..., Ended]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Returns a function that runs a command in this process, which is faster than another process."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["llamaclust", *arguments])
        monkeypatch.setenv("LLAMACLUST_STATE_DIR", "/nonexistent/state")
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out, err)

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("cli") / "tiny.gguf", layers=1, hidden=64, heads=4, ffn=96)


async def test_generate_streams_the_text() -> None:
    async with scripted("Hello") as (url, engine):
        ended = await command("generate", "abc", "-n", "9", "--seed", "5", "--temperature", "0.5", "--endpoint", url)
        assert ended == Ended(0, "Hello\n", "")
        generation = engine.submitted[0]
        assert (generation.max_new_tokens, generation.seed, generation.params.temperature) == (
            9,
            5,
            0.5,
        )


async def test_a_served_model_or_adapter_is_chosen() -> None:
    poet = ServedAdapter("poet", "poet.gguf", 0.5)
    async with scripted("Hello", adapters=ServedAdapters((poet,))) as (url, engine):
        for name, adapters in (("tiny", ()), ("poet", ((0, 0.5),))):
            assert (await command("generate", "abc", "--served-model", name, "--endpoint", url)).out == "Hello\n"
            assert engine.submitted.pop().adapters == adapters
            chatted = await command("chat", "--served-model", name, "--endpoint", url, piped=b"Hi\n")
            assert chatted.out == "Hello\n" and engine.submitted.pop().adapters == adapters
        unknown = await command("generate", "abc", "--served-model", "x", "--endpoint", url)
        assert unknown.code == 2 and "'x' is not served here, only 'tiny', 'poet'" in unknown.err
        before = await command("chat", "--served-model", "x", "--endpoint", url)
        assert before.code == 2 and "'x' is not served here, only 'tiny', 'poet'" in before.err, "without any input"


def test_a_model_in_the_process_is_not_one_of_a_cluster(here: Here) -> None:
    both = here("generate", "abc", "--model", "x", "--cluster", "many")
    assert both.code == 2 and "--served-model chooses a model of a cluster" in both.err
    served_here = here("chat", "--model", "x", "--served-model", "x")
    assert served_here.code == 2 and "--served-model is for a cluster" in served_here.err


async def test_generate_as_json() -> None:
    async with scripted("Hello") as (url, engine):
        arguments = ("--top-k", "7", "--top-p", "0.5", "--min-p", "0.1", "--stop", "xyz", "--stop", "q", "--json")
        ended = await command("generate", "abc", *arguments, "--endpoint", url)
        generation = engine.submitted[0]
    reply = json.loads(ended.out)
    logprobs = reply.pop("logprobs")
    tokens = [*ids("Hello"), END]
    assert [np.float32(value) for value in logprobs] == [np.float32(logprob(place)) for place in range(len(tokens))]
    assert max(len(digits.strip("-0.").replace(".", "")) for digits in map(str, logprobs)) == 9
    assert reply == {
        "text": "Hello",
        "token_ids": tokens,
        "prompt_token_ids": ids("abc"),
        "finish_reason": "stop",
        "seed": generation.seed,
        "timings": {
            "ttft_ms": 20.0,
            "prefill_tok_s": 100.0,
            "decode_tok_s": 50.0,
            "drafted_tokens": 6,
            "accepted_tokens": 4,
        },
    }
    assert (generation.params.top_k, generation.params.top_p, generation.params.min_p) == (
        7,
        0.5,
        0.1,
    )
    assert generation.params.chain is None


async def test_samplers_beyond_the_plain_ones() -> None:
    async with scripted("Hello") as (url, engine):
        given: tuple[str, ...] = (
            "--mirostat",
            "2",
            "--mirostat-tau",
            "3",
            "--repeat-penalty",
            "1.5",
            "--typical-p",
            "0.5",
        )
        assert (await command("generate", "abc", *given, "--endpoint", url)).code == 0
        generation = engine.submitted.pop()
        assert generation.params.chain is not None and generation.params.repetition_penalty == 1.5
        assert (generation.params.chain.mirostat, generation.params.chain.mirostat_tau) == (2, 3.0)
        given = ("--samplers", "dry;top_k,temperature", "--dry-multiplier", "1", "--dry-sequence-breaker", "e")
        assert (await command("generate", "abc", *given, "--endpoint", url)).code == 0
        generation = engine.submitted.pop()
        assert generation.params.chain is not None and generation.params.chain.order == (
            "dry",
            "top_k",
            "temperature",
        )
        assert generation.breakers
        ended = await command("generate", "abc", "--samplers", "magic", "--endpoint", url)
        assert (ended.code, ended.out) != (0, "") and "'magic' is none of penalties" in ended.err


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ((), None),
        (("--speculative", "auto"), None),
        (("--speculative", "on"), None),
        (("--speculative", "false"), 0),
        (("--speculative", "off"), 0),
        (("--speculative", "off", "--draft-max", "0"), 0),
        (("--draft-max", "0"), 0),
        (("--draft-max", "7"), 7),
        (("--spec-draft-n-max", "32", "--speculative", "auto"), 32),
    ],
)
async def test_options_say_how_many_tokens_are_drafted(options: tuple[str, ...], most: int | None) -> None:
    async with scripted("a") as (url, engine):
        assert (await command("generate", "abc", *options, "--endpoint", url)).code == 0
        assert (await command("chat", *options, "--endpoint", url, piped=b"Hi\n")).code == 0
        assert [request.max_drafted for request in engine.submitted] == [most, most]


def test_a_draft_model_without_a_value_names_the_commands_help(here: Here) -> None:
    for name in ("generate", "chat"):
        why = f"error: Option '-md' requires an argument; see `llamaclust {name} --help`\n"
        assert here(name, "-md") == Ended(2, "", why)


def test_a_draft_model_that_is_not_there_is_named_as_such(here: Here) -> None:
    why = "error: draft model nowhere.gguf: no such file\n"
    assert here("generate", "x", "--model", "nowhere.gguf", "-md", "nowhere.gguf") == Ended(2, "", why)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--speculative", "maybe"), "--speculative maybe: give auto, on or off; --draft-max N limits drafted tokens"),
        (("--draft-max", "33"), "--draft-max 33: give 0 to 32"),
        (("--draft-max", "-1"), "--draft-max -1: give 0 to 32"),
        (
            ("--speculative", "off", "--draft-max", "3"),
            "--speculative off and --draft-max 3 contradict each other: give one of them",
        ),
        (
            ("--mtp", "--speculative", "off"),
            "--mtp adds drafts, but --speculative off forbids drafts: give one of them",
        ),
        (("--mtp", "--draft-max", "0"), "--mtp adds drafts, but --draft-max 0 forbids drafts: give one of them"),
        (
            ("-md", "y", "--draft-max", "0"),
            "--model-draft adds drafts, but --draft-max 0 forbids drafts: give one of them",
        ),
    ],
)
def test_options_of_drafts_that_cannot_be_are_refused(here: Here, options: tuple[str, ...], why: str) -> None:
    for name in ("generate", "chat"):
        assert here(name, *options, "--model", "x.gguf") == Ended(2, "", f"error: {why}\n")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--draft-max", "8"),
            "--draft-max: set `speculative.max_window` in the cluster file instead: --set speculative.max_window=8",
        ),
        (
            ("--spec-draft-n-max=0",),
            "--spec-draft-n-max: set `speculative` in the cluster file instead: --set speculative=off",
        ),
        (("--mtp",), "--mtp: set `speculative.mtp` in the cluster file instead: --set speculative.mtp=true"),
        (
            ("--speculative", "off"),
            "--speculative: set `speculative` in the cluster file instead: --set speculative=off",
        ),
    ],
)
def test_commands_with_a_cluster_file_name_its_key_for_drafts(here: Here, options: tuple[str, ...], told: str) -> None:
    assert here("up", "c.yaml", *options) == Ended(2, "", f"error: {told}\n")


async def test_prompts_may_be_piped() -> None:
    async with scripted("a") as (url, engine):
        for arguments in ((), ("-",)):
            assert (await command("generate", *arguments, "--endpoint", url, piped="h\u00e9\n".encode())).code == 0
            assert engine.submitted.pop().prompt == tuple(ids("h\u00e9"))
        ended = await command("generate", "--endpoint", url, piped=b"\xff")
        assert (ended.code, ended.out) == (2, "") and "not UTF-8" in ended.err


async def test_a_model_in_the_process(tiny: Path) -> None:
    ended = await command("generate", "Hi", "-n", "4", "--model", str(tiny), "--threads", "1", "--json")
    assert (ended.code, ended.err) == (0, "")
    with Client.local(tiny, 1) as client:
        reply = client.generate("Hi", max_tokens=4)
    printed = json.loads(ended.out)
    assert tuple(printed["token_ids"]) == reply.token_ids
    assert tuple(np.float32(value) for value in printed["logprobs"]) == reply.logprobs


async def test_a_model_in_the_process_drafts_with_its_mtp_head(tiny: Path, tmp_path: Path) -> None:
    model = str(with_right_nextn(tmp_path / "model.gguf"))
    common = ("generate", "Hi", "-n", "40", "--model", model, "--threads", "1", "--json")
    plain, drafted = await command(*common), await command(*common, "--mtp")
    assert (plain.code, drafted.code, drafted.err) == (0, 0, "")
    before, after = json.loads(plain.out), json.loads(drafted.out)
    assert (after["token_ids"], after["logprobs"]) == (before["token_ids"], before["logprobs"])
    refused = await command("generate", "Hi", "--model", str(tiny), "--mtp")
    assert refused.code == 2 and f"{tiny} has no head for multi-token prediction (MTP)" in refused.err


async def test_an_answer_obeys_the_schema_or_the_grammar_in_a_file(tiny: Path, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.gbnf"
    schema.write_text('{"enum": [12, "twelve"]}')
    grammar.write_text('root ::= "yes" | "no"')
    common = ("generate", "say", "-n", "20", "--model", str(tiny), "--threads", "1")
    by_schema = await command(*common, "--json-schema", str(schema))
    assert by_schema.code == 0 and by_schema.out in ("12\n", '"twelve"\n')
    by_grammar = await command(*common, "--grammar", str(grammar))
    assert by_grammar.code == 0 and by_grammar.out in ("yes\n", "no\n")


async def test_the_running_cluster_is_found_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(tmp_path / "state"))
    keys = tmp_path / "keys"
    keys.write_text("# ours\n\nsecret-key\nother-key\n")
    folder = ClusterDir(tmp_path / "state" / "home")
    async with scripted("Hi", api_keys=("secret-key",)) as (url, _):
        with folder.locked():
            folder.write_record(ClusterRecord("home", os.getpid(), url, served.MODEL, str(keys)))
            for more in ((), ("--cluster", "home")):
                ended = await command("generate", "x", *more, state_dir=tmp_path / "state")
                assert ended == Ended(0, "Hi\n", "")
            ended = await command("generate", "x", "--cluster", "away", state_dir=tmp_path / "state")
            assert ended.code == 2 and "choose one of home" in ended.err
        ended = await command("chat", "--endpoint", url, "--api-key-file", str(keys), piped=b"Hello\n")
        assert ended == Ended(0, "Hi\n", "")
        ended = await command("generate", "x", "--endpoint", url)
        advice = "; the commands take a key by --api-key-file FILE"
        assert ended.code == 2 and advice in ended.err
        for words in (("status", "--endpoint", url), ("why", "--endpoint", url)):
            ended = await command(*words)
            assert ended.code == 2 and advice in ended.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("generate", "x"), 2, "no cluster is running: start one with `llamaclust up`"),
        (("chat",), 2, "no cluster is running"),
        (("generate", "x", "--endpoint", "http://127.0.0.1:9"), 1, "does not answer"),
        (("generate", "x", "--endpoint", "nonsense"), 2, "address"),
        (("generate", "x", "--endpoint", "http://a", "--model", "b"), 2, "--endpoint and --model"),
        (("chat", "--cluster", "a", "--model", "b"), 2, "--cluster and --model"),
        (("generate", "x", "--threads", "2"), 2, "--threads is for --model"),
        (("generate", "x", "--cpu-moe"), 2, "--cpu-moe is for --model"),
        (("chat", "--mtp"), 2, "--mtp is for --model; for a cluster, set `speculative.mtp`"),
        (("generate", "x", "--endpoint", "http://a", "--api-key-file", "/nonexistent"), 2, "cannot read the API key"),
        (("generate", "x", "--model", "/nonexistent.gguf"), 2, "no such file"),
        (("generate", "x", "--json-schema", "/nonexistent"), 2, "--json-schema: /nonexistent: No such file"),
        (("generate", "x", "-n", "many"), 2, "valid integer"),
        (("generate", "h\udcff"), 2, "not valid UTF-8"),
        (("chat", "--system", "h\udcff", "--endpoint", "http://127.0.0.1:9"), 2, "not valid UTF-8"),
    ],
)
def test_mistakes_get_one_line(here: Here, arguments: Sequence[str], code: int, words: str) -> None:
    ended = here(*arguments)
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith("error: ") and words in ended.err and ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", " is not JSON: Expecting property name"),
        (b'"\xff"', ": byte 1 in line 1 is not UTF-8 text"),
        (b"[" * 100_000, " is nested too deeply"),
    ],
)
def test_a_schema_that_cannot_be_read_is_named_by_its_file(
    here: Here, tmp_path: Path, content: bytes, words: str
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_bytes(content)
    ended = here("generate", "x", "--json-schema", str(schema))
    assert ended.code == 2 and ended.err.startswith(f"error: --json-schema: {schema}{words}")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [("-n", "99999999999999999999"), ("--temperature", "nan"), ("--top-p", "2"), ("--top-k", "-5")]
)
def test_values_out_of_bounds(here: Here, arguments: Sequence[str], tiny: Path) -> None:
    ended = here("generate", "x", *arguments, "--model", str(tiny))
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a model with two projectors beside it, neither of which is the default."""
    path = tmp_path_factory.mktemp("seeing") / "m.gguf"
    build_tiny_model(path, layers=1, hidden=TEXT_WIDTH, heads=4, ffn=96)
    for name in ("mmproj-a.gguf", "mmproj-b.gguf"):
        build_projector(path.with_name(name), "gemma3")
    for name, colour in (("red.png", (250, 10, 10)), ("blue.png", (10, 20, 240))):
        Image.new("RGB", (40, 30), colour).save(path.with_name(name))
    return path


def test_generate_reads_images(here: Here, seeing: Path) -> None:
    def answer(*options: str) -> tuple[list[float], list[int]]:
        given = ("generate", "What is this?", "-n", "4", "--json", "--model", str(seeing), "-t", "1")
        ended = here(*given, "--mmproj", str(seeing.with_name("mmproj-a.gguf")), *options)
        assert (ended.code, ended.err) == (0, "")
        reply = json.loads(ended.out)
        return reply["logprobs"], reply["prompt_token_ids"]

    red, blue = (("--image", str(seeing.with_name(name))) for name in ("red.png", "blue.png"))
    one, other, both = answer(*red), answer(*blue), answer(*red, *blue)
    assert answer(*red) == one and one[0] != other[0]
    settings = LocalSettings(mmproj=str(seeing.with_name("mmproj-b.gguf")))
    with Client.local(seeing, threads=1, settings=settings) as client:
        content = [seeing.with_name("red.png"), "What is this?"]
        expected = client.chat([{"role": "user", "content": content}], max_tokens=4)
    assert one == ([float(f"{each:.9g}") for each in expected.logprobs], list(expected.prompt_token_ids))
    assert len(one[1]) == len(other[1]) < len(both[1])


def test_generate_refuses_images_that_nothing_reads(here: Here, seeing: Path) -> None:
    red, model = str(seeing.with_name("red.png")), ("--model", str(seeing), "-t", "1")
    unused = here("generate", "x", "--mmproj", red, *model)
    assert unused == Ended(2, "", "error: --mmproj is for images: give --image FILE, too\n")
    no_image = here("generate", "x", "--image", str(seeing), *model)
    assert no_image.code == 2 and "not an image" in no_image.err
    without = here("generate", "x", "--image", red, *model)
    assert without.code == 2 and "2 projectors fit" in without.err and "the model reads text only" in without.err
    cluster = here("generate", "x", "--image", red, "--mmproj", red)
    assert cluster.code == 2 and "--mmproj is for --model" in cluster.err
