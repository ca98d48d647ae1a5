"""The tables of a report, as Markdown."""
import statistics

from tools.common import table
from tools.compare import comparison, stats
from tools.compare.comparison import by_paper, rank

COSTS = ("FLOPs", "time")


def with_half(value, half, digits=4, sign=""):
    """A number and half of its interval's width."""
    text = f"{value:{sign}.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def mean_cell(losses):
    """The mean of {seed: loss} with its interval; a dash without losses."""
    values = list(losses.values())
    return with_half(statistics.mean(values), stats.half_interval(values)) if values else "–"


def difference_cell(loss, scale=1.0, digits=4):
    """An Estimate's difference with its interval, times a scale; a dash for None."""
    if loss is None:
        return "–"
    half = None if loss.half is None else scale * loss.half
    return with_half(scale * loss.difference, half, digits, "+")


def p_cell(p):
    return "–" if p is None else f"{p:.3g}"


def score_name(key):
    task, convention = key
    return f"{task} ({convention}) acc_norm"


def name_cell(group):
    """A model's name with what its paper prescribes, and how far it has come."""
    run = group.first
    name = group.name
    own = ", ".join(f"{field} {value:g}" for field, (value, _) in by_paper(run).items())
    if own:
        name += f" (its paper's {own})"
    if not group.finished:
        name += f" (unfinished: step {run.steps} of {run.config['max_steps']})"
    return name


def leaderboard_row(group, keys, budget):
    """A model's cells, without its rank."""
    run = group.first
    runs = group.runs.values()
    bits = group.bits_per_byte()
    row = [name_cell(group), mean_cell(group.losses()), "–" if bits is None else f"{bits:.4f}"]
    row.append(mean_cell(group.last_quarters(group.seeds)))
    for cost in COSTS if budget else ():
        row.append(mean_cell(budget.losses(group, cost)))
    for key in keys:
        accuracy = group.accuracy(key)
        row.append(f"{100 * accuracy[0]:.2f} ± {100 * accuracy[1]:.2f}" if accuracy else "–")
    active = run.facts.get("active_parameters")
    row += [f"{run.facts['parameters']:,}", f"{active:,}" if active else "–"]
    medians = [each.median_ms for each in runs if each.median_ms]
    speed = run.config["batch_tokens"] / statistics.median(medians) * 1000 if medians else None
    hours = statistics.mean(each.device_ms for each in runs) / 3.6e6
    row += [f"{run.flops:.2e}", f"{run.tokens:,}", "–" if speed is None else f"{speed:,.0f}"]
    return [*row, f"{hours:.3g}", str(len(group.runs))]


def leaderboard(groups, keys, budget=None):
    """The ranking of Groups, with a column for each score of keys."""
    head = ["rank", "model", "validation loss", "bits per byte", "training loss of the last quarter"]
    if budget:
        head += [f"at {budget.reference.name}'s {cost}" for cost in COSTS]
    head += [f"{score_name(key)}, %" for key in keys]
    head += ["parameters", "active", "training FLOPs", "tokens", "tokens/s", "device-hours", "seeds"]
    rows = []
    for group in sorted(groups, key=rank):
        rows.append([str(len(rows) + 1) if group.finished else "–", *leaderboard_row(group, keys, budget)])
    return table(head, rows)


def headline(ranked, pairs):
    """The result in words. ranked: the finished Groups, that with the lowest loss first."""
    if not ranked:
        return "No run here has finished."
    best = ranked[0]
    beside = [pair for pair in pairs if pair.a is best and pair.verdict != comparison.BETTER]
    others = "; ".join(f"{pair.b.name} ({pair.verdict})" for pair in beside)
    text = f"{best.name} has the lowest mean validation loss of {len(ranked)}: {mean_cell(best.losses())}."
    return text + (f" No verdict that it is better than: {others}." if others else "")


def differences_table(groups):
    """What differs between models of the same architecture, empty if there are none."""
    rows = []
    for architecture in sorted({group.first.architecture for group in groups}):
        same = sorted([group for group in groups if group.first.architecture == architecture], key=rank)
        models = [each.first.fixed_config() | {"script": each.first.script_hash} for each in same]
        for group, model in zip(same[1:], models[1:], strict=True):
            rows.append([group.name, same[0].name, "; ".join(comparison.differences(model, models[0]))])
    return table(["model", "beside", "what differs"], rows) if rows else ""


def ratio_cell(pair, name):
    return f"{pair.a.first.facts[name] / pair.b.first.facts[name]:.3f}"


