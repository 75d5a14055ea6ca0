#!/usr/bin/env python3
"""Seconds of GPTQModel's kernels and of torch on the products of a 70B block, beside `gptq bench --decode`.

    decode_peers.py [--kernels marlin exllamav2 triton torch fp16] [--tokens 1 16] [--out FILE.json]

Random codes in groups of 128, with and without act-order. A product goes over copies that together are larger than the card's
second-level cache by far, as one CUDA graph where the kernel can be captured, else launch after launch; the best of five rounds.
A reading of 4 GiB (a sum by torch) is timed in the same run. Every kernel's output is held against that of the dequantized
weights. Needs torch, gptqmodel and, for marlin and exllamav2, a compiler for CUDA (they are built on first use).
"""
import argparse, json, math, sys, traceback

import torch

SHAPES = {"q, k, v": (8192, 10240), "o": (8192, 8192), "gate, up": (8192, 57344), "down": (28672, 8192)}
GROUP = 128


def timed(run, rounds=5):
    """Seconds of a run that is queued on the card, the best of some."""
    run()
    torch.cuda.synchronize()
    best = math.inf
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


# Kernels that go to the default stream whatever the current one is: a graph of them is empty.
NO_GRAPH = {"exllamav2"}


def over_copies(products, graph):
    """Seconds a product, all of them one after another; and whether as one graph, where that is wanted."""
    def all_of_them():
        for product in products:
            product()

    all_of_them()
    torch.cuda.synchronize()
    if not graph:
        return timed(all_of_them) / len(products), False
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        return timed(graph.replay) / len(products), True
    except Exception:
        torch.cuda.synchronize()
        return timed(all_of_them) / len(products), False


def coded(bits, shape, act_order, seed):
    """Codes, scales, zeros and groups of a linear as files hold them (zeros less one), and its weights in f16."""
    cols, rows = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (cols, rows), generator=generator, device="cuda", dtype=torch.int32)
    scales = (torch.rand((cols // GROUP, rows), generator=generator, device="cuda") * 0.002 + 0.001).half()
    groups = torch.arange(cols, device="cuda", dtype=torch.int32) // GROUP
    if act_order:
        groups = groups[torch.randperm(cols, generator=generator, device="cuda")].contiguous()
    weights = ((codes - (1 << bits - 1)).half() * scales[groups.long()]).t().contiguous()
    return codes, scales, groups, weights


def packed(codes, bits):
    """[in / codes a word, out], the first row in the lowest bits."""
    a_word = 32 // bits
    words = torch.zeros((codes.shape[0] // a_word, codes.shape[1]), dtype=torch.int64, device=codes.device)
    for i in range(a_word):
        words |= codes[i::a_word].long() << bits * i
    return (words - ((words >> 31) << 32)).int()


def layer(kind, bits, shape, act_order, parts):
    """A linear of GPTQModel's."""
    from gptqmodel.nn_modules.qlinear.exllamav2 import ExllamaV2Linear
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear
    kinds = {"marlin": MarlinLinear, "exllamav2": ExllamaV2Linear, "triton": TritonV2Linear, "torch": TorchLinear}
    cols, rows = shape
    linear = kinds[kind](bits=bits, group_size=GROUP, desc_act=act_order, sym=True, in_features=cols, out_features=rows,
                         bias=False, pack_dtype=torch.int32, register_buffers=True).to("cuda")
    codes, scales, groups, _ = parts
    zero = (1 << bits - 1) - (0 if kinds[kind].REQUIRES_FORMAT_V2 else 1)
    word = sum(zero << bits * i for i in range(32 // bits))
    word -= (word >> 31) << 32
    values = {"qweight": packed(codes, bits), "scales": scales, "g_idx": groups,
              "qzeros": torch.full((cols // GROUP, rows * bits // 32), word, dtype=torch.int32, device="cuda")}
    for name, value in values.items():
        held = getattr(linear, name)
        assert held.shape == value.shape, (name, held.shape, value.shape)
        held.data = value.to(held.dtype)
    linear.eval()
    if kind == "exllamav2":
        from gptqmodel.utils.exllamav2 import ScratchSpace
        linear.post_init(ScratchSpace(linear.scratch_space_fixed(16, 1), "cuda"))
    else:
        linear.post_init()
    return linear


def measure(kind, bits, shape, act_order, tokens, copies_of):
    """A row of the table."""
    cols, rows = shape
    size = rows * cols * 2 if kind == "fp16" else rows * cols * bits // 8 + rows * (cols // GROUP) * 2
    count = max(2, math.ceil(copies_of / size))
    parts = coded(bits, shape, act_order, 0)
    xs = [torch.randn((m, cols), device="cuda", dtype=torch.float16) for m in tokens]
    wanted = [x.float() @ parts[3].float().t() for x in xs]
    if kind == "fp16":
        layers = [parts[3].clone() for _ in range(count)]
        products = lambda x: [lambda w=w: torch.nn.functional.linear(x, w) for w in layers]
    else:
        layers = [layer(kind, bits, shape, act_order, parts) for _ in range(count)]
        products = lambda x: [lambda w=w: w(x) for w in layers]
    out = []
    for m, x, want in zip(tokens, xs, wanted):
        with torch.inference_mode():
            of_x = products(x)
            far = ((of_x[0]().float() - want).norm() / want.norm()).item()
            seconds, graph = over_copies(of_x, kind not in NO_GRAPH)
        out.append({"kernel": kind, "bits": 16 if kind == "fp16" else bits, "act_order": act_order, "tokens": m, "shape": [rows, cols],
                    "microseconds": round(seconds * 1e6, 2), "gb_s": round(size / seconds / 1e9), "error": far, "graph": graph})
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=["marlin", "exllamav2", "triton", "torch", "fp16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--copies-gib", type=float, default=1.0)
    parser.add_argument("--out")
    args = parser.parse_args()
    buffer = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    seconds = timed(lambda: buffer.sum())
    del buffer
    rows = [{"kernel": "reading", "gb_s": round(4 * (1 << 30) / seconds / 1e9)}]
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "reading", rows[0]["gb_s"], "GB/s")
    for kind in args.kernels:
        for name, shape in SHAPES.items():
            for act_order in [False] if kind == "fp16" else [False, True]:
                try:
                    new = measure(kind, 4, shape, act_order, args.tokens, args.copies_gib * 2**30)
                except Exception as error:
                    print(f"{kind} {name}: {type(error).__name__}: {str(error)[:300]}")
                    traceback.print_exc(limit=3, file=sys.stderr)
                    break
                for row in new:
                    print(f"{kind:10} {name:9} act-order {act_order!s:5} {row['tokens']:2} tokens {row['microseconds']:8.1f} us "
                          f"{row['gb_s']:5} GB/s  error {row['error']:.1e}{'' if row['graph'] else '  (no graph)'}", flush=True)
                rows += new
    if args.out:
        open(args.out, "w").write(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
