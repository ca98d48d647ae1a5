"""
Which architecture is better, by how much, and is it real?

    python -m tools.compare log/*        # -> report/: the page, leaderboard.md
    python -m tools.compare results/demo log/mine
                                         # with the runs of a collection
    python -m tools.compare results/demo --only gpt2 llama
                                         # of these architectures alone
    python -m tools.compare log/gpt2-? --save_reference results/x.jsonl
                                         # the band of these runs' losses
    python -m tools.compare log/mine --against results/x.jsonl
                                         # is my curve inside it?

Reads each run's log.jsonl and its predictions item by item, and collections,
which tools.study makes: many runs in one runs.jsonl. Runs of the same script,
to the letter, that differ in the seed only are pooled. Only runs that saw the
same tokens in the same windows, were validated on the same ones, trained by
the same recipe and started from the same weights are ranked together; the
others get a table of their own, with the reason. What a run's own paper
prescribes instead of a shared value does not set it apart, but is printed in
its row. An unfinished run is shown, but not ranked. Accuracies are compared
over the same items only. The runs of a study are compared with their bases
first: see tools/effects.py.

Verdicts are by the final validation loss over seeds: see tools/verdicts.py.
With --against, the answer is for the curve as a whole: one more run like those
of the reference is inside at all steps in at least 95% of cases.
"""
import argparse
import difflib
import json
import math
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import fineweb
from tools import collection, effects, verdicts
from tools.models import parameters_of
from tools.page import Folded, as_html, as_markdown, table
from tools.pictures import draw
from tools.runs import (
    RECIPE_FIELDS,
    find_copy,
    find_script,
    is_edited,
    load_script,
    pool_runs,
    require,
    without_copies,
    without_repeats,
)

BUDGET = 124_475_904
PICTURE = re.compile(r"!\[[^\]]*\]\(([^()/]+\.png)\)")  # in leaderboard.md
FRESH = "on fresh text"  # the head of a column
MOST_TOGETHER = 10  # entries of a study whose pairs and curves are shown

# ----------------------------------------------------------------------------------------------------------
# Is it fair?


def by_paper(run):
    """{recipe field: (the run's value, the shared one)} where the run has its paper's value instead."""
    script = find_script(run)
    found = {}
    if script is None or run.recipe != "paper":
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
        "weights": run.init_from,
        "size": run.study["size"] if run.study else "",
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
        elif name == "weights":
            if value:
                reasons.append(f"it started from the weights in {value}")
            if other:
                reasons.append(f"those above started from the weights in {other}")
        elif name == "size":
            if value:
                reasons.append(f"its size in its study is {value}")
            if other:
                reasons.append(f"the size of those above in their study is {other}")
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


def differences_table(pools):
    """What differs between pools of the same architecture as a Markdown table, empty if there are none."""

    def order(pool):
        return is_edited(pool.first), not pool.finished, pool.name

    rows = []
    for architecture in sorted({pool.first.architecture for pool in pools}):
        same = [pool for pool in pools if pool.first.architecture == architecture]
        reference, *others = sorted(same, key=order)
        for pool in others:
            folders = ", ".join(str(run.folder) for run in pool.runs)
            what = differences_between(pool.first, reference.first)
            rows.append([pool.name, reference.name, what, folders])
    return table(["run", "beside", "what differs", "its folders"], rows) if rows else ""


# ----------------------------------------------------------------------------------------------------------
# Tables


def parameter_cells(run):
    """How many parameters of a run are trained, evaluated, active, embedding and not embedding."""
    found = parameters_of(run)
    if found:
        counts = [found.trained, found.evaluated, found.active, found.embedding, found.non_embedding]
        return [f"{count:,}" for count in counts]
    active = run.facts.get("active_parameters")
    return [f"{run.facts['parameters']:,}", "–", f"{active:,}" if active else "–", "–", "–"]


def score_name(key):
    task, convention = key
    return f"{task} ({convention}) acc_norm"


def leaderboard(pools, keys):
    """The ranking as a Markdown table, with a column for each score of keys."""
    head = ["rank", "architecture", "validation loss", "bits per byte"]
    head += [f"{score_name(key)}, %" for key in keys]
    head += ["parameters", "evaluated", "active", "embedding", "non-embedding"]
    head += ["training FLOPs", "tokens", "tokens/s", "device-hours", "seeds"]
    rows = []
    for pool in sorted(pools, key=rank):
        place = str(len(rows) + 1) if pool.finished else "–"
        rows.append([place, *leaderboard_row(pool, keys)])
    return table(head, rows, ["--:", "---"] + ["--:"] * (len(head) - 2))


