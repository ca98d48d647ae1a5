"""
How the loss falls with size: pictures of a study that has two sizes or more, and with three a power law for
each entry.

The law is loss = a x^-b, a straight line between the logarithms, by least squares over the sizes' mean
losses; x is the number of parameters, or of training FLOPs (three times those of a forward pass). There is
no constant term: three sizes are three points, which a law with three free numbers fits whatever they are.

The interval of b says how far seeds alone can move it. It is Student's t, with the standard deviation of
log loss between seeds pooled over the sizes; a size with one seed is taken to have the same one. A bootstrap
that draws seeds within sizes isn't used, since three seeds are too few for it: of 2,000 simulated studies of
three sizes and three seeds its 95% interval held the true b in 80%, this one in 95% (tests/test_scaling.py
simulates both). Where the standard deviation at one end is three times that at the other, this one holds it
in 92%; but where the largest size has one seed, and three times the deviation of the smallest, in 77% only.
That the points may not lie on a line is not in the interval, and is told apart from it.
"""
import dataclasses
import math
import statistics

from tools import verdicts
from tools.effects import (
    bases_of,
    best_group,
    by_size,
    differing,
    file_name,
    group_runs,
    rates_of,
    scale_of_loss,
)
from tools.models import parameters_of
from tools.page import Folded, table
from tools.pictures import draw_into_files, draw_scaling

TARGET = 124_475_904  # parameters of GPT-2 at full size
LEAST_SIZES = 3
LEAST_DRAWN = 2


# ----------------------------------------------------------------------------------------------------------
# The power law


@dataclasses.dataclass
class PowerLaw:
    """loss = a x^-b through the mean losses of some sizes."""

    xs: list  # one for each size
    logs: list  # for each size the log losses, one for each seed
    a: float = 0.0
    b: float = 0.0
    spread: float | None = None  # standard deviation of the log loss between seeds; None if not known
    freedom: int = 0  # its degrees of freedom

    def __post_init__(self):
        slopes, levels = self.weights(1.0)
        means = [statistics.mean(logs) for logs in self.logs]
        self.b = -sum(weight * mean for weight, mean in zip(slopes, means, strict=True))
        self.a = math.exp(sum(weight * mean for weight, mean in zip(levels, means, strict=True)))
        squares = 0.0
        for logs, mean in zip(self.logs, means, strict=True):
            squares += sum((log - mean) ** 2 for log in logs)
            self.freedom += len(logs) - 1
        if self.freedom:
            self.spread = math.sqrt(squares / self.freedom)

    def weights(self, x):
        """What the slope of the line, and its log loss at x, take of each size's mean log loss."""
        places = [math.log(each) for each in self.xs]
        middle = statistics.mean(places)
        squares = sum((place - middle) ** 2 for place in places)
        slopes = [(place - middle) / squares for place in places]
        levels = [1 / len(places) + (math.log(x) - middle) * slope for slope in slopes]
        return slopes, levels

    def loss(self, x):
        return self.a * x**-self.b

    def residuals(self):
        """How far the sizes' mean log losses are above the line."""
        found = []
        for x, logs in zip(self.xs, self.logs, strict=True):
            found.append(statistics.mean(logs) - math.log(self.loss(x)))
        return found

    def seeds_half(self, weights):
        """Half of the 95% interval of a weighted sum of the sizes' means, by seeds; None if not known."""
        if self.spread is None:
            return None
        squared = 0.0
        for weight, logs in zip(weights, self.logs, strict=True):
            squared += weight**2 * self.spread**2 / len(logs)
        return verdicts.half_width([(squared, self.freedom)], verdicts.LEVEL)

    def b_half(self):
        slopes, _ = self.weights(1.0)
        return self.seeds_half(slopes)

    def between(self, x):
        """(lowest, highest) loss at x by the seeds alone, if the line is straight; None if not known."""
        _, levels = self.weights(x)
        return self.around(x, self.seeds_half(levels))

    def beyond(self, x):
        """(lowest, highest) loss of one more size x, if it is as far from the line as those that made it."""
        _, levels = self.weights(x)
        freedom = len(self.xs) - 2
        squared = sum(residual**2 for residual in self.residuals()) / freedom
        squared *= 1 + sum(weight**2 for weight in levels)
        return self.around(x, verdicts.half_width([(squared, freedom)], verdicts.LEVEL))

    def around(self, x, half):
        if half is None:
            return None
        half = min(half, 50.0)  # powers of e; more is infinite to any reader
        return self.loss(x) * math.exp(-half), self.loss(x) * math.exp(half)


