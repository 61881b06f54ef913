"""Tests that a native module of another build is rejected with a one-line error."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust import kernels
from llamaclust.core.errors import LlamaclustError
from llamaclust.kernels import _native
from llamaclust.kernels.native_interface import check_interface

STUB = Path(kernels.__file__).with_name("_native.pyi")
OTHERS = {
    "a function": ("def gone() -> None: ...", "it lacks gone;"),
    "a class": ("class Gone:\n    def method(self) -> None: ...", "it lacks Gone;"),
    "a method": ("class Links(Gatherer):\n    def gone(self) -> None: ...", "it lacks Links.gone;"),
    "a property": ("class Link:\n    @property\n    def gone(self) -> float: ...", "it lacks Link.gone;"),
    "an attribute": ("class Gatherer:\n    gone: int", "it lacks Gatherer.gone;"),
    "several": (
        "\n".join(f"def gone_{n}() -> None: ..." for n in range(5)),
        "it lacks gone_0, gone_1, gone_2 and 2 more;",
    ),
}


def test_the_module_of_this_build_has_all() -> None:
    check_interface(_native, STUB)


@pytest.mark.parametrize("what", OTHERS)
def test_what_an_older_build_lacks_is_named(what: str, tmp_path: Path) -> None:
    newer, words = OTHERS[what]
    stub = tmp_path / "_native.pyi"
    stub.write_text(f"{STUB.read_text()}\n\n{newer}\n")
    with pytest.raises(LlamaclustError) as raised:
        check_interface(_native, stub)
    assert str(raised.value).startswith(f"{_native.__file__} was built from another version of llamaclust: {words}")
    assert "\n" not in str(raised.value)


def test_without_a_stub_nothing_is_known(tmp_path: Path) -> None:
    check_interface(_native, tmp_path / "_native.pyi")
