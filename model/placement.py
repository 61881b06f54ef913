"""Rules that put whole layers, or all experts of a layer, in RAM or on a GPU, like llama.cpp's `-ot PATTERN=DEVICE`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, Self

from pydantic_core import SchemaError, SchemaValidator, core_schema

from llamaclust.core.errors import UsageError
from llamaclust.core.gpus import ANY_GPU, RAM, Placement
from llamaclust.model.program import Moe, weights_of

if TYPE_CHECKING:
    from llamaclust.model.loader import Model

MAX_RULES = 64
MAX_PATTERN = 256
_RULE = re.compile(r"([^=]*)=([^=,]*)(?:,|$)")
_DEVICES = re.compile(r"(?P<ram>cpu|ram)|(?P<gpu>gpu|cuda)|cuda:?(?P<number>[0-9]{1,3})", re.IGNORECASE)
_POSSIBLE = r"only whole layers ('blk\.3\.') or all experts of a layer ('ffn_.*_exps') can be put in RAM"


@dataclass(frozen=True, slots=True)
class PlacementRule:
    """A rule that puts tensors on `device` if `pattern` matches a part of their name. Devices are "ram", "gpu" (any)
    and "cuda:N"."""

    pattern: str
    device: str

    def __str__(self) -> str:
        return f"'{self.pattern}={self.device}'"

    @classmethod
    def of(cls, pattern: str, device: str) -> Self:
        found = _DEVICES.fullmatch(device)
        if found is None:
            raise ValueError(
                f"{device[:60]!r} is not a device; write CPU or ram, gpu, or CUDA0 for one of several GPUs"
            )
        if not 0 < len(pattern) <= MAX_PATTERN:
            raise ValueError(f"the pattern has {len(pattern)} characters; expected 1 to {MAX_PATTERN}")
        if not pattern.isprintable():
            raise ValueError(f"{pattern[:60]!r} has characters that cannot be printed, but tensor names have none")
        _matcher(pattern)
        return cls(pattern, found.lastgroup if found["number"] is None else f"cuda:{int(found['number'])}")  # type: ignore[arg-type]


def read_rules(text: str) -> Iterator[PlacementRule]:
    """Parses rules in llama.cpp's form, such as `exps=CPU,attn=CUDA0`. Raises ValueError for any other text."""
    at = 0
    while at < len(text):
        found = _RULE.match(text, at)
        if found is None:
            raise ValueError(f"{text[at:][:60]!r} is not a rule; write PATTERN=DEVICE, such as 'exps=CPU'")
        yield PlacementRule.of(found[1], found[2])
        at = found.end()


@lru_cache(256)
def _matcher(pattern: str) -> SchemaValidator:
    """Returns a matcher with linear time and limited memory. Raises ValueError if the pattern is invalid."""
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
    except SchemaError as error:
        why = str(error).splitlines()[-1].removeprefix("error: ").removeprefix("  SchemaError: ")
        raise ValueError(f"{pattern[:60]!r} is not a regular expression: {why.strip()}") from error


@dataclass(frozen=True, slots=True)
class RuleEffect:
    rule: PlacementRule
    tensors: int
    n_bytes: int


def rule_effects(model: Model, rules: Sequence[PlacementRule]) -> tuple[RuleEffect, ...]:
    if not rules:
        return ()
    found: dict[int, list[str]] = {index: [] for index in range(len(rules))}
    for name, index in _decided(model, rules).items():
        found[index].append(name)
    tensors = model.file.tensors
    return tuple(
        RuleEffect(rules[index], len(names), sum(tensors[name].resident_bytes for name in names))
        for index, names in found.items()
    )


def placement_of(model: Model, rules: Sequence[PlacementRule], cpu_moe: int | None) -> Placement:
    """Returns the device of each layer. Each tensor follows the first rule that matches it. `cpu_moe` applies to
    experts that no rule matches. Raises UsageError if a rule matches no tensor or cannot be obeyed."""
    if not rules:
        return Placement(cpu_moe=cpu_moe)
    decided = {name: rules[index] for name, index in _decided(model, rules).items()}
    layers = [layer.place(decided) for layer in _layers(model)]
    return Placement(tuple(device for device, _ in layers), tuple(in_ram for _, in_ram in layers), cpu_moe)


