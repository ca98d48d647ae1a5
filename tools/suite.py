"""
What can a GPU do? Every script at its real shapes, in about ten minutes.

    python -m tools.bench --suite OUT              # cheap scripts first
    python -m tools.bench --suite OUT --only gpt2 rwkv
    python -m tools.bench --suite OUT --tiny       # a rehearsal, on a CPU too

1. curve: two layers of the real width learn a fixed text for 20 steps, three
   times: on the CPU in fp32, on the device uncompiled, and compiled. The
   losses must fall and agree, and so must the gradients at the CPU's last
   weights. Several scripts at a time, beside the tests marked gpu.
2. step: the whole model, compiled, alone on the device: the largest
   micro-batch, tokens/s, memory, the first step's time, hours for 10B tokens.

OUT/NAME.json gets every figure as soon as it is known, OUT/tests.json those
of the tests. Each stage runs in a fresh process with a time limit; if it
fails, the JSON holds its last lines and the others go on. The same command
again does what is missing. The text is the help pages that come with Python,
as bytes.
"""
import argparse
import dataclasses
import datetime
import gc
import importlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

import fineweb
from tools import bench, models

CHEAP_FIRST = ["gpt2", "llama", "mistral", "gemma", "deepseek", "mta", "rwkv"]
STEPS = 20
SETTLING = 3  # steps before the timed ones: the first compiles, the second has AdamW's moments
LEAST_SECONDS = 10  # with less time left no process is started

# Two layers of each kind that a script has, and two pieces of its loops over the context.
# Bytes need no more than 256 ids, but 8,192 keep the head's share of the CPU's work small.
SMALL = dict(n_layer=2, block_size=512, vocab_size=8192, batch_tokens=1024, max_steps=STEPS, warmup_steps=5)
SMALL_OF = {
    "mistral": dict(window=128),
    "gemma": dict(window=128, global_every=2),
    "mta": dict(conv_every=2),
}
# How far a loss may be from the CPU's, in nats. bf16 keeps 8 bits, so each product is off by up to 0.4%,
# but the errors are independent and average out: on a CPU, it moved no loss of these seven curves by over
# 0.006. A wrong scale moves them by tenths. But 20 steps learn the bytes' frequencies and little of their
# order, so losses alone would miss a wrong mask, which moved Mistral's by 0.03. Its gradients were off by
# 20% to 60% of their norm, those in bf16 by less than 1%, and DeepSeek's by 3%, as some tokens choose
# another expert.
TOLERANCE = 0.03
GRADIENT_TOLERANCE = 0.12
LEAST_FALL = 1.0  # nats in 20 steps, from about 9

