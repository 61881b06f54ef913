"""Checks that chat templates render as published ones need, and that a hostile one costs only bounded time."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from llamaclust.core.errors import DeadlineError, LlamaclustError, RequestError
from llamaclust.model import child_frames, child_process
from llamaclust.model.chat.template import ChatTemplate, TemplateLimits
from llamaclust.model.chat.template_choice import built_in
from llamaclust.model.child_process import BoundedChild
from support.clusters.command_line import eventually
from support.hanging_children import children_hang

HELLO = [{"role": "user", "content": "Hello"}]
FOR_EVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SHORT = TemplateLimits(wall_s=1.0)


def rendered(source: str, **extra: Any) -> str:
    with ChatTemplate(source, "<s>", "</s>") as template:
        return template.render(HELLO, **extra)


@pytest.fixture(scope="module")
def chatml() -> Iterator[ChatTemplate]:
    with ChatTemplate(built_in("chatml"), "<s>", "</s>") as template:
        yield template


def test_chatml(chatml: ChatTemplate) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🦙"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 🦙<|im_end|>\n"
    assert chatml.render(messages) == text + "<|im_start|>assistant\n"
    assert chatml.render(messages, add_generation_prompt=False) == text


def test_a_render_is_quick_once_the_process_runs(chatml: ChatTemplate) -> None:
    chatml.render(HELLO)
    took = []
    for _ in range(50):
        start = time.perf_counter()
        chatml.render(HELLO)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.1


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Hello</s>"),
        ("{{ {'b': '<é>', 'a': [1, none]} | tojson }}", '{"b": "<é>", "a": [1, null]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}", '{\n  "a": 2,\n  "b": 1\n}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{{ 'one two' | wordwrap(3) }}", "one\ntwo"),
        ("{% set ns = namespace(n=0) %}{% for m in [1, 2] %}{% set ns.n = ns.n + m %}{% endfor %}{{ ns.n }}", "3"),
        ("{% for i in [0, 1, 2] %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% for i in [0, 1, 2] %}{% if i == 1 %}{% break %}{% endif %}{{ i }}{% endfor %}", "0"),
        ("{% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
        ("{{ tools is none }}{{ documents is none }}{{ missing is defined }}", "TrueTrueFalse"),
        ("{% macro shout(x) %}{{ x | upper }}{% endmacro %}{{ shout('a') | trim }}", "A"),
    ],
)
def test_what_templates_in_the_wild_use(source: str, text: str) -> None:
    assert rendered(source) == text


def test_tools_as_the_text_that_old_templates_take() -> None:
    tools = [{"type": "function", "function": {"name": "é<\ufdd0>"}}]
    assert rendered("{{ functions }}", tools=tools) == '[\n    {\n        "name": "é<\ufdd0>"\n    }\n]'
    assert rendered("{{ functions }}.") == "."


def test_the_date_and_variables_of_the_caller() -> None:
    before = datetime.now().astimezone().strftime("%d %b %Y")
    text = rendered("{{ strftime_now('%d %b %Y') }}|{{ tools[0].name }}", tools=[{"name": "f"}])
    after = datetime.now().astimezone().strftime("%d %b %Y")
    assert text in (f"{before}|f", f"{after}|f")
    assert rendered("{{ strftime_now('%m/%Y') }}{{ now_s }}", now_s=1e9) == "09/2001"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ raise_exception() }}", "the template refuses these messages without a reason"),
        ("{{ raise_exception('two\\n lines, \\x1b[31mred\\u202e\\x00') }}", "template: two lines, [31mred"),
        ("{{ strftime_now() }}", "strftime_now() missing 1 required positional argument"),
        ("{{ messages[0].content.nothing.there }}", "has no attribute 'nothing'"),
        ("{% for %}", "cannot be used: line 1: Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'x' %}", "no loader"),
        ("{{ range(1000000000) }}", "Range too big"),
        ("{{ 'a' * 100000000000 }}", "memory"),
        ("{{ ['a' * 999999] * 999999 }}", "memory"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 8388608 bytes of text"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("{% if 1 %}" * 50_000 + "{% endif %}" * 50_000, "nested too deeply"),
        ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "nested too deeply"),
        ("{{ " + "[" * 2_000 + "]" * 2_000 + " }}", "nested too deeply"),
    ],
)
def test_a_bad_template_is_an_error_of_the_request(source: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(RequestError) as caught:
        rendered(source)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert time.monotonic() - start < 60


def test_a_template_that_loops_for_ever_is_stopped_and_the_next_render_works() -> None:
    source = "{% if messages[0].content == 'loop' %}" + FOR_EVER + "{% endif %}ok"
    with ChatTemplate(source, "", "", SHORT) as template:
        assert template.render(HELLO) == "ok"
        start = time.monotonic()
        with pytest.raises(DeadlineError, match="did not reply within 1 s"):
            template.render([{"role": "user", "content": "loop"}])
        assert 0.9 < time.monotonic() - start < 15
        assert template.render(HELLO) == "ok"


def test_cpu_time_is_limited_even_without_a_waiting_caller() -> None:
    limits = TemplateLimits(wall_s=20.0, cpu_seconds=1)
    with ChatTemplate(FOR_EVER, "", "", limits) as template, pytest.raises(RequestError, match="CPU time"):
        template.render(HELLO)


def test_a_template_that_overruns_its_limit_where_it_is_compiled_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatTemplate("{{ 7**100000000 }}", "", "", TemplateLimits(cpu_seconds=1)) as template:
        for _ in range(2):
            with pytest.raises(RequestError, match="cannot be used: the child process exceeded its CPU time limit"):
                template.render(HELLO)
            monkeypatch.delattr(BoundedChild, "request", raising=False)  # The second failure needs no child process.


def test_a_start_that_the_machine_held_up_is_tried_again() -> None:
    with ChatTemplate("ok", "", "", TemplateLimits(start_s=0.05)) as template:
        with children_hang(), pytest.raises(DeadlineError, match=r"child process did not reply within 0.05 s"):
            template.render(HELLO)
        child = template._renderers[0].child
        child._program = replace(child._program, start_s=30.0)
        assert template.render(HELLO) == "ok"


def test_renders_are_not_charged_for_the_time_of_earlier_ones() -> None:
    source = "{% for a in range(99999) %}{% for b in range(40) %}{% endfor %}{% endfor %}ok"
    with ChatTemplate(source, "", "", TemplateLimits(cpu_seconds=1)) as template:
        assert template.render(HELLO) == "ok"
        process = psutil.Process(child_pid(template))
        while process.cpu_times().user < 2.5:
            assert template.render(HELLO) == "ok"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_others_killed_is_replaced_unnoticed(chatml: ChatTemplate, number: int) -> None:
    expected = chatml.render(HELLO)
    for _ in range(3):
        os.kill(child_pid(chatml), number)
        assert chatml.render(HELLO) == expected


def test_a_process_that_was_gone_before_the_render_is_replaced_unnoticed(chatml: ChatTemplate) -> None:
    expected = chatml.render(HELLO)
    pid = child_pid(chatml)
    os.kill(pid, signal.SIGKILL)
    while alive(pid):
        time.sleep(0.001)
    assert chatml.render(HELLO) == expected


def test_a_process_that_is_killed_at_every_render_is_an_error() -> None:
    with ChatTemplate(FOR_EVER, "", "") as template, ThreadPoolExecutor(1) as threads:
        running, killed = threads.submit(template.render, HELLO), list[int]()
        while not running.done():
            pid = template._renderers[0].child.pid
            if pid is not None and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.001)
        with pytest.raises(DeadlineError, match="killed by SIGKILL"):
            running.result()
        assert len(killed) == 2


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGXCPU])
def test_what_a_template_does_to_its_process_is_an_error(chatml: ChatTemplate, number: int) -> None:
    expected = chatml.render(HELLO)
    os.kill(child_pid(chatml), number)
    with pytest.raises(RequestError, match=r"crashed|CPU time"):
        chatml.render(HELLO)
    assert chatml.render(HELLO) == expected


def test_many_threads_and_tasks_get_their_own_answers(chatml: ChatTemplate) -> None:
    def content(number: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"number {number} " + "x" * 20_000}]

    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda number: chatml.render(content(number)), range(32)))
    assert all(f"number {number} x" in text for number, text in enumerate(texts))

    async def together() -> list[str]:
        return await asyncio.gather(*(chatml.render_async(content(number)) for number in range(32)))

    assert asyncio.run(together()) == texts


def test_a_slow_render_does_not_hold_up_another_one() -> None:
    source = "{% if messages[0].slow %}" + FOR_EVER + "{% endif %}ok"
    limits = TemplateLimits(wall_s=20, cpu_seconds=20)
    with ChatTemplate(source, "", "", limits) as template, ThreadPoolExecutor(1) as threads:
        running = threads.submit(template.render, [{"slow": True}])
        wait_for_child(template)
        assert template.render([{"slow": False}]) == "ok" and not running.done()
        template.close()
        with pytest.raises(LlamaclustError):
            running.result()


def test_large_messages_pass_and_too_large_ones_are_refused(chatml: ChatTemplate) -> None:
    text = "\x00é" * 1_000_000
    assert text in chatml.render([{"role": "user", "content": text}])
    with pytest.raises(RequestError, match="bytes of text"):
        chatml.render([{"role": "user", "content": "a" * (9 << 20)}])


def test_messages_that_are_no_json_are_refused(chatml: ChatTemplate) -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for content, message in ((deep, "nested too deeply"), ({1, 2}, "cannot be written as JSON")):
        with pytest.raises(RequestError, match=message):
            chatml.render([{"role": "user", "content": content}])


async def test_messages_are_written_off_the_event_loop(chatml: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that large messages do not block the event loop while they are encoded."""
    threads: set[int] = set()
    encoded = child_frames.encoded

    def spied(values: Mapping[str, Any], payload: bytes = b"") -> bytes:
        threads.add(threading.get_ident())
        return encoded(values, payload)

    monkeypatch.setattr(child_process, "encoded", spied)
    assert "Hello" in await chatml.render_async(HELLO)
    assert threads and threading.get_ident() not in threads


