"""Quantization mixes by name, such as Q4_K_M. The rules equal llama-quantize's, so that files have the same sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from llamaclust.model.quant_types import QuantType as Q


@dataclass(frozen=True, slots=True)
class Mix:
    """A quantization mix. `file_type` is its number in GGUF files. `base` is the type of tensors without a rule."""

    name: str
    file_type: int
    base: Q


MIXES: dict[str, Mix] = {
    name: Mix(name, number, base)
    for name, number, base in (
        ("F32", 0, Q.F32),
        ("F16", 1, Q.F16),
        ("BF16", 32, Q.BF16),
        ("Q8_0", 7, Q.Q8_0),
        ("Q4_0", 2, Q.Q4_0),
        ("Q4_1", 3, Q.Q4_1),
        ("Q5_0", 8, Q.Q5_0),
        ("Q5_1", 9, Q.Q5_1),
        ("Q2_K", 10, Q.Q2_K),
        ("Q2_K_S", 21, Q.Q2_K),
        ("Q3_K_S", 11, Q.Q3_K),
        ("Q3_K_M", 12, Q.Q3_K),
        ("Q3_K_L", 13, Q.Q3_K),
        ("Q4_K_S", 14, Q.Q4_K),
        ("Q4_K_M", 15, Q.Q4_K),
        ("Q5_K_S", 16, Q.Q5_K),
        ("Q5_K_M", 17, Q.Q5_K),
        ("Q6_K", 18, Q.Q6_K),
        ("IQ1_S", 24, Q.IQ1_S),
        ("IQ1_M", 31, Q.IQ1_M),
        ("IQ2_XXS", 19, Q.IQ2_XXS),
        ("IQ2_XS", 20, Q.IQ2_XS),
        ("IQ2_S", 28, Q.IQ2_XS),
        ("IQ2_M", 29, Q.IQ2_S),
        ("IQ3_XXS", 23, Q.IQ3_XXS),
        ("IQ3_XS", 22, Q.IQ3_S),
        ("IQ3_S", 26, Q.IQ3_S),
        ("IQ3_M", 27, Q.IQ3_S),
        ("IQ4_NL", 25, Q.IQ4_NL),
        ("IQ4_XS", 30, Q.IQ4_XS),
        ("TQ1_0", 36, Q.TQ1_0),
        ("TQ2_0", 37, Q.TQ2_0),
        ("MXFP4_MOE", 38, Q.MXFP4),
    )
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

FLOATS = frozenset({Q.F32, Q.F16, Q.BF16})
NEEDS_IMPORTANCE = frozenset({Q.IQ1_S, Q.IQ1_M, Q.IQ2_XXS, Q.IQ2_XS, Q.IQ2_S, Q.IQ3_XXS})
"""Types that are unusable without an importance matrix."""

NARROW_TYPES = {
    **dict.fromkeys((Q.IQ1_S, Q.IQ1_M, Q.IQ2_XXS, Q.IQ2_XS, Q.IQ2_S, Q.IQ3_XXS, Q.IQ3_S, Q.IQ4_XS), Q.IQ4_NL),
    **dict.fromkeys((Q.Q2_K, Q.Q3_K, Q.TQ1_0, Q.TQ2_0), Q.Q4_0),
    Q.Q4_K: Q.Q5_0,
    Q.Q5_K: Q.Q5_1,
    Q.Q6_K: Q.Q8_0,
}
"""Maps types with blocks of 256 weights to types for rows that are not a multiple of 256."""


class Part(Enum):
    OUTPUT = auto()
    EMBEDDING = auto()
    QKV = auto()
    KV_B = auto()
    V = auto()
    K = auto()
    Q = auto()
    ATTENTION_OUTPUT = auto()
    UP = auto()
    GATE = auto()
    DOWN = auto()
    OTHER = auto()


VALUES = frozenset({Part.V, Part.QKV, Part.KV_B})
"""Parts that contain the weights of V, to which quality is most sensitive."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's properties, on which rules depend. `index` is its position among the `count` tensors of its `Part`.
    `query_share` is the number of query heads for each KV head."""

    index: int
    count: int
    experts: int
    query_share: int
    has_importance: bool

    def in_first_eighth(self) -> bool:
        return self.index < self.count // 8

    def in_first_sixteenth(self) -> bool:
        return self.index < self.count // 16

    def in_middle(self) -> bool:
        return self.count // 8 <= self.index < 7 * self.count // 8

    def wants_more_bits(self) -> bool:
        """True for the first eighth and the last eighth of tensors, and for every third tensor between them."""
        return not self.in_middle() or (self.index - self.count // 8) % 3 == 2

    def shares_values(self) -> bool:
        return self.query_share >= 4

    def shares_values_or_has_experts(self) -> bool:
        return self.shares_values() or self.experts >= 4

    def is_eightfold(self) -> bool:
        return self.experts == 8

    def is_not_eightfold(self) -> bool:
        return self.experts != 8

    def is_early_and_unweighted(self) -> bool:
        return self.in_first_eighth() and not self.has_importance


When = Callable[[Place], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """Gives a tensor `quant_type` if the quantization mix is among `mixes` and `when` accepts the tensor's `Place`."""

    mixes: str  # Names of mixes, separated by spaces.
    quant_type: Q
    when: When = lambda place: True

    def applies(self, mix: str, place: Place) -> bool:
        return mix in self.mixes.split() and self.when(place)


LOWEST = "IQ2_XXS IQ2_XS IQ2_S IQ2_M IQ1_S IQ1_M"

_IQ2_SM = "IQ2_S IQ2_M"
_OTHER_LOWEST = "IQ2_XXS IQ2_XS IQ1_S IQ1_M"

