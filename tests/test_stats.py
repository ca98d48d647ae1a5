"""The statistics of tools.compare, against scipy, values worked by hand, and simulated studies."""
import math

import numpy as np
import pytest

from tools.compare import stats


def test_mcnemar_against_values_worked_by_hand():
    # 1 win, 7 losses: 2 (C(8,0) + C(8,1)) / 2^8 = 18 / 256
    assert stats.mcnemar([1] + [0] * 7 + [1, 0], [0] + [1] * 7 + [1, 0]) == pytest.approx(18 / 256)
    # 10 and 25 of 35 discordant
    assert stats.mcnemar([1] * 10 + [0] * 25, [0] * 10 + [1] * 25) == pytest.approx(0.0166738, abs=1e-7)
    assert stats.mcnemar([1, 0], [1, 0]) == 1.0
    assert stats.mcnemar([1, 0], [0, 1]) == 1.0
    exact = 2 * sum(math.comb(100, k) for k in range(41)) / 2**100
    assert stats.mcnemar([1] * 40 + [0] * 60, [0] * 40 + [1] * 60) == pytest.approx(exact)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5]) == [0.5]
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([None, 0.02, None, 0.03]) == [None, pytest.approx(0.04), None, pytest.approx(0.04)]


def test_losses_by_hand_and_by_scipy():
    from scipy.stats import ttest_ind, ttest_rel

    # means 2 and 5, variances 1 and 1 with n = 3 each: 4 degrees of freedom, where t is 2.77645
    welch = stats.compare_losses({1: 1.0, 2: 2.0, 3: 3.0}, {4: 4.0, 5: 5.0, 6: 6.0})
    assert welch.difference == -3 and welch.how == "Welch, 3 and 3 seeds"
    assert welch.half == pytest.approx(2.77645 * math.sqrt(2 / 3), rel=1e-5)
    assert welch.p == pytest.approx(ttest_ind([1, 2, 3], [4, 5, 6], equal_var=False).pvalue)
    # one seed in common is no pair; three are, whatever the others say
    assert stats.compare_losses({1: 1.0, 2: 2.0}, {1: 4.0, 3: 5.0}).how == "Welch, 2 and 2 seeds"
    paired = stats.compare_losses({1: 1.0, 2: 2.0, 3: 4.0, 8: 90.0}, {3: 3.5, 1: 0.9, 2: 1.7, 9: 50.0})
    by_scipy = ttest_rel([1.0, 2.0, 4.0], [0.9, 1.7, 3.5])
    assert paired.how == "paired, 3 seeds" and paired.difference == pytest.approx(0.3)
    assert paired.p == pytest.approx(by_scipy.pvalue)
    assert paired.half == pytest.approx(by_scipy.confidence_interval(0.95).high - 0.3)
    one = stats.compare_losses({1: 1.0}, {1: 2.0, 2: 3.0})
    assert (one.difference, one.half, one.p) == (-1.0, None, None)  # over the seed that both have
    assert stats.compare_losses({3: 1.0}, {1: 2.0, 2: 3.0}).difference == -1.5
    same = stats.compare_losses({1: 2.0, 2: 3.0}, {1: 2.0, 2: 3.0})
    assert (same.difference, same.half, same.p) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("difference", [0.0, 1e-3, 0.7, 3.0, 40.0])
def test_a_p_value_is_the_level_at_which_the_interval_reaches_zero(difference):
    parts = [(0.04, 2), (0.09, 50)]
    p = stats.p_value(difference, parts)
    assert stats.half_width(parts, p) == pytest.approx(difference, abs=1e-6)