def _decided(model: Model, rules: Sequence[PlacementRule]) -> dict[str, int]:
    decided: dict[str, int] = {}
    names = model.program(0, model.layer_count).weights
    for index, rule in enumerate(rules):
        matches = _matcher(rule.pattern).isinstance_python
        matched = [name for name in names if matches(name)]
        if not matched:
            kinds = {re.sub(r"\.[0-9]+\.", ".N.", name): name for name in reversed(names)}
            near = get_close_matches(rule.pattern.replace("\\", ""), kinds.values(), 3, 0.0)
            what = f"placement: {rule} matches none of the {len(names)} tensors of the model"
            raise UsageError(f"{what}; change the pattern; names are like {', '.join(near)}")
        for name in matched:
            decided.setdefault(name, index)
    return decided


@dataclass(frozen=True, slots=True)
class _Part:
    what: str
    deciding: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # Small tensors, which follow the `deciding` tensors.

    def place(self, decided: Mapping[str, PlacementRule]) -> tuple[str, PlacementRule] | None:
        """Returns a tensor's name, and the rule that matches this tensor and places the whole part. Returns None if no
        rule matches. Raises UsageError if rules would divide the part between devices."""
        ruled = [(name, decided[name]) for name in (*self.deciding, *self.others) if name in decided]
        if not ruled:
            return None
        chosen = next((pair for pair in ruled if pair[1].device != ANY_GPU), ruled[0])
        for pair in ruled:
            if not _agree(chosen[1], pair[1]):
                raise _conflict(chosen, pair, self.what)
        left = next((name for name in self.deciding if name not in decided), None)
        if chosen[1].device == RAM and left is not None:
            what = f"placement: {chosen[1]} puts {chosen[0]} in RAM, but not {left}"
            raise UsageError(f"{what} of {self.what}: {_POSSIBLE}")
        return chosen


@dataclass(frozen=True, slots=True)
class _Layer:
    rest: _Part
    experts: _Part
    vectors: set[str] = field(default_factory=set)  # Norms and biases outside the experts.

    def place(self, decided: Mapping[str, PlacementRule]) -> tuple[str | None, bool | None]:
        """Returns the layer's device, and True if its experts are in RAM. Either is None if no rule decides it."""
        broad = {rule for name in self.rest.deciding if (rule := decided.get(name)) is not None}
        # Small tensors of the experts that a rule for the rest of the layer matches by accident.
        follow = {name for name in self.experts.others if decided.get(name) in broad}
        own = {name: rule for name, rule in decided.items() if name not in follow | self._following_vectors(decided)}
        rest, experts = self.rest.place(own), self.experts.place(own)
        if experts is None or experts[1].device == RAM:
            return None if rest is None else rest[1].device, None if experts is None else True
        if rest is None or rest[1].device == ANY_GPU:
            return experts[1].device, False
        if not _agree(rest[1], experts[1]):
            raise _conflict(rest, experts, self.rest.what)
        return rest[1].device, False

    def _following_vectors(self, decided: Mapping[str, PlacementRule]) -> set[str]:
        """Returns the norms and biases that a rule for experts matches by accident, as 'ffn_.*' matches ffn_norm."""
        of_rest = {decided[name] for name in self.rest.deciding if name in decided and name not in self.vectors}
        if any(rule.device == RAM for rule in of_rest):
            return set()
        of_experts = {decided[name] for name in self.experts.deciding if name in decided}
        return {name for name in self.vectors if decided.get(name) in of_experts - of_rest}


def _agree(rule: PlacementRule, other: PlacementRule) -> bool:
    devices = {rule.device, other.device}
    return len(devices) == 1 or (ANY_GPU in devices and RAM not in devices)


def _conflict(pair: tuple[str, PlacementRule], other: tuple[str, PlacementRule], what: str) -> UsageError:
    both = " and ".join(f"{rule} is for {name}" for name, rule in (pair, other))
    return UsageError(f"placement: {both}, but all tensors of {what} must be on one device: {_POSSIBLE}")


def _layers(model: Model) -> list[_Layer]:
    program = model.program(0, model.layer_count)
    found = [
        _Layer(_Part(f"layer {layer}"), _Part(f"the experts of layer {layer}")) for layer in range(model.layer_count)
    ]
    of_experts = set[str]()
    for step in program.steps:
        if isinstance(step, Moe):
            names, deciding = weights_of([step]), (*step.inner, step.down)
            part = found[step.layer].experts
            part.deciding.extend(deciding)
            part.others.extend(name for name in names if name not in deciding)
            of_experts |= set(names)
    for name in program.weights:
        parts = name.split(".")
        if parts[0] != "blk":
            found[-1 if parts[0].startswith("output") else 0].rest.others.append(name)
        elif name not in of_experts:
            found[int(parts[1])].rest.deciding.append(name)
            if len(model.file.tensors[name].shape) == 1:
                found[int(parts[1])].vectors.add(name)
    return found
