"""Reads the options of mixtures of experts from the file, and builds their steps."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.architectures.tensors import CheckedTensors
from llamaclust.model.hyperparameters import Hyperparameters
from llamaclust.model.model_keys import ModelKeys
from llamaclust.model.program import Buffer, Moe
from llamaclust.model.quant_types import QuantType
from llamaclust.model.steps.options import USUAL_EXPERTS, ActivationFunction, ExpertOptions, GatedActivation, Gating

_GATING_KEY = "expert_gating_func"
_GATINGS = {1: Gating.SOFTMAX, 2: Gating.SIGMOID, 3: Gating.SOFTMAX_OF_CHOSEN}
_BIAS_TYPES = (QuantType.F32, QuantType.F16, QuantType.BF16)  # Members of a group read parts of rows, not of blocks.


@dataclass(frozen=True, slots=True)
class ExpertsVariant:
    """Options of a mixture-of-experts layer. `shared_width` is the width of the shared expert, which every token uses
    (0 means none). If `shared_gate`, a sigmoid gate weights the shared expert's result."""

    options: ExpertOptions = USUAL_EXPERTS
    shared_width: int = 0
    shared_gate: bool = False


def read_experts(
    keys: ModelKeys,
    hp: Hyperparameters,
    *,
    gating: Gating,
    normalized: bool = True,
    activation: ActivationFunction | GatedActivation = GatedActivation.SILU_MUL,
    shared_width: int = 0,
) -> ExpertsVariant:
    """Reads the options of a model's mixture-of-experts layers. `gating` and `normalized` are defaults for missing
    keys. Raises ModelFileError if the gating function is unknown, or if expert and group counts are inconsistent."""
    number = keys.count(_GATING_KEY, 0, minimum=0, maximum=255)
    if number not in (0, *_GATINGS):
        known = ", ".join(f"{key} ({value})" for key, value in _GATINGS.items())
        raise keys.error(_GATING_KEY, f"gating function {number} is not supported; supported are {known}")
    groups = keys.count("expert_group_count", 1, minimum=0, maximum=1 << 10) or 1
    used_groups = keys.count("expert_group_used_count", 1, minimum=0, maximum=groups) or 1
    if hp.expert_count % groups or hp.expert_used_count > used_groups * (hp.expert_count // groups):
        what = f"{hp.expert_count} experts in {groups} groups, {hp.expert_used_count} chosen from {used_groups} groups"
        raise keys.error(
            "expert_group_count",
            f"{what}; expected groups of equal size, and {hp.expert_used_count} experts or more in the used groups",
        )
    options = ExpertOptions(
        gating=_GATINGS.get(number, gating),
        normalized=keys.flag("expert_weights_norm", normalized),
        scale=keys.real("expert_weights_scale", 0.0, minimum=-1e6, maximum=1e6) or 1.0,
        groups=groups,
        used_groups=used_groups,
        activation=activation,
    )
    return ExpertsVariant(options, shared_width)


def expert_step(
    tensors: CheckedTensors,
    prefix: str,
    hp: Hyperparameters,
    variant: ExpertsVariant,
    buffers: tuple[Buffer, Buffer],
    routed: Buffer | None = None,
) -> Moe:
    """Returns a mixture-of-experts step, which reads the first buffer and writes the second. If `routed` is given, the
    router reads `routed` instead of the first buffer."""
    (x, out), count, ffn = buffers, hp.expert_count, hp.expert_feed_forward_length
    old = f"{prefix}.ffn_gate.0.weight"
    if tensors.has(old):
        raise tensors.error(old, "one tensor per expert is a format from early 2024", "convert the model again")

    fused = tensors.has(f"{prefix}.ffn_gate_up_exps.weight")
    inner = (count, 2 * ffn if fused else ffn, x.width)
    has_gate = isinstance(variant.options.activation, GatedActivation) and not fused

    def bias(name: str, width: int) -> str | None:
        full = f"{prefix}.{name}.bias"
        return tensors.floats(full, (count, width), _BIAS_TYPES) if tensors.has(full) else None

    return Moe(
        x,
        out,
        router=tensors.weight(f"{prefix}.ffn_gate_inp.weight", (count, (routed or x).width)),
        gate=tensors.weight(f"{prefix}.ffn_gate_exps.weight", inner) if has_gate else None,
        up=tensors.weight(f"{prefix}.ffn_{'gate_up' if fused else 'up'}_exps.weight", inner),
        down=tensors.weight(f"{prefix}.ffn_down_exps.weight", (count, out.width, ffn)),
        experts=count,
        used=hp.expert_used_count,
        ffn_width=ffn,
        options=variant.options,
        router_bias=tensors.optional_vector(f"{prefix}.ffn_gate_inp.bias", count),
        selection_bias=tensors.optional_vector(f"{prefix}.exp_probs_b.bias", count),
        gate_bias=bias("ffn_gate_exps", ffn),
        up_bias=bias("ffn_up_exps", ffn),
        down_bias=bias("ffn_down_exps", out.width),
        expert_scales=tensors.optional_vector(f"{prefix}.ffn_down_exps.scale", count),
        routed=routed,
        fused=fused,
    )
