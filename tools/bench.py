"""
How fast do the scripts train on this machine, and how long will ten billion
tokens take?

    python -m tools.bench                        # every script, real shapes
    python -m tools.bench gpt2 llama --micro_batch 2 4 --gpus 8
    python -m tools.bench gpt2 --peers           # beside transformers' class
    python -m tools.bench gpt2 --profile trace   # the costliest operations
    python -m tools.bench --tiny --json results/bench-tiny.json
    python -m tools.bench --suite OUT            # all of a GPU, in ten minutes

A step is forward, backward, clipping and AdamW on one micro-batch of random
tokens. Every line is measured in a fresh process, after a warm-up, and gives
the median and the spread. Memory is the device's peak, on a CPU the process's,
of which Python and torch are about 0.3 GB. --suite has options of its own:
python -m tools.bench --suite --help
"""
import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import fineweb
from tools import weights

ROOT = Path(__file__).parent.parent
TOKENS = 10_000_000_000


def names():
    """The architectures there are, GPT-2 first."""
    found = sorted(path.stem.removeprefix("train_") for path in ROOT.glob("train_*.py"))
    return ["gpt2"] + [name for name in found if name != "gpt2"]


def peers(name):
    """What a script is compared with."""
    library = ["transformers"] if name in weights.HF_CLASSES else []
    return library + ["plain" if name == "gpt2" else "gpt2"]


# ----------------------------------------------------------------------------------------------------------
# In the fresh process: measuring


def make_config(script, job):
    fields = dict(script.RECIPE)
    if job["tiny"]:
        fields |= script.TINY_MODEL | script.TINY_RUN
    return script.Config(**(fields | job["options"]))


def uses_compile(config, device):
    by_default = device.type == "cuda" and os.name == "posix"
    return config.compile == "on" or (config.compile == "auto" and by_default)


class Trainer:
    """One of the things compared, with a method that takes a whole training step.

    kind: "ours" is the script's model, as its loop trains it, and "gpt2" the reference script's. "plain" is
    the script's model with all logits at once and torch's default AdamW, "transformers" that library's class
    of the same shape.
    """

    def __init__(self, kind, script, config, machine):
        torch.manual_seed(config.seed)
        self.kind = kind
        self.config = config
        self.machine = machine
        if kind == "transformers":
            name = script.__name__.removeprefix("train_")
            self.model = weights.hf_model(name, config).to(machine.device)
            matrices = [p for p in self.model.parameters() if p.dim() >= 2]
            vectors = [p for p in self.model.parameters() if p.dim() < 2]
            groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        else:
            self.model = script.Model(config).to(machine.device)
            groups = self.model.optimizer_groups()
        self.net = self.model
        if uses_compile(config, machine.device):
            self.net = torch.compile(self.model, dynamic=False)
        self.is_script = kind in ("ours", "gpt2")
        settings = {"lr": 1e-4, "betas": (config.beta1, config.beta2)}
        if self.is_script:
            settings |= {"eps": config.adam_eps, "fused": machine.device.type != "mps"}
        self.optimizer = torch.optim.AdamW(groups, **settings)
        fp16 = machine.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=fp16)

    def loss(self, idx, targets):
        if self.is_script:
            _, loss = self.net(idx, targets)
            return loss
        if self.kind == "transformers":
            logits = self.net(idx).logits
        else:
            logits, _ = self.net(idx)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def step(self, idx, targets, lr=1e-4):
        """Takes a training step; returns its loss as a float, for which it waits for the device."""
        with self.machine.autocast:
            loss = self.loss(idx, targets)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.is_script:
            self.model.after_step()
        return loss.item()


def make_trainer(kind, script, job, machine):
    """The Trainer of a kind, with the job's options as far as its script has them."""
    if kind == "gpt2":
        script = importlib.import_module("train_gpt2")
    options = {name: value for name, value in job["options"].items() if hasattr(script.Config, name)}
    return Trainer(kind, script, make_config(script, job | {"options": options}), machine)


def measured_peak(device, dtype):
    """FLOP/s of a large matrix product on the device: the peak of one that no table lists."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(times[1:])


def counted_flops(model, device, config):
    """FLOPs per token of a training forward pass by torch's counter; attention's masked half counts too."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    idx = torch.zeros(1, config.block_size, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(idx, idx)
    return counter.get_total_flops() / config.block_size


def peak_memory(device):
    """The most bytes that were in use at a time, on a CPU by the process, or None under Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def profile(trainer, idx, folder, name):
    """Prints the ten most expensive operations of a step; writes a trace for chrome://tracing or Perfetto."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if idx.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        order = "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        trainer.step(idx, idx)
    Path(folder).mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(f"{folder}/{name}.json")
    table = profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=40)
    print(table, file=sys.stderr)


