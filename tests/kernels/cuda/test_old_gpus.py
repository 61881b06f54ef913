"""Checks that GPUs without 8-bit matrix instructions (compute capability 6.1 to 7.2) give the CPU's bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.kernels import _native
from llamaclust.kernels.cuda.launches.attention import tile_rows
from llamaclust.kernels.cuda.launches.gpu_properties import LaunchLimits
from llamaclust.kernels.cuda.runtime.device import PLAIN_SHARED_BYTES
from llamaclust.kernels.cuda.runtime.sources import modules
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import Attention
from llamaclust.model.quant_types import QuantType
from support.arithmetic.matmul_cases import check_equal_bits, random_activations, random_weights
from support.cuda.attending import Attender, attention, latent, sequences_of
from support.cuda.launching import Bench
from support.cuda.product_cases import LEVEL, generator_of, load, none_numbers, products, segment_cols
from support.cuda.random_numbers import generator
from support.cuda.shim_device import ShimDevice

OLD = "-DLLAMACLUST_ARCH=610"
MODULES = ("matmul.simple", "matmul.k", "elementwise.quantize", "attention.tile", "attention.few", "attention.rows")
KINDS = (
    QuantType.Q4_0,
    QuantType.Q5_1,  # with mins
    QuantType.Q8_0,  # signed weights
    QuantType.Q2_K,  # mins of 16 sub-blocks
    QuantType.Q4_K,
    QuantType.Q6_K,  # scales of 16 columns
    QuantType.TQ2_0,  # no scales of sub-blocks
)
GPU = LaunchLimits(2, PLAIN_SHARED_BYTES, (6, 1))


@pytest.fixture(scope="module")
def device(build_shim: Callable[..., Path]) -> Iterator[ShimDevice]:
    """Overrides the `device` fixture of other tests."""
    library = build_shim({name: path for name, path in modules().items() if name in MODULES}, (OLD,))
    made = ShimDevice(library, compute_capability=GPU.compute_capability, shared_bytes=GPU.shared_bytes)
    yield made
    made.close()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_products_have_the_bits_of_the_cpu(bench: Bench, kind: QuantType) -> None:
    """Covers one, several and many rows."""
    out_rows, cols = 33, 3 * segment_cols(kind)
    source = generator_of(kind, out_rows, cols)
    loaded = load(bench, kind, random_weights(source, kind, out_rows, cols), out_rows, cols)
    for rows in (1, 2, 7, 66):
        x = random_activations(source, rows, cols)
        none_numbers(x, segment_cols(kind))
        expected = _native.matmul(LEVEL, loaded.on_cpu, x)
        for bucket in {rows, rows + 1}:
            got = products(bench, loaded.weights, x, bucket=bucket)
            check_equal_bits(got, expected, kind, rows, bucket)


@pytest.mark.parametrize("kv_type", KvType)
def test_attention_has_the_bits_of_the_cpu(bench: Bench, tmp_path: Path, kv_type: KvType) -> None:
    """Covers decoding and prefill with the shared memory of these GPUs, for heads as wide as it allows."""
    for head_dim in (64, 256):
        (told,) = sequences_of(tmp_path, attention(4, 1, head_dim, kv_type), (530,), generator())
        attender = Attender(bench, attention(4, 1, head_dim, kv_type), GPU)
        attender.fill(told, 500)
        attender.check([(told, range(500, 529))])
        attender.check([(told, range(529, 530))], one_row_each=True)
        assert {f"attention.tile.tile_{kv_type}_16", f"attention.few.few_{kv_type}_4"} <= attender.launched


@pytest.mark.parametrize("step", [attention(2, 1, 512), latent(4, 576, 512)], ids=["wide heads", "latent"])
def test_heads_that_need_more_shared_memory_are_refused(step: Attention) -> None:
    wide = f"heads of {step.head_dim} channels need 5[0-9] KiB of shared memory in a block, but this GPU has 48 KiB"
    with pytest.raises(ModelFileError, match=wide):
        tile_rows(step, GPU)
