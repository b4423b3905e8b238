"""Losses and gradients of two tiny MiMo-V2 models in PyTorch, float64: writes tests/unit/training/grad_goldens.h.

Usage: python3 make_grad_goldens.py > ../unit/training/grad_goldens.h      (needs torch; the header is committed)

An independent forward written from the formulas (docs/numerics.md): no rounding points, softmax with a sink, partial
rotation, value scale, sigmoid router with a selection bias. Weights come from the formula of tests/unit/training/tiny.h.
"""
import numpy as np
import torch

torch.set_default_dtype(torch.float64)
MASK = (1 << 64) - 1
ROWS, FIRST, VOCAB, HIDDEN, EXPERTS, TOP = 40, 25, 96, 32, 4, 2


def mix(z):
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def fnv(name):
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return h


def values(name, shape):
    h = fnv(name)
    count = int(np.prod(shape))
    flat = [(mix((h + k) & MASK) >> 40) * 2.0**-23 - 1.0 for k in range(count)]
    return torch.tensor(flat).reshape(shape)


class Model:
    def __init__(self, flash):
        self.flash = flash
        self.swa = [False, True, not flash]
        self.scaling = 2.5 if flash else 1.0
        self.w = {}
        self.add("model.embed_tokens.weight", (VOCAB, HIDDEN), 1.0)
        for l in range(3):
            p = f"model.layers.{l}."
            kv = 1 if flash and not self.swa[l] else 2
            self.add(p + "input_layernorm.weight", (HIDDEN,), 0.25, 1.0)
            if flash:
                self.add(p + "self_attn.q_proj.weight", (96, HIDDEN), 0.25)
                self.add(p + "self_attn.k_proj.weight", (24 * kv, HIDDEN), 0.25)
                self.add(p + "self_attn.v_proj.weight", (16 * kv, HIDDEN), 0.25)
            else:
                self.add(p + "self_attn.qkv_proj.weight", (176, HIDDEN), 0.25)
            if self.swa[l]:
                self.add(p + "self_attn.attention_sink_bias", (4,), 1.0)
            self.add(p + "self_attn.o_proj.weight", (HIDDEN, 64), 0.25)
            self.add(p + "post_attention_layernorm.weight", (HIDDEN,), 0.25, 1.0)
            if l == 0:
                self.add_mlp(p + "mlp.", 64)
                continue
            self.add(p + "mlp.gate.weight", (EXPERTS, HIDDEN), 0.25)
            self.add(p + "mlp.gate.e_score_correction_bias", (EXPERTS,), 0.125)
            for e in range(EXPERTS):
                self.add_mlp(p + f"mlp.experts.{e}.", 32)
        self.add("model.norm.weight", (HIDDEN,), 0.25, 1.0)
        self.add("lm_head.weight", (VOCAB, HIDDEN), 0.25)

    def add(self, name, shape, scale, base=0.0):
        self.w[name] = (base + scale * values(name, shape)).requires_grad_()

    def add_mlp(self, prefix, inner):
        self.add(prefix + "gate_proj.weight", (inner, HIDDEN), 0.25)
        self.add(prefix + "up_proj.weight", (inner, HIDDEN), 0.25)
        self.add(prefix + "down_proj.weight", (HIDDEN, inner), 0.25)

    def qkv(self, l, n):
        p = f"model.layers.{l}.self_attn."
        if self.flash:
            q, k, v = (n @ self.w[p + f"{x}_proj.weight"].T for x in "qkv")
            return q.reshape(ROWS, 4, 24), k.reshape(ROWS, -1, 24), v.reshape(ROWS, -1, 16)
        y = (n @ self.w[p + "qkv_proj.weight"].T).reshape(ROWS, 2, 88)  # two chunks of [2 q heads | k | v]
        return y[:, :, :48].reshape(ROWS, 4, 24), y[:, :, 48:72], y[:, :, 72:]

    def attention(self, l, n):
        q, k, v = self.qkv(l, n)
        theta = 1e4 if self.swa[l] else 1e6
        q, k, v = rotate(q, theta), rotate(k, theta), v * 0.612
        group = 4 // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / 24**0.5
        i = torch.arange(ROWS)
        seen = (i[None, :] <= i[:, None]) & ((i[None, :] < FIRST) == (i[:, None] < FIRST))
        if self.swa[l]:
            seen &= i[:, None] - i[None, :] < 8
        scores = scores.masked_fill(~seen, float("-inf"))
        if self.swa[l]:
            sink = self.w[f"model.layers.{l}.self_attn.attention_sink_bias"]
            scores = torch.cat([scores, sink[:, None, None].expand(4, ROWS, 1)], 2)
        p = torch.softmax(scores, 2)[:, :, :ROWS]
        out = torch.einsum("hqk,khd->qhd", p, v).reshape(ROWS, 64)
        return out @ self.w[f"model.layers.{l}.self_attn.o_proj.weight"].T

    def mlp(self, prefix, n):
        g, u = (n @ self.w[prefix + f"{x}_proj.weight"].T for x in ("gate", "up"))
        return (g * torch.sigmoid(g) * u) @ self.w[prefix + "down_proj.weight"].T

    def moe(self, l, n):
        p = f"model.layers.{l}.mlp."
        scores = torch.sigmoid(n @ self.w[p + "gate.weight"].T)
        chosen = torch.topk((scores + self.w[p + "gate.e_score_correction_bias"]).detach(), TOP, 1).indices
        share = scores.gather(1, chosen)
        share = share / (share.sum(1, keepdim=True) + 1e-20) * self.scaling
        out = torch.zeros_like(n)
        for e in range(EXPERTS):
            weight = (share * (chosen == e)).sum(1)
            out = out + weight[:, None] * self.mlp(p + f"experts.{e}.", n)
        return out

    def hidden(self, token):
        h = self.w["model.embed_tokens.weight"][token]
        for l in range(3):
            p = f"model.layers.{l}."
            h = h + self.attention(l, norm(h, self.w[p + "input_layernorm.weight"]))
            n = norm(h, self.w[p + "post_attention_layernorm.weight"])
            h = h + (self.moe(l, n) if l else self.mlp(p + "mlp.", n))
        return norm(h, self.w["model.norm.weight"])


