"""train_torch.py: the peer of GPU training: a step of the same target, or of its drafter, in PyTorch.

    python3 train_torch.py data/shapes/mini.json --rows 32768 --steps 10                   # a line of JSON: tokens/s, MFU
    python3 train_torch.py data/shapes/nano.json --rows 16384 --drafter --blocks 4096      # the drafter's step

It runs where torch 2.11 with a Hopper GPU is. What it does best it may do: layers compiled one by one, flex attention with the
mask of documents and window made before the clock starts, grouped products, expert rows moved by permutations without atomics,
bf16 products, FP32 masters and residual stream, TF32 in the router, fused AdamW (or Muon in batches). Operations are counted as
us_model_train_flops counts them, three times forward; --recompute does not raise the count. Random tokens, equal documents.
"""
import argparse
import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

PEAK = 989e12  # bf16 operations a second of an H200, dense


# --- shape ---

class Attention:
    """Sizes of one kind of attention."""

    def __init__(self, config, swa):
        at = "swa_" if swa else ""
        self.H, self.G = config[at + "num_attention_heads"], config[at + "num_key_value_heads"]
        self.Q, self.V = config[at + "head_dim"], config[at + "v_head_dim"]
        self.theta, self.window = config[at + "rope_theta"], config["sliding_window"] if swa else 0
        self.sink = config["add_swa_attention_sink_bias" if swa else "add_full_attention_sink_bias"]
        self.rotary = int(self.Q * config["partial_rotary_factor"]) // 2 * 2
        self.scale = config["attention_value_scale"] or 1.0
        self.norm = False

    @property
    def width(self):
        return self.H * self.Q + self.G * (self.Q + self.V)


def model_flops(config, keys):
    """Of one row's forward pass at `keys` visible keys on average."""
    D, total = config["hidden_size"], 2.0 * config["hidden_size"] * config["vocab_size"]
    for layer, swa in enumerate(config["hybrid_layer_pattern"]):
        a = Attention(config, swa)
        seen = min(keys, a.window) if a.window else keys
        total += 2.0 * D * (a.width + a.H * a.V) + 2.0 * a.H * seen * (a.Q + a.V)
        if config["moe_layer_freq"][layer]:
            total += 2.0 * D * (config["n_routed_experts"] + 3.0 * config["num_experts_per_tok"] * config["moe_intermediate_size"])
        else:
            total += 6.0 * D * config["intermediate_size"]
    return total


def draft_flops(config, a, options, blocks, rows):
    """Of a training step of the drafter alone, as us_draft_train_block_flops and _context_flops."""
    D, B, inner = config["hidden_size"], options.block, options.draft_inner or 2 * config["hidden_size"]
    layer = 2.0 * D * (a.width + a.H * a.V + 3.0 * inner) + 2.0 * a.H * (a.window + B) * (a.Q + a.V)
    block = 3.0 * B * options.draft_layers * layer + 4.0 * D * config["vocab_size"] * (B - 1)
    context = 6.0 * D * options.draft_layers * a.G * (a.Q + a.V) + 4.0 * D * D * options.taps
    return blocks * block + rows * context


# --- operations ---

def parameter(*size, scale=None):
    return nn.Parameter(torch.randn(*size, device="cuda") * (size[-1] ** -0.5 if scale is None else scale))


def linear(x, w):
    return F.linear(x, w.bfloat16())


def rmsnorm(x, gain, eps):
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain).bfloat16()


def rope(x, cos, sin, rotary):
    """x (R, heads, dim) bf16; the leading dims turn, half split."""
    a, b = x[..., : rotary // 2].float(), x[..., rotary // 2 : rotary].float()
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).bfloat16()
    return torch.cat([turned, x[..., rotary:]], -1)


def swiglu(h):
    gate, up = h.chunk(2, -1)
    return F.silu(gate.float()).mul(up.float()).bfloat16()


