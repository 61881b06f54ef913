"""OpenAPI documents from which schemathesis makes requests, and small models with random weights that answer them. The
suites judge the form of thousands of replies, not their words."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "tests"))

_REPLIES = ("not_a_server_error", "content_type_conformance", "response_schema_conformance")
_SEED = 1
_REQUEST_S = 120
_FILL_IN = ("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id")
_RARE_TOKEN = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """An OpenAPI document and the checks of replies. Two things are not checked. A request that the document forbids
    need not be refused: unknown fields and nulls are accepted, and a header names them. A request that the document
    allows need not be accepted: no schema says, for example, that the context is full."""

    place: str  # a path in a checkout; or of the server, beginning with /
    checks: tuple[str, ...] = ()  # beside errors of the server, and the type and schema of replies
    filters: tuple[str, ...] = ()  # options that choose operations
    stand_in: str = "generating"

    def words(self, api: str, checkout: Path | None, examples: int) -> Iterator[str]:
        """Yields the arguments of schemathesis, except those for its report."""
        yield "run"
        yield f"{api}{self.place}" if checkout is None else str(checkout / self.place)
        yield from (f"--url={api}", f"--seed={_SEED}", f"--max-examples={examples}", f"--request-timeout={_REQUEST_S}")
        yield from ("--continue-on-failure", "--warnings=off", f"--checks={','.join(_REPLIES + self.checks)}")
        yield from self.filters


def build_stand_in(name: str, folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """Writes a model to the folder. Returns its path and the keys of the cluster file that enable all endpoints."""
    return {"generating": _generating, "ranking": _ranking}[name](folder)


def _generating(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """Writes a decoder that can fill text in, and an adapter."""
    from support.models.tiny_adapter import build_adapter
    from support.models.tiny_model import build_tiny_model

    tokens = {f"tokenizer.ggml.{key}": _RARE_TOKEN + i for i, key in enumerate(_FILL_IN)}
    model = build_tiny_model(folder / "generating.gguf", hidden=64, heads=4, layers=2, ffn=128, extra=tokens)
    adapter = build_adapter(folder / "adapter.gguf", model)
    (folder / "slots").mkdir()
    answers = {"max_tokens": 4, "temperature": 0}
    api = {"strict_model": False, "slot_folder": str(folder / "slots"), "defaults": answers}
    return model, {"context_length": 512, "api": api, "adapters": [{"name": "adapter", "path": str(adapter)}]}


def _ranking(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """Writes an encoder with a classifier."""
    from support.models.tiny_encoders import RANK, build_encoder

    model = folder / "ranking.gguf"
    build_encoder(model, "jina-bert-v2", pooling=RANK)
    return model, {}