def name_cell(pool):
    """A pool's name with what its paper prescribes, and how far it has come."""
    run = pool.first
    name = pool.name
    own = ", ".join(f"{field} {value:g}" for field, (value, _) in by_paper(run).items())
    if own:
        name += f" (its paper's {own})"
    if not pool.finished:
        name += f" (unfinished: step {run.steps} of {run.config['max_steps']})"
    return name


def loss_cell(pool):
    loss = f"{pool.loss():.4f}"
    if len(pool.runs) > 1:
        loss += f" ± {verdicts.half_interval(pool.losses()):.4f}"
    return loss


def leaderboard_row(pool, keys):
    """A pool's cells, without its rank."""
    run = pool.first
    tokens = run.steps * run.config["batch_tokens"]
    flops = 3 * run.facts["flops_per_token"] * tokens  # forward, and backward of twice the work
    bits, _ = pool.bits_per_byte()
    accuracies = []
    for key in keys:
        accuracy = pool.accuracy(key)
        accuracies.append(f"{100 * accuracy[0]:.2f} ± {100 * accuracy[1]:.2f}" if accuracy else "–")

    medians = [other.median_ms for other in pool.runs if other.median_ms]
    speed = "–"
    if medians:
        speed = f"{run.config['batch_tokens'] / statistics.median(medians) * 1000:,.0f}"
    hours = statistics.mean(other.device_ms for other in pool.runs) / 3.6e6
    return [
        name_cell(pool),
        loss_cell(pool),
        "–" if bits is None else f"{bits:.4f}",
        *accuracies,
        *parameter_cells(run),
        f"{flops:.2e}",
        f"{tokens:,}",
        speed,
        f"{hours:.3g}",
        str(len(pool.runs)),
    ]


def machines(pools):
    """A line if not all runs are known to be of one machine; else it is empty."""
    if len({run.machine for pool in pools for run in pool.runs}) == 1:
        return ""
    return ("Not all of these runs were trained on one machine: their tokens/s, device-hours and the picture "
            "against time don't compare.")  # fmt: skip


def unknown_bytes(pools):
    """A line on each reason why pools have no loss in bits per byte."""
    names = {}
    for pool in pools:
        bits, why = pool.bits_per_byte()
        if bits is None:
            names.setdefault(why, []).append(pool.name)
    lines = []
    for why, unknown in names.items():
        lines.append(f"Bits per byte of {verdicts.listed(unknown)} are not known: {why}.")
    return lines


def set_other_items_apart(pools, key):
    """Takes out of a score those of the pools, by rank, whose items aren't the most pools'; a line on why.

    The line is empty if all have the same items.
    """
    have = {pool.name: pool.items(key) for pool in pools}
    counts = {}
    for items in have.values():
        if items:
            counts[items] = counts.get(items, 0) + 1
    if not counts:
        return ""
    n, labels = max(counts, key=lambda items: (items[1] is not None, counts[items]))
    others = []
    for pool in pools:
        items = have[pool.name]
        if items and items[0] == n and (items[1] == labels or None in (items[1], labels)):
            continue
        if items:
            others.append(f"{pool.name} has {items[0]:,} others")
        elif all(key in run.scores for run in pool.runs):
            others.append(f"the seeds of {pool.name} have different ones")
        else:
            continue  # not scored at all
        pool.set_apart.add(key)
    if not others:
        return ""
    return f"{score_name(key)} is compared over the same {n:,} items; {', '.join(others)}: hence “–”."


MATRIX_WORDS = {
    verdicts.LOWER: "lower",
    verdicts.HIGHER: "higher",
    verdicts.UNTOLD: "unclear",
    verdicts.MODELS_DIFFER: "models differ",
}


def loss_matrix(pools, differences):
    """The verdicts of verdicts.Difference as a Markdown table: pools by rank, each beside each other."""
    cells = {}
    for pair in differences:
        verdict = pair.verdict()
        opposite = verdicts.OPPOSITE.get(verdict, verdict)
        cells[pair.a.name, pair.b.name] = MATRIX_WORDS.get(verdict, verdict)
        cells[pair.b.name, pair.a.name] = MATRIX_WORDS.get(opposite, opposite)
    names = [pool.name for pool in pools]
    rows = []
    for row in names:
        rows.append([f"**{row}**", *[cells.get((row, column), "") for column in names]])
    return table(["this one's loss is …", *[f"… than {name}'s" for name in names]], rows)


