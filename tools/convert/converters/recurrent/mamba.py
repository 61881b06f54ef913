"""The Mamba 2 block of falcon-h1, granitehybrid and nemotron_h."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

from llamaclust.model.architectures.recurrent.mamba import MambaShape
from llamaclust.model.steps.states import MAX_TAPS
from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.lazy import Lazy, decay, in_groups, joined

_MAX_HEADS, _MAX_STATE_SIZE = 1 << 14, 1 << 12
_NAMES = MappingProxyType(
    {"ssm.inner_size": "mamba_d_head", "ssm.state_size": "mamba_d_state", "ssm.group_count": "mamba_n_groups"}
)
_ALL_STEPS = ([0, math.inf], [0, {"__float__": "Infinity"}])
"""Values of `time_step_limit` that mean no limit. The second value is how transformers writes infinity in JSON."""


@dataclass(frozen=True, slots=True)
class Mamba:
    """Sizes of a Mamba 2 block. Each group of heads has one B and one C, with `state_size` numbers per token."""

    heads: int
    head_width: int
    groups: int
    state_size: int
    taps: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_width

    @property
    def matrices(self) -> int:
        return self.groups * self.state_size

    @property
    def convolved(self) -> int:
        return self.inner + 2 * self.matrices

    @property
    def products(self) -> int:
        return self.inner + self.convolved + self.heads


def read_mamba(model: ConvertedModel, inner: int | None) -> Mamba:
    """Reads the sizes of a Mamba 2 block. `inner` is the total width of all heads, or None if it is not known."""
    settings = model.settings
    heads = settings.count("mamba_n_heads", "mamba_num_heads", maximum=_MAX_HEADS)
    width = None if inner is None else max(1, inner // heads)
    if settings.values.get("mamba_d_head") != "auto":
        width = settings.count("mamba_d_head", "mamba_head_dim", default=width)
    if width is None or (inner is not None and heads * width != inner):
        raise settings.error(
            "mamba_d_head", f"{heads} heads of {width} channels do not add up to the block's {inner} channels"
        )
    groups = settings.count("mamba_n_groups", "n_groups", default=1, maximum=heads)
    state_size = settings.count("mamba_d_state", "ssm_state_size", maximum=_MAX_STATE_SIZE)
    taps = settings.count("mamba_d_conv", "conv_kernel", default=4, minimum=2, maximum=MAX_TAPS)
    fault = MambaShape(taps, heads * width, state_size, heads, groups).fault
    if fault is not None:
        raise settings.error(_NAMES[fault[0]], fault[1])
    return Mamba(heads, width, groups, state_size, taps)


def mamba_keys(model: ConvertedModel, mamba: Mamba) -> None:
    _check_time_steps(model)
    model.key("ssm.conv_kernel", mamba.taps)
    model.key("ssm.state_size", mamba.state_size)
    model.key("ssm.group_count", mamba.groups)
    model.key("ssm.inner_size", mamba.inner)
    model.key("ssm.time_step_rank", mamba.heads)


def write_mamba(model: ConvertedModel, place: str, source: str, mamba: Mamba, *, has_norm: bool = True) -> None:
    """Copies all tensors of a block. The checkpoint's `A_log` is converted to the decays: A = -exp(A_log)."""
    model.copy(f"{place}.ssm_in", f"{source}.in_proj", mamba.products, model.width)
    model.put(
        f"{place}.ssm_conv1d.weight", joined(model.take(f"{source}.conv1d.weight", mamba.convolved, 1, mamba.taps))
    )
    if model.has(f"{source}.conv1d.bias"):
        model.put(f"{place}.ssm_conv1d.bias", model.take(f"{source}.conv1d.bias", mamba.convolved))
    model.put(f"{place}.ssm_dt.bias", model.take(f"{source}.dt_bias", mamba.heads))
    model.put(f"{place}.ssm_a", decay(_column(model, f"{source}.A_log", mamba)))
    model.put(f"{place}.ssm_d", _column(model, f"{source}.D", mamba))
    if has_norm:
        norm = model.take(f"{source}.norm.weight", mamba.inner)
        model.put(f"{place}.ssm_norm.weight", in_groups(norm, mamba.inner // mamba.groups))
    model.copy(f"{place}.ssm_out", f"{source}.out_proj", model.width, mamba.inner)


def _column(model: ConvertedModel, name: str, mamba: Mamba) -> Lazy:
    return in_groups(model.take(name, mamba.heads), 1)


def _check_time_steps(model: ConvertedModel) -> None:
    for name in ("time_step_limit", "mamba_dt_limit"):
        stated = model.settings.values.get(name)
        if stated is not None and stated not in _ALL_STEPS:
            raise model.settings.error(name, f"{model.settings.shown(name)} is not supported; expected 0 to infinity")
