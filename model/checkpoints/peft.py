"""Reads adapters in PEFT's format: a folder with settings, and with the LoRA factors A and B of each module."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.json_file import read_json
from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.gguf.values import shown

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_FACTOR: Final = re.compile(r"(?P<module>.*)\.lora_(?P<kind>A|B|embedding_A|embedding_B)(\.default)?(\.weight)?")
_REFUSED: Final = (
    "use_dora",
    "use_qalora",
    "megatron_config",
    "alora_invocation_tokens",
    "lora_bias",
    "layer_replication",
    "target_parameters",
)
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Prefixes of `init_lora_weights` values with which PEFT changes the base model's matrices."""
_PLAIN: Final = re.compile(r"[\w.-]+")


def plain_name(name: str) -> str:
    return name.removeprefix(_PREFIX)


def factor_name(name: str) -> tuple[str, str] | None:
    """Returns the module and the kind (A, B, embedding_A, embedding_B) of a LoRA factor, or None for other tensors."""
    found = _FACTOR.fullmatch(name)
    return None if found is None else (found["module"], found["kind"])


@dataclass(frozen=True, slots=True)
class Scaling:
    rank: int
    alpha: float
    is_rank_stabilized: bool

    @property
    def factor(self) -> float:
        return self.alpha / (self.rank**0.5 if self.is_rank_stabilized else self.rank)

    @property
    def plain_alpha(self) -> float:
        return self.alpha * (self.rank**0.5 if self.is_rank_stabilized else 1.0)


@dataclass(frozen=True, slots=True)
class PeftSettings:
    settings: Settings

    @classmethod
    def read(cls, folder: Path) -> PeftSettings:
        """Reads `adapter_config.json`. Raises ModelFileError if it is damaged or does not describe plain LoRA."""
        settings = Settings(read_json(folder / CONFIG), str(folder / CONFIG))
        _check_kind(settings)
        return cls(settings)

    def scaling(self, module: str) -> Scaling:
        settings = self.settings
        rank = _pattern(settings, "rank_pattern", module, settings.count("r", maximum=1 << 16))
        alpha = _pattern(settings, "alpha_pattern", module, settings.real("lora_alpha", default=rank))
        if rank != int(rank):
            raise settings.error("rank_pattern", f"expected a whole number, found {rank:g}")
        return Scaling(int(rank), alpha, settings.flag("use_rslora"))


def _check_kind(settings: Settings) -> None:
    kind = settings.text("peft_type", default="LORA")
    if kind != "LORA":
        raise settings.error("peft_type", f"{kind!r} is not supported; expected LORA")
    for name in _REFUSED:
        if settings.values.get(name):
            raise settings.error(name, "this setting is not supported")
    if "lora_alpha" in settings.values and not settings.has("lora_alpha"):
        raise settings.error("lora_alpha", "expected a number, found null or NaN")
    begun = settings.values.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
        raise settings.error("init_lora_weights", f"{begun!r} changes the base model; save the adapter as plain LoRA")
    if settings.text("bias", default="none") != "none":
        raise settings.error("bias", f"{settings.values['bias']!r} is not supported; expected 'none'")


def _pattern(settings: Settings, name: str, module: str, default: float) -> float:
    inner = settings.inner(name)
    strange = next((key for key in inner.values if not _PLAIN.fullmatch(key)), None)
    if strange is not None:
        raise settings.error(name, f"{shown(strange)} is not supported; expected the end of a module name")
    key = next((key for key in inner.values if f".{module}".endswith(f".{key}")), None)
    return default if key is None else inner.real(key, minimum=1e-9, maximum=1 << 20)


def check_rank(scaling: Scaling, rank: int, origin: str) -> None:
    if rank != scaling.rank:
        raise ModelFileError(f"{origin}: expected rank {scaling.rank} as in {CONFIG}, found {rank}")
