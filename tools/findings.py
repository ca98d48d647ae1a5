"""
What we found so far: the README's answers, with every number out of results/.

    python -m tools.findings              # print them
    python -m tools.table --write         # put them into README.md

results/findings.toml has the questions, by topic, and the words of the
answers. A number is a place in them, and is filled in from the collection that
the answer names:

    {llama}                 the mean final loss of an entry over its seeds
    {llama - gpt2}          the difference of two, paired over seeds
    {llama - gpt2, in %}    the same in percent of the second one's loss
    {llama - gpt2, after step 1000}
                            what it was before the end, without a verdict
    {llama - gpt2, on fresh text}
                            what it was on the text that was read in the last
                            quarter of training, as tools.compare tells it; at
                            own rates, those that are best on the validation
    {llama - gpt2, by documents}
                            what it is on more text than training scored, with
                            an interval over seeds and documents, by the
                            documents-SIZE.json of tools.documents in the
                            study's folder
    {mta - llama, as part of rwkv - llama}
                            one difference of means in percent of another
    {llama / gpt2, flops}   the ratio of FLOPs per token; also: parameters,
                            active (parameters at work on a token), tokens/s
    {llama at 0.8M}         at another size than the answer's first one;
                            at the end, as in {llama - gpt2, in % at 0.8M}
    {gemma x4 - gemma}      at another learning rate; without one the shared
                            rate, or with own_rate = true each one's best
    {gemma, with gpt2's FLOPs}, {gemma - llama, in gpt2's time}
                            what they come to at GPT-2's cost, as in the last
                            columns of the ranking, without a verdict
    {table of 6}            the loss of a table of six tokens, the one to guess
                            among them, by results/ngram.json; {table of 6,
                            entries} is how many there are in it
    {borne out}             how many of the "better" and "worse" of all answers
                            are borne out by fresh text, as "9 of 10"
    {extrapolated llama}    the loss at 124M by a power law through the
                            answer's sizes, with its interval by seeds;
                            {extrapolated llama, by residuals} is the interval
                            by how far the sizes are off the line
    {lost with 16}          the least and the most that the runs in
                            results/context.json lose with 16 tokens of context

Words can't contradict the runs: each difference that is told must be under
verdicts with what the words make of it, "better", "worse", "not
distinguishable", or of one seed "one seed: no verdict". If the runs say
otherwise, there are no answers but a line. The same if fresh text doesn't bear
a "better" or "worse" out, that is if its interval there holds zero, and the
answer doesn't tell the difference on fresh text, too.
"""
import argparse
import copy
import functools
import json
import math
import re
import statistics
from pathlib import Path
from typing import Literal

import msgspec

import fineweb
from tools import collection, documents, effects, scaling, verdicts
from tools.page import table
from tools.runs import Unreadable

ROOT = Path(__file__).parent.parent
FILE = ROOT / "results/findings.toml"
RANKED = "results/architectures"  # the study of the ranking
SHORTER = "results/rates"  # the same architectures with fewer tokens
PACED = "results/pace"  # a few steps of each with nothing else on the machine, for their times
REFERENCE = "gpt2"
TABLES = "results/ngram.json"  # by tools.ngram
CONTEXTS = "results/context.json"  # by tools.context
COSTS = {f"with {REFERENCE}'s FLOPs": "FLOPs", f"in {REFERENCE}'s time": "time"}
FARTHEST = 1.5  # times the tokens of a budget that a loss may be read off beyond it
AFTER = "after step "
FRESH = "on fresh text"
BY_DOCUMENTS = "by documents"
PART = "as part of "
PLACE = re.compile(r"\{([^{}]*)\}")
RATE = re.compile(r" x([0-9.]+)$")
RATIOS = {"flops": "flops_per_token", "parameters": "parameters", "active": "active_parameters"}
SEEDS = ["no seed", "one seed", "two seeds", "three seeds", "four seeds", "five seeds", "six seeds"]


