"""Checks that merged matrices are W + scale * B @ A in float32, and that misfitting adapters are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.errors import LlamaclustError
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.tools.convert.conversion import convert
from llamaclust.tools.convert.formats.opening import Hints
from llamaclust.tools.convert.merging import merge_adapter
from llamaclust.tools.convert.vocabularies.templates import MORE_TEMPLATES
from support.models.checkpoint_files import safetensors_bytes, write_hugging_face, write_torch
from support.models.checkpoints.shapes import HEAD, HIDDEN, INNER, KV_HEADS, WORDS
from support.models.random_checkpoints import checkpoint, values
from support.models.tiny_tokenizers import tokenizer_json

RANK, ALPHA = 4, 6
PREFIX = "base_model.model.model.layers.0"
Arrays = dict[str, NDArray[np.float32]]


def base(folder: Path, case: str = "LlamaForCausalLM", **changed: Any) -> Arrays:
    config, tensors = checkpoint(case)
    if changed.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    write_hugging_face(folder, config | changed, tensors, shards=2)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return tensors


def factors(module: str, rows: int, columns: int, rank: int = RANK) -> Arrays:
    name = f"{PREFIX}.{module}"
    return {
        f"{name}.lora_{kind}.weight": values(f"{name}{kind}", shape)
        for kind, shape in (("A", (rank, columns)), ("B", (rows, rank)))
    }


def adapter(folder: Path, tensors: Arrays, *, torch: bool = False, **config: Any) -> Path:
    folder.mkdir()
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    if torch:
        write_torch(folder / "adapter_model.bin", tensors)
    else:
        (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


def merge(folder: Path, one: Path, name: str = "out.gguf", tokenizer: Path | None = None) -> Path:
    merge_adapter(folder / "base", one, folder / name, "f32", Hints(tokenizer), lambda done, total: None)
    return folder / name


def floats(model: ModelFile, name: str) -> NDArray[np.float32]:
    return np.frombuffer(model.tensor(name).read(), "<f4").reshape(model.tensor(name).shape)


def product(tensors: Mapping[str, NDArray[np.float32]], module: str) -> NDArray[np.float64]:
    name = f"{PREFIX}.{module}.lora"
    return tensors[f"{name}_B.weight"].astype(np.float64) @ tensors[f"{name}_A.weight"]


@pytest.mark.parametrize("torch", [False, True], ids=["safetensors", "torch"])
@pytest.mark.parametrize("rslora", [False, True])
def test_products_are_added(torch: bool, rslora: bool, tmp_path: Path) -> None:
    weights = base(tmp_path / "base")
    parts = factors("mlp.up_proj", INNER, HIDDEN) | factors("self_attn.k_proj", KV_HEADS * HEAD, HIDDEN)
    model = open_model(merge(tmp_path, adapter(tmp_path / "a", parts, torch=torch, use_rslora=rslora)))
    scale = ALPHA / (RANK**0.5 if rslora else RANK)
    wanted = weights["model.layers.0.mlp.up_proj.weight"] + scale * product(parts, "mlp.up_proj")
    np.testing.assert_allclose(floats(model, "blk.0.ffn_up.weight"), wanted, atol=3e-6)
    key = weights["model.layers.0.self_attn.k_proj.weight"] + scale * product(parts, "self_attn.k_proj")
    pairs = key.reshape(KV_HEADS, 2, HEAD // 2, HIDDEN).swapaxes(1, 2).reshape(key.shape)
    np.testing.assert_allclose(floats(model, "blk.0.attn_k.weight"), pairs, atol=3e-6)
    untouched = weights["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(floats(model, "blk.1.ffn_up.weight"), untouched)


HEAD_ALONE = {"base_model.model.lm_head.weight": values("head", (WORDS, HIDDEN))}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parts", [factors("mlp.down_proj", HIDDEN, INNER), HEAD_ALONE], ids=["factors", "head"])
def test_a_folder_becomes_the_same_file_as_the_way_straight_to_it(parts: Arrays, tied: bool, tmp_path: Path) -> None:
    base(tmp_path / "base", tie_word_embeddings=tied)
    one = adapter(tmp_path / "a", parts)
    folder = merge(tmp_path, one, "merged")
    straight, around = merge(tmp_path, one), tmp_path / "around.gguf"
    convert(folder, around, "f32", Hints(), lambda done, total: None, None)
    assert ("output.weight" in open_model(straight).tensors) == (not tied or parts is HEAD_ALONE)
    wanted = open_model(straight)
    assert {n: t.read() for n, t in open_model(around).tensors.items()} == {
        n: t.read() for n, t in wanted.tensors.items()
    }
    with pytest.raises(LlamaclustError, match="already exists"):
        merge(tmp_path, one, "merged")


@pytest.mark.parametrize("name", ["tokenizer.json", "mine.json"])
def test_a_given_tokenizer_replaces_the_others(name: str, tmp_path: Path) -> None:
    base(tmp_path / "base")
    one = adapter(tmp_path / "a", factors("mlp.up_proj", INNER, HIDDEN))
    for place in (tmp_path / "base", one):
        (place / "tokenizer.json").write_text("another")
    given = tmp_path / name
    given.write_text(tokenizer_json())
    for out in ("out.gguf", "merged"):
        merge(tmp_path, one, out, given)
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == tokenizer_json()


def test_named_templates_are_in_the_merged_folder(tmp_path: Path) -> None:
    base(tmp_path / "base")
    one = adapter(tmp_path / "a", factors("mlp.up_proj", INNER, HIDDEN))
    texts = {"chat_template.jinja": "{{ 1 }}", f"{MORE_TEMPLATES}/rag.jinja": "{{ 2 }}"}
    (tmp_path / "base" / MORE_TEMPLATES).mkdir()
    for name, text in texts.items():
        (tmp_path / "base" / name).write_text(text)
    merged = merge(tmp_path, one, "merged")
    assert {name: (merged / name).read_text() for name in texts} == texts


@pytest.mark.parametrize("given", [None, "none.json"])
@pytest.mark.parametrize("out", ["out.gguf", "merged"])
def test_a_merge_without_a_tokenizer_is_refused(out: str, given: str | None, tmp_path: Path) -> None:
    base(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    one = adapter(tmp_path / "a", factors("mlp.up_proj", INNER, HIDDEN))
    with pytest.raises(LlamaclustError, match=r"tokenizer|none\.json"):
        merge(tmp_path, one, out, None if given is None else tmp_path / given)
    assert not (tmp_path / out).exists()


def test_added_words_replace_embedding_and_head(tmp_path: Path) -> None:
    """Checks an adapter like Chinese-LLaMA's: both matrices whole, with more rows, and a tokenizer."""
    base(tmp_path / "base")
    ends = {name: values(name, (WORDS + 9, HIDDEN)) for name in ("embed_tokens", "lm_head")}
    parts = {
        "base_model.model.model.embed_tokens.weight": ends["embed_tokens"],
        "base_model.model.lm_head.modules_to_save.default.weight": ends["lm_head"],
        **factors("mlp.up_proj", INNER, HIDDEN),
    }
    one = adapter(tmp_path / "a", parts, modules_to_save=["embed_tokens", "lm_head"])
    (one / "tokenizer.json").write_text(tokenizer_json(WORDS + 9))
    model = open_model(merge(tmp_path, one))
    np.testing.assert_array_equal(floats(model, "token_embd.weight"), ends["embed_tokens"])
    np.testing.assert_array_equal(floats(model, "output.weight"), ends["lm_head"])
    assert len(model.metadata_strings("tokenizer.ggml.tokens")) == WORDS + 9 == model.metadata["llama.vocab_size"]


