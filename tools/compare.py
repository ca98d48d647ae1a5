"""
Which architecture is better, by how much, and is it real?

    python -m tools.compare log/*                                 # -> report/: leaderboard.md, index.html, pictures
    python -m tools.compare log/* --save_reference results/x.jsonl        # the band that these runs span, step by step
    python -m tools.compare log/mine --against results/x.jsonl            # is my curve inside it?

Reads each run's log.jsonl and per-item predictions. Runs with the same config but the seed are pooled. Only runs that
saw the same tokens in the same windows, were validated on the same ones and trained by the same recipe are ranked
together; the others get a table of their own and the reason. A run without its last step is shown, not ranked.

Differences: of validation losses by Welch's t interval (95%) where there are seeds, of accuracies by the exact
McNemar test on the items (a sign test on each item's share of right answers where seeds are pooled), p-values
after Holm's correction for the number of pairs.
"""
import argparse
import base64
import dataclasses
import html
import importlib
import json
import math
import statistics
from pathlib import Path

import torch

import fineweb

BUDGET = 124_475_904
# Okabe and Ito's colours, told apart by the colour-blind; with the dashes also in black and white
STYLES = [("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"), ("#E69F00", (0, (5, 1))),
          ("#56B4E9", (0, (3, 1, 1, 1))), ("#000000", (0, (1, 1)))]  # fmt: skip
RECIPE_FIELDS = ("max_lr", "min_lr", "warmup_steps", "weight_decay", "beta1", "beta2", "adam_eps", "grad_clip")
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 15: 2.131,
        20: 2.086, 30: 2.042}  # Student's t, two-sided 95%, by degrees of freedom  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Reading runs


class Unreadable(Exception):
    """A run that has to be left out; says why."""


@dataclasses.dataclass
class Run:
    """One run's log: facts of its last start that trained, and by step what it logged (the last word on a step counts)."""

    folder: Path
    facts: dict
    changed: list  # conditions that were not the same from its first step to its last
    train: dict
    val: dict
    scores: dict  # (task, convention) -> {step: result}
    right: dict  # (task, convention) -> list of bool per item, of the newest score

    @property
    def config(self):
        return self.facts["config"]

    @property
    def steps(self):
        return max(self.val)

    @property
    def finished(self):
        return self.steps == self.config["max_steps"]

    @property
    def architecture(self):
        return self.facts["script"].removeprefix("train_")


def read_run(folder):
    """The Run in a folder. Raises Unreadable for a folder without a log, or with one that is no run's."""
    folder = Path(folder)
    path = folder / "log.jsonl"
    if not path.is_file():
        raise Unreadable("has no log.jsonl")
    starts, trained, train, validated, scores = [], set(), {}, [], {}
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            kind = event["event"]
            if kind == "run":
                event["data"]["fingerprint"], event["flops_per_token"], event["parameters"], event["processes"]
                if set(event["config"]) != set(importlib.import_module(event["script"]).Config.__dataclass_fields__):
                    raise Unreadable(f"it was written by another version of {event['script']}.py")
                starts.append(event)
            elif kind == "train":
                train[event["step"]] = event | {"processes": starts[-1]["processes"]}
                trained.add(len(starts) - 1)
            elif kind == "val":
                validated.append((starts[-1], event["step"], float(event["loss"])))
            elif kind == "score":
                scores.setdefault((event["task"], event["convention"]), {})[event["step"]] = event
        except (ValueError, KeyError, TypeError, ImportError, IndexError):
            if number < len(lines):  # the last line of a run that is going on, or was killed, may be half there
                raise Unreadable(f"line {number} of its log.jsonl is not an event of a run") from None
    if not starts:
        raise Unreadable("its log.jsonl does not say what run it is" if lines else "its log.jsonl is empty")
    training = [starts[i] for i in sorted(trained)] or starts[-1:]
    facts = training[-1]  # an --eval later may have had other options or processes

    def fixed(start):
        return {name: start["config"][name] for name in (*RECIPE_FIELDS, "max_steps", "batch_tokens", "val_tokens")} | start["data"]

    changed = sorted({name for start in training for name, value in fixed(start).items() if value != fixed(facts)[name]})
    val = {step: loss for start, step, loss in validated
           if all(fixed(start)[name] == fixed(facts)[name] for name in ("val_tokens", "fingerprint"))}  # fmt: skip
    if not val:
        raise Unreadable("it was not validated even once")
    right = {}
    for key in scores:
        try:
            saved = json.loads((folder / f"{key[0]}_{key[1]}.json").read_text())
            right[key] = [a == b for a, b in zip(saved["predictions_norm"], saved["labels"], strict=True)]
        except (OSError, ValueError, KeyError):
            pass  # compared without the test on items, which then says so
    return Run(folder, facts, changed, train, val, scores, right)


