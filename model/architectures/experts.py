"""Mixtures of experts: what families do differently, and their step."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.architectures.tensors import CheckedTensors
from llamaclust.model.hyperparameters import Hyperparameters
from llamaclust.model.program import ActivationFunction, Buffer, Moe


@dataclass(frozen=True, slots=True)
class ExpertsVariant:
    """Options of a mixture of experts; as of `Moe`. `shared_width`: of an expert that every token uses; with
    `shared_gate` it is weighed by a sigmoid of its own. Experts have a gate unless `without_gate` is their activation.
    """

    normalized: bool = True
    shared_width: int = 0
    shared_gate: bool = False
    without_gate: ActivationFunction | None = None


def expert_step(
    tensors: CheckedTensors, prefix: str, hp: Hyperparameters, variant: ExpertsVariant, buffers: tuple[Buffer, Buffer]
) -> Moe:
    """The step of one layer from the first of `buffers` to the second."""
    (x, out), count, ffn = buffers, hp.expert_count, hp.expert_feed_forward_length
    old = f"{prefix}.ffn_gate.0.weight"
    if tensors.has(old):
        raise tensors.error(old, "one tensor for each expert, the form of early 2024", "convert the model again")
    inner = (count, ffn, x.width)
    return Moe(
        x,
        out,
        router=tensors.weight(f"{prefix}.ffn_gate_inp.weight", (count, x.width)),
        gate=None if variant.without_gate else tensors.weight(f"{prefix}.ffn_gate_exps.weight", inner),
        up=tensors.weight(f"{prefix}.ffn_up_exps.weight", inner),
        down=tensors.weight(f"{prefix}.ffn_down_exps.weight", (count, out.width, ffn)),
        experts=count,
        used=hp.expert_used_count,
        ffn_width=ffn,
        normalized=variant.normalized,
        activation=variant.without_gate or ActivationFunction.SILU,
    )
