"""The report: leaderboard.md, a list of Markdown blocks, and its pictures."""
import html
import re
import statistics

from tools.common import make_folder, table
from tools.compare import comparison, plots, stats, tables
from tools.compare.comparison import fair_groups
from tools.compare.runs import group_runs, size_in_numbers, without_repeats

MOST_TOGETHER = 10  # models whose pairs and curves are shown
ROSE = 0.02  # share by which the final validation loss may be above the run's lowest one
FAR = 5  # robust standard deviations from the median of the seeds
LEAST_PAIRS = 3  # of seeds, for a standard deviation

HOW_TO_READ = """\
Losses are in nats per token. ± is half of a 95% confidence interval's width: of losses over the seeds, of \
a difference over the seeds that both have, in pairs (else Welch's), of accuracies over seeds and items. \
p-values are corrected for the number of comparisons with one base, or of pairs (Holm), and verdicts go by \
them, at 5%. "Not significant" doesn't mean equal: three seeds find only large differences.

"Last quarter of training" is the same by the training losses, each of a batch before the model learned \
from it (in old collections of one in fifty): not quite of the end, but of text from all over the data. \
Where it disagrees, a few documents of the validation text may have decided.

Ratios are the first's over the second's, or the base's. Tokens/s are a hint only, since runs may share a \
machine. Losses at equal FLOPs or time are read off the line between log loss and log tokens through runs \
with more and fewer tokens, seed by seed."""
TUNED = """\
Each entry, bases too, is here at that of its rates which has the lowest mean loss. It was chosen on the \
seeds that it is judged by, which favours entries with more rates tried: take a verdict near 5% as open."""


def folded(summary, blocks):
    """Blocks behind a line that opens them."""
    return [f"<details>\n<summary>{html.escape(summary)}</summary>", *blocks, "</details>"]


def bullets(head, lines):
    """Lines as a list under a head, nothing if there are none."""
    return [head, "\n".join(f"- {line}" for line in lines)] if lines else []


def file_name(*words):
    """A picture's name out of the names of a study, a size and so on."""
    return "_".join(re.sub(r"[^\w.-]+", "_", word) for word in words)


def suspects(groups):
    """A line on each run that diverged, or that is far from the other seeds of its Group."""
    lines = []
    gaps = []
    for group in groups:
        gaps += [abs(a - b) for a, b in comparison.all_pairs(list(group.losses().values()))]
    # of a normal distribution the median difference of two is 0.954 standard deviations
    spread = statistics.median(gaps) / 0.954 if len(gaps) >= LEAST_PAIRS else None
    for group in groups:
        middle = statistics.median(group.losses().values())
        for run in group.runs.values():
            lowest = min(run.val.values())
            if not run.loss <= (1 + ROSE) * lowest:
                lines.append(f"{run.folder.name}: its loss {run.loss:.4f} is above its lowest, {lowest:.4f}")
            if spread and abs(run.loss - middle) > FAR * spread:
                lines.append(f"{run.folder.name}: its loss is {run.loss - middle:+.4f} from its seeds' "
                             f"median, where seeds have a standard deviation of {spread:.4f}")  # fmt: skip
    return lines


# ----------------------------------------------------------------------------------------------------------
# Models that are compared with each other


def notes(groups, keys):
    """Lines on what can't be compared in a table of groups."""
    lines = []
    for key in keys:
        if len({group.items(key) for group in groups}) > 1:
            lines.append(f"{tables.score_name(key)} is not over the same items in all rows.")
    if len({run.machine for group in groups for run in group.runs.values()}) > 1:
        lines.append("Not all of these were trained on one machine, so tokens/s and times don't compare.")
    return lines


