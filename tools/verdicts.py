"""
Is a difference between two architectures real? The statistics of tools.compare.

An architecture's loss varies with the seed, and so does its accuracy, which varies with the items too.
Verdicts are by the final validation loss, over seeds: by a paired t test over the seeds that both have,
where these are two or more, since runs with the same seed see the same batches in the same order; else by
Welch's t test. Accuracies are tested with the variance of seeds and of items added up. With one seed on a
side, only the items can be tested, and that says whether two models differ, not two architectures.
p-values have Holm's correction for the number of pairs.

Between equal architectures this gives a verdict in at most 5% of studies (tests/test_compare.py simulates
them). The power, for differences in standard deviations of a run's loss: of two architectures with three
seeds each, 5 deviations are found in 84% of studies; among seven, 10 deviations in 32%. With five seeds
each, 4 deviations between two and 10 among seven are found in practically all.
"""
import dataclasses
import math
import statistics

import numpy as np

LEVEL = 0.05
LOWER = "lower loss"
HIGHER = "higher loss"
UNTOLD = "not distinguishable"
UNTESTED = "not tested"
MODELS_DIFFER = "these two models differ; of the architectures one seed says nothing"
OPPOSITE = {LOWER: HIGHER, HIGHER: LOWER}
# of an entry of a study against its base, see tools/effects.py
BETTER = "better"
WORSE = "worse"
ONE_SEED = "one seed: no verdict"
NO_COMMON_SEED = "no common seed: no verdict"
UNEQUAL = "unequal conditions: no verdict"
NUMBERS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Tests


@dataclasses.dataclass
class Estimate:
    """A difference, a minus b."""

    difference: float
    half: float | None  # of its 95% interval's width; None where it has none
    p: float | None  # two-sided, that there is no difference; None where it can't be tested
    how: str


def half_width(parts, level):
    """Half of the width of the interval of 1 - level for a sum of [(squared error, degrees of freedom)].

    Of one part it is Student's t interval. Of several, the squares of their intervals are added up: wide
    enough also where a part of few degrees of freedom has come out small by chance, which the sum's degrees
    of freedom by Satterthwaite (1946) are not.
    """
    from scipy.special import stdtrit

    return math.sqrt(sum(squared * stdtrit(freedom, level / 2) ** 2 for squared, freedom in parts))


def p_value(difference, parts):
    """The level at which half_width of [(squared error, degrees of freedom)] is as large as a difference."""
    from scipy.special import stdtr

    if half_width(parts, 0.5) == 0:
        return float(difference == 0)
    if len(parts) == 1:
        ((squared, freedom),) = parts
        return 2 * float(stdtr(freedom, -abs(difference) / math.sqrt(squared)))
    low = -30.0  # powers of ten
    high = 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if half_width(parts, 10**middle) < abs(difference):
            high = middle
        else:
            low = middle
    return 10**high


def estimate(difference, parts, how):
    """The Estimate of a difference whose variance is the sum of [(squared error, degrees of freedom)]."""
    return Estimate(difference, half_width(parts, LEVEL), p_value(difference, parts), how)


def half_interval(values):
    """Half of the width of the 95% t interval of a mean, or None for a single value."""
    if len(values) < 2:
        return None
    return half_width([squared_error(values)], LEVEL)


def squared_error(values):
    """(squared standard error of the mean, degrees of freedom) of two or more values."""
    return float(np.var(values, ddof=1)) / len(values), len(values) - 1


def welch(a, b):
    """(squared error of the difference of the means of two lists, degrees of freedom by Welch, 1947)."""
    (squared_a, freedom_a), (squared_b, freedom_b) = squared_error(a), squared_error(b)
    squared = squared_a + squared_b
    if squared == 0 or min(freedom_a, freedom_b) == 1:
        # of two values against several Welch's test calls equal ones different twice too often
        return squared, min(freedom_a, freedom_b)
    return squared, squared**2 / (squared_a**2 / freedom_a + squared_b**2 / freedom_b)


def over_seeds(a, b):
    """How far seeds alone can move the difference of two {seed: value}.

    Returns (the seeds of a and of b that are compared, (squared error, degrees of freedom), in words).
    """
    common = sorted(a.keys() & b.keys())
    if len(common) >= 2:
        differences = [a[seed] - b[seed] for seed in common]
        return common, common, squared_error(differences), f"paired, {len(common)} seeds"
    part = welch(list(a.values()), list(b.values()))
    return sorted(a), sorted(b), part, f"Welch, {len(a)} and {len(b)} seeds"


def compare_losses(a, b):
    """The Estimate for two {seed: loss}."""
    if min(len(a), len(b)) < 2:
        difference = statistics.mean(a.values()) - statistics.mean(b.values())
        return Estimate(difference, None, None, "one seed: no interval")
    seeds_a, seeds_b, of_seeds, how = over_seeds(a, b)
    mean_a = statistics.mean(a[seed] for seed in seeds_a)
    mean_b = statistics.mean(b[seed] for seed in seeds_b)
    return estimate(mean_a - mean_b, [of_seeds], how)


def compare_by_shared_spread(base, others):
    """An Estimate for each of others minus base, {seed: loss} with the same two seeds or more in all of them.

    The noise is what neither the seed nor the entry explains in all of them together (the residuals of a
    two-way analysis of variance), so it has many degrees of freedom where the paired t test has few. That is
    right if all vary alike between seeds, and finds too much where the base varies more than the others.
    """
    seeds = sorted(base)
    losses = np.array([[each[seed] for seed in seeds] for each in (base, *others)])
    means = losses.mean(axis=1)
    residuals = losses - means[:, None] - losses.mean(axis=0) + losses.mean()
    freedom = len(others) * (len(seeds) - 1)
    squared = 2 / len(seeds) * float((residuals**2).sum()) / freedom
    how = f"shared spread, {len(seeds)} seeds"
    return [estimate(float(mean - means[0]), [(squared, freedom)], how) for mean in means[1:]]