def test_half_a_surrogate_pair_does_no_harm(chatml: ChatTemplate) -> None:
    assert "a\ud800b" in chatml.render([{"role": "user", "content": "a\ud800b"}])


def test_a_model_without_a_template_says_what_to_do() -> None:
    with ChatTemplate(None, "", "") as template, pytest.raises(RequestError, match="/v1/completions"):
        template.render(HELLO)


def test_a_closed_template_refuses_and_its_process_is_gone() -> None:
    template = ChatTemplate(FOR_EVER, "", "")
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(template.render, HELLO)
        pid = wait_for_child(template)
        start = time.monotonic()
        template.close()
        template.close()
        assert time.monotonic() - start < 15
        with pytest.raises(LlamaclustError):
            running.result()
    assert not alive(pid)


def test_the_process_knows_no_secrets_and_can_write_no_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    with ChatTemplate("a", "", "") as template:
        assert template.render(HELLO) == "a"
        pid = child_pid(template)
        assert b"SOME_TOKEN" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (0, 0)
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[1] <= 16


CONFINED = """
import os, resource, socket, subprocess, sys
from llamaclust.model.confinement import confine
why = confine()
if why:
    sys.exit(why)
for attempt in (
    lambda: open("/etc/passwd"),
    lambda: socket.socket(),
    lambda: socket.socketpair(),
    lambda: os.execv("/bin/true", ["true"]),
    lambda: os.fork(),
    lambda: os.kill(os.getppid(), 0),
    lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CORE),
):
    try:
        attempt()
    except PermissionError:
        continue
    print("not refused")
resource.setrlimit(resource.RLIMIT_CPU, (9, resource.RLIM_INFINITY))
print("works:", len(bytearray(1 << 24)) >> 20)
"""


