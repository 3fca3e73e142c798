"""The families that GloBE must carry from end to end, each as a tiny configuration that its own config class accepts.

Every model has at least two layers with experts, and a dense layer and shared experts where the family can have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

E, P, D = 4, 24, 32
LAYERS = 3

COMMON: Mapping[str, Any] = {
    "vocab_size": 48,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.08,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LATENT: Mapping[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
_DEEPSEEK: Mapping[str, Any] = {
    **_LATENT,
    "n_routed_experts": E,
    "n_shared_experts": 1,
    "moe_intermediate_size": P,
    "intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LINEAR: Mapping[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "head_dim": 16,
    "num_experts": E,
    "moe_intermediate_size": P,
    "shared_expert_intermediate_size": 8,
}

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "qwen2_moe": {
        "num_experts": E,
        "moe_intermediate_size": P,
        "intermediate_size": 40,
        "shared_expert_intermediate_size": 8,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        "num_experts": E,
        "moe_intermediate_size": P,
        "intermediate_size": 40,
        "head_dim": 16,
        "mlp_only_layers": [1],
    },
    "qwen3_next": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "mixtral": {"num_local_experts": E, "intermediate_size": P},
    "olmoe": {"num_experts": E, "intermediate_size": P},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v4": {
        "num_local_experts": E,
        "moe_intermediate_size": P,
        "intermediate_size": P,
        "head_dim": 16,
        "q_lora_rank": 8,
        "o_lora_rank": 8,
        "o_groups": 2,
        "num_hash_layers": 1,
        "sliding_window": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "hc_mult": 2,
    },
    "glm4_moe": {
        "n_routed_experts": E,
        "n_shared_experts": 1,
        "moe_intermediate_size": P,
        "intermediate_size": 40,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": {"num_local_experts": E, "intermediate_size": P, "head_dim": 16, "sliding_window": 8},
    "minimax_m2": {"num_local_experts": E, "intermediate_size": P, "head_dim": 16},
    "hunyuan_v1_moe": {"num_experts": E, "intermediate_size": P, "head_dim": 16, "moe_topk": 2},
    "ernie4_5_moe": {
        "moe_num_experts": E,
        "moe_k": 2,
        "moe_intermediate_size": P,
        "intermediate_size": 40,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
    },
    "phimoe": {"num_local_experts": E, "intermediate_size": P},
    "granitemoe": {"num_local_experts": E, "intermediate_size": P},
    "lfm2_moe": {
        "num_experts": E,
        "moe_intermediate_size": P,
        "intermediate_size": 40,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "jamba": {
        "num_experts": E,
        "intermediate_size": P,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "llama4_text": {
        "num_local_experts": E,
        "intermediate_size": P,
        "intermediate_size_mlp": 40,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "head_dim": 16,
    },
    "longcat_flash": {
        **_LATENT,
        "n_routed_experts": E,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": P,
        "ffn_hidden_size": 40,
        "moe_topk": 2,
        "num_layers": LAYERS,
        "num_hidden_layers": 2 * LAYERS,
    },
}

COMPOSITES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": D,
            "num_position_embeddings": 16,
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "image_size": 8,
            "patch_size": 4,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    ),
}
"""Models of text and pictures: the family of their language model, and the configuration of their eyes."""


def settings(family: str) -> dict[str, Any]:
    """All settings of a family's tiny configuration."""
    if family not in COMPOSITES:
        return {**COMMON, **SETTINGS[family]}
    text, vision = COMPOSITES[family]
    return {"text_config": settings(text), "vision_config": dict(vision), "tie_word_embeddings": False}
