"""GPT-2 and StarCoder 2: norms and matrices have biases, and the feed-forward network has no gate."""

from __future__ import annotations

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.lazy import Recent, transposed
from llamaclust.tools.convert.rotation import rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT


def build_gpt2(model: ConvertedModel) -> None:
    """Converts GPT-2, which has a table of positions and stores its matrices transposed."""
    settings, width = model.settings, model.width
    context = settings.count("n_ctx", "n_positions", maximum=1 << 20)
    if settings.flag("scale_attn_by_inverse_layer_idx") or not settings.flag("scale_attn_weights", default=True):
        raise settings.error("scale_attn_weights", "expected true, and false for scale_attn_by_inverse_layer_idx")
    decoder.activation(model, decoder.GELU, "activation_function")
    feed_forward = settings.count("n_inner", default=4 * width)
    model.key("block_count", model.layers)
    model.key("context_length", context)
    model.key("embedding_length", width)
    model.key("feed_forward_length", feed_forward)
    model.key("attention.head_count", model.heads)
    decoder.norm_epsilon(model, "layer_norm_epsilon")
    root = "transformer." if model.has("transformer.wte.weight") else ""
    model.copy("token_embd", f"{root}wte", model.words, width)
    model.copy("position_embd", f"{root}wpe", context, width)
    model.copy("output_norm", f"{root}ln_f", width, bias=True)
    model.output(tied=True)
    recent = Recent()
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"{root}h.{layer}"
        model.copy(f"{place}.attn_norm", f"{source}.ln_1", width, bias=True)
        model.copy(f"{place}.ffn_norm", f"{source}.ln_2", width, bias=True)
        for name, inner, rows, columns in (
            ("attn_qkv", "attn.c_attn", width, 3 * width),
            ("attn_output", "attn.c_proj", width, width),
            ("ffn_up", "mlp.c_fc", width, feed_forward),
            ("ffn_down", "mlp.c_proj", feed_forward, width),
        ):
            weight = model.take(f"{source}.{inner}.weight", rows, columns)
            model.put(f"{place}.{name}.weight", transposed(weight, recent))
            model.put(f"{place}.{name}.bias", model.take(f"{source}.{inner}.bias", columns))


def build_starcoder2(model: ConvertedModel) -> None:
    settings, hidden = model.settings, model.width
    width = settings.count("intermediate_size")
    decoder.activation(model, decoder.GELU, "hidden_act")
    decoder.usual_keys(model, width)
    if settings.has("sliding_window"):
        model.key("attention.sliding_window", settings.count("sliding_window", maximum=MAX_CONTEXT))
    decoder.norm_epsilon(model, "norm_epsilon", "layer_norm_epsilon")
    rotation(model, model.head_width, says_dimensions=False)
    model.copy("token_embd", "model.embed_tokens", model.words, hidden)
    model.copy("output_norm", "model.norm", hidden, bias=True)
    model.output(tied=True)
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        model.copy(f"{place}.attn_norm", f"{source}.input_layernorm", hidden, bias=True)
        model.copy(f"{place}.ffn_norm", f"{source}.post_attention_layernorm", hidden, bias=True)
        decoder.attention(model, layer)
        model.copy(f"{place}.ffn_up", f"{source}.mlp.c_fc", width, hidden, bias=None)
        model.copy(f"{place}.ffn_down", f"{source}.mlp.c_proj", hidden, width, bias=None)
