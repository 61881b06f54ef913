"""Checks that plans of assumed machines follow the description, and name what would help or fit."""

from __future__ import annotations

import re
from math import ceil
from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.control.limits import capacity_of
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.product_times import RATES, READ_SHARE
from llamaclust.cluster.planner.roofline import LAYER_S
from llamaclust.cluster.scheduler.capacity import BlockCounts
from llamaclust.core.errors import InsufficientMemoryError, ModelFileError, UsageError
from llamaclust.core.sizes import mib
from llamaclust.model.groups.portion import Portion
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.projectors.projector import open_projector
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.assume import planning, rates
from llamaclust.tools.assume.assumed_model import assumed_model
from llamaclust.tools.assume.assumed_plan import AssumedPlan, plan_assumed, plan_shapes
from llamaclust.tools.assume.shapes import SHAPES
from llamaclust.worker.devices.encoder_memory import encoder_bytes
from llamaclust.worker.devices.workspace import program_workspace_bytes
from llamaclust.worker.stage.stage_runner import model_program
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector

MIXES = ("q4_k_m", "iq1_s")
MIB = 1 << 20
GIB = 1 << 30
KIB = 1 << 10


def token_s(found: AssumedPlan) -> float:
    assert found.plan.prediction is not None
    return found.plan.prediction.token_s


def ttft_s(found: AssumedPlan) -> float:
    assert found.plan.prediction is not None
    return found.plan.prediction.ttft_s


def test_decode_time_is_that_of_touched_bytes_and_of_links() -> None:
    found = plan_assumed("3x16GB@40GB/s,1Gbit,1ms", "qwen3-30b-a3b", ())
    stages = found.plan.stages
    assert [stage.worker for stage in stages] == ["m1", "m2", "m3"] and stages[-1].end == 48
    costs = Model(assumed_model("qwen3-30b-a3b").file).costs(KvType.F16)
    touched = sum(layer.weight_bytes - layer.idle_bytes for layer in costs.layers) + costs.head_bytes
    assert sum(stage.touched_bytes for stage in stages) == pytest.approx(touched, abs=3)
    assert touched < sum(stage.weight_bytes for stage in stages) / 8
    read_s = touched / (READ_SHARE * 40e9) + 48 * LAYER_S
    sent_s = 2 * 2048 * 4 * 8 / (rates.NETWORK_SHARE * 1e9)  # the hidden state on two links, then a token id
    assert token_s(found) == pytest.approx(read_s + 3 * (0.5e-3 + rates.HOP_S) + sent_s, rel=0.01)
    assert all(stage.memory_bytes == 16 * GIB - rates.SYSTEM_BYTES for stage in stages)


def test_prefill_is_that_of_products_by_threads_or_operations() -> None:
    by_threads = plan_assumed("64GB@40GB/s/8", "8b:q8_0", ())
    macs = Model(assumed_model("8b").file).costs(KvType.F16)
    products = 512 * sum(layer.macs_per_token for layer in macs.layers)
    peak = RATES[QuantType.Q8_0].peak_share * 8 * rates.THREAD_MACS_S
    assert ttft_s(by_threads) == pytest.approx(products / peak, rel=0.05)
    by_operations = plan_assumed("64GB@40GB/s@2TOPS", "8b:q8_0", ())
    assert ttft_s(by_operations) == pytest.approx(ttft_s(by_threads) * 8 * rates.THREAD_MACS_S / 1e12, rel=0.2)
    assert token_s(by_operations) == pytest.approx(token_s(by_threads), rel=0.01)


def test_types_that_take_long_to_decode_are_bound_by_threads() -> None:
    """Checks that IQ1_S, with 0.4 of the bytes of Q4_K, is hardly faster on few threads and gains from more threads."""
    few, many = ([token_s(plan_assumed(f"64GB@40GB/s/{n}", f"8b:{mix}", ())) for mix in MIXES] for n in (2, 32))
    assert few[1] > 1.3 * many[1] and few[0] == pytest.approx(many[0], rel=0.05)
    assert many[1] < 0.6 * many[0]


