"""
How fast do the scripts train on this machine, and how long will ten billion tokens take?

    python -m tools.bench                              # a training step of every script at its real shapes
    python -m tools.bench gpt2 llama --micro_batch 2 4 --gpus 8
    python -m tools.bench gpt2 --peers                 # beside transformers' class, the plain way, and GPT-2, in turn
    python -m tools.bench gpt2 --profile trace         # the ten dearest operations, and a trace for a viewer
    python -m tools.bench --tiny --json results/bench-tiny.json

A step is forward, backward, clipping and AdamW on one micro-batch of random tokens. Every line is measured in a
fresh process, after a warm-up; it says the median and the spread. Memory is the device's peak, on a CPU the
process's (which holds about 0.3 GB of Python and torch).
"""
import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import fineweb

ROOT = Path(__file__).parent.parent
TOKENS = 10_000_000_000
HF_CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
              "gemma": "Gemma3ForCausalLM", "deepseek": "DeepseekV3ForCausalLM"}  # fmt: skip


def names():
    """The architectures there are, GPT-2 first."""
    found = sorted(path.stem.removeprefix("train_") for path in ROOT.glob("train_*.py"))
    return ["gpt2"] + [name for name in found if name != "gpt2"]


def make_config(script, job):
    tiny = script.TINY_MODEL | script.TINY_RUN if job["tiny"] else {}
    return script.Config(**{**script.RECIPE, **tiny, **job["options"]})


