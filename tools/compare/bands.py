"""The band that another run like some seeds falls into: --save_reference and --against."""
import json
import statistics

import fineweb
from tools.common import make_folder, table
from tools.compare import stats
from tools.compare.comparison import conditions, differences

GUESS = 0.01  # of the loss, to both sides: one run says nothing about the spread


def band(line, steps):
    """The band, {low, high}, at a line of a reference with a number of steps."""
    half = stats.band_half(line["sd"], line["n"], steps) if line["n"] > 1 else GUESS * line["loss"]
    return {"low": line["loss"] - half, "high": line["loss"] + half}


def reference_lines(curves):
    """The lines of a reference: {step: loss} of each run -> [{step, loss, n, sd, low, high}]."""
    n = len(curves)
    steps = sorted(set.intersection(*map(set, curves)))
    lines = []
    for step in steps:
        losses = [curve[step] for curve in curves]
        line = {"step": step, "loss": statistics.mean(losses), "n": n}
        line["sd"] = statistics.stdev(losses) if n > 1 else None
        lines.append(line | band(line, len(steps)))
    return lines


def save_reference(path, groups):
    """Writes a line per validated step: mean and standard deviation over the seeds, the band, conditions."""
    if len(groups) != 1 or not groups[0].finished:
        fineweb.fail("--save_reference needs finished runs of one config that differ in the seed only")
    (group,) = groups
    facts = {"script": group.first.facts["script"], "conditions": conditions(group.first)}
    lines = reference_lines([run.val for run in group.runs.values()])
    content = "".join(json.dumps(line | facts) + "\n" for line in lines)
    make_folder(path.parent)
    fineweb.write_atomic(path, lambda f: f.write(content.encode()))
    guess = ", 1% to both sides, as one run doesn't tell the spread" if len(group.runs) == 1 else ""
    print(f"{path}: the band of {len(group.runs)} run(s) at {len(lines)} steps{guess}")


def read_reference(path):
    """({step: line}, the conditions as far as they are known). Raises SystemExit for another file."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            line |= band(line, len(lines))
        wanted = lines[0]["conditions"] | {"script": lines[0]["script"]}
        wanted |= wanted.get("recipe", {})  # older references have these apart
        wanted.setdefault("started from the weights of", wanted.get("weights", ""))
        return {line["step"]: line for line in lines}, wanted
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        fineweb.fail(f"{path} is not a reference: make one by --save_reference")


def against(path, runs):
    """Says whether runs are inside a reference's band; returns how many were outside somewhere."""
    lines, wanted = read_reference(path)
    outside = 0
    for run in runs:
        steps = sorted(run.val.keys() & lines.keys())
        if not steps:
            fineweb.fail(f"{run.folder} and {path} have no validated step in common")
        known = conditions(run) | {"script": run.facts["script"]}
        known = {name: value for name, value in known.items() if name in wanted}
        different = differences(known, {name: wanted[name] for name in known})
        if different:
            print(f"{run.folder} had other conditions than the reference, so that the answer means little: "
                  + "; ".join(different))  # fmt: skip
        rows = []
        missed = 0
        for step in steps:
            low, high = lines[step]["low"], lines[step]["high"]
            fits = low <= run.val[step] <= high
            missed += not fits
            row = [str(step), f"{run.val[step]:.4f}", f"{lines[step]['loss']:.4f}"]
            rows.append([*row, f"{low:.4f} to {high:.4f}", "inside" if fits else "OUTSIDE"])
        verdict = f"outside the band at {missed} of" if missed else "inside the band at all"
        print(f"{run.folder}: {verdict} {len(steps)} steps (the reference has {len(lines)})\n")
        print(table(["step", "loss", "reference", f"band of {lines[steps[0]]['n']} runs", ""], rows))
        outside += bool(missed)
    return outside
