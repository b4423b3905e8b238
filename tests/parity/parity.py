"""Logits of the C forward pass against transformers (goldens.npz) and against mimo_numpy.py. Usage: parity.py PARITY_DUMP

Tolerances, as max|difference| / max|logit|:
- FP32: 1e-4 (measured: under 2e-6 everywhere).
- bf16 against the unrounded oracle: B(L) = 3 sqrt(6 L + 2) 2^-9. A layer rounds six times (two norms, K, V, attention,
  SwiGLU), the final norm and the stored embedding once more; each is at most half a bf16 unit, 2^-9 of its value, and the
  errors are independent, so they add as a square root; the factor 3 is for the largest of many logits. Routing is a step
  function of the scores, so these runs choose every expert (top_k = E). Measured over 8 seeds a case, the largest: 0.25 B to 0.75 B.
- bf16 against the oracle with the same rounding points: equal to 1e-6 unless some value fell on the other side of a rounding
  boundary, which one row in a few avoids: the best first row of eight seeds must. A missing or extra rounding costs 1e-3.
Each mutation of a checkpoint must exceed the FP32 tolerance.
"""
import copy
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from cases import DRAFT, HF_CASES, NUMPY_CASES, PRO, tokens_of
from checkpoint import random_draft, random_target, write_mask
from mimo_numpy import draft, forward

FP32_TOLERANCE = 1e-4
SAME_BITS_TOLERANCE = 1e-6
DUMP, WORK = sys.argv[1], tempfile.TemporaryDirectory(prefix="us-parity-")
failures = []


def check(ok, what):
    print(("ok      " if ok else "FAILED  ") + what)
    if not ok:
        failures.append(what)


def run(checkpoint, tokens, rounding="f32", rows=0, drafter=None, position=0, block=8):
    """Logits of the C program, and the drafter's if there is one."""
    root = pathlib.Path(WORK.name)
    checkpoint.write(root / "target")
    np.asarray(tokens, dtype=np.int32).tofile(root / "tokens")
    command = [DUMP, root / "target", root / "tokens", root / "out", rounding, str(rows)]
    if drafter:
        drafter.write(root / "draft")
        write_mask(root / "draft" / "mask_embedding.pt", drafter.config["dflash_config"]["mask_token_id"], drafter.mask)
        command += [root / "draft", str(position), str(block)]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"parity_dump failed: {done.stderr}")
    out, N = np.fromfile(root / "out", np.float32), checkpoint.config["vocab_size"]
    return out[: len(tokens) * N].reshape(-1, N), out[len(tokens) * N :].reshape(-1, N)


