"""Logits of Hugging Face transformers' MiMoV2Flash on the checkpoints of cases.py. Usage: make_goldens.py OUT.npz

Needs torch and transformers (made with torch 2.15.0, transformers 5.23.0); the tests only read what it wrote. Weights are
loaded straight into the modules, FP32, eager attention, so that no dtype cast of from_pretrained takes part; the mask is
transformers' own (sliding_window counts the query itself).
"""
import sys

import numpy as np
import torch
from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

from cases import HF_CASES, tokens_of
from checkpoint import random_target
from mimo_numpy import weight


def hf_config(c):
    rope = lambda theta: {"rope_type": "default", "rope_theta": float(theta), "partial_rotary_factor": c["partial_rotary_factor"]}
    return MiMoV2FlashConfig(
        vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["num_hidden_layers"], num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_key_value_heads"], head_dim=c["head_dim"], v_head_dim=c["v_head_dim"],
        rms_norm_eps=c["layernorm_epsilon"], moe_intermediate_size=c["moe_intermediate_size"],
        num_experts_per_tok=c["num_experts_per_tok"], n_routed_experts=c["n_routed_experts"],
        routed_scaling_factor=c["routed_scaling_factor"], norm_topk_prob=c["norm_topk_prob"],
        sliding_window=c["sliding_window"], attention_value_scale=c["attention_value_scale"],
        layer_types=["sliding_attention" if s else "full_attention" for s in c["hybrid_layer_pattern"]],
        mlp_layer_types=["sparse" if m else "dense" for m in c["moe_layer_freq"]],
        rope_parameters={"full_attention": rope(c["rope_theta"]), "sliding_attention": rope(c["swa_rope_theta"])},
        max_position_embeddings=c["max_position_embeddings"], tie_word_embeddings=False, attn_implementation="eager")


def load(model, checkpoint):
    """Every parameter and buffer that has a published name; the experts are stacked. Fails on any left over."""
    todo = dict(model.named_parameters())
    todo.update({n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")})
    for name, target in todo.items():
        at = name.rsplit(".", 1)[0] + "."
        each = lambda kind: [weight(checkpoint, f"{at}{e}.{kind}_proj.weight") for e in range(target.shape[0])]
        if name.endswith("experts.gate_up_proj"):
            values = np.concatenate([np.stack(each("gate")), np.stack(each("up"))], axis=1)
        elif name.endswith("experts.down_proj"):
            values = np.stack(each("down"))
        else:
            values = weight(checkpoint, name.replace(".sinks", ".attention_sink_bias"))
        with torch.no_grad():
            assert target.dtype == torch.float32 and tuple(target.shape) == values.shape, name
            target.copy_(torch.from_numpy(values.astype(np.float32)))


def main():
    goldens = {}
    for name, (config, seed, T) in HF_CASES.items():
        model = MiMoV2FlashForCausalLM(hf_config(config)).float().eval()
        load(model, random_target(config, seed))
        tokens = torch.from_numpy(tokens_of(seed, config["vocab_size"], T))[None]
        with torch.no_grad():
            prefill = model(tokens, use_cache=False).logits[0].float().numpy()
            steps, cache = [], None
            for t in range(T):
                out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits[0, -1].float().numpy())
        gap = np.abs(np.stack(steps) - prefill).max() / np.abs(prefill).max()
        print(f"{name}: {prefill.shape}, largest logit {np.abs(prefill).max():.3f}, steps against prefill {gap:.1e}")
        assert gap < 1e-5
        goldens[name] = prefill
    np.savez_compressed(sys.argv[1], **goldens)


main()
