#!/usr/bin/env bash
# Guess: a training loop asks the kernel for memory in its first steps and reuses it from then on, as torch's
# caching allocator does on a GPU.
# What happens: on a CPU torch has no cache, and glibc gives memory back. What is larger than 32 MB, as the logits
# of 2,048 tokens over 4,096 ids, is mapped and unmapped each time, and so is the top of the heap once 64 MB of it
# are free. Each step then takes tens of thousands of page faults, each of which zeroes a page.
# MALLOC_TRIM_THRESHOLD_ alone makes it worse, since setting any of these variables ends the rise of the other
# threshold from 128 KB. With MALLOC_MMAP_THRESHOLD_ as well hardly a fault is left, for some 150 MB more memory.
# On the machine where this was found 105 of 360 ms a step were the kernel's, and with both variables 2 of 220.
# Versions: torch 2.13.0, glibc 2.36.
# Output seen:
#   nothing set: 33476 page faults a step
#   MALLOC_TRIM_THRESHOLD_: 43557 page faults a step
#   MALLOC_TRIM_THRESHOLD_ MALLOC_MMAP_THRESHOLD_: 819 page faults a step
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy
cat > step.py <<'PYTHON'
import os
import resource
import subprocess
import sys

NAMES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def faults_per_step():
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(4096, (2048,))
    table = torch.nn.Parameter(0.02 * torch.randn(4096, 64))
    up = torch.nn.Linear(64, 256)
    down = torch.nn.Linear(256, 64)

    def step():
        x = F.embedding(ids, table)
        for _ in range(4):
            x = x + down(F.gelu(up(x)))
        F.cross_entropy(x @ table.T, ids).backward()

    for _ in range(5):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10


if len(sys.argv) > 1:
    print(faults_per_step())
    raise SystemExit
clean = {name: value for name, value in os.environ.items() if name not in NAMES}
found = []
for names in ((), NAMES[:1], NAMES):
    environment = clean | dict.fromkeys(names, str(2**34))
    out = subprocess.check_output([sys.executable, "step.py", "child"], env=environment, text=True)
    found.append(int(out))
    print(f"{' '.join(names) or 'nothing set'}: {found[-1]} page faults a step")
nothing, trim, both = found
raise SystemExit(not (both < 5000 < nothing < trim))
PYTHON
venv/bin/python step.py