@dataclasses.dataclass
class Pool:
    """Runs of one architecture and config that differ in the seed only, or one unfinished run."""

    name: str
    runs: list

    @property
    def first(self):
        return self.runs[0]

    @property
    def finished(self):
        return self.first.finished

    def losses(self):
        return [run.val[run.steps] for run in self.runs]

    def loss(self):
        return statistics.mean(self.losses())

    def accuracy(self, key):
        """Mean acc_norm over the seeds and its standard error over the items, or None if not all were scored."""
        if not all(key in run.scores for run in self.runs):
            return None
        values = [run.scores[key][max(run.scores[key])]["acc_norm"] for run in self.runs]
        last = self.first.scores[key][max(self.first.scores[key])]
        mean = statistics.mean(values)
        return mean, math.sqrt(mean * (1 - mean) / last["n"])

    def curve(self, of):
        """[(step, mean)] over the seeds of {step: value}, at the steps that all of them have."""
        curves = [of(run) for run in self.runs]
        return [(step, statistics.mean(curve[step] for curve in curves)) for step in sorted(set.intersection(*map(set, curves)))]


def pool_runs(runs):
    pools = {}
    for run in runs:
        varying = ("seed", "run_name", "data_dir", "hellaswag", "device", "micro_batch", "compile", "log_every", "prompt", "sample_tokens")
        same = {name: value for name, value in run.config.items() if name not in varying}
        alone = None if run.finished else str(run.folder)
        pools.setdefault(json.dumps([run.facts["script"], same, run.facts["data"], run.changed, alone], sort_keys=True), []).append(run)
    names = [group[0].architecture for group in pools.values()]
    return [Pool(name if names.count(name) == 1 else f"{name} ({group[0].folder.name})", group)
            for name, group in zip(names, pools.values())]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Is it fair?


def conditions(pool):
    """What must be equal for two pools to be ranked together: {name: value}."""
    run, config = pool.first, pool.first.config
    recipe = {name: config[name] for name in RECIPE_FIELDS}
    own = importlib.import_module(run.facts["script"]).RECIPE if config["recipe"] == "paper" else {}
    for name, value in own.items():
        if recipe.get(name) == value:
            recipe[name] = "the paper's"
    return {"tokens": config["max_steps"] * config["batch_tokens"], "data": run.facts["data"]["fingerprint"],
            "training shards": config["train_shards"], "tokenizer": run.facts["data"]["tokenizer"],
            "block_size": config["block_size"], "batch_tokens": config["batch_tokens"], "validation tokens": config["val_tokens"],
            "seeds": sorted({other.config["seed"] for other in pool.runs}) if pool.finished else None,
            "recipe": recipe, "changed": run.changed, "over the budget": run.facts["parameters"] > BUDGET}  # fmt: skip


def unlike(pool, reference):
    """The reasons, in words, why a pool can't be ranked with another."""
    ours, theirs, reasons = conditions(pool), conditions(reference), []
    for name in ours:
        if name == "recipe":
            for field in RECIPE_FIELDS:
                pair = ours[name][field], theirs[name][field]
                if pair[0] != pair[1] and "the paper's" not in pair:
                    reasons.append(f"{field} is {pair[0]:g}, not {pair[1]:g}")
        elif name == "over the budget":
            if ours[name]:
                reasons.append(f"{pool.first.facts['parameters']:,} parameters are over the budget of {BUDGET:,}")
        elif name == "changed":
            if ours[name]:
                reasons.append(f"{', '.join(ours[name])} changed between its first step and its last")
        elif name == "seeds":
            if ours[name] and theirs[name] and not set(ours[name]) & set(theirs[name]):
                reasons.append(f"the order of the data is another (seed {ours[name]}, not {theirs[name]})")
        elif ours[name] != theirs[name]:
            reasons.append(f"{name}: {ours[name]}, not {theirs[name]}")
    return reasons


