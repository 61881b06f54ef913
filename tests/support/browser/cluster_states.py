"""Replies of `GET /cluster` for a made-up cluster, and an app that sends them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.text_settings import TextSettings
from support.clusters.fakes import FakePipeline
from support.clusters.served import CONTEXT, MODEL, SETTINGS, ScriptedEngine, chat_template, says, tokenizer
from support.several_models.api_models import api_model

LAYERS = 6
_MIB = 1 << 20


def cluster_of(*names: str) -> dict[str, Any]:
    """Builds the reply of a ready cluster whose busy workers hold six layers each."""
    return {
        "status": {
            "name": "test",
            "pid": 1,
            "state": "ready",
            "reason": None,
            "model": MODEL,
            "insecure": False,
            "workers": [worker(name, index) for index, name in enumerate(names)],
            "absent": [],
            "requests": {"running": 2, "waiting": 1},
            "epoch": "1",
            "retiring_epoch": None,
            "recoveries": 0,
            "recovery_seconds": [],
            "speed": {
                "predicted": {
                    "token_ms": 8.0,
                    "ttft_ms": 300.0,
                    "prompt_tokens": 512,
                    "tokens_per_s": 400.0,
                    "bottleneck": names[0],
                },
                "measured": {
                    "token_ms": 9.1,
                    "ttft_ms": 280.0,
                    "prompt_tokens": 40,
                    "tokens_per_s": 310.0,
                    "requests": 8,
                },
            },
        },
        "plan": {
            "stages": [_stage(name, index) for index, name in enumerate(names)],
            "kv_blocks": 512,
            "idle_workers": [],
        },
        "stages": [],
        "sequences": [_sequence("aaaa", "decode"), _sequence("bbbb", "prefill")],
        "links": [
            {"from": sender, "to": receiver, "round_trip_ms": 0.4, "bytes_per_s": 1.1e9}
            for sender, receiver in zip(["", *names], [*names, ""], strict=True)
        ],
    }


def worker(name: str, index: int) -> dict[str, Any]:
    return {
        "name": name,
        "pid": 100 + index,
        "address": "127.0.0.1:1",
        "link_address": "127.0.0.1:1001",
        "device": "cpu",
        "layers": [index * LAYERS, (index + 1) * LAYERS],
        "state": "ready",
        "memory_bytes": 300 * _MIB,
        "busy": 0.6,
        "tokens_per_s": 155.0,
        "decode_ms": 4.2,
        "predicted_decode_ms": 4.0,
        "prefill_ms": 0.3,
        "predicted_prefill_ms": 0.28,
        "heartbeat": {"sent_bytes": 1 << 20, "free_memory_bytes": 1 << 30, "last_error": ""},
        "drained": False,
    }


def lose(cluster: dict[str, Any], name: str) -> None:
    """Changes the reply as the end of the worker's process does."""
    cluster["status"]["state"] = "recovering"
    _named(cluster, name).update(state="lost", layers=None, memory_bytes=0)


def bring_back(cluster: dict[str, Any], name: str) -> None:
    index = [worker["name"] for worker in cluster["status"]["workers"]].index(name)
    _named(cluster, name).update(worker(name, index), pid=999)
    cluster["status"].update(state="ready", recoveries=1, recovery_seconds=[0.84])


def group(cluster: dict[str, Any], shares: dict[str, int]) -> None:
    """Makes neighbouring workers hold the layers of the first of them together."""
    stages, workers = cluster["plan"]["stages"], cluster["status"]["workers"]
    whole = sum(shares.values())
    own = [(stage, worker) for stage, worker in zip(stages, workers, strict=True) if worker["name"] in shares]
    start, end = own[0][0]["start"], own[0][0]["end"]
    for member, (stage, worker) in enumerate(own):
        stage |= {"start": start, "end": end, "shares": [*shares.values()], "member": member}
        worker |= {"layers": [start, end], "share": shares[worker["name"]] / whole}
    members = [{"worker": name, "share": share, "waited_for_s": 1.0} for name, share in shares.items()]
    figures = {"gathers_ms": 1.5, "predicted_gathers_ms": 1.2, "waits_most_for": [*shares][-1]}
    cluster["status"]["groups"] = [{"layers": [start, end], "members": members, **figures}]
    leaders = [stage["worker"] for stage in stages if stage.get("member", 0) == 0]
    cluster["links"] = [
        {"from": sender, "to": receiver, "round_trip_ms": 0.4, "bytes_per_s": 1.1e9}
        for sender, receiver in zip(["", *leaders], [*leaders, ""], strict=True)
    ]


def cluster_app(
    status: Callable[[], dict[str, Any]],
    workers: Any = None,
    model_name: str = MODEL,
    engine: ScriptedEngine | Engine | None = None,
) -> Starlette:
    """Returns an app that replies with `status` for its cluster."""
    settings = TextSettings(model_name, CONTEXT, SETTINGS.max_sequences)
    spoken: Any = engine or ScriptedEngine(says("a"))
    service = TextService(spoken, tokenizer(), chat_template(), settings)
    idle = engine if isinstance(engine, Engine) else Engine(FakePipeline(SETTINGS.kv_blocks), SETTINGS)
    return create_app([api_model(service, idle, status=status)], workers=workers)


def _named(cluster: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(worker for worker in cluster["status"]["workers"] if worker["name"] == name)
    return found


def _sequence(name: str, phase: str) -> dict[str, Any]:
    tokens = {
        "prompt_tokens": 100,
        "cached_tokens": 0,
        "computed_tokens": 50,
        "generated_tokens": 3,
        "max_new_tokens": 9,
    }
    return {"id": name, "phase": phase, **tokens, "age_s": 1.5}


def _stage(name: str, index: int) -> dict[str, Any]:
    sizes = {
        "weight_bytes": 200 * _MIB,
        "kv_bytes": 80 * _MIB,
        "workspace_bytes": 20 * _MIB,
        "memory_bytes": 1024 * _MIB,
    }
    layers = {"start": index * LAYERS, "end": (index + 1) * LAYERS}
    return {"worker": name, **layers, **sizes, "decode_ms": 4.0, "prefill_ms": 0.28, "devices": []}