def test_a_machine_that_would_do_alone_is_named_with_its_speed() -> None:
    """Checks that the fastest machine that holds the model is named, except if none does or the plan has only one."""
    cut = (
        "plan=[{worker: m1, layers: [0, 9]}, {worker: m2, layers: [9, 20]}, {worker: m3, layers: [20, 32]}]",
        "plan.0.layers=[0,8]",
        "plan.1.layers=[8,20]",
    )
    found = plan_assumed("6GB@60GB/s+16GB@20GB/s+16GB@30GB/s,1Gbit", "8b", cut)
    by_itself = plan_assumed("16GB@30GB/s", "8b", ())
    assert found.alone is not None and found.alone.machine == "m3"
    assert found.alone.prediction.token_s == token_s(by_itself)
    line = next(line for line in found.lines() if " alone: " in line)
    assert f" m3 alone: {1 / token_s(by_itself):.1f} tok/s for one request, first token after " in line
    assert found.json()["alone"]["token_ms"] == 1e3 * token_s(by_itself)
    assert by_itself.alone is None and by_itself.json()["alone"] is None
    assert plan_assumed("3x16GB", "qwen3-30b-a3b", ()).alone is None  # the model has 18.6 GB


def test_a_faster_machine_holds_more_layers() -> None:
    stages = plan_assumed("16GB@20GB/s/2 + 16GB@80GB/s/8", "8b", ("objective=throughput",)).plan.stages
    assert stages[1].end - stages[1].start > 2 * (stages[0].end - stages[0].start)


def test_layers_go_to_gpus_first() -> None:
    (stage,) = plan_assumed("16GB@60GB/s + 4GB@300GB/s gpu", "8b", ()).plan.stages
    cpu, gpu = stage.devices
    assert (cpu.device, gpu.device) == ("cpu", "cuda:0") and gpu.end == 32
    assert gpu.memory_bytes == 4 * GIB - rates.GPU_RESERVED_BYTES and 2 * GIB < gpu.bytes <= gpu.memory_bytes


def test_what_gpus_do_not_compute_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object, **options: object) -> Plan:
        raise ModelFileError("this is not computed on GPUs; set device: cpu for its workers")

    monkeypatch.setattr(planning, "plan_cluster", refused)
    with pytest.raises(UsageError, match=r"--assume: LLaMA 3.1 8B: this is not .*; remove the GPUs from MACHINES"):
        plan_assumed("64GB@60GB/s + 24GB@900GB/s gpu", "8b", ())
    with pytest.raises(ModelFileError):
        plan_assumed("64GB@60GB/s", "8b", ())


def test_keys_of_the_cluster_file_are_obeyed() -> None:
    usual, long = plan_assumed("32GB@40GB/s", "8b", ()), plan_assumed("32GB@40GB/s", "8b", ("context_length=32768",))
    assert (usual.plan.context_length, long.plan.context_length) == (98_304, 32_768)
    small = plan_assumed("32GB@40GB/s", "8b", ("kv_memory=1GiB",)).plan.stages[0]
    half = plan_assumed("32GB@40GB/s", "8b", ("kv_memory=1GiB", "kv_type=q8_0")).plan
    assert small.kv_bytes <= GIB and half.kv_blocks > 1.8 * small.kv_bytes / (16 * 128 * KIB)
    by_hand = plan_assumed(
        "2x16GB@40GB/s", "8b", ("plan=[{worker: m1, layers: [0, 30]}, {worker: m2, layers: [30, 32]}]",)
    )
    assert [stage.end for stage in by_hand.plan.stages] == [30, 32]
    with pytest.raises(
        UsageError, match=r"--set listen: a plan for assumed machines does not use this key; it uses context_length, "
    ):
        plan_assumed("32GB@40GB/s", "8b", ("listen=:1",))
    with pytest.raises(UsageError, match="context_length"):
        plan_assumed("32GB@40GB/s", "7b", ("context_length=100000",))


