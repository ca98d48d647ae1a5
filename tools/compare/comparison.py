"""How two runs differ: in their conditions, which must be equal for a verdict, and in what came out."""
import dataclasses
import json
import statistics

from tools.common import load_script
from tools.compare import stats
from tools.compare.runs import RECIPE_FIELDS, Group

FARTHEST = 1.5  # times the tokens of its runs that a loss may be read off beyond them

BETTER = "better"
WORSE = "worse"
NOT_SIGNIFICANT = "not significant"
UNEQUAL = "unequal conditions: no verdict"


# ----------------------------------------------------------------------------------------------------------
# Conditions


def differences(ours, theirs):
    """How two dicts differ, in words: ["max_lr 0.01, not 0.0006", …]; a name that one lacks is "absent"."""
    texts = []
    for name in ours | theirs:
        values = [each.get(name, "absent") for each in (ours, theirs)]
        if values[0] != values[1]:
            mine, other = (f"{value:g}" if isinstance(value, float) else str(value) for value in values)
            texts.append(f"{name} {mine or 'none'}, not {other or 'none'}")
    return texts


def adjusted(run, field):
    """A recipe field of a run as it would be at rate 1 of its study."""
    value = float(run.config[field])
    if run.study and field in ("max_lr", "min_lr"):
        value = float(f"{value / run.study['rate']:.9g}")  # without the rounding of the product
    return value


def by_paper(run):
    """{recipe field: (the run's value, the shared one)} where the run has its own paper's value instead."""
    script, _ = load_script(run.facts["script"])
    found = {}
    if script is None or run.config.get("recipe", "paper") != "paper":
        return found
    prescribed = getattr(script, "RECIPE", {})  # a script of one's own may lack it
    for field in RECIPE_FIELDS:
        value = adjusted(run, field)
        shared = getattr(script.Config, field, value)
        if prescribed.get(field) == value != shared:
            found[field] = value, shared
    return found


def conditions(run):
    """What must be equal for two runs to be compared: {name: value}.

    A field that the run's paper prescribes counts as the shared value, a learning rate as it'd be at rate 1.
    """
    recipe = {field: adjusted(run, field) for field in RECIPE_FIELDS}
    for field, (_, shared) in by_paper(run).items():
        recipe[field] = float(shared)
    config = run.config
    found = {"data": run.facts["data"]["fingerprint"], "tokenizer": run.facts["data"]["tokenizer"]}
    for name in ("train_shards", "block_size", "val_tokens", "batch_tokens", "max_steps"):
        found[name] = config.get(name)
    return found | recipe | {
        "started from the weights of": run.config.get("init_from", ""),
        "changed midway:": ", ".join(run.changed),
        "size": run.study["size"] if run.study else "",
    }  # fmt: skip


def same_scale(run, other):
    """Whether losses can be compared across sizes and budgets: of the same data, in equal windows."""
    names = "data", "tokenizer", "val_tokens", "block_size"
    ours, theirs = conditions(run), conditions(other)
    return all(ours[name] == theirs[name] for name in names)


def unequal_conditions(a, b):
    """How the conditions of two Groups differ, in words, and what differs between the seeds of each.

    The runs of a study are compared seed by seed, with the software that they ran on.
    """
    texts = {}
    for group in (a, b):
        first, *others = [run.fixed_config() | {"script": run.script_hash} for run in group.runs.values()]
        for other in others:
            texts |= {f"{text} in the seeds of {group.name}": None for text in differences(other, first)}
    for seed in sorted(a.seeds & b.seeds) or [None]:
        run, other = (group.runs.get(seed, group.first) for group in (a, b))
        ours, theirs = conditions(run), conditions(other)
        for each, found in ((run, ours), (other, theirs)):
            if run.study and other.study:
                found["torch"] = each.facts.get("torch")
                found["dtype"] = each.facts.get("dtype", "").split(" ")[0]
            if each.changed:
                texts[f"{', '.join(each.changed)} changed midway in {each.folder.name}"] = None
        texts |= dict.fromkeys(differences(ours, theirs))
    return list(texts)


def rank(group):
    """Sorts groups: the finished ones first, by loss."""
    return not group.finished, group.mean() != group.mean(), group.mean(), group.name  # nan last


def fair_groups(groups):
    """[(groups with equal conditions, by rank, how they differ from the first)], the largest first."""
    together = {}
    for group in sorted(groups, key=rank):
        key = json.dumps(conditions(group.first), sort_keys=True)
        together.setdefault(key, []).append(group)
    # by rank where they are of one size, since sorted() keeps the order
    ordered = sorted(together.values(), key=lambda alike: -sum(group.finished for group in alike))
    wanted = conditions(ordered[0][0].first)
    return [(alike, differences(conditions(alike[0].first), wanted)) for alike in ordered]


