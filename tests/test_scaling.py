"""How the loss falls with size, on made-up runs that follow a known law."""
import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from test_effects import is_drawn, make_run, plain, rows

from tools import effects, pictures, scaling, verdicts
from tools.pictures import style

SIZES = {"0.25M": 250_000, "0.8M": 800_000, "2.7M": 2_700_000}
SHIFTS = {1: 0.004, 2: -0.005, 3: 0.001}


def make_sizes(entry, a=6.0, b=0.06, base="gpt2", noise=1.0, seeds=(1, 2, 3), sizes=SIZES, **options):
    """Runs of an entry whose loss is a x^-b but for noise, which adds up to nothing over three seeds."""
    runs = []
    for size, parameters in sizes.items():
        for seed in seeds:
            loss = a * parameters**-b * math.exp(noise * SHIFTS[seed])
            facts = {"parameters": parameters, "flops_per_token": 2.0 * parameters}
            runs.append(make_run(entry, loss, seed, base, study="architectures", size=size, facts=facts,
                                 **options))  # fmt: skip
    return runs


def test_a_planted_power_law_is_recovered(tmp_path):
    runs = make_sizes("gpt2", base=None) + make_sizes("llama", 6.0, 0.08) + make_sizes("mta", 6.0, 0.07)
    parts, files = scaling.scaling_parts(runs, tmp_path)
    made = rows(plain(parts))
    laws = [name for name in made if name in ("gpt2", "llama", "mta")]
    assert laws == ["llama", "mta", "gpt2"]  # the steepest first
    b, without, of_flops, residual, loss, by_seeds, by_residuals = made["llama"]
    # by hand: sd sqrt((16 + 25 + 1) / 2) / 1000 with 6 degrees of freedom, where t is 2.44691
    places = np.log(list(SIZES.values()))
    error = math.sqrt(21e-6 / 3 / ((places - places.mean()) ** 2).sum())
    assert b == f"0.0800 ± {2.44691 * error:.4f}" and of_flops == b  # FLOPs go with parameters here
    assert without == "–" and residual.strip("+-") == "0.00"
    assert float(loss) == pytest.approx(6 * 124_475_904**-0.08, abs=1e-3)
    low, high = map(float, by_seeds.split(" to "))
    assert low < float(loss) < high
    assert by_residuals == f"{loss} to {loss}"  # the points are on a line
    said = plain(parts)
    assert "is an extrapolation, not a result**: that is 46 times the parameters" in said
    assert "Without embedding: not known of gpt2, llama, mta" in said
    assert "Every size trained on 409,600 tokens" in said
    assert "without one the extrapolation to larger sizes errs towards a loss that is too low" in said
    assert len(files) == 2
    for file in files:
        assert is_drawn(tmp_path / file, *[style(number)[0] for number in range(3)])
        assert not is_drawn(tmp_path / file, style(3)[0])


def test_the_study_shows_the_sizes_first(tmp_path):
    runs = make_sizes("gpt2", base=None) + make_sizes("llama", 6.0, 0.08)
    parts, files = effects.study_parts(runs, tmp_path)
    heads = [part for part in parts if isinstance(part, str) and part.startswith("## ")]
    assert heads == ["## Study architectures: how the loss falls with size",
                     *[f"## Study architectures at {size}" for size in SIZES]]  # fmt: skip
    assert files[0] == "scaling_architectures_parameters.png" and len(files) == 5
    one = [run for run in runs if run.study["size"] == "2.7M"]
    assert "falls with size" not in plain(effects.study_parts(one, tmp_path)[0])


def test_no_band_reaches_a_size_with_one_seed(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "fill_between", lambda axis, x, bottom, top, **_: drawn.append((bottom, top)))
    points = [(1.0, 2.0, 0.5), (2.0, 1.8, 0.4), (3.0, 1.7, 0.0)]
    pictures.draw_scaling(tmp_path / "a.png", "t", "x", {"gpt2": points, "llama": points[:2]})
    (bottom, top), whole = drawn
    assert list(bottom[:2]) == [1.5, 1.4] and list(top[:2]) == pytest.approx([2.5, 2.2])
    assert np.isnan([bottom[2], top[2]]).all() and not np.isnan(whole).any()


def test_two_sizes_are_drawn_and_have_no_law(tmp_path):
    runs = make_sizes("gpt2", base=None) + make_sizes("llama", 6.0, 0.08) + make_sizes("mta", 6.0, 0.07)
    two = [run for run in runs if run.study["size"] != "2.7M"]
    parts, files = scaling.scaling_parts(two, tmp_path)
    said = plain(parts)
    assert "A power law needs 3 sizes. Every size trained on" in said and "b, parameters" not in said
    assert list(rows(said))[2:] == ["0.25M → 0.8M"] and "How to read the sizes" not in str(parts)
    assert len(files) == 2
    for file in files:
        assert is_drawn(tmp_path / file, *[style(number)[0] for number in range(3)])


