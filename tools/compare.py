"""
Which architecture is better, by how much, and is it real?

    python -m tools.compare log/*     # -> report/: leaderboard.md, index.html, pictures
    python -m tools.compare log/* --save_reference results/x.jsonl    # the band of these runs
    python -m tools.compare log/mine --against results/x.jsonl        # is my curve inside it?

Reads each run's log.jsonl and its predictions item by item. Runs of the same script, to the letter, that
differ in the seed only are pooled. Only runs that saw the same tokens in the same windows, were validated
on the same ones and trained by the same recipe are ranked together; the others get a table of their own,
with the reason. What a run's own paper prescribes instead of a shared value does not set it apart, but is
printed in its row. An unfinished run is shown, but not ranked.

Verdicts are by the final validation loss over seeds: see tools/verdicts.py.
"""
import argparse
import difflib
import json
import math
import shutil
import statistics
import subprocess
from pathlib import Path

import fineweb
from tools import verdicts
from tools.models import count_parameters
from tools.page import make_page
from tools.pictures import draw
from tools.runs import (
    RECIPE_FIELDS,
    RENAMED_FIELDS,
    Unreadable,
    find_copy,
    find_script,
    hash_file,
    pool_runs,
    read_log,  # noqa: F401  for tools.export
    read_run,
    require,
    trained_hash,  # noqa: F401  for tools.export
    without_repeats,
)

BUDGET = 124_475_904

# ----------------------------------------------------------------------------------------------------------
# Is it fair?


def by_paper(run):
    """{recipe field: (the run's value, the shared one)} where the run has its paper's value instead."""
    script = find_script(run)
    found = {}
    if script is None or run.config["recipe"] != "paper":
        return found
    prescribed = getattr(script, "RECIPE", {})  # a script of one's own may lack it
    for field in RECIPE_FIELDS:
        value = run.config[field]
        shared = getattr(script.Config, field, value)
        if prescribed.get(field) == value != shared:
            found[field] = value, shared
    return found


def conditions(run):
    """What must be equal for two runs to be ranked together: {name: value}.

    A field that the run's paper prescribes counts as if it had the shared value.
    """
    config = run.config
    recipe = {field: config[field] for field in RECIPE_FIELDS}
    for field, (_, shared) in by_paper(run).items():
        recipe[field] = shared
    return {
        "tokens": config["max_steps"] * config["batch_tokens"],
        "data": run.facts["data"]["fingerprint"],
        "training shards": config["train_shards"],
        "tokenizer": run.facts["data"]["tokenizer"],
        "block_size": config["block_size"],
        "batch_tokens": config["batch_tokens"],
        "validation tokens": config["val_tokens"],
        "recipe": {field: float(value) for field, value in recipe.items()},
        "changed": run.changed,
        "over the budget": run.facts["parameters"] > BUDGET,
    }


def unlike(run, reference):
    """The reasons, in words, why a run can't be ranked with another. None: their conditions are equal."""
    ours = conditions(run)
    theirs = conditions(reference)
    reasons = []
    for name, value in ours.items():
        other = theirs[name]
        if value == other:
            continue
        if name == "recipe":
            for field in RECIPE_FIELDS:
                if value[field] != other[field]:
                    reasons.append(f"{field} is {value[field]:g}, not {other[field]:g}")
        elif name == "over the budget":
            parameters = max(each.facts["parameters"] for each in (run, reference))
            whose = "" if value else "of those above "
            reasons.append(f"{parameters:,} parameters {whose}are over the budget of {BUDGET:,}")
        elif name == "changed":
            if value:
                reasons.append(f"{', '.join(value)} changed between its first step and its last")
            if other:
                reasons.append(f"{', '.join(other)} changed midway in those above")
        else:
            reasons.append(f"{name}: {value}, not {other}")
    return reasons


def rank(pool):
    """Sorts pools: the finished ones first, by loss."""
    return not pool.finished, pool.loss(), pool.name


def fair_groups(pools):
    """[(pools with equal conditions, by rank, why they are not in the first group)], the largest first.

    Whatever the order of the pools, it is the same.
    """
    groups = {}
    for pool in sorted(pools, key=rank):
        key = json.dumps(conditions(pool.first), sort_keys=True)
        groups.setdefault(key, []).append(pool)
    # by rank where they are of one size, since sorted() keeps the order
    ordered = sorted(groups.values(), key=lambda group: -sum(pool.finished for pool in group))
    main = ordered[0]
    return [(group, unlike(group[0].first, main[0].first)) for group in ordered]


# ----------------------------------------------------------------------------------------------------------
# What differs between pools of one architecture


