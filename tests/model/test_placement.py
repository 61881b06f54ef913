"""Tests of tensor placement rules like llama.cpp's `-ot`: their effect on layers and experts, and refused rules."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

import pytest

from llamaclust.core.errors import UsageError
from llamaclust.core.gpus import Placement
from llamaclust.model.loader import Model
from llamaclust.model.placement import MAX_PATTERN, PlacementRule, placement_of, read_rules, rule_effects
from llamaclust.model.quant_types import QuantType
from support.models.tiny_model import build_tiny_model
from support.seed import SEED

LAYERS = 12
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
REST = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")
KINDS = (*EXPERTS, "ffn_gate_inp", *REST)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("placement") / "mixture.gguf"
    small = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "vocabulary": 320, "experts": 4}
    return Model.open(build_tiny_model(path, layers=LAYERS, quant_type=QuantType.Q8_0, **small))  # type: ignore[arg-type]


def said(model: Model, text: str, cpu_moe: int | None = None) -> Placement:
    return placement_of(model, list(read_rules(text)), cpu_moe)


@pytest.mark.parametrize(
    ("rules", "in_ram"),
    [
        ("exps=CPU", range(12)),
        (r"\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU", range(12)),
        ("blk.[0-9]+.ffn_.*_exps.=CPU", range(12)),
        ("ffn_.*=CPU", range(12)),
        (r"blk\.[01]\.ffn_.*=CPU", (0, 1)),
        (r"blk\.(1[0-9])\.ffn_.*_exps=CPU", range(10, 12)),
        (r"blk\.(?:[1-3]|1[01])\.ffn_(gate|up|down)_exps\.weight=CPU", (1, 2, 3, 10, 11)),
        (r"([6-9]|1[0-9]).ffn_.*_exps.=ram", range(6, 12)),
        (r"blk\.[0-9]{2}\.ffn_.{2,5}_exps=CPU", range(10, 12)),
    ],
)
def test_common_rules_for_experts(model: Model, rules: str, in_ram: Sequence[int]) -> None:
    placement = said(model, rules)
    assert placement.layers == (None,) * LAYERS
    assert [layer for layer, is_in_ram in enumerate(placement.experts) if is_in_ram] == list(in_ram)
    assert set(placement.experts) <= {True, None}


def test_the_first_rule_that_matches_decides(model: Model) -> None:
    placement = said(model, r"blk\.(3|4)\.ffn_.*=CUDA0,exps=CPU")
    assert placement.layers == tuple("cuda:0" if layer in (3, 4) else None for layer in range(LAYERS))
    assert placement.experts == tuple(layer not in (3, 4) for layer in range(LAYERS))
    assert said(model, r"exps=CPU,blk\.(3|4)\.ffn_.*_exps=CUDA0") == said(model, "exps=CPU")


def test_norms_are_where_the_matrices_are(model: Model) -> None:
    """Checks that a rule for experts which also matches a norm neither moves the layer nor contradicts its rule."""
    apart = said(model, r"ffn_.*=CPU,attn_.*=CUDA0")
    assert (set(apart.layers), set(apart.experts)) == ({"cuda:0"}, {True})
    assert set(said(model, r"ffn_.*=CPU,attn_.*=CPU").layers) == {"ram"}
    assert set(said(model, r"ffn_.*=gpu").experts) == {False}


def test_rules_come_before_cpu_moe(model: Model) -> None:
    placement = said(model, r"blk\.0\.ffn_.*_exps=gpu,blk\.9\.ffn_.*_exps=CPU", 2)
    in_ram = [placement.experts_in_ram(layer) for layer in range(LAYERS)]
    assert in_ram == [layer in (1, 9) for layer in range(LAYERS)]
    assert [said(model, "exps=CPU", None).experts_in_ram(layer) for layer in (0, 11)] == [True, True]
    assert said(model, r"blk\.3\.ffn_.*_exps=CPU").experts_in_ram(0) is None


def test_whole_layers(model: Model) -> None:
    assert said(model, r"blk\.[0-2]\.=CPU").layers == ("ram",) * 3 + (None,) * 9
    assert said(model, ".=CPU").layers == ("ram",) * LAYERS
    assert said(model, r"blk\.(4|5)\.=gpu").layers == (None,) * 4 + ("gpu",) * 2 + (None,) * 6
    assert said(model, r"^output\.weight$=CUDA1").layers == (None,) * 11 + ("cuda:1",)
    both = said(model, r"blk\.1\.ffn_.*_exps=CPU,blk\.[01]\.=gpu")
    assert both.layers[:3] == ("gpu", "gpu", None) and both.experts[:3] == (False, True, None)


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        (
            "attn_q=CPU",
            "'attn_q=ram' puts blk.0.attn_q.weight in RAM, but not blk.0.attn_norm.weight of layer 0: only whole",
        ),
        ("ffn_(norm|gate_inp)=CPU", "puts blk.0.ffn_norm.weight in RAM, but not blk.0.attn_norm.weight of layer 0"),
        ("exps=CPU,ffn_norm=CPU", "puts blk.0.ffn_norm.weight in RAM, but not blk.0.attn_norm.weight of layer 0"),
        ("ffn_(up|gate)_exps=CPU", "but not blk.0.ffn_down_exps.weight of the experts of layer 0"),
        ("token_embd=CPU", "puts token_embd.weight in RAM, but not blk.0."),
        ("ffn_gate_inp=CUDA0,exps=CPU", "but all tensors of the experts of layer 0 must be on one device"),
        ("ffn_gate_inp=CPU", "puts blk.0.ffn_gate_inp.weight in RAM, but not blk.0.ffn_.*_exps"),
        (r"ffn_up_exps=CUDA0,exps=CPU", "but all tensors of the experts of layer 0 must be on one device"),
        (r"attn_q=CUDA0,attn_k=CUDA1", "but all tensors of layer 0 must be on one device"),
        (r"exps=CUDA1,blk=CUDA0", "but all tensors of layer 0 must be on one device"),
        (r"blk\.0\.ffn_.*_exps=gpu,blk\.0\.=CPU", "but all tensors of"),
        (
            "ffn_.*_expz=CPU",
            "matches none of the 123 tensors of the model; change the pattern; names are like blk.0.ffn_",
        ),
        (r"exps=CPU,blk\.12\.=CPU", r"'blk\.12\.=ram' matches none of the 123 tensors of the model"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(model: Model, rules: str, told: str) -> None:
    with pytest.raises(UsageError) as refused:
        said(model, rules)
    line = str(refused.value)
    assert line.startswith("placement: ") and "\n" not in line
    assert told in line or re.search(told, line), line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("exps", "'exps' is not a rule; write PATTERN=DEVICE, such as 'exps=CPU'"),
        ("exps=TPU", "'TPU' is not a device; write CPU or ram, gpu, or CUDA0"),
        ("=CPU", "the pattern has 0 characters; expected 1 to 256"),
        ("a" * (MAX_PATTERN + 1) + "=CPU", "the pattern has 257 characters"),
        ("(?!x)=CPU", "not a regular expression: look-around"),
        ("[=CPU", "not a regular expression: unclosed character class"),
        ("(a{1000}){1000}=CPU", "exceeds size limit"),
        (r"(a)\1=CPU", "backreferences are not supported"),
        ("a\n=CPU", "cannot be printed"),
    ],
)
def test_what_is_no_rule(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)) as refused:
        list(read_rules(text))
    assert "\n" not in str(refused.value)


def test_a_pattern_that_backtracks_ends(model: Model) -> None:
    """Checks a pattern for which a backtracking matcher takes 2 ** 20 steps or more per tensor name."""
    rules = list(read_rules(r"((\w|\.)+)+(\w+\.?)*!=CPU,exps=CPU"))
    with pytest.raises(UsageError, match="matches none of"):
        placement_of(model, rules, None)


def test_what_rules_decide_on(model: Model) -> None:
    first, rest = rule_effects(model, list(read_rules(r"blk\.1[01]\.ffn_.*_exps=CPU,exps=gpu")))
    tensors = model.file.tensors
    sizes = {name: tensors[name].resident_bytes for name in tensors if "_exps" in name}
    assert (first.tensors, rest.tensors) == (6, 30) and first.n_bytes + rest.n_bytes == sum(sizes.values())


def expected(rules: Sequence[PlacementRule], names: Sequence[str]) -> Mapping[str, str | None]:
    """Returns the device of each tensor as Python's regular expressions find it."""
    return {
        name: next((rule.device for rule in rules if re.search(rule.pattern, name) is not None), None) for name in names
    }


