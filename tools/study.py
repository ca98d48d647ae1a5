"""
Many runs, one command: trains what is missing of a study.

    python -m tools.study --list                            # what there is
    python -m tools.study architectures --size 0.25M        # run it
    python -m tools.study gpt2-rope --size 0.25M            # a variant and its
                                                            # base
    python -m tools.study ablations --size 0.8M --jobs 2    # two at a time
    python -m tools.study architectures --size 124M --nproc_per_node 8
    python -m tools.study hybrids --dry                     # commands alone

Kill it whenever you like, and run it again: finished runs are kept, the others
resume where they were. A run that fails is named, and the others go on. Each
run is log/STUDY-SIZE-RUN-SEED, what it printed is in report/STUDY/out/, and
each finished one is added to report/STUDY/runs.jsonl, or --collect DIR, which
tools.compare reads. What is in there counts as done, so a study can be
continued on another machine from that one file. --reuse DIR takes those runs
of another study's collection that are to the letter the same: script, options,
seed and data.

A study is a file of tools/studies/, or any file in that form by its path:
NAME.toml has its question and runs, sizes.toml what the sizes mean.
"""
import argparse
import dataclasses
import hashlib
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import fineweb
from fineweb import duration, fail, positive
from tools import plan, progress
from tools.compare import runs

# Runs a training script, or torchrun, in a process that ends when its parent does: by SIGTERM, on which
# the script finishes its step and saves.
CHILD = """
import os, runpy, sys
import fineweb

parent = int(sys.argv[1])
fineweb.end_with_parent()
if os.getppid() != parent:  # it has ended already
    sys.exit(1)
sys.argv = sys.argv[2:]
if sys.argv[0] == "torchrun":
    from torch.distributed.run import main
    main()
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""

# ==========================================================================
# What there is already


def difference(job, facts, fingerprint, collect):
    """Why the run with these facts is not the job's, in a line; "" if it is.

    fingerprint: that of the job's data, or None if it isn't here. collect: the collection that the run is
    in, or None for its folder in log/. The line doesn't name the run, so that those alike are one line.
    """
    logged = facts["config"]
    where = f"the run of that name in {collect}" if collect else "its folder in log/"
    cure = "choose another --collect" if collect else "move it away"
    cure += ", or give this study's options as they were then"
    for name, value in dataclasses.asdict(job.config).items():
        if name not in runs.VARYING_FIELDS and name in logged and logged[name] != value:
            return f"{where} has --{name} {logged[name]}, but the study asks for {value}: {cure}"
    if fingerprint and facts["data"]["fingerprint"] not in ("", fingerprint):
        return f"{where} has seen other data than that in {job.config.data_dir}: {cure}"
    return ""


def last_start(folder):
    """The facts of a run's last start that trained, or None if there is no log that tells."""
    try:
        return runs.training_starts(*runs.read_log(folder / "log.jsonl"))[-1]
    except (OSError, IndexError):  # a run that was killed at once; --resume decides
        return None


def last_checkpoint(folder):
    """The step of a run's last checkpoint, or None."""
    steps = [int(path.stem[5:]) for path in folder.glob("step_*.pt") if path.stem[5:].isdigit()]
    return max(steps, default=None)


def finished_run(job):
    """The runs.Run of a job that has finished, or None.

    The final loss is logged before the final scores and samples, and the last checkpoint saved after
    them: so a run that was killed between is not finished. If all checkpoints are gone, the log tells.
    """
    try:
        run = runs.read_run(job.folder)
    except runs.Unreadable:
        return None
    if not run.finished or last_checkpoint(job.folder) not in (None, run.steps):
        return None
    return dataclasses.replace(run, study=job.place, machine=this_machine())


def this_machine():
    """A name for this machine, by which a report knows whose times can be compared; the host's isn't told."""
    host = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    return f"{host}, {os.cpu_count()} cores"


def set_done(job, run):
    job.state = "done"
    job.loss = run.loss
    job.step = job.config.max_steps
    if run.median_ms and job.seconds_per_step is None:
        job.seconds_per_step = run.median_ms / 1000


