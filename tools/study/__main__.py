"""The command line of tools.study: see its package's docstring."""
import dataclasses
import shlex
import sys
import textwrap
from pathlib import Path

import tyro

import fineweb
from fineweb import fail
from tools import study as package
from tools.common import parse, short, table
from tools.compare.runs import Unreadable
from tools.study import files, kept, runner
from tools.study.jobs import make_plan


@dataclasses.dataclass
class Args:
    study: tyro.conf.Positional[str] = ""  # a study, its file, or a variant
    list: bool = False  # name the studies and the sizes
    size: tuple[str, ...] = ()  # one or more of its sizes; none: the smallest
    seeds: tuple[int, ...] = ()  # instead of the study's
    only: tuple[str, ...] = ()  # some of its runs
    rates: tuple[float, ...] = ()  # multiples of the learning rate, instead of the study's
    inits: tuple[float, ...] = ()  # multiples of the initial matrices and embeddings, instead of the study's
    steps: int = 0  # another budget, with the same part of warm-up
    data_dir: str = ""  # folder of token shards; empty: the size's
    collect: Path | None = None  # the collection of its runs; none: report/STUDY
    reuse: tuple[Path, ...] = ()  # collections to take equal runs from
    jobs: int = 1  # runs at a time; they share the cores
    nproc_per_node: int = 1  # processes of each, by torchrun
    dry: bool = False  # print the commands, start nothing


def check(args):
    """Raises SystemExit, with one line, for options that make no sense."""
    if not args.study:
        fail("which study? --list names them all")
    if min(args.jobs, args.nproc_per_node) < 1 or args.steps < 0:
        fail("--jobs, --nproc_per_node and --steps must be at least 1")
    if args.jobs > 1 and args.nproc_per_node > 1:
        fail("--jobs and --nproc_per_node don't go together: leave one of them out")
    if not all(0 < factor < float("inf") for factor in (*args.rates, *args.inits)):
        fail("--rates and --inits must be positive numbers")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds, default=0) < 0:
        fail("--seeds must be different numbers of at least 0")


def show_list():
    """Prints each study's name, sizes, number of runs and question, and the sizes."""
    for name in files.study_names():
        study = files.read_study(name)
        print(f"{name}: {len(study.runs)} models, {len(study.seeds)} seed(s), at {', '.join(study.sizes)}")
        print(textwrap.fill(study.question, 79, initial_indent="    ", subsequent_indent="    "))
    for name, size in files.read_sizes().items():
        print(textwrap.fill(f"{name}: {size.about}", 79, subsequent_indent="    "))
    print("A variant's name is a study, too: it against its base (python -m tools.vary --list)")


def choose_sizes(study, asked):
    """The sizes to run. Raises SystemExit for one that the study doesn't have."""
    smallest = min(study.sizes, key=list(files.read_sizes()).index)
    if not asked:
        print(f"--size {smallest}, the smallest of {study.name}: {', '.join(study.sizes)}")
    for size in asked:
        if size not in study.sizes:
            fail(f"--size {size}: {study.name} has {', '.join(study.sizes)}")
    return list(dict.fromkeys(asked or [smallest]))


def look_at_data(jobs, dry):
    """{folder: fingerprint, or None if it isn't here} of the data; makes the offline sample, unless dry."""
    fingerprints = {}
    for config in {job.config.data_dir: job.config for job in jobs}.values():
        folder = config.data_dir
        if folder == fineweb.SAMPLE and not dry:
            fineweb.write_sample()
        is_here = not dry or list(Path(folder).glob("*.bin"))
        data = fineweb.open_dataset(folder, config.vocab_size, config.train_shards) if is_here else {}
        fingerprints[folder] = data.get("fingerprint")
    return fingerprints


def show_commands(jobs, args):
    """What --dry prints."""
    left = [job for job in jobs if job.state == "to come"]
    for job in jobs:
        if job.state == "failed":
            print(f"# {job.name}: {job.why}")
    for job in left:
        path = "" if job.source.is_here else "PYTHONPATH=. "  # to a script that the study writes
        print(path + shlex.join(job.command(args.nproc_per_node)))
    print(f"# {len(left)} of {len(jobs)} runs to do, {short(sum(job.tokens for job in left))} tokens")


def show_losses(jobs):
    """Prints a table of the final losses, or of what has become of the runs."""
    seeds = list(dict.fromkeys(job.config.seed for job in jobs))
    rows = {}
    for job in jobs:
        rate = job.place["rate"]
        row = rows.setdefault((job.place["size"], job.place["entry"] + f" x{rate:g}" * (rate != 1)), {})
        row[job.config.seed] = f"{job.loss:.4f}" if job.state == "done" else job.state
    cells = [[*row, *(found.get(seed, "–") for seed in seeds)] for row, found in rows.items()]
    print(table(["size", "model", *(f"seed {seed}" for seed in seeds)], cells), end="")


def main():
    args = parse(Args, "tools.study", package.__doc__)
    if args.list:
        show_list()
        return
    check(args)
    study = files.read_study(args.study)
    for name in args.only:
        if name not in study.runs:
            fail(f"--only {name}: {study.name} has {', '.join(study.runs)}")
    sizes = choose_sizes(study, args.size)
    args.collect = args.collect or Path("report") / study.name
    out = Path("report") / study.name / "out"
    jobs, problems = make_plan(study, sizes, args)
    if not args.dry and jobs:
        fineweb.lock(out, "one start of a study at a time")
    fingerprints = look_at_data(jobs, args.dry)
    try:
        outdated = kept.look_up(jobs, fingerprints, args)
        for path in args.reuse:
            print(f"{kept.reuse(jobs, fingerprints, path, args)} of {len(jobs)} runs are taken from {path}")
    except Unreadable as reason:
        fail(f"{reason}: take the line out, and its run is read from log/ or made again")
    if outdated:
        print(f"note: kept as done, though their scripts have another text now: {', '.join(outdated)}")
    stopped = False
    if args.dry:
        show_commands(jobs, args)
    elif any(job.state == "to come" for job in jobs):
        stopped = runner.run_jobs(jobs, args, out)
    show_losses(jobs)
    problems += [f"{job.name}: {job.why}" for job in jobs if job.state == "failed"]
    for problem in problems:
        print(f"failed    {problem}")
    if stopped:
        fail(f"stopped; to go on: {shlex.join(['python', '-m', 'tools.study', *sys.argv[1:]])}")
    if any(job.state == "done" for job in jobs):
        print(f"Next: python -m tools.compare {shlex.quote(str(args.collect))}")
    if problems:
        fail("the same command tries again what failed, once it is mended")


if __name__ == "__main__":
    main()
