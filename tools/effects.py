"""
What a study says: each entry against its base, the learning rates, and which runs look wrong.

study_parts() is called by tools.compare for runs that tools.study made. A run with the same seed as one of
its base saw the same batches in the same order, so entries are compared with their base seed by seed, by a
paired t test. The p-values of all entries against one base, at one size, have Holm's correction. Whether the
conditions were equal is checked for each pair of runs; where they weren't, there is no verdict.

Between equal entries this gives a verdict in at most 5% of studies. It finds only large effects with three
seeds, so a second, folded table has what would be found if all entries varied alike between seeds: false in
4% of simulated studies if they do, in 7% to 11% if one of 3 to 11 entries varies three times as much, but in
10% to 23% if the base does (tests/test_effects.py simulates six entries).
"""
import dataclasses
import re
import statistics

from tools import verdicts
from tools.collection import size_in_numbers
from tools.page import Folded, table
from tools.pictures import draw_forest, draw_into_files
from tools.runs import CONDITION_FIELDS, RECIPE_FIELDS, find_script, preference

UNEQUAL_PARAMETERS = 0.02  # a larger share than this is marked
ROSE = 0.02  # share by which the final validation loss may be above the run's lowest one
JUMP = 1.0  # nats by which a training loss may be above the running median
WINDOW = 11  # logged steps of the running median
FAR = 5  # robust standard deviations from the median of the seeds
LEAST_PAIRS = 3  # of seeds, for a standard deviation


# ----------------------------------------------------------------------------------------------------------
# Which runs belong together


@dataclasses.dataclass
class Group:
    """The finished runs of one entry at one size and rate, by seed."""

    entry: str
    rate: float  # multiple of the size's learning rate
    runs: dict

    @property
    def name(self):
        return self.entry if self.rate == 1 else f"{self.entry}, rate x{self.rate:g}"

    @property
    def first(self):
        return self.runs[min(self.runs)]

    @property
    def seeds(self):
        return set(self.runs)

    def losses(self):
        return {seed: run.loss for seed, run in self.runs.items()}

    def on_fresh_text(self):
        """The Group with the losses on fresh text in the place of the validation's; None if a run has none.

        See runs.Run.fresh_loss.
        """
        runs = {}
        for seed, run in self.runs.items():
            loss = run.fresh_loss()
            if loss is None:
                return None
            runs[seed] = dataclasses.replace(run, val={run.steps: loss})
        return Group(self.entry, self.rate, runs)

    def mean(self, seeds=None):
        """The mean final validation loss over seeds, all by default."""
        return statistics.mean(self.runs[seed].loss for seed in seeds or self.runs)


def bases_of(run):
    """The names of the entries that a run of a study is compared with."""
    base = run.study["base"]
    if base is None:
        return []
    return [base] if isinstance(base, str) else list(base)


def by_size(runs):
    """{size: runs of it}, the smallest first."""
    sizes = {}
    for run in runs:
        sizes.setdefault(run.study["size"], []).append(run)
    return {size: sizes[size] for size in sorted(sizes, key=lambda size: (size_in_numbers(size), size))}


def group_runs(runs):
    """({(entry, rate): Group} of the runs of one study and size, a line on each that is left out)."""
    groups = {}
    lines = []
    for run in sorted(runs, key=lambda run: (run.study["entry"], run.seed, str(run.folder))):
        if not run.finished:
            lines.append(f"{run.folder.name} is left out: it is at step {run.steps} of "
                         f"{run.config['max_steps']}.")  # fmt: skip
            continue
        key = run.study["entry"], float(run.study["rate"])
        group = groups.setdefault(key, Group(*key, {}))
        other = group.runs.get(run.seed)
        if other:
            run, dropped = sorted((run, other), key=preference, reverse=True)
            lines.append(f"{dropped.folder} is left out: {run.folder} has the same place in the study and "
                         f"the same seed, {run.seed}, and is newer.")  # fmt: skip
        group.runs[run.seed] = run
    return groups, lines