def pairs_table(differences, key):
    """verdicts.Difference one by one as a Markdown table."""
    rows = []
    for pair in differences:
        loss = f"{pair.loss.difference:+.4f}"
        if pair.loss.half is not None:
            loss += f" ± {pair.loss.half:.4f}"
        accuracy = "–"
        if pair.accuracy:
            accuracy = f"{100 * pair.accuracy.difference:+.2f} ± {100 * pair.accuracy.half:.2f}"
        p_values = ["–" if p is None else f"{p:.3g}" for p in (pair.loss_p, pair.accuracy_p)]
        title = f"{pair.a.name} – {pair.b.name}"
        rows.append([title, loss, pair.loss.how, p_values[0], pair.verdict(), accuracy, p_values[1]])
    title = f"{score_name(key)}, points" if key else "accuracy"
    head = ["pair", "validation loss", "by", "p, corrected", "the first has", title, "p, corrected"]
    layout = ["---", "--:", "---", "--:", "---", "--:", "--:"]
    fresh = [effects.compare_fresh(pair.a.by_seed(), pair.b.by_seed()) for pair in differences]
    if any(fresh):
        head.insert(5, FRESH)
        layout.insert(5, "--:")
        for row, each in zip(rows, fresh, strict=True):
            row.insert(5, effects.fresh_cell(each))
    return table(head, rows, layout)


# ----------------------------------------------------------------------------------------------------------
# Reference bands


def band_half(spread, n, steps):
    """Half of the band's width at a step, for one more run beside n whose losses have a standard deviation.

    The band holds for all steps together: a fresh run like those of the reference is inside at every one
    in at least 95% of cases. It is Student's t interval for one more run, at a level of 5% divided by the
    number of steps (Bonferroni), which holds however the steps hang together. Of simulated curves, random
    walks of 20 steps, 95% pass with 3 seeds, 96% with 5 and 97% with 8 (of 2,000 each; a smaller simulation
    is in tests/test_compare.py). The price of few seeds is the width: for 20 steps 23 standard deviations to
    each side with 3 seeds, 7.4 with 5 and 4.9 with 8. A run that is 10 deviations worse all along is found
    in 73%, 99.9% and all of cases.
    """
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 1 - 0.025 / steps)) * spread * math.sqrt(1 + 1 / n)


def reference_lines(curves):
    """The lines of a reference: {step: loss} of each run -> [{step, mean loss, sd, n, low, high}]."""
    n = len(curves)
    steps = sorted(set.intersection(*map(set, curves)))
    lines = []
    for step in steps:
        losses = [curve[step] for curve in curves]
        line = {"step": step, "loss": statistics.mean(losses), "n": n}
        line["sd"] = statistics.stdev(losses) if n > 1 else None
        lines.append(line | band(line, len(steps)))
    return lines


def band(line, steps):
    """The band, {low, high}, at a line of a reference with a number of steps."""
    half = 0.01 * line["loss"]  # one run says nothing about the spread; take one percent
    if line["n"] > 1:
        half = band_half(line["sd"], line["n"], steps)
    return {"low": line["loss"] - half, "high": line["loss"] + half}


def save_reference(path, pools):
    """One line per validated step: mean and standard deviation over the seeds, and the band."""
    if len(pools) != 1 or not pools[0].finished:
        fineweb.fail("--save_reference needs finished runs of one config that differ in the seed only")
    (pool,) = pools
    facts = {"script": pool.first.facts["script"], "conditions": conditions(pool.first)}
    lines = reference_lines([run.val for run in pool.runs])
    content = "".join(json.dumps(line | facts) + "\n" for line in lines)
    fineweb.make_folder(path.parent)
    fineweb.write_atomic(path, lambda f: f.write(content.encode()))
    print(f"{path}: the band of {len(pool.runs)} run(s) at {len(lines)} steps")
    if len(pool.runs) == 1:
        print("One run doesn't say how far another seed is from it: the band is 1% to both sides.")


