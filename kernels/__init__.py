"""Backends, which compute the steps of programs on CPUs and GPUs. Each backend has its own folder."""

from pathlib import Path

from llamaclust.kernels import _native
from llamaclust.kernels.native_interface import check_interface

check_interface(_native, Path(__file__).with_name("_native.pyi"))
