from __future__ import annotations

import os
from pathlib import Path

_CONTAINER = "start a container with --gpus all, and in Kubernetes with the runtimeClassName of NVIDIA's runtime"
_SERVICE = "a systemd unit needs DeviceAllow=char-nvidia* rw, without PrivateDevices="


def advice(root: Path = Path("/")) -> str:
    """Returns advice if a device file of a GPU is missing or cannot be opened, or else ""."""
    if (root / "dev/dxg").exists():  # Windows (WSL) provides the driver and another device file.
        return ""
    control, memory = root / "dev/nvidiactl", root / "dev/nvidia-uvm"
    if not control.exists():
        if (root / "proc/driver/nvidia/version").exists():
            return f"NVIDIA's driver is loaded, but this process has no {control}: {_CONTAINER}; {_SERVICE}"
        return f"there is no {control}: install NVIDIA's driver so that nvidia-smi lists the GPU; {_CONTAINER}"
    if not memory.exists():
        return f"there is no {memory}: `sudo nvidia-modprobe -u -c 0` creates it; {_CONTAINER}"
    for device in (control, memory):
        try:
            os.close(os.open(device, os.O_RDWR))
        except OSError as error:
            why = error.strerror or str(error)
            return f"{device}: {why}: add this user to the file's group (often video); {_SERVICE}"
    return ""