# ----------------------------------------------------------------------------------------------------------
# Differences


@dataclasses.dataclass
class Comparison:
    """Group a minus Group b, in nats of the final validation loss. p-values are corrected by Holm."""

    a: Group
    b: Group
    loss: stats.Estimate
    unequal: list  # how their conditions differ, in words
    last_quarter: stats.Estimate | None  # of the training losses; None if a run has none
    accuracy: stats.Estimate | None  # None without predictions of the same items
    p: float | None = None
    accuracy_p: float | None = None

    @property
    def verdict(self):
        """What a is, compared with b."""
        if self.unequal:
            return UNEQUAL
        if self.p is None:
            return f"{self.loss.how}: no verdict"  # one seed, or diverged
        if self.p >= stats.LEVEL:
            return NOT_SIGNIFICANT
        return BETTER if self.loss.difference < 0 else WORSE


def compare_accuracies(a, b, key):
    """The Estimate of the difference of two Groups' accuracies; None unless both are of the same items."""
    if key is None or a.items(key) != b.items(key) or not a.answers(key) or not b.answers(key):
        return None
    return stats.compare_answers(a.answers(key), b.answers(key))


def compare(pairs, key=None):
    """The Comparisons of pairs of Groups, corrected for their number. key: of the accuracies."""
    found = []
    for a, b in pairs:
        loss = stats.compare_losses(a.losses(), b.losses())
        last = [group.last_quarters(a.seeds & b.seeds) for group in (a, b)]
        last = stats.compare_losses(*last) if all(last) else None
        found.append(Comparison(a, b, loss, unequal_conditions(a, b), last, compare_accuracies(a, b, key)))
    corrected = stats.holm([None if pair.unequal else pair.loss.p for pair in found])
    accuracies = stats.holm([pair.accuracy.p if pair.accuracy else None for pair in found])
    for i, pair in enumerate(found):
        pair.p, pair.accuracy_p = corrected[i], accuracies[i]
    return found


def all_pairs(groups):
    return [(a, b) for i, a in enumerate(groups) for b in groups[i + 1 :]]


def bases_of(group):
    """The names of the entries that one of a study is compared with."""
    base = group.first.study["base"] or []
    return [base] if isinstance(base, str) else base


def compare_with_bases(groups):
    """Lists of Comparisons of a study's Groups, one entry each, with one base each; the worst first.

    The base with the most entries comes first; one without a Group is left out.
    """
    entries = {group.place[0]: group for group in groups}
    against = {}
    for group in groups:
        for base in bases_of(group):
            if base in entries:
                against.setdefault(base, []).append((group, entries[base]))
    found = []
    for base in sorted(against, key=lambda base: (-len(against[base]), base)):
        found.append(sorted(compare(against[base]), key=lambda pair: (-pair.loss.difference, pair.a.name)))
    return found


def speeds(group, base):
    """Tokens/s of a Group over another's, for each seed that both have trained on the same machine."""
    ratios = []
    for seed in sorted(group.seeds & base.seeds):
        ours, theirs = group.runs[seed], base.runs[seed]
        alike = ours.machine == theirs.machine
        alike &= ours.config["batch_tokens"] == theirs.config["batch_tokens"]
        for what in ("device", "processes"):
            alike &= ours.facts.get(what) == theirs.facts.get(what)
        if alike and ours.median_ms and theirs.median_ms:
            ratios.append(theirs.median_ms / ours.median_ms)
    return ratios


@dataclasses.dataclass
class Budget:
    """What it takes to read off losses at the cost of a reference Group.

    shorter is {(entry, rate): Group}: runs of the same models with fewer tokens.
    """

    reference: Group
    shorter: dict

    def tokens(self, group, cost):
        """How many times its tokens a Group gets for the reference's "FLOPs" or "time"; None if not known."""
        if cost == "FLOPs":
            return self.reference.first.facts["flops_per_token"] / group.first.facts["flops_per_token"]
        ratios = speeds(group, self.reference)
        return statistics.median(ratios) if ratios else None

    def losses(self, group, cost):
        """{seed: loss} of a Group with as many tokens as cost what the reference did; {} if not known."""
        times = self.tokens(group, cost)
        fewer = self.shorter.get(group.place)
        if not times or not fewer or not same_scale(fewer.first, group.first):
            return {}
        lowest = fewer.first.tokens / group.first.tokens
        if not lowest / FARTHEST <= times <= FARTHEST or lowest >= 1:
            return {}
        found = {}
        for seed in sorted(group.seeds & fewer.seeds):
            losses = group.runs[seed].loss, lowest, fewer.runs[seed].loss
            found[seed] = stats.loss_with_tokens(times, *losses)
        return found
