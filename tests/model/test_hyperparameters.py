"""Tests of hyperparameters: golden values, defaults, and numbers out of bounds or in contradiction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model import model_keys
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import WritableValue, write_gguf
from llamaclust.model.hyperparameters import Hyperparameters, RopeScaling
from llamaclust.model.model_keys import ModelKeys, hyperparameters_of, read_hyperparameters
from support.paths import DATA

BASE: dict[str, WritableValue] = {
    "general.architecture": "llama",
    "llama.block_count": 4,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 100,
}


def read(folder: Path, **changes: WritableValue | None) -> Hyperparameters:
    """Reads hyperparameters with `changes` to keys of `llama.` (dots written __); None removes a key."""
    return read_hyperparameters(keys_of(folder, **changes).model)


def keys_of(folder: Path, **changes: WritableValue | None) -> ModelKeys:
    values = BASE | {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}
    path = folder / "m.gguf"
    write_gguf(path, {key: value for key, value in values.items() if value is not None}, [])
    return ModelKeys(open_model(path))


def test_golden_model() -> None:
    parameters = read_hyperparameters(open_model(DATA / "tiny/qwen2.gguf"))
    assert (parameters.architecture, parameters.block_count, parameters.embedding_length) == ("qwen2", 3, 256)
    assert (parameters.head_count, parameters.head_count_kv, parameters.key_length) == (8, 2, 32)
    assert (parameters.query_width, parameters.head_counts_kv, parameters.vocabulary_size) == (256, (2, 2, 2), 320)
    assert parameters.rope.frequency_base == 1e6 and parameters.rope.scaling is RopeScaling.NONE


def test_defaults(tmp_path: Path) -> None:
    parameters = read(tmp_path)
    assert (parameters.head_count_kv, parameters.key_length, parameters.rope.dimension_count) == (8, 8, 8)
    assert (parameters.rope.frequency_base, parameters.rope.factor) == (10000.0, 1.0)
    assert parameters.rope.original_context_length == 4096 and parameters.expert_count == 0
    assert parameters.sliding_window is None and read(tmp_path, attention__sliding_window=0).sliding_window is None


@pytest.mark.parametrize(
    ("key", "neutral", "other"),
    [
        ("attention__clamp_kqv", 0.0, 6.0),
        ("attention__scale", 0.0, 0.0078125),
        ("embedding_scale", 1.0, 12.0),
        ("expert_gating_func", 1, 2),
        ("logit_scale", 1.0, 0.0625),
        ("residual_scale", 1.0, np.array([1.0, 0.5], np.float32)),
        ("expert_group_count", 1, 8),
        ("expert_weights_scale", 1.0, 2.5),
        ("swiglu_clamp_exp", np.array([0.0, 0.0], np.float32), np.array([0.0, 7.0], np.float32)),
        ("attention__shared_kv_layers", 0, 15),
        ("attn_logit_softcapping", 0.0, "30"),
        ("logit_scale", 1.0, (np.ones(1, np.float32), np.ones(2, np.float32))),
    ],
)
def test_keys_that_would_change_the_arithmetic_are_refused(
    tmp_path: Path, key: str, neutral: WritableValue, other: WritableValue
) -> None:
    """Checks that neutral values are accepted, and that others are refused unless the architecture reads them."""
    name = key.replace("__", ".")
    keys_of(tmp_path, **{key: neutral}).refuse_unread()
    with pytest.raises(ModelFileError, match=rf"llama\.{name}': .* is not supported"):
        keys_of(tmp_path, **{key: other}).refuse_unread()


@pytest.mark.parametrize(
    ("value", "read_key"),
    [
        (4, lambda keys: keys.count("logit_scale", maximum=10)),
        (4.0, lambda keys: keys.real("logit_scale", minimum=0, maximum=10)),
        (True, lambda keys: keys.flag("logit_scale", False)),
        ("large", lambda keys: keys.text("logit_scale", "small")),
    ],
)
def test_a_key_that_is_read_is_not_refused(
    tmp_path: Path, value: WritableValue, read_key: Callable[[ModelKeys], object]
) -> None:
    keys = keys_of(tmp_path, logit_scale=value)
    assert read_key(keys) == value
    keys.refuse_unread()


def test_all_readers_record_their_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = "attention.sliding_window_pattern"
    monkeypatch.setattr(model_keys, "_NEUTRAL_VALUES", {"context_length": (0,), pattern: (0,)})
    keys = keys_of(tmp_path, attention__sliding_window_pattern=2)
    with pytest.raises(ModelFileError, match="is not supported"):
        keys.refuse_unread()
    assert keys.windowed_layers(2, 6) == [True, False]
    assert hyperparameters_of(keys).context_length == 4096
    keys.refuse_unread()


def test_flags(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, expert_weights_norm=True, bad=1)
    assert keys.flag("expert_weights_norm", False) and not keys.flag("other", False) and keys.flag("other", True)
    with pytest.raises(ModelFileError, match="bad': expected true or false, found '1'"):
        keys.flag("bad", False)


def test_layers_that_predict_further_tokens_are_kept_apart(tmp_path: Path) -> None:
    assert read(tmp_path, nextn_predict_layers=1).block_count == 3
    with pytest.raises(ModelFileError, match="nextn_predict_layers': expected 0 to 3, found 4"):
        read(tmp_path, nextn_predict_layers=4)


def test_sliding_window(tmp_path: Path) -> None:
    assert read(tmp_path, attention__sliding_window=4096).sliding_window == 4096
    with pytest.raises(ModelFileError, match=r"sliding_window': expected 0 to .*, found -1"):
        read(tmp_path, attention__sliding_window=-1)


def test_scaling(tmp_path: Path) -> None:
    yarn = read(
        tmp_path,
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=1024,
        rope__scaling__attn_factor=0.5,
    ).rope
    assert (yarn.scaling, yarn.factor, yarn.original_context_length, yarn.attention_factor) == ("yarn", 4.0, 1024, 0.5)
    assert (yarn.beta_fast, yarn.beta_slow, yarn.extrapolation_factor) == (32.0, 1.0, 1.0)
    assert read(tmp_path, rope__scaling__factor=2.0).rope.scaling is RopeScaling.LINEAR
    assert read(tmp_path, rope__scale_linear=2.0).rope.factor == 2.0
    unscaled = read(tmp_path, rope__scaling__type="none", rope__scaling__factor=8.0).rope
    assert (unscaled.scaling, unscaled.factor) == (RopeScaling.NONE, 1.0)


def test_numbers_may_be_given_for_each_layer(tmp_path: Path) -> None:
    counts, widths = np.array([2, 4, 0, 2, 8], np.uint32), np.array([64, 64, 32, 96], np.int32)
    found = read(tmp_path, attention__head_count_kv=counts, feed_forward_length=widths)
    assert found.head_counts_kv == (2, 4, 0, 2) and found.head_count_kv == 4
    assert found.feed_forward_lengths == (64, 64, 32, 96) and found.feed_forward_length == 96
    with pytest.raises(ModelFileError, match=r"embedding_length.*different values per layer"):
        read(tmp_path, embedding_length=np.array([64, 32, 64, 64], np.uint32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, r"llama\.block_count': missing"),
        ({"block_count": 0}, r"block_count': expected 1 to 1024, found 0"),
        ({"block_count": "4"}, "expected a whole number, found text"),
        ({"block_count": -3}, "expected 1 to .*, found -3"),
        ({"block_count": np.array([], np.uint32)}, "expected a whole number, found an array of uint32"),
        ({"block_count": np.array([1 << 31], np.uint32)}, "expected 1 to 1024, found 2147483648"),
        ({"embedding_length": 1 << 31}, "embedding_length': expected .*, found 2147483648"),
        ({"attention__head_count": 7}, "7 heads do not divide a width of 64"),
        ({"attention__head_count_kv": 3}, "3 KV heads do not divide 8 heads"),
        ({"attention__head_count_kv": 16}, "expected 0 to 8, found 16"),
        ({"attention__head_count_kv": 0}, "head_count_kv': the count is 0 in all layers"),
        (
            {"attention__head_count_kv": np.array([2, 2, 2], np.int32)},
            "expected 4 numbers, one for each layer, found 3",
        ),
        ({"attention__head_count_kv": np.array([2, 3, 2, 2], np.int32)}, "3 KV heads do not divide 8 heads"),
        ({"feed_forward_length": np.zeros(4, np.int32)}, "feed_forward_length': expected 1 to .*, found 0"),
        ({"attention__value_length": 16}, "expected 8, the length of keys, found 16"),
        ({"attention__layer_norm_rms_epsilon": 0.0}, "layer_norm_rms_epsilon': expected 1e-13 to 0.1, found 0"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "nan"),
        ({"rope__dimension_count": 10}, "expected 1 to 8, found 10"),
        ({"rope__dimension_count": 7}, "expected an even number, found 7"),
        ({"rope__freq_base": float("inf")}, "inf"),
        ({"rope__scaling__type": "dynamic"}, "'dynamic' is not supported"),
        ({"rope__scaling__factor": -1.0}, "expected 0 to .*, found -1"),
        ({"rope__scaling__factor": 1e-30}, "factor': expected 0 or at least 0.01, found 1e-30"),
        ({"expert_count": 4}, r"expert_used_count': missing"),
        ({"expert_count": 4, "expert_used_count": 5}, "expected 1 to 4, found 5"),
        ({"expert_count": 1024, "expert_used_count": 1024}, r"expert_used_count': expected 1 to 256, found 1024"),
        ({"expert_count": 0, "expert_used_count": 2}, "expected 0 to 0, found 2"),
        ({"vocab_size": None}, r"vocab_size': missing"),
        ({"vocab_size": 0}, "expected 1 to .*, found 0"),
    ],
)
def test_numbers_that_make_no_sense(tmp_path: Path, changes: dict[str, WritableValue | None], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        read(tmp_path, **changes)


def test_no_architecture_and_no_words(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {"a": 1}, [])
    with pytest.raises(ModelFileError, match=r"general\.architecture': missing"):
        read_hyperparameters(open_model(path))
    words: list[str] = []
    write_gguf(path, BASE | {"tokenizer.ggml.tokens": words}, [])
    with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.tokens': empty"):
        read_hyperparameters(open_model(path))