class Finding(msgspec.Struct, forbid_unknown_fields=True):
    """A question and its answer."""

    topic: Literal["seven", "hybrids", "changes"]  # the README has each in a part of its own
    question: str
    answer: str  # with places for numbers, as later may have them
    runs: str  # the collection, as results/architectures
    sizes: list[str]  # of it, as ["0.25M"]
    later: str  # what may change it at 124M and 10B tokens
    verdicts: dict[str, str] = {}  # place of a difference -> what the answer makes of it
    own_rate: bool = False  # whether each entry is at its own best learning rate


class Findings(msgspec.Struct, forbid_unknown_fields=True):
    """findings.toml."""

    finding: list[Finding]


# ----------------------------------------------------------------------------------------------------------
# The runs


def studied(path):
    """The runs of a collection that belong to a study. Raises SystemExit if it can't be read."""
    try:
        return [run for run in collection.read(ROOT / path) if run.study]
    except Unreadable as reason:
        fineweb.fail(str(reason))


class Evidence:
    """The runs of one collection and size, by entry and learning rate. Raises SystemExit if there is none."""

    def __init__(self, path, size, own_rate=False):
        self.where = f"{path} at {size}"
        runs = effects.by_size(studied(path)).get(size)
        if not runs:
            fineweb.fail(f"{self.where}: there is no run")
        self.groups, _ = effects.group_runs(runs)
        self.entries = effects.rates_of(self.groups)
        if own_rate:
            self.selected = {entry: effects.best_group(each) for entry, each in self.entries.items()}
        else:
            self.selected = {entry: group for (entry, rate), group in self.groups.items() if rate == 1}
        self.against, _ = effects.compare_selected(self.selected)
        self.cited = {}  # the groups that an answer has asked for, by name

    def on_fresh_text(self):
        """The same evidence with the losses on fresh text, the same rates selected.

        Raises SystemExit if none of its runs has one. A Group of which a run has none is left out.
        """
        other = copy.copy(self)
        fresh = {key: group.on_fresh_text() for key, group in self.groups.items()}
        other.groups = {key: group for key, group in fresh.items() if group}
        other.entries = effects.rates_of(other.groups)
        chosen = {entry: fresh[entry, group.rate] for entry, group in self.selected.items()}
        other.selected = {entry: group for entry, group in chosen.items() if group}
        if not other.selected:
            fineweb.fail(f"{self.where}: the runs are too short for a loss on fresh text")
        other.against, _ = effects.compare_selected(other.selected)
        return other

    def any_run(self):
        return next(iter(self.groups.values())).first

    def group(self, name):
        """The effects.Group of an entry as a place names it: gemma, or gemma x4."""
        rate = RATE.search(name)
        entry = RATE.sub("", name)
        group = self.groups.get((entry, float(rate[1]))) if rate else self.selected.get(entry)
        if group is None:
            fineweb.fail(f"{self.where} has no run of {name}")
        self.cited[name] = group
        return group

    def compare(self, ours, theirs):
        """(the verdicts.Estimate of two Groups' difference, the verdict on it).

        The verdict has the correction of what the report compares the two in: the entries with one base,
        the learning rates of one entry, or, where neither is the other's base, all pairs of the size.
        """
        for effect in self.against.get(theirs.entry, []):
            if effect.group is ours and effect.base is theirs:
                return effect.loss, effect.verdict
        loss, _ = effects.paired_loss(ours.losses(), theirs.losses())
        if ours.entry == theirs.entry:
            if theirs.rate != 1:
                fineweb.fail(f"{self.where}: {ours.name} is compared with rate 1 only")
            _, _, p = effects.against_rate_one(self.entries)[0][ours.entry, ours.rate]
            return loss, verdicts.ONE_SEED if p is None else effects.told(loss, p)
        effect = effects.compare_with(theirs, [ours])[0]
        if effect.unequal or loss.p is None:
            return loss, effect.verdict
        pairs, _ = scaling.told_apart(self.selected | {ours.entry: ours, theirs.entry: theirs})
        told = (ours.entry, theirs.entry) in pairs or (theirs.entry, ours.entry) in pairs
        lower = verdicts.BETTER if loss.difference < 0 else verdicts.WORSE
        return loss, lower if told else verdicts.UNTOLD