def lines_changed(ours, theirs):
    """How many lines of two files `diff` marks with < or >; difflib's count where there is no `diff`."""
    if shutil.which("diff"):
        command = ["diff", ours, theirs]
        process = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False)
        return sum(line.startswith(("<", ">")) for line in process.stdout.splitlines())
    a = ours.read_text(encoding="utf-8").splitlines()
    b = theirs.read_text(encoding="utf-8").splitlines()
    count = 0
    for tag, a_from, a_to, b_from, b_to in difflib.SequenceMatcher(None, a, b, False).get_opcodes():
        if tag != "equal":
            count += a_to - a_from + b_to - b_from
    return count


def script_difference(run, other):
    """How the scripts of two runs differ, in words; empty if they don't."""
    if run.script_hash == other.script_hash:
        return ""
    if None in (run.script_hash, other.script_hash):
        return "perhaps another script: one of the two logs doesn't say"
    copies = []
    for each in (run, other):
        copies.append(find_copy(each.folder, each.facts["script"], each.script_hash))
    if None in copies:
        return "edited script"
    return f"edited script, {lines_changed(*copies)} lines"


def differences_between(run, other):
    """What differs between two runs of one architecture, in words, beside the seed."""
    texts = []
    ours = run.fixed_config() | run.facts["data"]
    theirs = other.fixed_config() | other.facts["data"]
    for name in ours | theirs:
        value = ours.get(name, "absent")
        instead = theirs.get(name, "absent")
        if value != instead:
            texts.append(f"{name} {value}, not {instead}")
    if run.changed != other.changed:
        texts.append("changed midway: " + (", ".join(run.changed) or "nothing"))
    script = script_difference(run, other)
    if script:
        texts.append(script)
    if not run.finished:
        texts.append("unfinished")
    return "; ".join(texts) or "nothing but the seed"


def is_edited(run):
    """Whether a run's script is known to be another text than today's."""
    script = find_script(run)
    if script is None or run.script_hash is None:
        return False
    return hash_file(Path(script.__file__)) != run.script_hash


def differences_table(pools):
    """What differs between pools of the same architecture as a Markdown table, empty if there are none."""

    def order(pool):
        return is_edited(pool.first), not pool.finished, pool.name

    rows = []
    for architecture in sorted({pool.first.architecture for pool in pools}):
        same = [pool for pool in pools if pool.first.architecture == architecture]
        reference, *others = sorted(same, key=order)
        for pool in others:
            rows.append([pool.name, reference.name, differences_between(pool.first, reference.first)])
    return table(["run", "beside", "what differs"], rows) if rows else ""


# ----------------------------------------------------------------------------------------------------------
# Tables


def active_parameters(run):
    """Parameters that work on one token: the log's figure, else today's model's of that shape, else None."""
    if "active_parameters" in run.facts:
        return run.facts["active_parameters"]
    script = find_script(run)
    if script is None:
        return None
    renamed = RENAMED_FIELDS.get(run.facts["script"], {})
    fields = {renamed.get(name, name): value for name, value in run.config.items()}
    try:
        total, active = count_parameters(script, script.Config(**fields))
    except (TypeError, SystemExit):  # fields that it hasn't got, or a shape that it doesn't take
        return None
    return active if total == run.facts["parameters"] else None


def table(head, rows, align=None):
    """A Markdown table: its header and rows as lists of str; align: "---" or "--:" for each column."""
    text = ""
    for cells in (head, align or ["---"] * len(head), *rows):
        text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text


def leaderboard(pools, keys):
    """The ranking as a Markdown table, with a column for each score of keys."""
    head = ["", "architecture", "parameters", "active", "training FLOPs", "tokens", "validation loss"]
    head += [f"{task} ({convention}) acc_norm" for task, convention in keys]
    head += ["tokens/s", "device-hours", "seeds"]
    rows = []
    for pool in sorted(pools, key=rank):
        place = str(len(rows) + 1) if pool.finished else "–"
        rows.append([place, *leaderboard_row(pool, keys)])
    return table(head, rows)


