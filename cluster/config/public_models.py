"""Lists well-known public models, which have GGUF files on the Hugging Face hub. The table is `public_models.csv`."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Final

from llamaclust.core.errors import UsageError

_TABLE = Path(__file__).with_name("public_models.csv")
_BITS_PER_WEIGHT: Final = {
    "iq4_xs": 4.35,
    "mxfp4": 4.5,
    "q3_k_m": 3.95,
    "q4_k_m": 4.9,
    "q5_k_m": 5.7,
    "q6_k": 6.6,
    "q8_0": 8.5,
}
"""Average bits per weight by quantization. A file named after a quant type usually also has tensors of other types."""
_ACCEPTED_AT: Final = {
    "EXAONE AI Model License 1.2 - NC": "https://huggingface.co/LGAI-EXAONE/EXAONE-4.0-32B",
    "Gemma Terms of Use": "https://ai.google.dev/gemma/terms",
    "LFM Open License 1.0": "https://huggingface.co/LiquidAI/LFM2-1.2B",
    "Llama 3.1 Community License": "https://www.llama.com/llama3_1/license/",
    "Llama 3.2 Community License": "https://www.llama.com/llama3_2/license/",
    "Llama 3.3 Community License": "https://www.llama.com/llama3_3/license/",
    "Llama 4 Community License": "https://www.llama.com/llama4/license/",
    "Tencent Hunyuan Community License": "https://huggingface.co/tencent/Hunyuan-0.5B-Instruct",
}
"""Web addresses of licences that users must accept. Open-source licences need no acceptance and are not listed."""


@dataclass(frozen=True, slots=True)
class PublicModel:
    """A catalog model. `file` is OWNER/REPOSITORY/FILE, where {Q} and {q} stand for the quantization in upper and
    lower case. The first quantization is the default. `billions` is the number of parameters divided by 10^9. `mmproj`
    is the file name of the projector, or ""."""

    name: str
    file: str
    billions: float
    quantizations: tuple[str, ...]
    licence: str
    summary: str
    mmproj: str = ""

    def quantization(self, wanted: str) -> str:
        name = wanted.lower() or self.quantizations[0]
        if name not in self.quantizations:
            known = ", ".join(self.quantizations)
            raise UsageError(f"{self.name}:{wanted}: no such quantization; the catalog has {known}")
        return name

    def source(self, quantization: str) -> str:
        return f"hf:{self.file.format(Q=quantization.upper(), q=quantization)}"

    @property
    def projector_source(self) -> str | None:
        repository = "/".join(self.file.split("/")[:2])
        return f"hf:{repository}/{self.mmproj}" if self.mmproj else None

    def about_bytes(self, quantization: str) -> int:
        return round(self.billions * 1e9 * _BITS_PER_WEIGHT[quantization] / 8)


@lru_cache(maxsize=1)
def public_models() -> Mapping[str, PublicModel]:
    with _TABLE.open(encoding="utf-8", newline="") as file:
        return MappingProxyType({row["name"]: _model(row) for row in csv.DictReader(file)})


def _model(row: dict[str, str]) -> PublicModel:
    return PublicModel(
        name=row["name"],
        file=row["file"],
        billions=float(row["billions"]),
        quantizations=tuple(row["quantizations"].split()),
        licence=row["licence"],
        summary=row["summary"],
        mmproj=row["mmproj"] or "",
    )


def terms_of(licence: str) -> str | None:
    return _ACCEPTED_AT.get(licence)