# ----------------------------------------------------------------------------------------------------------
# The ranking, with what each architecture costs


def tokens_of(group):
    config = group.first.config
    return config["max_steps"] * config["batch_tokens"]


def losses_with(times, group, shorter):
    """The losses of a Group with so many times its tokens, {seed: loss}; empty if they can't be told.

    On the straight line between log loss and log tokens through the Group and the one with fewer tokens,
    seed by seed. Both lowered their learning rate to the end, which a run that is cut short has not.
    """
    lowest = tokens_of(shorter) / tokens_of(group)
    if not lowest / FARTHEST <= times <= FARTHEST or lowest >= 1:
        return {}
    losses = {}
    for seed in sorted(group.seeds & shorter.seeds):
        ours, theirs = group.runs[seed], shorter.runs[seed]
        b = math.log(theirs.loss / ours.loss) / math.log(1 / lowest)
        losses[seed] = ours.loss * times**-b
    return losses


def losses_at_cost(cost, group, reference, shorter, paced):
    """The losses of a Group with as many tokens as cost what the reference Group's do, {seed: loss}.

    cost is "FLOPs" or "time". shorter and paced are {entry: Group}: runs with fewer tokens, and runs that
    were timed. Empty if they can't be told.
    """
    if cost == "FLOPs":
        times = reference.first.facts["flops_per_token"] / group.first.facts["flops_per_token"]
    else:
        times = pace(paced[group.entry], paced[reference.entry]) if group.entry in paced else None
    fewer = shorter.get(group.entry)
    if not times or not fewer or fewer.rate != group.rate:
        return {}
    if effects.scale_of_loss(fewer.first) != effects.scale_of_loss(group.first):
        return {}
    return losses_with(times, group, fewer)


def shorter_runs(size):
    """{entry: Group} of the same architectures with fewer tokens; none if a size has none."""
    return Evidence(SHORTER, size).selected if size in effects.by_size(studied(SHORTER)) else {}


def tables(run):
    """{tokens: (the loss of a table of so many, its entries)}; none if it is of other data than a run's."""
    try:
        kept = json.loads((ROOT / TABLES).read_text(encoding="utf-8"))
        options = kept["options"]
        same = kept["data"] == run.facts["data"]["fingerprint"]
        same &= options["steps"] == run.config["max_steps"]
        for name in ("batch_tokens", "block_size", "val_tokens"):
            same &= options[name] == run.config[name]
        return dict(enumerate(zip(kept["losses"], kept["entries"], strict=True), 1)) if same else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        fineweb.fail(f"{TABLES} can't be read: {getattr(error, 'strerror', None) or error}")


def cost_cells(group, reference, shorter, paced):
    """Cells: FLOPs per token, tokens/s over the reference's, and the losses at its FLOPs and its time."""
    speed = pace(paced[group.entry], paced[reference.entry]) if group.entry in paced else None
    cells = [ratio(group, reference, "flops"), "–" if speed is None else f"{speed:.2f}"]
    for cost in ("FLOPs", "time"):
        losses = losses_at_cost(cost, group, reference, shorter, paced)
        cells.append(mean_of(losses) if losses else "–")
    return cells


