"""Tests of `up --port` and `up --lan`, which override a cluster file, and of the key for other machines."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from llamaclust.cli.listening import lan_key, listen_overrides
from llamaclust.cli.progress import ready_text
from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.cluster.state.api_keys import named_keys, read_api_keys
from llamaclust.cluster.state.events import Ready
from llamaclust.core import interfaces
from llamaclust.core.errors import UsageError


@pytest.fixture(autouse=True)
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state" / "api-keys"


def config(folder: Path, text: str, port: int | None, *, lan: bool) -> ClusterConfig:
    path = folder / "cluster.yaml"
    path.write_text(f"model: m.gguf\nworkers: [{{name: a}}]\n{text}\n")
    return load_config(path, listen_overrides(path, [], port, lan=lan))


@pytest.mark.parametrize(
    ("listen", "port", "lan", "address"),
    [
        ("", None, True, ("0.0.0.0", 8080)),
        ("listen: '[::1]:0'", None, True, ("0.0.0.0", 0)),
        ("listen: localhost:9000", None, True, ("0.0.0.0", 9000)),
        ("listen: 127.0.0.2:9000", 9001, True, ("0.0.0.0", 9001)),
        ("listen: 192.168.1.5:9000", None, True, ("192.168.1.5", 9000)),
        ("listen: '[fd00::7]:9000'", 9001, True, ("fd00::7", 9001)),
        ("listen: '[::]:9000'", None, True, ("::", 9000)),
        ("listen: '[::1]:9000'", 9001, False, ("::1", 9001)),
        ("", 0, False, ("127.0.0.1", 0)),
    ],
)
def test_where_the_api_listens(
    tmp_path: Path, keys: Path, listen: str, port: int | None, lan: bool, address: tuple[str, int]
) -> None:
    found = config(tmp_path, listen, port, lan=lan)
    assert (found.host, found.port) == address
    assert found.api_keys_file == (keys if lan else None) and not keys.exists()


@pytest.mark.parametrize(
    ("own", "names"),
    [
        ("Laptop", ("laptop", "laptop.local")),
        ("pi-4.home.arpa", ("pi-4", "pi-4.local")),
        ("odd_name", ()),
        ("", ()),
    ],
)
def test_names_of_this_machine_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: own)
    assert tuple(config(tmp_path, "", None, lan=True).allowed_hosts) == names
    assert not config(tmp_path, "", None, lan=False).allowed_hosts
    given = config(tmp_path, "allowed_hosts: [mine]", None, lan=True)
    assert tuple(given.allowed_hosts) == ("mine",)


def test_a_file_of_keys_that_the_cluster_names_stays(tmp_path: Path) -> None:
    assert config(tmp_path, "api_keys_file: mine", None, lan=True).api_keys_file == tmp_path / "mine"


@pytest.mark.parametrize("listen", ["8080", "nonsense", "[a, b]", "'::1:8080'"])
def test_a_wrong_address_is_told_with_its_line(tmp_path: Path, listen: str) -> None:
    for lan, port in ((True, None), (False, 9001), (True, 9001)):
        with pytest.raises(UsageError, match=r"cluster\.yaml:3: listen"):
            config(tmp_path, f"listen: {listen}", port, lan=lan)


def test_one_key_is_made_and_shown_on_a_terminal_alone(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lan_key(keys) == f"the line below `# lan` in {keys}"
    owner, key = read_api_keys(keys)
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert lan_key(keys) == key and read_api_keys(keys) == (owner, key)  # the same at each start


@pytest.mark.parametrize("text", ["# laptop\nsome-api-key\n", "some-api-key\nanother-key\n", "#lan\n\nsome-api-key\n"])
def test_keys_of_others_are_neither_shown_nor_changed(keys: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    keys.parent.mkdir()
    keys.write_text(text)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert (
        lan_key(keys) == f"a key in {keys}; `llamaclust keys add NAME` makes and prints another key"
        and keys.read_text() == text
    )


@pytest.mark.parametrize("text", ["", "# my keys\n\n"])
def test_a_file_without_keys_gets_one(keys: Path, text: str) -> None:
    keys.parent.mkdir()
    keys.write_text(text)
    lan_key(keys)
    assert [each.name for each in named_keys(keys)] == ["owner", "lan"]


@pytest.mark.parametrize(
    ("own", "place"),
    [
        (["192.168.1.5", "127.0.0.1"], "http://192.168.1.5:8080/"),
        (["fd00::7", "::1"], "http://[fd00::7]:8080/"),
        (["127.0.0.1", "::1"], "cannot reach this machine, which has no network address"),
        ([], "cannot reach this machine, which has no network address"),
    ],
)
def test_what_is_typed_on_a_phone(monkeypatch: pytest.MonkeyPatch, own: list[str], place: str) -> None:
    monkeypatch.setattr(interfaces, "own_addresses", lambda: own)
    ready = Ready("mine", "http://0.0.0.0:8080", "good", "/etc/keys")
    assert f"  phones and other computers of this network: {place}\n  API key: KEY\n" in ready_text(ready, "KEY")
    assert "phones" not in ready_text(ready)