def read_collection(collect):
    """The runs of the collection, none if it isn't there yet. Raises SystemExit if it can't be read."""
    if not runs.is_collection(collect):
        return []
    try:
        return runs.read_collection(collect)
    except runs.Unreadable as reason:
        fail(f"{reason}: take the line out, and its run is read from log/ or made again")


def look_up(jobs, fingerprints, args):
    """Finds out which jobs are done, and which can't be, and adds to the collection what it lacks.

    fingerprints: of the data folders. Returns notes, a line each. Raises SystemExit if the collection
    can't be read.
    """
    collect = args.collect
    collected = {run.folder.name: run for run in read_collection(collect)}
    missing = []
    outdated = {}
    for job in jobs:
        run = collected.get(job.name)
        where = collect if run else None
        if run is None and job.folder.exists():
            run = finished_run(job)
            if run:
                missing.append((job, run))
        facts = run.facts if run else last_start(job.folder)
        if facts:
            job.why = difference(job, facts, fingerprints.get(job.config.data_dir), where)
        if job.why:
            job.state = "failed"
        elif run:
            set_done(job, run)
            if run.script_hash not in (None, job.source.hash):
                outdated.setdefault(job.source.name, []).append(job.name)
        elif facts:
            job.step = last_checkpoint(job.folder) or 0
    if not args.dry:
        add_to(collect, [run for job, run in missing if job.state == "done"])
    notes = []
    for script, names in outdated.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        notes.append(f"note: {script}.py is another text now than when it trained {names[0]}{more}: "
                     "kept as done")  # fmt: skip
    return notes


def same_training(job, run, fingerprint):
    """Whether a run of another study is what a job would train, to the letter.

    fingerprint: that of the job's data. The folders, and what is only shown of a run, may differ.
    """
    if run.seed != job.seed or run.script_hash != job.source.hash or run.changed:
        return False
    if fingerprint is None or run.facts["data"]["fingerprint"] != fingerprint:
        return False
    asked = dataclasses.asdict(job.config)
    if asked.keys() != run.config.keys():
        return False
    return all(run.config[name] == value for name, value in asked.items() if name not in runs.VARYING_FIELDS)


def reuse(jobs, fingerprints, args):
    """Takes runs that jobs to come would only repeat out of other studies' collections, with all they have.

    They are added to the collection as runs of this study. Returns a note for each of the others. Raises
    SystemExit, with a line, for one that can't be read.
    """
    notes = []
    for path in args.reuse or []:
        try:
            others = runs.read_collection(path)
        except runs.Unreadable as reason:
            fail(f"--reuse {path}: {reason}")
        taken = []
        for job in jobs:
            if job.state != "to come" or job.folder.exists():
                continue
            for run in others:
                if same_training(job, run, fingerprints.get(job.config.data_dir)):
                    taken.append(dataclasses.replace(run, folder=job.folder, study=job.place))
                    set_done(job, run)
                    break
        if not args.dry:
            add_to(args.collect, taken)
        notes.append(f"{len(taken)} of {len(jobs)} runs are the same as in {path}, and taken from there")
    return notes


def without_base(study, jobs, args):
    """Notes on entries that --only takes without what they are compared with, a line each.

    A base that the collection has already, with the same size and seed, isn't missing.
    """
    there = set()
    for run in read_collection(args.collect):
        if run.study:
            there.add((run.study["size"], run.study["entry"], run.seed))
    missing = {}
    for job in jobs:
        size, entry = job.row
        for base in study.runs[entry].bases():
            if args.only and base not in args.only and (size, base, job.seed) not in there:
                missing.setdefault(entry, {})[base] = None
    notes = []
    for entry, bases in missing.items():
        notes.append(f"note: --only leaves out what {entry} is compared with: name {' and '.join(bases)}, too")
    return notes


def add_to(collect, finished):
    """Adds runs to the collection. SystemExit, with a line, if it can't be read or written."""
    if not finished:
        return
    try:
        runs.add_to_collection(collect, finished)
    except runs.Unreadable as reason:
        fail(f"{collect} can't be added to: {reason}")


