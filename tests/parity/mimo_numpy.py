"""MiMo-V2 and the DFlash drafter in NumPy, double precision, written from the formulas; shares no code with the toolkit.

Independent oracle for what transformers cannot express: 8/8 KV heads, fused qkv chunks whose FP8 scale grid restarts,
MXFP4 experts, and the drafter. `rounding` applies bf16 at the documented points (docs/numerics.md), else nothing rounds.
"""
import numpy as np

from checkpoint import attention_of, from_bf16, to_bf16

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e4m3_table():
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, fraction * 2.0**-9, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    value[code & 127 == 127] = np.nan
    return np.where(code & 128, -value, value)


E4M3 = e4m3_table()


def bf16(x):
    return from_bf16(to_bf16(np.asarray(x, dtype=np.float32))).astype(np.float64)


def weight(checkpoint, name, chunks=1):
    """Decoded values of a tensor, (rows, cols) or (n,)."""
    dtype, raw = checkpoint.tensors[name]
    if dtype == "BF16":
        return from_bf16(raw).astype(np.float64)
    if dtype == "F32":
        return raw.astype(np.float64)
    if dtype == "F8_E4M3":
        scale, values = checkpoint.tensors[name + "_scale_inv"][1], E4M3[raw]
        rows = raw.shape[0] // chunks
        grid_rows = -(-rows // 128)
        row = np.arange(raw.shape[0])
        grid = row // rows * grid_rows + row % rows // 128
        return (values * scale[grid][:, np.arange(raw.shape[1]) // 128]).astype(np.float32).astype(np.float64)
    scale = checkpoint.tensors[name + "_scale"][1].astype(np.float64)
    values = np.stack([E2M1[raw & 15], E2M1[raw >> 4]], axis=-1).reshape(raw.shape[0], -1)
    return values * np.repeat(2.0 ** (scale - 127), 32, axis=1)


def rmsnorm(x, w, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * w


def rope(x, positions, rotary, theta):
    """x (T, heads, dim); the first `rotary` dims turn, half split."""
    half = rotary // 2
    angle = positions[:, None] * theta ** (-np.arange(half) * 2.0 / rotary)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:rotary]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., rotary:]], axis=-1)


def silu(x):
    return x / (1 + np.exp(-x))