def ranking():
    """The architectures' losses at each size of the study, and what they cost, the best first.

    The order is that of the largest size at which all have been run. Between them stand tables of n-grams,
    which saw the same tokens.
    """
    sizes = list(effects.by_size(studied(RANKED)))
    at = {size: Evidence(RANKED, size) for size in sizes}
    own = {size: Evidence(RANKED, size, own_rate=True) for size in sizes}
    shorter = shorter_runs(sizes[0])
    paced = Evidence(PACED, sizes[0]).selected
    most = max(len(here.selected) for here in at.values())
    last = [size for size in sizes if len(at[size].selected) == most][-1]
    head = ["architecture"]
    for size in sizes:
        head.append(f"loss at {size}")
        if own[size].selected != at[size].selected:
            head.append(f"{size}, own rate")
    head += [f"x {REFERENCE}'s FLOPs per token", f"x {REFERENCE}'s tokens/s"]
    head += [f"{sizes[0]} at {REFERENCE}'s FLOPs", f"{sizes[0]} in {REFERENCE}'s time"]
    rows = []
    for entry, best in at[last].selected.items():
        row = [entry]
        for size in sizes:
            row.append(mean_of(at[size].selected[entry].losses()) if entry in at[size].selected else "–")
            if own[size].selected != at[size].selected:
                mine = own[size].selected.get(entry)
                row.append("–" if mine is None else f"{mean_of(mine.losses())} at x{mine.rate:g}")
        first = at[sizes[0]].selected
        if entry in first:
            row += cost_cells(first[entry], first[REFERENCE], shorter, paced)
        else:
            row += ["–"] * 4
        rows.append((best.mean(), row))
    for tokens, (loss, entries) in tables(at[last].selected[REFERENCE].first).items():
        if tokens > 1:
            name = f"*{tokens}-gram table, {fineweb.short(entries)} entries*"
            row = [name] + ["–"] * (len(head) - 1)
            row[head.index(f"loss at {last}")] = f"{loss:.3f}"
            rows.append((loss, row))
    return table(head, [row for _, row in sorted(rows)], ["---"] + ["--:"] * (len(head) - 1))


# ----------------------------------------------------------------------------------------------------------
# Numbers in their places


def with_half(value, half, digits=3, sign=""):
    """A number and half of its interval's width, with more digits if that would be rounded to nothing."""
    while half and round(half, digits) == 0:
        digits += 1
    text = f"{value:{sign}.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def mean_of(losses):
    """The mean of {seed: loss} with its interval."""
    values = list(losses.values())
    return with_half(statistics.mean(values), verdicts.half_interval(values))


def ratio(ours, theirs, what):
    """The ratio of two Groups' FLOPs, parameters or tokens/s, in words."""
    if what in RATIOS:
        return f"{ours.first.facts[RATIOS[what]] / theirs.first.facts[RATIOS[what]]:.2f}"
    if what != "tokens/s":
        fineweb.fail(f"{FILE.name}: no ratio of {what}: {', '.join(RATIOS)} or tokens/s")
    speed = pace(ours, theirs)
    if speed is None:
        fineweb.fail(f"{FILE.name}: {ours.name} and {theirs.name} weren't timed on one machine")
    return f"{speed:.2f}"


def pace(ours, theirs):
    """Tokens/s of a Group over another's, the median over the seeds; None if no machine trained both."""
    ratios = effects.speeds(ours, theirs)
    return statistics.median(ratios) if ratios else None


def lost_with(most, here):
    """The least and the most that runs of the evidence lose with less text, as tools.context found."""
    try:
        kept = json.loads((ROOT / CONTEXTS).read_text(encoding="utf-8"))
        names = {run.folder.name for group in here.groups.values() for run in group.runs.values()}
        lost = []
        for run in kept:
            if run["run"] in names:
                lost.append(run["lost"][run["lengths"].index(int(most))][0])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fineweb.fail(f"{CONTEXTS} can't be read, or has no length {most}: {error}")
    if not lost:
        fineweb.fail(f"{CONTEXTS} has no run of {here.where}")
    return f"{min(lost):.3f} to {max(lost):.3f}"


def extrapolated(name, evidence):
    """The loss at full size by the power law of an entry, and its interval. evidence: {size: Evidence}.

    name: the entry, or the entry and ", by residuals" for that interval alone.
    """
    entry = name.removesuffix(", by residuals")
    law = scaling.law_of({size: here.group(entry) for size, here in evidence.items()}, scaling.parameters)
    if law is None:
        fineweb.fail(f"{FILE.name}: {{extrapolated {name}}}: a power law needs {scaling.LEAST_SIZES} sizes")
    if entry != name:
        return scaling.ranged(law.beyond(scaling.TARGET))
    return f"{law.loss(scaling.TARGET):.3f} ({scaling.ranged(law.between(scaling.TARGET))})"


