"""
From what was counted to tokens/s, and the table: of an estimate, a measurement,
or both.
"""
import collections
import dataclasses
import json
import math
import statistics
from pathlib import Path

from fineweb import fail, write_atomic
from tools.common import make_folder, table


@dataclasses.dataclass
class GPU:
    """A GPU by its data sheet, with dense products; attention as calibrated (see estimate)."""

    name: str  # as torch says it
    bf16: float  # FLOP/s
    tf32: float
    fp32: float  # outside of the tensor cores
    bandwidth: float  # of its memory, bytes/s
    gib: float  # memory that torch finds
    sms: int
    capability: int
    shared: int  # shared memory that a block can have, bytes
    attention: tuple  # FLOP/s forward and backward, causal, 1,024 tokens, heads of 64 channels


GPUS = {
    "a100": GPU("NVIDIA A100-SXM4-80GB", 312e12, 156e12, 19.5e12, 2.039e12, 79.3, 108, 80, 166_912,
                (110e12, 85e12)),  # FlashAttention-2
    "h100": GPU("NVIDIA H100 80GB HBM3", 989e12, 494e12, 67e12, 3.35e12, 79.2, 132, 90, 232_448,
                (250e12, 180e12)),  # cuDNN's
    "h200": GPU("NVIDIA H200", 989e12, 494e12, 67e12, 4.8e12, 139.8, 132, 90, 232_448, (250e12, 180e12)),
}  # fmt: skip

PRODUCTS = 0.7  # of the peak
CONVOLUTIONS = 0.25  # depthwise ones, of the peak without tensor cores
MEMORY = 0.85  # of the bandwidth
LAUNCH = 3e-6  # seconds that a kernel takes at least

ASSUMED = """\
Estimate: one kernel after the other, each the larger of its FLOPs and its bytes: products at 70% of the
peak, attention at 110/85 (A100) or 250/180 TFLOP/s (Hopper) forward/backward, depthwise convolutions at 25%
of fp32, memory at 85%, at least 3 µs each. 8 GPUs are taken for 8 times as fast as one.
Where it could be checked: build-nanogpt's model on an A100 188k tokens/s, published 176k to 182k;
modded-nanogpt's of October 2024 on an H100 469k, its log 462k. Other kinds of kernels weren't checked.
Not known: whether the numbers are right, how fast a kernel really is (small matrices, sorts and top-k take
longer than their bytes), which configuration autotuning takes, whether cuBLAS and cuDNN take the shapes,
the CPU's time for launches, the network between GPUs."""

# ==========================================================================
# Estimate


def seconds(call, gpu, window):
    """(seconds that a call takes by the estimate, its kind, its FLOPs)."""
    kind = "rest"
    flops = call.flops
    peak = gpu.tf32 * PRODUCTS
    is_flex = call.name.startswith("triton_tem") and "flex_attention" in call.name
    if is_flex or (call.kind == "extern" and "scaled_dot_product" in call.name):
        kind = "attention"
        backward = "backward" in call.name
        peak = gpu.attention[backward]
        if is_flex:
            flops = flex_flops(call.shapes, window, backward)
    elif call.name in ("convolution", "convolution_backward"):
        kind = "convolutions"
        peak = gpu.fp32 * CONVOLUTIONS
        flops = convolution_flops(call)
    elif flops:
        kind = "products"
        if call.dtype in ("bfloat16", "float16"):
            peak = gpu.bf16 * PRODUCTS
    return max(flops / peak, call.n_bytes / (gpu.bandwidth * MEMORY), LAUNCH), kind, flops


