"""Chooses the type of each tensor by the rules of llama-quantize."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llamaclust.core.errors import UsageError
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.quantize import mixes
from llamaclust.tools.quantize.mixes import FLOATS, LOWEST, NEEDS_IMPORTANCE, VALUES, Mix, Part, Place, Rule

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT = "output.weight"

_PARTS = (
    ("attn_qkv.weight", Part.QKV),
    ("attn_kv_b.weight", Part.KV_B),
    ("attn_v.weight", Part.V),
    ("attn_k.weight", Part.K),
    ("attn_q.weight", Part.Q),
    ("attn_output.weight", Part.ATTENTION_OUTPUT),
    ("ffn_up", Part.UP),
    ("ffn_gate", Part.GATE),
    ("ffn_down", Part.DOWN),
)

_KEPT_NAMES = ("position_embd.weight", "token_types.weight")
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d"
    r"|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight|attn_rel_b\.weight"
    r"|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_embd|\.patch_merger|a\.rvq\.codebook|mm\.a\.code_embd"
)
"""Names of matrices that keep their type, because they are small or are not multiplied with activations."""

_OTHER_RULES = frozenset({"glm5-next", "bailingmoe3"})
"""Architectures that are refused, because llama-quantize has special rules for them that this program lacks."""


@dataclass(frozen=True, slots=True)
class MixChoice:
    """The user's choice of a mix, and deviations from the mix. A type of None leaves the choice to the mix."""

    mix: Mix
    has_importance: bool = False
    pure: bool = False
    keep_output: bool = False
    output_type: QuantType | None = None
    embedding_type: QuantType | None = None
    by_pattern: tuple[tuple[re.Pattern[str], QuantType], ...] = ()


def choose_types(model: ModelFile, wishes: MixChoice) -> dict[str, QuantType]:
    """Maps each tensor to its type, in the file's order. Raises UsageError for architectures in `_OTHER_RULES`."""
    architecture = model.metadata_str("general.architecture")
    if architecture in _OTHER_RULES and not wishes.pure:
        raise UsageError(
            f"{model.path}: mixes for {architecture} are not supported: give --pure, and types with --tensor-type"
        )
    chooser = _Chooser(model, architecture, wishes)
    chosen = {tensor.name: chooser.choose(tensor) for tensor in in_layer_order(model)}
    return {name: chosen[name] for name in model.tensors}


def in_layer_order(model: ModelFile) -> Sequence[Tensor]:
    """Returns tensors outside the layers, then tensors of each layer by name. Rules count tensors in this order."""
    return sorted(model.tensors.values(), key=lambda tensor: (_layer(tensor.name), tensor.name.encode()))


def is_kept(name: str, shape: Sequence[int]) -> bool:
    inner = list(shape)
    while len(inner) > 1 and inner[0] == 1:
        inner.pop(0)
    return len(inner) < 2 or not name.endswith("weight") or name in _KEPT_NAMES or _KEPT.search(name) is not None


def needs_importance(name: str, quant_type: QuantType, mix: Mix) -> bool:
    if name in EMBEDDINGS or name == _OUTPUT:
        return False
    return quant_type in NEEDS_IMPORTANCE or (quant_type == QuantType.Q2_K and mix.name == "Q2_K_S")