def test_a_confined_process_opens_nothing_and_starts_nothing() -> None:
    run = subprocess.run([sys.executable, "-c", CONFINED], capture_output=True, text=True, check=False)
    if "the kernel refused the system call filter" in run.stderr or "no system call filter is available" in run.stderr:
        pytest.skip(run.stderr.strip())
    assert (run.stdout, run.stderr, run.returncode) == ("works: 16\n", "", 0)


def test_renders_are_confined(chatml: ChatTemplate) -> None:
    chatml.render(HELLO)
    status = Path(f"/proc/{child_pid(chatml)}/status").read_text()
    if "Seccomp:" not in status or chatml._renderers[0]._is_reported:
        pytest.skip("this kernel has no filter of system calls")
    assert "\nNoNewPrivs:\t1\n" in status and "\nSeccomp:\t2\n" in status


def test_a_machine_without_a_filter_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exchange = BoundedChild._exchange

    def unconfined(child: BoundedChild, *exchanged: Any) -> tuple[dict[str, Any], bytes]:
        reply, payload = exchange(child, *exchanged)
        return {**reply, "unconfined": "no filter here"} if "unconfined" in reply else reply, payload

    monkeypatch.setattr(BoundedChild, "_exchange", unconfined)
    with ChatTemplate("a", "", "") as template:
        for _ in range(2):
            assert template.render(HELLO) == "a"
            os.kill(child_pid(template), signal.SIGKILL)
    assert caplog.messages == ["chat templates are rendered with Jinja's sandbox alone: no filter here"]


def test_the_process_dies_with_its_parent() -> None:
    program = (
        "import sys, threading, time\n"
        "from llamaclust.model.chat.template import ChatTemplate, TemplateLimits\n"
        f"template = ChatTemplate({FOR_EVER!r}, '', '', TemplateLimits(wall_s=60, cpu_seconds=60))\n"
        "threading.Thread(target=template.render, args=([],), daemon=True).start()\n"
        "while template._renderers[0].child.pid is None: time.sleep(0.01)\n"
        "print(template._renderers[0].child.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    eventually(lambda: not alive(pid), 30.0, "the end of the child")  # sooner than its own CPU limit ends it


def child_pid(template: ChatTemplate) -> int:
    pid = template._renderers[0].child.pid
    assert pid is not None
    return pid


def wait_for_child(template: ChatTemplate) -> int:
    deadline = time.monotonic() + 20
    while template._renderers[0].child.pid is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return child_pid(template)


def alive(pid: int) -> bool:
    """Tells whether a process runs; an ended process that is not yet reaped does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