def at_cost(inside, cost, size, here):
    """The text for the loss of an entry at the reference's FLOPs or time, or for the difference of two.

    There is no verdict on it, since it is read off a line.
    """
    shorter = shorter_runs(size)
    paced = Evidence(PACED, size).selected
    losses = []
    for name in inside.split(" - "):
        losses.append(losses_at_cost(cost, here.group(name), here.group(REFERENCE), shorter, paced))
        if not losses[-1]:
            fineweb.fail(f"{FILE.name}: the loss of {name} at {REFERENCE}'s {cost} can't be told")
    if len(losses) == 1:
        return mean_of(losses[0])
    loss, _ = effects.paired_loss(*losses)
    return with_half(loss.difference, loss.half, 3, "+")


def difference(ours, theirs):
    """The mean difference of two Groups' losses over their common seeds."""
    return effects.paired_loss(ours.losses(), theirs.losses())[0].difference


def after_step(step, ours, theirs, where):
    """The text for the difference of two Groups at a step, a string, before their last."""
    losses = []
    for group in (ours, theirs):
        if not step.isdigit() or any(int(step) not in run.val for run in group.runs.values()):
            fineweb.fail(f"{where}: {group.name} has no validation loss at step {step}")
        losses.append({seed: run.val[int(step)] for seed, run in group.runs.items()})
    loss, _ = effects.paired_loss(*losses)
    return with_half(loss.difference, loss.half, 3, "+")


def fill(finding, place, evidence):
    """The text for one place. evidence: {size: Evidence}. Raises SystemExit for a place that says nothing."""
    if place.startswith("extrapolated "):
        return extrapolated(place.removeprefix("extrapolated "), evidence)
    if place == "borne out":
        return borne_out()
    inside, _, size = place.partition(" at ")
    here = evidence.get(size or finding.sizes[0])
    if here is None:
        fineweb.fail(f"{FILE.name}: {{{place}}}: this answer has no size {size}")
    if inside.startswith("table of "):
        found = tables(here.any_run())
        tokens, _, what = inside.removeprefix("table of ").partition(", ")
        if not tokens.isdigit() or int(tokens) not in found:
            fineweb.fail(f"{FILE.name}: {{{place}}}: {TABLES} has no such table on what {here.where} saw")
        loss, entries = found[int(tokens)]
        return fineweb.short(entries) if what == "entries" else f"{loss:.3f}"
    if inside.startswith("lost with "):
        return lost_with(inside.removeprefix("lost with "), here)
    inside, _, what = inside.partition(", ")
    if what == FRESH:
        here = here.on_fresh_text()
    if what in COSTS:
        return at_cost(inside, COSTS[what], size or finding.sizes[0], here)
    if " / " in inside:
        return ratio(*map(here.group, inside.split(" / ")), what)
    if " - " not in inside:
        return mean_of(here.group(inside).losses())
    ours, theirs = map(here.group, inside.split(" - "))
    if what.startswith(AFTER):
        return after_step(what.removeprefix(AFTER), ours, theirs, here.where)
    if what.startswith(PART):
        whole = map(here.group, what.removeprefix(PART).split(" - "))
        return f"{100 * difference(ours, theirs) / difference(*whole):.0f}%"
    if what == BY_DOCUMENTS:
        pair = by_documents(finding, size or finding.sizes[0], inside.split(" - "))
        half = pair.both.half if pair.both else None
        loss, verdict = verdicts.Estimate(pair.difference, half, pair.p, "documents"), pair.verdict
    else:
        loss, verdict = here.compare(ours, theirs)
    key = verdict_key(inside, what if what in (FRESH, BY_DOCUMENTS) else "", size)
    fresh = verdict_key(inside, FRESH, size)
    doubtful = what != FRESH and effects.is_doubtful(verdict, effects.compare_fresh(ours.runs, theirs.runs))
    if doubtful and fresh not in finding.verdicts:
        fineweb.fail(f"{FILE.name}, {finding.question} {key} is {verdict}, which fresh text doesn't bear "
                     f"out: tell {{{fresh}}}, too")  # fmt: skip
    if finding.verdicts.get(key) != verdict:
        said = finding.verdicts.get(key, "nothing")
        fineweb.fail(f"{FILE.name}, {finding.question} {key} is {verdict} by the runs in {here.where}, and "
                     f"{said} by its verdicts: look at the words again")  # fmt: skip
    if what == "in %":
        part = 100 / theirs.mean()
        half = None if loss.half is None else part * loss.half
        return with_half(part * loss.difference, half, 1, "+") + "%"
    return with_half(loss.difference, loss.half, 3, "+")


