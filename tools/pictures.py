"""The pictures of tools.compare: curves of loss, accuracy and expert load, and bars of accuracy."""
import math
import statistics

# Okabe and Ito's colours, told apart by the colour-blind; with the dashes also in black and white
STYLES = [
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#E69F00", (0, (5, 1))),
    ("#56B4E9", (0, (3, 1, 1, 1))),
    ("#000000", (0, (1, 1))),
]


def style(number):
    """(colour, dash) of a picture's curve."""
    return STYLES[number % len(STYLES)]


def spread_labels(axis, ends, gap=0.045):
    """Writes each curve's name beside its end, moved apart so that they can be read.

    ends: [(name, x, y, colour)]; gap: the least distance, as a share of the picture's height.
    """
    low, high = axis.get_ylim()
    ends = sorted(ends, key=lambda end: end[2])
    heights = []
    lowest = 0.0
    for _, _, y, _ in ends:
        height = max((y - low) / (high - low), lowest)
        heights.append(height)
        lowest = height + gap
    highest = 1.0
    for i in reversed(range(len(ends))):  # down again where they left the picture
        heights[i] = min(heights[i], highest)
        highest = heights[i] - gap
    for (name, x, y, colour), height in zip(ends, heights):
        line = {"arrowstyle": "-", "relpos": (0, 0.5), "color": colour, "lw": 0.4}
        axis.annotate(name, (x, y), xytext=(1.02, height), textcoords="axes fraction", color=colour,
                      fontsize=8, va="center", arrowprops=line)  # fmt: skip


def draw_inset(axis, curves):
    """Draws the last 30% of the curves larger, into the free corner above them."""
    start = 0.7 * max(points[-1][0] for points in curves.values())
    zoom = axis.inset_axes([0.42, 0.42, 0.55, 0.53])
    for number, points in enumerate(curves.values()):
        late = [(x, y) for x, y in points if x >= start]
        if late:
            colour, dash = style(number)
            zoom.plot(*zip(*late), color=colour, linestyle=dash, lw=1.4, marker=".")
    zoom.tick_params(labelsize=7)
    zoom.grid(alpha=0.25)
    zoom.set_title("the last part", fontsize=8)


def draw_curves(path, title, xlabel, ylabel, curves, inset=True, bands=None, unfinished=()):
    """Writes one PNG of curves {name: [(x, y)]}, with bands {name: [(x, low, high)]} if given.

    unfinished: names of curves that end in a cross.
    """
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    ends = []
    for number, (name, points) in enumerate(curves.items()):
        colour, dash = style(number)
        x, y = zip(*points)
        marker = "x" if name in unfinished else None
        axis.plot(x, y, color=colour, linestyle=dash, lw=1.6, marker=marker, markevery=[-1])
        if bands:
            x, low, high = zip(*bands[name])
            axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        ends.append((name, *points[-1], colour))
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.25)
    if inset and max(len(points) for points in curves.values()) >= 4:
        draw_inset(axis, curves)
    spread_labels(axis, ends)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_bars(path, title, pools, key):
    """Writes one PNG of the pools' accuracies, with 95% intervals; unfinished runs are hatched."""
    from matplotlib import pyplot

    scored = [pool for pool in pools if pool.accuracy(key)]
    scored.sort(key=lambda pool: pool.accuracy(key)[0])
    figure, axis = pyplot.subplots(figsize=(7, 0.6 + 0.45 * len(scored)), layout="constrained")
    right = 0.0
    for row, pool in enumerate(scored):
        mean, error = pool.accuracy(key)
        hatch = None if pool.finished else "//"
        axis.barh(row, 100 * mean, xerr=196 * error, color="#9ecae1", edgecolor="black",
                  hatch=hatch, capsize=3)  # fmt: skip
        axis.text(100 * (mean + 2.1 * error), row, f" {100 * mean:.1f}", va="center", fontsize=8)
        right = max(right, 100 * (mean + error))
    axis.axvline(25, color="black", lw=0.8, ls=":")
    axis.set_yticks(range(len(scored)), [pool.name for pool in scored])
    axis.set(title=title, xlabel="acc_norm in percent, 95% interval; dotted: chance")
    axis.set_xlim(0, right * 1.18)
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
    minutes = 0.0
    at = {0: 0.0}
    for step in sorted(pool.first.train):
        times = [run.train[step]["ms"] for run in pool.runs if step in run.train]
        minutes += statistics.mean(times) / 60_000
        at[step + 1] = minutes
    return at


