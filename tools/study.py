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
import difflib
import functools
import hashlib
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
import time
import types
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import msgspec
import torch
import torch.overrides

import fineweb
from fineweb import duration, fail, positive, say
from tools import collection, models, runs, vary

ROOT = Path(__file__).parent.parent
STUDIES = Path(__file__).parent / "studies"
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
SET_BY_STUDY = ("run_name", "seed", "max_steps", "max_lr", "min_lr")  # no options of a file
MOST_COLUMNS = 6  # of losses in the table, which is 80 wide
SECONDS_BETWEEN_ESTIMATES = 600  # where the output is no terminal
# How much of a large matrix product's speed a step reaches, to guess with before anything is measured
EFFICIENCY = 0.4

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
# Files: tools/studies/*.toml


Options = dict[str, int | float | str]


class Size(msgspec.Struct, forbid_unknown_fields=True):
    """What a size means; see sizes.toml."""

    about: str
    tiny: bool = False
    max_lr: float | None = None
    min_lr_part: float | None = None  # of max_lr
    max_steps: int | None = None
    warmup_part: float | None = None  # of max_steps
    evaluations: int | None = None
    options: Options = {}
    model: dict[str, Options] = {}  # of a script or a variant


class Sizes(msgspec.Struct, forbid_unknown_fields=True):
    """sizes.toml."""

    own_rate: dict[str, float]
    size: dict[str, Size]


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A model of a study: a script, or variants of one, with options; trained once per rate and seed."""

    base: str | list[str] | None = None  # the entries that it is compared with
    script: str | None = None  # as gpt2; else the entry's name is that of a script or a variant
    variants: list[str] = []
    options: Options = {}
    at: dict[str, Options] = {}  # options at a size
    sizes: list[str] | None = None  # where it is not at all of the study's
    unequal: str | None = None  # why its parameters are not within 2% of its base's

    def bases(self):
        """The names of the entries that it is compared with."""
        return [self.base] if isinstance(self.base, str) else self.base or []


class Study(msgspec.Struct, forbid_unknown_fields=True):
    """A study's file."""

    question: str
    sizes: list[str]
    seeds: list[int]
    runs: dict[str, Entry]
    # multiples of the shared learning rate; "own": a script's best
    rates: list[float | str] = msgspec.field(default_factory=lambda: ["shared"])
    max_steps: dict[str, int] = {}  # at a size, where it is not the size's
    options: Options = {}
    name: str = ""


def read_toml(path, kind):
    """A TOML file as a msgspec.Struct. Raises SystemExit, with one line, if it isn't one."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        fail(f"{path} can't be read: {getattr(error, 'strerror', None) or error}")


def study_names():
    """The names of the studies in tools/studies."""
    return sorted(path.stem for path in STUDIES.glob("*.toml") if path.stem != "sizes")


@functools.cache
def read_sizes():
    """The Sizes. Raises SystemExit, with one line, for a file that makes no sense."""
    path = STUDIES / "sizes.toml"
    sizes = read_toml(path, Sizes)
    for name, size in sizes.size.items():
        check_options(f"{path}, {name}", size.options, *size.model.values())
    return sizes


def read_study(name):
    """The Study of a name, a file, or a variant with its base. Raises SystemExit, with one line."""
    path = Path(name) if name.endswith(".toml") else STUDIES / f"{name}.toml"
    if path.exists() and path.stem != "sizes":
        study = read_toml(path, Study)
        study.name = path.stem
    elif name in vary.variants():
        patch = vary.read_patch(name)
        base = vary.short_name(patch.base)
        entry = Entry(base=base, unequal=patch.header.get("unequal"))
        pair = {base: Entry(), name: entry}
        study = Study(patch.header["question"], list(read_sizes().size), [1, 2, 3], pair)
        study.name = name
    elif name.endswith(".toml"):
        fail(f"there is no file {name}")
    else:
        known = study_names() + vary.variants()
        close = difflib.get_close_matches(name, known, n=1, cutoff=0)
        fail(f"there is no study {name}: did you mean {close[0]}? (--list names the studies, "
             "python -m tools.vary --list the variants)")  # fmt: skip
    check_study(path if path.exists() else name, study)
    return study


def check_options(where, *tables):
    """Raises SystemExit for options that a study sets by itself."""
    for options in tables:
        for name in SET_BY_STUDY:
            if name in options:
                fail(f"{where}: {name} is no option here: seeds, rates and max_steps set it")


def check_study(where, study):
    """Raises SystemExit, with one line, for a study that makes no sense."""
    known = read_sizes().size
    named = [*study.sizes, *study.max_steps]
    if not (study.sizes and study.seeds and study.rates and study.runs):
        fail(f"{where}: needs at least one of sizes, seeds, rates and runs")
    for name in (study.name, *study.runs):
        if not PLAIN_NAME.fullmatch(name):
            fail(f"{where}: {name!r} is to be a part of a folder's name: letters, digits, dots and dashes")
    for rate in study.rates:
        if rate not in ("shared", "own") and not (isinstance(rate, float) and 0 < rate < math.inf):
            fail(f'{where}: rate {rate} is neither a positive number nor "shared" nor "own"')
    if min(study.seeds) < 0:
        fail(f"{where}: seeds must be at least 0")
    check_options(where, study.options)
    for name, entry in study.runs.items():
        check_options(f"{where}, {name}", entry.options, *entry.at.values())
        named += [*entry.at, *(entry.sizes or [])]
        for base in entry.bases():
            if base not in study.runs:
                fail(f"{where}: the base of {name}, {base}, is none of its runs")
        if entry.script and entry.variants:
            fail(f"{where}: {name} has a script and variants: give one of them")
    for size in named:
        if size not in known:
            fail(f"{where}: there is no size {size}, only {', '.join(known)}")
    bases_first(where, study)


def bases_first(where, study):
    """The names of a study's runs, each after its bases. Raises SystemExit if they go round in circles."""
    left = list(study.runs)
    ordered = []
    while left:
        ready = [name for name in left if not set(study.runs[name].bases()) & set(left)]
        if not ready:
            fail(f"{where}: {', '.join(left)} are each other's bases")
        ordered += ready
        left = [name for name in left if name not in ready]
    return ordered