def fit(xs, losses):
    """The PowerLaw through sizes xs with lists of losses, one for each seed.

    Raises ValueError for fewer than three sizes.
    """
    if len(xs) < LEAST_SIZES:
        raise ValueError(f"{len(xs)} sizes; a power law needs {LEAST_SIZES}")
    return PowerLaw(list(xs), [[math.log(loss) for loss in of_size] for of_size in losses])


# ----------------------------------------------------------------------------------------------------------
# The sizes of a study


def training_flops(run):
    """Forward, and backward of twice the work."""
    return 3 * run.facts["flops_per_token"] * run.config["max_steps"] * run.config["batch_tokens"]


def parameters(run):
    return run.facts["parameters"]


def non_embedding(run):
    """How many parameters aren't looked up; None where today's scripts can't tell."""
    found = parameters_of(run)
    return found.non_embedding if found else None


def comparable_sizes(sizes):
    """(the sizes, {size: {entry: Group}}, whose losses are of the same data, lines on those that aren't).

    Of several datasets that with the most sizes is taken, and of these the one with the smallest.
    """
    kinds = {}
    for size, selected in sizes.items():
        runs = [run for group in selected.values() for run in group.runs.values()]
        key = statistics.mode([scale_of_loss(run) for run in runs])
        kinds.setdefault(key, {})[size] = selected
    kept = max(kinds.values(), key=len)  # the first of the largest
    lines = []
    for other in kinds.values():
        if other is not kept:
            lines.append(f"{', '.join(other)}: other data, or other windows, than {', '.join(kept)}, so the "
                         "losses are not on one scale and are left out here.")  # fmt: skip
    return kept, lines


def curves_of(sizes):
    """({entry: {size: Group}} of the entries with two sizes or more, lines on those too few for a law)."""
    curves = {}
    lines = []
    for size, selected in sizes.items():
        for entry, group in selected.items():
            curves.setdefault(entry, {})[size] = group
    for entry in sorted(curves):
        of = ", ".join(curves[entry])
        if len(curves[entry]) < LEAST_DRAWN:
            lines.append(f"{entry} has one size, {of}: left out here.")
            del curves[entry]
        elif len(curves[entry]) < LEAST_SIZES and len(sizes) >= LEAST_SIZES:
            lines.append(f"{entry} has too few sizes for a fit, {of}.")
    return curves, lines


def unequal_lines(sizes):
    """A line on each entry that was trained under other conditions than its base at a size."""
    lines = []
    for size, selected in sizes.items():
        for entry, group in selected.items():
            for base in bases_of(group.first):
                common = group.seeds & selected[base].seeds if base in selected else set()
                texts = []
                if common:
                    seed = min(common)
                    texts = differing(group.runs[seed], selected[base].runs[seed])
                if texts:
                    what = "; ".join(texts)
                    lines.append(f"{entry} had other conditions than {base} at {size} ({what}), so their "
                                 "lines can't be compared.")  # fmt: skip
    return lines


def law_of(curve, x_of):
    """The PowerLaw of {size: Group} against x_of(run); None with too few sizes, or where an x isn't known."""
    xs = [x_of(group.first) for group in curve.values()]
    if len(xs) < LEAST_SIZES or None in xs or len(set(xs)) < len(xs):
        return None
    return fit(xs, [list(group.losses().values()) for group in curve.values()])


# ----------------------------------------------------------------------------------------------------------
# Does the order hold?


def told_apart(groups):
    """Which pairs of {entry: Group} can be told apart.

    By the paired t test, or Welch's, with Holm's correction for all pairs. Returns
    ({(entry, entry): whether the first has the lower loss}, how many pairs were tested).
    """
    estimates = {}
    names = sorted(groups)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            loss = verdicts.compare_losses(groups[a].losses(), groups[b].losses())
            if loss.p is not None:
                estimates[a, b] = loss
    corrected = verdicts.holm([loss.p for loss in estimates.values()])
    told = {}
    for (pair, loss), p in zip(estimates.items(), corrected, strict=True):
        if p < verdicts.LEVEL:
            told[pair] = loss.difference < 0
    return told, len(estimates)