def norm(x, gain):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * gain


def rotate(x, theta):
    position = torch.tensor([i if i < FIRST else i - FIRST for i in range(ROWS)], dtype=torch.float64)
    angle = position[:, None] * theta ** (-2.0 * torch.arange(4) / 8)
    c, s = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    a, b = x[..., :4], x[..., 4:8]
    return torch.cat([a * c - b * s, b * c + a * s, x[..., 8:]], -1)


def run(flash, kind):
    model = Model(flash)
    token = torch.tensor([mix((fnv("token") + i) & MASK) % VOCAB for i in range(ROWS + 1)])
    logits = model.hidden(token[:ROWS]) @ model.w["lm_head.weight"].T
    logp = torch.log_softmax(logits, 1)
    if kind == "ce":  # mean cross-entropy
        loss = -logp.gather(1, token[1:, None]).mean()
    elif kind == "weighted":  # a drafter's: slots 1..7 of blocks of 8 count exp(-(j - 1) / 4), slot 0 not at all
        w = torch.tensor([0.0 if i % 8 == 0 else float(np.float32(np.exp(-(i % 8 - 1) / 4))) for i in range(ROWS)])
        loss = -(w * logp.gather(1, token[1:, None])[:, 0]).sum() / w.sum()
    else:  # KL from a teacher of width 8
        teacher = torch.log_softmax(values("teacher.x", (ROWS, 8)) @ (2 * values("teacher.head", (VOCAB, 8))).T, 1)
        loss = (teacher.exp() * (teacher - logp)).sum(1).mean()
    loss.backward()
    return model, loss


def main():
    print("/* grad_goldens.h: losses and gradients of the tiny models, made by tests/parity/make_grad_goldens.py. */")
    print("/* clang-format off */")
    print("struct grad_golden {\n  const char *name;\n  double norm, sample[3]; /* elements 0, n / 2, n - 1 */\n};\n")
    for flash in (False, True):
        for kind in ("ce", "weighted", "kl"):
            model, loss = run(flash, kind)
            tag = ("flash" if flash else "pro") + "_" + kind
            print(f"static const double golden_loss_{tag} = {loss.item():.12g};")
            print(f"static const struct grad_golden golden_{tag}[] = {{")
            for name, w in model.w.items():
                if w.grad is None:
                    continue  # the selection bias
                g = w.grad.flatten()
                samples = ", ".join(f"{g[i].item():.9g}" for i in (0, len(g) // 2, len(g) - 1))
                print(f'  {{"{name}", {g.norm().item():.9g}, {{{samples}}}}},')
            print("};\n")


main()