# ==========================================================================
# Scripts


@dataclasses.dataclass
class Source:
    """A training script's text and module; a variant's may not be in a file yet."""

    name: str  # as train_gpt2_rope
    key: str  # the script or variant, as sizes.toml has it: gpt2-rope
    base: str  # the script, as gpt2
    variants: list
    text: str
    module: types.ModuleType

    @property
    def path(self):
        return ROOT / f"{self.name}.py"

    @property
    def hash(self):
        """Its fineweb.script_hash()."""
        if self.path.exists():
            return fineweb.script_hash(self.path)
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def find_source(name, entry):
    """The Source of an entry. Raises SystemExit, with one line, if there is none."""
    variants = entry.variants
    if not variants and entry.script is None and name in vary.variants():
        variants = [name]
    return load_source(entry.script or name, tuple(variants))


class NoInitialisation(torch.overrides.TorchFunctionMode):
    """A context in which models are made without random numbers, which takes long on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@functools.cache
def load_source(script, variants):
    if variants:
        with NoInitialisation():
            file, text, base, _, _ = vary.make(variants)
        name = file.removesuffix(".py")
        script = vary.short_name(base)
    else:
        name = f"train_{script}"
        path = ROOT / f"{name}.py"
        if not path.is_file():
            fail(f"{script} is neither a variant nor is there a {name}.py")
        text = path.read_text(encoding="utf-8")
    module = types.ModuleType(name)
    module.__file__ = str(ROOT / f"{name}.py")
    try:
        exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    except Exception as error:  # whatever a script that is being edited does
        fail(f"{name}.py would not run: {type(error).__name__}: {error}")
    return Source(name, "+".join(variants) or script, script, list(variants), text, module)


def write_variant(source):
    """Writes a variant's script, if it isn't there. Raises SystemExit if another text is."""
    if source.variants and not (source.path.exists() and vary.read_script(source.path) == source.text):
        with redirect_stdout(StringIO()):  # its size, and how to run it
            vary.write_script(source.variants, force=False)


def config_of(source, tiny, options):
    """The Config of a script with options, as its command line makes it. SystemExit for wrong ones."""
    script = source.module
    fields = {field.name: field for field in dataclasses.fields(script.Config)}
    values = {}
    if options.get("recipe", "paper") == "paper":
        values |= script.RECIPE
    if tiny:
        values |= script.TINY_MODEL | script.TINY_RUN
    for name, value in options.items():
        if name not in fields:
            fail(f"{source.name}.py has no option --{name}")
        kind = fields[name].type
        choices = fields[name].metadata.get("choices")
        if isinstance(value, str) != (kind is str) or kind(value) != value:
            fail(f"{source.name}.py: --{name} {value!r} must be of type {kind.__name__}")
        if choices and value not in choices:
            fail(f"{source.name}.py: --{name} {value}: choose from {', '.join(choices)}")
        values[name] = kind(value)
    return script.Config(**values)


# ==========================================================================
# Plan


@dataclasses.dataclass
class Job:
    """One training run of a study, and how far it is."""

    name: str  # of its folder in log/
    place: dict  # name and size of the study, entry, base, rate, as a collection has them
    seed: int
    source: Source
    tiny: bool
    options: dict  # that its command line has
    config: object  # the script's Config with them
    parameters: int
    flops_per_token: float  # of a forward pass
    state: str = "to come"  # or in use, running, done, failed
    why: str = ""  # it failed
    step: int = 0
    loss: float | None = None
    seconds_per_step: float | None = None  # as measured

    @property
    def folder(self):
        return Path("log") / self.name

    @property
    def row(self):
        return self.place["size"], self.place["entry"]

    def tokens(self):
        """What it costs in tokens of training: a forward pass is a third of a step."""
        config = self.config
        evaluations = config.max_steps // config.eval_every + 1
        return config.max_steps * config.batch_tokens + evaluations * config.val_tokens / 3

    def seconds(self, per_step):
        """How long what is left of it takes with so many seconds for a step."""
        left = 1 - self.step / self.config.max_steps
        return per_step * left * self.tokens() / self.config.batch_tokens


def rounded(rate):
    """A learning rate without the last digits of a product."""
    return float(f"{rate:.6g}")


def schedule(size, steps, rate, own):
    """The options for the schedule of a run; own: the script's Config without them."""
    options = {}
    steps = steps or size.max_steps
    if steps:
        part = size.warmup_part
        if part is None:
            part = own.warmup_steps / own.max_steps
        options["max_steps"] = steps
        options["warmup_steps"] = round(part * steps)
        every = own.eval_every if size.evaluations is None else math.inf
        options["eval_every"] = max(1, min(every, steps // (size.evaluations or 4)))
    if size.max_lr or rate != 1:
        max_lr = (size.max_lr or own.max_lr) * rate
        part = size.min_lr_part
        if part is None:
            part = own.min_lr / own.max_lr
        options["max_lr"] = rounded(max_lr)
        options["min_lr"] = rounded(max_lr * part)
    return options


def shape_of(size, source):
    """The options for a source's shape at a size: its own, or the first of its variants', or its base's."""
    for key in (source.key, *source.variants, source.base):
        if key in size.model:
            return size.model[key]
    return {}


def rates_of(asked, source, config):
    """The multiples of the shared learning rate that a script runs with. asked: as in a study's file."""
    rates = []
    for rate in asked:
        if rate == "shared":
            rate = 1.0
        elif rate == "own":
            # a recipe of the script's own has its own rate
            has_recipe = bool(source.module.RECIPE) and config.recipe == "paper"
            rate = 1.0 if has_recipe else read_sizes().own_rate.get(source.base, 1.0)
        if rate not in rates:
            rates.append(rate)
    return rates


def plan_entry(study, size_name, name, args):
    """The Jobs of an entry at a size. Raises SystemExit, with one line, if it can't be trained."""
    entry = study.runs[name]
    size = read_sizes().size[size_name]
    source = find_source(name, entry)
    options = dict(size.options)
    options |= shape_of(size, source)
    options |= study.options | entry.options | entry.at.get(size_name, {})
    if args.data_dir:
        options["data_dir"] = args.data_dir
    own = config_of(source, size.tiny, options)
    steps = args.steps or study.max_steps.get(size_name)
    shape = None
    jobs = []
    for rate in rates_of(args.rates or study.rates, source, own):
        scheduled = schedule(size, steps, rate, own) | options
        for seed in args.seeds or study.seeds:
            label = "" if rate == 1 else f"-x{rate:g}"
            run_name = f"{study.name}-{size_name}-{name}{label}-{seed}"
            given = scheduled | {"seed": seed, "run_name": run_name}
            config = config_of(source, size.tiny, given)
            fineweb.run_folder(run_name)
            if shape is None:
                fineweb.check_run(config, args.nproc_per_node)
                with NoInitialisation():
                    model = models.make_model(source.module, config)
                shape = sum(p.numel() for p in model.parameters()), model.flops_per_token()
            place = {"name": study.name, "size": size_name, "entry": name, "base": entry.base, "rate": rate}
            jobs.append(Job(run_name, place, seed, source, size.tiny, given, config, *shape))
    return jobs


def plan(study, sizes, args):
    """(all Jobs in the order in which they run, a line on each entry that can't be trained).

    Size by size, seed by seed, bases first: so what is there of a study that is cut short is complete.
    """
    ordered = bases_first(study.name, study)
    jobs = []
    problems = []
    for size in sizes:
        here = []
        for name in ordered:
            entry = study.runs[name]
            if (not args.only or name in args.only) and size in (entry.sizes or study.sizes):
                try:
                    here += plan_entry(study, size, name, args)
                except SystemExit as reason:
                    problems.append(f"{name} at {size}: {reason}")
        seeds = args.seeds or study.seeds
        jobs += sorted(here, key=lambda job: (seeds.index(job.seed), job.place["rate"] != 1))
    return jobs, problems


def command(job, args):
    """The words that run a job by hand, from the folder of the scripts."""
    words = [f"{job.source.name}.py"]
    if job.tiny:
        words.append("--tiny")
    for name, value in job.options.items():
        words += [f"--{name}", str(value)]
    if job.folder.exists():
        words.append("--resume")
    if args.nproc_per_node > 1:
        return ["torchrun", "--standalone", f"--nproc_per_node={args.nproc_per_node}", *words]
    return ["python", *words]


def threads(args):
    """OMP_NUM_THREADS of each run, or None to leave that to torch."""
    if args.jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // args.jobs)


def command_line(job, args):
    """The command that runs a job, to copy and paste."""
    line = shlex.join(command(job, args))
    return f"OMP_NUM_THREADS={threads(args)} {line}" if threads(args) else line


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
        return runs.read_log(folder / "log.jsonl").training()[-1]
    except (OSError, runs.Unreadable):  # a run that was killed at once; --resume decides
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
    return dataclasses.replace(run, study=job.place)


def set_done(job, run):
    job.state = "done"
    job.loss = run.loss
    job.step = job.config.max_steps
    if run.median_ms and job.seconds_per_step is None:
        job.seconds_per_step = run.median_ms / 1000


def look_up(jobs, fingerprints, args):
    """Finds out which jobs are done, and which can't be, and adds to the collection what it lacks.

    fingerprints: of the data folders. Returns notes, a line each. Raises SystemExit if the collection
    can't be read.
    """
    collect = args.collect
    collected = {}
    if collection.is_collection(collect):
        try:
            collected = {run.folder.name: run for run in collection.read(collect)}
        except runs.Unreadable as reason:
            fail(f"{reason}: take the line out, and its run is read from log/ or made again")
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
            others = collection.read(path)
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


def add_to(collect, finished):
    """Adds runs to the collection. SystemExit, with a line, if it can't be read or written."""
    if not finished:
        return
    try:
        collection.add(collect, finished)
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


def progress(folder):
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
        line = command_line(job, args)
        words = command(job, args)[1:] if args.nproc_per_node == 1 else command(job, args)
        words = [str(ROOT / word) if word == f"{job.source.name}.py" else word for word in words]
        environment = dict(os.environ)
        paths = [str(ROOT), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment["PYTHONUNBUFFERED"] = "1"  # else what it printed before an error comes after it
        if threads(args):
            environment["OMP_NUM_THREADS"] = str(threads(args))
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
        step, loss = progress(job.folder)
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
        write_variant(job.source)
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
# In words


def seconds_per_flop(jobs):
    """Measured over the jobs whose pace is known; None if none is."""
    measured = []
    for job in jobs:
        if job.seconds_per_step:
            measured.append(job.seconds_per_step / (job.flops_per_token * job.config.batch_tokens))
    return statistics.median(measured) if measured else None


def seconds_left(jobs, at_a_time, guess=None):
    """How long the jobs that are to come will take; None if nothing is known.

    A job whose entry has been measured takes as long as that, another one by its FLOPs. guess: seconds
    for a FLOP of a forward pass and its share of the backward pass, where nothing has been measured.
    """
    per_flop = seconds_per_flop(jobs) or guess
    if per_flop is None:
        return None
    paces = {}
    for job in jobs:
        if job.seconds_per_step:
            paces.setdefault(job.row, []).append(job.seconds_per_step)
    left = []
    for job in jobs:
        if job.state in ("to come", "in use", "running"):
            by_flops = per_flop * job.flops_per_token * job.config.batch_tokens
            pace = statistics.median(paces[job.row]) if job.row in paces else by_flops
            left.append(job.seconds(pace))
    return max(sum(left) / at_a_time, max(left, default=0))


def guessed_seconds_per_flop(jobs, args):
    """A guess for this machine by a large matrix product, or by the GPU's data sheet."""
    script = jobs[0].source.module
    if torch.cuda.is_available():
        peak = script.PEAK_FLOPS.get(torch.cuda.get_device_name(0), 100e12) * args.nproc_per_node
        return 3 / (peak * EFFICIENCY)
    n = 1024
    matrix = torch.rand(n, n)
    matrix @ matrix  # the first one also starts the threads
    began = time.perf_counter()
    matrix @ matrix
    rate = 2 * n**3 / (time.perf_counter() - began)
    return 3 * args.jobs / (rate * EFFICIENCY)


def when(seconds):
    """A time from now, and the clock then: about 3.1h left, until 17:45."""
    ends = time.localtime(time.time() + seconds)
    far = "%a %H:%M" if seconds > 20 * 3600 else "%H:%M"
    return f"about {duration(seconds)} left, until {time.strftime(far, ends)}"


def cell(job):
    """A job's state in at most 8 letters."""
    if job.state == "done":
        return f"{job.loss:.4f}"
    if job.state == "running" or (job.state == "to come" and job.step):
        return f"{100 * job.step // job.config.max_steps}%"
    return {"to come": "–"}.get(job.state, job.state)


def label(rate):
    return "" if rate == 1 else f" x{rate:g}"


def table(jobs):
    """The lines of a table of what each job has come to, a size after the other."""
    lines = []
    for size in dict.fromkeys(job.place["size"] for job in jobs):
        here = [job for job in jobs if job.place["size"] == size]
        rates = list(dict.fromkeys(job.place["rate"] for job in here))
        seeds = list(dict.fromkeys(job.seed for job in here))
        split = len(rates) * len(seeds) > MOST_COLUMNS  # then each rate has rows of its own
        rows = {}
        columns = {}
        for job in here:
            rate = label(job.place["rate"])
            row = job.place["entry"] + (rate if split else "")
            column = f"seed {job.seed}" if split or len(seeds) > 1 else ""
            if not split and len(rates) > 1:
                column = f"{rate.strip() or 'x1'} {column}".replace(" seed ", " s").strip()
            rows.setdefault(row, {})[column or f"seed {job.seed}"] = job
            columns[column or f"seed {job.seed}"] = None
        width = max(len(size), *map(len, rows)) + 1
        if len(columns) > MOST_COLUMNS:
            lines += short_rows(size, rows, width)
            continue
        lines.append(size.ljust(width) + "".join(name.rjust(9) for name in columns))
        for row, cells in rows.items():
            line = row.ljust(width)
            for column in columns:
                line += (cell(cells[column]) if column in cells else "").rjust(9)
            lines.append(line.rstrip())
    return lines


def short_rows(size, rows, width):
    """A table's lines with counts in the place of single runs, where these are too many."""
    states = ("done", "running", "to come", "failed")
    lines = [size.ljust(width) + "".join(state.rjust(9) for state in states) + "mean loss".rjust(11)]
    for row, cells in rows.items():
        jobs = cells.values()
        line = row.ljust(width)
        for state in states:
            line += str(sum(job.state.replace("in use", "to come") == state for job in jobs)).rjust(9)
        losses = [job.loss for job in jobs if job.state == "done"]
        if losses:
            line += f"{statistics.mean(losses):11.4f}"
        lines.append(line)
    return lines


def summary(jobs, at_a_time):
    """How many jobs are done, and when the others will be."""
    done = sum(job.state == "done" for job in jobs)
    failed = sum(job.state == "failed" for job in jobs)
    line = f"{done} of {len(jobs)} runs done"
    if failed:
        line += f", {failed} failed"
    seconds = seconds_left(jobs, at_a_time)
    if seconds:
        line += ", " + when(seconds)
    return line


class Screen:
    """Shows how a study goes on: a table that is drawn anew on a terminal, else a line for each event."""

    def __init__(self, jobs, at_a_time):
        self.jobs = jobs
        self.at_a_time = at_a_time
        self.redraws = sys.stdout.isatty()
        self.drawn = 0  # lines of the table on the screen
        self.next = 0.0 if self.redraws else time.monotonic() + 60

    def event(self, line):
        self.clear()
        say(line)

    def tell(self, child, run):
        """The event that a run has ended."""
        job = child.job
        took = duration(time.monotonic() - child.began)
        if run:
            self.event(f"finished  {job.name}: loss {run.loss:.4f}, {took}")
        elif job.state == "failed":
            self.event(f"failed    {job.name}: {job.why}")
        elif job.state == "to come":
            self.event(f"stopped   {job.name} at step {job.step} of {job.config.max_steps}")
        if run and not self.redraws:
            self.event(summary(self.jobs, self.at_a_time))

    def clear(self):
        if self.drawn:
            sys.stdout.write(f"\x1b[{self.drawn}F\x1b[J")
            self.drawn = 0

    def refresh(self, running):
        """Draws the table, at most once a second; without a terminal a line every ten minutes."""
        if time.monotonic() < self.next:
            return
        lines = []
        for child in running:
            job = child.job
            loss = "" if job.loss is None else f"  loss {job.loss:.3f}"
            lines.append(f"{job.name}  {job.step}/{job.config.max_steps}{loss}")
        lines.append(summary(self.jobs, self.at_a_time))
        if not self.redraws:
            self.next = time.monotonic() + SECONDS_BETWEEN_ESTIMATES
            say("; ".join(lines))
            return
        self.next = time.monotonic() + 1
        columns, rows = os.get_terminal_size()
        whole = table(self.jobs)
        if len(whole) + len(lines) < rows:
            lines = whole + lines
        self.clear()
        for line in lines:
            print(line[: columns - 1])
        sys.stdout.flush()
        self.drawn = len(lines)


# ==========================================================================
# Command line


def show_list():
    """Prints each study's name, sizes, number of runs and question, and the sizes."""
    for name in study_names():
        study = read_study(name)
        size = ", ".join(study.sizes)
        print(f"{name}: {len(study.runs)} models, {len(study.seeds)} seed(s), at {size}")
        print(textwrap.fill(study.question, 76, initial_indent="    ", subsequent_indent="    "))
    print()
    for name, size in read_sizes().size.items():
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
        smallest = min(study.sizes, key=list(read_sizes().size).index)
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
        print(command_line(job, args))
    left = [job for job in jobs if job.state == "to come"]
    if left:
        known = seconds_per_flop(jobs)
        guess = None if known else guessed_seconds_per_flop(jobs, args)
        seconds = seconds_left(jobs, args.jobs, guess)
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
    study = read_study(args.study)
    for name in args.only or []:
        if name not in study.runs:
            fail(f"--only {name}: {study.name} has {', '.join(study.runs)}")
    sizes = choose_sizes(study, args.size)
    args.collect = args.collect or Path("report") / study.name
    if args.collect.is_file():
        fail(f"--collect {args.collect}: is a file, give the name of a folder")
    jobs, problems = plan(study, sizes, args)
    for problem in problems:
        print(f"failed    {problem}")
    if not jobs:
        fail(f"{study.name} has nothing to run at --size {' '.join(sizes)}")
    if not args.dry:
        fineweb.lock_folder(output_folder(study.name), "one start of a study at a time")
    fingerprints = look_at_data(jobs, args.dry)
    for note in look_up(jobs, fingerprints, args) + reuse(jobs, fingerprints, args):
        print(note)
    if args.dry:
        show_commands(jobs, args)
        return
    for job in jobs:
        if job.state == "to come":
            fineweb.open_dataset(job.config.data_dir, job.config.vocab_size, job.config.train_shards)
    stopped = False
    if any(job.state == "to come" for job in jobs):
        screen = Screen(jobs, args.jobs)
        stopped = run_jobs(jobs, args, screen)
        screen.clear()
    finish(jobs, problems, args, stopped)


def finish(jobs, problems, args, stopped):
    """Prints what the study has come to. Raises SystemExit if runs failed, or it was stopped."""
    print("\n".join(table(jobs)))
    failed = [job for job in jobs if job.state == "failed"]
    alike = {}
    for job in failed:
        alike.setdefault(job.why, []).append(job.name)
    for why, names in alike.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"failed    {names[0]}{more}: {why}")
    if stopped:
        print(summary(jobs, args.jobs))
        fail(f"stopped; to go on: {shlex.join(['python', '-m', 'tools.study', *sys.argv[1:]])}")
    if any(job.state == "done" for job in jobs):
        print(f"Next: python -m tools.compare {shlex.quote(str(args.collect))}")
    if failed or problems:
        n = len(failed) + len(problems)
        fail(f"{n} failed: the same command tries again, once it is mended")


if __name__ == "__main__":
    main()