def order_row(small, large, sizes):
    """Cells on whether the order at one size holds at another; None with fewer than three common entries."""
    from scipy.stats import kendalltau, spearmanr

    common = sorted(sizes[small].keys() & sizes[large].keys())
    if len(common) < 3:
        return None
    groups = [{entry: sizes[size][entry] for entry in common} for size in (small, large)]
    ours, theirs = ([of_size[entry].mean() for entry in common] for of_size in groups)
    (told_small, tested_small), (told_large, tested_large) = map(told_apart, groups)
    agree = []
    disagree = []
    for (a, b), lower in told_small.items():
        if (a, b) not in told_large:
            continue
        if told_large[a, b] == lower:
            better, worse = (a, b) if lower else (b, a)
            agree.append(f"{better} below {worse}")
        else:
            disagree.append(f"{a} and {b}")
    pairs = len(common) * (len(common) - 1) // 2
    both = f"{len(agree) + len(disagree)} of {pairs}"
    if not tested_small or not tested_large:
        both += " (one seed: no pair can be told)"
    return [
        f"{small} → {large}", str(len(common)), f"{kendalltau(ours, theirs).statistic:+.2f}",
        f"{spearmanr(ours, theirs).statistic:+.2f}", both, ", ".join(agree) or "–",
        ", ".join(disagree) or "–",
    ]  # fmt: skip


def order_parts(sizes):
    """Parts on whether the order of the entries holds from one size to another; none if it can't be told."""
    names = list(sizes)
    rows = []
    for i, small in enumerate(names):
        for large in names[i + 1 :]:
            row = order_row(small, large, sizes)
            if row:
                rows.append(row)
    if not rows:
        return []
    head = ["does the order hold?", "entries", "Kendall's tau", "Spearman's rho"]
    head += ["pairs told apart at both", "agree", "disagree"]
    text = ("Rank correlations of the mean losses: +1 is the same order, -1 the reverse, 0 none. They count "
            "differences that may be chance; the last columns count only the pairs that are told apart at "
            "both sizes, by p-values corrected for all pairs of a size (Holm).")  # fmt: skip
    return [text, table(head, rows, ["---"] + ["--:"] * 4 + ["---"] * 2)]


# ----------------------------------------------------------------------------------------------------------
# The report

HOW_TO_READ = (
    "Straight lines between log loss and log size, loss = a x^-b, through the mean over seeds at each size. "
    "± and “by seeds” are 95% intervals for how far the seeds alone can move the line (Student's t, the "
    "spread pooled over sizes). They don't know whether the line is straight. The largest residual says how "
    "far a size is from it, and “by residuals” is the interval for one more size, if it is as far from the "
    "line as these are; with three sizes that rests on a single degree of freedom, and is mostly very wide. "
    "A law with a constant term, which the loss of real text calls for, can't be fitted to three points: "
    "without one the extrapolation to larger sizes errs towards a loss that is too low."
)  # fmt: skip


def ranged(pair):
    if pair is None:
        return "–"
    low, high = (f"{loss:.3f}" if loss < 100 else f"{loss:.0e}" for loss in pair)
    return f"{low} to {high}"


def exponent_cell(law):
    if law is None:
        return "–"
    half = law.b_half()
    return f"{law.b:.4f}" if half is None else f"{law.b:.4f} ± {half:.4f}"


def laws_table(curves):
    """(the entries' power laws as a Markdown table, "" if there is none, lines on what couldn't be told)."""
    rows = []
    unknown = []
    single = []
    largest = 0
    for entry, curve in curves.items():
        law = law_of(curve, parameters)
        if law is None:
            continue
        without = law_of(curve, non_embedding)
        if without is None:
            unknown.append(entry)
        if any(len(group.runs) == 1 for group in curve.values()):
            single.append(entry)
        largest = max(largest, *law.xs)
        residual = max(law.residuals(), key=abs)
        row = [entry, exponent_cell(law), exponent_cell(without)]
        row += [exponent_cell(law_of(curve, training_flops)), f"{100 * residual:+.2f}"]
        if max(law.xs) < TARGET:
            row += [f"{law.loss(TARGET):.3f}", ranged(law.between(TARGET)), ranged(law.beyond(TARGET))]
        else:
            row += ["measured", "–", "–"]
        rows.append((law.b, row))
    if not rows:
        return "", [f"A power law needs {LEAST_SIZES} sizes."]
    rows = [row for _, row in sorted(rows, key=lambda each: -each[0])]
    head = ["entry", "b, parameters", "b, without embedding", "b, training FLOPs", "largest residual, %"]
    head += [f"at {TARGET:,}: extrapolated loss", "by seeds", "by residuals"]
    lines = []
    if largest < TARGET:
        lines.append(f"**The loss at {TARGET:,} parameters is an extrapolation, not a result**: that is "
                     f"{TARGET / largest:.0f} times the parameters of the largest size here, with the "
                     "tokens and the data of these small runs, which are not those of a real run, and "
                     "without a constant term.")  # fmt: skip
    if single:
        lines.append(f"Of {', '.join(single)} some size has one seed, whose noise is unknown; it is taken to "
                     "be that of the entry's other sizes.")  # fmt: skip
    if unknown:
        lines.append(f"Without embedding: not known of {', '.join(unknown)}, whose scripts are not here, or "
                     "have changed.")  # fmt: skip
    return table(head, rows, ["---"] + ["--:"] * (len(head) - 1)), lines