def rates_of(groups):
    """{entry: its Groups, the lowest rate first}."""
    entries = {}
    for entry, rate in sorted(groups):
        entries.setdefault(entry, []).append(groups[entry, rate])
    return entries


def best_group(of_entry):
    """Of an entry's Groups the one with the lowest mean loss over the same seeds.

    These are the seeds of the rate that has most of them; rates without one of these can't be chosen.
    """
    most = max(of_entry, key=lambda group: (len(group.runs), group.rate == 1, -group.rate))
    candidates = [group for group in of_entry if group.seeds >= most.seeds]
    return min(candidates, key=lambda group: group.mean(most.seeds))


# ----------------------------------------------------------------------------------------------------------
# Are the conditions equal?


def prescribed_fields(run):
    """{recipe field: value} that the run's own paper prescribes and that it was run with."""
    found = {}
    if run.recipe != "paper":
        return found
    script = find_script(run)
    for field, value in getattr(script, "RECIPE", {}).items():
        if field in RECIPE_FIELDS and adjusted(run, field) == value:
            found[field] = value
    return found


def adjusted(run, field):
    """A recipe field of a run as it would be at rate 1."""
    value = float(run.config[field])
    if field in ("max_lr", "min_lr"):
        value = float(f"{value / run.study['rate']:.9g}")  # without the rounding of the product
    return value


def conditions(run):
    """What must be equal in the runs of a pair: {name: value}. The learning rate is as it'd be at rate 1."""
    config = run.config
    found = {
        "data": run.facts["data"]["fingerprint"],
        "tokenizer": run.facts["data"]["tokenizer"],
        "init_from": config.get("init_from") or "nothing",
        "dtype": run.facts.get("dtype", "").split(" ")[0],  # without the reason for it
        "torch": run.facts.get("torch"),
    }
    for field in CONDITION_FIELDS:
        found[field] = config[field]
    for field in RECIPE_FIELDS:
        found[field] = adjusted(run, field)
    return found


def scale_of_loss(run):
    """Equal for runs whose losses can be compared across sizes: of the same data, in equal windows."""
    data = run.facts["data"]
    return data["fingerprint"], data["tokenizer"], run.config["val_tokens"], run.config["block_size"]


def differing(run, base):
    """What differs in the conditions of a run and one of its base, in words.

    A field that the paper of one of them prescribes may differ.
    """
    free = prescribed_fields(run).keys() | prescribed_fields(base).keys()
    ours = conditions(run)
    theirs = conditions(base)
    texts = []
    for each in (run, base):
        if each.changed:
            texts.append(f"{', '.join(each.changed)} changed midway in {each.folder.name}")
    for name, value in ours.items():
        other = theirs[name]
        if value != other and name not in free:
            if isinstance(value, float):
                texts.append(f"{name} {value:g}, not {other:g}")
            else:
                texts.append(f"{name} {value}, not {other}")
    return texts


def mixed(group):
    """What differs between the seeds of a Group beside the seed, in words; there should be nothing."""
    texts = set()
    configs = [run.fixed_config() for run in group.runs.values()]
    for name in {name: None for config in configs for name in config}:
        if any(config.get(name) != configs[0].get(name) for config in configs):
            texts.add(name)
    if len({run.script_hash for run in group.runs.values()} - {None}) > 1:
        texts.add("the script")
    if not texts:
        return []
    return [f"{', '.join(sorted(texts))} of {group.name} differs between its seeds"]


# ----------------------------------------------------------------------------------------------------------
# Effects


def told(loss, p):
    """The verdict by a corrected p-value."""
    if p >= verdicts.LEVEL:
        return verdicts.UNTOLD
    return verdicts.BETTER if loss.difference < 0 else verdicts.WORSE