def flex_flops(shapes, window, backward):
    """FLOPs of a flex_attention kernel: of the scores that a causal window lets through, two products each.

    shapes: those of its arguments, of which the queries (B, H, T, D) are the largest. Backward are five.
    """
    B, H, T, D = max((shape for shape in shapes if len(shape) == 4), key=math.prod)
    window = min(window, T)
    scores = B * H * (window * T - window * (window - 1) // 2)
    return scores * D * 2 * (5 if backward else 2)


def convolution_flops(call):
    """FLOPs of a convolution without padding; backward of input and weights."""
    shapes = call.shapes[:2] if call.name == "convolution" else call.shapes[1:3]
    (B, _, *size), (channels, *kernel) = shapes
    outputs = B * channels * math.prod(n - k + 1 for n, k in zip(size, kernel[1:]))
    return 2 * outputs * math.prod(kernel) * (1 if call.name == "convolution" else 2)


def estimate(calls, record, gpu, window):
    """Per token: bytes, FLOPs and seconds of each kind, of a step of record["batch_tokens"].

    calls: of a step of record["micro_batches"]; the whole one has more of them, but one update of the
    weights, and adds gradients to those of the micro-batches before.
    """
    micro_tokens = record["rows"] * record["tokens"]
    n_bytes = collections.Counter()
    n_flops = collections.Counter()
    time = collections.Counter()
    costs = collections.Counter()  # of each kernel, and of operations by their shapes
    launches = 0
    for call in calls:
        needed, kind, flops = seconds(call, gpu, window)
        tokens = record["micro_batches"] * micro_tokens
        if call.graph == "update":
            kind = "update"
            tokens = record["batch_tokens"]
        else:
            launches += 1
        n_bytes[kind] += call.n_bytes / tokens
        n_flops[kind] += flops / tokens
        time[kind] += needed / tokens
        costs[call.name if call.kind == "triton" else f"{call.name} {call.shapes}"] += needed / tokens
    added = 12 * record["parameters"] * (record["batch_tokens"] // micro_tokens - 1) / record["batch_tokens"]
    n_bytes["update"] += added
    time["update"] += added / (gpu.bandwidth * MEMORY)
    return {
        "launches": launches // record["micro_batches"],
        "bytes_per_token": dict(n_bytes), "flops_per_token": dict(n_flops),
        "seconds_per_token": dict(time), "tokens_per_second": 1 / sum(time.values()),
        "costliest": dict(costs.most_common(10)),
    }  # fmt: skip


def kernels(compiled):
    """Kernels that spill (words a thread) or can't run (why), each in the best of its configurations."""
    spilling = {}
    unfit = {}
    for name, configs in compiled.items():
        possible = [spilled for _, spilled, _, why in configs if not why]
        if not possible:
            unfit[name] = configs[0][3]
        elif min(possible):
            spilling[name] = min(possible)
    return {"kernels": len(compiled), "configurations": sum(map(len, compiled.values())),
            "spilling": spilling, "unfit": unfit}  # fmt: skip


# ==========================================================================
# Records


def path_of(folder, script, gpu):
    """The file of a script's record on a GPU."""
    return folder / f"{Path(script).stem.removeprefix('train_')}-{gpu}.json"


def write(path, record):
    make_folder(path.parent)
    text = json.dumps(record, indent=1) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def read(folder):
    """The records of a folder, by GPU and script."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]
    if not records:
        fail(f"{folder} has no records: make some with python -m tools.gpu fake SCRIPT --out {folder}")
    return sorted(records, key=lambda record: record["gpu"])


# ==========================================================================
# In words


def hours(rate):
    """How long 10B tokens take at rate tokens/s a GPU."""
    return f"{10e9 / rate / 3600:,.1f} h, {10e9 / rate / 3600 / 8:,.1f} h"


def summary(records, price=0.0):
    """A row for each record, with what a real GPU measured where one did. price: USD an hour and GPU."""
    rows = []
    for record in records:
        measured = record.get("measured", {})
        rate = record.get("tokens_per_second")
        cells = [record["script"], record["gpu"], str(record.get("rows") or measured.get("rows", "–"))]
        if rate:
            n_bytes = sum(record["bytes_per_token"].values())
            n_flops = sum(record["flops_per_token"].values())
            spills = [words for words in record["spilling"].values() if words >= 16]  # fewer cost nothing
            cells += [f"{record['peak'] / 1e9:.1f} GB", f"{n_bytes / 1e6:.2f}", f"{n_flops / 1e9:.2f}",
                      str(record["launches"]), f"{len(spills)}, at most {max(spills)}" if spills else "0",
                      f"{rate / 1000:,.0f}k"]  # fmt: skip
        else:
            cells += [f"no: {record['error']}" if "error" in record else "–", *["–"] * 5]
        cells.append(measured.get("failed", "–"))
        if "rates" in measured:
            rate = statistics.median(measured["rates"])
            peak = "" if measured["peak"] is None else f", {measured['peak'] / 1e9:.1f} GB"
            cells[-1] = f"{rate / 1000:,.0f}k{peak}, losses {measured['curve']}"
        cells.append(hours(rate) if rate else "–")
        if price:
            cells.append(f"{10e9 / rate / 3600 * price:,.0f} USD" if rate else "–")
        rows.append(cells)
    head = ["", "GPU", "rows", "peak", "MB/token", "GFLOP/token", "launches", "kernels that spill",
            "tokens/s, estimated", "measured", "10B tokens on 1, 8"]  # fmt: skip
    return table([*head, "cost"] if price else head, rows)


def parts(per_token, scale):
    """The parts of a quantity per token, the largest first."""
    ordered = sorted(per_token.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {value * scale:.2f}" for kind, value in ordered if value * scale >= 0.005)


def details(record):
    """What the row of a script has no room for, in lines."""
    lines = [f"{record['script']} on {GPUS[record['gpu']].name}, torch {record['torch']}: the script chooses "
             f"{record['chosen_rows']} rows of {record['tokens']:,} tokens"]  # fmt: skip
    if "error" in record:
        return [*lines, f"  it doesn't compile: {record['error']}"]
    graphs = ", ".join(f"{n} {kind}" for kind, n in record["graphs"].items())
    lines.append(f"  it compiles: graphs {graphs}; graph breaks {sum(record['breaks'].values())}")
    lines += [f"  graph break: {why}" for why in record["breaks"]]
    lines.append(f"  kernels of Triton {record['kernels']} in {record['configurations']} configurations, "
                 f"that spill {len(record['spilling'])}, that can't run {len(record['unfit'])}")  # fmt: skip
    lines += [f"  {name[:70]} spills {words} words" for name, words in record["spilling"].items()]
    lines += [f"  {name[:70]} can't run: {why}" for name, why in record["unfit"].items()]
    lines.append(f"  memory between steps {record['resident'] / 1e9:.1f} GB")
    lines.append(f"  MB a token: {parts(record['bytes_per_token'], 1e-6)}")
    lines.append(f"  GFLOP a token: {parts(record['flops_per_token'], 1e-9)}")
    lines.append(f"  µs a token: {parts(record['seconds_per_token'], 1e6)}")
    return lines + [f"    {cost * 1e6:.3f} {name[:100]}" for name, cost in record["costliest"].items()]