def ranking(out, groups, prefix, budget=None):
    """Blocks on models that are ranked together: leaderboard, pictures, the pairs one by one."""
    keys = {key for group in groups for run in group.runs.values() for key in run.scores}
    keys = sorted(keys, key=lambda key: (key[0], key[1] != "nanogpt"))
    key = keys[0] if keys else None
    finished = [group for group in groups if group.finished]
    pairs = comparison.compare(comparison.all_pairs(finished), key)
    blocks = [tables.headline(finished, pairs), tables.leaderboard(groups, keys, budget)]
    blocks += notes(groups, keys)
    if len(groups) > MOST_TOGETHER:
        return [*blocks, f"For pairs and curves choose at most {MOST_TOGETHER} by `--only`."]
    blocks += [f"![{words}]({file})" for file, words in plots.draw_group(out, groups, keys, prefix)]
    if pairs:
        blocks += folded("All pairs, one by one", [tables.comparisons_table(pairs, None, key, budget)])
    return blocks


def rankings(out, groups, prefix="", budget=None):
    """Blocks with a ranking for each set of models with equal conditions."""
    blocks = []
    for number, (alike, reasons) in enumerate(fair_groups(groups)):
        if number:
            blocks.append(f"**Ranked apart**, because conditions differ: {'; '.join(reasons)}.")
        blocks += ranking(out, alike, f"{prefix}group{number + 1}_" if number else prefix, budget)
    differing = tables.differences_table(groups)
    return blocks + ([differing] if differing else [])


# ----------------------------------------------------------------------------------------------------------
# Studies


def budget_of(groups, shorter):
    """The comparison.Budget of a size with the first base as its reference; None without shorter runs.

    shorter: runs of the same models with fewer tokens.
    """
    entries = {group.place[0]: group for group in groups}
    bases = [base for group in groups for base in comparison.bases_of(group) if base in entries]
    if not shorter or not bases:
        return None
    alike = [run for run in shorter if run.study and run.study["size"] == groups[0].first.study["size"]]
    by_place = {group.place: group for group in group_runs(alike)}
    return comparison.Budget(entries[statistics.mode(bases)], by_place)


def selection_blocks(out, title, groups, shorter):
    """Blocks on Groups of one size, one for each entry: against their bases, and all of them ranked."""
    blocks = [f"## Study {title}"]
    against = comparison.compare_with_bases(groups)
    if against:
        file = file_name("effects", title) + ".png"
        plots.draw_effects(out / file, title, against)
        blocks.append(f"![{title}, difference of the validation loss from the base's]({file})")
    for pairs in against:
        blocks.append(tables.comparisons_table(pairs, pairs[0].b))
        blocks += [f"{pair.a.name}: {'; '.join(pair.unequal)}." for pair in pairs if pair.unequal]
    ranked = rankings(out, groups, file_name(title) + "_", budget_of(groups, shorter))
    return blocks + (folded(f"{title}: all of it, ranked", ranked) if against else ranked)


def before_blocks(out, title, groups, before):
    """Blocks on the losses of Groups of one size beside those that their entries had before, rate by rate."""
    earlier = {group.place: group for group in group_runs(before)}
    groups = sorted(groups, key=lambda group: group.mean())
    pairs = [(earlier[group.place], group) for group in groups if group.place in earlier]
    if not pairs:
        return []
    file = file_name("before", title) + ".png"
    plots.draw_before(out / file, title, pairs)
    rows = [[new.name, tables.mean_cell(old.losses()), tables.mean_cell(new.losses())] for old, new in pairs]
    differing = [(new.name, comparison.unequal_conditions(old, new)) for old, new in pairs]
    return [
        f"### {title}, before and after\n\n![the losses before and after]({file})",
        table(["model", "before", "after"], rows),
        *[f"{name} before: {'; '.join(unequal)}." for name, unequal in differing if unequal],
    ]


def size_blocks(out, title, runs, shorter, before):
    """(blocks on the runs of one study and size, the Groups at rate 1)."""
    entries = {}
    for group in sorted(group_runs([run for run in runs if run.finished]), key=lambda group: group.place):
        entries.setdefault(group.place[0], []).append(group)
    tuned = [tables.tuned_group(of_entry) for of_entry in entries.values()]
    groups = [group for of_entry in entries.values() for group in of_entry]
    at_one = [group for group in groups if group.place[1] == 1]
    blocks = selection_blocks(out, title, at_one, shorter) if at_one else []
    if any(group.place[1] != 1 for group in tuned):
        blocks += [*selection_blocks(out, f"{title}, tuned lr", tuned, shorter), TUNED]
    blocks += tables.rates_parts(entries)
    blocks += before_blocks(out, title, groups, before)
    blocks += bullets("### Look at these runs before you believe the tables", suspects(groups))
    unfinished = [f"{run.folder.name}: at step {run.steps}" for run in runs if not run.finished]
    return blocks + bullets("### Left out", unfinished), at_one


