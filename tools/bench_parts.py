"""
How much faster are the two parts that are not written as they are defined, at
the real shapes, here?

    python -m tools.bench_parts                          # both
    python -m tools.bench_parts recurrence --repeats 9
    python -m tools.bench_parts experts --json results/parts.json

recurrence: RWKV-7's over 1,024 tokens x 12 heads x 64 channels, in chunks
against token by token. experts: DeepSeek's 16 experts of 192 channels for 2,048
tokens, 4 each, sorted by expert against a loop over the experts. The slow
versions are those that the tests compare with, in tests/reference.py. Each is
forward and backward, in turn after a warm-up; it prints medians, spreads and
the ratio.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import fineweb
import train_deepseek
import train_rwkv
from tests.reference import experts_by_loop, recurrence_by_token


def make_recurrence(device):
    """(the script's, the reference, their inputs): functions of the inputs that return a tensor."""
    B, T, H, D = 1, 1024, 12, 64
    r, k, v, w, rate = torch.randn(5, B, T, H, D, device=device)
    kk = F.normalize(k, dim=-1)
    rate = rate.sigmoid()
    state = torch.zeros(B, H, D, D, device=device)
    inputs = [r, -0.6 * w.sigmoid(), k, v, -kk, kk * rate, state]

    def ours(*inputs):
        y, _ = train_rwkv.recurrence(*inputs)
        return y

    def reference(*inputs):
        y, _ = recurrence_by_token(*inputs)
        return y

    return ours, reference, inputs


def make_experts(device):
    """(the script's, the reference, their inputs): functions of the inputs that return a tensor."""
    config = train_deepseek.Config()
    N, C, E, K, W = 2048, config.n_embd, config.n_expert, config.n_active, config.n_inner_expert
    chosen = torch.rand(N, E, device=device).topk(K).indices
    inputs = [
        torch.randn(N, C, device=device),
        0.02 * torch.randn(E, W, C, device=device),  # gate
        0.02 * torch.randn(E, W, C, device=device),  # up
        0.02 * torch.randn(E, C, W, device=device),  # proj
        torch.rand(N, K, device=device),  # the experts' weights
    ]
    experts = train_deepseek.Experts(config)

    def ours(x, gate, up, proj, weights):
        return experts.grouped(x, gate, up, proj, chosen, weights)

    def reference(x, gate, up, proj, weights):
        return experts_by_loop(x, gate, up, proj, chosen, weights)

    return ours, reference, inputs


PARTS = {"recurrence": make_recurrence, "experts": make_experts}


def measure(function, inputs, device):
    """(seconds of a forward and backward pass, the output)."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    began = time.perf_counter()
    y = function(*inputs)
    y.sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, y.detach()


def compare(part, repeats, device):
    """Measures a part both ways in turn; prints the ratio, returns {"ours": seconds, "plain": seconds}."""
    torch.manual_seed(0)
    ours, reference, inputs = PARTS[part](device)
    times = {"ours": [], "plain": []}
    for repeat in range(repeats + 2):
        our_seconds, y = measure(ours, inputs, device)
        plain_seconds, expected = measure(reference, inputs, device)
        if repeat >= 2:
            times["ours"].append(our_seconds)
            times["plain"].append(plain_seconds)
    error = ((y - expected).abs().max() / expected.abs().max()).item()
    if not error < 1e-4:
        fineweb.fail(f"{part}: the two ways differ by {error:.1e}, so their times mean nothing")
    ratios = [plain / ours for ours, plain in zip(times["ours"], times["plain"])]
    our_ms = 1000 * statistics.median(times["ours"])
    plain_ms = 1000 * statistics.median(times["plain"])
    print(f"{part:10} {our_ms:8.1f} ms | plain {plain_ms:8.1f} ms "
          f"| {statistics.median(ratios):.2f} x as fast ({min(ratios):.2f} to {max(ratios):.2f}), "
          f"the same to {error:.0e}", flush=True)  # fmt: skip
    return times


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(PARTS)} (default: both)")
    parser.add_argument("--repeats", type=int, default=7, help="of each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = fineweb.parse_strictly(parser)
    for part in args.parts:
        if part not in PARTS:
            fineweb.fail(f"there is no {part}: choose from {', '.join(PARTS)}")
    if args.repeats < 1:
        fineweb.fail("--repeats must be at least 1")
    fineweb.refuse_folder("--json", args.json)
    device = torch.device(args.device)
    results = {}
    for part in args.parts or PARTS:
        results[part] = compare(part, args.repeats, device)
    if args.json:
        facts = {
            "command": "python -m tools.bench_parts " + " ".join(sys.argv[1:]),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": str(device),
            "seconds": results,
        }
        fineweb.make_folder(args.json.parent)
        fineweb.write_atomic(args.json, lambda f: f.write(json.dumps(facts, indent=1).encode()))


if __name__ == "__main__":
    main()
