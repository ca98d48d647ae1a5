"""
A training script's own step, made and taken as in its main(): the fake GPU
counts it, a real machine is timed with it.
"""
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from fineweb import fail
from tools.common import load_script

WARM_UP = 2  # steps before the timed ones: the first compiles, the second has AdamW's moments


def load(path):
    """A training script as a module. Raises SystemExit if it hasn't what is called here."""
    path = Path(path).resolve()
    if not path.is_file():
        fail(f"there is no script {path}")
    sys.path.insert(0, str(path.parent))
    script, why = load_script(path.stem, path.parent)
    if script is None:
        fail(f"{path.name} {why}")
    for name in ("Config", "Model", "start", "train_step", "find_micro_batch"):
        if not hasattr(script, name):
            fail(f"{path.name} has no {name}: its shape must be that of train_gpt2.py")
    return script


def make_config(script, tiny=False, **fields):
    """The Config of the script's default run, or of its --tiny one, with some fields changed."""
    shape = script.TINY_MODEL | script.TINY_RUN if tiny else {}
    return script.Config(**(script.RECIPE | shape | fields))


class Trainer:
    """A script's model and all that its train_step needs."""

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
        self.net = self.model
        on_linux_gpu = self.device.type == "cuda" and os.name == "posix"
        if config.compile == "on" or (config.compile == "auto" and on_linux_gpu):
            torch._functorch.config.backward_pass_autocast = "off"
            self.net = torch.compile(self.model, dynamic=False)

    def step(self, number, batch, micro_batch):
        """(loss, gradient norm, figures) of the script's train_step on batch (B, T + 1)."""
        parts = (self.net, self.model, self.optimizer, self.scaler)
        return self.script.train_step(*parts, number, batch, micro_batch, self.autocast)


def find_rows(script, config):
    """(rows of the micro-batch that the script would choose on this device, rows of its batch)."""
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


def measure(paths, steps, rows=0, tiny=False):
    """Times scripts that take their steps in turn: [{rows, rates in tokens/s, first_step in s, ...}].

    A step is that of a whole batch on a GPU, and of one micro-batch elsewhere, on random tokens.
    """
    found = []
    trainers = []
    for path in paths:
        script = load(path)
        config = make_config(script, tiny)
        micro_batch, batch_rows = find_rows(script, config)
        micro_batch = rows or micro_batch
        trainer = Trainer(script, config)
        trainers.append(trainer)
        micro_batches = batch_rows // micro_batch if trainer.device.type == "cuda" else 1
        found.append({
            "script": Path(path).name, "rows": micro_batch, "batch_rows": micro_batches * micro_batch,
            "dtype": str(trainer.dtype).removeprefix("torch."), "torch": torch.__version__,
            "flops": 3 * trainer.model.flops_per_token(), "rates": [],
        })  # fmt: skip
    torch.manual_seed(0)
    for number in range(WARM_UP + steps):
        for trainer, mine in zip(trainers, found):
            shape = (mine["batch_rows"], trainer.config.block_size + 1)
            batch = torch.randint(trainer.config.vocab_size, shape, device=trainer.device)
            began = time.perf_counter()
            loss, _, _ = trainer.step(number, batch, mine["rows"])  # waits for the device
            seconds = time.perf_counter() - began
            if not loss < float("inf"):
                fail(f"{mine['script']}: the loss is {loss}")
            mine.setdefault("first_step", seconds)
            if number >= WARM_UP:
                mine["rates"].append(batch[:, 1:].numel() / seconds)
            mine["peak"] = peak_memory(trainer.device)
    return found


def spread(values, digits=0):
    """The median, and the least and the largest."""
    median = f"{statistics.median(values):,.{digits}f}"
    return f"{median} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
