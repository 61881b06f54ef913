"""Tests of addresses for `--join`, with and without a port."""

from __future__ import annotations

import pytest

from llamaclust.cli.worker import _addresses
from llamaclust.cluster.config.environment import environment
from llamaclust.core.errors import UsageError


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("10.0.0.1", "10.0.0.1:7100"),
        ("laptop.local", "laptop.local:7100"),
        ("laptop:7200", "laptop:7200"),
        ("fd00::7", "[fd00::7]:7100"),
        ("[fd00::7]", "[fd00::7]:7100"),
        ("[fd00::7]:7200", "[fd00::7]:7200"),
    ],
)
def test_a_host_alone_means_the_usual_port(given: str, address: str) -> None:
    assert _addresses([given], environment(), discover=False) == (address,)


@pytest.mark.parametrize("given", ["", "a b", "http://laptop:7100", "laptop:70000"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="--join"):
        _addresses([given], environment(), discover=False)