def attend(q, k, v, mask, sink):
    """Rows (R, heads, dim) to (R, H * V); the sink joins the softmax by its log sum."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out, log_sum = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_lse=True)
    if sink is not None:
        out = (out.float() * torch.sigmoid(log_sum - sink[None, :, None]).unsqueeze(-1)).bfloat16()
    return out[0].transpose(0, 1).flatten(1)


class Gather(torch.autograd.Function):
    """Rows of the slots, x[order // K]; the gradient sums a row's K slots through the inverse permutation."""

    @staticmethod
    def forward(ctx, x, order, inverse, K):
        ctx.save_for_backward(inverse)
        ctx.K = K
        return x[order // K]

    @staticmethod
    def backward(ctx, dy):
        (inverse,) = ctx.saved_tensors
        return dy[inverse].view(-1, ctx.K, dy.shape[-1]).float().sum(1).to(dy.dtype), None, None, None


class Ungather(torch.autograd.Function):
    """Slots back to (row, k) order: y[inverse]; the gradient is the permutation."""

    @staticmethod
    def forward(ctx, y, order, inverse):
        ctx.save_for_backward(order)
        return y[inverse]

    @staticmethod
    def backward(ctx, dy):
        (order,) = ctx.saved_tensors
        return dy[order], None, None


# --- target ---

class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        E, D, inner = config["n_routed_experts"], config["hidden_size"], config["moe_intermediate_size"]
        self.K, self.E = config["num_experts_per_tok"], E
        self.router, self.gate_up, self.down = parameter(E, D), parameter(E, 2 * inner, D), parameter(E, D, inner)
        self.register_buffer("bias", torch.zeros(E, device="cuda"))

    def forward(self, x):
        scores = torch.sigmoid(x.float() @ self.router.t())
        ids = (scores + self.bias).topk(self.K, -1).indices
        weight = scores.gather(-1, ids)
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        order = ids.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        ends = (ids.flatten()[:, None] == torch.arange(self.E, device=ids.device)).sum(0).cumsum(0).to(torch.int32)
        slots = Gather.apply(x, order, inverse, self.K)
        a = swiglu(torch._grouped_mm(slots, self.gate_up.bfloat16().transpose(1, 2), offs=ends))
        y = torch._grouped_mm(a, self.down.bfloat16().transpose(1, 2), offs=ends)
        y = Ungather.apply(y, order, inverse).view(-1, self.K, x.shape[-1])
        return (y.float() * weight.unsqueeze(-1)).sum(1)


class Dense(nn.Module):
    def __init__(self, D, inner):
        super().__init__()
        self.gate_up, self.down = parameter(2 * inner, D), parameter(D, inner)

    def forward(self, x):
        return linear(swiglu(linear(x, self.gate_up)), self.down)


class Layer(nn.Module):
    def __init__(self, config, a, mlp):
        super().__init__()
        D = config["hidden_size"]
        self.a, self.eps, self.mlp = a, config["layernorm_epsilon"], mlp
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(D, device="cuda")) for _ in range(2))
        self.qkv, self.o = parameter(a.width, D), parameter(D, a.H * a.V)
        self.sink = nn.Parameter(torch.zeros(a.H, device="cuda")) if a.sink else None

    def forward(self, h, cos, sin, mask):
        a = self.a
        q, k, v = linear(rmsnorm(h, self.norm1, self.eps), self.qkv).split([a.H * a.Q, a.G * a.Q, a.G * a.V], -1)
        q, k = (rope(t.view(t.shape[0], -1, a.Q), cos, sin, a.rotary) for t in (q, k))
        v = v.reshape(v.shape[0], a.G, a.V) * a.scale
        h = h + linear(attend(q, k, v, mask, self.sink), self.o)
        return h + self.mlp(rmsnorm(h, self.norm2, self.eps))