def softmax_attention(q, k, v, visible, sink):
    """q (T, H, Q), k (S, G, Q), v (S, G, V), visible (T, S); the sink is one more logit without a value."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,shd->ths", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(visible[:, None], scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    if sink is not None:
        top = np.maximum(top, sink[None, :, None])
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink[None, :, None] - top)
    return np.einsum("ths,shd->thd", weights / total, v).reshape(q.shape[0], -1)


def project_qkv(checkpoint, a, at, x):
    """(q, k, v) heads of a layer from a fused or a split projection."""
    config = checkpoint.config
    T = x.shape[0]
    if config["attention_projection_layout"] == "split":
        parts = [x @ weight(checkpoint, f"{at}self_attn.{n}_proj.weight").T for n in "qkv"]
    else:
        chunks = config["num_key_value_heads"]
        out = (x @ weight(checkpoint, at + "self_attn.qkv_proj.weight", chunks).T).reshape(T, chunks, -1)
        q, k = a.H // chunks * a.Q, a.G // chunks * a.Q
        parts = out[..., :q], out[..., q : q + k], out[..., q + k :]
    return [np.reshape(p, (T, heads, dim)) for p, heads, dim in zip(parts, (a.H, a.G, a.G), (a.Q, a.Q, a.V))]


def dense(checkpoint, at, x, r):
    gate, up, down = (weight(checkpoint, f"{at}{n}_proj.weight") for n in ("gate", "up", "down"))
    return r(silu(x @ gate.T) * (x @ up.T)) @ down.T


def experts(checkpoint, at, x, r):
    config = checkpoint.config
    K = config["num_experts_per_tok"]
    score = 1 / (1 + np.exp(-(x @ weight(checkpoint, at + "gate.weight").T)))
    choice = score + weight(checkpoint, at + "gate.e_score_correction_bias")
    chosen = np.argsort(-choice, axis=-1, kind="stable")[:, :K]
    scale = np.take_along_axis(score, chosen, axis=-1)
    if config["norm_topk_prob"]:
        scale = scale / (scale.sum(axis=-1, keepdims=True) + 1e-20)
    scale = scale * (config["routed_scaling_factor"] or 1.0)
    y = np.zeros_like(x)
    for e in np.unique(chosen):
        row, slot = np.nonzero(chosen == e)
        y[row] += scale[row, slot][:, None] * dense(checkpoint, f"{at}experts.{e}.", x[row], r)
    return y, chosen


def forward(checkpoint, tokens, rounding=False):
    """Logits (T, N), residual stream after each layer (L, T, D), chosen experts of each MoE layer."""
    config, r = checkpoint.config, bf16 if rounding else (lambda x: x)
    T, eps = len(tokens), config["layernorm_epsilon"]
    positions, routed = np.arange(T), {}
    h = weight(checkpoint, "model.embed_tokens.weight")[tokens]
    streams = []
    for layer in range(config["num_hidden_layers"]):
        a, at = attention_of(config, layer), f"model.layers.{layer}."
        x = r(rmsnorm(h, weight(checkpoint, at + "input_layernorm.weight"), eps))
        q, k, v = project_qkv(checkpoint, a, at, x)
        q, k = rope(q, positions, a.rotary, a.theta), r(rope(k, positions, a.rotary, a.theta))
        v = r(v * config["attention_value_scale"])
        distance = positions[:, None] - positions[None, :]
        visible = (distance >= 0) & ((distance < a.window) if a.window else True)
        sink = weight(checkpoint, at + "self_attn.attention_sink_bias") if a.sink else None
        h = h + r(softmax_attention(q, k, v, visible, sink)) @ weight(checkpoint, at + "self_attn.o_proj.weight").T
        x = r(rmsnorm(h, weight(checkpoint, at + "post_attention_layernorm.weight"), eps))
        if config["moe_layer_freq"][layer]:
            y, routed[layer] = experts(checkpoint, at + "mlp.", x, r)
        else:
            y = dense(checkpoint, at + "mlp.", x, r)
        h = h + y
        streams.append(h)
    x = r(rmsnorm(h, weight(checkpoint, "model.norm.weight"), eps))
    return x @ weight(checkpoint, "lm_head.weight").T, np.stack(streams), routed


def draft(target, drafter, streams, tokens, position, block, rounding=False):
    """Draft logits (block - 1, N) of the block anchored at `position`; context strictly before it."""
    config, r = drafter.config, bf16 if rounding else (lambda x: x)
    flash, eps = config["dflash_config"], config["rms_norm_eps"]
    H, G, Q, V = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"))
    rotary, theta, window = int(Q * config["partial_rotary_factor"]), config["rope_theta"], config["sliding_window"]
    taps = np.concatenate([streams[l][:position] for l in flash["target_layer_ids"]], axis=-1)
    context = r(rmsnorm(r(taps) @ weight(drafter, "fc.weight").T, weight(drafter, "hidden_norm.weight"), eps))
    where = np.concatenate([np.arange(position), position + np.arange(block)])
    h = np.tile(from_bf16(drafter.mask).astype(np.float64), (block, 1))
    h[0] = weight(target, "model.embed_tokens.weight")[tokens[position]]
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}."
        w = lambda name: weight(drafter, at + name + ".weight")
        x = r(rmsnorm(h, w("input_layernorm"), eps))
        both = np.concatenate([context, x])
        q = (x @ w("self_attn.q_proj").T).reshape(block, H, Q)
        k = (both @ w("self_attn.k_proj").T).reshape(-1, G, Q)
        v = r(flash["attention_value_scale"] * (both @ w("self_attn.v_proj").T)).reshape(-1, G, V)
        q = rope(rmsnorm(q, w("self_attn.q_norm"), eps), where[position:], rotary, theta)
        k = r(rope(rmsnorm(k, w("self_attn.k_norm"), eps), where, rotary, theta))
        visible = where[position:, None] - where[None, :] < window
        sink = weight(drafter, at + "self_attn.attention_sink_bias") if flash["attention_sink_bias"] else None
        h = h + r(softmax_attention(q, k, v, visible, sink)) @ w("self_attn.o_proj").T
        h = h + dense(drafter, at + "mlp.", r(rmsnorm(h, w("post_attention_layernorm"), eps)), r)
    hidden = r(rmsnorm(h, weight(drafter, "norm.weight"), eps))
    return hidden[1:] @ weight(drafter if "own_head" in flash else target, "lm_head.weight").T
