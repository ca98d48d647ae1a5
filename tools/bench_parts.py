"""
What the two parts that are written in an unusual way gain over the plain way, at the real shapes, on this machine.

    python -m tools.bench_parts                          # both
    python -m tools.bench_parts recurrence --repeats 9
    python -m tools.bench_parts experts --json results/parts.json

recurrence: RWKV-7's over 1,024 tokens x 12 heads x 64 channels, in chunks against token by token. experts:
DeepSeek's 16 experts of 192 channels for 2,048 tokens, 4 each, sorted by expert against a loop over the experts.
Each is forward and backward, in turn after a warm-up; it prints medians, spreads and the ratio.
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

PARTS = ("recurrence", "experts")


def recurrence_by_token(r, log_w, k, v, a, b, state):
    """RWKV-7's recurrence as it is defined, one token after the other; shapes as of train_rwkv.recurrence."""
    y = []
    for r_t, log_w_t, k_t, v_t, a_t, b_t in zip(*(x.unbind(1) for x in (r, log_w, k, v, a, b))):
        read = torch.einsum("bhk,bhkv->bhv", a_t, state)
        state = log_w_t.exp()[..., None] * state
        state = state + torch.einsum("bhk,bhv->bhkv", b_t, read) + torch.einsum("bhk,bhv->bhkv", k_t, v_t)
        y.append(torch.einsum("bhk,bhkv->bhv", r_t, state))
    return torch.stack(y, 1), state


def experts_by_loop(x, up, down, chosen, weights):
    """DeepSeek's experts as they are defined, one after the other; shapes as of train_deepseek.Experts.dense."""
    y = torch.zeros_like(x)
    for e in range(len(up)):
        tokens, places = (chosen == e).nonzero(as_tuple=True)
        gate, h = (x[tokens] @ up[e].T).chunk(2, dim=-1)
        y = y.index_add(0, tokens, (F.silu(gate) * h) @ down[e].T * weights[tokens, places, None])
    return y


def make_recurrence(device):
    """(ours, the plain way, their inputs)"""
    B, T, H, D = 1, 1024, 12, 64
    r, k, v, w, rate = torch.randn(5, B, T, H, D, device=device)
    kk, rate = F.normalize(k, dim=-1), rate.sigmoid()
    inputs = [r, -0.6 * w.sigmoid(), k, v, -kk, kk * rate, torch.zeros(B, H, D, D, device=device)]
    return lambda *x: train_rwkv.recurrence(*x)[0], lambda *x: recurrence_by_token(*x)[0], inputs


def make_experts(device):
    """(ours, the plain way, their inputs)"""
    config = train_deepseek.Config()
    N, C, E, K, W = 2048, config.n_embd, config.n_expert, config.n_active, config.expert_width
    chosen = torch.rand(N, E, device=device).topk(K).indices
    inputs = [torch.randn(N, C, device=device), 0.02 * torch.randn(E, 2 * W, C, device=device),
              0.02 * torch.randn(E, C, W, device=device), torch.rand(N, K, device=device)]  # fmt: skip
    experts = train_deepseek.Experts(config)
    return (lambda x, up, down, weights: experts.grouped(x, up, down, chosen, weights),
            lambda x, up, down, weights: experts_by_loop(x, up, down, chosen, weights), inputs)  # fmt: skip


def seconds(function, inputs, device):
    """Of one forward and backward pass; also returns the output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    began = time.perf_counter()
    y = function(*inputs)
    y.sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, y.detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    device, results = torch.device(args.device), {}
    for part in args.parts or PARTS:
        torch.manual_seed(0)
        ours, plain, inputs = (make_recurrence if part == "recurrence" else make_experts)(device)
        times = {"ours": [], "plain": []}
        for repeat in range(args.repeats + 2):
            for name, function in (("ours", ours), ("plain", plain)):
                took, y = seconds(function, inputs, device)
                times[name] += [took] if repeat > 1 else []
                error = 0.0 if name == "ours" else (y - y_ours).abs().max().item() / y.abs().max().item()
                y_ours = y
        if not error < 1e-4:
            fineweb.fail(f"{part}: the two ways differ by {error:.1e}, so their times mean nothing")
        ratios = [b / a for a, b in zip(times["ours"], times["plain"])]
        results[part] = times
        ours_ms, plain_ms = (statistics.median(times[name]) * 1e3 for name in ("ours", "plain"))
        print(f"{part:10} {ours_ms:8.1f} ms | plain {plain_ms:8.1f} ms | {statistics.median(ratios):.2f} x as fast "
              f"({min(ratios):.2f} to {max(ratios):.2f}), the same to {error:.0e}", flush=True)  # fmt: skip
    if args.json:
        command = "python -m tools.bench_parts " + " ".join(sys.argv[1:])
        facts = {"command": command, "torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(device)}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts | {"seconds": results}, indent=1))


if __name__ == "__main__":
    main()