def test_what_lacks_and_what_would_fit() -> None:
    with pytest.raises(InsufficientMemoryError) as error:
        plan_assumed("3x16GB@40GB/s,1Gbit", "70b", ("groups=off",))
    text = str(error.value)
    assert text.startswith("LLaMA 3.1 70B Q4_K_M (42.5 GB): the model does not fit: it needs ")
    assert "MiB are missing" in text and "\n" not in text
    assert text.endswith(
        " MiB are missing. What would fit: IQ4_XS, 38.3 GB; or 1 more of 16 GB; or --set context_length=2304"
    )
    assert plan_assumed("3x16GB@40GB/s,1Gbit", "70b:q3_k_m", ()).plan and plan_assumed("4x16GB@40GB/s", "70b", ()).plan
    assert error.value.missing_bytes is not None
    missing = ceil(error.value.missing_bytes / MIB)
    room = plan_assumed(f"3x{16 + (missing + 600) / 3 / 1024:.3f}GB@40GB/s,1Gbit", "70b", ("groups=off",))
    assert len(room.plan.stages) == 3, "as much more is enough"
    with pytest.raises(InsufficientMemoryError, match=r"MiB are missing"):
        plan_assumed("3x1GB@40GB/s", "70b", ())


def test_what_would_help_does() -> None:
    found = plan_assumed("2x6GB@40GB/s@60TOPS,100Mbit", "8b", ("groups=off",))
    texts = dict(text.split(": ", 1) for text in found.helps)
    assert texts.keys() == {"a network of 1 Gbit/s", "IQ4_XS in place of Q4_K_M"}
    network = plan_assumed("2x6GB@40GB/s@60TOPS,1Gbit", "8b", ("groups=off",))
    assert texts["a network of 1 Gbit/s"].endswith(f"first token after {1e3 * ttft_s(network):.0f} ms")
    few = plan_assumed("3x16GB@40GB/s,1Gbit", "8b", ("groups=off",)).helps
    assert any(text.startswith("one more such machine: first token after") for text in few)
    assert not any("network" in text for text in few), "it is no bottleneck"


@pytest.mark.parametrize(
    ("machines", "model", "least"),
    [
        ("3x16GB@40GB/s,1Gbit", "70b", 1.95),
        ("3x16GB@40GB/s,2.5Gbit", "70b", 2.05),
        ("3x24GB@40GB/s,1Gbit", "70b", 1.9),
        ("3x24GB@40GB/s,2.5Gbit", "70b", 2.1),
        ("2x16GB@40GB/s,1Gbit", "8b", 10.9),
    ],
)
def test_machines_on_a_fast_network_are_a_group(machines: str, model: str, least: float) -> None:
    found = plan_assumed(machines, model, ())
    assert all(stage.memory_bytes is not None and stage.bytes <= stage.memory_bytes for stage in found.plan.stages)
    assert len(found.plan.chain) == 1 and 1 / token_s(found) >= least
    text = "\n".join(found.lines())
    assert "round trip 0.1 ms (default; set it with " in text and "a gather, half a round trip + 35 µs" in text
    if "16GB" not in machines or model != "70b":  # whole layers do not fit in that case
        assert token_s(found) < token_s(plan_assumed(machines, model, ("groups=off",))) / 1.5


@pytest.mark.parametrize(
    ("machines", "model"),
    [
        ("3x16GB,1Gbit", "70b"),
        ("2x7GB,1Gbit", "qwen3-14b"),
        ("2x8GB + 12GB,1Gbit", "gpt-oss-20b"),
        ("3x32GB,1Gbit", "glm-4.5-air"),
        ("4x6GB,1Gbit", "8b"),
    ],
)
def test_members_have_memory_for_what_they_load(machines: str, model: str) -> None:
    """Checks that each member has the workspace of its own program, which a worker computes when it loads."""
    found = plan_assumed(machines, model, ())
    opened, limits = found.model.opened, capacity_of(load_config(None, ["name=a"]), 4096).stage_limits(BlockCounts(1))
    assert any(stage.shares for stage in found.plan.stages)
    for stage in found.plan.stages:
        portion = Portion(stage.shares, stage.member) if stage.shares else None
        program = model_program(opened, stage.start, stage.end, limits, portion)
        held = sum(tensor.resident_bytes for tensor in opened.tensors_for(program).values())
        assert stage.weight_bytes == pytest.approx(held, rel=2e-3)
        assert stage.workspace_bytes >= program_workspace_bytes(opened, program, limits, 4, "cpu")
        assert stage.memory_bytes is not None and stage.bytes <= stage.memory_bytes