def leaderboard_row(pool, keys):
    run = pool.first
    tokens = run.steps * run.config["batch_tokens"]
    flops = 3 * run.facts["flops_per_token"] * tokens  # forward, and backward of twice the work
    active = active_parameters(run)

    name = pool.name
    own = ", ".join(f"{field} {value:g}" for field, (value, _) in by_paper(run).items())
    if own:
        name += f" (its paper's {own})"
    if not pool.finished:
        name += f" (unfinished: step {run.steps} of {run.config['max_steps']})"
    loss = f"{pool.loss():.4f}"
    if len(pool.runs) > 1:
        loss += f" ± {verdicts.half_interval(pool.losses()):.4f}"
    accuracies = []
    for key in keys:
        accuracy = pool.accuracy(key)
        accuracies.append(f"{100 * accuracy[0]:.2f} ± {196 * accuracy[1]:.2f}" if accuracy else "–")

    times = []
    hours = []
    for other in pool.runs:
        events = other.train.values()
        times += [event["ms"] for event in events]
        hours.append(sum(event["ms"] * event["processes"] for event in events) / 3.6e6)
    speed = "–"
    if times:
        speed = f"{run.config['batch_tokens'] / statistics.median(times) * 1000:,.0f}"
    return [
        name,
        f"{run.facts['parameters']:,}",
        "–" if active is None else f"{active:,}",
        f"{flops:.2e}",
        f"{tokens:,}",
        loss,
        *accuracies,
        speed,
        f"{statistics.mean(hours):.3g}",
        str(len(pool.runs)),
    ]


def pairs_tables(differences, key):
    """Two Markdown tables of verdicts.Difference: the pairs one by one, and the matrix of verdicts."""
    rows = []
    cells = {}
    names = []
    for pair in differences:
        loss = f"{pair.loss.difference:+.4f}"
        if pair.loss.half is not None:
            loss += f" ± {pair.loss.half:.4f}"
        accuracy = "–"
        if pair.accuracy:
            accuracy = f"{100 * pair.accuracy.difference:+.2f} ± {100 * pair.accuracy.half:.2f}"
        p_values = ["–" if p is None else f"{p:.3g}" for p in (pair.loss_p, pair.accuracy_p)]
        verdict = pair.verdict()
        title = f"{pair.a.name} – {pair.b.name}"
        rows.append([title, loss, pair.loss.how, p_values[0], verdict, accuracy, p_values[1]])
        cell = "the models differ" if verdict == verdicts.MODELS_DIFFER else verdict
        cells[pair.a.name, pair.b.name] = cell
        cells[pair.b.name, pair.a.name] = verdicts.OPPOSITE.get(cell, cell)
        for pool in (pair.a, pair.b):
            if pool.name not in names:
                names.append(pool.name)
    matrix = []
    for a in names:
        matrix.append([f"**{a}**", *[cells.get((a, b), "") for b in names]])
    title = f"{key[0]} ({key[1]}) acc_norm, points" if key else "accuracy"
    head = ["pair", "validation loss", "by", "p, corrected", "the first has", title, "p, corrected"]
    return table(head, rows), table(["by validation loss", *names], matrix)


# ----------------------------------------------------------------------------------------------------------
# Reference bands


def next_run_interval(values):
    """Half-width of the 95% t interval for one more run's loss, given those of some."""
    from scipy.stats import t

    n = len(values)
    if n == 1:
        return 0.01 * values[0]  # one run says nothing about the spread; take one percent
    return float(t.ppf(0.975, n - 1)) * statistics.stdev(values) * math.sqrt(1 + 1 / n)


def save_reference(path, pools):
    """One line per validated step: the mean over the seeds and the band for one more run like them (95%)."""
    if len(pools) != 1 or not pools[0].finished:
        fineweb.fail("--save_reference needs finished runs of one config that differ in the seed only")
    (pool,) = pools
    content = ""
    steps = pool.curve(lambda run: run.val)
    for step, mean in steps:
        half = next_run_interval([run.val[step] for run in pool.runs])
        line = {
            "step": step,
            "loss": mean,
            "low": mean - half,
            "high": mean + half,
            "n": len(pool.runs),
            "script": pool.first.facts["script"],
            "conditions": conditions(pool.first),
        }
        content += json.dumps(line) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    fineweb.write_atomic(path, lambda f: f.write(content.encode()))
    print(f"{path}: the band of {len(pool.runs)} run(s) at {len(steps)} steps")