def measure_rates(trainers, rows, job, config, machine):
    """({kind: [tokens/s of each measured step]}, the last batch): the kinds take their steps in turn."""
    torch.manual_seed(0)
    rates = {kind: [] for kind in trainers}
    for repeat in range(job["warm_up"] + job["repeats"]):
        idx = torch.randint(config.vocab_size, (rows, config.block_size), device=machine.device)
        for kind, trainer in trainers.items():
            began = time.perf_counter()
            loss = trainer.step(idx, idx)
            seconds = time.perf_counter() - began
            if repeat >= job["warm_up"]:
                rates[kind].append(idx.numel() / seconds)
            if not loss < float("inf"):
                fineweb.fail(f"{job['name']}: the loss is {loss}")
    return rates, idx


def work(job):
    """Runs in a fresh process: measures the kinds of a job in turn and prints one line of JSON."""
    script = importlib.import_module(f"train_{job['name']}")
    config = make_config(script, job)
    machine = script.start(config, 1)
    trainers = {kind: make_trainer(kind, script, job, machine) for kind in job["kinds"]}
    rows = job["micro_batch"] or script.find_micro_batch(config, 64, machine)
    rates, idx = measure_rates(trainers, rows, job, config, machine)
    result = {
        "name": job["name"],
        "kinds": job["kinds"],
        "device": machine.name,
        "dtype": str(machine.dtype),
        "compiled": uses_compile(config, machine.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "micro_batch": rows,
        "block_size": config.block_size,
        "rates": rates,
        "memory": peak_memory(machine.device),
    }
    if "ours" in trainers:
        model = trainers["ours"].model
        result["parameters"] = sum(p.numel() for p in model.parameters())
        result["flops_per_token"] = model.flops_per_token()
        if job["profile"]:
            profile(trainers["ours"], idx, job["profile"], job["name"])
        if not job["memory_only"]:
            result["counted_flops_per_token"] = counted_flops(model, machine.device, config)
            result |= find_peak(script, machine)
    print(json.dumps(result))


def find_peak(script, machine):
    """The device's FLOP/s, by the data sheet if the script's table has it, and where they are from."""
    known = script.PEAK_FLOPS.get(machine.name)
    if known and machine.dtype != torch.float32:
        return {"peak_flops": known, "peak_is": "the data sheet's"}
    return {"peak_flops": measured_peak(machine.device, machine.dtype), "peak_is": "a large matrix product's"}


# ----------------------------------------------------------------------------------------------------------
# In the first process: starting the others, and what they found in words


def run(**job):
    """Measures a job in a fresh process; returns its result as a dict."""
    command = [sys.executable, "-m", "tools.bench", "--job", json.dumps(job)]
    process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        micro_batch = job["micro_batch"]
        fineweb.fail(f"{job['name']} with micro-batch {micro_batch} could not be measured, see above")
    return json.loads(process.stdout.splitlines()[-1])


def spread(values, digits=0):
    median = f"{statistics.median(values):,.{digits}f}"
    return f"{median} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def gigabytes(memory):
    return "–" if memory is None else f"{memory / 1e9:.2f} GB"


def print_machine(result):
    compiled = "compiled" if result["compiled"] else "not compiled"
    peak = f"{result['peak_is']} {result['peak_flops'] / 1e12:.2f} TFLOP/s"
    print(f"{result['device']}, {result['dtype']}, torch {result['torch']}, "
          f"{result['threads']} threads, {compiled}; peak: {peak}")  # fmt: skip
    if result["memory"] is None:
        print("memory: not measured under Windows")


def print_alone(result, gpus):
    rate = statistics.median(result["rates"]["ours"])
    mfu = 3 * result["flops_per_token"] * rate / result["peak_flops"]
    hours = ", ".join(f"{TOKENS / rate / n / 3600:,.1f} h on {n}" for n in gpus)
    line = f"{result['name']:9} micro-batch {result['micro_batch']:3}"
    line += f" | {spread(result['rates']['ours'])} tok/s | MFU {mfu:.1%} | {gigabytes(result['memory'])}"
    print(f"{line} | 10B tokens: {hours}", flush=True)


def compare_with(peer, job, alone):
    """Measures a script beside a peer, prints how they compare and returns the result, or None if it failed.

    job: that of the script alone, whose result is alone. Memory is measured in a process for each.
    """
    options = job["options"]
    without_mtp = peer == "transformers" and job["name"] == "deepseek"  # that library has no MTP
    if without_mtp:
        options = options | {"mtp_depth": "0"}
    job = job | {"memory_only": True, "profile": None, "options": options}
    try:
        both = run(kinds=["ours", peer], **job)
        if peer != "gpt2":
            ours = run(kinds=["ours"], **job) if without_mtp else alone
            both["our_memory"] = ours["memory"]
            both["peer_memory"] = run(kinds=[peer], **job)["memory"]
    except SystemExit as failure:  # on a GPU a peer may not fit where ours does
        print(f"{'':9} / {peer:14} | {failure}", flush=True)
        return None
    ratios = [ours / theirs for ours, theirs in zip(both["rates"]["ours"], both["rates"][peer])]
    line = f"{'':9} / {peer:14} | {spread(ratios, 2)} x its tok/s"
    if both.get("peer_memory"):
        ratio = both["our_memory"] / both["peer_memory"]
        line += f" | {ratio:.2f} x its {gigabytes(both['peer_memory'])}"
    if without_mtp:
        line += " (both without MTP)"
    print(line, flush=True)
    return both


def parse_settings(settings, chosen):
    """--set's NAME=VALUE as {name: value}. Raises SystemExit for one that not all chosen scripts have."""
    options = {}
    for setting in settings:
        option, _, value = setting.partition("=")
        for name in chosen:
            fields = importlib.import_module(f"train_{name}").Config.__dataclass_fields__
            if option not in fields:
                fineweb.fail(f"--set {setting}: train_{name}.py has no option {option}")
            kind = fields[option].type
            try:
                options[option] = kind(value)
            except ValueError:
                fineweb.fail(f"--set {setting}: {value!r} is not of type {kind.__name__}")
    return options


def default_micro_batch(args, options):
    """Rows at a time where none are asked for; 0 is what fits, to be found out."""
    if args.tiny:
        return 16
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return 0 if has_gpu and options.get("device") != "cpu" else 2


def measure(name, rows, options, args, results):
    """Measures a script, and its peers if asked for; prints and appends the results."""
    job = {
        "name": name,
        "micro_batch": rows,
        "tiny": args.tiny,
        "options": options,
        "repeats": args.repeats,
        "warm_up": args.warm_up,
        "profile": args.profile,
        "memory_only": False,
    }
    alone = run(kinds=["ours"], **job)
    if not results:
        print_machine(alone)
    print_alone(alone, args.gpus)
    results.append(alone)
    if args.peers:
        job["micro_batch"] = alone["micro_batch"]
        for peer in peers(name):
            both = compare_with(peer, job, alone)
            if both:
                results.append(both)


def write_results(path, results):
    fineweb.make_folder(path.parent)
    facts = {
        "command": "python -m tools.bench " + " ".join(sys.argv[1:]),
        "git": fineweb.git_version(ROOT),
        "cpus": os.cpu_count(),
        "results": results,
    }
    fineweb.write_atomic(path, lambda f: f.write(json.dumps(facts, indent=1).encode()))


def main():
    if any(argument.split("=")[0] == "--suite" for argument in sys.argv[1:]):
        from tools import suite

        suite.main()
        return
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(names())} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="at the shapes of --tiny")
    parser.add_argument("--micro_batch", type=int, nargs="+", help="rows; 2 on a CPU, else what fits")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before them")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8], help="estimate the hours for so many")
    parser.add_argument("--peers", action="store_true", help="compare with transformers and GPT-2")
    parser.add_argument("--profile", metavar="FOLDER", help="write a trace, print the top operations")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change Config fields")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = fineweb.parse_strictly(parser)
    if args.job:
        work(json.loads(args.job))
        return
    for name in args.names:
        if name not in names():
            fineweb.fail(f"there is no {name}: choose from {', '.join(names())}")
    if args.repeats < 1 or args.warm_up < 0 or min(args.micro_batch or [1]) < 1:
        fineweb.fail("--repeats and --micro_batch must be at least 1, --warm_up at least 0")
    if min(args.gpus) < 1:
        fineweb.fail("--gpus must be at least 1")
    fineweb.refuse_folder("--json", args.json)
    chosen = args.names or names()
    options = parse_settings(args.set, chosen)
    sizes = args.micro_batch or [default_micro_batch(args, options)]

    results = []
    for name in chosen:
        for rows in sizes:
            measure(name, rows, options, args, results)
            if args.json:  # after each, so that an end in the middle loses nothing
                write_results(args.json, results)


if __name__ == "__main__":
    main()
