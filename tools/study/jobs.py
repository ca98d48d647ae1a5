"""The training runs that a study asks for, in the order in which they go, and their commands."""
import dataclasses
import functools
import hashlib
import math
import os
import subprocess
import types
from pathlib import Path

import msgspec

from fineweb import fail
from tools.common import ROOT
from tools.study import vary
from tools.study.files import read_sizes

INIT = "        self.init_weights()\n"  # in a Model's __init__
SCALE = """\
        for name, parameter in self.named_parameters():  # of tools.study --inits
            # maps that begin as an identity, and gains of channels, stay as they are
            if parameter.dim() >= 2 and not any(part in name for part in ("mix", "conv", "r_k")):
                parameter.data *= {}
"""


@dataclasses.dataclass
class Source:
    """A training script's text and module."""

    name: str  # as train_gpt2_rope
    keys: list  # by which sizes.toml may know its shape: gpt2-rope, and its base, gpt2
    text: str
    module: types.ModuleType
    is_here: bool  # beside fineweb.py; else it is written into the run's folder

    @property
    def hash(self):
        """As a run's log has it."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@functools.cache
def load_source(script, variants):
    """The Source of a script, or of variants. Raises SystemExit, with one line, if there is none."""
    if variants:
        file, text, base, _ = vary.make(variants)
        keys = ["+".join(variants), *variants, vary.short_name(base)]
    else:
        file = f"train_{script}.py"
        keys = [script]
        if not (ROOT / file).is_file():
            fail(f"{script} is neither a variant nor is there a {file}")
        text = (ROOT / file).read_bytes().decode()
    name = file.removesuffix(".py")
    return Source(name, keys, text, vary.load_text(name, text), not variants)


def scaled(source, factor):
    """The Source of the same script whose initial matrices and embeddings are factor times as large."""
    if factor == 1:
        return source
    if source.text.count(INIT) != 1:
        fail(f"{source.name}.py: --inits needs the line `{INIT.strip()}` in it, once")
    text = source.text.replace(INIT, INIT + SCALE.format(factor))
    return dataclasses.replace(source, text=text, is_here=False)


def config_of(source, tiny, options):
    """The Config of a script with options, as its command line makes it. SystemExit for wrong ones."""
    script = source.module
    values = vars(script.Config())
    for name in options:
        if name not in values:
            fail(f"{source.name}.py has no option --{name}")
    if options.get("recipe", "paper") == "paper":
        values |= script.RECIPE
    if tiny:
        values |= script.TINY_MODEL | script.TINY_RUN
    try:
        return msgspec.convert(values | options, script.Config)
    except msgspec.ValidationError as error:
        fail(f"{source.name}.py: {error}")


@dataclasses.dataclass
class Job:
    """One training run of a study, and how far it is."""

    name: str  # of its folder in log/
    place: dict  # name and size of the study, entry, base, rate, as a collection has them
    source: Source
    tiny: bool
    options: dict  # that its command line has
    config: object  # the script's Config with them
    state: str = "to come"  # or running, done, failed
    why: str = ""  # it failed
    step: int = 0
    loss: float | None = None
    process: subprocess.Popen | None = None
    started: float = -math.inf  # time.monotonic() then

    @property
    def folder(self):
        return Path("log") / self.name

    @property
    def script(self):
        """The path of its script."""
        return (ROOT if self.source.is_here else self.folder) / f"{self.source.name}.py"

    @property
    def tokens(self):
        return self.config.max_steps * self.config.batch_tokens

    def last_checkpoint(self):
        """The step of its last checkpoint, or None."""
        steps = [int(path.stem[5:]) for path in self.folder.glob("step_*.pt") if path.stem[5:].isdigit()]
        return max(steps, default=None)

    def command(self, processes):
        """The words that run it by hand, from the folder of the scripts."""
        words = [os.path.relpath(self.script, ROOT) if self.source.is_here else str(self.script)]
        words += ["--tiny"] * self.tiny
        for name, value in self.options.items():
            words += [f"--{name}", str(value)]
        if self.last_checkpoint() is not None:
            words.append("--resume")
        if processes > 1:
            return ["torchrun", "--standalone", f"--nproc_per_node={processes}", *words]
        return ["python", *words]


def schedule(size, steps, rate, own):
    """The options for a run's schedule; its parts for warm-up and last rate are those of own, a Config."""
    options = {}
    steps = steps or size.max_steps
    if steps:
        every = math.inf if size.evaluations else own.eval_every
        options["max_steps"] = steps
        options["warmup_steps"] = round(own.warmup_steps / own.max_steps * steps)
        options["eval_every"] = max(1, min(every, steps // (size.evaluations or 4)))
    if size.max_lr or rate != 1:
        max_lr = (size.max_lr or own.max_lr) * rate
        options["max_lr"] = float(f"{max_lr:.6g}")  # without the last digits of a product
        options["min_lr"] = float(f"{max_lr * own.min_lr / own.max_lr:.6g}")
    return options


def settings(rates, inits):
    """The pairs of multiples of the rate and of the initial weights: each varied with the other at 1.

    Where 1 is none of them, the first one is in its place.
    """
    rate = 1.0 if 1 in rates else rates[0]
    init = 1.0 if 1 in inits else inits[0]
    return list(dict.fromkeys([*((r, init) for r in rates), *((rate, i) for i in inits)]))


def plan_entry(study, size_name, name, args):
    """The Jobs of an entry at a size. Raises SystemExit, with one line, if it can't be trained."""
    entry = study.runs[name]
    size = read_sizes()[size_name]
    is_variant = not entry.script and name in vary.variants()
    source = load_source(entry.script or name, tuple(entry.variants or [name] * is_variant))
    shapes = size.shapes or size_name
    model = read_sizes()[shapes].model
    shape = next((model[key] for key in source.keys if key in model), {})
    options = size.options | shape | study.options | entry.options | entry.at.get(shapes, {})
    if args.data_dir:
        options["data_dir"] = args.data_dir
    own = config_of(source, size.tiny, options)
    own_rate = size.own_rate.get(source.keys[-1], 1.0)
    rates = [own_rate if rate == "own" else rate for rate in args.rates or study.rates]
    steps = args.steps or study.max_steps.get(size_name)
    jobs = []
    for rate, init in settings(rates, args.inits or study.inits):
        label, base = (name, entry.base) if init == 1 else (f"{name}-init{init:g}", name)
        place = {"name": study.name, "size": size_name, "entry": label, "base": base, "rate": rate}
        for seed in args.seeds or study.seeds:
            run_name = f"{study.name}-{size_name}-{label}{'' if rate == 1 else f'-x{rate:g}'}-{seed}"
            given = schedule(size, steps, rate, own) | options | {"seed": seed, "run_name": run_name}
            config = config_of(source, size.tiny, given)
            jobs.append(Job(run_name, place, scaled(source, init), size.tiny, given, config))
    return jobs


def make_plan(study, sizes, args):
    """(all Jobs in the order in which they run, a line on each entry that can't be trained).

    Size by size, seed by seed, bases first: so what is there of a study that is cut short is complete.
    """
    jobs = []
    problems = []
    for size in sizes:
        here = []
        for name in study.bases_first():
            if not args.only or name in args.only:
                try:
                    here += plan_entry(study, size, name, args)
                except SystemExit as reason:
                    problems.append(f"{name} at {size}: {reason}")
        seeds = list(args.seeds or study.seeds)
        jobs += sorted(here, key=lambda job: (seeds.index(job.config.seed), job.place["rate"] != 1))
    return jobs, problems
