"""Checks that the example dialect in CONTRIBUTING.md works if it is applied to the sources."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import httpx
import pytest
from openapi_spec_validator import validate

from llamaclust.core.errors import WorkerError
from support.clusters import served
from support.clusters.served import ScriptedEngine, client, events_of, make_app, says
from support.paths import ROOT

PATH = "/v1/toy"
MOST_LINES = 70


def applied() -> dict[str, str]:
    """Returns the sources of the diff's files after the diff is applied, by path."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    diff = re.search(r"^## Add a dialect$.*?^```diff\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert diff is not None and diff[1].count("\n") <= MOST_LINES
    sources = {}
    for part in re.split(r"^\+\+\+ b/", diff[1], flags=re.MULTILINE)[1:]:
        path, _, body = part.partition("\n")
        source = (ROOT / path).read_text() if (ROOT / path).exists() else ""
        for hunk in re.split(r"^@@\n", body, flags=re.MULTILINE):
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] != "+")
            assert source.count(before) == 1 or not source, f"{path}: not there, or twice:\n{before}"
            source = source.replace(before, "".join(line[1:] for line in lines), 1)
        sources[path] = source
    return sources


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds the dialect to the API."""
    sources = applied()
    assert [*sources] == ["cluster/front/dialects/toy.py", "cluster/front/app.py"]
    for path, source in sources.items():
        name = f"llamaclust.{path.removesuffix('.py').replace('/', '.')}"
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(source, path, "exec"), vars(module))
    monkeypatch.setattr(served, "create_app", vars(module)["create_app"])


async def post(body: dict[str, Any], engine: ScriptedEngine | None = None, **settings: Any) -> httpx.Response:
    async with client(make_app(engine or ScriptedEngine(says("Yes.")), **settings)) as http:
        return await http.post(PATH, json=body)


@pytest.mark.usefixtures("toy")
class TestToy:
    async def test_a_whole_reply(self) -> None:
        assert (await post({"prompt": "Hi"})).json() == {"text": "Yes."}
        assert (await post({"prompt": "Hi"}, defaults={"max_tokens": 1})).json() == {"text": "Y"}

    async def test_a_stream(self) -> None:
        reply = await post({"prompt": "Hi", "stream": True, "max_tokens": 90})
        events = events_of(reply.text)
        assert len(events) > 1 and "".join(event["text"] for event in events) == "Yes."

    async def test_errors_have_its_shape(self) -> None:
        reply = await post({"prompt": 1})
        assert (reply.status_code, reply.json()) == (400, {"reason": "prompt: input should be a valid string"})
        assert (await post({"prompt": "Hi", "model": "x"}, is_strict=True)).json().keys() == {"reason"}
        assert (await post({"prompt": "Hi"}, api_keys=("k",))).json().keys() == {"reason"}
        lost = ScriptedEngine(says("Yes."), failure=WorkerError("lost"), failure_after=2)
        reply = await post({"prompt": "Hi", "stream": True}, lost)
        failed = reply.json() if reply.status_code != 200 else events_of(reply.text)[-1]
        assert failed == {"reason": "lost"}

    async def test_openapi_json_shows_it(self) -> None:
        async with client(make_app(ScriptedEngine(says("a")))) as http:
            document = (await http.get("/openapi.json")).json()
        validate(document)
        operation = document["paths"][PATH]["post"]
        fields = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert {"prompt", "max_tokens", "stream", "temperature"} <= fields.keys()
        assert operation["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
        error = operation["responses"]["400"]["content"]["application/json"]["schema"]["$ref"]
        assert document["components"]["schemas"][error.rpartition("/")[2]]["required"] == ["reason"]
