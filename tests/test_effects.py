"""What tools.compare says of studies, on made-up runs whose truth is known."""
import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from tools import collection, compare, effects, pictures, verdicts
from tools.page import Folded, as_html
from tools.runs import Run, pool_runs


def make_run(entry="gpt2-rope", loss=3.0, seed=1, base="gpt2", rate=1.0, study="ablations", size="0.8M",
             steps=200, at=None, train=None, facts=None, ms=100.0, changed=(), script_hash=None,
             **fields):  # fmt: skip
    """A run of a study that was validated at the start, halfway and at the end, where it had a loss.

    at: the step that it has come to; train: {step: training loss}; facts: more of the run event.
    """
    config = {
        "max_lr": 0.002 * rate, "min_lr": 0.0002 * rate, "warmup_steps": 10, "weight_decay": 0.1,
        "beta1": 0.9, "beta2": 0.95, "adam_eps": 1e-8, "grad_clip": 1.0, "max_steps": steps,
        "batch_tokens": 2048, "val_tokens": 4096, "block_size": 256, "train_shards": 100, "seed": seed,
        "n_layer": 4, "recipe": "shared",
    } | fields  # fmt: skip
    data = {"dataset": "d", "tokenizer": "bytes", "vocab_size": 257, "fingerprint": "f"}
    given = {
        "script": "train_made_up", "parameters": 800_000, "flops_per_token": 1.6e6, "processes": 1,
        "active_parameters": (facts or {}).get("parameters", 800_000),
        "device": "cpu", "torch": "2.13.0", "dtype": "torch.float32 (the safe choice on cpu)",
        "data": data, "config": config,
    } | (facts or {})  # fmt: skip
    at = steps if at is None else at
    val = {0: 5.5, steps // 2: (loss + 5.5) / 2, at: loss}
    losses = train or {step: loss + 2 * math.exp(-step / 20) for step in range(0, steps, 10)}
    events = {}
    for step, each in losses.items():
        events[step] = {"step": step, "loss": each, "ms": ms, "processes": 1}
    rate_name = "" if rate == 1 else f"-x{rate:g}"
    folder = Path(f"log/{study}-{size}-{entry}{rate_name}-{seed}")
    of = {"name": study, "size": size, "entry": entry, "base": base, "rate": rate}
    return Run(folder, given, script_hash, list(changed), events, val, {}, {}, of)


def make_entry(entry, losses, **options):
    """Runs of an entry with the seeds 1, 2, 3 …"""
    return [make_run(entry, loss, seed, **options) for seed, loss in enumerate(losses, 1)]


def plain(parts):
    """A report's parts as one text, folded ones too."""
    texts = []
    for part in parts:
        texts.append(plain(part.parts) if isinstance(part, Folded) else part)
    return "\n\n".join(texts)


def rows(said):
    """{first cell: the other cells} of all tables, of a name's rows the first."""
    found = {}
    for line in said.splitlines():
        if line.startswith("|"):
            _, name, *cells, _ = line.split("|")
            found.setdefault(name.strip(), [cell.strip() for cell in cells])
    return found


def is_drawn(path, *colours):
    """Whether a file is a picture with each of these colours in its middle, where no words are."""
    from PIL import Image

    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    middle = pixels[: height * 3 // 4, width * 16 // 100 : width * 79 // 100]
    for colour in colours:
        rgb = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        if np.all(middle == rgb, axis=2).sum() < 40:
            return False
    return width > 400


BASE = (3.0, 3.1, 2.9)


def test_verdicts_of_known_differences(tmp_path):
    runs = make_entry("gpt2", BASE, base=None)
    runs += make_entry("gpt2-rope", [2.799, 2.9, 2.701], ms=125.0, facts={"flops_per_token": 1.76e6})
    runs += make_entry("gpt2-nobias", [3.05, 3.08, 2.88], facts={"active_parameters": 400_000})
    runs += make_entry("gpt2-relu2", [3.2, 3.301, 3.099], facts={"parameters": 860_000})
    runs += make_entry("gpt2-alone", [3.3])
    runs[5].train[0]["ms"] = 1.0  # one step says little, the median is unmoved
    parts, files = effects.study_parts(runs, tmp_path)
    said = plain(parts)
    made = rows(said)
    names = [name for name in made if name.startswith("gpt2-")]
    assert names == ["gpt2-alone", "gpt2-relu2", "gpt2-nobias", "gpt2-rope"]  # worst to best
    nats, share, verdict, p, seeds, parameters, flops, speed = made["gpt2-rope"]
    # differences -0.201, -0.2, -0.199: sd 0.001, t of 2 degrees of freedom is 4.30265
    assert nats == f"-0.2000 ± {4.30265 * 0.001 / math.sqrt(3):.4f}" and share == "-6.67 ± 0.08"
    assert (verdict, seeds, parameters, flops) == ("better", "3", "1.000", "1.100")
    assert speed == "0.80 (0.80 to 0.80)"
    assert made["gpt2-nobias"][2] == "not distinguishable"
    assert made["gpt2-relu2"][2] == "worse" and made["gpt2-relu2"][5] == "1.075, unequal"
    assert made["gpt2-nobias"][5] == "1.000, active 0.500"
    assert made["gpt2-alone"][2:5] == ["one seed: no verdict", "–", "1"]
    assert "**better:** gpt2-rope (-0.2000); **worse:** gpt2-relu2 (+0.2000); " in said
    assert "corrected for 3 comparisons (Holm)" in said
    raw = verdicts.compare_losses({1: 2.799, 2: 2.9, 3: 2.701}, dict(enumerate(BASE, 1))).p
    assert float(p) == pytest.approx(3 * raw, rel=0.1)
    assert files == ["effects_ablations_0.8M.png"]
    assert is_drawn(tmp_path / files[0], "#0072B2", "#D55E00", "#555555")
    assert not is_drawn(tmp_path / files[0], "#009E73")  # the check itself can fail
    page = as_html(parts, tmp_path, files)
    assert "data:image/png;base64," in page and f'src="{files[0]}"' not in page


def test_times_of_two_machines_are_not_compared(tmp_path):
    runs = make_entry("gpt2", BASE, base=None) + make_entry("gpt2-rope", [2.8, 2.9, 2.7], ms=125.0)
    for run, machine in zip(runs, ["a", "a", "b", "b", "a", "b"], strict=True):
        run.machine = machine
    runs[2].train = {step: event | {"ms": 250.0} for step, event in runs[2].train.items()}
    made = rows(plain(effects.study_parts(runs, tmp_path)[0]))
    assert made["gpt2-rope"][-1] == "1.40 (0.80 to 2.00)"  # seed 1 is left out
    for run in runs[:3]:
        run.machine = "c"
    made = rows(plain(effects.study_parts(runs, tmp_path)[0]))
    assert made["gpt2-rope"][-1] == "–" and made["gpt2-rope"][2] == "better"


def test_only_common_seeds_count(tmp_path):
    runs = make_entry("gpt2", BASE, base=None) + [make_run(seed=9, entry="gpt2", loss=90.0, base=None)]
    runs += [make_run(loss=loss, seed=seed) for seed, loss in ((3, 2.8), (1, 2.9), (8, 70.0))]
    runs += [make_run("gpt2-nope", 2.0, 4), make_run("gpt2-nope", 2.0, 5)]
    said = plain(effects.study_parts(runs, tmp_path)[0])
    made = rows(said)
    assert made["gpt2-rope"][0].startswith("-0.1000 ± ") and made["gpt2-rope"][4] == "2"
    assert made["gpt2-nope"][2:5] == ["no common seed: no verdict", "–", "0"]


def with_fresh(entry, losses, fresh, **options):
    """Runs of 2,000 steps whose training loss is `fresh` in the last quarter and 9 before it.

    Between the steps that a collection keeps it is 7, which must not count.
    """
    runs = make_entry(entry, losses, steps=2000, **options)
    for run, loss in zip(runs, fresh, strict=True):
        for step in range(0, 2000, 10):
            kept = loss + (step - 1725) / 1000 if step >= 1500 else 9.0
            run.train[step]["loss"] = 7.0 if step % 50 else kept
    return runs


def test_the_loss_on_fresh_text_is_that_of_the_last_quarter_of_training(tmp_path):
    (run,) = with_fresh("gpt2", [3.0], [2.5])
    assert run.fresh_loss() == pytest.approx(2.5)  # steps 1,500, 1,550 … 1,950
    collection.add(tmp_path, [run])
    assert collection.read(tmp_path)[0].fresh_loss() == pytest.approx(2.5)
    del run.train[1950]
    assert run.fresh_loss() is None
    assert make_run(steps=1800, train={step: 2.0 for step in range(1800)}).fresh_loss() is None  # 9 of them
    assert make_run(steps=2000, train={step: 2.0 for step in range(2000)}).fresh_loss() == 2.0


def test_a_verdict_that_fresh_text_does_not_bear_out_is_named(tmp_path):
    runs = with_fresh("gpt2", BASE, [2.0, 2.1, 2.2], base=None)
    runs += with_fresh("gpt2-rope", [2.799, 2.9, 2.701], [2.1, 2.3, 2.2])  # +0.1, +0.2, 0
    runs += with_fresh("gpt2-nope", [3.199, 3.3, 3.101], [2.2, 2.301, 2.399])
    runs += with_fresh("gpt2-alone", [3.0], [1.5])
    runs += make_entry("gpt2-relu2", BASE, steps=2000)
    runs[-1].train = {}
    said = plain(effects.study_parts(runs, tmp_path)[0])
    made = rows(said)
    assert made["gpt2-rope"][2] == "better"
    assert made["gpt2-rope"][4] == f"+0.1000 ± {4.30265 * 0.1 / math.sqrt(3):.4f}"
    assert made["gpt2-nope"][2] == "worse" and made["gpt2-nope"][4].startswith("+0.2000 ± 0.00")
    assert made["gpt2-alone"][4] == "-0.5000" and made["gpt2-relu2"][4] == "–"
    assert made["gpt2-rope"][5:7] == ["3", "1.000"]
    assert said.count("take that as open") == 1
    assert f"doesn't bear this out for gpt2-rope ({made['gpt2-rope'][4]}): take" in said
    short = make_entry("gpt2", BASE, base=None) + make_entry("gpt2-rope", BASE)
    short = plain(effects.study_parts(short, tmp_path)[0])
    assert effects.ON_FRESH_TEXT in said
    assert "on fresh text, nats" in said and "fresh text" not in short


def test_pairs_have_their_difference_on_fresh_text():
    runs = with_fresh("gpt2", BASE, [2.0, 2.1, 2.2], facts={"script": "train_another"})
    runs += with_fresh("gpt2-rope", [2.8, 2.9, 2.7], [2.1, 2.2, 2.3])
    (other,) = with_fresh("gpt2-nope", [9.0], [9.0])
    other.config["seed"] = 4
    pools = pool_runs(runs) + pool_runs([other])
    said = compare.pairs_table(verdicts.compare_pairs(pools, None), None)
    made = {name: cells for name, cells in rows(said).items() if "gpt2" in name}
    assert made["gpt2 – gpt2-rope"][4] == "-0.1000 ± 0.0000" and made["gpt2 – gpt2-nope"][4] == "–"
    short = make_entry("gpt2", BASE, facts={"script": "train_another"}) + make_entry("gpt2-rope", BASE)
    short = pool_runs(short)
    assert "on fresh text" not in compare.pairs_table(verdicts.compare_pairs(short, None), None)


def test_two_bases_and_a_missing_one(tmp_path):
    runs = make_entry("rwkv", [3.0, 3.1, 2.9], base=None) + make_entry("llama", [2.5, 2.6, 2.4], base=None)
    runs += make_entry("rwkv-attention", [2.7, 2.8, 2.6001], base=["rwkv", "llama"])
    runs += make_entry("orphan", [2.7], base="gone")
    parts, files = effects.study_parts(runs, tmp_path)
    said = plain(parts)
    assert "Against llama, whose loss is 2.5000: **worse:** rwkv-attention (+0.2000)." in said
    assert "Against rwkv, whose loss is 3.0000: **better:** rwkv-attention (-0.3000)." in said
    assert "orphan can't be compared with gone" in said
    assert is_drawn(tmp_path / files[0], "#0072B2", "#D55E00")


UNEQUAL = [
    (dict(steps=400), "max_steps 400, not 200"),
    (dict(batch_tokens=4096), "batch_tokens 4096, not 2048"),
    (dict(block_size=128), "block_size 128, not 256"),
    (dict(val_tokens=8192), "val_tokens 8192, not 4096"),
    (dict(weight_decay=0.0), "weight_decay 0, not 0.1"),
    (dict(max_lr=0.004), "max_lr 0.004, not 0.002"),
    (dict(init_from="gpt2.pt"), "init_from gpt2.pt, not nothing"),
    (dict(facts={"torch": "2.11.0"}), "torch 2.11.0, not 2.13.0"),
    (dict(facts={"dtype": "torch.bfloat16 (asked for)"}), "dtype torch.bfloat16, not torch.float32"),
    (dict(facts={"data": {"tokenizer": "bytes", "fingerprint": "g"}}), "data g, not f"),
    (dict(changed=["grad_clip"]), "grad_clip changed midway in ablations-0.8M-gpt2-rope-1"),
]


@pytest.mark.parametrize("options, words", UNEQUAL)
def test_unequal_conditions_get_no_verdict(options, words, tmp_path, monkeypatch):
    monkeypatch.setattr(effects, "draw_forest", lambda *given: None)
    runs = make_entry("gpt2", BASE, base=None) + make_entry("gpt2-fair", [2.799, 2.9, 2.701])
    runs += make_entry("gpt2-rope", [2.799, 2.9, 2.701], **options)
    said = plain(effects.study_parts(runs, tmp_path)[0])
    made = rows(said)
    assert made["gpt2-rope"][2:4] == ["unequal conditions: no verdict", "–"]
    assert f"gpt2-rope has no verdict: {words}" in said
    assert made["gpt2-fair"][2] == "better"
    raw = verdicts.compare_losses({1: 2.799, 2: 2.9, 3: 2.701}, dict(enumerate(BASE, 1))).p
    assert float(made["gpt2-fair"][3]) == pytest.approx(raw, rel=0.1)  # one comparison is left


def test_a_learning_rate_times_its_multiple_and_a_papers_recipe_are_no_unequal_conditions():
    ours = make_run(rate=0.7, max_lr=0.002 * 0.7, min_lr=0.0002 * 0.7)
    assert effects.differing(ours, make_run("gpt2")) == []
    assert effects.differing(make_run(rate=0.7, max_lr=0.002), make_run("gpt2"))
    # RWKV-7's authors' own
    import train_rwkv

    recipe = train_rwkv.RECIPE
    rwkv = make_run("rwkv", facts={"script": "train_rwkv"}, **recipe | {"recipe": "paper"})
    assert effects.differing(rwkv, make_run("gpt2")) == []
    base = effects.Group("gpt2", 1.0, {1: make_run("gpt2")})
    (effect,) = effects.compare_with(base, [effects.Group("rwkv", 1.0, {1: rwkv})])
    name = effects.name_cell(effect)
    assert name.startswith("rwkv (its paper's ") and "beta2 0.99" in name and "weight_decay" not in name
    edited = make_run("rwkv", facts={"script": "train_rwkv"}, **recipe | {"recipe": "paper", "beta2": 0.5})
    assert effects.differing(edited, make_run("gpt2")) == ["beta2 0.5, not 0.95"]


def test_seeds_of_one_entry_that_are_no_repetition(tmp_path, monkeypatch):
    monkeypatch.setattr(effects, "draw_forest", lambda *given: None)
    runs = make_entry("gpt2", BASE, base=None)
    runs += [make_run(loss=2.8, seed=1, script_hash="a"), make_run(loss=2.9, seed=2, script_hash="b")]
    runs += [make_run("gpt2-b", 2.8, 1), make_run("gpt2-b", 2.9, 2, n_layer=5)]
    said = plain(effects.study_parts(runs, tmp_path)[0])
    assert "gpt2-rope has no verdict: the script of gpt2-rope differs between its seeds." in said
    assert "gpt2-b has no verdict: n_layer of gpt2-b differs between its seeds." in said


def test_unfinished_and_repeated_runs_are_left_out_with_a_line(tmp_path):
    runs = make_entry("gpt2", BASE, base=None) + make_entry("gpt2-rope", [2.8, 2.9])
    runs += [make_run(loss=1.0, seed=3, at=150)]
    again = make_run(loss=1.0, seed=2, facts={"time": 1.0}, n_layer=9)
    again.folder = Path("other/again")
    newer = make_run(loss=2.9, seed=2, facts={"time": 2.0})
    runs[4] = newer
    said = plain(effects.study_parts([*runs, again], tmp_path)[0])
    assert "ablations-0.8M-gpt2-rope-3 is left out: it is at step 150 of 200." in said
    line = f"other/again is left out: {newer.folder} has the same place in the study and the same seed, 2, "
    assert line + "and is newer." in said
    assert rows(said)["gpt2-rope"][0].startswith("-0.2000 ± ") and rows(said)["gpt2-rope"][4] == "2"
    only = plain(effects.study_parts([make_run(at=150)], tmp_path)[0])
    assert "is left out: it is at step 150 of 200." in only
    assert effects.study_parts([], tmp_path) == ([], [])


def simulate(rng, entries, seeds=3, shift=0.0, own=1.0):
    """Groups of a study: the base and entries, whose losses share what the order of the data does.

    own: the standard deviation of an entry's own noise, one for all or a list.
    """
    order = rng.normal(size=seeds)
    noise = rng.normal(size=(entries + 1, seeds)) * np.reshape(own, (-1, 1))
    losses = 100 + order + noise
    losses[1] += shift
    groups = []
    for number, of_entry in enumerate(losses.tolist()):
        groups.append(effects.Group(f"e{number}", 1.0, dict(zip(range(seeds), of_entry, strict=True))))
    return groups


class Bare(effects.Group):
    """A Group whose runs are bare losses."""

    def losses(self):
        return self.runs


def bare(groups):
    return [Bare(group.entry, group.rate, group.runs) for group in groups]


@pytest.fixture
def without_conditions(monkeypatch):
    monkeypatch.setattr(effects, "mixed", lambda group: [])
    monkeypatch.setattr(effects, "differing", lambda run, base: [])
    monkeypatch.setattr(effects, "compare_fresh", lambda ours, theirs: None)


def test_equal_entries_get_a_verdict_in_at_most_one_study_of_twenty(without_conditions):
    rng = np.random.default_rng(0)
    studies = 2000
    false = 0
    held = 0
    for _ in range(studies):
        base, *others = bare(simulate(rng, 6))
        compared = effects.compare_with(base, others)
        false += any(effect.verdict != verdicts.UNTOLD for effect in compared)
        held += sum(abs(effect.loss.difference) <= effect.loss.half for effect in compared)
    print(f"false verdicts in {false} of {studies} studies; intervals hold zero in {held / 6 / studies:.1%}")
    assert 0.02 * studies < false <= 0.055 * studies
    assert 0.93 <= held / 6 / studies <= 0.97


def test_a_large_effect_is_found_and_has_the_right_sign(without_conditions):
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(100):
        base, *others = bare(simulate(rng, 3, seeds=5, shift=-8.0))
        by_name = {effect.group.entry: effect for effect in effects.compare_with(base, others)}
        assert by_name["e1"].verdict != verdicts.WORSE
        found += by_name["e1"].verdict == verdicts.BETTER
    assert found >= 90


def test_one_spread_for_all_finds_more_and_holds_if_it_is_one(without_conditions):
    def share_found(studies, **truth):
        rng = np.random.default_rng(2)
        found = 0
        paired = 0
        for _ in range(studies):
            base, *others = bare(simulate(rng, 6, **truth))
            compared = effects.compare_with(base, others)
            found += any(effect.shared_p < 0.05 for effect in compared)
            paired += any(effect.p < 0.05 for effect in compared)
        return found / studies, paired / studies

    assert 0.02 < share_found(1500)[0] <= 0.05
    assert share_found(1000, own=[3.0, 1, 1, 1, 1, 1, 1])[0] > 0.1  # as the report warns
    shared, paired = share_found(300, shift=-4.0)
    print(f"four standard deviations are found in {shared:.0%}, by the paired test alone in {paired:.0%}")
    assert shared > 0.85 and paired < 0.5


def test_one_spread_for_all_by_hand_and_in_the_report(tmp_path):
    a, b, c = {1: 1.0, 2: 2.0, 3: 4.0}, {1: 1.5, 2: 2.4, 3: 4.9}, {1: 0.0, 2: 1.5, 3: 3.0}
    (alone,) = verdicts.compare_by_shared_spread(a, [b])
    paired = verdicts.compare_losses(b, a)  # of two it is the same
    assert alone.difference == pytest.approx(paired.difference)
    assert (alone.half, alone.p) == pytest.approx((paired.half, paired.p))
    # the residuals of three by three, 4 degrees of freedom, by their definition
    y = np.array([[each[seed] for seed in (1, 2, 3)] for each in (a, b, c)])
    squares = 0.0
    for i in range(3):
        for j in range(3):
            squares += (y[i, j] - y[i].mean() - y[:, j].mean() + y.mean()) ** 2
    both = verdicts.compare_by_shared_spread(a, [b, c])
    assert both[1].difference == pytest.approx(-5 / 6)
    assert both[1].half == pytest.approx(2.776445 * math.sqrt(2 / 3 * squares / 4), rel=1e-6)
    runs = make_entry("gpt2", BASE, base=None) + make_entry("gpt2-other", [3.0, 3.1001, 2.9])
    runs += make_entry("gpt2-rope", [2.99, 3.088, 2.884]) + make_entry("gpt2-more", [3.001, 3.1, 2.9])
    runs += make_entry("gpt2-few", [2.0, 2.1])
    said = plain(effects.study_parts(runs, tmp_path)[0])
    line = "If all of them varied alike between seeds, these would be told apart as well: gpt2-rope better "
    assert line + "(-0.0127)." in said
    table = rows(said.split("A second look")[1])
    assert table["gpt2-rope"][1] == "better" and table["gpt2-rope"][3] == "not distinguishable"
    assert table["gpt2-other"][1] == "not distinguishable" and "gpt2-few" not in table


# ---- learning rates


def sweep(entry, by_rate, base=None):
    runs = []
    for rate, losses in by_rate.items():
        runs += make_entry(entry, losses, rate=rate, base=base, study="rates")
    return runs


def test_rates(tmp_path):
    runs = sweep("gpt2", {0.5: [3.2], 1.0: [3.0, 3.1, 2.9], 2.0: [2.8, 2.9, 2.7001], 4.0: [2.95]})
    runs += sweep("llama", {0.5: [2.7, 2.8, 2.6], 1.0: [2.72, 2.79, 2.61], 2.0: [2.5]}, base="gpt2")
    runs += sweep("mta", {1.0: [2.9], 2.0: [3.0], 4.0: [3.1]}, base="gpt2")
    runs += sweep("rwkv", {1.0: [2.9], 2.0: [2.8], 4.0: [2.7]})
    parts, files = effects.study_parts(runs, tmp_path)
    said = plain(parts)
    sections = re.split(r"^### ", said, flags=re.M)
    table = rows(next(section for section in sections if section.startswith("Learning rates")))
    assert table["gpt2"][:4] == ["3.2000 (1 of 3 seeds)", "3.0000", "**2.8000**", "2.9500 (1 of 3 seeds)"]
    assert table["gpt2"][4].startswith("-0.2000 ± ") and table["gpt2"][4].endswith(", better")
    assert table["llama"][0] == "**2.7000**" and table["llama"][3] == "–"
    assert table["llama"][4].endswith(", not distinguishable")
    assert table["mta"][4] == "is the best"
    assert "the number of rates that were compared with x1, 2." in said
    assert "llama: the best rate, x0.5, is at the edge of the sweep, the lowest that was tried" in said
    assert "mta: the best rate, x1, is at the edge of the sweep" in said
    assert "rwkv: the best rate, x4, is at the edge of the sweep, the highest" in said
    assert "gpt2: the best rate" not in said
    assert "llama: rate x2 has a lower loss than x0.5 on the seed that it was run with (1)" in said
    toml = re.search(r"```toml\n(.*?)```", said, re.S).group(1)
    assert tomllib.loads(toml) == {"own_rate": {"gpt2": 2.0, "llama": 0.5, "mta": 1.0, "rwkv": 4.0}}
    same = rows(next(section for section in sections if section.startswith("At the same rate")))
    own = rows(next(section for section in sections if section.startswith("Each at its own best")))
    assert same["llama"][0].startswith("-0.2933 ± ")
    assert own["llama, rate x0.5"][0].startswith("-0.1000 ± ")
    assert "chosen on the seeds that it is judged by" in said
    assert len(files) == 2 and all(is_drawn(tmp_path / file, "#555555") for file in files)


def test_two_rates_are_no_sweep_and_one_is_no_section(tmp_path):
    runs = sweep("gpt2", {1.0: BASE, 2.0: [2.8, 2.9, 2.7]})
    assert "edge of the sweep" not in plain(effects.study_parts(runs, tmp_path)[0])
    assert "Learning rates" not in plain(effects.study_parts(sweep("gpt2", {1.0: BASE}), tmp_path)[0])
    runs = sweep("gpt2", {0.5: BASE, 2.0: [2.8, 2.9, 2.7]})
    assert rows(plain(effects.study_parts(runs, tmp_path)[0]))["gpt2"][-2] == "was not run"


# ---- runs that look wrong


def test_runs_that_diverged_are_named(tmp_path):
    runs = []
    for number in range(4):
        runs += make_entry(f"e{number}", [3.0, 3.01, 2.99], base=None)
    runs[0].val[100] = 2.9
    runs[3].val[200] = 3.2
    runs[7].train[150]["loss"] = 4.6
    runs[10].train[50]["loss"] = 3.7  # no jump: below one nat
    said = plain(effects.study_parts(runs, tmp_path)[0])
    name = "ablations-0.8M"
    assert f"{name}-e0-1: its final validation loss, 3.0000, is 3.4% above its lowest, 2.9000." in said
    assert f"{name}-e1-1: its loss is +0.1900 from the median of its 3 seeds, and seeds" in said
    assert f"{name}-e2-2: its training loss jumped at step 150: for 1 logged step it was up to 1.6" in said
    suspects = said.split("### Look at these runs")[1]
    assert suspects.count("- ablations") == 3
    calm = effects.study_parts(make_entry("gpt2", BASE, base=None), tmp_path)[0]
    assert "Look at these runs" not in plain(calm)


def test_a_training_curve_is_the_mean_over_seeds_and_neighbours(tmp_path):
    """Of a log as of a collection, which has every fiftieth step; a short run has none."""
    every = {step: 5 - step / 1000 + (step % 50 != 0) for step in range(2000)}  # other steps are another curve
    kept = {step: loss for step, loss in every.items() if step % 50 == 0}
    runs = [make_run("gpt2", 3.0, 1, steps=2000, train=every), make_run("gpt2", 3.0, 2, steps=2000, train=kept)]
    runs[1].train[400]["loss"] += 1.0
    (pool,) = pool_runs(runs)
    curve = pictures.training_curve(pool)
    assert [step for step, _, _ in curve] == list(range(100, 1900, 50))
    for step, loss, _ in curve:
        assert loss == pytest.approx(5 - step / 1000 + 0.1 * (abs(step - 400) <= 100))
    shown = dict(pictures.draw(tmp_path, [pool], []))
    assert "training.png" in shown and is_drawn(tmp_path / "training.png", pictures.style(0)[0])
    (short,) = pool_runs([make_run("gpt2", 3.0, 1, steps=1000)])
    assert pictures.training_curve(short) == []
    assert "training.png" not in dict(pictures.draw(tmp_path, [pool, short], []))


def test_a_far_row_doesnt_squeeze_the_others():
    from matplotlib.figure import Figure

    near = [("a", 0.01, 0.02, verdicts.UNTOLD), ("b", -0.02, 0.01, verdicts.BETTER)]
    near.append(("c", 0.0, None, verdicts.ONE_SEED))
    for rows, beyond, limits in (
        (near, False, (-0.03, 0.03)),
        ([("far", 0.8, 0.1, verdicts.WORSE), *near], True, (-0.03, 0.03)),
        ([("far", -0.8, 0.1, verdicts.BETTER), *near], True, (-0.03, 0.03)),
        ([("wide", 0.01, 0.8, verdicts.UNTOLD), *near], False, (-0.03, 0.03)),  # its point is near
        ([("far", 0.8, 0.1, verdicts.WORSE)], False, (0, 0.9)),
        ([("same", 0.0, None, verdicts.ONE_SEED)], False, (0, 0)),
    ):
        axis = Figure().subplots()
        assert pictures.draw_forest_panel(axis, rows) == beyond
        low, high = axis.get_xlim()
        space = 0.08 * (limits[1] - limits[0]) or 1
        assert (low, high) == pytest.approx((limits[0] - space, limits[1] + space)), rows
        points = [container.lines[0] for container in axis.containers]
        assert all(low <= point.get_xdata()[0] <= high for point in points)
        arrows = [point.get_marker() for point in points if point.get_marker() in "<>"]
        assert arrows == ([">" if rows[0][1] > 0 else "<"] if beyond else [])
