"""Stands in for llama.cpp's `llama-server`: its command line becomes a cluster file, and `llamaclust up` runs that.

LLAMACLUST_SUITE_MODEL is the model of all tests, in place of the one that they name. Flags without a counterpart are
left out. LLAMACLUST_SUITE_SERVER is a `llama-server` to run in place of a cluster, with that model.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES = {
    "--port", "--host", "--temp", "--seed", "--hf-repo", "--hf-file", "--model", "--model-url", "--model-draft",
    "--batch-size", "--ubatch-size", "--threads", "--n-gpu-layers", "--pooling", "--alias", "--tags", "--ctx-size",
    "--parallel", "-ctk", "-ctv", "-fa", "--n-predict", "--slot-save-path", "--grp-attn-n", "--grp-attn-w", "--lora",
    "--spec-type", "--api-key", "--spec-draft-n-max", "--spec-draft-n-min", "--reasoning-format", "--reasoning",
    "--chat-template", "--chat-template-file", "--mmproj-url", "--media-path", "--sleep-idle-seconds", "--cache-ram",
    "--tools", "--cors-origins",
}  # fmt: skip
"""Flags that have a value."""

MODEL_FLAGS = {"--hf-repo", "--hf-file", "--model", "--model-url"}

DEFAULTS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--temp": ("temperature", float),
    "--seed": ("seed", int),
    "--n-predict": ("n_predict", int),
    "--pooling": ("pooling", str),
}
"""Flags that are defaults of request fields."""

THINKING = {"on": True, "off": False}


def read_flags(arguments: list[str]) -> dict[str, str]:
    """Flags with their values; "" for those without one."""
    rest, flags = iter(arguments), {}
    for flag in rest:
        flags[flag] = next(rest) if flag in VALUES else ""
    return flags


def own_model(arguments: list[str]) -> list[str]:
    """The arguments with the model of all tests in place of the one that they name."""
    kept: list[str] = []
    rest = iter(arguments)
    for flag in rest:
        if flag in MODEL_FLAGS:
            next(rest)
        else:
            kept.append(flag)
    return [*kept, "--model", os.environ["LLAMACLUST_SUITE_MODEL"]]


def cluster_file(flags: dict[str, str], folder: Path) -> dict[str, Any]:
    """The cluster that the flags describe. llama-server shares its context out among its slots."""
    slots = int(flags.get("--parallel", "4"))
    context = int(flags.get("--ctx-size", "4096")) // (1 if "--kv-unified" in flags else slots)
    defaults: dict[str, Any] = {field: kind(flags[flag]) for flag, (field, kind) in DEFAULTS.items() if flag in flags}
    if "--verbose" in flags:
        defaults["verbose"] = True
    if flags.get("--reasoning") in THINKING:
        defaults["chat_template_kwargs"] = {"enable_thinking": THINKING[flags["--reasoning"]]}
    config: dict[str, Any] = {
        "name": "suite",
        "model": os.environ["LLAMACLUST_SUITE_MODEL"],
        "listen": f"{flags.get('--host', '127.0.0.1').partition(',')[0]}:{flags.get('--port', '8080')}",
        "workers": [{"name": "a", "threads": 2}],
        "context_length": context,
        "max_sequences": slots,
        "state_dir": str(folder),
        "api": {
            "strict_model": False,
            "defaults": defaults,
            **names(flags),
            "disabled": [name for name in ("metrics", "slots") if f"--{name}" not in flags],
        },
    }
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


def names(flags: dict[str, str]) -> dict[str, Any]:
    """The first name in alphabetical order is the model's."""
    aliases = sorted(name for name in flags.get("--alias", "").split(",") if name)
    named = {"model_name": aliases[0], "aliases": aliases} if aliases else {}
    return {**named, "tags": [tag for tag in flags.get("--tags", "").split(",") if tag]}


def main() -> None:
    if "--help" in sys.argv:
        print(f"usage: {Path(__file__).name} [flags of llama-server]\n\n{__doc__}")
        return
    if server := os.environ.get("LLAMACLUST_SUITE_SERVER"):
        os.execv(server, [server, *own_model(sys.argv[1:])])
    folder = Path(tempfile.mkdtemp(prefix="state-", dir=os.environ.get("LLAMACLUST_SUITE_FOLDER")))
    config = folder / "cluster.yaml"
    config.write_text(json.dumps(cluster_file(read_flags(sys.argv[1:]), folder)))
    os.execv(sys.executable, [sys.executable, "-m", "llamaclust", "up", str(config)])


if __name__ == "__main__":
    main()