def accuracy_curve(pool, key):
    """[(million tokens, acc_norm in percent)] of a pool by a score."""

    def by_step(run):
        return {step: 100 * result["acc_norm"] for step, result in run.scores[key].items()}

    return [(million_tokens(pool, step), value) for step, value in pool.curve(by_step)]


def error_band(points, n):
    """[(x, low, high)]: one standard error, over n items, around accuracies in percent."""
    band = []
    for x, y in points:
        error = 100 * math.sqrt(y / 100 * (1 - y / 100) / n)
        band.append((x, y - error, y + error))
    return band


def load_curve(pool):
    """[(step, load of the busiest expert over the mean)], empty for a model without experts."""

    def by_step(run):
        return {step: event["load_max"] for step, event in run.train.items() if "load_max" in event}

    return pool.curve(by_step)


def draw(folder, pools, keys, prefix=""):
    """Draws all pictures of a group of compare.Pool into a folder; returns [(file, what it shows)].

    keys: the scores, [(task, convention)]. The pictures' files start with the prefix.
    """
    import matplotlib

    matplotlib.use("Agg")
    shown = []

    def add(name, title, function, *args, **kwargs):
        file = f"{prefix}{name}.png"
        function(folder / file, title, *args, **kwargs)
        shown.append((file, title))

    losses = {pool.name: pool.curve(lambda run: run.val) for pool in pools}
    pools = sorted(pools, key=lambda pool: losses[pool.name][-1][1])
    unfinished = [pool.name for pool in pools if not pool.finished]

    def add_losses(name, title, xlabel, x_of):
        curves = {}
        for pool in pools:
            curves[pool.name] = [(x_of(pool, step), loss) for step, loss in losses[pool.name]]
        ylabel = "validation loss, nats per token"
        add(name, title, draw_curves, xlabel, ylabel, curves, unfinished=unfinished)

    add_losses("loss_tokens", "Validation loss against tokens", "million tokens", million_tokens)
    add_losses("loss_flops", "Validation loss against training FLOPs", "training FLOPs", training_flops)
    clocks = {pool.name: clock(pool) for pool in pools}
    if all(step in clocks[name] for name, points in losses.items() for step, _ in points):
        title = "Validation loss against time spent training"
        add_losses("loss_time", title, "minutes", lambda pool, step: clocks[pool.name][step])

    for key in keys:
        task, convention = key
        scored = [pool for pool in pools if pool.accuracy(key)]
        if not scored:
            continue
        curves = {pool.name: accuracy_curve(pool, key) for pool in scored}
        if any(len(points) > 1 for points in curves.values()):
            n = scored[0].items(key)
            bands = {name: error_band(points, n) for name, points in curves.items()}
            title = f"{task} ({convention}) against tokens, with one standard error"
            add(f"{task}_{convention}", title, draw_curves, "million tokens", "acc_norm, percent", curves,
                inset=False, bands=bands, unfinished=unfinished)  # fmt: skip
        add(f"{task}_{convention}_bars", f"Final {task} ({convention})", draw_bars, scored, key)

    loads = {pool.name: load_curve(pool) for pool in pools}
    loads = {name: points for name, points in loads.items() if points}
    if loads:
        title = "Load of the busiest expert over the mean"
        add("expert_load", title, draw_curves, "steps", "max / mean", loads, inset=False)
    return shown