def drawn_rule(draws: random.Random) -> PlacementRule:
    first, last = sorted(draws.choices(range(LAYERS), k=2))
    layers = draws.choice([r"blk\.", rf"blk\.({'|'.join(map(str, range(first, last + 1)))})\."])
    kinds = draws.choice([r"ffn_.*_exps", "", "(ffn_(up|gate)|attn_q)", "ffn_", draws.choice(KINDS), r"(attn|ffn)_.*"])
    return PlacementRule.of(layers + kinds, draws.choice(["ram", "ram", "gpu", "cuda:0", "cuda:1"]))


def test_random_rules_are_obeyed_to_the_tensor_or_refused(model: Model) -> None:
    """Checks that every tensor is where its rule says, and that none is in RAM without a rule."""
    draws, obeyed = random.Random(SEED), 0
    names = [name for name in model.file.tensors if name.startswith("blk.")]
    for _ in range(300):
        rules = [drawn_rule(draws) for _ in range(draws.randint(1, 3))]
        try:
            placement = placement_of(model, rules, None)
        except UsageError:
            continue
        obeyed += 1
        for name, wanted in expected(rules, names).items():
            layer, is_expert = int(name.split(".")[1]), any(kind in name for kind in EXPERTS)
            device, in_ram = placement.layers[layer], placement.experts[layer]
            place = "ram" if is_expert and in_ram else device
            if wanted is None:
                assert place != "ram" or not name.endswith(("_exps.weight", "attn_q.weight")), (rules, name)
            elif not name.endswith(("ffn_gate_inp.weight", "_norm.weight")):  # placed with the matrices
                assert place == wanted or (wanted == "gpu" and place not in (None, "ram")), (rules, name)
    assert obeyed > 20, SEED