def look_at_data(jobs, dry):
    """{folder: fingerprint} of the data that jobs use, as far as it is here; makes the offline sample."""
    fingerprints = {}
    for job in jobs:
        config = job.config
        folder = config.data_dir
        if folder in fingerprints:
            continue
        if job.tiny and folder == fineweb.SAMPLE and not dry:
            if not fineweb.sample_is_there(Path(folder)):
                fineweb.write_sample(folder)
        fingerprints[folder] = None
        if list(Path(folder).glob("*.bin")):
            data = fineweb.open_dataset(folder, config.vocab_size, config.train_shards)
            fingerprints[folder] = data["fingerprint"]
    return fingerprints


def user_of(folder):
    """Who holds the lock of a run's folder, in words; "" if nobody does."""
    import filelock

    if not (folder / ".lock").exists():
        return ""
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        holder = folder / ".lock.holder"
        return holder.read_text() if holder.exists() else "another process"
    except (OSError, NotImplementedError):  # the script itself says what is wrong
        return ""
    lock.release()
    return ""


# ==========================================================================
# Running


def last_line(path):
    """The last line of a file that isn't empty."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def last_step(folder):
    """(step, loss) of the last training step in a run's log, or (0, None)."""
    try:
        with open(folder / "log.jsonl", "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 10_000))
            lines = file.read().split(b"\n")
    except OSError:
        return 0, None
    for line in reversed(lines[:-1]):  # the last one may be half there
        match = re.match(rb'\{"event": "train", "step": (\d+), "loss": ([^,}]+)', line)
        if match:
            return int(match[1]) + 1, float(match[2])
    return 0, None


class Child:
    """A job in a process of its own."""

    def __init__(self, job, args, out):
        self.job = job
        self.out = out / f"{job.name}.txt"
        line = plan.command_line(job, args)
        words = plan.command(job, args)[1:] if args.nproc_per_node == 1 else plan.command(job, args)
        words = [str(plan.ROOT / word) if word == f"{job.source.name}.py" else word for word in words]
        environment = dict(os.environ)
        paths = [str(plan.ROOT), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment["PYTHONUNBUFFERED"] = "1"  # else what it printed before an error comes after it
        if plan.threads(args):
            environment["OMP_NUM_THREADS"] = str(plan.threads(args))
        with fineweb.one_line(f"{self.out} can't be written"):
            with open(self.out, "a", encoding="utf-8") as file:
                file.write(f"$ {line}\n")
                file.flush()
                self.process = subprocess.Popen(
                    [sys.executable, "-c", CHILD, str(os.getpid()), *words],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that Ctrl-C reaches it once, through us
                )
        self.first_step = job.step
        self.began = time.monotonic()
        job.state = "running"

    def watch(self):
        """Notes the step and pace; returns whether the process has ended."""
        job = self.job
        step, loss = last_step(job.folder)
        if step > job.step:
            job.step, job.loss = step, loss
        steps = job.step - self.first_step
        seconds = time.monotonic() - self.began
        if steps >= 20 and seconds > 5:  # most of it isn't the start
            evaluations = job.tokens() / job.config.max_steps / job.config.batch_tokens
            job.seconds_per_step = seconds / steps / evaluations
        return self.process.poll() is not None

    def settle(self, stopping):
        """Puts the job into the state that its process has left. Returns its run, if it has finished."""
        job = self.job
        run = finished_run(job) if self.process.returncode == 0 else None
        if run:
            set_done(job, run)
            return run
        line = last_line(self.out)
        job.loss = None
        job.step = last_checkpoint(job.folder) or 0
        if stopping:
            job.state = "to come"
        elif " is in use by " in line:  # by what a killed study has left, for some seconds
            job.state = "in use"
        else:
            job.state = "failed"
            how = "it was stopped" if self.process.returncode == 0 else line
            job.why = f"{how} ({self.out})"
        return None


def run_jobs(jobs, args, screen):
    """Runs the jobs that are to come, so many at a time. Returns whether a signal stopped it."""
    signals = fineweb.catch_signals()
    out = output_folder(jobs[0].place["name"])
    running = []
    told = False
    checked = {}  # when a folder in use was last looked at
    while True:
        if signals and not told:
            told = True
            for child in running:
                child.process.terminate()
            if running:
                screen.event("stopping: the runs finish their step and save; once more ends them at once")
        for child in list(running):
            if child.watch():
                running.remove(child)
                run = child.settle(stopping=told)
                if run:
                    add_to(args.collect, [run])
                screen.tell(child, run)
        if not signals:
            for job in jobs:
                if len(running) >= args.jobs:
                    break
                if job.state == "in use" and time.monotonic() - checked.get(job.name, 0) < 1:
                    continue
                if job.state not in ("to come", "in use"):
                    continue
                start(job, args, out, running, checked, screen)
        waiting = [job for job in jobs if job.state in ("to come", "in use")]
        if not running and (told or signals or not waiting):
            return bool(signals)
        screen.refresh(running)
        time.sleep(0.1)


def start(job, args, out, running, checked, screen):
    """Starts a job, unless another process is in its folder; whatever can't be started has failed."""
    checked[job.name] = time.monotonic()
    user = user_of(job.folder)
    if user:
        if job.state != "in use":
            screen.event(f"{job.name} is in use by {user}: it has to wait")
        job.state = "in use"
        return
    run = finished_run(job)  # by what a killed study had left
    if run:
        add_to(args.collect, [run])
        set_done(job, run)
        screen.event(f"finished  {job.name}: loss {run.loss:.4f}, by an earlier start")
        return
    job.step = last_checkpoint(job.folder) or 0
    try:
        plan.write_variant(job.source)
        running.append(Child(job, args, out))
    except SystemExit as reason:
        job.state = "failed"
        job.why = str(reason)
        screen.event(f"failed    {job.name}: {job.why}")
        return
    screen.event(f"{'resumed' if job.step else 'started'}   {job.name}")


def output_folder(name):
    """Where what the runs of a study print is kept, and the study's lock."""
    return Path("report") / name / "out"


# ==========================================================================
# Command line


def show_list():
    """Prints each study's name, sizes, number of runs and question, and the sizes."""
    for name in plan.study_names():
        study = plan.read_study(name)
        size = ", ".join(study.sizes)
        print(f"{name}: {len(study.runs)} models, {len(study.seeds)} seed(s), at {size}")
        print(textwrap.fill(study.question, 76, initial_indent="    ", subsequent_indent="    "))
    print()
    for name, size in plan.read_sizes().size.items():
        print(textwrap.fill(f"{name}: {size.about}", 79, subsequent_indent="    "))
    print("A variant's name is a study, too: it against its base (python -m tools.vary --list)")


def parse_command_line():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.study", description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("study", nargs="?", help="a study, its file, or a variant")
    add("--list", action="store_true", help="name the studies and the sizes")
    add("--size", nargs="+", metavar="SIZE", help="one or more of its sizes [the smallest]")
    add("--seeds", nargs="+", type=int, metavar="N", help="instead of the study's")
    add("--only", nargs="+", metavar="RUN", help="some of its runs")
    add("--rates", nargs="+", type=float, metavar="X", help="multiples of the learning rate, instead of its")
    add("--steps", type=positive, metavar="N", help="another budget, with the same part of warm-up")
    add("--data_dir", metavar="DIR", help="folder of token shards [the size's]")
    add("--collect", type=Path, metavar="DIR", help="the collection of its runs [report/STUDY]")
    add("--reuse", nargs="+", type=Path, metavar="DIR", help="collections to take equal runs from")
    add("--jobs", type=positive, metavar="N", default=1, help="runs at a time; they share the cores [1]")
    add("--nproc_per_node", type=positive, metavar="N", default=1, help="processes of each, by torchrun [1]")
    add("--dry", action="store_true", help="print the commands and an estimate, start nothing")
    args = fineweb.parse_strictly(parser)
    if args.study is None and not args.list:
        fail("which study? --list names them all")
    if args.jobs > 1 and args.nproc_per_node > 1:
        fail("--jobs and --nproc_per_node don't go together: leave one of them out")
    if args.rates and not all(0 < rate < math.inf for rate in args.rates):
        fail("--rates must be positive numbers")
    if args.seeds and (min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds)):
        fail("--seeds must be different numbers of at least 0")
    return args


def choose_sizes(study, asked):
    """The sizes to run. Raises SystemExit for one that the study doesn't have."""
    if not asked:
        smallest = min(study.sizes, key=list(plan.read_sizes().size).index)
        if len(study.sizes) > 1:
            print(f"--size {smallest}, the smallest of {study.name}: {', '.join(study.sizes)}")
        return [smallest]
    for size in asked:
        if size not in study.sizes:
            fail(f"--size {size}: {study.name} has {', '.join(study.sizes)}")
    return list(dict.fromkeys(asked))


def show_commands(jobs, args):
    """What --dry prints."""
    written = set()
    for job in jobs:
        if job.state == "failed":
            print(f"# {job.name}: {job.why}")
        if job.state != "to come":
            continue
        source = job.source
        if source.variants and not source.path.exists() and source.name not in written:
            written.add(source.name)
            print(shlex.join(["python", "-m", "tools.vary", *source.variants]))
        print(plan.command_line(job, args))
    left = [job for job in jobs if job.state == "to come"]
    if left:
        known = progress.seconds_per_flop(jobs)
        guess = None if known else progress.guessed_seconds_per_flop(jobs, args)
        seconds = progress.seconds_left(jobs, args.jobs, guess)
        tokens = sum(job.config.max_steps * job.config.batch_tokens for job in left)
        basis = "by the runs that are done" if known else "a guess by the speed of matrix products"
        amount = f"{tokens / 1e9:.3g}B" if tokens >= 1e9 else fineweb.short(tokens)
        print(f"# {len(left)} of {len(jobs)} runs to do, {amount} tokens: "
              f"about {duration(seconds)}, {basis}")  # fmt: skip


def main():
    args = parse_command_line()
    if args.list:
        show_list()
        return
    study = plan.read_study(args.study)
    for name in args.only or []:
        if name not in study.runs:
            fail(f"--only {name}: {study.name} has {', '.join(study.runs)}")
    sizes = choose_sizes(study, args.size)
    args.collect = args.collect or Path("report") / study.name
    if args.collect.is_file():
        fail(f"--collect {args.collect}: is a file, give the name of a folder")
    jobs, problems = plan.make_plan(study, sizes, args)
    for problem in problems:
        print(f"failed    {problem}")
    if not jobs:
        fail(f"{study.name} has nothing to run at --size {' '.join(sizes)}")
    if not args.dry:
        fineweb.lock_folder(output_folder(study.name), "one start of a study at a time")
    fingerprints = look_at_data(jobs, args.dry)
    notes = look_up(jobs, fingerprints, args) + reuse(jobs, fingerprints, args)
    for note in notes + without_base(study, jobs, args):
        print(note)
    if args.dry:
        show_commands(jobs, args)
        return
    for job in jobs:
        if job.state == "to come":  # data that are not there fail before anything starts
            fineweb.open_dataset(job.config.data_dir, job.config.vocab_size, job.config.train_shards)
    stopped = False
    if any(job.state == "to come" for job in jobs):
        screen = progress.Screen(jobs, args.jobs)
        stopped = run_jobs(jobs, args, screen)
        screen.clear()
    finish(jobs, problems, args, stopped)


def finish(jobs, problems, args, stopped):
    """Prints what the study has come to. Raises SystemExit if runs failed, or it was stopped."""
    print("\n".join(progress.table(jobs)))
    failed = [job for job in jobs if job.state == "failed"]
    alike = {}
    for job in failed:
        alike.setdefault(job.why, []).append(job.name)
    for why, names in alike.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"failed    {names[0]}{more}: {why}")
    if stopped:
        print(progress.summary(jobs, args.jobs))
        fail(f"stopped; to go on: {shlex.join(['python', '-m', 'tools.study', *sys.argv[1:]])}")
    if any(job.state == "done" for job in jobs):
        print(f"Next: python -m tools.compare {shlex.quote(str(args.collect))}")
    if failed or problems:
        n = len(failed) + len(problems)
        fail(f"{n} failed: the same command tries again, once it is mended")


if __name__ == "__main__":
    main()