def read_reference(path):
    """({step: line}, its conditions with the script's name). Raises SystemExit for another file."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            require(line, "step", "loss", "sd", "n")
            line |= band(line, len(lines))  # as it is computed today, whatever the file has
        wanted = lines[0]["conditions"] | {"script": lines[0]["script"]}
        return {line["step"]: line for line in lines}, wanted
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        fineweb.fail(f"{path} is not a reference, or one of an older version: make it by --save_reference")


LATER_CONDITIONS = {"weights": ""}  # those that older references lack


def other_conditions(run, wanted):
    """How the conditions of a run differ from those of a reference, in words."""
    its = conditions(run) | {"script": run.facts["script"]}
    texts = []
    for name, value in its.items():
        if name == "size" or value == wanted.get(name, LATER_CONDITIONS.get(name, value)):
            continue
        if name == "weights":
            if value:
                texts.append(f"it started from the weights in {value}")
            if wanted.get(name):
                texts.append(f"the reference started from those in {wanted[name]}")
            continue
        if name != "recipe":
            texts.append(f"{name} {value}, not {wanted[name]}")
            continue
        for field in RECIPE_FIELDS:
            if value[field] != wanted["recipe"].get(field):
                texts.append(f"{field} {value[field]:g}, not {wanted['recipe'].get(field)}")
    return texts


def against(path, runs):
    """Says whether runs are inside a reference's band; returns how many were outside somewhere."""
    lines, wanted = read_reference(path)
    outside = 0
    for run in runs:
        steps = sorted(run.val.keys() & lines.keys())
        if not steps:
            fineweb.fail(f"{run.folder} and {path} have no validated step in common")
        different = other_conditions(run, wanted)
        if different:
            print(f"{run.folder} had other conditions than the reference, so that the answer means little: "
                  + "; ".join(different))  # fmt: skip
        rows = []
        missed = []
        for step in steps:
            line = lines[step]
            loss = run.val[step]
            fits = line["low"] <= loss <= line["high"]
            if not fits:
                missed.append(str(step))
            limits = f"{line['low']:.4f} to {line['high']:.4f}"
            answer = "inside" if fits else "OUTSIDE"
            rows.append([str(step), f"{loss:.4f}", f"{line['loss']:.4f}", limits, answer])
        verdict = f"inside the band at all {len(steps)} steps"
        if missed:
            word = "step" if len(missed) == 1 else "steps"
            verdict = f"outside at {len(missed)} of {len(steps)} steps: {word} {', '.join(missed)}"
        if len(steps) < len(lines):
            verdict += f" (the reference has {len(lines)})"
        print(f"{run.folder}: {verdict}\n")
        head = ["step", "loss", "reference", f"band of {lines[steps[0]]['n']} runs", ""]
        print(table(head, rows, ["--:", "--:", "--:", "--:", "---"]))
        outside += bool(missed)
    return outside


# ----------------------------------------------------------------------------------------------------------
# The report

HOW_TO_READ = (
    "± is half of a 95% interval's width everywhere, and bands and bars in the pictures reach as far: of "
    "losses over the seeds, by Student's t; of accuracies over the seeds and the items, with one seed over "
    "the items alone. The validation loss is in nats per token; in bits per byte of text it can be compared "
    "between tokenizers, too. An interval is for its own figure or pair; p-values are corrected for the "
    "number of pairs (Holm), and the verdicts go by them, at 5%."
)
SHARED_RECIPE = " A paper's own settings are in its row; `--recipe shared` trains with everyone's instead."
OF_PARAMETERS = (
    "Evaluated are the parameters that evaluation uses: a module that helps in training alone is dropped. "
    "Active are those that work on one token in training. Embedding is what tokens, and learned positions, "
    "are looked up in."
)
DOUBTS = {  # what the verdicts of the matrix mean that don't explain themselves
    "unclear": "unclear: the difference may be chance",
    "models differ": "models differ: these two do; of the architectures one seed says nothing",
    verdicts.UNTESTED: "not tested: one seed, and no predictions",
}


def lost_scripts(pools):
    """A line on the scripts that aren't here, for each reason."""
    lost = {}
    for name in sorted({pool.first.facts["script"] for pool in pools}):
        _, problem = load_script(name)
        if problem:
            lost.setdefault(problem, []).append(name)
    lines = []
    for problem, scripts in lost.items():
        names = [pool.name for pool in pools if pool.first.facts["script"] in scripts]
        which = verdicts.listed(names) if len(names) <= MOST_TOGETHER else f"{len(names)} of these"
        if len(scripts) == 1:
            lines.append(f"{which}: its script {scripts[0]}.py {problem}. So it is compared by its log alone: "
                         "what its paper prescribes and how many parameters evaluation uses is not "
                         "known.")  # fmt: skip
            continue
        problem = problem.replace("is not", "are not")
        lines.append(f"{which}: their scripts {problem}. So they are compared by their logs alone: what their "
                     "papers prescribe and how many parameters evaluation uses is not known.")  # fmt: skip
    return lines