def test_a_curve_that_is_no_power_law_has_residuals_and_a_wide_interval():
    xs = list(SIZES.values())
    straight = scaling.fit(xs, [[6 * x**-0.06] for x in xs])
    bent = scaling.fit(xs, [[1.5 + 20 * x**-0.2] for x in xs])
    assert max(map(abs, straight.residuals())) < 1e-12
    assert straight.b == pytest.approx(0.06) and straight.a == pytest.approx(6)
    assert max(map(abs, bent.residuals())) > 0.002
    low, high = bent.beyond(scaling.TARGET)
    truth = 1.5 + 20 * scaling.TARGET**-0.2
    assert bent.loss(scaling.TARGET) < truth  # as the report says
    assert low < truth < high
    assert bent.b_half() is None and bent.between(1e8) is None  # one seed at each size
    with pytest.raises(ValueError, match="2 sizes; a power law needs 3"):
        scaling.fit(xs[:2], [[3.0], [2.9]])


def test_the_interval_holds_the_exponent_and_a_bootstrap_would_not():
    """The figures of scaling.py's docstring."""
    rng = np.random.default_rng(0)
    xs = np.array(list(SIZES.values()), float)
    truth = math.log(6) - 0.06 * np.log(xs)
    studies = 2000

    def coverage(spreads, seeds=(3, 3, 3)):
        held = 0
        drawn = 0
        for _ in range(studies):
            logs = []
            for level, spread, n in zip(truth, spreads, seeds, strict=True):
                logs.append((level + spread * rng.normal(size=n)).tolist())
            law = scaling.PowerLaw(xs.tolist(), logs)
            held += abs(law.b - 0.06) <= law.b_half()
            slopes, _ = law.weights(1.0)
            means = 0.0
            for slope, of_size, n in zip(slopes, logs, seeds, strict=True):
                means = means - slope * rng.choice(of_size, size=(300, n)).mean(axis=1)
            low, high = np.percentile(means, [2.5, 97.5])
            drawn += low <= 0.06 <= high
        print(f"{spreads} {seeds}: held by {held / studies:.1%}, by a bootstrap {drawn / studies:.1%}")
        return held / studies, drawn / studies

    held, drawn = coverage([0.005] * 3)
    assert 0.94 <= held <= 0.965 and drawn < 0.85
    for spreads in ([0.015, 0.009, 0.005], [0.005, 0.009, 0.015]):
        assert 0.90 <= coverage(spreads)[0] <= 0.94
    assert coverage([0.005] * 3, (3, 3, 1))[0] >= 0.94
    assert coverage([0.005, 0.009, 0.015], (3, 3, 1))[0] < 0.85  # the docstring warns of it


def test_one_seed_at_the_largest_size(tmp_path):
    runs = make_sizes("gpt2", base=None) + make_sizes("llama", 6.0, 0.08) + make_sizes("mta", 6.0, 0.07)
    runs = [run for run in runs if run.seed == 3 or run.study["size"] != "2.7M"]
    said = plain(scaling.scaling_parts(runs, tmp_path)[0])
    assert "Of gpt2, llama, mta some size has one seed, whose noise is unknown" in said
    assert rows(said)["0.25M → 2.7M"][3] == "0 of 3 (one seed: no pair can be told)"
    alone = [run for run in runs if run.seed == 3]
    assert "±" not in rows(plain(scaling.scaling_parts(alone, tmp_path)[0]))["llama"][0]


def test_an_order_that_turns_round_is_told(tmp_path):
    runs = make_sizes("gpt2", 6.0, 0.06, base=None, noise=0.1)
    runs += make_sizes("steep", 13.0, 0.12, noise=0.1)  # above the others at first, below them at last
    runs += make_sizes("flat", 5.0, 0.055, noise=0.1)
    for number, run in enumerate(runs):
        run.val[200] *= 1 + 1e-5 * (number % 4)  # no difference is the same for all seeds
    made = rows(plain(scaling.scaling_parts(runs, tmp_path)[0]))
    _, tau, rho, both, agree, disagree = made["0.25M → 2.7M"]
    means = []
    for size in ("0.25M", "2.7M"):
        groups, _ = effects.group_runs(run for run in runs if run.study["size"] == size)
        means.append([group.mean() for group in groups.values()])
    order = np.argsort(np.argsort(means, axis=1), axis=1)
    signs = [np.sign((of[:, None] - of)[np.triu_indices(3, 1)]) for of in order]
    assert float(tau) == pytest.approx(np.mean(signs[0] * signs[1]), abs=0.01)
    assert float(rho) == pytest.approx(np.corrcoef(order)[0, 1], abs=0.01)
    assert both == "3 of 3" and agree.count("flat below gpt2") == 1
    assert "gpt2 and steep" in disagree and "flat below gpt2" not in disagree


