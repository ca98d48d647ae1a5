"""
What a study is, and the runs that it asks for.

A study is a file, tools/studies/NAME.toml: its question, its entries, each a
script or variants of one with options, and for how many seeds, rates and sizes
each is trained. sizes.toml says what the sizes mean. make_plan() makes a
Job of each run, in the order in which they go.

Raises SystemExit, with one line, for whatever makes no sense. tools.study
trains the runs.
"""
import dataclasses
import difflib
import functools
import hashlib
import math
import os
import re
import shlex
import types
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import msgspec
import torch.overrides

import fineweb
from fineweb import fail
from tools import models, vary

ROOT = Path(__file__).parent.parent
STUDIES = Path(__file__).parent / "studies"
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
SET_BY_STUDY = ("run_name", "seed", "max_steps", "max_lr", "min_lr")  # no options of a file

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


def make_plan(study, sizes, args):
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
