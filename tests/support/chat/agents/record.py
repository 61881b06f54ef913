"""Records the requests of an installed coding agent against a scripted server on this machine.

    PYTHONPATH=tests python -m support.chat.agents.record AGENT MODEL.gguf --version VERSION

The agent must be in PATH. It runs in empty folders for project and home, and reaches no other server. The model's
vocabulary counts the tokens of the agent's texts."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from PIL import Image
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.model.chat.template import ChatTemplate
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.tokenizers.loading import load_tokenizer
from support.chat.agents.agents import AGENTS, API, MODEL, Agent
from support.chat.agents.recordings import FOLDER
from support.clusters import served
from support.clusters.served import ScriptedEngine, ids, make_app, serving

_TEMPLATE: Final = (
    "{% for t in tools or [] %}\x01{{ t.function.name }}\n{% endfor %}{% for m in messages %}\x02{{ m.role }}>"
    "{{ m.content }}"
    '{% for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}{% endfor %}'
    "{% if add_generation_prompt %}\x02assistant>{% endif %}"
)
_HEADERS: Final = ("accept", "content-type", "originator", "anthropic-version", "anthropic-beta")
_PROSE: Final = frozenset({"text", "content", "description", "output", "instructions"})
_KEPT_LETTERS: Final = 60
_PROXY: Final = "http://127.0.0.1:9"
_SECONDS: Final = 180
_ID: Final = re.compile(
    r"\b((?:call|msg|fc|fco|toolu|ses|resp)_)[\w-]{12,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
)


def _script(agent: Agent, project: Path) -> Callable[[GenerationRequest], list[int]]:
    calls = json.loads(json.dumps(agent.calls).replace("PROJECT", str(project)))

    def answer(generation: GenerationRequest) -> list[int]:
        prompt = served.tokenizer().decode(generation.prompt)
        place = prompt.count("\x02tool>")
        if "\x01" not in prompt:
            return ids(agent.plain)
        offered = [call for call in calls[place : place + 1] if f"\x01{call[0]}\n" in prompt]
        return ids(
            "".join(f"<tool_call>{json.dumps({'name': n, 'arguments': a})}</tool_call>" for n, a in offered) or "Done."
        )

    return answer


class _Recorder:
    """Keeps the requests to an app."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.requests: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()

        async def received() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        query = scope["query_string"].decode()
        request = {
            "method": scope["method"],
            "path": scope["path"] + (f"?{query}" if query else ""),
            "headers": {name: headers[name] for name in _HEADERS if name in headers},
        }
        self.requests.append(request)
        with suppress(asyncio.CancelledError):
            await self._app(scope, received, send)
        request["body"] = json.loads(body or b"{}")


async def _record(agent: Agent, folder: Path) -> list[dict[str, Any]]:
    home, project = folder / "home", folder / "project"
    _fill(project)
    with ChatTemplate(_TEMPLATE, "", "") as template:
        recorder = _Recorder(make_app(ScriptedEngine(_script(agent, project)), template, strict_model=False))
        async with serving(recorder) as url:
            for path, text in agent.files.items():
                (home / path).parent.mkdir(parents=True)
                (home / path).write_text(_with_server(text, url))
            home.mkdir(exist_ok=True)
            await _run(_with_server(agent.command, url), home, project)
    return recorder.requests


def _fill(project: Path) -> None:
    subprocess.run(["git", "init", "-q", project], check=True)
    (project / "a.txt").write_text("one of many\n")
    Image.new("RGB", (8, 8)).save(project / "p.png")


def _with_server(text: str, url: str) -> str:
    return text.replace(API, url).replace(MODEL, served.MODEL)


async def _run(command: str, home: Path, project: Path) -> None:
    """Runs a command without network, except this machine's. Raises TimeoutError and ends the command if it hangs."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), _PROXY)
    here = dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1")
    own = {"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb", "LANG": "C.UTF-8"}
    child = await asyncio.create_subprocess_shell(
        command, cwd=project, env=own | proxies | here, stdin=subprocess.DEVNULL, stdout=sys.stderr
    )
    try:
        async with asyncio.timeout(_SECONDS):
            await child.wait()
    finally:
        with suppress(ProcessLookupError):
            child.kill()


class _Reduction:
    """Replaces texts by their numbers of tokens, ids by counts and folders by others."""

    def __init__(self, folder: Path, count: Callable[[str], int]) -> None:
        self._folder, self._count = str(folder), count
        self._ids: dict[str, str] = {}

    def reduced(self, value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            is_opaque = key in ("client_metadata", "metadata")
            return {name: "00000000" if is_opaque else self.reduced(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [self.reduced(item, key) for item in value]
        return self._text(value, key) if isinstance(value, str) else value

    def _text(self, text: str, key: str) -> str:
        shown = _ID.sub(self._id, text).replace(self._folder, "")
        is_short = len(shown) <= _KEPT_LETTERS or "one of many" in shown[:200]
        if key not in _PROSE or (is_short and shown == text) or text.startswith("x-anthropic"):
            return shown
        return f"{{{self._count(text)} words}}"

    def _id(self, found: re.Match[str]) -> str:
        return self._ids.setdefault(found[0], f"{found[1] or 'id_'}{len(self._ids)}")


def _written(client: str, requests: list[dict[str, Any]]) -> str:
    tools: dict[str, Any] = {}
    for body in (request["body"] for request in requests):
        if "tools" in body:
            named = {(tool.get("function") or tool).get("name", tool.get("type")): tool for tool in body["tools"]}
            tools |= named
            body["tools"] = [*named]
    lines = {name: json.dumps(tool) for name, tool in tools.items()}
    shown = ",\n".join(f"  {json.dumps(name)}: {line}" for name, line in lines.items())
    sent = ",\n".join(f"  {json.dumps(request)}" for request in requests)
    return f'{{\n "client": {json.dumps(client)},\n "tools": {{\n{shown}\n }},\n "requests": [\n{sent}\n ]\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agent", choices=AGENTS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--version", required=True, help="the agent's version")
    chosen = parser.parse_args()
    served.CONTEXT = 1 << 18
    tokenizer = load_tokenizer(open_model(chosen.model).metadata)
    with TemporaryDirectory() as folder:
        requests = asyncio.run(_record(AGENTS[chosen.agent], Path(folder)))
        reduction = _Reduction(Path(folder), lambda text: len(tokenizer.encode(text, add_special=False)))
        reduced = [reduction.reduced(request) for request in requests]
    (FOLDER / f"{chosen.agent}.json").write_text(_written(f"{AGENTS[chosen.agent].title} {chosen.version}", reduced))
    print(*(f"{request['method']} {request['path']}" for request in reduced), sep="\n")


if __name__ == "__main__":
    main()
