"""Tests of the views of a cluster and of a download, on a terminal and elsewhere."""

from __future__ import annotations

import errno
import io
import threading
from pathlib import Path

import pytest
from rich.console import Console

from llamaclust.cli.progress import ClusterView, ProgressLines, cluster_view, draining_text, ready_text
from llamaclust.cli.status import _head, _workers
from llamaclust.cli.why import list_lines, waterfall_lines, why
from llamaclust.cluster.membership.log_tail import last_error
from llamaclust.cluster.state.events import (
    Draining,
    Event,
    Measuring,
    ModelUse,
    Notice,
    PlanMade,
    Ready,
    StartFailed,
    WorkerLoading,
    WorkerReading,
    from_line,
    to_line,
)
from llamaclust.core.errors import UsageError
from llamaclust.core.interfaces import own_addresses

MIB = 1 << 20
EVENTS: tuple[Event, ...] = (
    Measuring(("a", "b"), "bandwidth"),
    PlanMade(("plan:",)),
    WorkerReading("a", 1, 3 * MIB),
    WorkerLoading("a", 0, 2, 1, 2 * MIB),
    WorkerLoading("a", 0, 2, 2 * MIB, 2 * MIB),
    Ready("tiny", "http://127.0.0.1:1", "good"),
    Notice("worker a is lost: \x1b[2J"),
    Draining(2, 30.0),
    Draining(1, 30.0),
)


class GoneTerminal(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def shown(capsys: pytest.CaptureFixture[str], *events: Event) -> list[str]:
    with ClusterView() as view:
        for event in events:
            view.show(event)
    return capsys.readouterr().err.splitlines()


def test_off_a_terminal_every_event_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, *EVENTS)
    assert lines[:6] == [
        "measuring worker a: bandwidth",
        "measuring worker b: bandwidth",
        "plan:",
        "worker a reads the model for others: reading 3.0 MiB",
        "worker a, layers 0-1: loading 2.0 MiB",
        "",
    ]
    assert lines[-4:] == [
        "",
        "worker a is lost: \\x1b[2J",
        "stopping: 2 requests are finished first, for 30 s at most; Ctrl-C again stops at once",
        "stopping: 1 request is left",
    ]


def test_a_stopped_terminal_does_not_stop_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    shown: list[Event] = []

    def show_later(view: ClusterView, event: Event) -> None:
        goes_on.wait()
        shown.append(event)

    monkeypatch.setattr(ClusterView, "show", show_later)
    with cluster_view("tiny") as show:
        for number in range(5000):
            show(Notice(str(number)))
        assert not shown
        goes_on.set()
    assert 1000 <= len(shown) < 5000 and shown[0] == Notice("0")


def test_a_ready_cluster_names_an_address_that_others_can_use_and_where_keys_are() -> None:
    for api in ("http://0.0.0.0:8080", "http://[::]:8080"):
        text = ready_text(Ready("mine", api, "good", "/etc/keys"))
        assert f"base_url=http://{own_addresses()[0]}:8080/v1, api_key=a line of /etc/keys" in text
        assert api not in text
    assert "base_url=http://127.0.0.1:1/v1\n" in ready_text(Ready("mine", "http://127.0.0.1:1", "good"))


def test_a_ready_cluster_with_tls_names_its_certificate() -> None:
    signed = ready_text(Ready("mine", "https://127.0.0.1:1", "good", fingerprint="AB:CD"))
    assert "base_url=https://127.0.0.1:1/v1\n  certificate: SHA-256 AB:CD\n" in signed
    own = ready_text(Ready("mine", "https://127.0.0.1:1", "good", fingerprint="AB:CD", ca_file="/s/api.crt"))
    assert "other machines: --ca-file with a copy of /s/api.crt\n" in own


def test_a_ready_cluster_names_its_other_models_and_adapters() -> None:
    lines = ready_text(Ready("mine", "http://127.0.0.1:1", "good", others=("two", "poet"))).splitlines()
    assert "  other models: two, poet; --served-model NAME chooses a model" in lines


def test_a_ready_cluster_without_loaded_models_names_how_one_is_loaded() -> None:
    text = ready_text(Ready("mine", "http://127.0.0.1:1", "good", loads_on_demand=False))
    load = '  no model is loaded: POST /models/load {"model": NAME}\n'
    assert text.index(load) < text.index("llamaclust chat")
    assert load not in ready_text(Ready("mine", "http://127.0.0.1:1", "good"))