def fair_groups(pools):
    """[(pools to be ranked together, why they are not in the first group)], the largest group first."""
    groups = []
    for pool in sorted(pools, key=lambda pool: not pool.finished):
        for group in groups:
            if not unlike(pool, group[0]) and not unlike(group[0], pool):
                group.append(pool)
                break
        else:
            groups.append([pool])
    groups.sort(key=lambda group: -len([pool for pool in group if pool.finished]))
    return [(group, [] if group is groups[0] else unlike(group[0], groups[0][0]) or unlike(groups[0][0], group[0])) for group in groups]


# ----------------------------------------------------------------------------------------------------------
# Is the difference real?


def sign_test(right_a, right_b):
    """Exact two-sided p-value that neither of two lists of shares of right answers, item by item, is better.

    With one run each this is the exact McNemar test: the items that just one got right are coin flips.
    """
    wins = sum(a > b for a, b in zip(right_a, right_b, strict=True))
    losses = sum(a < b for a, b in zip(right_a, right_b, strict=True))
    n, few = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    log_half = n * math.log(2)
    tail = sum(math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - log_half) for k in range(few + 1))
    return min(1.0, 2 * tail)


def holm(p_values):
    """Holm's correction: the p-values, each as if it had been the only one asked for."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected


def welch(a, b):
    """(difference of the means a - b, half-width of its 95% interval or None where a list has one value only)."""
    difference = statistics.mean(a) - statistics.mean(b)
    if min(len(a), len(b)) < 2:
        return difference, None
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if va + vb == 0:
        return difference, 0.0
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    t = T_95[max(known for known in T_95 if known <= max(1, freedom))]  # the next smaller: on the safe side
    return difference, t * math.sqrt(va + vb)


def shares(pool, key):
    """Each item's share of right answers over the pool's seeds, or None if predictions are missing."""
    if not all(key in run.right for run in pool.runs) or len({len(run.right[key]) for run in pool.runs}) != 1:
        return None
    return [statistics.mean(answers) for answers in zip(*(run.right[key] for run in pool.runs))]


def compare_pairs(pools, key):
    """[(a, b, loss difference, its half-width, accuracy difference, corrected p or None)] for each pair of pools."""
    pairs = [(a, b) for i, a in enumerate(pools) for b in pools[i + 1 :]]
    tested, p_values = [], []
    for a, b in pairs:
        ours, theirs = shares(a, key), shares(b, key)
        if ours and theirs and len(ours) == len(theirs):
            tested.append((a, b))
            p_values.append(sign_test(ours, theirs))
    corrected = {(id(a), id(b)): p for (a, b), p in zip(tested, holm(p_values))}
    rows = []
    for a, b in pairs:
        accuracies = a.accuracy(key), b.accuracy(key)
        difference = accuracies[0][0] - accuracies[1][0] if None not in accuracies else None
        rows.append((a, b, *welch(a.losses(), b.losses()), difference, corrected.get((id(a), id(b)))))
    return rows


def verdict(difference, p):
    if p is None or difference is None:
        return "not tested"
    return "not distinguishable" if p >= 0.05 else "better" if difference > 0 else "worse"


# ----------------------------------------------------------------------------------------------------------
# Tables


def make_model(script, config):
    """A script's model without memory for its weights."""
    init, script.Model.init_weights = script.Model.init_weights, lambda self: None
    try:
        with torch.device("meta"):
            return script.Model(config)
    finally:
        script.Model.init_weights = init


def count_parameters(script, fields):
    """(total, active per token) of a script's model: of routed experts, n_active of n_expert work on a token."""
    model = make_model(script, script.Config(**fields))
    total = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        routed = "experts" in name
        active += parameter.numel() * model.config.n_active // model.config.n_expert if routed else parameter.numel()
    return total, active


def percent(value):
    return f"{100 * value[0]:.2f} ± {100 * value[1]:.2f}" if value else "–"


def table(head, rows):
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]) + "\n"


