#!/usr/bin/env bash
# Guess: the tools that count a model's FLOPs count attention, the one part that grows with the context, when it
# is computed by F.scaled_dot_product_attention; if one can't, it says so.
# What happens: on a CPU all five count the matrix products around it alone, and only fvcore says what it left
# out. torch's FlopCounterMode knows the kernels of GPUs, not the CPU's: on the device "meta", or by the kernel
# "math", it counts attention, as if no key were masked. So by a count on a laptop architectures with long
# contexts look cheap, and full attention looks as cheap as a window.
# Versions: torch 2.13.0, ptflops 0.7.5, thop 0.1.1.post2209072238, fvcore 0.1.5.post20221221.
# Output seen (a layer of 64 channels, 256 tokens; all in FLOPs, two for a multiplication and an addition):
#   by hand: matrices 8,388,608, causal attention 8,388,608
#   FlopCounterMode, CPU: 8,388,608
#   FlopCounterMode, CPU, kernel math: 25,165,824
#   FlopCounterMode, meta: 25,165,824
#   torch.profiler: 8,388,608
#   ptflops, aten: 8,388,608
#   thop: 8,388,608
#   fvcore: 8,388,608, and says that it left out attention
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy ptflops==0.7.5 thop==0.1.1.post2209072238 fvcore==0.1.5.post20221221
venv/bin/python - 2>/dev/null <<'PYTHON'
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from ptflops import get_model_complexity_info
from thop import profile as thop_profile
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

T, C, H = 256, 64, 4


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)

    def forward(self, x):
        q, k, v = (y.unflatten(2, (H, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


def by_torch(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


x = torch.randn(1, T, C)
counts = {"FlopCounterMode, CPU": by_torch(Attention(), x)}
with sdpa_kernel(SDPBackend.MATH):
    counts["FlopCounterMode, CPU, kernel math"] = by_torch(Attention(), x)
counts["FlopCounterMode, meta"] = by_torch(Attention().to("meta"), x.to("meta"))
with profile(with_flops=True) as seen:
    Attention()(x)
counts["torch.profiler"] = sum(event.flops for event in seen.key_averages())
macs, _ = get_model_complexity_info(
    Attention(), (T, C), as_strings=False, print_per_layer_stat=False, backend="aten"
)
counts["ptflops, aten"] = 2 * macs
counts["thop"] = int(2 * thop_profile(Attention(), (x,), verbose=False)[0])
analysis = FlopCountAnalysis(Attention(), x)
counts["fvcore"] = 2 * analysis.total()

matrices = 2 * 4 * C * C * T
causal = 4 * T * T * C // 2  # QK^T and AV, half of the keys masked
print(f"by hand: matrices {matrices:,}, causal attention {causal:,}")
for counter, flops in counts.items():
    says_so = counter == "fvcore" and "aten::scaled_dot_product_attention" in analysis.unsupported_ops()
    print(f"{counter}: {flops:,}" + ", and says that it left out attention" * says_so)
with_attention = {name for name, flops in counts.items() if flops == matrices + 2 * causal}
without = {name for name, flops in counts.items() if flops == matrices}
expected = {"FlopCounterMode, CPU, kernel math", "FlopCounterMode, meta"}
raise SystemExit(with_attention != expected or without != set(counts) - expected)
PYTHON
