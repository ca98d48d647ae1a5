"""
The pictures of tools.compare: curves of loss, accuracy and expert load, and bars of accuracy; and of a
study its effects with their intervals and its losses against size.
"""
import math
import statistics

import numpy as np

from tools import verdicts
from tools.runs import THINNED

LEAST_POINTS = 30  # of a training curve

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


def draw_into_files():
    """Has matplotlib draw without a screen. To be called before anything is drawn."""
    import matplotlib

    matplotlib.use("Agg")


def style(number):
    """(colour, dash) of a picture's curve."""
    return STYLES[number % len(STYLES)]


def spread_labels(axis, ends, gap=0.045, fontsize=8):
    """Writes each curve's name beside its end, moved apart so that they can be read.

    ends: [(name, x, y, colour)]; gap: the least distance, as a share of the picture's height. The name of a
    curve that ends above or below the picture is at its edge.
    """
    low, high = axis.get_ylim()
    ends = [(name, x, min(max(y, low), high), colour) for name, x, y, colour in ends]
    ends.sort(key=lambda end: end[2])
    to_share = axis.transData + axis.transAxes.inverted()
    heights = []
    lowest = 0.0
    for _, x, y, _ in ends:
        height = max(to_share.transform((x, y))[1], lowest)
        heights.append(height)
        lowest = height + gap
    highest = 1.0
    for i in reversed(range(len(ends))):  # down again where they left the picture
        heights[i] = min(heights[i], highest)
        highest = heights[i] - gap
    for (name, x, y, colour), height in zip(ends, heights, strict=True):
        line = {"arrowstyle": "-", "relpos": (0, 0.5), "color": colour, "lw": 0.4}
        axis.annotate(name, (x, y), xytext=(1.02, height), textcoords="axes fraction", color=colour,
                      fontsize=fontsize, va="center", arrowprops=line, annotation_clip=False)  # fmt: skip


INSET = (0.42, 0.42, 0.55, 0.53)  # left, bottom, width, height as shares of the picture's


def is_free(axis, curves):
    """Whether the inset, and the numbers beside it, would hide nothing of the curves."""
    to_share = axis.transData + axis.transAxes.inverted()
    left, bottom = INSET[0] - 0.07, INSET[1] - 0.07
    for points in curves.values():
        x, y = to_share.transform([(x, y + half) for x, y, half in points]).T
        between = np.linspace(x[0], x[-1], 200)
        if np.any((between > left) & (np.interp(between, x, y) > bottom)):
            return False
    return True


def draw_inset(axis, curves):
    """Draws the last 30% of the curves larger into the upper right corner.

    Draws nothing where one of them has no such part, or where the corner isn't free.
    """
    start = 0.7 * max(points[-1][0] for points in curves.values())
    late = {}
    for name, points in curves.items():
        late[name] = [(x, y) for x, y, _ in points if x >= start]
    if min(len(points) for points in late.values()) < 2 or not is_free(axis, curves):
        return
    zoom = axis.inset_axes(INSET)
    for number, points in enumerate(late.values()):
        colour, dash = style(number)
        x, y = zip(*points, strict=True)
        zoom.plot(x, y, color=colour, linestyle=dash, lw=1.4, marker=".")
    zoom.tick_params(labelsize=7)
    zoom.grid(alpha=0.25)
    zoom.set_title("the last part", fontsize=8)


def from_where_they_differ(curves):
    """(lowest, highest value) of curves and their bands after the first tenth of the axis.

    What all have in common, the fall from an untrained model's loss, would take up most of the picture.
    """
    start = 0.1 * max(points[-1][0] for points in curves.values())
    low = []
    high = []
    for points in curves.values():
        late = [point for point in points if point[0] >= start] or points[-1:]
        for _, y, half in late:
            low.append(y - half)
            high.append(y + half)
    room = 0.04 * (max(high) - min(low)) or 0.1
    return min(low) - room, max(high) + room