def gap(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def every_expert(config):
    """The same config with all experts chosen, so that rounding cannot change the routing."""
    return dict(config, n_routed_experts=config["num_experts_per_tok"])


def check_fp32():
    goldens = np.load(pathlib.Path(__file__).parent / "goldens.npz")
    for name, (config, seed, T) in {**HF_CASES, **NUMPY_CASES}.items():
        checkpoint, tokens = random_target(config, seed), tokens_of(seed, config["vocab_size"], T)
        oracle = forward(checkpoint, tokens)[0]
        if name in goldens.files:
            check(gap(oracle, goldens[name]) < 1e-5, f"{name}: NumPy against transformers: {gap(oracle, goldens[name]):.1e}")
            oracle = goldens[name]
        outputs = {rows: run(checkpoint, tokens, rows=rows)[0] for rows in (0, 1, 7)}
        for rows, logits in outputs.items():
            how = {0: "prefill", 1: "step by step"}.get(rows, f"{rows} rows a pass")
            check(gap(logits, oracle) < FP32_TOLERANCE, f"{name}: FP32 {how}: {gap(logits, oracle):.1e}")
        check(np.array_equal(outputs[0], outputs[1]) and np.array_equal(outputs[0], outputs[7]), f"{name}: same bits")


def check_bf16():
    for name, (config, seed, T) in {**HF_CASES, **NUMPY_CASES}.items():
        config, best, worst = every_expert(config), np.inf, 0
        bound = 3 * np.sqrt(6 * config["num_hidden_layers"] + 2) / 512
        for s in range(8):
            checkpoint, tokens = random_target(config, 100 * seed + s), tokens_of(seed + s, config["vocab_size"], min(T, 40))
            logits = run(checkpoint, tokens, "bf16", rows=8)[0]
            worst = max(worst, gap(logits, forward(checkpoint, tokens)[0]))
            best = min(best, gap(logits[:1], forward(checkpoint, tokens[:1], rounding=True)[0]))
        check(bound / 8 < worst < bound, f"{name}: bf16: {worst:.1e}, bound {bound:.1e}")
        check(best < SAME_BITS_TOLERANCE, f"{name}: bf16 at the documented rounding points: {best:.1e}")


def check_draft():
    target, drafter = random_target(PRO, 6), random_draft(DRAFT, 8)
    tokens = tokens_of(6, PRO["vocab_size"], 70)
    streams = forward(target, tokens)[1]
    for position, block in ((0, 8), (1, 8), (13, 8), (40, 5), (61, 8), (30, 2)):
        oracle = draft(target, drafter, streams, tokens, position, block)
        logits = run(target, tokens, drafter=drafter, position=position, block=block)[1]
        check(gap(logits, oracle) < FP32_TOLERANCE, f"drafter at {position}, block {block}: FP32: {gap(logits, oracle):.1e}")
    for form in ("mxfp4", "fp8", "bf16"):
        own = random_draft(dict(DRAFT, dflash_config=dict(DRAFT["dflash_config"], own_head=form)), 8)
        own.matrix("lm_head.weight", PRO["vocab_size"], PRO["hidden_size"], form)
        shared, oracle = draft(target, drafter, streams, tokens, 40, 8), draft(target, own, streams, tokens, 40, 8)
        logits = run(target, tokens, drafter=own, position=40)[1]
        check(gap(logits, oracle) < FP32_TOLERANCE < gap(logits, shared), f"drafter with its own {form} head: FP32: {gap(logits, oracle):.1e}")
    smooth, worst, bound = every_expert(PRO), 0, 3 * np.sqrt(6 * (5 + 3) + 4) / 512
    for s in range(6):
        target, drafter = random_target(smooth, 60 + s), random_draft(DRAFT, 80 + s)
        oracle = draft(target, drafter, forward(target, tokens)[1], tokens, 50, 8)
        worst = max(worst, gap(run(target, tokens, "bf16", drafter=drafter, position=50)[1], oracle))
    check(bound / 8 < worst < bound, f"drafter: bf16: {worst:.1e}, bound {bound:.1e}")


# ---- Mutations: (what, change(config, tensors)) ----


def rolled(name):
    def change(config, tensors):
        dtype, array = tensors[name]
        tensors[name] = (dtype, np.roll(array, 1, axis=0))

    return change


def put(key, value, section=None):
    def change(config, tensors):
        (config[section] if section else config)[key] = value

    return change


def both(*changes):
    def change(config, tensors):
        for one in changes:
            one(config, tensors)

    return change


def edited(name, function):
    def change(config, tensors):
        dtype, array = tensors[name]
        tensors[name] = (dtype, function(array.copy()))

    return change


def bump_first(array):
    array.flat[0] += 1
    return array


def window(size):
    return both(put("sliding_window", size), put("sliding_window_size", size))


def target_mutations(expert):
    at, e = "model.layers.1.self_attn.", f"model.layers.4.mlp.experts.{expert}."
    return {
        "sink dropped": drop_target_sinks,
        "theta swapped": both(put("rope_theta", 10000), put("swa_rope_theta", 1000000)),
        "value scale dropped": put("attention_value_scale", 1.0),
        "rotary dims halved": put("partial_rotary_factor", 0.167),
        "window + 1": window(22),
        "window - 1": window(20),
        "K and V off by one row": rolled(at + "qkv_proj.weight"),
        "qkv scale grid off by one row": rolled(at + "qkv_proj.weight_scale_inv"),
        "an expert skipped": edited(e + "down_proj.weight", np.zeros_like),
        "nibbles swapped": edited(e + "down_proj.weight", lambda a: (a >> 4) | (a << 4)),
        "a scale byte + 1": edited(e + "down_proj.weight_scale", bump_first),
        "selection bias dropped": edited("model.layers.4.mlp.gate.e_score_correction_bias", np.zeros_like),
        "weights not normalised": put("norm_topk_prob", False),
    }


def drop_sinks(config, tensors):
    config["dflash_config"]["attention_sink_bias"] = False
    for name in [n for n in tensors if n.endswith("attention_sink_bias")]:
        del tensors[name]


def drop_target_sinks(config, tensors):
    config["add_swa_attention_sink_bias"] = False
    for name in [n for n in tensors if n.endswith("attention_sink_bias")]:
        del tensors[name]


DRAFT_MUTATIONS = {
    "sink dropped": drop_sinks,
    "theta swapped": put("rope_theta", 5000000),
    "value scale dropped": put("attention_value_scale", 1.0, "dflash_config"),
    "all dims rotated": put("partial_rotary_factor", 1.0),
    "window + 1": both(put("sliding_window", 25), put("swa_window_size", 25, "dflash_config")),
    "window - 1": both(put("sliding_window", 23), put("swa_window_size", 23, "dflash_config")),
    "a tap one layer early": put("target_layer_ids", [0, 1, 4], "dflash_config"),
    "K off by one row": rolled("layers.0.self_attn.k_proj.weight"),
    "V off by one row": rolled("layers.0.self_attn.v_proj.weight"),
    "k norm dropped": edited("layers.1.self_attn.k_norm.weight", lambda a: np.full_like(a, 0x3F80)),
}


def mutated(checkpoint, change):
    other = copy.copy(checkpoint)
    other.config, other.tensors = copy.deepcopy(checkpoint.config), dict(checkpoint.tensors)
    change(other.config, other.tensors)
    return other


def check_mutations():
    target, drafter, tokens = random_target(PRO, 6), random_draft(DRAFT, 8), tokens_of(6, PRO["vocab_size"], 70)
    oracle, streams, routed = forward(target, tokens)
    mutations = target_mutations(int(routed[4][10, 0]))
    for what, change in mutations.items():
        size = gap(run(mutated(target, change), tokens)[0], oracle)
        check(size > FP32_TOLERANCE, f"mutation caught: {what}: {size:.1e}")
    oracle = draft(target, drafter, streams, tokens, 61, 8)
    for what, change in DRAFT_MUTATIONS.items():
        size = gap(run(target, tokens, drafter=mutated(drafter, change), position=61)[1], oracle)
        check(size > FP32_TOLERANCE, f"mutation caught: drafter: {what}: {size:.1e}")


check_fp32()
check_bf16()
check_draft()
check_mutations()
print(f"{len(failures)} failed")
sys.exit(1 if failures else 0)
