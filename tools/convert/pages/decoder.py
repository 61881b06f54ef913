"""Names of layers and their parts, shared by architectures derived from Hugging Face's LLaMA."""

from __future__ import annotations

from llamaclust.tools.convert.lazy import stacked
from llamaclust.tools.convert.page import SILU, Page, neighbours


def ends(page: Page) -> None:
    """Embedding, output norm and output matrix."""
    page.copy("token_embd", "model.embed_tokens", page.words, page.width)
    page.copy("output_norm", "model.norm", page.width)
    page.output()


def norms(page: Page, layer: int) -> None:
    page.copy(f"blk.{layer}.attn_norm", f"model.layers.{layer}.input_layernorm", page.width)
    page.copy(f"blk.{layer}.ffn_norm", f"model.layers.{layer}.post_attention_layernorm", page.width)


def attention(page: Page, layer: int, *, bias: bool | None = None, pairs: bool = False) -> None:
    """`pairs`: Q and K are permuted for rotation of neighbouring channels."""
    place, source = f"blk.{layer}", f"model.layers.{layer}.self_attn"
    for part, heads in (("q", page.heads), ("k", page.kv_heads), ("v", page.kv_heads)):
        rows = heads * page.head_width
        page.copy(f"{place}.attn_{part}", f"{source}.{part}_proj", rows, page.width, bias=bias)
        if pairs and part != "v":
            for suffix in ("weight", "bias"):
                name = f"{place}.attn_{part}.{suffix}"
                if name in page.tensors:
                    page.tensors[name] = neighbours(page.tensors[name], heads)
    page.copy(f"{place}.attn_output", f"{source}.o_proj", page.width, page.heads * page.head_width, bias=None)


def feed_forward(page: Page, layer: int, width: int, *, source: str = "mlp", suffix: str = "") -> None:
    prefix = f"model.layers.{layer}.{source}"
    page.copy(f"blk.{layer}.ffn_gate{suffix}", f"{prefix}.gate_proj", width, page.width, bias=None)
    page.copy(f"blk.{layer}.ffn_up{suffix}", f"{prefix}.up_proj", width, page.width, bias=None)
    page.copy(f"blk.{layer}.ffn_down{suffix}", f"{prefix}.down_proj", page.width, width, bias=None)


def experts(page: Page, layer: int, count: int, width: int, names: tuple[str, str, str], prefix: str) -> None:
    """The matrices of all experts as one tensor a part; `names` of gate, up and down."""
    shapes = ((width, page.width), (width, page.width), (page.width, width))
    for part, name, shape in zip(("gate", "up", "down"), names, shapes, strict=True):
        found = [page.take(f"{prefix}.{number}.{name}.weight", *shape) for number in range(count)]
        page.put(f"blk.{layer}.ffn_{part}_exps.weight", stacked(found))


def feed_forward_width(page: Page) -> int:
    """The width of the inner layer; its activation is SiLU."""
    page.activation(SILU, "hidden_act")
    return page.settings.count("intermediate_size", "n_inner")
