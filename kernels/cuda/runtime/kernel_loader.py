from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from llamaclust.kernels.cuda.runtime.cubin_cache import CubinCache
from llamaclust.kernels.cuda.runtime.cupy_open import usable_nvrtc
from llamaclust.kernels.cuda.runtime.device import PLAIN_SHARED_BYTES
from llamaclust.kernels.cuda.runtime.sources import modules, whole_text

_log = logging.getLogger(__name__)


class KernelLoader:
    def __init__(self, cupy: Any, compute_capability: tuple[int, int], folder: Path | None) -> None:
        self._cupy = cupy
        self.architecture = 10 * compute_capability[0] + compute_capability[1]
        self._nvrtc = usable_nvrtc(cupy, self.architecture)
        self._cubins = CubinCache(folder)
        self._modules: dict[str, Any] = {}
        self._kernels: dict[str, Any] = {}
        self._shared_bytes: dict[str, int] = {}

    def get(self, name: str, shared_bytes: int = 0) -> Any:
        if name not in self._kernels:
            module, _, function = name.rpartition(".")
            kernel = self._function(module, function)
            self._shared_bytes[name] = PLAIN_SHARED_BYTES - kernel.shared_size_bytes
            self._kernels[name] = kernel
        if shared_bytes > self._shared_bytes[name]:
            self._kernels[name].max_dynamic_shared_size_bytes = self._shared_bytes[name] = shared_bytes
        return self._kernels[name]

    def close(self) -> None:
        self._kernels.clear()
        self._modules.clear()
        self._cubins.close()

    def _function(self, module: str, function: str) -> Any:
        if module not in self._modules:
            self._modules[module] = self._module(module)
        try:
            return self._modules[module].get_function(function)
        except self._cupy.cuda.driver.CUDADriverError as error:
            _log.warning("kernel module %s cannot be loaded: %s; it is compiled again", module, error)
            self._modules[module] = self._module(module, anew=True)
            return self._modules[module].get_function(function)

    def _module(self, name: str, *, anew: bool = False) -> Any:
        path = self._cubins.get(self._nvrtc, name, whole_text(modules()[name]), self.architecture, anew=anew)
        return self._cupy.RawModule(path=str(path))