def leaderboard(pools, keys):
    head = ["", "architecture", "parameters", "active", "training FLOPs", "tokens", "validation loss", *[f"{t} ({c}) acc_norm" for t, c in keys],
            "tokens/s", "device-hours", "seeds"]  # fmt: skip
    rows, rank = [], 0
    for pool in sorted(pools, key=lambda pool: (not pool.finished, pool.loss())):
        run, n = pool.first, len(pool.runs)
        batch = run.config["batch_tokens"]
        rank += pool.finished
        tokens = run.steps * batch
        total, active = count_parameters(importlib.import_module(run.facts["script"]), run.config)
        sd = f" ± {statistics.stdev(pool.losses()):.4f}" if n > 1 else ""
        times = [event["ms"] for other in pool.runs for event in other.train.values()]
        speed = f"{batch / statistics.median(times) * 1000:,.0f}" if times else "–"
        hours = statistics.mean(sum(event["ms"] * event["processes"] for event in other.train.values()) / 3.6e6 for other in pool.runs)
        name = pool.name if pool.finished else f"{pool.name} (unfinished: step {run.steps} of {run.config['max_steps']})"
        rows.append([str(rank) if pool.finished else "–", name, f"{total:,}", f"{active:,}",
                     f"{3 * run.facts['flops_per_token'] * tokens:.2e}", f"{tokens:,}", f"{pool.loss():.4f}{sd}",
                     *[percent(pool.accuracy(key)) for key in keys], speed, f"{hours:.3g}", str(n)])  # fmt: skip
    return table(head, rows)


def pairs_tables(pools, key):
    """The pairs one by one, and the matrix of verdicts."""
    rows, verdicts = [], {}
    for a, b, loss, width, accuracy, p in compare_pairs(pools, key):
        interval = f"{loss:+.4f}" + (f" ± {width:.4f}" if width is not None else " (one seed: no interval)")
        words = verdict(accuracy, p)
        verdicts[a.name, b.name] = words
        verdicts[b.name, a.name] = {"better": "worse", "worse": "better"}.get(words, words)
        rows.append([f"{a.name} – {b.name}", interval, "–" if accuracy is None else f"{100 * accuracy:+.2f}",
                     "–" if p is None else f"{p:.3g}", words])  # fmt: skip
    names = [pool.name for pool in pools]
    matrix = [[f"**{a}**", *["" if a == b else verdicts[a, b] for b in names]] for a in names]
    title = f"{key[0]} ({key[1]}) acc_norm"
    return (table(["pair", "validation loss, 95% interval", f"{title}, points", "p, corrected", "the first is"], rows),
            table(["by " + title, *names], matrix))  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Pictures


def spread_labels(axis, ends, gap=0.045):
    """Writes each curve's name beside its end, moved apart so that they can be read."""
    low, high = axis.get_ylim()
    log = axis.get_yscale() == "log"
    place = (lambda y: math.log(y / low) / math.log(high / low)) if log else (lambda y: (y - low) / (high - low))
    ends = sorted(ends, key=lambda end: end[2])
    heights = []
    for _, _, y, _ in ends:
        heights.append(max(place(y), heights[-1] + gap if heights else 0.0))
    for i in range(len(ends) - 1, -1, -1):  # down again where they left the picture
        heights[i] = min(heights[i], heights[i + 1] - gap if i + 1 < len(ends) else 1.0)
    for (name, x, y, colour), at in zip(ends, heights):
        axis.annotate(name, (x, y), xytext=(1.02, at), textcoords="axes fraction", color=colour, fontsize=8, va="center",
                      arrowprops=dict(arrowstyle="-", relpos=(0, 0.5), color=colour, lw=0.4))  # fmt: skip