def group_report(group, keys, pairs=True):
    """(what the report says first of pools that are ranked together, the pairs folded), as paragraphs.

    pairs: whether to show the verdict on each pair.
    """
    finished = [pool for pool in group if pool.finished]
    key = keys[0] if keys else None
    lines = [set_other_items_apart(group, each) for each in keys]
    differences = verdicts.compare_pairs(finished, key)
    first = [verdicts.headline(finished, differences), leaderboard(group, keys)]
    first += [line for line in (*unknown_bytes(group), machines(group), *lines, *lost_scripts(group)) if line]
    if not differences or not pairs:
        return first, []
    matrix = loss_matrix(finished, differences)
    first.append(matrix)
    doubts = [words for verdict, words in DOUBTS.items() if f"| {verdict} |" in matrix]
    if doubts:
        text = "; ".join(doubts)
        first.append(text[0].upper() + text[1:] + ".")
    pairs_text = pairs_table(differences, key)
    how = [effects.ON_FRESH_TEXT] if FRESH in pairs_text else []
    return first, [Folded("All pairs, one by one", [pairs_text, *how])]


def scores_of(pools):
    """The scores that the runs of pools have, [(task, convention)] in the order of the report."""
    keys = {key for pool in pools for run in pool.runs for key in run.scores}
    return sorted(keys, key=lambda key: (key[0], key[1] != "nanogpt"))


def how_to_read(pools):
    papers = any(by_paper(pool.first) for pool in pools)
    return [HOW_TO_READ + (SHARED_RECIPE if papers else ""), OF_PARAMETERS]


def rankings(out, pools):
    """(parts, pictures) on runs of no study: a leaderboard for each group of equal conditions."""
    parts = []
    pictures = []
    for number, (group, reasons) in enumerate(fair_groups(pools)):
        if number:
            parts.append("## Not comparable with those above")
            parts.append("Ranked apart, because " + "; ".join(reasons) + ".")
        keys = scores_of(group)
        first, pairs = group_report(group, keys)
        if not number:
            first[2:2] = how_to_read(pools)
        parts += first
        for file, words in draw(out, group, keys, f"group{number + 1}_" if number else ""):
            parts.append(f"![{words}]({file})")
            pictures.append(file)
        parts += pairs
    differing = differences_table(pools)
    if differing:
        parts += ["## What differs between runs of one architecture", differing]
    return parts, pictures


def study_ranking(out, title, pools):
    """(a Folded, pictures) on all runs of a study at one size: the leaderboard of those that can be ranked.

    These are the largest group of equal conditions, in a sweep of learning rates those of one rate.
    """
    (group, _), *others = fair_groups(pools)
    keys = scores_of(group)
    few = len(group) <= MOST_TOGETHER
    first, pairs = group_report(group, keys, few)
    first[2:2] = how_to_read(group)
    pictures = []
    if few:
        for file, words in draw(out, group, keys, effects.file_name(title).removesuffix(".png") + "_"):
            first.append(f"![{words}]({file})")
            pictures.append(file)
    else:
        first.append(f"The pairs, and the curves, of more than {MOST_TOGETHER} are too many to be seen: "
                     "`--only NAME NAME` shows those of some.")  # fmt: skip
    for apart, reasons in others:
        names = verdicts.listed(pool.name for pool in apart)
        first.append(f"Not ranked with them: {names}, because {'; '.join(reasons)}.")
    differing = differences_table(pools)
    if differing:
        first.append(differing)
    return Folded(f"{title}: all of it, ranked", [*first, *pairs]), pictures


def by_study(runs):
    """{(study, size): the runs of it}, by name and then by size."""
    together = {}
    for run in runs:
        place = run.study["name"], collection.size_in_numbers(run.study["size"]), run.study["size"]
        together.setdefault(place, []).append(run)
    return {(name, size): together[name, number, size] for name, number, size in sorted(together)}


def study_parts(out, runs):
    """(parts, pictures) on the runs of studies: their effects; folded, each study and size as a whole."""
    parts, pictures = effects.study_parts(runs, out)
    for (name, size), of_size in by_study(runs).items():
        folded, files = study_ranking(out, f"{name} at {size}", pool_runs(of_size))
        parts.append(folded)
        pictures += files
    return parts, pictures


