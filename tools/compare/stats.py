"""
The statistics: t intervals over seeds, tests of differences, Holm's correction.

Losses are compared over the seeds that both have, in pairs, where these are two or more: runs with the same
seed see the same batches in the same order. Else it is Welch's t test. Accuracies vary with the items too.

Between equal architectures this gives a verdict in at most 5% of studies (tests/test_stats.py simulates
them). The power, in standard deviations of a run's loss: of two architectures with three seeds each a
difference of 5 is found in 84% of studies; among seven one of 10 in 32%. With five seeds each, 4 between two
and 10 among seven are found in practically all.
"""
import dataclasses
import math
import statistics

import numpy as np

LEVEL = 0.05


@dataclasses.dataclass
class Estimate:
    """A difference, a minus b."""

    difference: float
    half: float | None = None  # of its 95% interval's width; None where it has none
    p: float | None = None  # two-sided, that there is no difference; None where it can't be tested
    how: str = "one seed"


def half_width(parts, level=LEVEL):
    """Half of the width of the interval of 1 - level for a sum of [(squared error, degrees of freedom)].

    Of one part it is Student's t interval. Of several, the squares of their intervals are added up: wide
    enough also where a part of few degrees of freedom has come out small by chance, which the sum's degrees
    of freedom by Satterthwaite (1946) are not.
    """
    from scipy.special import stdtrit

    return math.sqrt(sum(squared * stdtrit(freedom, level / 2) ** 2 for squared, freedom in parts))


def p_value(difference, parts):
    """The level at which half_width of [(squared error, degrees of freedom)] is as large as a difference."""
    from scipy.optimize import brentq
    from scipy.special import stdtr

    if half_width(parts, 0.5) == 0:
        return float(difference == 0)
    if len(parts) == 1:
        ((squared, freedom),) = parts
        return 2 * float(stdtr(freedom, -abs(difference) / math.sqrt(squared)))

    def excess(power):
        return half_width(parts, 10**power) - abs(difference)

    return 10 ** brentq(excess, -30, 0) if excess(-30) > 0 else 1e-30


def estimate(difference, parts, how):
    """The Estimate of a difference whose variance is the sum of [(squared error, degrees of freedom)]."""
    return Estimate(difference, half_width(parts), p_value(difference, parts), how)


def squared_error(values):
    """(squared standard error of the mean, degrees of freedom) of two or more values."""
    return float(np.var(values, ddof=1)) / len(values), len(values) - 1


def half_interval(values):
    """Half of the width of the 95% t interval of a mean, or None for a single value."""
    return half_width([squared_error(values)]) if len(values) > 1 else None


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

    Returns (the seeds of a and of b that are compared, (squared error, degrees of freedom), in words); the
    error is None where one seed of one of them is all that can be compared.
    """
    common = sorted(a.keys() & b.keys())
    if len(common) >= 2:
        differences = [a[seed] - b[seed] for seed in common]
        return common, common, squared_error(differences), f"paired, {len(common)} seeds"
    if min(len(a), len(b)) >= 2:
        part = welch(list(a.values()), list(b.values()))
        return sorted(a), sorted(b), part, f"Welch, {len(a)} and {len(b)} seeds"
    return common or sorted(a), common or sorted(b), None, "one seed"


def compare_losses(a, b):
    """The Estimate for two {seed: loss}."""
    seeds_a, seeds_b, of_seeds, how = over_seeds(a, b)
    difference = statistics.mean(a[seed] for seed in seeds_a) - statistics.mean(b[seed] for seed in seeds_b)
    if not math.isfinite(difference):
        return Estimate(difference, how="diverged")
    return estimate(difference, [of_seeds], how) if of_seeds else Estimate(difference, how=how)


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


def compare_answers(a, b):
    """The Estimate for the accuracies of two {seed: list of bool per item} over the same items.

    Both the seeds and the items are samples, so the squared errors over seeds and over items are added up.
    That counts the noise of a single answer twice, and errs towards "no difference".
    """
    accuracies = [{seed: float(np.mean(right)) for seed, right in each.items()} for each in (a, b)]
    seeds_a, seeds_b, of_seeds, how = over_seeds(*accuracies)
    shares = np.mean([a[seed] for seed in seeds_a], axis=0) - np.mean([b[seed] for seed in seeds_b], axis=0)
    parts = [part for part in (of_seeds, squared_error(shares)) if part]
    result = estimate(float(shares.mean()), parts, how)
    if not of_seeds and len(seeds_a) == len(seeds_b) == 1:
        result.p = mcnemar(a[seeds_a[0]], b[seeds_b[0]])
    return result


def holm(p_values):
    """Holm's correction: the p-values, each as if it had been the only one asked for; None stays None."""
    tested = [i for i, p in enumerate(p_values) if p is not None]
    corrected = [None] * len(p_values)
    worst = 0.0
    for rank, i in enumerate(sorted(tested, key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(tested) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected


def loss_with_tokens(times, loss, fewer, shorter_loss):
    """The loss of a run with so many times its tokens, on the line between log loss and log tokens.

    The line goes through the run and a shorter one, with `fewer` times its tokens. Both lowered their
    learning rate to the end, which a run that is cut short has not.
    """
    b = math.log(shorter_loss / loss) / math.log(1 / fewer)
    return loss * times**-b