def make_step(kind, script, config, device, autocast, compiles):
    """One of the things compared, as a function (idx, targets) -> loss that takes a whole training step.

    ours: the script's model, as its loop trains it. plain: the same model with all logits at once and AdamW as
    it comes. transformers: that library's class of the same shape. gpt2: the reference script's model.
    """
    torch.manual_seed(config.seed)
    if kind == "transformers":
        import transformers

        from tools import mapping

        name = script.__name__.removeprefix("train_")
        model = getattr(transformers, HF_CLASSES[name])(mapping.hf_config(name, config)).to(device)
        parameters = list(model.parameters())
        groups = [{"params": [p for p in parameters if p.dim() >= 2]},
                  {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
    else:
        model = script.Model(config).to(device)
        groups = model.optimizer_groups()
    net = torch.compile(model, dynamic=False) if compiles else model
    scripts = kind in ("ours", "gpt2")
    fused = {"fused": device.type != "mps"} if scripts else {}
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(config.beta1, config.beta2), **fused)

    def step(idx, targets):
        with autocast:
            if scripts:
                _, loss = net(idx, targets)
            else:
                logits = net(idx).logits if kind == "transformers" else net(idx)[0]
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if scripts:
            model.after_step()
        return loss.item()  # waits for the device

    step.model = model
    return step


def measured_peak(device, dtype):
    """FLOP/s of a large matrix product on the device: what can be had of a device that no table lists."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(times[1:])


def counted_flops(model, device, config):
    """FLOPs per token of a training forward pass by torch's counter, which counts attention's masked half too."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    idx = torch.zeros(1, config.block_size, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(idx, idx)
    return counter.get_total_flops() / config.block_size


def work(job):
    """Runs in a fresh process: measures the kinds of a job in turn and prints one line of JSON."""
    script = importlib.import_module(f"train_{job['name']}")
    config = make_config(script, job)
    device, device_name, dtype, _ = script.start(config, 1)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    compiles = config.compile == "on" or config.compile == "auto" and device.type == "cuda"
    steps = {}
    for kind in job["kinds"]:
        its = importlib.import_module("train_gpt2") if kind == "gpt2" else script
        shared = {name: value for name, value in job["options"].items() if hasattr(its.Config, name)}
        steps[kind] = make_step(kind, its, make_config(its, job | {"options": shared}), device, autocast, compiles)
    rows = job["micro_batch"] or script.find_micro_batch(config, 64, device, autocast)
    torch.manual_seed(0)
    rates = {kind: [] for kind in steps}
    for repeat in range(job["warm_up"] + job["repeats"]):
        idx = torch.randint(config.vocab_size, (rows, config.block_size), device=device)
        for kind, step in steps.items():
            began = time.perf_counter()
            loss = step(idx, idx)
            if repeat >= job["warm_up"]:
                rates[kind].append(idx.numel() / (time.perf_counter() - began))
            if not loss < float("inf"):
                fineweb.fail(f"{job['name']}: the loss is {loss}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    result = {"name": job["name"], "kinds": job["kinds"], "device": device_name, "dtype": str(dtype),
              "compiled": compiles, "torch": torch.__version__, "threads": torch.get_num_threads(), "micro_batch": rows,
              "block_size": config.block_size, "rates": rates, "memory": memory}  # fmt: skip
    if "ours" in steps:
        model = steps["ours"].model
        sheet = script.PEAK_FLOPS if dtype != torch.float32 else {}
        known = next((peak for name, peak in sheet.items() if name in device_name), None)
        result["parameters"] = sum(p.numel() for p in model.parameters())
        result["flops_per_token"] = model.flops_per_token()
        if job["profile"]:
            profile(steps["ours"], idx, device, job["profile"], job["name"])
        if not job["memory_only"]:
            result["counted_flops_per_token"] = counted_flops(model, device, config)
            result["peak_flops"] = known or measured_peak(device, dtype)
            result["peak_is"] = "the data sheet's" if known else "a large matrix product's"
    print(json.dumps(result))


def profile(step, idx, device, folder, name):
    """Prints the ten dearest operations of a step and writes a trace for chrome://tracing or Perfetto."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler:
        step(idx, idx)
    Path(folder).mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(f"{folder}/{name}.json")
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=40), file=sys.stderr)


def peers(name):
    """What a script is compared with."""
    return (["transformers"] if name in HF_CLASSES else []) + (["plain"] if name == "gpt2" else ["gpt2"])


def run(**job):
    """Measures a job in a fresh process; returns its result as a dict."""
    process = subprocess.run([sys.executable, "-m", "tools.bench", "--job", json.dumps(job)], cwd=ROOT,
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
    if process.returncode:
        fineweb.fail(f"{job['name']} with micro-batch {job['micro_batch']} could not be measured, see above")
    return json.loads(process.stdout.splitlines()[-1])


def spread(values, digits=0):
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(names())} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="at the shapes of --tiny")
    parser.add_argument("--micro_batch", type=int, nargs="+", help="rows at a time (default: 2 on a CPU, else what fits)")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before them")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8], help="devices to estimate the hours for")
    parser.add_argument("--peers", action="store_true", help="compare with transformers, the plain way and GPT-2")
    parser.add_argument("--profile", metavar="FOLDER", help="write a trace, print the dearest operations")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other values for Config fields")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = fineweb.parse_strictly(parser)
    if args.job:
        return work(json.loads(args.job))
    for name in args.names:
        if name not in names():
            fineweb.fail(f"there is no {name}: choose from {', '.join(names())}")
    options = {}
    for setting in args.set:
        option, _, value = setting.partition("=")
        for name in args.names or names():
            field = importlib.import_module(f"train_{name}").Config.__dataclass_fields__.get(option)
            if field is None:
                fineweb.fail(f"--set {setting}: train_{name}.py has no option {option}")
            try:
                options[option] = field.type(value)
            except ValueError:
                fineweb.fail(f"--set {setting}: {value!r} is not of type {field.type.__name__}")
    if args.repeats < 1 or args.warm_up < 0 or min(args.micro_batch or [1]) < 1:
        fineweb.fail("--repeats and --micro_batch must be at least 1, --warm_up at least 0")
    on_cpu = options.get("device", "auto") == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    git = subprocess.run("git describe --always --dirty --exclude=*", shell=True, cwd=ROOT, capture_output=True, text=True)
    results = []
    for name in args.names or names():
        for rows in args.micro_batch or [16 if args.tiny else 2 if on_cpu else 0]:
            job = dict(name=name, micro_batch=rows, tiny=args.tiny, options=options, repeats=args.repeats,
                       warm_up=args.warm_up, profile=args.profile, memory_only=False)  # fmt: skip
            result = run(kinds=["ours"], **job)
            job["micro_batch"] = result["micro_batch"]  # the peers' too
            results.append(result)
            rate = statistics.median(result["rates"]["ours"])
            mfu = 3 * result["flops_per_token"] * rate / result["peak_flops"]
            hours = ", ".join(f"{TOKENS / rate / n / 3600:,.1f} h on {n}" for n in args.gpus)
            if len(results) == 1:
                print(f"{result['device']}, {result['dtype']}, torch {result['torch']}, {result['threads']} threads, "
                      f"{'compiled' if result['compiled'] else 'not compiled'}; peak: {result['peak_is']} "
                      f"{result['peak_flops'] / 1e12:.2f} TFLOP/s")  # fmt: skip
            print(f"{name:9} micro-batch {result['micro_batch']:3} | {spread(result['rates']['ours'])} tok/s | MFU {mfu:.1%}"
                  f" | {result['memory'] / 1e9:.2f} GB | 10B tokens: {hours}", flush=True)  # fmt: skip
            for peer in peers(name) if args.peers else []:
                # transformers has no multi-token prediction, so that it is off in the comparison
                alike = {"mtp_depth": "0"} if peer == "transformers" and name == "deepseek" else {}
                job |= {"memory_only": True, "profile": None, "options": options | alike}
                try:
                    both = run(kinds=["ours", peer], **job)
                    if peer != "gpt2":
                        both["our_memory"] = run(kinds=["ours"], **job)["memory"] if alike else result["memory"]
                        both["peer_memory"] = run(kinds=[peer], **job)["memory"]
                except SystemExit as failure:  # on a GPU a peer may not fit where ours does
                    print(f"{'':9} / {peer:14} | {failure}", flush=True)
                    continue
                results.append(both)
                ratios = [a / b for a, b in zip(both["rates"]["ours"], both["rates"][peer])]
                line = f"{'':9} / {peer:14} | {spread(ratios, 2)} x its tok/s"
                if peer != "gpt2":
                    line += f" | {both['our_memory'] / both['peer_memory']:.2f} x its {both['peer_memory'] / 1e9:.2f} GB"
                print(line + (" (both without MTP)" if alike else ""), flush=True)
            if args.json:  # after each, so that an end in the middle loses nothing
                args.json.parent.mkdir(parents=True, exist_ok=True)
                facts = {"command": "python -m tools.bench " + " ".join(sys.argv[1:]), "git": git.stdout.strip(), "cpus": os.cpu_count()}
                args.json.write_text(json.dumps({**facts, "results": results}, indent=1))


if __name__ == "__main__":
    main()
