#!/usr/bin/env bash
# Guess: a Triton kernel that compiles also runs with TRITON_INTERPRET=1, the documented way to debug or test it
# without a GPU; in it the counter of a loop is a value of the language, as in compiled code.
# What happens: the interpreter runs a kernel's loops by Python's own range, so there the counter is an int. A
# kernel that casts it, i.to(tl.int64) against overflow of long inputs, compiles and can't be interpreted; one
# that only computes with i can. Kernels in use are written so: flash-linear-attention 0.6.0's chunked delta rule
# (chunk_rwkv7) can't be tested that way as it is shipped. A range that yields tl.tensor, put into the globals of
# the kernel's module, lets it through, and its results are then those of the recurrence.
# Versions: triton 3.9.0 (3.7.1 does the same), torch 2.13.0.
# Output seen:
#   i: compiles True; interpreted: 2016.0
#   i.to(tl.int64): compiles True; interpreted: AttributeError("'int' object has no attribute 'to'")
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy
venv/bin/pip install -q --no-deps triton==3.9.0
cat > kernel.py <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def add_up(x, y, n, SIZE: tl.constexpr, CAST: tl.constexpr):
    total = tl.zeros([SIZE], tl.float32)
    for i in range(n):
        row = i.to(tl.int64) if CAST else i
        total += tl.load(x + row * SIZE + tl.arange(0, SIZE))
    tl.store(y + tl.arange(0, SIZE), total)


cast = sys.argv[2] == "cast"
if sys.argv[1] == "compile":
    types = {"x": "*fp32", "y": "*fp32", "n": "i32", "SIZE": "constexpr", "CAST": "constexpr"}
    source = triton.compiler.ASTSource(add_up, types, {"SIZE": 16, "CAST": cast})
    target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
    print(len(triton.compile(source, target=target).asm["cubin"]) > 0)
else:
    y = torch.zeros(16)
    try:
        add_up[(1,)](torch.arange(64.0), y, 4, SIZE=16, CAST=cast)
        print(y.sum().item())
    except triton.runtime.errors.InterpreterError as error:
        print(error)
PYTHON
for cast in no cast; do
    compiles=$(venv/bin/python kernel.py compile $cast 2>/dev/null)
    found=$(TRITON_INTERPRET=1 venv/bin/python kernel.py interpret $cast 2>/dev/null)
    [ $cast = no ] && name="i" || name="i.to(tl.int64)"
    echo "$name: compiles $compiles; interpreted: $found"
done > found.txt
cat found.txt
cat > expected.txt <<'EOF'
i: compiles True; interpreted: 2016.0
i.to(tl.int64): compiles True; interpreted: AttributeError("'int' object has no attribute 'to'")
EOF
cmp found.txt expected.txt
