"""The checkpoints of the parity tests: configs, seeds, tokens."""
import numpy as np

from checkpoint import words


def config(layers, hidden, vocab, heads, kv, swa_kv, qk, v, window, pattern, moe, dense, inner, experts, top_k, **more):
    """A config.json with the published keys."""
    base = {
        "model_type": "mimo_v2_flash", "num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": vocab,
        "hybrid_layer_pattern": pattern, "moe_layer_freq": moe, "num_attention_heads": heads, "num_key_value_heads": kv,
        "head_dim": qk, "v_head_dim": v, "rope_theta": 1000000, "add_full_attention_sink_bias": False,
        "swa_num_attention_heads": heads, "swa_num_key_value_heads": swa_kv, "swa_head_dim": qk, "swa_v_head_dim": v,
        "swa_rope_theta": 10000, "add_swa_attention_sink_bias": True, "sliding_window": window,
        "sliding_window_size": window, "partial_rotary_factor": 0.334, "attention_bias": False,
        "attention_value_scale": 0.707, "attention_projection_layout": "split", "intermediate_size": dense,
        "moe_intermediate_size": inner, "n_routed_experts": experts, "num_experts_per_tok": top_k, "hidden_act": "silu",
        "n_shared_experts": None, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": None, "layernorm_epsilon": 1e-5,
        "max_position_embeddings": 1024, "eos_token_id": 0, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    base.update(more)
    return base


# Expressible in transformers: split q/k/v, sliding layers with twice the KV heads.
HF_CASES = {
    "small": (config(3, 64, 64, 4, 1, 2, 24, 16, 8, [0, 1, 0], [0, 1, 1], 96, 32, 8, 2), 1, 40),
    "deep": (config(6, 96, 48, 8, 2, 4, 36, 24, 5, [0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], 128, 64, 16, 4,
                    attention_value_scale=0.612, rope_theta=5000000), 2, 48),
    "sliding": (config(2, 32, 80, 2, 1, 2, 48, 32, 16, [1, 1], [1, 1], 64, 32, 4, 1, layernorm_epsilon=1e-6), 3, 60),
    "unnormed": (config(4, 64, 56, 8, 4, 8, 60, 40, 3, [0, 1, 1, 0], [0, 0, 1, 1], 160, 96, 12, 3, norm_topk_prob=False,
                        routed_scaling_factor=2.5), 4, 33),
    "pages": (config(3, 64, 40, 8, 2, 4, 24, 24, 70, [0, 1, 1], [0, 1, 1], 96, 32, 8, 2), 5, 160),
}

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "ignored_layers": ["model.decoder.self_attn.o_proj"]}

# Pro's geometry: equal KV heads in both kinds of layer, fused qkv chunks (424 rows: 4 scale rows, the last short), FP8, MXFP4.
PRO = config(5, 160, 72, 16, 4, 4, 72, 64, 21, [0, 1, 1, 0, 1], [0, 1, 1, 1, 1], 288, 96, 16, 4, model_type="mimo_v2",
             attention_value_scale=0.612, attention_projection_layout="fused_qkv",
             quantization_config=dict(FP8, store_dtype="mxfp4", mxfp4_block_size=32))
# V2.5: two KV heads a chunk in sliding layers, one in full ones, FP8 experts.
OMNI = config(3, 128, 64, 8, 2, 4, 48, 32, 9, [0, 1, 1], [0, 1, 1], 160, 64, 8, 2, model_type="mimo_v2",
              attention_projection_layout="fused_qkv", quantization_config=FP8)
NUMPY_CASES = {"pro": (PRO, 6, 80), "omni": (OMNI, 7, 50)}

DRAFT = {
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_size": 160, "intermediate_size": 192,
    "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "v_head_dim": 32,
    "partial_rotary_factor": 0.5, "block_size": 8, "num_target_layers": 5, "sliding_window": 24, "rope_theta": 10000,
    "rms_norm_eps": 1e-5, "vocab_size": 72, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
    "dflash_config": {"target_layer_ids": [0, 2, 4], "mask_token_id": 70, "block_size": 8, "use_swa": True,
                      "swa_window_size": 24, "attention_value_scale": 0.612, "attention_sink_bias": True}}


def tokens_of(seed, vocab, T):
    return (words(seed, "tokens", T) % np.uint64(vocab)).astype(np.int64)