def test_a_ready_cluster_names_where_its_telemetry_goes() -> None:
    ready = Ready("mine", "http://127.0.0.1:1", "good", collector="http://localhost:4318")
    assert "  telemetry: http://localhost:4318" in ready_text(ready).splitlines()
    assert "telemetry" not in ready_text(Ready("mine", "http://127.0.0.1:1", "good"))


@pytest.mark.parametrize("request_id", ["58d", ""])
def test_too_few_characters_name_no_request(request_id: str) -> None:
    with pytest.raises(UsageError, match="give at least 4 characters"):
        why(request_id)


def test_adapters_of_a_request_are_shown_with_their_scales() -> None:
    record = {
        "id": "97047352",
        "model": "m",
        "end": "stop",
        "seconds": 0.5,
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "generated_tokens": 4,
        "adapters": [{"name": "poet", "scale": 1.0}, {"name": "clerk", "scale": 0.25}],
        "phases": [],
    }
    assert list(waterfall_lines(record))[1:] == ["adapters: poet 1, clerk 0.25"]
    (listed,) = list_lines([record])
    assert listed.endswith(", stop, 500.0 ms, adapters: poet 1, clerk 0.25")
    (drafted,) = list_lines([record | {"drafted_tokens": 6, "accepted_tokens": 3}])
    assert ", 4 generated (3 of 6 drafted tokens accepted), stop" in drafted
    assert "97047352: 1 prompt token, 4 generated" in "".join(list_lines([{**record, "prompt_tokens": 1}]))


def test_the_head_of_several_models_is_of_all_of_them() -> None:
    """Shows a cluster whose first model is asleep and whose second one is ready."""
    state = {
        "name": "many",
        "model": "one",
        "api": "http://127.0.0.1:1",
        "pid": 1,
        "state": "asleep",
        "insecure": False,
    }
    state |= {"reason": None, "requests": {"running": 0, "waiting": 0}, "recoveries": 0}
    speed = {"token_ms": None, "prompt_tokens": 1, "ttft_ms": None, "tokens_per_s": None, "requests": 0}
    state["speed"] = {"predicted": speed | {"bottleneck": None}, "measured": speed}
    state["models"] = [
        {"name": "one", "state": "asleep", "requests": {"running": 0, "waiting": 1}},
        {"name": "two", "state": "ready", "requests": {"running": 2, "waiting": 3}},
    ]
    first, second, *more = _head(state)
    assert first.startswith("many: ready, one at") and second == "requests: 2 running, 4 waiting"
    assert [line.split(":")[0] for line in more] == ["models", "predicted"]
    choice = {
        "objective": "latency",
        "prompt_tokens": 512,
        "rejected_group": None,
        "no_group": "`groups` is off",
        "no_images": None,
    }
    assert [*_head(state | {"choice": choice})][-2:] == [
        "objective: latency (a request alone: 512 tokens of prompt, 128 of answer)",
        "no group is possible: `groups` is off",
    ]
    counts = {"drafted_tokens": 96, "accepted_tokens": 80}
    drafting = {"predicted": speed | {"bottleneck": None}, "measured": speed | counts}
    shown = "\n".join(_head(state | {"speed": drafting}))
    assert "drafts:    80 of 96 drafted tokens accepted in the last 10 s" in shown
    kinds = {"drafts": {"ngram": counts, "mtp": counts}}
    since = "since the start: ngram 80 of 96, mtp 80 of 96"
    for measured, lines in (
        (speed | kinds, [f"drafts:    {since}"]),
        (speed | counts | kinds, ["drafts:    80 of 96 drafted tokens accepted in the last 10 s", f"{'':<11}{since}"]),
        (speed | {"drafted_tokens": 0, "accepted_tokens": 0} | kinds, [f"drafts:    {since}"]),
        (speed, []),
    ):
        head = list(_head(state | {"speed": {"predicted": speed | {"bottleneck": None}, "measured": measured}}))
        assert [line for line in head if "drafts" in line or "since" in line] == lines
    unplanned = {"predicted": dict.fromkeys((*speed, "bottleneck")), "measured": speed}  # no model was ever loaded
    assert "predicted" not in "\n".join(_head(state | {"speed": unplanned}))


