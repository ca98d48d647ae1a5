"""
A real GPU, script by script: are losses and gradients the CPU's, how fast is
the whole step, and how far from the estimate?

Two layers of the real width learn a fixed text for 20 steps: on the CPU in
fp32, on the device uncompiled, and compiled. Then the script's own step is
timed alone on the device.
"""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from fineweb import fail
from tools import common
from tools.gpu import report, step

STEPS = 20
LIMIT = 900  # seconds for a script
# Bytes need no more than 256 ids, but 8,192 keep the head's share of the CPU's work small.
SMALL = dict(n_layer=2, block_size=512, vocab_size=8192, batch_tokens=1024, max_steps=STEPS, warmup_steps=5)
SMALL_IF = dict(window=128, global_every=2, conv_every=2)  # where the script has them: a layer of each kind
# How far a loss may be from the CPU's, in nats. bf16 keeps 8 bits, but errors average out: on a CPU it moved
# no loss by over 0.006. Losses of 20 steps alone would miss a wrong mask, which moved Mistral's by 0.03; its
# gradients were off by 20% to 60% of their norm, those in bf16 by less than 1%, and DeepSeek's by 3%, as
# some tokens choose another expert.
TOLERANCE = 0.03
GRADIENT_TOLERANCE = 0.12
LEAST_FALL = 1.0  # nats in 20 steps, from about 9


def text_rows(rows, length, number):
    """Step number's part of a text that comes with Python: (rows, length) ids of bytes."""
    from pydoc_data.topics import topics

    data = np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), dtype=np.uint8)
    positions = np.arange(rows * length, dtype=np.int64) + number * rows * length
    return torch.from_numpy(data[positions % len(data)].astype(np.int64)).view(rows, length)


def gradients(trainer, rows):
    """{part of the model: its gradients in one vector on the CPU} on the text's next rows."""
    batch = text_rows(rows, trainer.config.block_size + 1, STEPS).to(trainer.device)
    with trainer.autocast:
        _, loss = trainer.net(batch[:, :-1], batch[:, 1:])
    trainer.scaler.scale(loss).backward()
    found = {}
    for name, parameter in trainer.model.named_parameters():
        words = name.split(".")
        part = ".".join(words[:3]) if words[0] == "blocks" else words[0]
        gradient = parameter.grad.flatten().float().cpu() / trainer.scaler.get_scale()
        found.setdefault(part, []).append(gradient)
    trainer.optimizer.zero_grad(set_to_none=True)
    return {part: torch.cat(vectors) for part, vectors in found.items()}


def furthest(ours, theirs):
    """(the largest distance of a part's gradients, relative to the norm of theirs; which part)."""
    distances = []
    for part, gradient in ours.items():
        distance = ((gradient - theirs[part]).norm() / theirs[part].norm()).item()
        distances.append((distance if math.isfinite(distance) else math.inf, part))
    return max(distances)


def judge(losses, reference, off_by, part):
    """"equal" if a curve falls as the reference does and its gradients agree, or what is wrong."""
    for number, (loss, wanted) in enumerate(zip(losses, reference, strict=True)):
        if not abs(loss - wanted) <= TOLERANCE:  # nor if it is not a number
            return f"differs from step {number} on: {loss:.3f}, not {wanted:.3f}"
    if not losses[-1] < losses[0] - LEAST_FALL:
        return f"does not fall: {losses[0]:.3f} to {losses[-1]:.3f}"
    if off_by > GRADIENT_TOLERANCE:
        return f"gradients of {part} are off by {off_by:.0%}"
    return "equal"


def small_config(script, tiny, **fields):
    """The Config of a script's curve."""
    fields |= SMALL | {name: value for name, value in SMALL_IF.items() if hasattr(script.Config, name)}
    if tiny:
        fields |= script.TINY_MODEL | dict(block_size=64, vocab_size=257, batch_tokens=128, max_lr=3e-3)
    return step.make_config(script, **fields)


def curves(script, tiny):
    """{cpu, uncompiled, compiled: losses of the script's curve, distance of the gradients, verdict}."""
    kinds = {"cpu": dict(device="cpu", compile="off"), "uncompiled": dict(compile="off")}
    if torch.cuda.is_available():
        kinds["compiled"] = dict(compile="on")
    found = {}
    for kind, fields in kinds.items():
        config = small_config(script, tiny, **fields)
        rows = config.batch_tokens // config.block_size
        if kind == "cpu":
            torch.set_float32_matmul_precision("highest")  # some CPUs would take less where a GPU takes TF32
        trainer = step.Trainer(script, config)
        losses = []
        for number in range(STEPS):
            batch = text_rows(rows, config.block_size + 1, number).to(trainer.device)
            losses.append(trainer.step(number, batch, rows)[0])
        if kind == "cpu":
            reference = losses
            weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
            wanted = gradients(trainer, rows)
        trainer.model.load_state_dict(weights)
        off_by, part = furthest(gradients(trainer, rows), wanted)
        verdict = judge(losses, reference, off_by, part)
        found[kind] = {"losses": losses, "gradients_off_by": off_by, "verdict": verdict}
    return found


def work(job):
    """In a process of its own: prints what is measured of a script as JSON."""
    found = curves(step.load(job["script"]), job["tiny"])
    torch.compiler.reset()
    [measured] = step.measure([job["script"]], 8, tiny=job["tiny"])
    verdict = list(found.values())[-1]["verdict"]
    print(json.dumps(measured | {"curve": verdict, "curves": found, "tiny": job["tiny"]}))


def measure(script, tiny):
    """What work says of a script, or {"failed": why}."""
    job = json.dumps({"script": str(Path(script).resolve()), "tiny": tiny})
    command = [sys.executable, "-m", "tools.gpu", "work", job]
    try:
        done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, timeout=LIMIT,
                              check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"no end after {LIMIT} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing was said"]
    print("\n".join(lines[-15:]), file=sys.stderr)
    return {"failed": lines[-1][:200]}


def run(scripts, folder, tiny):
    """Checks scripts one after the other, each into its file of the folder, and prints the table."""
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or tiny):
        fail("check needs a GPU: rehearse it here with --tiny, or use fake, which needs none")
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    gpu = re.sub(r"\W+", "-", name.lower())
    gpu = next((key for key, kind in report.GPUS.items() if kind.name == name), gpu)
    records = []
    for script in scripts:
        record = {"script": Path(script).name, "hash": common.script_hash(Path(script)), "gpu": gpu}
        path = report.path_of(folder, script, gpu)
        for file in (path, report.path_of(common.ROOT / "results/gpu", script, gpu)):
            before = json.loads(file.read_text()) if file.exists() else {}
            if before.get("hash") == record["hash"]:  # else it is of another version
                record = before | record
        if record.get("measured", {}).get("tiny") != tiny or "failed" in record["measured"]:
            record["measured"] = measure(script, tiny)
            report.write(path, record)
        print(report.summary([record]).splitlines()[-1], flush=True)
        records.append(record)
    print("\n" + report.summary(records))
    wrong = [record["script"] for record in records if record["measured"].get("curve") != "equal"]
    if wrong:
        fail(f"not as on the CPU, or not to be measured: {', '.join(wrong)}")
