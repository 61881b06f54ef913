"""Tests of the probes of the chart's workers, which look for the worker's port without connecting to it."""

from __future__ import annotations

import socket
import subprocess

import pytest

from support.kubernetes.charts import one, render
from support.network.loopback import free_port, has_ipv6_loopback


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_worker_is_alive_while_its_port_is_open(family: socket.AddressFamily, host: str) -> None:
    if family is socket.AF_INET6 and not has_ipv6_loopback():
        pytest.skip("this machine has no ::1")
    port = free_port()
    (worker,) = one(render({"workers": {"port": port}}), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    command = worker["startupProbe"]["exec"]["command"]
    assert worker["livenessProbe"]["exec"]["command"] == command

    def is_alive() -> bool:
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0

    with socket.socket(family) as opened:
        opened.bind((host, port))
        assert not is_alive()
        opened.listen()
        assert is_alive()
        opened.settimeout(0)
        with pytest.raises(BlockingIOError):  # There was no connection.
            opened.accept()
    assert not is_alive()
