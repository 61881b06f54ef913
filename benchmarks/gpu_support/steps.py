"""The steps of a first run on a new GPU, in their order."""

from __future__ import annotations

from dataclasses import dataclass

_TESTS = "tests/kernels/cuda"
_PROCESSES = 8
"""The number of test processes. Each takes some hundred MiB of GPU memory and mostly waits for results of the CPU."""
_TEST_S = 30
"""The maximum seconds of a test, after which its process is replaced. A test of a cluster starts several processes."""
DIFFERENT = 3
"""The exit status of a vital step whose only failure is wrong bits."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step. `command` may contain {models}, {results}, {run}, {sources} and {llama}. The command `needs` writes the
    step's model."""

    name: str
    expected_s: int  # The step begins only if so much time is left.
    maximum_s: int
    command: str
    needs: str = ""
    model: str = ""  # Name of the step's model in the folder of models.
    is_vital: bool = False  # True if no other step can pass without this step, which each call repeats.


def _tests(name: str, expected_s: int, maximum_s: int, *files: str, test_s: int = _TEST_S) -> Step:
    options = (
        f"--gpu --results {{results}}/{name}.jsonl --sources {{sources}} --timeout {test_s} --timeout-method thread"
    )
    paths = " ".join(f"{_TESTS}/{file}" for file in files)
    # Processes get one test after another, so that the first tests are the failed and the short ones.
    command = f"python -m pytest {paths} {options} -n {_PROCESSES} --dist load --maxschedchunk 1"
    return Step(name, expected_s, maximum_s, command)


def _sanitizer(name: str, expected_s: int, maximum_s: int, tool: str) -> Step:
    options = f"--tool {tool} --error-exitcode 9 --log-file {{run}}.{tool}"
    cases = " ".join(f"'{_TESTS}/{case}'" for case in _CASES)
    return Step(name, expected_s, maximum_s, f"compute-sanitizer {options} python -m pytest -v {cases} --gpu")


def _benchmark(name: str, expected_s: int, maximum_s: int, model: tuple[str, str], options: str = "") -> Step:
    (file, writer), record = model, "--record {run}"
    command = f"python benchmarks/gpu.py {{models}}/{file} {record} {options}".rstrip()
    return Step(name, expected_s, maximum_s, command, f"python benchmarks/{writer}", file)


_7B = "7b.gguf", "shape.py 7b Q4_K {models}/7b.gguf --alike"
_MIXTURE = "mixture.gguf", "public_shape.py qwen3-30b-a3b:q4_k_m {models}/mixture.gguf --layers 32"
_LONG = "long.gguf", "shape.py 7b Q4_K {models}/long.gguf --alike --kv-heads 8 --context 40000"
_70B = "70b.gguf", "shape.py 70b Q4_K {models}/70b.gguf --alike"

_CASES = (
    "test_rows.py::test_rms_norm[100]",
    "test_fused.py::test_sum_norm_and_quantization[sum-256]",
    "test_fused.py::test_spans_together_and_quantization[True-step0-Q8_32]",
    "test_products.py::test_one_wrong_bit_of_a_weight_is_noticed[2-Q4_K]",
    "test_products.py::test_one_wrong_bit_of_a_weight_is_noticed[66-Q4_K]",
    "test_products.py::test_lines_of_experts[8-1-no bias-Q4_K]",
    "test_attention.py::test_shared_blocks",
    "test_latent.py::test_decoding_and_prefill[whole tiles-few heads]",
    "test_experts.py::test_ties_go_to_the_lower_id_and_no_numbers_to_the_first",
    "test_states.py::test_scans[4-64-1-128]",
)
"""Short tests of each family of kernels."""
_ALL_KERNELS = ("rows", "products", "attention", "latent", "experts", "states", "fused")
_STAGES = ("test_stage.py", "test_stage_load.py", "stages", "test_invariance_stages.py")
_PLACEMENT = ("placement", "test_probe.py", "test_local.py")
_BENCHMARKS = ("benchmarks/test_gpu_benchmark.py", "benchmarks/test_gpu_mixtures.py")
_ONE_KERNEL = "python benchmarks/gpu_support/one_kernel.py"

STEPS = (
    Step("gpu", 20, 60, _ONE_KERNEL, is_vital=True),
    Step("modules", 10, 240, f"{_ONE_KERNEL} --modules"),
    _tests("kernels", 120, 180, *(f"test_{name}.py" for name in _ALL_KERNELS)),
    _tests("stages", 90, 120, *_STAGES),
    _benchmark("7b", 80, 120, _7B, "--repeats 3"),
    _sanitizer("sanitizer", 60, 90, "memcheck"),
    _benchmark("mixture", 100, 240, _MIXTURE, "--repeats 3"),
    _benchmark("70b", 150, 400, _70B, "--gpu-memory 24GiB --repeats 3"),
    _benchmark("long", 60, 240, _LONG, "--prompt 32768 --sequences 1 --repeats 1"),
    _tests("placement", 60, 240, *_PLACEMENT, test_s=120),
    _tests("clusters", 90, 240, "test_cluster.py", *_BENCHMARKS, test_s=120),
    _tests("groups", 60, 240, "groups", test_s=120),
    _benchmark("mixture-ram", 90, 240, _MIXTURE, "--cpu-moe --experts-cache 0 --repeats 3"),
    _benchmark("mixture-copies", 90, 240, _MIXTURE, "--cpu-moe --experts-cache 6GiB --repeats 3"),
    _benchmark("mixture-products", 60, 240, _MIXTURE, "--no-graphs --repeats 1 --generate 16 --prompt 2048"),
    _benchmark("7b-no-graphs", 40, 120, _7B, "--no-graphs --repeats 2"),
    _sanitizer("races", 60, 240, "racecheck"),
)
LLAMA_STEPS = (_benchmark("7b-llama", 120, 400, _7B, "--llama-bench {llama} --repeats 3"),)
