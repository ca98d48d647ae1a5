"""The command line of tools.compare: see its package's docstring."""
import dataclasses
from pathlib import Path

import tyro

import fineweb
from tools import compare
from tools.common import parse
from tools.compare import report, runs as reading
from tools.compare.runs import Unreadable


@dataclasses.dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # folders of runs, as log/*, and collections
    only: tuple[str, ...] = ()  # these architectures, or entries of a study, alone
    out: Path = Path("report")  # folder of the report
    shorter: tuple[Path, ...] = ()  # runs of the same models with fewer tokens, for losses at equal cost
    before: tuple[Path, ...] = ()  # runs of the same study before a change of the scripts, to lay beside
    collect: Path | None = None  # add the finished runs to this collection instead


def only(runs, names):
    """The runs of these architectures, or entries of studies. Raises SystemExit for a name without runs."""
    found = []
    missing = set(names)
    for run in runs:
        # a variant's script is train_gpt2_rope
        own = {run.study["entry"]} if run.study else {run.architecture, run.architecture.replace("_", "-")}
        missing -= own
        found += [run] if own & set(names) else []
    if missing:
        fineweb.fail(f"--only {' '.join(sorted(missing))}: no run here has this name")
    return found


def collect(path, runs):
    """Adds the finished of some runs to a collection. Raises SystemExit, and adds nothing, if it can't."""
    runs, lines = reading.without_repeats(runs)
    for line in lines:
        print(line)
    finished = [run for run in runs if run.finished]
    names = [run.folder.name for run in finished]
    for name in names:
        if names.count(name) > 1:
            fineweb.fail(f"two runs have the name {name}, by which a collection knows them: rename a folder")
    try:
        reading.add_to_collection(path, finished)
    except Unreadable as reason:
        fineweb.fail(f"{reason}: nothing was added")
    print(f"{reading.file_of(path)}: {len(finished)} runs added, {len(runs) - len(finished)} aren't finished")


def main():
    args = parse(Args, "tools.compare", compare.__doc__)
    runs, left_out = reading.read_all(args.runs)
    if not runs:
        why_none = "; ".join(f"{where}: {why}" for where, why in left_out) or "none was given"
        fineweb.fail(f"there is no run to compare: {why_none}. Give folders, as log/gpt2, or collections")
    for where, why in left_out:
        print(f"left out: {where}: {why}")
    if args.only:
        runs = only(runs, args.only)
    if args.collect:
        collect(args.collect, runs)
    else:
        shorter, unread = reading.read_all(args.shorter)
        before, unread_before = reading.read_all(args.before)
        left_out += unread + unread_before
        places = [{(run.study["name"], run.study["size"], run.study["entry"]) for run in each if run.study}
                  for each in (runs, before)]  # fmt: skip
        if args.before and not set.intersection(*places):
            fineweb.fail("--before: no run there is of a study, size and entry that is here")
        markdown = report.write_report(args.out, runs, left_out, args.only, shorter, before)
        report.show(markdown, whole=not any(run.study for run in runs))
        print(f"with pictures: {args.out}/leaderboard.md")
    if left_out:
        fineweb.fail(f"{len(left_out)} runs were left out")


if __name__ == "__main__":
    main()