def draw_curves(path, title, xlabel, ylabel, curves, inset=False, most=None, unfinished=()):
    """Writes one PNG of curves {name: [(x, y, half of the interval's width)]}, with the intervals as bands.

    inset: whether the last part is drawn larger in a corner. most: the largest value that y can have.
    unfinished: names of curves that end in a cross.
    """
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    ends = []
    banded = False
    for number, (name, points) in enumerate(curves.items()):
        colour, dash = style(number)
        x, y, halves = zip(*points, strict=True)
        marker = "x" if name in unfinished else None
        axis.plot(x, y, color=colour, linestyle=dash, lw=1.6, marker=marker, markevery=[-1])
        if any(halves):
            low = [value - half for value, half in zip(y, halves, strict=True)]
            high = [value + half for value, half in zip(y, halves, strict=True)]
            axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            banded = True
        ends.append((name, x[-1], y[-1], colour))
    low, high = from_where_they_differ(curves)
    axis.set_ylim(low, high if most is None else min(high, most))
    axis.set(title=title + (", with 95% intervals" if banded else ""), xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.25)
    if inset:
        draw_inset(axis, curves)
    spread_labels(axis, ends)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_bars(path, title, pools, key):
    """Writes one PNG of the pools' accuracies, with 95% intervals; unfinished runs are hatched."""
    from matplotlib import pyplot

    scored = [(*pool.accuracy(key), pool) for pool in pools]
    scored.sort(key=lambda score: score[0])
    figure, axis = pyplot.subplots(figsize=(7, 1.1 + 0.4 * len(scored)), layout="constrained")
    right = 0.3
    for row, (mean, half, pool) in enumerate(scored):
        hatch = None if pool.finished else "//"
        interval = [[100 * min(half, mean)], [100 * min(half, 1 - mean)]]  # accuracies end at 0 and 100
        axis.barh(row, 100 * mean, xerr=interval, color="#9ecae1", edgecolor="black",
                  hatch=hatch, capsize=3)  # fmt: skip
        card = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}  # hatches are behind it
        axis.text(0.8, row, f"{100 * mean:.1f}", va="center", fontsize=8, bbox=card)
        right = max(right, mean + half)
    axis.axvline(25, color="black", lw=0.8, ls=":")
    axis.set_yticks(range(len(scored)), [pool.name for _, _, pool in scored])
    axis.set(title=title, xlabel="acc_norm in percent, 95% interval; dotted: chance")
    axis.set_xlim(0, min(100, 105 * right))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------
# Studies

# by verdict: (colour, marker, whether the marker is filled)
FOREST_STYLES = {
    verdicts.BETTER: ("#0072B2", "o", True),
    verdicts.WORSE: ("#D55E00", "s", True),
    verdicts.UNTOLD: ("#555555", "D", False),
}
NO_VERDICT = ("#555555", "x", True)
FAR = 5  # times the median row's distance from 0, beyond which a row is an arrow at the edge


def forest_end(rows):
    """How far from 0 draw_forest_panel's axis goes at most: to the end of the farthest interval near it."""
    reaches = [abs(difference) + (half or 0) for _, difference, half, _ in rows]
    return max(reach for reach in reaches if reach <= FAR * statistics.median(reaches))


def draw_forest_panel(axis, rows):
    """One base's rows of draw_forest, the first on top. Returns whether one of them is beyond the axis."""
    axis.axvline(0, color="black", lw=0.8)
    end = forest_end(rows)
    sides = [0]
    beyond = False
    for place, (_, difference, half, verdict) in enumerate(rows):
        colour, marker, filled = FOREST_STYLES.get(verdict, NO_VERDICT)
        text = f"{difference:+.4f}"
        if half is not None:
            text += f" ± {half:.4f}"
        if abs(difference) > end:
            beyond = True
            marker = ">" if difference > 0 else "<"
            difference, half = math.copysign(end, difference), None
        sides += [difference - (half or 0), difference + (half or 0)]
        axis.errorbar(difference, place, xerr=half, color=colour, marker=marker, markersize=6,
                      markerfacecolor=colour if filled else "white", capsize=3, lw=1.6)  # fmt: skip
        axis.annotate(text, (1.02, place), xycoords=("axes fraction", "data"), fontsize=9, va="center",
                      color=colour, annotation_clip=False)  # fmt: skip
    low, high = max(min(sides), -end), min(max(sides), end)
    space = 0.08 * (high - low) or 1  # 1 if no row differs from its base
    axis.set_xlim(low - space, high + space)
    axis.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=10)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.tick_params(axis="x", labelsize=9)
    axis.locator_params(axis="x", nbins=5)
    axis.grid(axis="x", alpha=0.25)
    return beyond