def test_exchanged_matrices_and_ranks_of_their_own(tmp_path: Path) -> None:
    weights = base(tmp_path / "base", "GPT2LMHeadModel")
    name = "base_model.model.h.0.mlp.c_fc"
    left, right = values("left", (4 * HIDDEN, 2)), values("right", (2, HIDDEN))
    parts = {f"{name}.lora_A.weight": right, f"{name}.lora_B.weight": left}
    special: dict[str, Any] = {"rank_pattern": {"c_fc": 2}, "alpha_pattern": {"mlp.c_fc": 10}}
    model = open_model(merge(tmp_path, adapter(tmp_path / "a", parts, fan_in_fan_out=True, **special)))
    wanted = weights["h.0.mlp.c_fc.weight"].T + 5.0 * (left @ right)
    np.testing.assert_allclose(floats(model, "blk.0.ffn_up.weight"), wanted, atol=3e-6)


@pytest.mark.parametrize(
    ("parts", "config", "message"),
    [
        (factors("mlp.up_proj", INNER, HIDDEN), {"peft_type": "LOHA"}, "'LOHA' is not supported; expected LORA"),
        (factors("mlp.up_proj", INNER, HIDDEN), {"use_dora": True}, "'use_dora': this setting is not supported"),
        (factors("mlp.up_proj", INNER, HIDDEN), {"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        (factors("mlp.up_proj", INNER, HIDDEN), {"alpha_pattern": {r"layers\.\d+": 9}}, "expected the end of a module"),
        (factors("mlp.up_proj", INNER, HIDDEN), {"r": 8}, "expected rank 8 as in adapter_config.json, found 4"),
        (factors("mlp.up_proj", INNER, HIDDEN), {"r": -4}, "expected a whole number of 1 to 65536, found -4"),
        (factors("mlp.up_proj", INNER + 1, HIDDEN), {}, r"expected shape \[96, 64\] as in the base, found \[97, 64\]"),
        (factors("mlp.other", INNER, HIDDEN), {}, "the base has no tensor"),
        (dict(list(factors("mlp.up_proj", INNER, HIDDEN).items())[:1]), {}, "has only A"),
        (
            {"base_model.model.model.embed_tokens.weight": values("e", (WORDS, 32))},
            {},
            "the adapter belongs to another model",
        ),
        (
            {f"{PREFIX}.mlp.up_proj.lora_magnitude_vector": values("m", (4,))},
            {},
            "neither a LoRA factor nor a weight",
        ),
    ],
)
def test_adapters_that_do_not_fit(parts: Arrays, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    base(tmp_path / "base")
    one = adapter(tmp_path / "a", parts, **config)
    for name in ("out.gguf", "folder"):
        with pytest.raises(LlamaclustError, match=message):
            merge(tmp_path, one, name)
        assert not (tmp_path / name).exists()
