"""Tests of `keys`, which changes a file of API keys by the names of the keys."""

from __future__ import annotations

import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llamaclust.cli.app import app
from llamaclust.cluster.state import api_keys
from llamaclust.cluster.state.api_keys import first_key, named_keys, read_api_keys
from llamaclust.core.errors import UsageError


def run(*words: str) -> tuple[str, str]:
    done = CliRunner().invoke(app, ["keys", *words], catch_exceptions=False)
    return done.stdout, done.stderr


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(tmp_path / "new" / "state"))
    return tmp_path / "new" / "state" / "api-keys"


def test_keys_are_made_listed_and_removed(path: Path) -> None:
    made = [run("add", *words) for words in ((), ("phone",), (), ("tv.living-room",))]
    keys = tuple(out.strip() for out, _ in made)
    assert read_api_keys(path) == keys and len(set(keys)) == 4 and first_key(path) == keys[0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any(key in said for key in keys for _, said in made)  # shown on standard output alone
    assert run("list")[0].split() == ["key-1", "phone", "key-2", "tv.living-room"]
    for name in ("phone", "key-1", "tv.living-room"):
        run("rm", name)
    assert read_api_keys(path) == (keys[2],) and path.read_text() == f"# key-2\n{keys[2]}\n"
    with pytest.raises(UsageError, match="key-2 is the only key"):
        run("rm", "key-2")


def test_keys_that_are_added_at_the_same_time_are_all_in_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = api_keys._write

    def slow(path: Path, lines: list[str]) -> None:
        time.sleep(0.02)
        write(path, lines)

    monkeypatch.setattr(api_keys, "_write", slow)
    with ThreadPoolExecutor(4) as threads:
        added = {each.key for each in threads.map(lambda _: api_keys.add_key(path), range(4))}
    assert set(read_api_keys(path)) == added and len(added) == 4


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("plain-key-1\nplain-key-2\n", ["1", "2"]),
        ("# for all machines\n\nfirst-key\n#laptop\nsecond-key", ["1", "laptop"]),
        ("\ufeff# größer\r\nfirst-key\r\n", ["größer"]),
    ],
)
def test_files_that_people_wrote_keep_their_other_lines(text: str, names: list[str], tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text(text)
    own.chmod(0o600)
    before = read_api_keys(own)
    assert [each.name for each in named_keys(own)] == names
    out, _ = run("add", "more", "--file", str(own))
    assert read_api_keys(own) == (*before, out.strip())
    run("rm", names[0], "--file", str(own))
    assert read_api_keys(own) == (*before[1:], out.strip())
    assert ("# for all machines" in own.read_text()) == ("for all" in text)


@pytest.mark.parametrize("words", [("add", "a b"), ("add", "two\nlines"), ("add", ""), ("rm", "nobody"), ("add", "tv")])
def test_names_that_cannot_be(words: tuple[str, ...], path: Path) -> None:
    run("add", "tv")
    before = path.read_bytes()
    with pytest.raises(UsageError):
        run(*words)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "left", ["# phone\n", "#phone\n\n# phone\n", "# phone\n# owner\n{key}\n", "# owner\n{key}\n# phone\n"]
)
def test_a_comment_whose_key_was_deleted_names_no_second_one(path: Path, left: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(left.format(key="k" * 20))
    path.chmod(0o600)
    key = run("add", "phone")[0].strip()
    assert path.read_text().replace("#phone", "# phone").count("# phone") == 1
    assert path.read_text().endswith(f"# phone\n{key}\n")
    assert [each.name for each in named_keys(path)] == (["owner", "phone"] if "owner" in left else ["phone"])
