"""
The pictures of a report: curves of loss and accuracy; of a study its differences with their intervals, and
its losses against size.
"""
import math
import statistics

import numpy as np

from tools.compare import comparison, stats

# Okabe and Ito's colours, told apart by the colour-blind; with the dashes also in black and white
STYLES = [
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#E69F00", (0, (5, 1))),
    ("#56B4E9", (0, (3, 1, 1, 1))),
    ("#000000", (0, (1, 1))),
    ("#8A5A2B", "-"),
    ("#777777", "--"),
]
VERDICT_STYLES = {  # (colour, marker)
    comparison.BETTER: ("#0072B2", "o"),
    comparison.WORSE: ("#D55E00", "s"),
    comparison.NOT_SIGNIFICANT: ("#555555", "D"),
}
NO_VERDICT = ("#555555", "x")
FAR = 5  # times the median row's distance from 0, beyond which a row is an arrow at the edge


def pyplot():
    """matplotlib's, which draws into files without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_curves(path, title, xlabel, ylabel, curves, unfinished=()):
    """Writes one PNG of curves {name: [(x, y, half of the interval's width)]}, with the intervals as bands.

    unfinished: names of curves that end in a cross.
    """
    figure, axis = pyplot().subplots(figsize=(8, 5), layout="constrained")
    banded = False
    for number, (name, points) in enumerate(curves.items()):
        colour, dash = STYLES[number % len(STYLES)]
        x, y, halves = np.array(points).T
        marker = "x" if name in unfinished else None
        axis.plot(x, y, color=colour, linestyle=dash, lw=1.6, marker=marker, markevery=[-1], label=name)
        axis.fill_between(x, y - halves, y + halves, color=colour, alpha=0.12, lw=0)
        banded |= bool(halves.any())
    # the first tenth, where all fall alike, would take up most of the picture
    late = [y for points in curves.values() for x, y, _ in points if 10 * x >= points[-1][0] and y < math.inf]
    room = 0.1 * (max(late, default=1) - min(late, default=0)) or 0.1
    axis.set_ylim(min(late, default=0) - room, max(late, default=1) + room)
    axis.set(title=title + (", with 95% intervals" if banded else ""), xlabel=xlabel, ylabel=ylabel)
    finish(figure, axis, path, curves)


def finish(figure, axis, path, curves):
    """Writes a picture of curves, with their names in the order of their ends, the highest first."""
    handles, labels = axis.get_legend_handles_labels()
    by_end = sorted(zip(handles, labels, strict=True), key=lambda each: -curves[each[1]][-1][1])
    axis.legend(*zip(*by_end, strict=True), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130, format="png")
    pyplot().close(figure)


# ----------------------------------------------------------------------------------------------------------
# Studies


def draw_effects_panel(axis, pairs):
    """One base's Comparisons, the first on top; one that would squeeze the others is an arrow at the edge."""
    axis.axvline(0, color="black", lw=0.8)
    reaches = [abs(pair.loss.difference) + (pair.loss.half or 0) for pair in pairs]
    end = max((reach for reach in reaches if reach <= FAR * statistics.median(reaches)), default=0)
    for place, pair in enumerate(pairs):
        colour, marker = VERDICT_STYLES.get(pair.verdict, NO_VERDICT)
        difference, half = pair.loss.difference, pair.loss.half
        text = f"{difference:+.4f}" + ("" if half is None else f" ± {half:.4f}")
        if abs(difference) > end:
            marker = ">" if difference > 0 else "<"
            difference, half = math.copysign(end, difference), None
        axis.errorbar(difference, place, xerr=half, color=colour, marker=marker, capsize=3, lw=1.6)
        axis.annotate(text, (1.02, place), xycoords=("axes fraction", "data"), fontsize=9, va="center",
                      color=colour, annotation_clip=False)  # fmt: skip
    low, high = axis.get_xlim()
    if end:
        axis.set_xlim(max(low, -1.1 * end), min(high, 1.1 * end))
    axis.set_yticks(range(len(pairs)), [pair.a.name for pair in pairs])
    axis.set_ylim(len(pairs) - 0.4, -0.6)
    axis.locator_params(axis="x", nbins=5)
    axis.grid(axis="x", alpha=0.25)
    axis.set_title(f"minus {pairs[0].b.name}", fontsize=10, loc="left")


def draw_effects(path, title, against):
    """Writes one PNG of differences with their 95% intervals, a panel with its own scale for each base.

    against: a list of Comparisons for each base. Better is blue, worse red, what is not significant grey.
    """
    against = [[pair for pair in pairs if pair.loss.how != "diverged"] or pairs for pairs in against]
    heights = [len(pairs) + 1.5 for pairs in against]
    size = (6.4, 1.0 + 0.3 * sum(heights))
    figure, axes = pyplot().subplots(
        len(against), figsize=size, squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, pairs in zip(axes[:, 0], against, strict=True):
        draw_effects_panel(axis, pairs)
    axes[-1, 0].set_xlabel("validation loss minus the base's, nats per token\n"
                           "blue: better, red: worse, grey: not significant", fontsize=9)  # fmt: skip
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot().close(figure)


def draw_before(path, title, pairs):
    """Writes one PNG of pairs of Groups, before and after: their losses with 95% intervals, a row each."""
    figure, axis = pyplot().subplots(figsize=(6.4, 1.2 + 0.4 * len(pairs)), layout="constrained")
    for number, (when, colour, marker) in enumerate((("before", "#777777", "o"), ("after", "#0072B2", "s"))):
        losses = [list(pair[number].losses().values()) for pair in pairs]
        means = [statistics.mean(each) for each in losses]
        halves = [stats.half_interval(each) or 0.0 for each in losses]
        places = np.arange(len(pairs)) + 0.3 * number - 0.15
        axis.errorbar(means, places, xerr=halves, color=colour, marker=marker, ls="", capsize=3, label=when)
    axis.set_yticks(range(len(pairs)), [after.name for _, after in pairs])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.25)
    axis.set(title=title, xlabel="validation loss, nats per token, with 95% intervals")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot().close(figure)


def draw_scaling(path, title, xlabel, curves):
    """Writes one PNG of losses against size on two logarithmic axes, with 95% intervals as bars and bands.

    curves: {name: [(x, mean loss, half of its interval's width, 0 with one seed)]}, x rising. A point of one
    seed has no bar, and no band reaches it.
    """
    from matplotlib.ticker import MaxNLocator, NullFormatter

    figure, axis = pyplot().subplots(figsize=(7, 5), layout="constrained")
    axis.set(xscale="log", yscale="log", title=title, xlabel=xlabel, ylabel="validation loss, nats per token")
    for number, (name, points) in enumerate(curves.items()):
        colour, dash = STYLES[number % len(STYLES)]
        x, y, halves = np.array(points).T
        axis.plot(x, y, color=colour, linestyle=dash, marker="o", markersize=5, lw=2, label=name)
        # with two seeds an interval may be wider than the loss
        bottom = np.where(halves > 0, np.maximum(y - halves, 0.9 * y), np.nan)
        top = np.where(halves > 0, np.minimum(y + halves, 1.1 * y), np.nan)
        axis.fill_between(x, bottom, top, color=colour, alpha=0.1, lw=0)
        axis.vlines(x, bottom, top, color=colour, alpha=0.5, lw=1.5)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=7))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    finish(figure, axis, path, curves)


# ----------------------------------------------------------------------------------------------------------
# What is drawn of models that are ranked together


def without_start(curve):
    """A curve of [(step, …)] without step 0, where a model is untrained, if there is another."""
    return curve[1:] if len(curve) > 1 and curve[0][0] == 0 else curve


def loss_curve(group):
    """[(step, mean validation loss, half of its 95% interval's width, 0 with one seed)] of a Group."""
    curve = []
    for step, losses in group.curve(lambda run: run.val):
        curve.append((step, statistics.mean(losses), stats.half_interval(losses) or 0.0))
    return without_start(curve)


def draw_group(folder, groups, keys, prefix=""):
    """Draws all pictures of models that are ranked together; returns [(file, what it shows)].

    keys: the scores, [(task, convention)]. The pictures' files start with the prefix.
    """
    shown = []
    unfinished = [group.name for group in groups if not group.finished]

    def add(name, title, xlabel, ylabel, curve_of, x_of):
        curves = {}
        for group in groups:
            points = [(x_of(group, step), *values) for step, *values in curve_of(group)]
            if points and None not in [x for x, *_ in points]:
                curves[group.name] = points
        if curves:
            draw_curves(folder / f"{prefix}{name}.png", title, xlabel, ylabel, curves, unfinished)
            shown.append((f"{prefix}{name}.png", title))

    def tokens(group, step):
        return step * group.first.config["batch_tokens"] / 1e6

    def flops(group, step):
        return 3e6 * group.first.facts["flops_per_token"] * tokens(group, step)

    def minutes(group, step):
        known = [run.minutes.get(step) for run in group.runs.values()]
        return None if None in known else statistics.mean(known)

    nats = "validation loss, nats per token"
    add("loss_tokens", "Validation loss against tokens", "million tokens", nats, loss_curve, tokens)
    add("loss_flops", "Validation loss against training FLOPs", "training FLOPs", nats, loss_curve, flops)
    add("loss_time", "Validation loss against time spent training", "minutes", nats, loss_curve, minutes)
    for key in keys:
        task, convention = key

        def accuracies(group, key=key):
            if group.accuracy(key) is None:
                return []
            steps = [step for step, _ in group.curve(lambda run: run.scores[key])]
            curve = [(step, *group.accuracy(key, step)) for step in steps]
            return [(step, 100 * mean, 100 * half) for step, mean, half in without_start(curve)]

        title = f"{task} ({convention}) against tokens"
        add(f"{task}_{convention}", title, "million tokens", "acc_norm, percent", accuracies, tokens)
    return shown