class Head(nn.Module):
    """Final norm, head and cross-entropy over `chunk` rows at a time."""

    def __init__(self, config, chunk):
        super().__init__()
        self.norm, self.eps, self.chunk = nn.Parameter(torch.ones(config["hidden_size"], device="cuda")), config["layernorm_epsilon"], chunk
        self.head = parameter(config["vocab_size"], config["hidden_size"])

    def forward(self, h, label):
        return F.cross_entropy(linear(rmsnorm(h, self.norm, self.eps), self.head).float(), label, reduction="sum")

    def loss(self, h, label):
        return sum(self(x, y) for x, y in zip(h.split(self.chunk), label.split(self.chunk))) / label.numel()


def table(a, positions):
    angle = positions[:, None].double() * a.theta ** (-torch.arange(0, a.rotary, 2, device="cuda").double() / a.rotary)
    return angle.cos().float()[:, None], angle.sin().float()[:, None]


class Target(nn.Module):
    def __init__(self, config, options):
        super().__init__()
        self.embed = parameter(config["vocab_size"], config["hidden_size"], scale=0.02)
        self.kinds = [Attention(config, swa) for swa in config["hybrid_layer_pattern"]]
        mlps = [Experts(config) if moe else Dense(config["hidden_size"], config["intermediate_size"]) for moe in config["moe_layer_freq"]]
        self.layers = nn.ModuleList(Layer(config, a, mlp) for a, mlp in zip(self.kinds, mlps))
        self.head, self.recompute, self.masks = Head(config, 8192), options.recompute, {}
        for part in [*self.layers, self.head]:
            part.compile(dynamic=False)

    def prepare(self, rows, document):
        """Masks and rotations of `rows` packed rows in documents of `document`."""
        for a in self.kinds:
            if a.window in self.masks:
                continue
            window = a.window or rows

            def visible(b, h, q, k, window=window):
                return (q >= k) & (q - k < window) & (q // document == k // document)

            mask = create_block_mask(visible, None, None, rows, rows, device="cuda")
            self.masks[a.window] = mask, table(a, torch.arange(rows, device="cuda") % document)

    def forward(self, token, taps=()):
        h, tapped = F.embedding(token, self.embed), []
        for l, (a, layer) in enumerate(zip(self.kinds, self.layers)):
            mask, (cos, sin) = self.masks[a.window]
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(layer, h, cos, sin, mask, use_reentrant=False)
            else:
                h = layer(h, cos, sin, mask)
            if l in taps:
                tapped.append(h.bfloat16())
        return h, tapped


# --- drafter ---

class DraftLayer(nn.Module):
    def __init__(self, D, a, inner, eps):
        super().__init__()
        self.a, self.eps, self.mlp = a, eps, Dense(D, inner)
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(D, device="cuda")) for _ in range(2))
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(a.Q, device="cuda")) for _ in range(2))
        self.qkv, self.o = parameter(a.width, D), parameter(D, a.H * a.V)
        self.sink = nn.Parameter(torch.zeros(a.H, device="cuda"))

    def forward(self, h, context, places, mask):
        a, R = self.a, context.shape[0]
        q, own = linear(rmsnorm(h, self.norm1, self.eps), self.qkv).split([a.H * a.Q, a.G * (a.Q + a.V)], -1)
        k, v = torch.cat([linear(context, self.qkv[a.H * a.Q :]), own]).split([a.G * a.Q, a.G * a.V], -1)
        cos, sin = places
        q = rope(rmsnorm(q.reshape(-1, a.H, a.Q), self.q_norm, self.eps), cos[R:], sin[R:], a.rotary)
        k = rope(rmsnorm(k.reshape(-1, a.G, a.Q), self.k_norm, self.eps), cos, sin, a.rotary)
        h = h + linear(attend(q, k, v.reshape(-1, a.G, a.V) * a.scale, mask, self.sink), self.o)
        return h + self.mlp(rmsnorm(h, self.norm2, self.eps))


