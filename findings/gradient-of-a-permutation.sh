#!/usr/bin/env bash
# Guess: rows are put in another order by x.index_select(0, order) or x[order]. A permutation's inverse is a
# permutation, so the gradient is a gather as well, and it matters not which of several ways is written.
# What happens: torch can't know that no row is taken twice, so both add their gradients up, row by row, into
# zeros: index_add and index_put with accumulate, which on a GPU are atomic sums or a sort first.
# The same rows by x.new_empty(x.shape).index_copy(0, inverse, x), inverse = order.argsort(), have a gather
# as their gradient. Forward and gradients are equal.
# Versions: torch 2.13.0.
# Output seen:
#   index_select: backward by aten::index_add_
#   x[order]: backward by aten::_index_put_impl_
#   index_copy: backward by aten::index_select
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy
venv/bin/python - 2>/dev/null <<'PYTHON'
import torch
from torch.profiler import profile

torch.manual_seed(0)
order = torch.randperm(64)
inverse = order.argsort()
weight = torch.randn(64, 8)
ways = {
    "index_select": lambda x: x.index_select(0, order),
    "x[order]": lambda x: x[order],
    "index_copy": lambda x: x.new_empty(x.shape).index_copy(0, inverse, x),
}
names = ("aten::index_add_", "aten::_index_put_impl_", "aten::index_select")
found = {}
results = []
for way, reorder in ways.items():
    x = torch.arange(512.0).view(64, 8).requires_grad_()
    y = reorder(x)
    with profile() as seen:
        (y * weight).sum().backward()
    called = {event.name for event in seen.events()}
    found[way] = next(name for name in names if name in called)
    results.append((y.detach(), x.grad))
    print(f"{way}: backward by {found[way]}")
same = all(torch.equal(y, results[0][0]) and torch.equal(grad, results[0][1]) for y, grad in results)
raise SystemExit(not same or tuple(found.values()) != names)
PYTHON