def mcnemar(right_a, right_b):
    """Exact two-sided p-value that two models answer equally well, from lists of which items were right.

    The items that just one of them got right are coin flips (McNemar, 1947).
    """
    from scipy.stats import binomtest

    wins = sum(a > b for a, b in zip(right_a, right_b, strict=True))
    losses = sum(a < b for a, b in zip(right_a, right_b, strict=True))
    if wins + losses == 0:
        return 1.0
    return float(binomtest(wins, wins + losses).pvalue)


def mean_answers(answers, seeds):
    """Each item's share of right answers over some seeds."""
    return np.mean([answers[seed] for seed in seeds], axis=0)


def compare_answers(a, b):
    """The Estimate for the accuracies of two {seed: list of bool per item}, None for other numbers of items.

    Both the seeds and the items are samples, so the squared errors over seeds and over items are added up.
    That counts the noise of a single answer twice, and errs towards "no difference".
    """
    if len({len(right) for right in (*a.values(), *b.values())}) != 1:
        return None
    if min(len(a), len(b)) < 2:
        shares = mean_answers(a, a) - mean_answers(b, b)
        result = estimate(float(shares.mean()), [squared_error(shares)], "items")
        if len(a) == len(b):
            (right_a,) = a.values()
            (right_b,) = b.values()
            result.p = mcnemar(right_a, right_b)
        return result
    accuracies = []
    for answers in (a, b):
        accuracies.append({seed: float(np.mean(right)) for seed, right in answers.items()})
    seeds_a, seeds_b, of_seeds, how = over_seeds(*accuracies)
    shares = mean_answers(a, seeds_a) - mean_answers(b, seeds_b)
    return estimate(float(shares.mean()), [of_seeds, squared_error(shares)], how)


def half_accuracy(answers):
    """Half of the width of the 95% interval of {seed: list of bool per item}'s accuracy.

    Over seeds and items, as in compare_answers; with one seed over the items alone.
    """
    parts = [squared_error(mean_answers(answers, answers))]
    if len(answers) > 1:
        parts.append(squared_error([float(np.mean(right)) for right in answers.values()]))
    return half_width(parts, LEVEL)


def holm(p_values):
    """Holm's correction: the p-values, each as if it had been the only one asked for."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    worst = 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected


# ----------------------------------------------------------------------------------------------------------
# Verdicts


@dataclasses.dataclass
class Difference:
    """A pair of runs.Pool, a minus b. The p-values are corrected for the number of pairs."""

    a: object
    b: object
    loss: Estimate
    accuracy: Estimate | None  # None without predictions
    loss_p: float | None = None  # None with one seed on a side
    accuracy_p: float | None = None

    def verdict(self):
        """What the loss of a is, compared with b's."""
        if self.loss_p is not None:
            if self.loss_p >= LEVEL:
                return UNTOLD
            return LOWER if self.loss.difference < 0 else HIGHER
        if self.accuracy_p is None:
            return UNTESTED
        return MODELS_DIFFER if self.accuracy_p < LEVEL else UNTOLD


def compare_pairs(pools, key):
    """A Difference for each pair of runs.Pool. key: of the accuracies, or None where there are none."""
    differences = []
    for i, a in enumerate(pools):
        for b in pools[i + 1 :]:
            loss = compare_losses(a.losses_by_seed(), b.losses_by_seed())
            accuracy = None
            ours = a.answers(key)
            theirs = b.answers(key)
            if ours and theirs:
                accuracy = compare_answers(ours, theirs)
            differences.append(Difference(a, b, loss, accuracy))
    tested = [pair for pair in differences if pair.loss.p is not None]
    for pair, p in zip(tested, holm([pair.loss.p for pair in tested]), strict=True):
        pair.loss_p = p
    tested = [pair for pair in differences if pair.accuracy]
    for pair, p in zip(tested, holm([pair.accuracy.p for pair in tested]), strict=True):
        pair.accuracy_p = p
    return differences


def listed(names):
    """Names in a row; those that have a comma themselves, as "rwkv, recipe shared", in brackets."""
    return ", ".join(f"({name})" if "," in name else name for name in names)


def headline(ranked, differences):
    """The result in words. ranked: the finished runs.Pool, that with the lowest loss first."""
    if not ranked:
        return "No run here has finished."
    best = ranked[0]
    half = half_interval(best.losses())
    loss = f"{best.loss():.4f} (one seed: no interval)"
    if half is not None:
        loss = f"{best.loss():.4f} ± {half:.4f} (95% interval over {len(best.runs)} seeds)"
    if len(ranked) == 1:
        return f"{best.name} alone is ranked here: validation loss {loss}."
    number = NUMBERS[len(ranked)] if len(ranked) < len(NUMBERS) else str(len(ranked))
    text = f"Of {number}, {best.name} has the lowest validation loss, {loss}"
    untold = []
    unsaid = []
    for pair in differences:
        if best not in (pair.a, pair.b):
            continue
        other = pair.b if pair.a is best else pair.a
        if pair.loss_p is None:
            unsaid.append(other.name)
        elif pair.verdict() == UNTOLD:
            untold.append(other.name)
    if untold:
        text += f"; it can't be told apart from {listed(untold)}"
    if unsaid and len(best.runs) == 1:
        text += "; of the architectures one seed says nothing"
    elif unsaid:
        text += f"; one seed says nothing of {listed(unsaid)}"
    if not untold and not unsaid:
        text += ", and that is lower than the loss of each other one"
    return text + "."
