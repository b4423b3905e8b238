"""Random checkpoints in the published tensor layout, the same on every machine.

A tensor is a function of (seed, name): splitmix64 of a counter, so goldens need no weights beside them. Matrices are
stored as the config's precision says (BF16, F8_E4M3 with 128 x 128 scales that restart per qkv chunk, MXFP4 codes and
scale bytes); `tensors` maps a published name to (safetensors dtype, array of raw values).
"""
import collections
import io
import json
import pathlib
import pickle
import sys
import types
import zipfile

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
NUMPY_OF = {"BF16": np.uint16, "F32": np.float32, "F8_E4M3": np.uint8, "U8": np.uint8}


def words(seed, name, n):
    """n random 64-bit words."""
    base = 0xCBF29CE484222325 ^ seed
    for byte in name.encode():
        base = (base ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    with np.errstate(over="ignore"):
        z = np.uint64(base) + np.arange(1, n + 1, dtype=np.uint64) * GOLDEN
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return z ^ z >> np.uint64(31)


def uniform(seed, name, shape):
    """Uniform in [-1, 1)."""
    bits = words(seed, name, int(np.prod(shape))) >> np.uint64(40)
    return (bits.astype(np.float64) / 2.0**23 - 1.0).reshape(shape)


def to_bf16(x):
    """Round to nearest even; raw 16-bit values."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(raw):
    return (raw.astype(np.uint32) << 16).view(np.float32)


class Checkpoint:
    """A config (the content of config.json) and its tensors."""

    def __init__(self, config, seed):
        self.config, self.seed, self.tensors = config, seed, {}

    def vector(self, name, n, center, spread, dtype="BF16"):
        values = center + spread * uniform(self.seed, name, (n,))
        self.tensors[name] = (dtype, to_bf16(values) if dtype == "BF16" else values.astype(np.float32))

    def matrix(self, name, rows, cols, fmt="bf16", chunks=1, gain=1.0):
        """Variance gain^2 / cols, in `fmt`. FP8 and MXFP4 draw codes, so that every code occurs."""
        bound = gain * np.sqrt(3.0 / cols)
        if fmt in ("bf16", "f32"):
            values = (bound * uniform(self.seed, name, (rows, cols))).astype(np.float32)
            self.tensors[name] = ("BF16", to_bf16(values)) if fmt == "bf16" else ("F32", values)
        elif fmt == "fp8":
            codes = (words(self.seed, name, rows * cols) % np.uint64(0x70)).astype(np.uint8)
            sign = (words(self.seed, name + "#", rows * cols) & np.uint64(0x80)).astype(np.uint8)
            grid = (chunks * -(-(rows // chunks) // 128), -(-cols // 128))
            scale = bound / 64 * (1 + 0.5 * uniform(self.seed, name + "_scale", grid))
            self.tensors[name] = ("F8_E4M3", (codes | sign).reshape(rows, cols))
            self.tensors[name + "_scale_inv"] = ("F32", scale.astype(np.float32))
        else:
            codes = words(self.seed, name, rows * cols // 2).astype(np.uint8).reshape(rows, cols // 2)
            spread = (words(self.seed, name + "_scale", rows * cols // 32) % np.uint64(3)).astype(np.int64) - 1
            scale = np.round(np.log2(bound / 6)).astype(np.int64) + 127 + spread
            self.tensors[name] = ("U8", codes)
            self.tensors[name + "_scale"] = ("U8", scale.astype(np.uint8).reshape(rows, cols // 32))

    def write(self, folder):
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        header, offset = {}, 0
        for name, (dtype, array) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
            offset += array.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for dtype, array in self.tensors.values():
                file.write(np.ascontiguousarray(array, dtype=NUMPY_OF[dtype]).tobytes())


def formats_of(config):
    """Format of each family, by the published quantization_config."""
    families = dict.fromkeys(("qkv", "o_proj", "dense", "experts"), "bf16")
    quantization = config.get("quantization_config")
    if quantization:
        families = dict.fromkeys(families, "fp8")
        if quantization.get("store_dtype") == "mxfp4":
            families["experts"] = "mxfp4"
        if any("o_proj" in name for name in quantization.get("ignored_layers", [])):
            families["o_proj"] = "bf16"
    return families


def attention_of(config, layer):
    """Geometry of a layer's attention as a namespace."""
    prefix = "swa_" if config["hybrid_layer_pattern"][layer] else ""
    swa = bool(prefix)
    qk = config[prefix + "head_dim"]
    return types.SimpleNamespace(
        H=config[prefix + "num_attention_heads"], G=config[prefix + "num_key_value_heads"], Q=qk,
        V=config[prefix + "v_head_dim"], theta=config[prefix + "rope_theta"],
        rotary=int(qk * config["partial_rotary_factor"]), window=config["sliding_window"] if swa else 0,
        sink=config["add_swa_attention_sink_bias" if swa else "add_full_attention_sink_bias"])


def random_target(config, seed):
    c, D, N = Checkpoint(config, seed), config["hidden_size"], config["vocab_size"]
    families, fused = formats_of(config), config["attention_projection_layout"] == "fused_qkv"
    c.matrix("model.embed_tokens.weight", N, D, gain=np.sqrt(D))
    for layer in range(config["num_hidden_layers"]):
        a, at = attention_of(config, layer), f"model.layers.{layer}."
        c.vector(at + "input_layernorm.weight", D, 1, 0.2)
        q, k, v = a.H * a.Q, a.G * a.Q, a.G * a.V
        if fused:
            chunks = config["num_key_value_heads"]
            c.matrix(at + "self_attn.qkv_proj.weight", q + k + v, D, families["qkv"], chunks, gain=1.3)
        else:
            for name, rows in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
                c.matrix(at + f"self_attn.{name}.weight", rows, D, families["qkv"], gain=1.3)
        if a.sink:
            c.vector(at + "self_attn.attention_sink_bias", a.H, 1, 1)
        c.matrix(at + "self_attn.o_proj.weight", D, a.H * a.V, families["o_proj"])
        c.vector(at + "post_attention_layernorm.weight", D, 1, 0.2)
        projections = lambda F: (("gate_proj", F, D), ("up_proj", F, D), ("down_proj", D, F))
        if not config["moe_layer_freq"][layer]:
            for name, rows, cols in projections(config["intermediate_size"]):
                c.matrix(at + f"mlp.{name}.weight", rows, cols, families["dense"], gain=1.5)
            continue
        c.matrix(at + "mlp.gate.weight", config["n_routed_experts"], D, "f32")
        c.vector(at + "mlp.gate.e_score_correction_bias", config["n_routed_experts"], 0, 0.1, "F32")
        for e in range(config["n_routed_experts"]):
            for name, rows, cols in projections(config["moe_intermediate_size"]):
                c.matrix(at + f"mlp.experts.{e}.{name}.weight", rows, cols, families["experts"], gain=1.5)
    c.vector("model.norm.weight", D, 1, 0.2)
    c.matrix("lm_head.weight", N, D)
    return c


def random_draft(config, seed):
    c, D, F = Checkpoint(config, seed), config["hidden_size"], config["intermediate_size"]
    H, G, Q, V = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"))
    c.matrix("fc.weight", D, D * len(config["dflash_config"]["target_layer_ids"]))
    for name in ("hidden_norm", "norm"):
        c.vector(name + ".weight", D, 1, 0.2)
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            c.vector(at + name + ".weight", D, 1, 0.2)
        for name in ("q_norm", "k_norm"):
            c.vector(at + f"self_attn.{name}.weight", Q, 1.2, 0.3)
        if config["dflash_config"]["attention_sink_bias"]:
            c.vector(at + "self_attn.attention_sink_bias", H, 1, 1)
        for name, rows, cols in (("self_attn.q_proj", H * Q, D), ("self_attn.k_proj", G * Q, D), ("self_attn.v_proj", G * V, D),
                                 ("self_attn.o_proj", D, H * V), ("mlp.gate_proj", F, D), ("mlp.up_proj", F, D),
                                 ("mlp.down_proj", D, F)):
            c.matrix(at + name + ".weight", rows, cols, gain=1.3)
    c.mask = to_bf16(uniform(seed, "mask_embedding", (D,)))
    return c


def write_mask(path, token, raw):
    """mask_embedding.pt as torch.save writes it, without torch: a stored zip of a pickle and the tensor's bytes."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    storage_type = type("BFloat16Storage", (), {"__module__": "torch"})

    def _rebuild_tensor_v2(*args):
        return args

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    torch.BFloat16Storage, utils._rebuild_tensor_v2 = storage_type, _rebuild_tensor_v2
    storage = object()

    class Tensor:
        def __reduce__(self):
            return _rebuild_tensor_v2, (storage, 0, (raw.size,), (1,), False, collections.OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", storage_type, "0", "cpu", raw.size) if obj is storage else None

    saved = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules.update({"torch": torch, "torch._utils": utils})
    data = io.BytesIO()
    try:
        Pickler(data, 2).dump({"mask_token_id": token, "embedding": Tensor()})
    finally:
        for name, module in saved.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("mask_embedding/data.pkl", data.getvalue())
        archive.writestr("mask_embedding/byteorder", "little")
        archive.writestr("mask_embedding/data/0", raw.tobytes())
        archive.writestr("mask_embedding/version", "3\n")