def draw_forest(path, title, panels):
    """Writes one PNG of differences with their 95% intervals, a panel with its own scale for each base.

    A row that would squeeze the others together is an arrow at the edge; its numbers stand beside it.
    panels: {base: [(entry, difference, half of the interval's width or None, verdict)]}.
    """
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    heights = [len(rows) + 1.5 for rows in panels.values()]
    size = (6.4, 1.0 + 0.3 * sum(heights))
    figure, axes = pyplot.subplots(
        len(panels), figsize=size, squeeze=False, height_ratios=heights, layout="constrained"
    )
    seen = set()
    beyond = False
    for axis, (base, rows) in zip(axes[:, 0], panels.items(), strict=True):
        beyond |= draw_forest_panel(axis, rows)
        axis.set_title(f"minus {base}", fontsize=10, loc="left")
        seen |= {row[-1] for row in rows}
    axis.set_xlabel("validation loss minus the base's, nats per token (left is better)", fontsize=9)
    handles = []
    for verdict in (*FOREST_STYLES, None):
        colour, marker, filled = FOREST_STYLES.get(verdict, NO_VERDICT)
        if verdict in seen or (verdict is None and seen - set(FOREST_STYLES)):
            face = colour if filled else "white"
            handles.append(Line2D([], [], color=colour, marker=marker, markerfacecolor=face, lw=1.6,
                                  label=verdict or "no verdict"))  # fmt: skip
    if beyond:
        handles.append(Line2D([], [], color="#555555", marker=">", lw=0, label="beyond the axis"))
    figure.suptitle(title, fontsize=11)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plain_ticks(low, high):
    """Round numbers between two losses, to be the ticks of a logarithmic axis."""
    from matplotlib.ticker import MaxNLocator

    return [tick for tick in MaxNLocator(nbins=7).tick_values(low, high) if low <= tick <= high]


def power_of_ten(x, _):
    """A tick's number, as 2 x 10^12, in matplotlib's notation."""
    mantissa, exponent = f"{x:.0e}".split("e")
    power = f"10^{{{int(exponent)}}}"
    return f"${power}$" if mantissa == "1" else rf"${mantissa}\times{power}$"