def scaling(out, study, sizes):
    """Blocks on how the loss falls with size; none with one size. sizes: lists of Groups, the smallest first.

    A size of other data, or other windows, than the smallest is left out.
    """
    curves = {}
    for groups in sizes:
        for group in groups:
            if comparison.same_scale(group.first, sizes[0][0].first):
                curves.setdefault(group.place[0], []).append(group)
    curves = {entry: curve for entry, curve in sorted(curves.items()) if len(curve) > 1}
    if not curves:
        return []
    blocks = [f"## Study {study}: how the loss falls with size"]
    for what, label in (("parameters", "trained parameters"), ("flops", "training FLOPs")):
        lines = {}
        for entry, curve in curves.items():
            lines[entry] = []
            for group in curve:
                half = stats.half_interval(list(group.losses().values()))
                size = group.first.facts["parameters"] if what == "parameters" else group.first.flops
                lines[entry].append((size, group.mean(), half or 0.0))
        file = file_name("scaling", study, what) + ".png"
        plots.draw_scaling(out / file, f"Loss against {label}", label, lines)
        blocks.append(f"![Loss against {label}]({file})")
    return blocks


def study_blocks(out, study, runs, shorter, before):
    """Blocks on the runs of one study, its sizes from the smallest."""
    blocks = []
    sizes = []
    for size in sorted({run.study["size"] for run in runs}, key=lambda size: (size_in_numbers(size), size)):
        of_size = [run for run in runs if run.study["size"] == size]
        earlier = [run for run in before if run.finished and run.study["size"] == size]
        more, at_one = size_blocks(out, f"{study} at {size}", of_size, shorter, earlier)
        blocks += more
        sizes += [at_one] if at_one else []
    return scaling(out, study, sizes) + blocks


# ----------------------------------------------------------------------------------------------------------
# The report


def write_report(out, runs, left_out=(), chosen=(), shorter=(), before=()):
    """Writes the tables and pictures on Runs into a folder; returns the Markdown.

    left_out: [(where, why)] on what could not be read; chosen: the names that --only gave; shorter: runs
    of the same models with fewer tokens; before: of the same entries, trained before a change.
    """
    make_folder(out)
    blocks = ["# Which is better, and is it significant?"]
    if chosen:
        blocks.append(f"Only {', '.join(chosen)}: p-values are corrected for these alone, so if they were "
                      "chosen after a look at the others, verdicts are too sure.")  # fmt: skip
    runs, repeats = without_repeats(runs)
    before, again = without_repeats(before)
    repeats += again
    for study in sorted({run.study["name"] for run in runs if run.study}):
        of_study = [run for run in runs if run.study and run.study["name"] == study]
        earlier = [run for run in before if run.study and run.study["name"] == study]
        blocks += study_blocks(out, study, of_study, shorter, earlier)
    plain = [run for run in runs if not run.study]
    if plain:
        blocks += ["## Runs of no study"] if len(plain) < len(runs) else []
        blocks += rankings(out, group_runs(plain))
    blocks += folded("How to read the tables", [HOW_TO_READ])
    blocks += bullets("## Left out", [*[f"{where}: {why}" for where, why in left_out], *repeats])
    markdown = "\n\n".join(block.rstrip("\n") for block in blocks) + "\n"
    (out / "leaderboard.md").write_text(markdown, encoding="utf-8")
    return markdown


def show(markdown, whole):
    """Prints a report without its pictures; whole: with what is folded away."""
    before = ""
    depth = 0
    for line in markdown.splitlines():
        depth += (line == "<details>") - (line == "</details>")
        if line.startswith(("![", "<")) or (depth and not whole):
            continue
        if line or before:
            print(line)
        before = line
