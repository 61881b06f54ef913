"""Tests of projector files: their numbers, refused files, and random damage."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError, RequestError
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.model_keys import read_hyperparameters
from llamaclust.model.projectors.projector import open_projector
from llamaclust.model.projectors.tiles import TileReader
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import RandomTensor, build_tiny_model, matrix
from support.models.vision.encoded_tiles import encoded
from support.models.vision.tiny_projectors import FFN, PATCH, PROJECTORS, TEXT_WIDTH, WIDTH, build_projector, tile_of


def test_numbers(tmp_path: Path) -> None:
    projector = open_projector(build_projector(tmp_path / "p.gguf", "qwen3vl_merger"))
    assert (projector.name, projector.width, projector.levels) == ("qwen3vl_merger", TEXT_WIDTH, 3)
    assert (projector.patch_size, projector.merge, projector.is_bidirectional) == (PATCH, 2, False)
    assert projector.images.mean == pytest.approx((0.5, 0.4, 0.3))
    assert (projector.images.min_pixels, projector.images.max_pixels) == (8 * 64, 4096 * 64)
    assert projector.identity == open_model(tmp_path / "p.gguf").identity
    assert open_projector(build_projector(tmp_path / "g.gguf", "gemma3")).is_bidirectional


@pytest.mark.parametrize("name", PROJECTORS)
def test_every_tensor_is_used(name: str, tmp_path: Path) -> None:
    """Checks that a missing tensor (except image breaks) is refused or changes rows, and that others are refused."""
    file = open_model(build_projector(tmp_path / "whole.gguf", name))
    rows = encoded(ReferenceBackend(), file.path, tile_of(name))
    for tensor in sorted(file.tensors):
        if tensor.startswith("v.blk.") and not tensor.startswith("v.blk.1."):
            continue
        path = build_projector(tmp_path / "part.gguf", name, without=(tensor,))
        try:
            found = encoded(ReferenceBackend(), path, tile_of(name))
        except ModelFileError as error:
            assert "\n" not in str(error)
            continue
        is_equal = found.shape == rows.shape and bool((found == rows).all())
        assert is_equal == (tensor == "v.token_embd.img_break"), tensor
    more = RandomTensor("v.blk.0.new.weight", (WIDTH,), 1.0, exact=True)
    with pytest.raises(ModelFileError, match=r"v.blk.0.new.weight': projector .* has no such tensor"):
        open_projector(build_projector(tmp_path / "more.gguf", name, added=(more,)))


def test_tensors_of_an_encoder_of_sound_are_left_alone(tmp_path: Path) -> None:
    sound = RandomTensor("a.blk.0.ln1.weight", (WIDTH,), 1.0, exact=True)
    path = build_projector(
        tmp_path / "p.gguf",
        "gemma3",
        added=(sound,),
        without=("clip.projector_type",),
        keys={"vision.projector_type": "gemma3", "has_audio_encoder": True},
    )
    assert sound.name not in open_projector(path).tensors


def test_keys_of_llava_do_not_matter_to_qwen_2_5(tmp_path: Path) -> None:
    """Checks keys that early converters wrote."""
    name = "qwen2.5vl_merger"
    keys: dict[str, WritableValue] = {
        "vision.feature_layer": np.array([1, 3], np.int32),
        "vision.image_grid_pinpoints": np.array([336, 672, 672, 336], np.int32),
        "vision.mm_patch_merge_type": "spatial_unpad",
    }
    paths = build_projector(tmp_path / "p.gguf", name), build_projector(tmp_path / "keys.gguf", name, keys=keys)
    plain, with_keys = (encoded(ReferenceBackend(), path, tile_of(name)) for path in paths)
    np.testing.assert_array_equal(plain, with_keys)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("gemma3", "v.post_ln.weight"),
        ("gemma4v", "v.std_bias"),
        ("internvl", "v.position_embd.weight"),
        ("kimivl", "mm.1.weight"),
        ("lfm2", "v.position_embd.weight"),
        ("llama4", "v.class_embd"),
        ("pixtral", "mm.input_norm.weight"),
        ("qwen3vl_merger", "v.blk.1.attn_qkv.bias"),
    ],
)
@pytest.mark.parametrize("added", [1, 2])
def test_outer_dimensions_of_1_are_ignored(name: str, tensor: str, added: int, tmp_path: Path) -> None:
    file = open_model(build_projector(tmp_path / "p.gguf", name))
    sources = [
        TensorSource(each.name, each.quant_type, (1,) * (added if each.name == tensor else 0) + each.shape, each.read)
        for each in file.tensors.values()
    ]
    write_gguf(tmp_path / "ones.gguf", file.metadata, sources)
    plain, ones = (encoded(ReferenceBackend(), tmp_path / each, tile_of(name)) for each in ("p.gguf", "ones.gguf"))
    np.testing.assert_array_equal(plain, ones)


@pytest.mark.parametrize("name", ["gemma3", "idefics3", "qwen2.5vl_merger"])
def test_up_and_down_may_be_exchanged(name: str, tmp_path: Path) -> None:
    """Checks files from before April 2025, which have the two exchanged."""
    file = open_model(build_projector(tmp_path / "p.gguf", name))
    parts = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    old = re.compile("|".join(parts))
    sources = [
        TensorSource(old.sub(lambda found: parts[found[0]], tensor.name), tensor.quant_type, tensor.shape, tensor.read)
        for tensor in file.tensors.values()
    ]
    write_gguf(tmp_path / "old.gguf", file.metadata, sources)
    assert open_model(tmp_path / "old.gguf").tensor("v.blk.0.ffn_up.weight").shape == (WIDTH, FFN)
    new, rows = (encoded(ReferenceBackend(), tmp_path / each, tile_of(name)) for each in ("p.gguf", "old.gguf"))
    np.testing.assert_array_equal(new, rows)


@pytest.mark.parametrize(
    ("name", "keys", "without", "message"),
    [
        (
            "gemma3",
            {"projector_type": "resampler"},
            "",
            "projector_type': 'resampler' is not supported; supported: gemma3, ",
        ),
        ("gemma3", {"has_vision_encoder": False}, "", "has no image encoder"),
        ("gemma3", {"use_silu": True}, "", "use_gelu and use_silu are both true"),
        ("gemma3", {"vision.attention.head_count": 5}, "", "5 heads do not divide a width of 64"),
        ("pixtral", {"vision.attention.head_count": 32}, "", "into multiples of 4 channels"),
        ("gemma3", {"vision.image_size": 40}, "", "image_size': expected a multiple of 16"),
        ("gemma3", {"vision.image_size": 48}, "", "v.position_embd.weight: expected shape [64, 144], found [64, 64]"),
        (
            "gemma3",
            {"vision.image_std": np.array([0, 1, 1], np.float32)},
            "",
            "expected three numbers from 0.001 to 10, found 0, 1, 1",
        ),
        (
            "gemma3",
            {"vision.image_mean": np.array([0], np.float32)},
            "",
            "expected 3 numbers, one for each layer, found 1",
        ),
        ("gemma3", {"vision.block_count": 3}, "", "v.blk.2.ln1.weight': missing"),
        ("gemma3", {"vision.block_count": 1}, "", "v.blk.1.attn_k.bias': projector gemma3 has no such tensor"),
        ("gemma3", {"vision.feature_layer": 1}, "", "feature_layer': the key is not supported"),
        ("gemma3", {}, "v.post_ln.weight", "v.post_ln.weight': missing"),
        ("gemma3", {}, "clip.vision.patch_size", "patch_size': missing"),
        ("idefics3", {}, "clip.vision.projector.scale_factor", "scale_factor': missing"),
        ("pixtral", {"vision.spatial_merge_size": 3}, "", "expected a multiple of 9 columns, found 256"),
        ("qwen2.5vl_merger", {}, "clip.vision.n_wa_pattern", "n_wa_pattern': missing"),
        (
            "qwen2.5vl_merger",
            {"vision.image_min_pixels": 1 << 20},
            "",
            "found 1048576; the limit is 262144 (image_max_pixels)",
        ),
        ("qwen3vl_merger", {}, "v.position_embd.weight", "v.position_embd.weight': missing"),
        ("qwen3vl_merger", {}, "v.deepstack.1.norm.weight", "v.deepstack.1.norm.weight': missing"),
        (
            "qwen3vl_merger",
            {"vision.is_deepstack_layers": np.array([True, False, False])},
            "",
            "1 layers, but 2 layers have tensors",
        ),
        ("qwen3vl_merger", {}, "v.deepstack.0.fc2.weight", "v.deepstack.0.fc2.weight': missing"),
        ("gemma4v", {"vision.image_max_pixels": 1 << 20}, "", "found [64, 16, 2]"),
        ("internvl", {}, "v.class_embd", "v.class_embd': missing"),
    ],
)
def test_refused(name: str, keys: dict[str, WritableValue], without: str, message: str, tmp_path: Path) -> None:
    path = build_projector(tmp_path / "p.gguf", name, keys=keys, without=(without,))
    with pytest.raises(ModelFileError) as error:
        open_projector(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (("input_min",), "v.blk.1.ffn_down.input_max': missing"),
        (("input_min", "input_max", "output_max"), "v.blk.1.ffn_down.output_min': missing"),
        (("output_max",), "v.blk.1.ffn_down.output_max': projector gemma4v has no such tensor"),
    ],
)
def test_some_limits_without_others_are_refused(present: tuple[str, ...], message: str, tmp_path: Path) -> None:
    limits = tuple(RandomTensor(f"v.blk.1.ffn_down.{end}", (1,), 1.0, exact=True) for end in present)
    with pytest.raises(ModelFileError, match=re.escape(message)):
        open_projector(build_projector(tmp_path / "p.gguf", "gemma4v", added=limits))


def test_levels_of_another_width_are_refused(tmp_path: Path) -> None:
    name, kept = "v.deepstack.1.fc2", WIDTH * 4
    narrow = (matrix(name, TEXT_WIDTH // 2, kept), RandomTensor(f"{name}.bias", (TEXT_WIDTH // 2,), 0.2, exact=True))
    without = tuple(tensor.name for tensor in narrow)
    with pytest.raises(
        ModelFileError, match=r"v.deepstack.1.fc2.weight: expected shape \[256, 96\], found \[256, 48\]"
    ):
        open_projector(build_projector(tmp_path / "p.gguf", "qwen3vl_merger", without=without, added=narrow))


def test_a_text_model_is_no_projector(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"'llama', but a projector has 'clip'; give the mmproj file"):
        open_projector(build_tiny_model(tmp_path / "text.gguf"))


def test_the_projector_of_another_model(tmp_path: Path) -> None:
    text = open_model(build_tiny_model(tmp_path / "text.gguf", hidden=128))
    projector = open_projector(build_projector(tmp_path / "p.gguf", "idefics3"))
    with pytest.raises(
        ModelFileError, match=r"rows have 96 channels, but the text model's have 128; give the projector"
    ):
        projector.check_text_model(text, read_hyperparameters(text))
    text = open_model(build_tiny_model(tmp_path / "text.gguf", hidden=TEXT_WIDTH, heads=4))
    projector.check_text_model(text, read_hyperparameters(text))
    levels = open_projector(build_projector(tmp_path / "levels.gguf", "qwen3vl_merger"))
    with pytest.raises(ModelFileError, match=r"rows for 2 first layers \(deepstack\), but the text model takes 0"):
        levels.check_text_model(text, read_hyperparameters(text))


def test_deepstack_levels_of_the_text_model(tmp_path: Path) -> None:
    text = open_model(build_architecture(tmp_path / "text.gguf", "qwen3vl"))
    width = read_hyperparameters(text).embedding_length
    projector = open_projector(build_projector(tmp_path / "p.gguf", "qwen3vl_merger"))
    with pytest.raises(ModelFileError, match=f"its rows have {TEXT_WIDTH} channels, but the text model's have {width}"):
        projector.check_text_model(text, read_hyperparameters(text))


@pytest.mark.parametrize(
    ("name", "height", "width", "message"),
    [
        ("gemma3", 32, 48, "an image tile must have 32 x 32 pixels, but has 48 x 32"),
        ("qwen2.5vl_merger", 12, 16, "sides in multiples of 8 and at most 262144 pixels, but has 16 x 12"),
        ("qwen2.5vl_merger", 0, 16, "an image tile must have .*, but has 16 x 0;"),
        ("qwen2.5vl_merger", 520, 512, "an image tile must have .*, but has 512 x 520;"),
    ],
)
def test_tiles_of_another_size_are_refused(name: str, height: int, width: int, message: str, tmp_path: Path) -> None:
    reader = TileReader(open_projector(build_projector(tmp_path / "p.gguf", name)))
    with pytest.raises(RequestError, match=message):
        reader.inputs(np.zeros((height, width, 3), np.uint8))