def draw_scaling(path, title, xlabel, curves, ticks=None):
    """Writes one PNG of losses against size on two logarithmic axes, with 95% intervals as bars and bands.

    curves: {name: [(x, mean loss, half of its interval's width, 0 with one seed)]}, x rising. ticks: names of
    places on the x axis, {x: name}. A point of one seed has no bar, and no band reaches it: one that narrows
    to a point there would say that its loss is known best.
    """
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    axis.set_xscale("log")
    axis.set_yscale("log")
    ends = []
    low = []
    high = []
    for number, (name, points) in enumerate(curves.items()):
        colour, dash = style(number)
        x, y, halves = zip(*points, strict=True)
        axis.plot(x, y, color=colour, linestyle=dash, marker="o", markersize=5, lw=2)
        below = [value - half for value, half in zip(y, halves, strict=True)]
        above = [value + half for value, half in zip(y, halves, strict=True)]
        # an interval may reach below zero with two seeds; what a logarithmic axis can't show is cut off
        known = np.array(halves) > 0
        bottom = np.where(known, np.maximum(below, 0.01 * min(y)), np.nan)
        top = np.where(known, above, np.nan)
        axis.fill_between(x, bottom, top, color=colour, alpha=0.1, lw=0)
        axis.vlines(x, bottom, top, color=colour, alpha=0.5, lw=1.5)
        low += [max(floor, 0.9 * value) for floor, value in zip(below, y, strict=True)]
        high += [min(ceiling, 1.1 * value) for ceiling, value in zip(above, y, strict=True)]
        ends.append((name, x[-1], y[-1], colour))
    axis.set_ylim(min(low) / 1.01, max(high) * 1.01)
    steps = plain_ticks(*axis.get_ylim())
    axis.set_yticks(steps, [f"{step:g}" for step in steps])
    axis.minorticks_off()
    if ticks:
        axis.set_xticks(list(ticks), list(ticks.values()))
    else:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(power_of_ten))
    axis.set_title(title, fontsize=13)
    axis.set_xlabel(xlabel, fontsize=11)
    axis.set_ylabel("validation loss, nats per token", fontsize=11)
    axis.tick_params(labelsize=11)
    axis.grid(alpha=0.25)
    spread_labels(axis, ends, gap=0.055, fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------
# What is drawn of a group of runs


def million_tokens(pool, step):
    return step * pool.first.config["batch_tokens"] / 1e6


def training_flops(pool, step):
    tokens = step * pool.first.config["batch_tokens"]
    return 3 * pool.first.facts["flops_per_token"] * tokens  # forward, and backward of twice the work


def clock(pool):
    """{step: minutes of training before it}, the mean over a pool's runs."""
    return dict(pool.curve(lambda run: run.minutes()))


def without_start(curve):
    """A curve of [(step, …)] without step 0, where a model is untrained, if there is another."""
    return curve[1:] if len(curve) > 1 and curve[0][0] == 0 else curve


def loss_curve(pool):
    """[(step, mean validation loss, half of its 95% interval's width, 0 with one seed)] of a pool."""
    curve = []
    for step, mean in pool.curve(lambda run: run.val):
        half = verdicts.half_interval([run.val[step] for run in pool.runs])
        curve.append((step, mean, half or 0.0))
    return without_start(curve)


def accuracy_curve(pool, key):
    """[(million tokens, acc_norm in percent, half of its 95% interval's width)] of a pool by a score."""
    curve = []
    for step, mean, half in without_start(pool.accuracy_curve(key)):
        curve.append((million_tokens(pool, step), 100 * mean, 100 * half))
    return curve


def training_curve(pool):
    """[(step, training loss, 0)] of a pool, the mean over seeds and over five of the steps that are kept.

    Empty where too few are: it is there to show a shape that few validations hide. Of a run in its folder
    the same steps are taken as of one in a collection.
    """

    def by_step(run):
        return {step: event["loss"] for step, event in run.train.items() if step % THINNED == 0}

    points = pool.curve(by_step)
    if len(points) < LEAST_POINTS:
        return []
    curve = []
    for place in range(2, len(points) - 2):
        near = [loss for _, loss in points[place - 2 : place + 3]]
        curve.append((points[place][0], sum(near) / len(near), 0.0))
    return curve


def load_curve(pool):
    """[(step, load of the busiest expert over the mean, 0)], empty for a model without experts."""

    def by_step(run):
        return {step: event["load_max"] for step, event in run.train.items() if "load_max" in event}

    return [(step, load, 0.0) for step, load in pool.curve(by_step)]


def draw(folder, pools, keys, prefix=""):
    """Draws all pictures of a group of runs.Pool into a folder; returns [(file, what it shows)].

    keys: the scores, [(task, convention)]. The pictures' files start with the prefix.
    """
    draw_into_files()
    shown = []

    def add(name, title, function, *args, **kwargs):
        file = f"{prefix}{name}.png"
        function(folder / file, title, *args, **kwargs)
        shown.append((file, title))

    losses = {pool.name: loss_curve(pool) for pool in pools}
    pools = sorted(pools, key=lambda pool: losses[pool.name][-1][1])
    unfinished = [pool.name for pool in pools if not pool.finished]

    def add_losses(name, title, xlabel, x_of):
        curves = {}
        for pool in pools:
            curves[pool.name] = [(x_of(pool, step), loss, half) for step, loss, half in losses[pool.name]]
        ylabel = "validation loss, nats per token"
        add(name, title, draw_curves, xlabel, ylabel, curves, inset=True, unfinished=unfinished)

    add_losses("loss_tokens", "Validation loss against tokens", "million tokens", million_tokens)
    add_losses("loss_flops", "Validation loss against training FLOPs", "training FLOPs", training_flops)
    clocks = {pool.name: clock(pool) for pool in pools}
    if all(step in clocks[name] for name, points in losses.items() for step, *_ in points):
        title = "Validation loss against time spent training"
        add_losses("loss_time", title, "minutes", lambda pool, step: clocks[pool.name][step])

    training = {}
    for pool in pools:
        points = training_curve(pool)
        training[pool.name] = [(million_tokens(pool, step), loss, half) for step, loss, half in points]
    if all(training.values()):
        title = "Training loss against tokens, smoothed"
        ylabel = "training loss, nats per token"
        add("training", title, draw_curves, "million tokens", ylabel, training, inset=True,
            unfinished=unfinished)  # fmt: skip

    for key in keys:
        task, convention = key
        scored = [pool for pool in pools if pool.accuracy(key)]
        if not scored:
            continue
        curves = {pool.name: accuracy_curve(pool, key) for pool in scored}
        if any(len(points) > 1 for points in curves.values()):
            title = f"{task} ({convention}) against tokens"
            add(f"{task}_{convention}", title, draw_curves, "million tokens", "acc_norm, percent", curves,
                most=100, unfinished=unfinished)  # fmt: skip
        add(f"{task}_{convention}_bars", f"Final {task} ({convention})", draw_bars, scored, key)

    loads = {pool.name: load_curve(pool) for pool in pools}
    loads = {name: points for name, points in loads.items() if points}
    if loads:
        title = "Load of the busiest expert over the mean"
        add("expert_load", title, draw_curves, "steps", "max / mean", loads)
    return shown
