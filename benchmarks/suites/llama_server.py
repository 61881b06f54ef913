"""Replaces llama.cpp's `llama-server`: turns the command line into a cluster file and runs `llamaclust up` with it.

Models that tests name are replaced by a substitute in the folder LLAMACLUST_SUITE_STAND_INS (`llamacpp_models.py`), or,
without a substitute, by LLAMACLUST_SUITE_MODEL. Flags without a counterpart are ignored. If LLAMACLUST_SUITE_SERVER
names a `llama-server`, that program runs instead of a cluster, with the same models."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamacpp_models import MODEL_FLAGS, adapter, model_of, preset, projector_of, routed_models

VALUES = {
    "--port", "--host", "--temp", "--seed", "--hf-repo", "--hf-file", "--model", "--model-url", "--model-draft",
    "--batch-size", "--ubatch-size", "--threads", "--n-gpu-layers", "--pooling", "--alias", "--tags", "--ctx-size",
    "--parallel", "-ctk", "-ctv", "-fa", "--n-predict", "--slot-save-path", "--grp-attn-n", "--grp-attn-w", "--lora",
    "--spec-type", "--api-key", "--spec-draft-n-max", "--spec-draft-n-min", "--reasoning-format", "--reasoning",
    "--chat-template", "--chat-template-file", "--mmproj-url", "--media-path", "--sleep-idle-seconds", "--cache-ram",
    "--tools", "--cors-origins", "--models-dir", "--models-max", "--models-preset", "--spec-synth-len",
    "--spec-synth-rates", "--tools-runtime", "--mcp-servers-config", "--mcp-servers-json",
}  # fmt: skip

FILE_FLAGS = {*MODEL_FLAGS, "--model-draft"}

DEFAULTS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--temp": ("temperature", float),
    "--seed": ("seed", int),
    "--n-predict": ("n_predict", int),
    "--pooling": ("pooling", str),
}
"""Flags that set a request field's default, with the field's name and the type of its value."""

THINKING = {"on": True, "off": False}


def read_flags(arguments: list[str]) -> dict[str, str]:
    rest, flags = iter(arguments), {}
    for flag in rest:
        flags[flag] = next(rest) if flag in VALUES else ""
    return flags


def own_models(arguments: list[str], folder: Path) -> list[str]:
    kept: list[str] = []
    rest = iter(arguments)
    for flag in rest:
        if flag not in FILE_FLAGS:
            kept.append(flag)
        elif flag == "--model-draft":
            kept += [flag, os.environ["LLAMACLUST_SUITE_MODEL"]]
            next(rest)
        else:
            next(rest)
    flags = read_flags(arguments)
    model = model_of(flags)
    if model is not None:
        projector = None if "--no-mmproj" in flags else projector_of(model)
        return [*kept, "--model", str(model), *([] if projector is None else ["--mmproj", str(projector)])]
    return kept if "--models-preset" in flags else [*kept, "--models-preset", str(preset(folder))]


def cluster_file(flags: dict[str, str], folder: Path) -> dict[str, Any]:
    slots = int(flags.get("--parallel", "4"))
    context = int(flags.get("--ctx-size", "4096")) // (1 if "--kv-unified" in flags else slots)
    defaults: dict[str, Any] = {field: kind(flags[flag]) for flag, (field, kind) in DEFAULTS.items() if flag in flags}
    if "--verbose" in flags:
        defaults["verbose"] = True
    if flags.get("--reasoning") in THINKING:
        defaults["chat_template_kwargs"] = {"enable_thinking": THINKING[flags["--reasoning"]]}
    config: dict[str, Any] = {
        "name": "suite",
        **served(flags),
        **addresses(flags.get("--host", "127.0.0.1"), flags.get("--port", "8080")),
        "workers": [{"name": "a", "threads": 2}],
        "context_length": context,
        "max_sequences": slots,
        "state_dir": str(folder),
        "api": {
            "defaults": defaults,
            **names(flags),
            "disabled": [name for name in ("metrics", "slots") if f"--{name}" not in flags],
        },
    }
    if "--slot-save-path" in flags:
        config["api"]["slot_folder"] = str(Path(flags["--slot-save-path"]).resolve())
    if "--api-key" in flags:
        keys = folder / "keys"
        keys.write_text(flags["--api-key"].replace(",", "\n") + "\n")
        keys.chmod(0o600)
        config["api_keys_file"] = str(keys)
    for flag in ("--chat-template", "--chat-template-file"):
        if flag in flags:
            config["chat_template"] = str(Path(flags[flag]).resolve()) if flag.endswith("file") else flags[flag]
    config["allowed_origins"] = flags.get("--cors-origins", "localhost" if "--tools" in flags else "*").split(",")
    return config


def served(flags: dict[str, str]) -> dict[str, Any]:
    model, idle_s = model_of(flags), int(flags.get("--sleep-idle-seconds", "-1"))
    if model is not None and idle_s > 0:  # Only an entry of `models` can sleep.
        return {"models": [{"model": str(model), "name": flags["--alias"], "keep_alive": f"{idle_s}s"}]}
    if model is None:
        models = [{"model": str(path), "name": name} for name, path in routed_models().items()]
        limit = {"max_loaded_models": min(len(models), int(flags["--models-max"]))} if "--models-max" in flags else {}
        return {"models": models, "load_on_demand": "--no-models-autoload" not in flags, **limit}
    adapters = {"adapters": [{"path": str(adapter()), "name": "adapter"}]} if "--lora" in flags else {}
    return {"model": str(model), **adapters, **({"mmproj": "off"} if "--no-mmproj" in flags else {})}


def addresses(hosts: str, port: str) -> dict[str, Any]:
    first, *others = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts.split(",")]
    return {"listen": first, "listen_also": others}


def names(flags: dict[str, str]) -> dict[str, Any]:
    """Returns the cluster file's keys that name and tag a single model. The first alias becomes the model's name."""
    if "models" in served(flags):
        return {}
    aliases = sorted(name for name in flags.get("--alias", "").split(",") if name)
    named = {"model_name": aliases[0], "aliases": aliases} if aliases else {}
    return {"strict_model": False, **named, "tags": [tag for tag in flags.get("--tags", "").split(",") if tag]}


def main() -> None:
    if "--help" in sys.argv:
        print(f"usage: {Path(__file__).name} [flags of llama-server]\n\n{__doc__}")
        return
    folder = Path(tempfile.mkdtemp(prefix="state-", dir=os.environ.get("LLAMACLUST_SUITE_FOLDER")))
    if server := os.environ.get("LLAMACLUST_SUITE_SERVER"):
        os.execv(server, [server, *own_models(sys.argv[1:], folder)])
    config = folder / "cluster.yaml"
    config.write_text(json.dumps(cluster_file(read_flags(sys.argv[1:]), folder)))
    os.execv(sys.executable, [sys.executable, "-m", "llamaclust", "up", str(config)])


if __name__ == "__main__":
    main()