@pytest.mark.parametrize("model", ["8b", "llama-3.2-3b-instruct"])
@pytest.mark.parametrize("network", ["1Gbit,10ms", "50Mbit,1ms"])
def test_the_network_that_groups_need_is_named(network: str, model: str) -> None:
    found = plan_assumed(f"2x16GB@40GB/s,{network}", model, ())
    assert all(len(members) == 1 for members in found.plan.chain)
    (text,) = (text for text in found.helps if text.startswith("groups of machines, with "))
    gbit, ms, speed = re.findall(r"[\d.]+", text)
    better = plan_assumed(f"2x16GB@40GB/s,{gbit}Gbit,{ms}ms", model, ())
    assert len(better.plan.chain) == 1 and 1 / token_s(better) == pytest.approx(float(speed), rel=0.05)


def test_a_slow_network_is_in_every_token() -> None:
    speeds = ("10Mbit", "10Gbit")
    slow, fast = (plan_assumed(f"3x8GB@40GB/s,{speed}", "gemma-3-12b-it", ("groups=off",)).plan for speed in speeds)
    assert slow.prediction is not None and fast.prediction is not None
    hops, row_bits = len(slow.stages) - 1, 3840 * 4 * 8
    assert hops and slow.prediction.links_s == pytest.approx((hops + 1) * 0.35e-3 + hops * row_bits / 9.4e6)
    assert fast.prediction.links_s < 2e-3


def test_advice_names_what_can_be_pulled_and_which_machine() -> None:
    def helps(machines: str, model: str) -> str:
        return "\n".join(plan_assumed(machines, model, ()).helps)

    assert "\nIQ4_XS (by `llamaclust model quantize`) in place of Q4_K_M: " in helps("64GB", "qwen3-30b-a3b")
    assert "\nQ6_K in place of Q8_0: " in helps("64GB", "qwen3-30b-a3b:q8_0")
    assert "in place of" not in helps("64GB", "gpt-oss-20b")
    assert helps("2x8GB", "8b").startswith("one more such machine: ")
    assert helps("16GB+8GB", "8b").startswith("one more like m2 (8 GB): ")
    assert helps("16GB + 24GB + rtx3090", "70b").startswith("one more like m2 (24 GB with a GPU of 24 GB): ")


def test_a_mixture_that_does_not_fit_gets_the_smallest_quantization_with_a_remark() -> None:
    with pytest.raises(
        InsufficientMemoryError, match=r"What would fit: (\S+), [\d.]+ GB \(by .*quantize`; 2\.\d bits a w"
    ):
        plan_assumed("3x16GB", "glm-4.5-air", ())


def test_old_machines_may_be_slower_than_assumed() -> None:
    assert "no AVX2" in "\n".join(plan_assumed("16GB@DDR3", "8b", ()).lines())
    assert all("no AVX2" not in "\n".join(plan_assumed(m, "8b", ()).lines()) for m in ("16GB@DDR3@1TOPS", "16GB@DDR4"))


def test_the_text_says_what_was_assumed() -> None:
    lines = list(plan_assumed("3x16GB@40GB/s", "gpt-oss-20b", ()).lines())
    assert lines[0].startswith("gpt-oss 20b MXFP4 (12.1 GB) on 3 of 3 machines: it fits, ")
    text = "\n".join(lines)
    assert "4 threads a machine, 90 GMAC/s" in text and "1 Gbit/s (default; set it " in text and "GPUs" not in text
    gpu = "\n".join(plan_assumed("16GB + 24GB@900GB/s gpu", "8b", ()).lines())
    assert "30 µs a layer to launch kernels, 50 µs more where its experts are in RAM, at 12 GB/s" in gpu
    given = "\n".join(plan_assumed("2x16GB@40GB/s@1TOPS,2.5Gbit,0.2ms", "8b", ()).lines())
    assert "(default; " not in given and "GMAC/s" not in given and "2.5 Gbit/s" in given
    values = plan_assumed("3x16GB@40GB/s", "gpt-oss-20b", ()).json()
    assert values["model"] == "gpt-oss 20b" and values["quantization"] == "MXFP4" and values["machines"] == 3
    assert values["stages"][0]["touched_bytes"] > 0 and values["assumptions"] and values["token_ms"] > 0


