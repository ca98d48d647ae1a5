"""
A training script's own step, as its main() takes it: the fake GPU counts it, a
real machine is timed with it. And the timing, each script in a process of its
own, their steps in turn.
"""
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from fineweb import fail
from tools.common import ROOT

WARM_UP = 2  # steps before the timed ones: the first compiles, the second has AdamW's moments


def load(path):
    """A training script as a module. Raises SystemExit if it hasn't what the tools of this folder call."""
    path = Path(path).resolve()
    if not path.is_file():
        fail(f"there is no script {path.name} in {path.parent}")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = script  # a dataclass looks its module up
    spec.loader.exec_module(script)
    missing = [name for name in ("Config", "Model", "start", "train_step", "find_micro_batch")
               if not hasattr(script, name)]  # fmt: skip
    if missing:
        fail(f"{path.name} has no {', '.join(missing)}: its shape must be that of train_gpt2.py")
    return script


def make_config(script, tiny=False, **fields):
    """The Config of the script's default run, or of its --tiny one, with some fields changed."""
    shape = script.TINY_MODEL | script.TINY_RUN if tiny else {}
    return script.Config(**(script.RECIPE | shape | fields))


class Trainer:
    """A script's model and all that its train_step needs, made as in main()."""

    def __init__(self, script, config):
        self.script = script
        self.config = config
        self.device, self.dtype = script.start(config, 1)
        torch.manual_seed(config.seed)
        self.model = script.Model(config).to(self.device)
        groups = self.model.optimizer_groups()
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=config.adam_eps, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        by_default = self.device.type == "cuda" and os.name == "posix"
        self.compiles = config.compile == "on" or (config.compile == "auto" and by_default)
        self.net = self.model
        if self.compiles:
            torch._functorch.config.backward_pass_autocast = "off"
            self.net = torch.compile(self.model, dynamic=False)

    def step(self, number, batch, micro_batch):
        """(loss, gradient norm, figures) of the script's train_step on batch (B, T + 1)."""
        parts = (self.net, self.model, self.optimizer, self.scaler)
        return self.script.train_step(*parts, number, batch, micro_batch, self.autocast)


def rows_that_fit(script, config):
    """The micro-batch that the script would choose on this device, and the rows of its batch."""
    device, dtype = script.start(config, 1)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    rows = config.batch_tokens // config.block_size
    return script.find_micro_batch(config, rows, 1, device, autocast), rows


def peak_memory(device):
    """The most bytes that were in use at a time, on a CPU by the process; None where that isn't known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ==========================================================================
# Timing


def work(job):
    """In a process of its own: takes a step for each line of the input and prints its figures as JSON."""
    script = load(job["script"])
    config = make_config(script, job["tiny"])
    micro_batch, rows = rows_that_fit(script, config)
    micro_batch = job["rows"] or micro_batch
    trainer = Trainer(script, config)
    on_gpu = trainer.device.type == "cuda"
    rows = rows // micro_batch * micro_batch if on_gpu else micro_batch  # a CPU takes a minute for all
    generator = torch.Generator().manual_seed(0)
    facts = {
        "device": torch.cuda.get_device_name() if on_gpu else trainer.device.type,
        "dtype": str(trainer.dtype), "torch": torch.__version__, "rows": micro_batch,
        "flops": 3 * trainer.model.flops_per_token(),
    }  # fmt: skip
    print(json.dumps(facts), flush=True)
    for number, line in enumerate(sys.stdin):
        batch = torch.randint(config.vocab_size, (rows, config.block_size + 1), generator=generator)
        batch = batch.to(trainer.device)
        profiler = contextlib.nullcontext()
        if line.strip():
            profiler = torch.profiler.profile()
        began = time.perf_counter()
        with profiler:
            loss, _, _ = trainer.step(number, batch, micro_batch)
        seconds = time.perf_counter() - began
        if line.strip():
            print_profile(profiler, Path(line.strip()), on_gpu)
        rate = rows * config.block_size / seconds
        print(json.dumps({"rate": rate, "seconds": seconds, "loss": loss,
                          "peak": peak_memory(trainer.device)}), flush=True)  # fmt: skip


def print_profile(profiler, path, on_gpu):
    """The ten most expensive operations of a step; a trace for Perfetto or chrome://tracing."""
    profiler.export_chrome_trace(str(path))
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=40)
    print(table, file=sys.stderr)


class Worker:
    """A script in a process that takes a step when it is told to."""

    def __init__(self, script, rows, tiny):
        self.name = Path(script).stem
        job = {"script": str(Path(script).resolve()), "rows": rows, "tiny": tiny}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.gpu", "work", json.dumps(job)],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.facts = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            fail(f"{self.name} could not be measured: see above")
        return json.loads(line)

    def step(self, profile=""):
        self.process.stdin.write(f"{profile}\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(scripts, steps, rows=0, tiny=False, profile=None):
    """[(facts, [figures of each timed step])] of scripts, which take their steps in turn."""
    workers = []
    try:
        for script in scripts:
            workers.append(Worker(script, rows, tiny))
        figures = [[] for _ in workers]
        for number in range(WARM_UP + steps):
            for worker, mine in zip(workers, figures):
                mine.append(worker.step())
        for worker in workers if profile else ():
            profile.mkdir(parents=True, exist_ok=True)
            worker.step(profile.resolve() / f"{worker.name}.json")
    finally:
        for worker in workers:
            worker.close()
    return [(worker.facts, mine) for worker, mine in zip(workers, figures)]


def spread(values, digits=0):
    """The median, and the least and the largest."""
    median = f"{statistics.median(values):,.{digits}f}"
    return f"{median} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