def read_reference(path):
    """({step: line}, its conditions with the script's name). Raises SystemExit for another file."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            require(line, "low", "loss", "high", "n")
        wanted = lines[0]["conditions"] | {"script": lines[0]["script"]}
        return {line["step"]: line for line in lines}, wanted
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        fineweb.fail(f"{path} is not a reference: make one by --save_reference")


def against(path, runs):
    """Says step by step whether runs are inside a reference band; returns how many were outside somewhere."""
    band, wanted = read_reference(path)
    outside = 0
    for run in runs:
        steps = sorted(run.val.keys() & band.keys())
        if not steps:
            fineweb.fail(f"{run.folder} and {path} have no validated step in common")
        its = conditions(run) | {"script": run.facts["script"]}
        for name, value in wanted.items():
            if name != "seeds" and its[name] != value:
                print(f"note: {run.folder} has another {name} than the reference: {its[name]}, not {value}")
        rows = []
        inside = 0
        for step in steps:
            line = band[step]
            loss = run.val[step]
            fits = line["low"] <= loss <= line["high"]
            inside += fits
            limits = f"{line['low']:.4f} to {line['high']:.4f}"
            answer = "inside" if fits else "OUTSIDE"
            rows.append([str(step), f"{loss:.4f}", f"{line['loss']:.4f}", limits, answer])
        print(f"{run.folder} against {path} ({band[steps[-1]]['n']} runs)")
        print(table(["step", "loss", "reference", "band", ""], rows))
        print(f"inside at {inside} of {len(steps)} steps\n")
        outside += inside < len(steps)
    return outside


# ----------------------------------------------------------------------------------------------------------
# The report

HOW_TO_READ = (
    "± is half of a 95% interval's width everywhere: of losses over the seeds, by Student's t; of "
    "accuracies over the seeds and the items, with one seed over the items alone. An interval is for its "
    "own figure or pair; p-values are corrected for the number of pairs (Holm), and the verdicts go by "
    "them, at 5%."
)
SHARED_RECIPE = " A paper's own settings are in its row; `--recipe shared` trains with everyone's instead."


def group_report(group, keys):
    """The verdict in words and the tables of pools that are ranked together, as Markdown paragraphs."""
    finished = [pool for pool in group if pool.finished]
    key = keys[0] if keys else None
    differences = verdicts.compare_pairs(finished, key)
    paragraphs = [verdicts.headline(finished, differences) + "\n", leaderboard(group, keys)]
    if differences:
        paragraphs += pairs_tables(differences, key)
    return paragraphs


def report(out, pools, left_out, repeats=()):
    """Writes the tables, pictures and page into a folder; returns the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    paragraphs = ["# Which is better, and is it real?\n"]
    pictures = []
    papers = any(by_paper(pool.first) for pool in pools)
    for number, (group, reasons) in enumerate(fair_groups(pools)):
        if number:
            paragraphs.append("## Not comparable with those above\n")
            paragraphs.append("Ranked apart, because " + "; ".join(reasons) + ".\n")
        keys = {key for pool in group for run in pool.runs for key in run.scores}
        keys = sorted(keys, key=lambda key: (key[0], key[1] != "nanogpt"))
        paragraphs += group_report(group, keys)
        if not number:
            paragraphs.append(HOW_TO_READ + (SHARED_RECIPE if papers else "") + "\n")
        for file, words in draw(out, group, keys, f"group{number + 1}_" if number else ""):
            paragraphs.append(f"![{words}]({file})\n")
            pictures.append(file)
    differing = differences_table(pools)
    if differing:
        paragraphs += ["## What differs between runs of one architecture\n", differing]
    if left_out or repeats:
        paragraphs.append("## Left out\n")
    if left_out:
        paragraphs.append(table(["run", "why"], [[str(folder), why] for folder, why in left_out]))
    paragraphs += [f"{line}.\n" for line in repeats]
    markdown = "\n".join(paragraphs)
    (out / "leaderboard.md").write_text(markdown, encoding="utf-8")
    (out / "index.html").write_text(make_page(markdown, out, pictures), encoding="utf-8")
    return markdown


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, as log/*")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report: report")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with this band instead")
    parser.add_argument("--save_reference", type=Path, metavar="FILE", help="write the runs' band instead")
    args = fineweb.parse_strictly(parser)
    try:
        run_command(args)
    except ImportError as missing:
        fineweb.fail(f"the package {missing.name} is missing: pip install -r requirements.txt")


def run_command(args):
    runs = []
    left_out = []
    folders = {folder.resolve(): folder for folder in args.runs}  # none twice
    for folder in folders.values():
        try:
            runs.append(read_run(folder))
        except Unreadable as reason:
            left_out.append((folder, str(reason)))
            print(f"left out: {folder}: {reason}")
    if not runs:
        fineweb.fail("there is no run to compare: give folders like log/gpt2-tiny")
    if args.against:
        outside = against(args.against, runs)
        raise SystemExit(1 if outside or left_out else 0)
    runs, repeats = without_repeats(runs)
    pools = pool_runs(runs)
    if args.save_reference:
        save_reference(args.save_reference, pools)
    else:
        for line in report(args.out, pools, left_out, repeats).splitlines():
            if not line.startswith("!["):
                print(line)
        print(f"the page: {args.out}/index.html")
    if left_out:
        fineweb.fail(f"{len(left_out)} of {len(folders)} folders were left out, see above")


if __name__ == "__main__":
    main()