def test_a_survey_has_each_shape_with_its_answer() -> None:
    named: list[str] = []
    found = plan_shapes("3x16GB,1Gbit", ("groups=off",), named.append)
    assert named == [plan.name for plan in found.plans] == list(SHAPES)
    plans = {plan.name: plan for plan in found.plans}
    alone = plan_assumed("3x16GB,1Gbit", "qwen3-30b-a3b", ("groups=off",))
    assert plans["qwen3-30b-a3b"].plan == alone.plan and plans["qwen3-30b-a3b"].helps == alone.helps
    with pytest.raises(InsufficientMemoryError) as error:
        plan_assumed("3x16GB,1Gbit", "70b", ("groups=off",))
    assert plans["70b"].plan is None and "; or ".join(plans["70b"].helps) == "IQ4_XS, 38.3 GB; or 1 more of 16 GB"
    assert error.value.missing_bytes is not None
    headings, *lines = found.lines()
    rows = {line.split(":")[0]: line for line in lines}
    assert f"no: {mib(error.value.missing_bytes)} MiB missing" in rows["70b"] and "fits" in headings
    assert f"; {mib(error.value.missing_bytes)} MiB are missing" in str(error.value)
    shown = rows["qwen3-30b-a3b"]
    assert f"{1 / token_s(alone):.0f} " in shown and f"{ttft_s(alone):.1f} s" in shown and "yes, on 3 machines" in shown
    assert any("memory is read at 40 GB/s" in line for line in lines) and "first token: after a prompt" in "".join(
        lines
    )
    assert " one would do " not in shown and "yes, on 3 machines; one would do " in rows["8b"]
    assert "use m1 alone: " in rows["8b"] and "use m1 alone: " in rows["gpt-oss-20b"] and "use m1" not in shown
    values = found.json()
    assert {model["name"] for model in values["models"] if model["fits_alone"]} == {"7b", "8b", "gpt-oss-20b"}
    assert [model["fits"] for model in values["models"]] == [plan.plan is not None for plan in found.plans]
    assert values["machines"] == 3 and values["assumptions"]


def test_a_survey_shows_limits_of_one_model_in_its_row() -> None:
    plans = {plan.name: plan for plan in plan_shapes("24GB", ("context_length=8192",), lambda name: None).plans}
    assert plans["7b"].plan is None and "4096 tokens" in plans["7b"].helps[0]
    assert plans["8b"].plan is not None and plans["8b"].plan.context_length == 8192
    with pytest.raises(UsageError, match="context_length"):
        plan_shapes("24GB", ("context_length=x",), lambda name: None)


def test_the_encoder_of_a_file_is_counted(tmp_path: Path) -> None:
    text = build_tiny_model(tmp_path / "m.gguf", hidden=TEXT_WIDTH, heads=4, layers=2)
    projector = build_projector(tmp_path / "mmproj.gguf", "idefics3")
    needed = encoder_bytes(open_projector(projector), 8).total_bytes

    def encoders(*overrides: str) -> list[int]:
        found = plan_assumed("2x16GB@40GB/s/8", str(text), overrides)
        return [stage.encoder_bytes for stage in found.plan.stages if stage.encoder_bytes]

    assert encoders() == [needed] and encoders("mmproj=off") == []
    assert any("MiB encoder" in line for line in plan_assumed("16GB@40GB/s/8", str(text), ()).lines())
    projector.rename(projector.with_name("vision.gguf"))
    assert encoders() == [] and encoders(f"mmproj={projector.with_name('vision.gguf')}") == [needed]


def test_a_model_of_the_catalog_says_that_its_encoder_is_not_counted() -> None:
    seeing, reading = (plan_assumed("64GB@40GB/s", name, ()) for name in ("gemma-3-4b-it", "qwen3-4b"))
    text = "the encoder of images is counted once the model is downloaded"
    assert any(text in line for line in seeing.lines()) and any(text in line for line in seeing.json()["assumptions"])
    assert not any(text in line for line in reading.lines())
