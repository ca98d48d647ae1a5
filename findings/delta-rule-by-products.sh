#!/usr/bin/env bash
# Guess: flash-linear-attention's chunk_rwkv7 takes lower_bound, a promise about the decay, to use the tensor
# cores; a decay that keeps the promise gets the same results, faster.
# What happens: that path also inverts I - L, L the keys' products within 16 tokens, as the product of I + L,
# I + L^2, I + L^4 and I + L^8, in fp16. Powers of L are small for unlike keys. For the same key again and again
# (a repeated token), an in-context learning rate near 1 and little decay they grow to thousands and cancel: the
# output is off by most of its own size, gradients by more. Without lower_bound the inverse is made row by row in
# fp32, and the same inputs are right to fp16's rounding. Backward passes share the inverse.
# The kernels are read by Triton's interpreter here, whose casts are those of the compiled ones.
# Versions: fla-core 0.6.0, triton 3.9.0, torch 2.13.0.
# Output seen, largest error over largest value of 64 tokens:
#   unlike keys: without 0.0004, with lower_bound 0.0006
#   the same key: without 0.0019, with lower_bound 0.7759
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy einops packaging
venv/bin/pip install -q --no-deps triton==3.9.0 fla-core==0.6.0
cat > kernel.py <<'PYTHON'
import builtins
import math

import numpy as np
import torch
import torch.nn.functional as F
import triton.language as tl
from fla.ops.generalized_delta_rule.dplr import chunk_A_fwd, chunk_h_fwd
from fla.ops.rwkv7 import chunk_rwkv7
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import TensorHandle


def counters(*bounds):
    ends = [bound.handle.data.item() if isinstance(bound, tl.tensor) else int(bound) for bound in bounds]
    for i in builtins.range(*ends):
        yield tl.tensor(TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32)


# what the interpreter lacks: counters that are tensors, a device to choose configurations on, gather
chunk_h_fwd.range = counters
chunk_A_fwd.IS_GATHER_SUPPORTED = False
Autotuner._bench = lambda self, *args, **kwargs: 0.0
Autotuner.check_disk_cache = lambda self, key, configs, choose: choose()

errors = []
for repeated in (False, True):
    torch.manual_seed(0)
    r, key, v = torch.randn(3, 1, 64, 1, 16).half().double()
    if repeated:
        key = key[:, :1].expand(1, 64, 1, 16)
    removed = F.normalize(key, dim=-1).half().double()
    rate = 0.98
    log_w = torch.full_like(r, -0.003)  # of the decay, in (-0.607, 0) as RWKV-7's
    a, b = -removed, (rate * removed).half().double()
    state = torch.zeros(16, 16, dtype=torch.float64)
    exact = []
    for t in range(64):
        read = a[0, t, 0] @ state
        state = log_w[0, t, 0].exp()[:, None] * state + torch.outer(b[0, t, 0], read)
        state = state + torch.outer(key[0, t, 0], v[0, t, 0])
        exact.append(r[0, t, 0] @ state)
    exact = torch.stack(exact)
    inputs = [r.half(), log_w.float(), *(x.half() for x in (key, v, a, b))]
    for options in ({}, {"lower_bound": -math.exp(-0.5)}):
        y, _ = chunk_rwkv7(*inputs, **options)
        errors.append(((y[0, :, 0].double() - exact).abs().max() / exact.abs().max()).item())
print(f"unlike keys: without {errors[0]:.4f}, with lower_bound {errors[1]:.4f}")
print(f"the same key: without {errors[2]:.4f}, with lower_bound {errors[3]:.4f}")
raise SystemExit(not (max(errors[:3]) < 0.01 and errors[3] > 0.5))
PYTHON
TRITON_INTERPRET=1 venv/bin/python kernel.py 2>/dev/null