def verdict_key(inside, measure, size):
    """The key of a verdict: a difference, as "a - b", with its measure and its size if these are told."""
    return inside + (f", {measure}" if measure else "") + (f" at {size}" if size else "")


def borne_out():
    """How many verdicts of all answers are borne out by fresh text, in words.

    Counted are the differences, each once for its study, size and rates, that have an interval there.
    """
    counted = {}
    evidence = functools.cache(Evidence)
    for finding in read_file(FILE):
        for place, verdict in finding.verdicts.items():
            inside, _, size = place.partition(" at ")
            if verdict not in (verdicts.BETTER, verdicts.WORSE) or ", " in inside:
                continue
            here = evidence(finding.runs, size or finding.sizes[0], finding.own_rate)
            ours, theirs = map(here.group, inside.split(" - "))
            place = here.where, ours.name, theirs.name
            fresh = effects.compare_fresh(ours.runs, theirs.runs)
            if fresh and fresh.half is not None:
                counted[place] = not effects.is_doubtful(verdict, fresh)
    return f"{sum(counted.values())} of {len(counted)}"


def by_documents(finding, size, names):
    """(the documents.Pair of two entries, the first minus the second, what its verdict is).

    p-values are corrected for all pairs that are in the size's file.
    """
    file = f"{finding.runs}/documents-{size}.json"
    scores = documents.read(ROOT / file)
    ours, theirs = [f"{Path(finding.runs).name}-{size}-{name.replace(' ', '-')}" for name in names]
    for pair in documents.compare(scores):
        if {pair.a, pair.b} == {ours, theirs}:
            return pair.turned() if pair.a == theirs else pair
    fineweb.fail(f"{file} has no runs of {' and '.join(names)}")


def in_seeds(counts):
    """How many seeds the groups of an answer have, in words."""
    words = [SEEDS[count] if count < len(SEEDS) else f"{count} seeds" for count in sorted(counts)]
    return words[0] if len(words) == 1 else f"{words[0].split()[0]} to {words[-1]}"


def scale(finding, evidence):
    """On what runs an answer rests: sizes, tokens, seeds and the command that shows them."""
    seeds = []
    tokens = []
    for size, here in evidence.items():
        groups = (here.cited or here.selected).values()
        seeds.append(f"{in_seeds({len(group.runs) for group in groups})} at {size}")
        tokens.append(f"{max(map(tokens_of, groups)) / 1e6:.1f}M bytes each")
    if len(set(tokens)) == 1:
        text = ", ".join([*seeds, tokens[0]])
    else:
        text = "; ".join(f"{of_size}, {each}" for of_size, each in zip(seeds, tokens, strict=True))
    return f"({text}: `python -m tools.compare {finding.runs}`)"


def in_words(finding):
    """A Finding as a paragraph. Raises SystemExit, with one line, if it isn't what the runs say."""
    evidence = {size: Evidence(finding.runs, size, finding.own_rate) for size in finding.sizes}
    answer, later = [
        PLACE.sub(lambda found: fill(finding, found[1], evidence), text)
        for text in (finding.answer, finding.later)
    ]
    return f"**{finding.question}** {answer} {scale(finding, evidence)} *At full size:* {later}\n"


def findings(topic=None, file=FILE):
    """The answers, of one topic or all, as Markdown, a paragraph each.

    Raises SystemExit, with one line, if one doesn't hold.
    """
    return "\n".join(in_words(finding) for finding in read_file(file) if topic in (None, finding.topic))


def read_file(file):
    """The Findings of a file as a list. Raises SystemExit if it can't be read."""
    try:
        return msgspec.toml.decode(file.read_bytes(), type=Findings).finding
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        fineweb.fail(f"{file} can't be read: {getattr(error, 'strerror', None) or error}")


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    fineweb.parse_strictly(parser)
    print(findings(), end="")


if __name__ == "__main__":
    main()