def parameters_cell(pair):
    """The ratio of the trained parameters, and where it isn't the same that of the active ones."""
    text = ratio_cell(pair, "parameters")
    if all("active_parameters" in group.first.facts for group in (pair.a, pair.b)):
        active = ratio_cell(pair, "active_parameters")
        text += f", active {active}" if active != text else ""
    return text


def speed_cell(pair):
    """Tokens/s over the base's: the median over the seeds, and the lowest and highest of them."""
    ratios = comparison.speeds(pair.a, pair.b)
    if not ratios:
        return "–"
    text = f"{statistics.median(ratios):.2f}"
    return text + (f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else "")


def comparisons_table(pairs, base=None, key=None, budget=None):
    """Comparisons one by one, all with one base if it is given; at the reference's cost if it is known."""
    head = [f"against {base.name}" if base else "pair", "loss, nats", "loss, %", "verdict", "p, corrected"]
    head += ["by", "last quarter of training, nats", "parameters", "FLOPs per token", "tokens/s"]
    if budget:
        head += [f"at {budget.reference.name}'s {cost}" for cost in COSTS]
    if key:
        head += [f"{score_name(key)}, points", "its p, corrected"]
    rows = []
    for pair in pairs:
        percent = 100 / pair.b.mean(pair.a.seeds & pair.b.seeds)
        row = [name_cell(pair.a) if base else f"{pair.a.name} – {pair.b.name}", difference_cell(pair.loss)]
        row += [difference_cell(pair.loss, percent, 2), pair.verdict, p_cell(pair.p), pair.loss.how]
        row += [difference_cell(pair.last_quarter), parameters_cell(pair)]
        row += [ratio_cell(pair, "flops_per_token"), speed_cell(pair)]
        for cost in COSTS if budget else ():
            losses = [budget.losses(group, cost) for group in (pair.a, pair.b)]
            row.append(difference_cell(stats.compare_losses(*losses)) if all(losses) else "–")
        if key:
            row += [difference_cell(pair.accuracy, 100, 2), p_cell(pair.accuracy_p)]
        rows.append(row)
    return table(head, rows)


def tuned_group(of_entry):
    """Of an entry's Groups, one for each rate, the one with the lowest mean loss over the same seeds.

    These are the seeds of the rate that has most of them; rates without one of these can't be chosen.
    """
    most = max(of_entry, key=lambda group: (len(group.runs), group.place[1] == 1, -group.place[1]))
    candidates = [group for group in of_entry if group.seeds >= most.seeds]
    return min(candidates, key=lambda group: group.mean(most.seeds))


def rates_parts(entries):
    """The table of learning rates of {entry: its Groups by rate}, and lines on them; [] without a sweep."""
    swept = {entry: of_entry for entry, of_entry in entries.items() if len(of_entry) > 1}
    best = {entry: tuned_group(of_entry) for entry, of_entry in swept.items()}
    candidates = []
    for of_entry in swept.values():
        one = [group for group in of_entry if group.place[1] == 1]
        candidates += [(group, one[0]) for group in of_entry if one and group is not one[0]]
    compared = {pair.a.place: pair for pair in comparison.compare(candidates)}
    rates = sorted({group.place[1] for of_entry in swept.values() for group in of_entry})
    rows = []
    lines = []
    for entry, of_entry in swept.items():
        cells = {}
        for group in of_entry:
            text = f"{group.mean():.4f}"
            if group.seeds != best[entry].seeds:
                text += f" ({len(group.runs)} of {len(best[entry].runs)} seeds)"
            cells[group.place[1]] = f"**{text}**" if group is best[entry] else text
        pair = compared.get(best[entry].place)
        against = f"{difference_cell(pair.loss)}, {pair.verdict}" if pair else "–"
        cells = [cells.get(rate, "–") for rate in rates]
        rows.append([entry, *cells, against, str(len(best[entry].seeds))])
        if len(of_entry) > 2 and best[entry] in (of_entry[0], of_entry[-1]):
            lines.append(f"{entry}: the best rate is at the edge of the sweep: sweep further.")
    if not rows:
        return []
    head = ["learning rate", *[f"x{rate:g}" for rate in rates], "best minus x1", "seeds"]
    tested = sum(pair.p is not None for pair in compared.values())
    text = ("Mean validation loss by multiple of the size's shared learning rate, the best in bold. "
            f"Verdicts are corrected for {tested} comparisons with x1.")  # fmt: skip
    return ["### Learning rates", text, table(head, rows), *lines]