@dataclasses.dataclass
class Effect:
    """A Group minus its base's, in nats of the final validation loss, over the seeds that both have."""

    group: Group
    base: Group
    seeds: list
    loss: verdicts.Estimate
    unequal: list  # what differs in the conditions, in words
    p: float | None = None  # corrected
    shared: verdicts.Estimate | None = None  # if all entries vary alike between seeds
    shared_p: float | None = None  # corrected
    fresh: verdicts.Estimate | None = None  # of the losses on fresh text; None if a run has none

    @property
    def verdict(self):
        if self.unequal:
            return verdicts.UNEQUAL
        if not self.seeds:
            return verdicts.NO_COMMON_SEED
        if self.p is None:
            return verdicts.ONE_SEED
        return told(self.loss, self.p)


def paired_loss(ours, theirs):
    """(the verdicts.Estimate of the difference of two {seed: loss} over their common seeds, the seeds)."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        difference = statistics.mean(ours.values()) - statistics.mean(theirs.values())
        return verdicts.Estimate(difference, None, None, "no common seed"), []
    ours = {seed: ours[seed] for seed in seeds}
    theirs = {seed: theirs[seed] for seed in seeds}
    return verdicts.compare_losses(ours, theirs), seeds


def compare_with(base, others):
    """An Effect for each Group of others against the Group base, the worst first; p-values by Holm."""
    effects = []
    for group in others:
        loss, seeds = paired_loss(group.losses(), base.losses())
        unequal = mixed(group) + mixed(base)
        for seed in seeds:
            for text in differing(group.runs[seed], base.runs[seed]):
                if text not in unequal:
                    unequal.append(text)
        effects.append(Effect(group, base, seeds, loss, unequal, fresh=compare_fresh(group.runs, base.runs)))
    tested = [effect for effect in effects if not effect.unequal and effect.loss.p is not None]
    for effect, p in zip(tested, verdicts.holm([effect.loss.p for effect in tested]), strict=True):
        effect.p = p
    share_spread(base, tested)
    return sorted(effects, key=lambda effect: (-effect.loss.difference, effect.group.name))


def compare_fresh(ours, theirs):
    """The verdicts.Estimate of the difference of two {seed: run} on fresh text, over their common seeds.

    None if there is no such seed, or a run of them has no such loss.
    """
    common = ours.keys() & theirs.keys()
    losses = [{seed: runs[seed].fresh_loss() for seed in common} for runs in (ours, theirs)]
    if not common or any(None in each.values() for each in losses):
        return None
    return paired_loss(*losses)[0]


def share_spread(base, effects):
    """Fills in the shared estimates of those Effects that have the most common seeds, if they are several."""
    by_seeds = {}
    for effect in effects:
        by_seeds.setdefault(tuple(effect.seeds), []).append(effect)
    if not by_seeds:
        return
    seeds, alike = max(by_seeds.items(), key=lambda item: (len(item[1]), len(item[0])))
    if len(alike) < 2:
        return
    losses = []
    for group in (base, *[effect.group for effect in alike]):
        of_group = group.losses()
        losses.append({seed: of_group[seed] for seed in seeds})
    estimates = verdicts.compare_by_shared_spread(losses[0], losses[1:])
    corrected = verdicts.holm([loss.p for loss in estimates])
    for effect, loss, p in zip(alike, estimates, corrected, strict=True):
        effect.shared = loss
        effect.shared_p = p


def is_doubtful(verdict, fresh):
    """Whether fresh text doesn't bear a verdict out: its interval holds zero, or is on the other side.

    fresh: the verdicts.Estimate on fresh text, or None.
    """
    if fresh is None or fresh.half is None:
        return False
    if verdict == verdicts.BETTER:
        return fresh.difference > -fresh.half
    return verdict == verdicts.WORSE and fresh.difference < fresh.half


def compare_selected(selected):
    """({base's entry: its Effects}, lines on bases that are missing) of {entry: Group}.

    The base with the most entries comes first.
    """
    against = {}
    missing = set()
    for entry, group in selected.items():
        for base in bases_of(group.first):
            if base in selected:
                against.setdefault(base, []).append(group)
            else:
                missing.add(f"{entry} can't be compared with {base}: of that no run is finished here.")
    found = {}
    for base in sorted(against, key=lambda base: (-len(against[base]), base)):
        found[base] = compare_with(selected[base], against[base])
    return found, sorted(missing)


def ratio(ours, theirs):
    return f"{ours / theirs:.3f}"


def parameters_cell(effect):
    """The ratio of the trained parameters, and where it isn't the same that of the active ones."""
    ours = effect.group.first.facts
    theirs = effect.base.first.facts
    text = ratio(ours["parameters"], theirs["parameters"])
    if "active_parameters" in ours and "active_parameters" in theirs:
        active = ratio(ours["active_parameters"], theirs["active_parameters"])
        if active != text:
            text += f", active {active}"
    if abs(ours["parameters"] / theirs["parameters"] - 1) > UNEQUAL_PARAMETERS:
        text += ", unequal"
    return text


def speeds(group, base):
    """Tokens/s of a Group over another's, for each seed that both have trained on the same machine."""
    ratios = []
    for seed in sorted(group.runs.keys() & base.runs.keys()):
        ours = group.runs[seed]
        theirs = base.runs[seed]
        alike = ours.machine == theirs.machine
        for what in ("device", "processes"):
            alike &= ours.facts.get(what) == theirs.facts.get(what)
        alike &= ours.config["batch_tokens"] == theirs.config["batch_tokens"]
        if alike and ours.median_ms and theirs.median_ms:
            ratios.append(theirs.median_ms / ours.median_ms)
    return ratios


def speed_cell(effect):
    """Tokens/s over the base's: the median over the seeds, and the lowest and highest of them."""
    ratios = speeds(effect.group, effect.base)
    if not ratios:
        return "–"
    text = f"{statistics.median(ratios):.2f}"
    if len(ratios) > 1:
        text += f" ({min(ratios):.2f} to {max(ratios):.2f})"
    return text


def fresh_cell(fresh):
    """The verdicts.Estimate of a difference on fresh text, in nats; a dash for None."""
    if fresh is None:
        return "–"
    return f"{fresh.difference:+.4f}" + ("" if fresh.half is None else f" ± {fresh.half:.4f}")


def loss_cells(effect):
    """The difference in nats and in percent of the base's loss."""
    percent = 100 / effect.base.mean(effect.seeds)
    nats = f"{effect.loss.difference:+.4f}"
    share = f"{percent * effect.loss.difference:+.2f}"
    if effect.loss.half is not None:
        nats += f" ± {effect.loss.half:.4f}"
        share += f" ± {percent * effect.loss.half:.2f}"
    return nats, share


def name_cell(effect):
    """An entry's name with what its paper prescribes, where its base had something else."""
    run = effect.group.first
    own = []
    for field, value in prescribed_fields(run).items():
        if value != adjusted(effect.base.first, field):
            own.append(f"{field} {value:g}")
    return f"{effect.group.name} (its paper's {', '.join(own)})" if own else effect.group.name


def effects_table(effects):
    """One base's Effects as a Markdown table."""
    rows = []
    for effect in effects:
        flops = [group.first.facts["flops_per_token"] for group in (effect.group, effect.base)]
        p = "–" if effect.p is None else f"{effect.p:.3g}"
        row = [name_cell(effect), *loss_cells(effect), effect.verdict, p, str(len(effect.seeds))]
        rows.append([*row, parameters_cell(effect), ratio(*flops), speed_cell(effect)])
    base = effects[0].base.name
    head = [f"against {base}", "loss, nats", "loss, %", "verdict", "p, corrected", "common seeds"]
    head += ["parameters", "FLOPs per token", "tokens/s"]
    if any(effect.fresh for effect in effects):
        head.insert(5, "on fresh text, nats")
        for row, effect in zip(rows, effects, strict=True):
            row.insert(5, fresh_cell(effect.fresh))
    return table(head, rows, ["---", "--:", "--:", "---"] + ["--:"] * (len(head) - 4))


def shared_table(effects):
    """What one base's Effects are if all vary alike between seeds, as a Markdown table; "" if not known."""
    rows = []
    for effect in effects:
        if effect.shared:
            loss = f"{effect.shared.difference:+.4f} ± {effect.shared.half:.4f}"
            verdict = told(effect.shared, effect.shared_p)
            rows.append([effect.group.name, loss, verdict, f"{effect.shared_p:.3g}", effect.verdict])
    if not rows:
        return ""
    head = [f"against {effects[0].base.name}", "loss, nats", "verdict, if all vary alike", "p, corrected"]
    return table([*head, "verdict above"], rows, ["---", "--:", "---", "--:", "---"])


def in_words(effects):
    """One base's Effects as a sentence."""
    named = {}
    for effect in reversed(effects):  # the best first
        text = effect.group.name
        if effect.verdict in (verdicts.BETTER, verdicts.WORSE):
            text += f" ({effect.loss.difference:+.4f})"
        named.setdefault(effect.verdict, []).append(text)
    tested = sum(effect.p is not None for effect in effects)
    base = effects[0].base
    sentences = [f"Against {base.name}, whose loss is {base.mean():.4f}"]
    texts = []
    order = (verdicts.BETTER, verdicts.WORSE, verdicts.UNTOLD, verdicts.ONE_SEED, verdicts.NO_COMMON_SEED,
             verdicts.UNEQUAL)  # fmt: skip
    for verdict in order:
        if verdict in named:
            texts.append(f"**{verdict}:** " + ", ".join(named[verdict]))
    sentences[0] += ": " + "; ".join(texts) + "."
    if tested > 1:
        sentences.append(f"p-values are corrected for {tested} comparisons (Holm).")
    more = []
    for effect in reversed(effects):
        if effect.verdict == verdicts.UNTOLD and effect.shared_p is not None:
            verdict = told(effect.shared, effect.shared_p)
            if verdict != verdicts.UNTOLD:
                more.append(f"{effect.group.name} {verdict} ({effect.shared.difference:+.4f})")
    if more:
        sentences.append(f"If all of them varied alike between seeds, these would be told apart as well: "
                         f"{', '.join(more)}.")  # fmt: skip
    doubtful = []
    for effect in reversed(effects):
        if is_doubtful(effect.verdict, effect.fresh):
            doubtful.append(f"{effect.group.name} ({fresh_cell(effect.fresh)})")
    if doubtful:
        sentences.append(f"On the fresh text of the last quarter of training the interval doesn't bear this "
                         f"out for {', '.join(doubtful)}: take that as open.")  # fmt: skip
    for effect in effects:
        if effect.unequal:
            sentences.append(f"{effect.group.name} has no verdict: {'; '.join(effect.unequal)}.")
    return " ".join(sentences)


HOW_TO_READ = (
    "A difference is the entry's final validation loss minus its base's, negative where the entry is better, "
    "over the seeds that both have; in nats per token, and in percent of the base's loss. ± is half of the "
    "95% interval of that row alone (paired t), while the verdict is by the corrected p-value, at 5%: so an "
    "interval may exclude zero where the verdict is “not distinguishable”, which doesn't mean “equal”. "
    "With three seeds an interval's width is itself a matter of chance, and may be several times another's "
    "for no other reason. Ratios are the entry's over its base's; parameters are the trained ones, and "
    "“unequal” if they differ by more than 2%. The ratio of tokens/s is a hint only, since runs share a "
    "machine: the median over the seeds, with the lowest and the highest, or – if not both were trained on "
    "one machine. At equal tokens an entry that costs more FLOPs per token has an advantage, which its "
    "row's ratio shows. No curve was cut short to compare at equal FLOPs: a run that is stopped early "
    "hasn't lowered its learning rate, and looks worse "
    "than it is."
)  # fmt: skip
ON_FRESH_TEXT = (
    "“On fresh text” is the same difference by the training losses of one in fifty of the last quarter's "
    "batches, each of which was scored before the model learned from it. It is less precise and not quite of "
    "the end, but it is of text from all over the data, and different for each seed: where it disagrees with "
    "the validation loss, a few documents may have decided that."
)
SHARED_SPREAD = (
    "A second look, with more power and one more assumption: that all entries, the base too, vary alike "
    "between seeds. Then their noise can be taken together. In simulated studies of equal entries it finds "
    "something in 4% if the assumption holds; if the base varies three times as much as the others, in 10% "
    "to 23%. So it says where more seeds are worth their time; the verdicts of this page are those above."
)
CHOSEN_RATES = (
    "Each entry, bases too, is here at that of its rates which has the lowest mean loss. It was chosen on "
    "the seeds that it is judged by, which favours the entries with more rates tried: the p-values don't "
    "know of the choice, so take a verdict near 5% as open."
)


def file_name(*words):
    """A picture's name out of the names of a study, a size and so on."""
    return "_".join(re.sub(r"[^\w.-]", "_", word) for word in words) + ".png"


def effects_parts(selected, folder, file, title):
    """(parts, files) on the effects in {entry: Group}; no parts if none has a base."""
    against, lines = compare_selected(selected)
    parts = []
    files = []
    if against:
        panels = {}
        for effects in against.values():
            rows = []
            for effect in effects:
                rows.append((effect.group.name, effect.loss.difference, effect.loss.half, effect.verdict))
            panels[effects[0].base.name] = rows
        draw_forest(folder / file, title, panels)
        files.append(file)
        parts += [in_words(effects) for effects in against.values()]
        parts.append(f"![{title}, difference of the validation loss from the base's]({file})")
        parts += [effects_table(effects) for effects in against.values()]
        shared = [shared_table(effects) for effects in against.values()]
        if any(shared):
            tables = [text for text in shared if text]
            parts.append(Folded("If all entries vary alike between seeds", [SHARED_SPREAD, *tables]))
    return parts + lines, files


# ----------------------------------------------------------------------------------------------------------
# Learning rates


def against_rate_one(entries):
    """All other rates against rate 1, paired over seeds, p-values by Holm.

    Returns ({(entry, rate): (verdicts.Estimate, common seeds, corrected p or None)}, how many were tested).
    """
    found = {}
    for entry, of_entry in entries.items():
        one = [group for group in of_entry if group.rate == 1]
        for group in of_entry:
            if one and group.rate != 1:
                found[entry, group.rate] = paired_loss(group.losses(), one[0].losses())
    tested = [key for key, (loss, _) in found.items() if loss.p is not None]
    corrected = dict(zip(tested, verdicts.holm([found[key][0].p for key in tested]), strict=True))
    return {key: (loss, seeds, corrected.get(key)) for key, (loss, seeds) in found.items()}, len(tested)


def rate_verdict(best, found):
    """How an entry's best rate compares with rate 1, in words."""
    if best.rate == 1:
        return "is the best"
    if (best.entry, best.rate) not in found:
        return "was not run"
    loss, seeds, p = found[best.entry, best.rate]
    text = f"{loss.difference:+.4f}"
    if loss.half is not None:
        text += f" ± {loss.half:.4f}"
    if not seeds:
        return f"{text}, {verdicts.NO_COMMON_SEED}"
    if p is None:
        return f"{text}, {verdicts.ONE_SEED}"
    return f"{text}, {told(loss, p)}"


def rate_warnings(of_entry, best):
    """Lines on what makes the choice of an entry's rate doubtful."""
    lines = []
    rates = [group.rate for group in of_entry]
    if len(rates) > 2 and best.rate in (rates[0], rates[-1]):
        where = "lowest" if best.rate == rates[0] else "highest"
        lines.append(f"{best.entry}: the best rate, x{best.rate:g}, is at the edge of the sweep, the {where} "
                     "that was tried: sweep further.")  # fmt: skip
    for group in of_entry:
        common = group.seeds & best.seeds
        if group is best or not common or group.seeds >= best.seeds:
            continue
        if group.mean(common) < best.mean(common):
            seeds = "seed" if len(common) == 1 else "seeds"
            lines.append(f"{best.entry}: rate x{group.rate:g} has a lower loss than x{best.rate:g} on the "
                         f"{seeds} that it was run with ({', '.join(map(str, sorted(common)))}), but could "
                         "not be chosen: run it with the others.")  # fmt: skip
    return lines


def rates_parts(entries):
    """Parts on the entries, {entry: Groups}, that have several rates; none if there is no such entry."""
    swept = {entry: of_entry for entry, of_entry in entries.items() if len(of_entry) > 1}
    if not swept:
        return []
    found, tested = against_rate_one(swept)
    rates = sorted({group.rate for of_entry in swept.values() for group in of_entry})
    rows = []
    warnings = []
    lines = ["[own_rate]"]
    for entry, of_entry in swept.items():
        best = best_group(of_entry)
        cells = {}
        for group in of_entry:
            text = f"{group.mean():.4f}"
            if group.seeds != best.seeds:
                text += f" ({len(group.runs)} of {len(best.runs)} seeds)"
            cells[group.rate] = f"**{text}**" if group is best else text
        rows.append([entry, *[cells.get(rate, "–") for rate in rates], rate_verdict(best, found),
                     str(len(best.runs))])  # fmt: skip
        warnings += rate_warnings(of_entry, best)
        lines.append(f"{toml_key(entry)} = {best.rate!r}")
    head = ["learning rate", *[f"x{rate:g}" for rate in rates], "best minus rate x1", "seeds"]
    text = ("The mean over the seeds of the final validation loss, by learning rate as a multiple of the "
            "size's shared one. The best is in bold.")  # fmt: skip
    if tested:
        text += (" Verdicts are paired over seeds, and corrected for the number of rates that were compared "
                 f"with x1, {tested}.")  # fmt: skip
    toml = "```toml\n" + "\n".join(lines) + "\n```"
    return ["### Learning rates", text, table(head, rows, ["---"] + ["--:"] * (len(rates) + 2)), *warnings,
            Folded("The best rates, for tools/studies/sizes.toml", [toml])]  # fmt: skip


def toml_key(name):
    """A name as a key of TOML."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else '"' + name.replace('"', '\\"') + '"'


# ----------------------------------------------------------------------------------------------------------
# Runs that look wrong


def jumps(run):
    """(the first step whose training loss jumped up, how many steps' did, by how much at most), or None.

    A jump is more than JUMP above the median of the logged steps before it, after the warm-up. A collection
    has every fiftieth step only, and a jump between two of them is not seen.
    """
    before = []
    first = None
    count = 0
    largest = 0.0
    for step in sorted(run.train):
        loss = run.train[step].get("loss")
        if loss is None or step < run.config["warmup_steps"]:
            continue
        if len(before) >= 3:
            above = loss - statistics.median(before[-WINDOW:])
            if not above <= JUMP:  # a loss that is no number is a jump as well
                first = step if first is None else first
                count += 1
                largest = max(largest, above)
        before.append(loss)
    return None if first is None else (first, count, largest)


def spread_of_seeds(groups):
    """A robust standard deviation of the final loss between the seeds of a Group, one for all groups.

    It is the median of the absolute differences of all pairs of seeds, which for a normal distribution is
    0.954 standard deviations. None with fewer than LEAST_PAIRS of them.
    """
    differences = []
    for group in groups:
        losses = sorted(group.losses().values())
        for i, loss in enumerate(losses):
            differences += [abs(loss - other) for other in losses[:i]]
    if len(differences) < LEAST_PAIRS:
        return None
    return statistics.median(differences) / 0.954


def suspects(groups):
    """A line on each run that diverged, or that is far from the other seeds of its Group."""
    lines = []
    spread = spread_of_seeds(groups)
    for group in groups:
        middle = statistics.median(group.losses().values())
        for _, run in sorted(group.runs.items()):
            reasons = []
            lowest = min(run.val.values())
            if run.loss > (1 + ROSE) * lowest:
                percent = 100 * (run.loss / lowest - 1)
                reasons.append(f"its final validation loss, {run.loss:.4f}, is {percent:.1f}% above its "
                               f"lowest, {lowest:.4f}")  # fmt: skip
            jump = jumps(run)
            if jump:
                first, count, largest = jump
                steps = "logged step" if count == 1 else "logged steps"
                reasons.append(f"its training loss jumped at step {first}: for {count} {steps} it was up to "
                               f"{largest:.1f} nats above the running median")  # fmt: skip
            away = run.loss - middle
            if spread and abs(away) > FAR * spread:
                reasons.append(f"its loss is {away:+.4f} from the median of its {len(group.runs)} seeds, and "
                               f"seeds differ by a standard deviation of {spread:.4f} here")  # fmt: skip
            if reasons:
                lines.append(f"{run.folder.name}: {'; '.join(reasons)}.")
    return lines


# ----------------------------------------------------------------------------------------------------------
# The report


def size_parts(study, size, runs, folder):
    """(parts, files) on the runs of one study and size."""
    groups, lines = group_runs(runs)
    title = f"Study {study} at {size}"
    parts = [f"## {title}"]
    files = []
    if not groups:
        return parts + lines, files
    entries = rates_of(groups)
    chosen = {entry: best_group(of_entry) for entry, of_entry in entries.items()}
    at_one = {entry: group for (entry, rate), group in groups.items() if rate == 1}
    same, new = effects_parts(at_one, folder, file_name("effects", study, size), title)
    files += new
    own = []
    others = [group for group in chosen.values() if group.rate != 1]
    if others:
        title += ", each at its own best rate"
        own, new = effects_parts(chosen, folder, file_name("effects_own_rate", study, size), title)
        files += new
    if same and others:
        parts.append("### At the same rate")
    parts += same
    if own:
        parts += ["### Each at its own best rate", CHOSEN_RATES, *own]
    parts += rates_parts(entries)
    wrong = suspects(list(groups.values()))
    if wrong:
        parts += ["### Look at these runs before you believe the tables"]
        parts.append("\n".join(f"- {line}" for line in wrong))
    if lines:
        parts.append("\n".join(f"- {line}" for line in lines))
    return parts, files


def study_parts(runs, folder):
    """(parts of the report, names of the pictures that it wrote into a folder) on the runs that have a study.

    The parts are Markdown or page.Folded. Runs of several studies and sizes may be mixed; those of no study
    are passed over. folder: a Path, which exists.
    """
    from tools.scaling import scaling_parts  # which needs the groups of this module

    draw_into_files()
    studies = {}
    for run in runs:
        if run.study:
            studies.setdefault(run.study["name"], []).append(run)
    parts = []
    files = []
    for study in sorted(studies):
        sizes = by_size(studies[study])
        if len(sizes) >= 2:
            more, new = scaling_parts(studies[study], folder)
            parts += more
            files += new
        for size, of_size in sizes.items():
            more, new = size_parts(study, size, of_size, folder)
            parts += more
            files += new
    if any("effects" in file for file in files):
        fresh = any("on fresh text" in part for part in parts if isinstance(part, str))
        how = [HOW_TO_READ, ON_FRESH_TEXT] if fresh else [HOW_TO_READ]
        parts.append(Folded("How to read the tables of the studies", how))
    return parts, files
