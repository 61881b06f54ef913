"""Models whose sequences have states: LFM2, Falcon H1, Granite 4.0 H, Nemotron H."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from support.models.originals.original import Original, keys, rope, without

_LFM2 = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}
_MAMBA = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_d_conv": 4}
_FALCON_H1 = keys(
    **_MAMBA | {"mamba_n_heads": 6, "mamba_d_ssm": 96, "mamba_d_head": 16},
    **rope("default"),
    head_dim=32,
    embedding_multiplier=2.5,
    lm_head_multiplier=0.4,
    key_multiplier=0.6,
    attention_in_multiplier=0.9,
    attention_out_multiplier=0.7,
    ssm_in_multiplier=1.3,
    ssm_out_multiplier=0.8,
    ssm_multipliers=[0.7, 1.2, 0.9, 1.4, 0.6],
    mlp_multipliers=[1.7, 0.5],
)
_GRANITE = keys(
    **_MAMBA,
    shared_intermediate_size=48,
    embedding_multiplier=3.0,
    attention_multiplier=0.4,
    residual_multiplier=0.7,
    logits_scaling=2.5,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)
_NEMOTRON = without(
    keys(
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=16,
        head_dim=32,
        layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
    ),
    "num_hidden_layers",
)
_NEMOTRON_MOE = _NEMOTRON | {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
}

RECURRENT_ORIGINALS: Mapping[str, Original] = MappingProxyType(
    {
        "lfm2": Original(
            "Lfm2ForCausalLM", keys(**_LFM2, **rope("default"), block_multiple_of=16, block_ffn_dim_multiplier=1.2)
        ),
        "lfm2-plain": Original(
            "Lfm2ForCausalLM",
            keys(**_LFM2, conv_L_cache=4, block_auto_adjust_ff_dim=False, tie_word_embeddings=False, norm_eps=1e-3),
        ),
        "lfm2moe": Original(
            "Lfm2MoeForCausalLM",
            keys(**_LFM2, num_dense_layers=1, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32),
        ),
        "falcon-h1": Original("FalconH1ForCausalLM", _FALCON_H1),
        "falcon-h1-norm": Original(
            "FalconH1ForCausalLM",
            _FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "tie_word_embeddings": True},
        ),
        "granitehybrid": Original("GraniteMoeHybridForCausalLM", _GRANITE | {"num_local_experts": 0}),
        "granitehybrid-experts": Original(
            "GraniteMoeHybridForCausalLM",
            _GRANITE | {"num_local_experts": 6, "num_experts_per_tok": 3, "position_embedding_type": "rope"},
        ),
        "granitehybrid-attention": Original(
            "GraniteMoeHybridForCausalLM",
            _GRANITE
            | {"num_local_experts": 0, "position_embedding_type": "rope", "layer_types": ["full_attention"] * 3},
        ),
        "nemotron_h": Original("NemotronHForCausalLM", _NEMOTRON),
        "nemotron_h_moe": Original("NemotronHForCausalLM", _NEMOTRON_MOE),
        "nemotron_h_moe-latent": Original(
            "NemotronHForCausalLM",
            _NEMOTRON_MOE | {"moe_latent_size": 32, "n_group": 2, "topk_group": 1, "norm_topk_prob": False},
        ),
    }
)
