"""Tests of API keys in a file that changes while a cluster runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from llamaclust.cluster.state.api_keys import LiveKeys, add_key, read_api_keys, remove_key
from llamaclust.core.errors import UsageError
from support.clusters import served
from support.clusters.served import ScriptedEngine, says, serving


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "api-keys"
    for name in ("owner", "lan"):
        add_key(path, name)
    return path


async def test_added_and_removed_keys_count_at_once(path: Path) -> None:
    app = served.make_app(ScriptedEngine(says("Hi")), api_keys=LiveKeys(path))
    async with serving(app) as url, httpx.AsyncClient(trust_env=False) as http:

        async def status(key: str, what: str = "/v1/models") -> int:
            return (await http.get(f"{url}{what}", headers={"Authorization": f"Bearer {key}"})).status_code

        _, lan = read_api_keys(path)
        assert [await status(lan), await status("lc-another-key")] == [200, 401]
        phone = add_key(path, "phone").key
        remove_key(path, "lan")
        assert [await status(lan), await status(phone)] == [401, 200]


SPOILED: dict[str, Callable[[Path], object]] = {
    "no file": Path.unlink,
    "no key": lambda path: path.write_text("# none\n"),
    "a bad key": lambda path: path.write_text("short\n"),
    "others may read it": lambda path: path.chmod(0o644),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_keys_stay_where_their_file_cannot_be_used(
    spoil: Callable[[Path], object], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = LiveKeys(path)
    before = tuple(keys)
    spoil(path)
    with pytest.raises(UsageError):
        read_api_keys(path)
    assert tuple(keys) == before and len(keys) == 2 and keys[0] == before[0] and before[1] in keys
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and str(path) in warned[0].message and not any(key in caplog.text for key in before)


def test_a_file_that_is_mended_counts_again(path: Path) -> None:
    keys = LiveKeys(path)
    text = path.read_text()
    path.write_text("")
    assert len(keys) == 2
    path.write_text(f"{text}# third\nlc-some-third-key\n")
    assert keys[2:] == ("lc-some-third-key",)