def draw_curves(path, title, xlabel, ylabel, curves, inset=True, bands=None, unfinished=()):
    """curves: {name: [(x, y)]}; bands: {name: [(x, low, high)]}. One PNG, with an inset of the last part."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    ends = []
    for (colour, dash), (name, points) in zip(STYLES * (1 + len(curves) // len(STYLES)), curves.items()):
        x, y = zip(*points)
        axis.plot(x, y, color=colour, linestyle=dash, lw=1.6, marker="x" if name in unfinished else None, markevery=[-1])
        if bands:
            bx, low, high = zip(*bands[name])
            axis.fill_between(bx, low, high, color=colour, alpha=0.12, lw=0)
        ends.append((name, x[-1], y[-1], colour))
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.25)
    longest = max(len(points) for points in curves.values())
    if inset and longest >= 4:
        start = max(points[-1][0] for points in curves.values()) * 0.7
        late = {name: [point for point in points if point[0] >= start] for name, points in curves.items()}
        zoom = axis.inset_axes([0.42, 0.42, 0.55, 0.53])
        for (colour, dash), points in zip(STYLES * (1 + len(late) // len(STYLES)), late.values()):
            if points:
                zoom.plot(*zip(*points), color=colour, linestyle=dash, lw=1.4, marker=".")
        zoom.tick_params(labelsize=7)
        zoom.grid(alpha=0.25)
        zoom.set_title("the last part", fontsize=8)
    spread_labels(axis, ends)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_bars(path, title, pools, key):
    from matplotlib import pyplot

    pools = sorted((pool for pool in pools if pool.accuracy(key)), key=lambda pool: pool.accuracy(key)[0])
    figure, axis = pyplot.subplots(figsize=(7, 0.6 + 0.45 * len(pools)), layout="constrained")
    for row, pool in enumerate(pools):
        mean, error = pool.accuracy(key)
        axis.barh(row, 100 * mean, xerr=196 * error, color="#9ecae1", edgecolor="black", hatch="//" if not pool.finished else None, capsize=3)
        axis.text(100 * (mean + 2.1 * error), row, f" {100 * mean:.1f}", va="center", fontsize=8)
    axis.axvline(25, color="black", lw=0.8, ls=":")
    axis.set_yticks(range(len(pools)), [pool.name for pool in pools])
    axis.set(title=title, xlabel="acc_norm in percent, 95% interval; dotted: chance")
    axis.set_xlim(0, max(100 * sum(pool.accuracy(key)) for pool in pools) * 1.18)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw(folder, pools, keys, prefix=""):
    """All pictures of a group; returns [(file, what it shows)]."""
    import matplotlib

    matplotlib.use("Agg")
    shown, losses = [], {pool.name: pool.curve(lambda run: run.val) for pool in pools}
    order = dict(sorted(losses.items(), key=lambda item: item[1][-1][1]))
    by_name = {pool.name: pool for pool in pools}
    unfinished = [pool.name for pool in pools if not pool.finished]

    def add(name, words, function, *args, **kwargs):
        function(folder / f"{prefix}{name}.png", words, *args, **kwargs)
        shown.append((f"{prefix}{name}.png", words))

    def seconds(pool):
        """{step: mean seconds of training before it} of a pool."""
        every = [statistics.mean(run.train[step]["ms"] for run in pool.runs if step in run.train) / 1000
                 for step in sorted(pool.first.train)]  # fmt: skip
        total, at = 0.0, {0: 0.0}
        for step, duration in zip(sorted(pool.first.train), every):
            total += duration
            at[step + 1] = total
        return at

    def scaled(x_of):
        return {name: [(x_of(by_name[name], step), y) for step, y in points] for name, points in order.items()}

    nats = "validation loss, nats per token"
    add("loss_tokens", "Validation loss against tokens", draw_curves, "million tokens", nats,
        scaled(lambda pool, step: step * pool.first.config["batch_tokens"] / 1e6), unfinished=unfinished)  # fmt: skip
    add("loss_flops", "Validation loss against training FLOPs", draw_curves, "training FLOPs", nats, unfinished=unfinished,
        curves=scaled(lambda pool, step: 3 * pool.first.facts["flops_per_token"] * step * pool.first.config["batch_tokens"]))  # fmt: skip
    clocks = {name: seconds(pool) for name, pool in by_name.items()}
    if all(step in clocks[name] for name, points in order.items() for step, _ in points):
        add("loss_time", "Validation loss against time spent training", draw_curves, "minutes", nats,
            scaled(lambda pool, step: clocks[pool.name][step] / 60), unfinished=unfinished)  # fmt: skip
    for key in keys:
        scored = [by_name[name] for name in order if by_name[name].accuracy(key)]
        curves = {pool.name: pool.curve(lambda run: {step: 100 * r["acc_norm"] for step, r in run.scores[key].items()}) for pool in scored}
        curves = {name: [(step * by_name[name].first.config["batch_tokens"] / 1e6, y) for step, y in points] for name, points in curves.items()}
        if any(len(points) > 1 for points in curves.values()):
            n = scored[0].first.scores[key][max(scored[0].first.scores[key])]["n"]
            bands = {name: [(x, y - 100 * math.sqrt(y / 100 * (1 - y / 100) / n), y + 100 * math.sqrt(y / 100 * (1 - y / 100) / n))
                            for x, y in points] for name, points in curves.items()}  # fmt: skip
            add(f"{key[0]}_{key[1]}", f"{key[0]} ({key[1]}) against tokens, with one standard error", draw_curves, "million tokens",
                "acc_norm, percent", curves, inset=False, bands=bands, unfinished=unfinished)  # fmt: skip
        if scored:
            add(f"{key[0]}_{key[1]}_bars", f"Final {key[0]} ({key[1]})", draw_bars, pools, key)
    loads = {pool.name: pool.curve(lambda run: {step: e["load_max"] for step, e in run.train.items() if "load_max" in e}) for pool in pools}
    loads = {name: points for name, points in loads.items() if points}
    if loads:
        add("expert_load", "Load of the busiest expert over the mean", draw_curves, "steps", "max / mean", loads, inset=False)
    return shown


# ----------------------------------------------------------------------------------------------------------
# Reference bands


def save_reference(path, pools):
    """One line per validated step: the mean over the seeds and the band for one more run like them (95%)."""
    if len(pools) != 1 or not pools[0].finished:
        fineweb.fail("--save_reference needs finished runs of one config that differ in the seed only")
    lines, n = [], len(pools[0].runs)
    for step in sorted(set.intersection(*(set(run.val) for run in pools[0].runs))):
        values = [run.val[step] for run in pools[0].runs]
        mean = statistics.mean(values)
        # a t interval for the next run; from one run alone nothing is known of the spread, so one percent
        half = T_95[max(k for k in T_95 if k <= n - 1)] * statistics.stdev(values) * math.sqrt(1 + 1 / n) if n > 1 else 0.01 * mean
        lines.append({"step": step, "loss": mean, "low": mean - half, "high": mean + half, "n": n,
                      "script": pools[0].first.facts["script"], "conditions": conditions(pools[0])})  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    fineweb.write_atomic(path, lambda f: f.write(content))
    print(f"{path}: the band of {n} run(s) at {len(lines)} steps")


def against(path, runs):
    """Says step by step whether runs are inside a reference band; returns how many were outside somewhere."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        band = {line["step"]: (line["low"], line["loss"], line["high"], line["n"]) for line in lines}
        wanted = lines[0]["conditions"] | {"seeds": None, "script": lines[0]["script"]}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        fineweb.fail(f"{path} is not a reference: make one by --save_reference")
    outside = 0
    for run in runs:
        steps = sorted(set(run.val) & set(band))
        if not steps:
            fineweb.fail(f"{run.folder} and {path} have no validated step in common")
        its = json.loads(json.dumps(conditions(Pool("", [run])))) | {"seeds": None, "script": run.facts["script"]}
        for name in wanted:
            if its[name] != wanted[name]:
                print(f"note: {run.folder} has another {name} than the reference: {its[name]}, not {wanted[name]}")
        rows, wrong = [], 0
        for step in steps:
            low, mean, high, n = band[step]
            inside = low <= run.val[step] <= high
            wrong += not inside
            rows.append([str(step), f"{run.val[step]:.4f}", f"{mean:.4f}", f"{low:.4f} to {high:.4f}", "inside" if inside else "OUTSIDE"])
        print(f"{run.folder} against {path} ({n} runs)\n" + table(["step", "loss", "reference", "band", ""], rows))
        print(f"inside at {len(steps) - wrong} of {len(steps)} steps\n")
        outside += wrong > 0
    return outside


