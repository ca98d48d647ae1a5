"""Runs the jobs of a study, each in a process of its own that ends when the study does."""
import os
import re
import shlex
import subprocess
import sys
import time

from tqdm import tqdm

import fineweb
from tools.common import ROOT
from tools.compare.runs import add_to_collection
from tools.study import kept

# Runs a training script, or torchrun. When the study ends, however that is, its side of the pipe closes:
# then the script is told to finish its step and save.
CHILD = """
import os, runpy, signal, sys, threading

def end_with_study():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_study, daemon=True).start()
sys.argv = sys.argv[1:]
if sys.argv[0] == "torchrun":
    from torch.distributed.run import main
    main()
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
# glibc returns freed tensors to the kernel: on words page faults are then a third of a step on a CPU.
KEEP_MEMORY = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**34))
SECONDS_BETWEEN_TRIES = 10  # of a run whose folder another process has, as what a killed study has left


def last_step(folder):
    """How many steps a run has done by its log."""
    try:
        with open(folder / "log.jsonl", "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 10_000))
            steps = re.findall(rb'^\{"event": "train", "step": (\d+),.*\}$', file.read(), re.MULTILINE)
    except OSError:
        return 0
    return int(steps[-1]) + 1 if steps else 0


def environment(n_jobs):
    """The environment of a run, one of n_jobs at a time: the user's, and what it leaves open."""
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    found = {"PYTHONUNBUFFERED": "1"} | KEEP_MEMORY | os.environ
    if n_jobs > 1:
        found.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // n_jobs)))
    return found | {"PYTHONPATH": os.pathsep.join(paths)}


def start(job, args, out):
    """Starts a job; whatever can't be started has failed."""
    job.started = time.monotonic()
    run = kept.finished_run(job)  # by what a killed study had left
    if run:
        finished(job, run, args)
        return
    job.step = job.last_checkpoint() or 0
    words = job.command(args.nproc_per_node)
    line = shlex.join(words)
    words = [str(job.script) if word.endswith(".py") else word for word in words if word != "python"]
    try:
        if not job.source.is_here:
            job.folder.mkdir(parents=True, exist_ok=True)
            fineweb.write_atomic(job.script, lambda file: file.write(job.source.text.encode()))
        with fineweb.one_line(f"{out} can't be written"), open(out / f"{job.name}.txt", "a") as file:
            file.write(f"$ {line}\n")
            file.flush()
            job.process = subprocess.Popen(
                [sys.executable, "-c", CHILD, *words],
                env=environment(args.jobs),
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches it once, through us
            )
        job.state = "running"
        tqdm.write(f"{'resumed' if job.step else 'started'}   {job.name}")
    except SystemExit as reason:
        job.state = "failed"
        job.why = str(reason)
        tqdm.write(f"failed    {job.name}: {job.why}")


def finished(job, run, args):
    """Keeps a job's run."""
    add_to_collection(args.collect, [run])
    kept.set_done(job, run)
    tqdm.write(f"finished  {job.name}: loss {run.loss:.4f}, {time.monotonic() - job.started:.0f} s")


def settle(job, stopping, args, out):
    """Puts a job into the state that its ended process has left."""
    job.process.stdin.close()
    status = job.process.returncode
    run = kept.finished_run(job) if status == 0 else None
    if run:
        finished(job, run, args)
        return
    printed = (out / f"{job.name}.txt").read_text(errors="replace").split("\n")
    line = [line for line in printed if line.strip()][-1].strip()[:300]
    job.step = job.last_checkpoint() or 0
    job.state = "to come"
    if stopping:
        tqdm.write(f"stopped   {job.name} at step {job.step} of {job.config.max_steps}")
    elif " is in use by " in line:
        job.started = time.monotonic()  # so that the others go first
        tqdm.write(f"waiting   {line}")
    else:
        job.state = "failed"
        job.why = f"{line if status else 'it was stopped'} ({out}/{job.name}.txt)"
        tqdm.write(f"failed    {job.name}: {job.why}")


def run_jobs(jobs, args, out):
    """Runs the jobs that are to come, so many at a time. Returns whether a signal stopped it."""
    jobs = [job for job in jobs if job.state != "failed"]
    stopping = False
    bar = tqdm(total=sum(job.tokens for job in jobs), unit="tok", unit_scale=True,
               initial=sum(job.step * job.config.batch_tokens for job in jobs),
               mininterval=1 if sys.stderr.isatty() else 600)  # fmt: skip
    with fineweb.noted_signals() as signals, bar:
        while True:
            running = [job for job in jobs if job.state == "running"]
            if signals and not stopping:
                stopping = True
                tqdm.write("stopping: the runs finish their step and save; once more ends this at once")
                for job in running:
                    job.process.terminate()
            for job in running:
                job.step = max(job.step, last_step(job.folder))
                if job.process.poll() is not None:
                    settle(job, stopping, args, out)
            running = [job for job in jobs if job.state == "running"]
            waiting = [job for job in jobs if job.state == "to come"]
            if not running and (stopping or not waiting):
                return stopping
            due = [job for job in waiting if time.monotonic() > job.started + SECONDS_BETWEEN_TRIES]
            for job in due[: 0 if stopping else args.jobs - len(running)]:
                start(job, args, out)
            bar.set_postfix_str(", ".join(f"{job.name} {job.step}" for job in running), refresh=False)
            bar.update(sum(job.step * job.config.batch_tokens for job in jobs) - bar.n)
            time.sleep(0.1)