@pytest.mark.parametrize(("use", "path"), [(ModelUse.EMBEDDINGS, "embeddings"), (ModelUse.RANKS, "rerank")])
def test_an_encoder_is_announced_with_what_it_can_do(use: ModelUse, path: str) -> None:
    text = ready_text(Ready("mine", "http://127.0.0.1:1", "good", use=use))
    assert f"  curl http://127.0.0.1:1/v1/{path} -H 'Content-Type: application/json' -d '{{" in text
    assert "llamaclust chat" not in text and "llamaclust generate" not in text
    signed = Ready("mine", "https://127.0.0.1:1", "good", "/k", fingerprint="AB", ca_file="/s/api.crt", use=use)
    assert "--cacert /s/api.crt -H 'Authorization: Bearer KEY'" in ready_text(signed)


def test_each_worker_that_measures_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Checks that equal measurements of several models have one line."""
    one, both = Measuring(("a",), "links"), Measuring(("a", "b"), "bandwidth")
    assert shown(capsys, one, one) == ["measuring worker a: links"]
    assert shown(capsys, both, one) == [
        "measuring worker a: bandwidth",
        "measuring worker b: bandwidth",
        "measuring worker a: links",
    ]
    assert len(shown(capsys, one, Notice("worker b joined"), one)) == 3


def test_weights_that_were_kept_are_not_loading(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, WorkerLoading("a", 0, 2, 2 * MIB, 2 * MIB)) == ["worker a, layers 0-1: 2.0 MiB are loaded"]


def test_on_a_terminal_the_measurement_is_shown_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    text = "\n".join(shown(capsys, *EVENTS))
    assert "measuring a, b: bandwidth" in text and "measuring worker" not in text
    assert "layers 0-1" in text and "is ready" in text


def test_events_cross_a_pipe() -> None:
    for event in (*EVENTS, StartFailed("why", 3)):
        assert to_line(from_line(to_line(event))) == to_line(event)


def test_commands_can_be_copied() -> None:
    """Checks that each command has its own line, with the cluster's name if it has one."""
    lines = [line.strip() for line in ready_text(Ready("mine", "http://127.0.0.1:1", "good")).splitlines()]
    assert {"llamaclust chat --cluster mine", 'llamaclust generate "Once upon a time" --cluster mine'} <= set(lines)
    assert "llamaclust status --cluster mine" in lines
    for unnamed in ("demo", "default"):
        assert "--cluster" not in ready_text(Ready(unnamed, "http://127.0.0.1:1", "good"))
    assert "1 request is finished" in draining_text(Draining(1, 30.0))


def test_no_figure_of_a_worker_is_cut_off_on_a_narrow_terminal() -> None:
    worker = {
        "name": "ip-10-0-12-34",
        "pid": 1234567,
        "device": "cuda:0,cuda:1",
        "layers": [10, 100],
        "state": "serving",
        "drained": True,
        "heartbeat": None,
        "memory_bytes": 123456 * MIB,
        "busy": 1.0,
        "tokens_per_s": 12345.6,
        "decode_ms": 12345.0,
        "predicted_decode_ms": 54321.0,
    }
    shown = io.StringIO()
    Console(width=80, file=shown, highlight=False, markup=False).print(_workers([worker]))
    assert "\u2026" not in shown.getvalue() and "ip-10-0-12-34" in shown.getvalue()


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        ("2026-01-01 10:00:00,123 INFO layers are loaded\n", ""),
        (
            "2026-01-01 10:00:00,123 WARNING low on\tmemory\n2026-01-01 10:00:01,123 INFO goes on\n",
            "low on memory",
        ),
        (
            "2026-01-01 10:00:00,123 ERROR the worker failed\nTraceback (most recent call last):\n"
            '  File "x.py", line 1, in f\n    f()\nValueError: seven\n\n',
            "ValueError: seven",
        ),
        ("2026-01-01 10:00:00,123 INFO a\nterminate called \x1b[31mnow\n", "terminate called [31mnow"),
        ("x" * 100_000, "x" * 997 + "..."),
    ],
)
def test_last_words_tell_of_trouble(log: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    assert last_error(path) == ""
    path.write_text(log)
    assert last_error(path) == words


def test_a_terminal_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", GoneTerminal())
    with ClusterView() as view:
        for event in EVENTS:
            view.show(event)


def test_downloads_off_a_terminal_get_a_line_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = ProgressLines(lambda: now)
    lines("asking", 0, None)
    for done in range(0, 101):
        lines("downloading", done * MIB, 100 * MIB)
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["asking", *(f"downloading: {done}.0 of 100.0 MiB" for done in range(0, 101, 10))]
    for now in range(100, 131):
        lines("of unknown size", (now - 100) * MIB, None)
    assert capsys.readouterr().err.splitlines() == [
        "of unknown size",
        *(f"of unknown size: {done}.0 MiB" for done in (10, 20, 30)),
    ]