def test_accuracies_of_seeds_that_differ_are_not_told_by_the_items_alone():
    """The items say with certainty that the models differ; three seeds say that it is the seeds."""
    n = 1000
    a = {1: [True] * 900 + [False] * 100, 2: [True] * 500 + [False] * 500, 3: [True] * 850 + [False] * 150}
    b = {4: [True] * 500 + [False] * 500, 5: [True] * 620 + [False] * 380, 6: [True] * 560 + [False] * 440}
    assert stats.mcnemar(a[1], b[4]) < 1e-100
    result = stats.compare_answers(a, b)
    assert result.difference == pytest.approx(0.19) and result.p > 0.1 and result.half > 0.19
    # paired, with the same difference for each seed: what is left is the items' variance
    b = {seed: right[: n - 100] + [False] * 100 for seed, right in a.items()}
    b = {seed: [False] * 50 + right[50:] for seed, right in b.items()}
    result = stats.compare_answers(a, b)
    shares = np.array([1.0] * 50 + [0.0] * 950)
    assert result.difference == pytest.approx(0.05)
    assert result.half == pytest.approx(1.9623 * shares.std(ddof=1) / math.sqrt(n), rel=1e-3)
    one = stats.compare_answers({1: a[1]}, {2: a[2]})
    assert one.p == pytest.approx(stats.mcnemar(a[1], a[2]))


def simulate(rng, seeds, shift=0.0, items=0):
    """A study: [({seed: loss}, {seed: answers})] for each entry of seeds; the first one's loss is shifted.

    Losses have a part that the order of the data gives to all with a seed, and a part of their own with a
    standard deviation of 1. Items are of all difficulties; a seed makes a model 3 points better or worse.
    """
    order = rng.normal(size=1 + max(map(max, seeds)))
    difficulty = rng.uniform(0.2, 0.9, size=items)
    found = []
    for number, own_seeds in enumerate(seeds):
        losses = {}
        right = {}
        for seed in own_seeds:
            losses[seed] = 100 + order[seed] + rng.normal() + shift * (number == 0)
            skill = np.clip(difficulty + 0.03 * rng.normal(), 0, 1)
            right[seed] = (rng.uniform(size=items) < skill).tolist()
        found.append((losses, right))
    return found


def corrected(study, of, compare):
    """The corrected p-values of all pairs of a study. of: 0 for losses, 1 for answers."""
    pairs = [(a[of], b[of]) for i, a in enumerate(study) for b in study[i + 1 :]]
    return stats.holm([compare(a, b).p for a, b in pairs])


@pytest.mark.parametrize("seeds", [
    [(1, 2, 3)] * 5,  # paired
    [(1, 2, 3), (4, 5, 6, 7), (8, 9, 10), (11, 12, 13, 14, 15)],  # no seeds in common: Welch
    [(1, 2, 3), (2, 3, 4), (5, 6, 7)],  # some
])  # fmt: skip
def test_equal_architectures_differ_significantly_in_at_most_one_study_of_twenty(seeds):
    rng = np.random.default_rng(0)
    found = np.zeros(2)  # by loss, by accuracy
    for _ in range(400):
        study = simulate(rng, seeds, items=200)
        found[0] += min(corrected(study, 0, stats.compare_losses)) < 0.05
        found[1] += min(corrected(study, 1, stats.compare_answers)) < 0.05
    assert found.max() <= 0.05 * 400


@pytest.mark.parametrize("architectures, seeds, shift, least, most", [
    (2, 3, 5, 0.75, 0.95),
    (2, 5, 4, 0.95, 1),
    (7, 3, 10, 0.2, 0.5),  # with 21 pairs three seeds find large differences only
    (7, 5, 10, 0.95, 1),
])  # fmt: skip
def test_power(architectures, seeds, shift, least, most):
    """How often the better of otherwise equal architectures is told from another. shift: in sd of a run."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        study = simulate(rng, [range(seeds)] * architectures, shift=-shift)
        p = corrected(study, 0, stats.compare_losses)[0]
        difference = stats.compare_losses(study[0][0], study[1][0]).difference
        assert p >= 0.05 or difference < 0
        found += p < 0.05
    assert least <= found / 200 <= most


def test_a_loss_is_read_off_between_two_budgets():
    """On a line between log loss and log tokens: exact for a power law."""
    for times in (0.3, 0.9, 1.3):
        found = stats.loss_with_tokens(times, 5 * 8**-0.1, 0.25, 5 * 2**-0.1)
        assert found == pytest.approx(5 * (8 * times) ** -0.1)