def remove_old_pictures(out, markdown):
    """Removes the pictures that the earlier report in a folder shows and this Markdown doesn't."""
    earlier = out / "leaderboard.md"
    if earlier.exists():
        old = PICTURE.findall(earlier.read_text(encoding="utf-8", errors="replace"))
        for name in set(old) - set(PICTURE.findall(markdown)):
            (out / name).unlink(missing_ok=True)


def report(out, runs, left_out, copies=(), chosen=()):
    """Writes the tables, pictures and page on runs.Run into a folder; returns the Markdown.

    Pictures of an earlier report there that this one doesn't have are removed.

    left_out: [(where, why)] on what could not be read; copies: lines on runs that were given twice; chosen:
    the names that --only gave.
    """
    fineweb.make_folder(out)
    parts = ["# Which is better, and is it real?"]
    if chosen:
        parts.append(f"Only {verdicts.listed(chosen)}: p-values are corrected for the pairs of these alone. "
                     "If they were chosen after a look at the others, the verdicts are too sure; those of "
                     "the whole report count.")  # fmt: skip
    pictures = []
    runs, repeats = without_repeats(runs)
    of_study = [run for run in runs if run.study]
    others = [run for run in runs if not run.study]
    if of_study:
        said, files = study_parts(out, of_study)
        parts += said
        pictures += files
    if others:
        if of_study:
            parts.append("## Runs of no study")
        said, files = rankings(out, pool_runs(others))
        parts += said
        pictures += files
    lines = [*copies, *repeats]
    if left_out or lines:
        parts.append("## Left out")
    if left_out:
        parts.append(table(["run", "why"], [[str(where), why] for where, why in left_out]))
    parts += [f"{line}." for line in lines]
    markdown = as_markdown(parts)
    remove_old_pictures(out, markdown)
    (out / "leaderboard.md").write_text(markdown, encoding="utf-8")
    (out / "index.html").write_text(as_html(parts, out, pictures), encoding="utf-8")
    return markdown


def show(markdown, folded):
    """Prints a report without its pictures; folded: whether with what the page folds away."""
    before = ""
    depth = 0
    for line in markdown.splitlines():
        depth += (line == "<details>") - (line == "</details>")
        if line.startswith(("![", "<")) or (depth and not folded):
            continue
        if line or before:
            print(line)
        before = line


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, as log/*, and collections")
    parser.add_argument("--only", nargs="+", metavar="NAME",
                        help="only runs of these architectures, or entries of a study")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report: report")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with this band instead")
    parser.add_argument("--save_reference", type=Path, metavar="FILE", help="write the runs' band instead")
    args = fineweb.parse_strictly(parser)
    try:
        run_command(args)
    except ImportError as missing:
        fineweb.fail(f"the package {missing.name} is missing: pip install -r requirements.txt")


def names_of(run):
    """The names by which --only finds a run: its entry in its study, or its architecture."""
    if run.study:
        return {run.study["entry"]}
    return {run.architecture, run.architecture.replace("_", "-")}  # a variant's script is train_gpt2_rope


def only(runs, names):
    """The runs of these architectures, or entries of studies. Raises SystemExit for a name without runs."""
    there = set().union(*map(names_of, runs))
    for name in names:
        if name not in there:
            fineweb.fail(f"--only {name}: no run here has this name; there are {', '.join(sorted(there))}")
    return [run for run in runs if names_of(run) & set(names)]


def run_command(args):
    runs, left_out = collection.read_all(args.runs)
    if not runs:
        why_none = "; ".join(f"{where}: {why}" for where, why in left_out)
        fineweb.fail(f"there is no run to compare: {why_none}. Give folders like log/gpt2-tiny, or collections")
    for where, why in left_out:
        print(f"left out: {where}: {why}")
    n_read = len(runs)
    if args.only:
        runs = only(runs, args.only)
    if args.against:
        outside = against(args.against, runs)
        raise SystemExit(1 if outside or left_out else 0)
    fineweb.refuse_folder("--save_reference", args.save_reference)
    runs, copies = without_copies(runs)
    if args.save_reference:
        save_reference(args.save_reference, pool_runs(runs))
    else:
        markdown = report(args.out, runs, left_out, copies, args.only or ())
        show(markdown, folded=not any(run.study for run in runs))
        print(f"the page: {args.out}/index.html")
    if left_out:
        fineweb.fail(f"{len(left_out)} of {n_read + len(left_out)} runs were left out, see above")


if __name__ == "__main__":
    main()
