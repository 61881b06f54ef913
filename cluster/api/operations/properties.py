"""What `GET /props` says of a model, in the fields of llama.cpp's server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamaclust.cluster.api.llamacpp.schema import LlamaCppBody
from llamaclust.cluster.api.openai.shapes import FINGERPRINT
from llamaclust.cluster.text.service import TextService


def properties(service: TextService, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults`: the cluster file's values of request fields for requests without them."""
    settings, tokenizer = service.settings, service.tokenizer
    params = LlamaCppBody.model_validate({"prompt": ""}).model_dump(exclude={"prompt"})
    return {
        "default_generation_settings": {
            "n_ctx": settings.context_length,
            "speculative": settings.max_drafted > 0,
            "is_processing": False,
            "params": {**params, **settings.recommended, **defaults},
        },
        "total_slots": settings.max_sequences,
        "model_path": settings.model_path or settings.model_name,
        "model_alias": settings.model_name,
        "chat_template": service.chat_template.source or "",
        **{f"chat_template_{name}": template.source for name, template in service.chat_template.named.items()},
        "bos_token": "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id),
        "eos_token": "" if tokenizer.eos_id is None else tokenizer.token_text(tokenizer.eos_id),
        "modalities": {"vision": False, "audio": False},
        "build_info": FINGERPRINT,
        "is_sleeping": False,
    }