# ----------------------------------------------------------------------------------------------------------
# The report


def markdown_to_html(text):
    """The little Markdown that this program writes: headings, tables, paragraphs, bold."""
    out, in_table = [], False
    for line in text.splitlines():
        cells = [html.escape(cell.strip()) for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if cells is None and in_table:
            out.append("</table>")
        if cells is not None and not in_table:
            out.append("<table>")
        in_table, tag = cells is not None, "td"
        if cells is None:
            heading = len(line) - len(line.lstrip("#"))
            out.append(f"<h{heading}>{html.escape(line[heading:].strip())}</h{heading}>" if heading else f"<p>{html.escape(line)}</p>" if line else "")
        elif set("".join(cells)) != {"-"}:
            tag = "th" if out[-1] == "<table>" else "td"
            cells = [f"<b>{cell[2:-2]}</b>" if cell.startswith("**") else cell for cell in cells]
            out.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>")
    return "\n".join(out + ["</table>"] * in_table)


PAGE = """<!doctype html><meta charset="utf-8"><title>NanoTitan report</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse;margin:1em 0;font-size:13px}}td,th{{border:1px solid #bbb;padding:.25em .6em;text-align:right}}
td:nth-child(2),th{{text-align:left}}img{{max-width:100%;margin:1em 0}}</style>
{body}
"""


def report(out, pools, left_out):
    """Writes the tables, pictures and page into a folder; returns the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    text, pictures = ["# Which is better, and is it real?\n"], []
    for number, (group, reasons) in enumerate(fair_groups(pools)):
        finished = [pool for pool in group if pool.finished]
        if number:
            text.append("## Not comparable with those above\n\nRanked apart, because " + "; ".join(reasons) + ".\n")
        keys = sorted({key for pool in group for run in pool.runs for key in run.scores}, key=lambda key: (key[0], key[1] != "nanogpt"))
        text.append(leaderboard(group, keys))
        own = {pool.name: [field for field, value in conditions(pool)["recipe"].items() if value == "the paper's"] for pool in group}
        for name, fields in own.items():
            if fields:
                text.append(f"{name} trains by its paper's recipe: {', '.join(fields)} are its own (`--recipe shared` for the common one).\n")
        if len(finished) > 1 and keys:
            for part in pairs_tables(finished, keys[0]):
                text.append(part)
        drawn = draw(out, group, keys, f"group{number + 1}_" if number else "")
        pictures += drawn
        text += [f"![{words}]({name})\n" for name, words in drawn]
    if left_out:
        text.append("## Left out\n\n" + table(["run", "why"], [[str(folder), why] for folder, why in left_out]))
    markdown = "\n".join(text)
    (out / "leaderboard.md").write_text(markdown)
    body = markdown_to_html("\n".join(line for line in markdown.splitlines() if not line.startswith("![")))
    for name, words in pictures:
        encoded = base64.b64encode((out / name).read_bytes()).decode()
        body += f'\n<h3>{html.escape(words)}</h3><img alt="{html.escape(words)}" src="data:image/png;base64,{encoded}">'
    (out / "index.html").write_text(PAGE.format(body=body))
    return markdown


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, as log/*")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for the report (default: report)")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare curves with a reference band instead")
    parser.add_argument("--save_reference", type=Path, metavar="FILE", help="write the band that the runs span instead")
    args = fineweb.parse_strictly(parser)
    runs, left_out = [], []
    for folder in args.runs:
        try:
            runs.append(read_run(folder))
        except Unreadable as reason:
            left_out.append((folder, str(reason)))
    for folder, reason in left_out:
        print(f"left out: {folder}: {reason}")
    if not runs:
        fineweb.fail("there is no run to compare: give folders like log/gpt2-tiny")
    if args.against:
        raise SystemExit(1 if against(args.against, runs) or left_out else 0)
    pools = pool_runs(runs)
    if args.save_reference:
        save_reference(args.save_reference, pools)
    else:
        try:
            print("\n".join(line for line in report(args.out, pools, left_out).splitlines() if not line.startswith("![")))
        except ImportError as missing:
            fineweb.fail(f"the pictures need a package that is missing: pip install {missing.name}")
        print(f"the page: {args.out}/index.html")
    if left_out:
        fineweb.fail(f"{len(left_out)} of {len(args.runs)} folders were left out, see above")


if __name__ == "__main__":
    main()
