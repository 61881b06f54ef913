"""Checks that a group's members together compute the bits of the whole program, in every family."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import UsageError
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.gathers import gather_formats
from llamaclust.kernels.reference.backend import ReferenceBackend, ReferenceStage
from llamaclust.model.groups.division import divide
from llamaclust.model.groups.portions import borders
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Attention, Embed, HeadMatMul, MatMul, Moe, Program
from llamaclust.model.steps.across import Gather
from support.arithmetic.batches import LIMITS, batch_of
from support.arithmetic.reference_group import ReferenceGroup
from support.models.tiny_architectures import MODELS, build_architecture
from support.paths import ROOT

DENSE = (
    *("llama-yarn", "internlm2", "qwen3", "phi3-short", "chatglm", "gpt2", "starcoder2", "gemma2", "gemma3", "smollm3"),
    *("mistral3", "seed_oss", "ernie4_5", "hunyuan-dense", "exaone4", "granite", "cohere2", "qwen3vl"),
)
SHARES = ((1.0, 1.0), (2.0, 1.0), (5.0, 3.0, 2.0))


def batches() -> Iterator[Batch]:
    """Yields a prompt, a token after it, and another token of that sequence beside a second sequence."""
    yield batch_of([([1, 5, 9, 7, 3], range(5), range(4))])
    yield batch_of([([2], [5], range(4))])
    yield batch_of([([11], [6], range(4)), ([4, 8], range(2), range(4, 6))])


def load(model: Model, program: Program) -> ReferenceStage:
    return ReferenceBackend().load(program, model.tensors_for(program), LIMITS, lambda done_bytes: None)


def whole(model: Model) -> Program:
    return model.program(0, model.layer_count, KvType.F16, LIMITS.max_context_tokens, 1)


def members(program: Program, shares: tuple[float, ...]) -> list[Program]:
    return [divide(program, shares, member) for member in range(len(shares))]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_members_have_the_bits_of_one(tmp_path: Path, name: str) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
        program = whole(model)
        one = load(model, program)
        groups = [ReferenceGroup([load(model, part) for part in members(program, shares)]) for shares in SHARES]
        for batch in batches():
            expected = one.run(batch, None).tobytes()
            assert [group.run(batch, None)[0].tobytes() for group in groups] == [expected] * len(groups)


@pytest.mark.parametrize("name", DENSE)
def test_a_layer_has_four_gathers_and_all_of_its_attention_is_divided(tmp_path: Path, name: str) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
        program = whole(model)
        parts = members(program, (1.0, 1.0))
        for part in parts:
            gathers = [step for step in part.steps if isinstance(step, Gather)]
            assert len(gathers) <= 4 * model.layer_count + 2  # two for the embedding and the head
        heads = [[step.kv_heads for step in part.kv_layers] for part in parts]
        assert [sum(each) for each in zip(*heads, strict=True)] == [step.kv_heads for step in program.kv_layers]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_leader_alone_has_tables_of_tokens(tmp_path: Path, name: str) -> None:
    """Checks that the leader alone has the embedding table and sends its rows as plain floats."""
    with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
        program = whole(model)
        parts = members(program, SHARES[2])
        types = {name: tensor.quant_type for part in parts for name, tensor in model.tensors_for(part).items()}
    tables = {step.weight for step in program.steps if isinstance(step, Embed)}
    assert tables and [tables & {*part.weights} for part in parts] == [tables, set(), set()]
    for part in parts:
        gathers = [step for step in part.steps if isinstance(step, Gather)]
        sent = [step for step in gathers if step.is_of_one]
        assert [step.borders for step in sent] == [(0, *(step.out.width,) * 3) for step in sent]
        assert len(sent) == len(tables) and {step.x is None for step in sent} == {part is not parts[0]}
        forms = dict(zip(gathers, gather_formats(part, types), strict=True))
        assert {forms[step] for step in sent} == {None}


def test_stages_are_divided_too(tmp_path: Path) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", "qwen3")) as model:
        programs = [model.program(a, b, KvType.F16, LIMITS.max_context_tokens, 1) for a, b in ((0, 1), (1, 3))]
        one = load(model, whole(model))
        first, second = (ReferenceGroup([load(model, part) for part in members(p, (2.0, 1.0))]) for p in programs)
        for batch in batches():
            hidden, *others = first.run(batch, None)
            assert all(other.tobytes() == hidden.tobytes() for other in others)
            logits, missing = second.run(batch, hidden)
            assert logits.tobytes() == one.run(batch, None).tobytes()
            assert np.isnan(missing).all(), "only the leader gets them"


def test_members_in_another_order_are_noticed(tmp_path: Path) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", "internlm2")) as model:
        program = whole(model)
        batch = next(batches())
        group = ReferenceGroup([load(model, part) for part in reversed(members(program, (1.0, 1.0)))])
        assert group.run(batch, None)[0].tobytes() != load(model, program).run(batch, None).tobytes()


def test_every_row_is_computed_by_one_member(tmp_path: Path) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", "baichuan-13b")) as model:
        program = whole(model)
        parts = members(program, (5.0, 3.0, 2.0))
    for steps in zip(*([step for step in part.steps if isinstance(step, MatMul)] for part in parts), strict=True):
        name = steps[0].weight.partition("[")[0]
        (product,) = (step for step in program.steps if isinstance(step, MatMul) and step.weight == name)
        ends = [[int(end) for end in step.weight.partition("[")[2].rstrip("]").split(":")] for step in steps]
        assert [ends[0][0], *(end for _, end in ends)] == [*(begin for begin, _ in ends), product.out.width]
        assert [end - begin for begin, end in ends] == [step.out.width for step in steps]


MIXTURES = (
    "qwen3moe",
    "gpt-oss",
    "gpt-oss-mxfp4",
    "llama4",
    "deepseek2",
    "gemma4-experts",
    "nemotron_h_moe",
    "qwen2moe",
)


@pytest.mark.parametrize("name", MIXTURES)
def test_members_have_rows_of_every_expert(tmp_path: Path, name: str) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
        program = whole(model)
        parts = members(program, (2.0, 1.0))
        experts = [name for name in program.weights if "_exps" in name and not name.endswith("scale")]
        held = [{name.partition("[")[0]: name for name in part.weights if "_exps" in name} for part in parts]
        for name in experts:
            shape = model.file.tensor(name).shape
            ours, theirs = (model.tensors_for(part)[names[name]] for part, names in zip(parts, held, strict=True))
            assert ours.shape[0] == theirs.shape[0] == shape[0], "all experts"
            is_fused = "gate_up" in name  # divided into two parts with other names
            assert is_fused or (ours.shape[1] + theirs.shape[1], *ours.shape[2:]) == shape[1:]
        for part in parts:
            assert sum(step.lines > 1 for step in part.steps if isinstance(step, Gather)) == sum(
                isinstance(step, Moe) for step in program.steps
            )


@pytest.mark.parametrize("name", ["deepseek2", "deepseek2-lite", "mistral4", "kimi-linear"])
def test_heads_of_latent_attention_are_divided_and_its_keys_are_whole(tmp_path: Path, name: str) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
        program = whole(model)
        parts = members(program, (1.0, 1.0))
    latent = [[step for step in part.kv_layers if step.v is None] for part in (program, *parts)]
    for one, *each in zip(*latent, strict=True):
        assert sum(step.heads for step in each) == one.heads
        assert [step.kv_token_bytes for step in each] == [one.kv_token_bytes] * 2
    products = [[step for step in part.steps if isinstance(step, HeadMatMul)] for part in (program, *parts)]
    assert products[0] and all(
        first.heads + second.heads == one.heads for one, first, second in zip(*products, strict=True)
    )


@pytest.mark.parametrize("name", ["gemma3n", "gemma4-inputs"])
def test_layers_that_read_keys_of_others_have_the_same_heads(tmp_path: Path, name: str) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
        attention = [step for step in divide(whole(model), (1.0, 1.0), 1).steps if isinstance(step, Attention)]
    kept = {step.layer: step.kv_heads for step in attention if not step.shares_kv}
    sharing = [step for step in attention if step.shares_kv]
    assert sharing and all(step.kv_heads == kept[step.layer] for step in sharing)


def test_the_docs_name_what_groups_divide_of_every_architecture(tmp_path: Path) -> None:
    found: tuple[set[str], ...] = set(), set(), set()
    for name in MODELS:
        with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
            program, architecture = whole(model), model.hyperparameters.architecture
        is_latent = any(step.v is None for step in program.kv_layers)
        found[2 if program.has_states else is_latent].add(architecture)
        steps = divide(program, (1.0, 1.0), 0).steps
        products = {step.weight for step in steps if isinstance(step, MatMul) and "[" not in step.weight}
        small = {product for product in products if "altup" in product or ".attn_k" in product or ".attn_v" in product}
        assert program.has_states or products == small
    page = (ROOT / "docs/internals/groups.md").read_text()
    listed = re.findall(r"^- \*\*All [^*]+\*\*:(.*?)\.$", page, re.MULTILINE | re.DOTALL)
    assert [set(re.findall(r"`([^`]+)`", names)) for names in listed] == [*found]


def test_parts_of_layers_are_refused(tmp_path: Path) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", "qwen3moe")) as model:
        program = model.program(0, 2 * model.layer_count, expert_shards=2)
    with pytest.raises(UsageError, match="a group needs whole layers"):
        divide(program, (1.0, 1.0), 0)


@pytest.mark.parametrize("name", ["gemma", "falcon", "llama4-maverick", "exaone4-windows"])
def test_heads_with_the_same_keys_are_divided_too(tmp_path: Path, name: str) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
        program = whole(model)
        parts = members(program, (1.0, 1.0))
    for one, *each in zip(*(part.kv_layers for part in (program, *parts)), strict=True):
        assert one.kv_heads == 1 and sum(step.heads for step in each) == one.heads
        assert [step.kv_token_bytes for step in each] == [one.kv_token_bytes] * 2


def test_fewer_kv_heads_than_members_are_not_divided(tmp_path: Path) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", "qwen3")) as model:
        found = divide(whole(model), (1.0, 1.0, 1.0), 1)
    assert [step.kv_heads for step in found.kv_layers] == [2] * 3


def test_borders_are_near_the_shares_and_leave_nobody_without() -> None:
    assert borders(8, (1.0, 1.0)) == (0, 4, 8)
    assert borders(8, (5.0, 3.0, 2.0)) == (0, 4, 6, 8)
    assert borders(3, (100.0, 1.0, 1.0)) == (0, 1, 2, 3)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    source = random.Random(seed)
    for _ in range(300):
        shares = tuple(source.uniform(0.01, 10) for _ in range(source.randint(1, 8)))
        units = source.randint(len(shares), 300)
        found = borders(units, shares)
        assert (found[0], found[-1], len(found)) == (0, units, len(shares) + 1)
        sizes = np.array([end - begin for begin, end in pairwise(found)])
        assert sizes.min() >= 1
        if (np.array(shares) * units / sum(shares)).min() >= 1:
            assert np.abs(sizes - np.array(shares) * units / sum(shares)).max() <= 1.001