def tokens_line(sizes):
    """How many tokens the sizes trained on, in words."""
    tokens = {}
    for size, selected in sizes.items():
        config = next(iter(selected.values())).first.config
        tokens[size] = config["max_steps"] * config["batch_tokens"]
    if len(set(tokens.values())) == 1:
        return (f"Every size trained on {min(tokens.values()):,} tokens, so this tells of more parameters at "
                "equal tokens, not of more data.")  # fmt: skip
    each = ", ".join(f"{size} on {count:,}" for size, count in tokens.items())
    return f"The sizes trained on different numbers of tokens ({each}), so this mixes parameters with data."


def draw_laws(folder, file, title, xlabel, curves, x_of, ticks=None):
    """Draws the entries' losses against x_of(run). An entry has the same colour in all such pictures."""
    lines = {}
    for entry, curve in sorted(curves.items()):
        points = []
        for group in curve.values():
            half = verdicts.half_interval(list(group.losses().values()))
            points.append((x_of(group.first), group.mean(), half or 0.0))
        lines[entry] = points
    draw_scaling(folder / file, title, xlabel, lines, ticks)


def size_ticks(curves):
    """{the median number of parameters of the entries at a size: its name}."""
    by_size_name = {}
    for curve in curves.values():
        for size, group in curve.items():
            by_size_name.setdefault(size, []).append(parameters(group.first))
    return {statistics.median(counts): size for size, counts in by_size_name.items()}


def selection_parts(study, sizes, folder, own):
    """(parts, files) on {size: {entry: Group}}. own: whether the groups are at their own best rates."""
    sizes, lines = comparable_sizes(sizes)
    curves, few = curves_of(sizes)
    lines += few
    lines += unequal_lines(sizes)
    if not curves:
        return lines, []
    how = ", each at its own best rate" if own else ""
    kind = "scaling_own_rate" if own else "scaling"
    files = [file_name(kind, study, "parameters"), file_name(kind, study, "flops")]
    title = f"Loss against parameters{how}"
    draw_laws(folder, files[0], title, "trained parameters", curves, parameters, size_ticks(curves))
    parts = [f"![{title}]({files[0]})"]
    title = f"Loss against training FLOPs{how}"
    draw_laws(folder, files[1], title, "training FLOPs", curves, training_flops)
    parts.append(f"![{title}]({files[1]})")
    text, more = laws_table(curves)
    parts += [text] if text else []
    parts += [" ".join([*more, tokens_line(sizes)]), *order_parts(sizes)]
    return parts + lines, files


def scaling_parts(runs, folder):
    """(parts of the report, names of the pictures that it wrote into a folder) on one study's sizes.

    No parts if there are fewer than two sizes. The parts are Markdown or page.Folded. folder: a Path.
    """
    draw_into_files()
    at_one = {}
    chosen = {}
    unswept = []  # sizes whose runs can't tell which rate is the best
    for size, of_size in by_size(runs).items():
        groups, _ = group_runs(of_size)  # what is left out is said with each size
        one = {entry: group for (entry, rate), group in groups.items() if rate == 1}
        if one:
            at_one[size] = one
        if len({rate for _, rate in groups}) > 1:
            chosen[size] = {entry: best_group(of_entry) for entry, of_entry in rates_of(groups).items()}
        elif groups:
            unswept.append(size)
    study = runs[0].study["name"]
    parts = []
    files = []
    if len(at_one) >= LEAST_DRAWN:
        parts, files = selection_parts(study, at_one, folder, own=False)
    own = any(group.rate != 1 for selected in chosen.values() for group in selected.values())
    if own and len(chosen) >= LEAST_DRAWN:
        more, new = selection_parts(study, chosen, folder, own=True)
        parts += ["### The sizes, each entry at its own best rate", *more]
        files += new
        if unswept:
            parts.append(f"{', '.join(unswept)}: one learning rate alone was run, so which is the best isn't "
                         "known there.")  # fmt: skip
    if not parts:
        return [], []
    if max(len(at_one), len(chosen)) >= LEAST_SIZES:
        parts.append(Folded("How to read the sizes", [HOW_TO_READ]))
    return [f"## Study {study}: how the loss falls with size", *parts], files