class _Chooser:
    def __init__(self, model: ModelFile, architecture: str, wishes: MixChoice) -> None:
        self._wishes, self._mix = wishes, wishes.mix
        key = f"{architecture}."
        self._layers = model.metadata_int(f"{key}block_count", 0)
        self._experts = model.metadata_int(f"{key}expert_count", 0)
        heads = _first_int(model, f"{key}attention.head_count", 0)
        pairs = _first_int(model, f"{key}attention.head_count_kv", heads)
        self._query_share = heads // pairs if heads and pairs else 0
        self._is_falcon = architecture == "falcon"
        self._rules = mixes.FALCON_RULES if self._is_falcon else mixes.RULES
        self._is_70b = architecture == "llama" and self._layers == 80 and heads != pairs
        self._values = sum(_part(name) in VALUES for name in model.tensors)
        self._is_tied = _OUTPUT not in model.tensors
        self._seen: Counter[Part] = Counter()

    def choose(self, tensor: Tensor) -> QuantType:
        wishes, part = self._wishes, _part(tensor.name)
        if is_kept(tensor.name, tensor.shape) or (wishes.keep_output and tensor.name == _OUTPUT):
            return tensor.quant_type
        named = next((kind for pattern, kind in wishes.by_pattern if pattern.search(tensor.name)), None)
        # For the table of per-layer embeddings, a pattern takes precedence over the type of embeddings.
        is_named = named is not None and tensor.name == EMBEDDINGS[1]
        if wishes.embedding_type is not None and part is Part.EMBEDDING and not is_named:
            return wishes.embedding_type
        if wishes.output_type is not None and part is Part.OUTPUT:
            return wishes.output_type
        if named is None:
            plain = wishes.pure or self._mix.base in FLOATS
            named = self._mix.base if plain else self._of_mix(tensor, part)
        return _that_fits(named, tensor.shape[-1])

    def _of_mix(self, tensor: Tensor, part: Part) -> QuantType:
        mix, base = self._mix.name, self._mix.base
        if part is Part.OUTPUT or (part is Part.EMBEDDING and self._is_tied):
            return self._of_output(tensor.shape[-1])
        if mix == "MXFP4_MOE":
            return base if len(tensor.shape) == 3 and tensor.shape[0] > 1 else QuantType.Q8_0
        if part is Part.EMBEDDING:
            return _first(mixes.EMBEDDING_RULES, mix, self._place(tensor, part), base)
        lowest = mix in LOWEST.split()
        place = self._place(tensor, part, by_name=not lowest)
        chosen = _first((mixes.LOWEST_RULES if lowest else self._rules).get(part, ()), mix, place, base)
        self._seen[Part.V if part in VALUES else part] += 1
        if self._is_70b and part in VALUES and not lowest and chosen in (QuantType.Q3_K, QuantType.Q4_K):
            return QuantType.Q5_K
        return chosen

    def _of_output(self, width: int) -> QuantType:
        if self._wishes.output_type is not None:
            return self._wishes.output_type
        mix, base = self._mix.name, self._mix.base
        is_wide = mix == "MXFP4_MOE" or base == QuantType.Q8_0 or self._is_falcon
        if is_wide or width % base.info.block_size:
            return QuantType.Q8_0
        return QuantType.Q5_K if mix in LOWEST.split() or mix == "IQ3_XXS" else QuantType.Q6_K

    def _place(self, tensor: Tensor, part: Part, by_name: bool = True) -> Place:
        if part in VALUES:
            index, count = self._seen[Part.V], self._values
        else:
            index, count = self._seen[part], self._layers
            if by_name and self._experts > 1 and part in (Part.DOWN, Part.GATE, Part.UP):
                index = _layer(tensor.name)
        return Place(index, count, self._experts, self._query_share, self._wishes.has_importance)


def _first(rules: Sequence[Rule], mix: str, place: Place, otherwise: QuantType) -> QuantType:
    return next((rule.quant_type for rule in rules if rule.applies(mix, place)), otherwise)


def _that_fits(quant_type: QuantType, width: int) -> QuantType:
    kinds = (quant_type, mixes.NARROW_TYPES.get(quant_type, quant_type))
    return next((kind for kind in kinds if width % kind.info.block_size == 0), QuantType.F16)


def _part(name: str) -> Part:
    if name == _OUTPUT:
        return Part.OUTPUT
    if name in EMBEDDINGS:
        return Part.EMBEDDING
    return next((part for text, part in _PARTS if text in name), Part.OTHER)


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _first_int(model: ModelFile, key: str, default: int) -> int:
    value = model.metadata.get(key)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value):
        return int(value[0])
    return model.metadata_int(key, default)
