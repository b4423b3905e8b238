"""PyTorch's attention on the masks that train_attention times, printed as its lines are. Usage: train_attention_torch.py [CASE...].

flex_attention (compiled, packed documents as a block mask) and, for full causal attention, SDPA's flash and cuDNN kernels with a
document a batch entry. A CASE is KIND:DOCUMENT[:WINDOW] with KIND flex, flash or cudnn. 32,768 rows, 16 query heads over 4 KV heads of 128, bf16, no sinks. Medians of 15 after 100 ms of the same work.
"""
import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

ROWS = 32768
H, G, D = 16, 4, 128


def median_ms(run):
    times, warm = [], 0.0
    while len(times) < 15:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if warm >= 100:
            times.append(start.elapsed_time(stop))
        warm += start.elapsed_time(stop)
    return statistics.median(times)


def inputs(batch):
    shape = [(batch, heads, ROWS // batch, D) for heads in (H, G, G)]
    return [(torch.rand(s, device="cuda", dtype=torch.bfloat16) * 4 - 2).requires_grad_() for s in shape]


def report(name, document, pairs, attend, operands):
    out = attend(*operands)
    dout = torch.rand_like(out)
    forward = median_ms(lambda: attend(*operands))
    backward = median_ms(lambda: torch.autograd.grad(out, operands, dout, retain_graph=True))
    flops = 4.0 * H * D * pairs
    print(json.dumps({"time": name, "document": document, "forward_ms": round(forward, 4),
                      "forward_tflops": round(flops / forward * 1e-9, 1), "backward_ms": round(backward, 4),
                      "backward_tflops": round(2.5 * flops / backward * 1e-9, 1)}), flush=True)


def flex(document, window):
    def visible(b, h, q, k):
        causal = (q >= k) & (q // document == k // document)
        return causal & (q - k < window) if window else causal

    mask = create_block_mask(visible, None, None, ROWS, ROWS, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    per_row = [min(i % document + 1, window or document) for i in range(ROWS)]
    report(f"flex, {'window ' + str(window) if window else 'full'}", document, sum(per_row),
           lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True), inputs(1))


def sdpa(document, backend, name):
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    report(f"SDPA {name}, full", document, ROWS * (document + 1) / 2, attend, inputs(ROWS // document))


print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name()}), flush=True)
KINDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
DEFAULT = [f"{kind}:{document}" for document in (4096, 2048) for kind in ("flash", "cudnn", "flex")]
for case in sys.argv[1:] or DEFAULT + ["flex:4096:128", "flex:2048:128"]:
    kind, document, window = (case + ":0").split(":")[:3]
    try:
        if kind == "flex":
            flex(int(document), int(window))
        else:
            sdpa(int(document), KINDS[kind], kind)
    except RuntimeError as error:
        print(json.dumps({"time": case, "error": str(error)[:100]}), flush=True)