EMBEDDING_RULES = (
    Rule(_OTHER_LOWEST, Q.Q2_K),
    Rule("IQ2_S IQ2_M IQ3_XXS", Q.IQ3_S),
    Rule("TQ1_0 TQ2_0", Q.Q4_K),
)

LOWEST_RULES: dict[Part, tuple[Rule, ...]] = {
    **dict.fromkeys(
        VALUES,
        (Rule(LOWEST, Q.Q4_K, Place.shares_values_or_has_experts), Rule(_IQ2_SM, Q.IQ3_S), Rule(_OTHER_LOWEST, Q.Q2_K)),
    ),
    Part.K: (Rule(LOWEST, Q.Q4_K, Place.is_eightfold),),
    Part.DOWN: (Rule(_IQ2_SM, Q.IQ3_S, Place.in_first_eighth), Rule(_OTHER_LOWEST, Q.Q2_K, Place.in_first_eighth)),
    Part.ATTENTION_OUTPUT: (
        Rule(LOWEST, Q.Q5_K, Place.is_eightfold),
        Rule("IQ1_S IQ1_M", Q.IQ2_XXS),
        Rule(_IQ2_SM, Q.IQ3_S),
    ),
}

_VALUE_RULES = (
    Rule(" ".join(MIXES), Q.Q8_0, Place.is_eightfold),
    Rule("Q2_K Q2_K_S IQ3_XXS IQ3_XS IQ3_S", Q.Q4_K, Place.shares_values),
    Rule("Q2_K", Q.Q3_K),
    Rule("IQ3_XXS", Q.IQ3_S, lambda place: not place.has_importance),
    Rule("IQ3_M", Q.Q4_K),
    Rule("Q3_K_M", Q.Q5_K, lambda place: place.index < 2),
    Rule("Q3_K_M", Q.Q4_K),
    Rule("Q3_K_L", Q.Q5_K),
    Rule("IQ4_NL IQ4_XS", Q.Q5_K, Place.shares_values),
    Rule("Q4_K_M Q5_K_M", Q.Q6_K, Place.wants_more_bits),
    Rule("Q4_K_S", Q.Q5_K, lambda place: place.index < 4),
)

RULES: dict[Part, tuple[Rule, ...]] = {
    **dict.fromkeys(VALUES, _VALUE_RULES),
    Part.K: (Rule(" ".join(MIXES), Q.Q8_0, Place.is_eightfold), Rule("IQ3_XS", Q.IQ3_XXS), Rule("IQ3_XXS", Q.IQ2_S)),
    Part.Q: (Rule("IQ3_XS", Q.IQ3_XXS), Rule("IQ3_XXS", Q.IQ2_S)),
    Part.DOWN: (
        Rule("Q2_K", Q.Q3_K),
        Rule("Q2_K_S", Q.Q4_K, Place.in_first_eighth),
        Rule("IQ3_XXS", Q.Q4_K, Place.is_early_and_unweighted),
        Rule("IQ3_XXS", Q.Q3_K, lambda place: not place.has_importance),
        Rule("Q3_K_M", Q.Q5_K, Place.in_first_sixteenth),
        Rule("Q3_K_M", Q.Q4_K),
        Rule("IQ3_M", Q.Q4_K, lambda p: p.in_first_eighth() or (p.is_eightfold() and p.wants_more_bits())),
        Rule("Q3_K_L", Q.Q5_K),
        Rule("Q4_K_M Q5_K_M", Q.Q6_K, Place.wants_more_bits),
        Rule("IQ4_NL IQ4_XS", Q.Q5_K, Place.is_early_and_unweighted),
        Rule("Q4_K_S", Q.Q5_K, Place.in_first_eighth),
        Rule("Q4_0", Q.Q4_1, lambda place: place.in_first_eighth() and place.has_importance),
        Rule("Q5_0", Q.Q5_1, lambda place: place.in_first_eighth() and place.has_importance),
    ),
    Part.ATTENTION_OUTPUT: (
        Rule("Q2_K IQ3_XS IQ3_XXS Q3_K_S Q3_K_M IQ4_NL Q4_K_S Q4_K_M IQ3_S IQ3_M IQ4_XS", Q.Q5_K, Place.is_eightfold),
        Rule("Q2_K", Q.Q3_K, Place.is_not_eightfold),
        Rule("IQ3_XXS", Q.IQ3_S, Place.is_not_eightfold),
        Rule("Q3_K_M IQ3_M", Q.Q4_K, Place.is_not_eightfold),
        Rule("Q3_K_L", Q.Q5_K, Place.is_not_eightfold),
    ),
    Part.GATE: (Rule("IQ3_XS", Q.IQ3_XXS, Place.in_middle),),
    Part.UP: (Rule("IQ3_XS", Q.IQ3_XXS, Place.in_middle),),
}

FALCON_RULES: dict[Part, tuple[Rule, ...]] = RULES | {
    Part.DOWN: (
        Rule("Q3_K_M", Q.Q5_K, Place.in_first_sixteenth),
        Rule("Q3_K_M", Q.Q4_K, Place.wants_more_bits),
        Rule("Q3_K_M", Q.Q3_K),
        Rule("Q3_K_L Q4_K_S", Q.Q4_K),
        Rule("Q4_K_M", Q.Q6_K, Place.in_first_sixteenth),
        Rule("Q4_K_M", Q.Q5_K, Place.wants_more_bits),
        Rule("Q4_K_M", Q.Q4_K),
        *RULES[Part.DOWN],
    ),
    Part.ATTENTION_OUTPUT: (Rule("Q3_K_L", Q.Q4_K),),
}