# Bytes that a row of 1,024 tokens needs, compiled, in bf16, as estimated in results/gpu.md. They only
# choose the first micro-batch to try; what that needs decides about a larger one.
ROW_BYTES = {
    "gpt2": 0.40e9, "llama": 0.40e9, "mistral": 0.40e9, "gemma": 0.62e9, "deepseek": 0.50e9,
    "mta": 0.60e9, "rwkv": 0.90e9,
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------
# One JSON file a script


def read(path):
    """What a JSON file of the suite holds; nothing if there is none or it can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write(path, document):
    """Writes a JSON file of the suite, whole or not at all."""
    text = json.dumps(document, indent=1)
    fineweb.write_atomic(path, lambda file: file.write(text.encode()))


def note(path, stage, **figures):
    """Adds figures to a stage of a JSON file."""
    document = read(path)
    document.setdefault(stage, {}).update(figures)
    write(path, document)


def begin_file(path, facts, again):
    """Makes a JSON file with the facts, or keeps the one that is there if its facts are the same.

    One with other facts, or any with again, gets another name, so that no measurement is lost.
    """
    document = read(path)
    known = document.get("facts", {})
    what = ("git", "script_hash", "torch", "device", "tiny")
    if document and not again and all(known.get(name) == facts[name] for name in what):
        return
    if path.exists():
        kept = path.with_name(f"{path.stem}.until-{time.strftime('%Y%m%d-%H%M%S')}.json")
        path.rename(kept)
        print(f"{path.name} was of another version or device, or was to be made again: it is {kept.name} now")
    note(path, "facts", **facts)


# ----------------------------------------------------------------------------------------------------------
# In a fresh process: the stages


def end_with(parent):
    """Ends this process and those that it starts when process parent has ended, however that happened."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        if hasattr(os, "killpg"):
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def text_rows(rows, length, step):
    """Row r of step s is the text's part number s * rows + r, of length bytes: (rows, length) ids."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    positions = np.arange(rows * length, dtype=np.int64) + step * rows * length
    ids = data[positions % len(data)].astype(np.int64)
    return torch.from_numpy(ids).view(rows, length)


def out_of_memory(error):
    """Whether an error says so, in torch's, cuBLAS's or cuDNN's words."""
    words = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def learn(trainer, script, rows):
    """Trains on the text; yields (loss, seconds) of each step."""
    config = trainer.config
    for step in range(STEPS):
        ids = text_rows(rows, config.block_size + 1, step).to(trainer.machine.device)
        began = time.perf_counter()
        loss = trainer.step(ids[:, :-1], ids[:, 1:], script.get_lr(config, step))
        yield loss, time.perf_counter() - began


def gradients(trainer, rows):
    """{part of the model: its gradients in one vector on the CPU} on the text's next rows."""
    ids = text_rows(rows, trainer.config.block_size + 1, STEPS).to(trainer.machine.device)
    scale = 1024.0 if trainer.machine.dtype == torch.float16 else 1.0  # else small ones would be 0
    with trainer.machine.autocast:
        loss = trainer.loss(ids[:, :-1], ids[:, 1:])
    (loss * scale).backward()
    found = {}
    for name, parameter in trainer.model.named_parameters():
        words = name.split(".")
        part = ".".join(words[:3]) if words[0] == "blocks" else words[0]
        found.setdefault(part, []).append(parameter.grad.flatten().float().cpu() / scale)
    trainer.optimizer.zero_grad(set_to_none=True)
    return {part: torch.cat(vectors) for part, vectors in found.items()}


def furthest(ours, theirs):
    """(the largest distance of a part's gradients, relative to the norm of theirs; which part)."""
    distances = []
    for part, gradient in ours.items():
        distance = (gradient - theirs[part]).norm() / theirs[part].norm()
        distances.append((distance.item() if distance.isfinite() else math.inf, part))
    return max(distances)


def small_config(name, script, tiny):
    """The Config of a script's curve."""
    fields = dict(script.RECIPE) | SMALL | SMALL_OF.get(name, {})
    if tiny:
        fields |= script.TINY_MODEL | dict(block_size=64, vocab_size=257, batch_tokens=128, max_lr=3e-3)
    return script.Config(**fields)


def curve(job, script, tell):
    """Losses of 20 steps on the text: on the CPU in fp32, and on the device uncompiled and compiled."""
    config = small_config(job["name"], script, job["tiny"])
    machine = script.start(config, 1)
    rows = config.batch_tokens // config.block_size
    tell(config=dataclasses.asdict(config), dtype=str(machine.dtype), why=machine.why)
    on_cpu = script.Machine(0, 1, torch.device("cpu"), "cpu", torch.float32, "the reference")
    kinds = [("reference", on_cpu, "off"), ("uncompiled", machine, "off")]
    if bench.uses_compile(config, machine.device):
        kinds.append(("compiled", machine, "on"))
    precision = torch.get_float32_matmul_precision()
    reference = None
    for kind, where, compile in kinds:
        # what the script allows on a GPU, TF32, some CPUs would do, too
        torch.set_float32_matmul_precision("highest" if kind == "reference" else precision)
        trainer = bench.Trainer("ours", script, dataclasses.replace(config, compile=compile), where)
        losses = []
        for loss, seconds in learn(trainer, script, rows):
            losses.append(loss)
            if len(losses) == 1:
                tell(**{f"{kind}_first_step": seconds})
        if reference is None:
            reference = losses
            weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
            wanted = gradients(trainer, rows)
        tell(**{kind: losses, f"{kind}_off_by": largest_difference(losses, reference)})
        trainer.model.load_state_dict(weights)
        off_by, part = furthest(gradients(trainer, rows), wanted)
        tell(**{f"{kind}_gradients_off_by": off_by, f"{kind}_gradients_furthest": part})
    verdict = judge(losses, reference)
    if verdict == "equal" and off_by > GRADIENT_TOLERANCE:
        verdict = f"gradients of {part} are off by {off_by:.0%}"
    tell(verdict=verdict, tolerance=TOLERANCE, gradient_tolerance=GRADIENT_TOLERANCE)


def largest_difference(losses, reference):
    """The largest distance of two curves, in nats; infinite if one is not a number somewhere."""
    differences = [abs(a - b) for a, b in zip(losses, reference, strict=True)]
    if not all(math.isfinite(difference) for difference in differences):
        return math.inf
    return max(differences)


def judge(losses, reference):
    """What a curve is worth, in words: "equal" to the reference and falling, or what is wrong with it."""
    for step, (loss, wanted) in enumerate(zip(losses, reference, strict=True)):
        if not abs(loss - wanted) <= TOLERANCE:  # nor if it is not a number
            return f"differs from step {step} on: {loss:.3f}, not {wanted:.3f}"
    if not losses[-1] < losses[0] - LEAST_FALL:
        return f"does not fall: {losses[0]:.3f} to {losses[-1]:.3f}"
    return "equal"


def measure_sizes(sizes, first, fixed, room, attempt, time_for_another=lambda: True):
    """Measures micro-batches until the largest that fits is found; returns it, or None if none fits.

    sizes: those there are, the smallest first. first: the one to begin with. fixed: bytes that don't
    depend on it. room: bytes there are, None if unknown. attempt(rows) measures one, which means to
    compile it; it returns the peak in bytes, or None if memory ran out. After one that fits, memory is
    taken to be fixed + rows times what a row needed there, so that few need to be tried.
    """
    best = None
    rows = first
    while True:
        peak = attempt(rows)
        if peak is None:
            sizes = [n for n in sizes if n < rows]
        else:
            best = rows
            if room is None:
                return best
            row = max(1, peak - fixed) / best
            sizes = [n for n in sizes if fixed + n * row <= room]
        untried = [n for n in sizes if best is None or n > best]
        if not untried or (best and not time_for_another()):
            return best
        rows = untried[-1]


def first_size(sizes, fixed, room, row):
    """The largest size that should fit if a row needs row bytes; the smallest if none should."""
    if room is None:
        return sizes[-1]
    return max([n for n in sizes if fixed + n * row <= room], default=sizes[0])


def step(job, script, tell):
    """The largest micro-batch of the whole model, and its figures."""
    ends = time.monotonic() + job["limit"]
    config = bench.make_config(script, {"tiny": job["tiny"], "options": {}})
    config = dataclasses.replace(config, warmup_steps=5)
    machine = script.start(config, 1)
    on_gpu = machine.device.type == "cuda"
    model = models.make_model(script, config)
    parameters = sum(p.numel() for p in model.parameters())
    flops = model.flops_per_token()
    # weights, gradients, AdamW's moments in fp32, the weights in 16 bits, the head's gradient once more
    fixed = 18 * parameters + 4 * model.wte.weight.numel()
    room = 0.93 * torch.cuda.mem_get_info()[0] if on_gpu else None
    most = max(1, (65_536 if on_gpu else 256) // config.block_size)  # on a GPU as find_micro_batch
    batch_rows = config.batch_tokens // config.block_size
    sizes = [n for n in range(1, most + 1) if batch_rows % n == 0]
    row = ROW_BYTES.get(job["name"], max(ROW_BYTES.values())) * config.block_size / 1024
    first = first_size(sizes, fixed, room, row)
    peak_flops = job["peak_flops"]
    tell(
        config=dataclasses.asdict(config), dtype=str(machine.dtype), why=machine.why,
        compiled=bench.uses_compile(config, machine.device), parameters=parameters,
        flops_per_token=flops, peak_flops=peak_flops, room=room, predicted_row_bytes=row,
    )  # fmt: skip
    tried = []
    seconds_of_last = 0.0

    def attempt(rows):
        nonlocal seconds_of_last
        began = time.monotonic()
        figures = {"micro_batch": rows}
        tried.append(figures)
        print(f"micro-batch {rows}", flush=True)
        try:
            measure(rows, figures)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            figures["failed"] = str(error).splitlines()[0]
            print(figures["failed"], flush=True)
        tell(tried=tried)
        gc.collect()  # the model and optimizer of this size
        torch.compiler.reset()
        if on_gpu:
            torch.cuda.empty_cache()
        seconds_of_last = time.monotonic() - began
        if "failed" in figures:
            return None
        tell(**figures)  # of the largest so far
        return figures["memory"]

    def measure(rows, figures):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        losses = []
        rates = []
        trainer = bench.Trainer("ours", script, config, machine)
        for loss, seconds in learn(trainer, script, rows):
            losses.append(loss)
            if len(losses) == 1:
                figures["first_step_seconds"] = seconds
                tell(tried=tried)
            if len(losses) > SETTLING:
                rates.append(rows * config.block_size / seconds)
        rate = statistics.median(rates)
        figures["losses"] = losses
        figures["rates"] = rates
        figures["tokens_per_second"] = rate
        figures["memory"] = bench.peak_memory(machine.device)
        figures["mfu"] = 3 * flops * rate / peak_flops
        hours = bench.TOKENS / rate / 3600
        figures["hours_for_10b_tokens"] = {"1": hours, "8": hours / 8}

    def time_for_another():
        return ends - time.monotonic() > 1.5 * seconds_of_last

    best = measure_sizes(sizes, first, fixed, room, attempt, time_for_another)
    if best is None:
        fineweb.fail(f"not one row of {config.block_size} tokens fits")


def tests(job, script, tell):
    """The tests marked gpu."""
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-rfE", "--tb=short"],
        cwd=bench.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(process.stdout)
    lines = process.stdout.strip().splitlines() or ["pytest printed nothing"]
    none_there = process.returncode == 5
    summary = "no test is marked gpu" if none_there else lines[-1].strip("= ")
    tell(exit_status=process.returncode, summary=summary)
    if process.returncode not in (0, 5):
        raise SystemExit(process.returncode)


def device(job, script, tell):
    """What the others need to know of the device: its name and its two ceilings, as measured."""
    import train_gpt2

    machine = train_gpt2.start(train_gpt2.Config(), 1)
    memory = None
    if machine.device.type == "cuda":
        memory = torch.cuda.get_device_properties(machine.device).total_memory
    product = bench.measured_peak(machine.device, machine.dtype)
    known = train_gpt2.PEAK_FLOPS.get(machine.name)
    by_table = known is not None and machine.dtype != torch.float32
    facts = {
        "device": machine.name,
        "kind": machine.device.type,
        "dtype": str(machine.dtype),
        "memory": memory,
        "cuda": torch.version.cuda,
        "peak_flops": known if by_table else product,
        "peak_is": "the data sheet's" if by_table else "a large matrix product's",
        "matrix_product_flops": product,
        "copied_bytes_per_second": copy_speed(machine.device),
    }
    tell(**facts)


def copy_speed(device):
    """Bytes read and written per second by copying a large tensor on the device."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(10):
            target.copy_(source)
        target[0].item()  # waits for the device
        times.append(time.perf_counter() - began)
    return 10 * 2 * size / statistics.median(times[1:])


STAGES = {"curve": curve, "step": step, "tests": tests, "device": device}


def work(job):
    """Runs a stage in this process."""
    end_with(job["parent"])
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    path = Path(job["path"])
    stage = job["stage"]
    script = importlib.import_module(f"train_{job['name']}") if stage in ("curve", "step") else None
    began = time.monotonic()

    def tell(**figures):
        note(path, stage, **figures, seconds=round(time.monotonic() - began, 1))

    STAGES[stage](job, script, tell)
    tell(status="done")


# ----------------------------------------------------------------------------------------------------------
# In the first process: starting the others within their limits


def command(job):
    """What starts a process for a job."""
    return [sys.executable, "-m", "tools.suite", "--job", json.dumps(job)]


class Child:
    """A stage in a process of its own."""

    def __init__(self, job):
        self.job = job | {"parent": os.getpid()}
        self.name = job["name"]
        self.path = Path(job["path"])
        self.stage = job["stage"]
        self.began = time.monotonic()
        self.output = tempfile.TemporaryFile()
        self.cache = tempfile.mkdtemp(prefix="suite-")  # empty, as on a machine's first day
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": self.cache}
        document = read(self.path)
        document[self.stage] = {"status": "running"}
        write(self.path, document)
        self.process = subprocess.Popen(
            command(self.job),
            cwd=bench.ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that it can be ended with all processes that it started
        )

    def ended(self):
        """Whether it has ended; one over its limit is ended, and both are recorded."""
        status = self.process.poll()
        if status is None and time.monotonic() - self.began > self.job["limit"]:
            self.stop()
            self.failed(f"no end after {self.job['limit']:.0f} s")
            return True
        if status is None:
            return False
        self.stop()
        if status == 0 and self.figures().get("status") == "done":
            print(one_line(self.name, self.stage, self.figures()), flush=True)
        elif status < 0:
            self.failed(f"ended by {signal.Signals(-status).name}")
        else:
            self.failed(f"exit status {status}")
        return True

    def figures(self):
        return read(self.path).get(self.stage, {})

    def failed(self, why):
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").splitlines()
        note(self.path, self.stage, status="failed", why=why, last_lines=lines[-15:])
        print(one_line(self.name, self.stage, self.figures()), flush=True)

    def stop(self):
        """Ends what is left of the process and of those that it started, and removes its cache."""
        try:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        except OSError:  # nothing is left
            pass
        self.process.wait()
        shutil.rmtree(self.cache, ignore_errors=True)


def run_jobs(jobs, at_a_time, ends, limit):
    """Runs jobs in order, so many at a time, until the time ends; those without time left are dropped.

    limit: seconds for each, but the last may take what is left.
    """
    waiting = list(jobs)
    running = []
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job = waiting.pop(0)
                left = ends - time.monotonic()
                if left < LEAST_SECONDS:
                    drop(job)
                    continue
                job["limit"] = left if not waiting else min(left, limit)
                running.append(Child(job))
            running = [child for child in running if not child.ended()]
            time.sleep(0.1)
    finally:
        for child in running:
            child.stop()


def drop(job):
    """Says and records that there was no time for a job, unless an earlier try left something."""
    path = Path(job["path"])
    print(f"{job['name']:9} {job['stage']:5} | dropped: no time left, run the same command again", flush=True)
    if job["stage"] not in read(path):
        note(path, job["stage"], status="dropped", why="no time left")


def is_done(path, stage):
    return read(path).get(stage, {}).get("status") == "done"


# ----------------------------------------------------------------------------------------------------------
# In words


def one_line(name, stage, figures):
    """What a stage found, in a line."""
    start = f"{name:9} {stage:5} | {figures.get('seconds', 0):4.0f} s"
    if figures.get("status") != "done":
        last = (figures.get("last_lines") or [""])[-1]
        return f"{start} | {what_stopped(figures)} {last[:120]}".rstrip()
    if stage == "device":
        product = figures["matrix_product_flops"] / 1e12
        speed = figures["copied_bytes_per_second"] / 1e12
        ceilings = f"matrix products {product:.2f} TFLOP/s, copies {speed:.2f} TB/s"
        return f"{start} | {figures['device']}: {ceilings}"
    if stage == "tests":
        return f"{start} | {figures['summary']}"
    if stage == "curve":
        kind = "compiled" if "compiled" in figures else "uncompiled"
        losses = figures[kind]
        return (f"{start} | loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps | {kind} "
                f"against the CPU: {figures['verdict']}")  # fmt: skip
    rate = bench.spread(figures["rates"])
    return f"{start} | micro-batch {figures['micro_batch']} | {rate} tok/s | first step {first_step(figures)}"


def what_stopped(figures):
    """Why a stage is not done, in words."""
    status = figures.get("status", "not measured")
    if status == "running":
        return "the suite was stopped"
    return f"{status}: {figures['why']}" if "why" in figures else status


def first_step(figures):
    return f"{figures['first_step_seconds']:.0f} s"


HEAD = ["", "rows", "tokens/s", "MFU", "memory", "first step", "10B: 1, 8", "loss falls", "against CPU"]


def table_row(name, document):
    """The cells of a script's row."""
    cells = [name]
    step = document.get("step", {})
    if "tokens_per_second" in step:
        hours = step["hours_for_10b_tokens"]
        cells += [
            str(step["micro_batch"]),
            bench.spread(step["rates"]),
            f"{step['mfu']:.1%}",
            bench.gigabytes(step["memory"]),
            first_step(step),
            f"{hours['1']:.1f} h, {hours['8']:.1f} h",
            f"{step['losses'][0]:.2f} to {step['losses'][-1]:.2f}",
        ]
    else:
        cells += ["–", what_stopped(step), "–", "–", "–", "–", "–"]
    curve = document.get("curve", {})
    cells.append(curve.get("verdict") or what_stopped(curve))
    return cells


def print_table(out, names):
    """All that OUT holds, in a table."""
    documents = {name: read(out / f"{name}.json") for name in names}
    rows = [HEAD]
    for name, document in documents.items():
        rows.append(table_row(name, document))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    print()
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    marked = read(out / "tests.json").get("tests", {})
    print(f"tests marked gpu: {marked.get('summary') or marked.get('status', 'not run')}")
    print("10B: hours for 10B tokens on 1 and on 8 of this device, if 8 are 8 times as fast")
    for name, document in documents.items():
        for stage in ("curve", "step"):
            lines = document.get(stage, {}).get("last_lines")
            if lines:
                print(f"{name} {stage}, the last line: {lines[-1][:200]}")


def make_facts(args, found):
    """What each JSON says of how it was made; found: the device's figures."""
    return {
        "command": "python -m tools.bench " + " ".join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git": fineweb.git_version(bench.ROOT),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "cpus": os.cpu_count(),
        "tiny": args.tiny,
        **found,
    }


def find_device(out, ends):
    """The device's figures; a GPU's from a process of its own, which gives the GPU's memory back.

    Raises SystemExit, with the last line of what it said, if that fails.
    """
    if not torch.cuda.is_available():
        found = {}
        device({}, None, found.update)
        return found
    path = out / "device.json"
    path.unlink(missing_ok=True)
    run_jobs([dict(name="device", stage="device", path=str(path), threads=0)], 1, ends, 120)
    figures = read(path).get("device", {})
    path.unlink()
    if figures.get("status") != "done":
        last = (figures.get("last_lines") or [""])[-1]
        fineweb.fail(f"the device could not be looked at ({figures.get('why')}): {last}")
    return {name: value for name, value in figures.items() if name not in ("status", "seconds")}


def parse_command_line():
    """The options. Raises SystemExit for one that is not possible."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.bench", description=__doc__, formatter_class=as_written)
    parser.add_argument("--suite", type=Path, nargs="?", metavar="OUT", help="folder of the JSON files")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join(bench.names())}")
    parser.add_argument("--minutes", type=float, default=10, help="end after so many [10]")
    parser.add_argument("--limit", type=float, default=240, help="seconds for a stage of a script [240]")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--tiny", action="store_true", help="at tiny shapes, to rehearse")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = fineweb.parse_strictly(parser)
    if args.job is None and args.suite is None:
        fineweb.fail("--suite OUT: say which folder is to get the JSON files")
    for name in args.only or []:
        if name not in bench.names():
            fineweb.fail(f"there is no {name}: choose from {', '.join(bench.names())}")
    if min(args.minutes, args.limit) <= 0:
        fineweb.fail("--minutes and --limit must be above 0")
    return args


def stopped(number, frame):
    raise SystemExit("stopped: the same command goes on from here")


def main():
    args = parse_command_line()
    if args.job:
        work(json.loads(args.job))
        return
    ends = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, stopped)
    signal.signal(signal.SIGINT, stopped)
    out = args.suite
    fineweb.make_folder(out)
    out = out.resolve()
    chosen = args.only or bench.names()
    ordered = [name for name in CHEAP_FIRST if name in chosen]
    ordered += [name for name in chosen if name not in CHEAP_FIRST]

    found = find_device(out, ends)
    if found["kind"] == "cpu" and not args.tiny:
        fineweb.fail("the suite at real shapes needs a GPU: add --tiny to rehearse it here")
    facts = make_facts(args, found)
    curves = []
    steps = []
    for name in ordered:
        path = out / f"{name}.json"
        script_hash = fineweb.sha256(bench.ROOT / f"train_{name}.py")[:16]
        begin_file(path, facts | {"script_hash": script_hash}, args.again)
        job = dict(name=name, path=str(path), tiny=args.tiny, peak_flops=found["peak_flops"])
        if not is_done(path, "curve"):
            curves.append(job | {"stage": "curve"})
        if not is_done(path, "step"):
            steps.append(job | {"stage": "step", "threads": 0})
    path = out / "tests.json"
    begin_file(path, facts | {"script_hash": ""}, args.again)
    if not is_done(path, "tests"):
        curves.append(dict(name="tests", stage="tests", path=str(path), threads=0))

    # a curve keeps few cores busy: most of it is the compiler's work
    at_a_time = max(1, min(4, os.cpu_count() // 4))
    for job in curves:
        job["threads"] = 0 if "OMP_NUM_THREADS" in os.environ else max(1, os.cpu_count() // at_a_time)
    run_jobs(curves, at_a_time, ends, args.limit)
    run_jobs(steps, 1, ends, args.limit)
    print_table(out, ordered)


if __name__ == "__main__":
    main()