def test_other_data_is_another_scale_and_too_few_sizes_are_said(tmp_path):
    data = {"tokenizer": "gpt2", "fingerprint": "fineweb"}
    runs = make_sizes("gpt2", base=None) + make_sizes("llama", 6.0, 0.08)
    runs += make_sizes("mta", 6.0, 0.08, sizes={size: SIZES[size] for size in ("0.25M", "0.8M")})
    large = make_run("gpt2", 3.3, 1, None, study="architectures", size="124M",
                     facts={"parameters": scaling.TARGET, "data": data})  # fmt: skip
    said = plain(scaling.scaling_parts([*runs, large], tmp_path)[0])
    assert "124M: other data, or other windows, than 0.25M, 0.8M, 2.7M" in said
    assert "mta has too few sizes for a fit, 0.25M, 0.8M." in said
    assert set(rows(said)) >= {"gpt2", "llama"} and "mta" not in rows(said)
    alone = [run for run in runs if run.study["entry"] == "mta" and run.study["size"] == "0.8M"]
    assert scaling.scaling_parts(alone, tmp_path) == ([], [])
    runs += make_sizes("rwkv", sizes={"0.25M": SIZES["0.25M"]})
    assert "rwkv has one size, 0.25M: left out here." in plain(scaling.scaling_parts(runs, tmp_path)[0])


def test_unequal_conditions_are_told(tmp_path):
    runs = make_sizes("gpt2", base=None) + make_sizes("llama", 6.0, 0.08) + make_sizes("mta", 6.0, 0.07)
    assert "other conditions" not in plain(scaling.scaling_parts(runs, tmp_path)[0])
    for run in runs:
        if run.study["entry"] == "mta" and run.study["size"] == "0.8M":
            run.config["batch_tokens"] = 4096
    said = plain(scaling.scaling_parts(runs, tmp_path)[0])
    line = "mta had other conditions than gpt2 at 0.8M (batch_tokens 4096, not 2048), so their lines"
    assert said.count("other conditions") == 1 and line in said


def test_a_size_as_large_as_the_target_is_no_extrapolation(tmp_path):
    sizes = {**SIZES, "124M": scaling.TARGET}
    parts, _ = scaling.scaling_parts(make_sizes("gpt2", base=None, sizes=sizes), tmp_path)
    assert rows(plain(parts))["gpt2"][-3:] == ["measured", "–", "–"]
    assert "is an extrapolation" not in plain(parts)


def test_own_rates_get_their_own_pictures(tmp_path):
    runs = make_sizes("gpt2", base=None) + make_sizes("llama", 6.0, 0.07)
    runs += make_sizes("llama", 6.0, 0.08, rate=0.5)
    parts, files = scaling.scaling_parts(runs, tmp_path)
    first, second = plain(parts).split("### The sizes, each entry at its own best rate")
    assert rows(first)["llama"][0].startswith("0.0700") and rows(second)["llama"][0].startswith("0.0800")
    assert len(files) == 4


def test_a_size_at_one_rate_has_no_best_one(tmp_path):
    """Its shared rate beside the others' best would bend the line."""
    runs = make_sizes("gpt2", base=None) + make_sizes("llama", 6.0, 0.07)
    for swept in ({"0.25M"}, {"0.25M", "0.8M"}):
        more = [run for run in make_sizes("llama", 6.0, 0.08, rate=0.5) if run.study["size"] in swept]
        parts, files = scaling.scaling_parts(runs + more, tmp_path)
        said = plain(parts)
        assert ("2.7M: one learning rate alone was run" in said) == (len(swept) == 2)
        assert ("at its own best rate" in said) == (len(swept) == 2)
        assert len(files) == 2 * len(swept)
        assert rows(said)["llama"][0].startswith("0.0700")  # the law at the shared rate, of all three


def test_parameters_without_embedding_of_a_script_that_is_here():
    import importlib

    from tools.models import count_parameters

    script = importlib.import_module("train_gpt2")
    curve = {}
    expected = []
    for width in (16, 32, 48):
        shape = dict(n_layer=1, n_head=2, n_embd=width, vocab_size=257, block_size=32)
        count, _ = count_parameters(script, script.Config(**shape))
        run = make_run("gpt2", 3.0, 1, facts={"script": "train_gpt2", "parameters": count}, **shape)
        curve[str(width)] = effects.Group("gpt2", 1.0, {1: run})
        expected.append(count - (257 + 32) * width)
    law = scaling.law_of(curve, scaling.non_embedding)
    assert law.xs == expected
    curve["48"].first.facts["parameters"] += 1  # the script has changed
    assert scaling.law_of(curve, scaling.non_embedding) is None


def test_an_interval_by_hand():
    law = scaling.fit([1.0, math.e, math.e**2], [[math.e**3], [math.e**2, math.e**2.2], [math.e]])
    assert law.b == pytest.approx(1.0) and law.freedom == 1
    assert law.spread == pytest.approx(0.1 * math.sqrt(2))
    # weights of the slope: -1/2, 0, 1/2
    assert law.b_half() == pytest.approx(12.7062 * law.spread * math.sqrt(0.5), rel=1e-4)
    assert verdicts.half_width([(law.spread**2 / 2, 1)], 0.05) == pytest.approx(law.b_half())