class Drafter(nn.Module):
    def __init__(self, config, options):
        super().__init__()
        D, self.eps = config["hidden_size"], config["layernorm_epsilon"]
        self.a = a = Attention(config, 1)
        a.H, a.G, a.window = options.draft_heads, options.draft_kv_heads, options.draft_window
        a.Q = a.V = options.draft_head_dim or D // a.H
        a.rotary = a.Q // 2
        self.fc, self.mask_row = parameter(D, options.taps * D), parameter(D, scale=0.02)
        self.context_norm = nn.Parameter(torch.ones(D, device="cuda"))
        self.layers = nn.ModuleList(DraftLayer(D, a, options.draft_inner or 2 * D, self.eps) for _ in range(options.draft_layers))
        for layer in self.layers:
            layer.compile(dynamic=False)

    def prepare(self, options, rows):
        """Anchors at random; what each block sees: context before its anchor, and itself."""
        B, document = options.block, options.document
        anchor = torch.randint(rows // document * document, (options.blocks,), device="cuda").sort().values
        anchor = torch.where(anchor % document == 0, anchor + 1, anchor).clamp(max=rows - B)
        self.anchor, begin = anchor, torch.maximum(anchor // document * document, anchor - self.a.window)

        def visible(b, h, q, k):
            return torch.where(k < rows, (k >= begin[q // B]) & (k < anchor[q // B]), (k - rows) // B == q // B)

        n = options.blocks * B
        self.visible = create_block_mask(visible, None, None, n, rows + n, device="cuda")
        places = torch.cat([torch.arange(rows, device="cuda") % document, (anchor[:, None] + torch.arange(B, device="cuda")).flatten() % document])
        self.places = table(self.a, places)

    def forward(self, token, embed, tapped, B):
        context = rmsnorm(linear(torch.cat(tapped, -1), self.fc), self.context_norm, self.eps)
        h = self.mask_row.expand(self.anchor.numel(), B, -1).clone()
        h[:, 0] = embed[token[self.anchor]]
        h = h.flatten(0, 1)
        for layer in self.layers:
            h = layer(h, context, self.places, self.visible)
        return h


# --- optimizers ---

@torch.compile(dynamic=False)
def newton_schulz(x):
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.mT if tall else x


class Muon:
    """Momentum and orthogonalised steps for matrices and stacks of them; AdamW for the rest."""

    def __init__(self, module, rate):
        matrices = [p for name, p in module.named_parameters() if p.requires_grad and p.dim() > 1 and not any(w in name for w in ("embed", "head", "router"))]
        chosen = {id(p) for p in matrices}
        self.matrices = [(p, torch.zeros_like(p)) for p in matrices]
        self.rate = rate
        self.rest = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad and id(p) not in chosen], lr=rate, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def step(self):
        self.rest.step()
        for p, moment in self.matrices:
            moment.mul_(0.95).add_(p.grad)
            step = newton_schulz(p.grad.add(moment, alpha=0.95))
            p.mul_(1 - self.rate * 0.1).add_(step.float(), alpha=-self.rate * 0.2 * max(p.shape[-2:]) ** 0.5)


def optimizer_of(module, options):
    if options.optimizer == "muon":
        return Muon(module, 3e-4)
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


# --- steps ---

def target_step(config, options):
    model = Target(config, options)
    model.prepare(options.rows, options.document)
    optimizer = optimizer_of(model, options)
    token = torch.randint(config["vocab_size"], (options.rows,), device="cuda")

    def gradients():
        hidden, _ = model(token)
        loss = model.head.loss(hidden, token.roll(-1))
        loss.backward()
        return loss.detach()

    return gradients, optimizer, 3.0 * options.rows * model_flops(config, (options.document + 1) / 2), model


def drafter_step(config, options):
    target, B = Target(config, options).requires_grad_(False), options.block
    target.prepare(options.rows, options.document)
    drafter = Drafter(config, options)
    drafter.prepare(options, options.rows)
    drafter.final = Head(config, 8192)
    drafter.final.head = target.head.head
    drafter.final.compile(dynamic=False)
    optimizer = optimizer_of(drafter, options)
    token = torch.randint(config["vocab_size"], (options.rows,), device="cuda")
    L = config["num_hidden_layers"]
    taps = [round(i * (L - 1) / max(options.taps - 1, 1)) for i in range(options.taps)]
    labels = token[drafter.anchor[:, None] + torch.arange(1, B, device="cuda")].flatten()

    def gradients():
        with torch.no_grad():
            _, tapped = target(token, taps)
        h = drafter(token, target.embed, tapped, B).view(-1, B, config["hidden_size"])[:, 1:].flatten(0, 1)
        loss = drafter.final.loss(h, labels)
        loss.backward()
        return loss.detach()

    flops = options.rows * (model_flops(config, (options.document + 1) / 2) - 2.0 * config["hidden_size"] * config["vocab_size"])
    return gradients, optimizer, flops + draft_flops(config, drafter.a, options, options.blocks, options.rows), drafter


def measure(gradients, optimizer, module, options):
    """Median milliseconds of the gradients, of clipping and update; the last loss."""
    trained = [p for p in module.parameters() if p.requires_grad]
    at, times = [torch.cuda.Event(enable_timing=True) for _ in range(3)], []
    for i in range(options.warmup + options.steps):
        at[0].record()
        loss = gradients()
        at[1].record()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        for p in trained:
            p.grad = None
        at[2].record()
        torch.cuda.synchronize()
        times.append((at[0].elapsed_time(at[1]), at[1].elapsed_time(at[2])))
        print(f"step {i}: {times[-1][0]:.2f} + {times[-1][1]:.2f} ms, loss {float(loss):.4f}", file=sys.stderr, flush=True)
    return *(statistics.median(t[k] for t in times[options.warmup :]) for k in range(2)), float(loss)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape")
    parser.add_argument("--rows", type=int, default=32768, help="tokens a step")
    parser.add_argument("--document", type=int, default=2048, help="tokens a document")
    parser.add_argument("--layers", type=int, default=0, help="of the shape, the first; 0: all")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--recompute", action="store_true", help="layer by layer in the backward pass")
    parser.add_argument("--drafter", action="store_true", help="the drafter's step: the frozen target's forward pass, and it")
    parser.add_argument("--blocks", type=int, default=4096, help="of the drafter, a step")
    for name, default in (("block", 8), ("taps", 5), ("draft-layers", 4), ("draft-inner", 0), ("draft-heads", 4), ("draft-kv-heads", 2), ("draft-head-dim", 0), ("draft-window", 256)):
        parser.add_argument("--" + name, type=int, default=default)
    return parser.parse_args()


def main():
    options = parse()
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    with open(options.shape) as file:
        config = json.load(file)
    for key in ("hybrid_layer_pattern", "moe_layer_freq"):
        config[key] = config[key][: options.layers or None]
    config["num_hidden_layers"] = len(config["moe_layer_freq"])
    gradients, optimizer, flops, module = (drafter_step if options.drafter else target_step)(config, options)
    compute, update, loss = measure(gradients, optimizer, module, options)
    ms = compute + update
    print(json.dumps({
        "peer": "torch " + torch.__version__, "shape": config["name"] if "name" in config else options.shape, "what": "drafter" if options.drafter else "target",
        "layers": config["num_hidden_layers"], "rows": options.rows, "document": options.document, "optimizer": options.optimizer, "recompute": options.recompute,
        "trained": sum(p.numel() for p in module.parameters() if p.requires_grad), "ms": round(ms, 2), "ms_update": round(update, 2), "tokens_per_s": round(options.rows / ms * 1e3),
        "tflops": round(flops / ms * 1e-9, 1), "mfu": round(flops / ms * 1e3 / PEAK, 4), "mfu_without_update": round(flops / compute * 1e3 / PEAK, 4), "loss": round(loss, 4),
        "gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)}))


main()
