"""The comparison of runs, on logs whose answers are known."""
import importlib
import itertools
import json
import math
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import fineweb
from tools import collection, compare, findings, runs as reading, sync, table, verdicts
from tools.models import count_parameters

SCRIPT = importlib.import_module("train_gpt2")
RWKV = importlib.import_module("train_rwkv")
DEMO = ROOT / "results/demo"


def write_run(folder, losses=(5.0, 4.0, 3.0), right=50, n=400, script="train_gpt2", load=None,
              own=None, facts=None, fingerprint="f", **fields):  # fmt: skip
    """A run's folder: validated at steps 0, 10, 20 …; the first `right` of its n items were answered right.

    own: its config, instead of GPT-2's with fields; facts: more of the run event.
    """
    folder.mkdir(parents=True)
    last_step = 10 * (len(losses) - 1)
    config = own or {**vars(SCRIPT.Config(max_steps=last_step)), **fields}
    data = {"dataset": "d", "tokenizer": "bytes", "vocab_size": 257, "fingerprint": fingerprint}
    start = {
        "event": "run", "script": script, "processes": 1, "parameters": 1000, "flops_per_token": 2000.0,
        "data": data, "config": config,
    }  # fmt: skip
    events = [start | (facts or {})]
    predictions = "0" * right + "1" * (n - right)
    result = {
        "task": "cloze", "convention": "nanogpt", "n": n, "acc": 0.5, "acc_norm": right / n,
        "predictions": predictions, "predictions_norm": predictions,
    }  # fmt: skip
    for at, loss in enumerate(losses):
        events.append({"event": "val", "step": 10 * at, "loss": loss})
        events.append({"event": "score", "step": 10 * at, **result})
    for step in range(last_step):
        event = {"event": "train", "step": step, "loss": 3.0, "lr": 1e-3, "norm": 1.0, "ms": 100.0}
        if load:
            event["load_max"] = load
        events.append(event)
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "cloze_nanogpt.json").write_text(json.dumps({"step": 20, **result, "labels": "0" * n}))
    return folder


def add(folder, *events):
    """Goes on writing a run's log as another start of its script, with changes to the first start's facts."""
    with open(folder / "log.jsonl", "r+") as log:
        first = json.loads(log.readline())
        log.seek(0, 2)
        for event in events:
            if "config" in event or "processes" in event:
                event = {**first, **event, "config": {**first["config"], **event.get("config", {})}}
            log.write(json.dumps(event) + "\n")


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """run_tool(*arguments) -> (status, what the program printed); pictures=True draws them."""

    def run(*arguments, pictures=False):
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
        with monkeypatch.context() as patch:
            if not pictures:
                patch.setattr(compare, "draw", lambda *given: [])
            try:
                compare.main()
                status = 0
            except SystemExit as error:
                status = 1 if error.code else 0
                print(error.code)
        return status, capsys.readouterr().out

    return run


def rows(said):
    """{first cell: the other cells} of all tables that were printed."""
    tables = [line.split("|") for line in said.splitlines() if line.startswith("|")]
    return {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in tables}


# ---- statistics


def test_mcnemar_against_values_worked_by_hand():
    # 1 win, 7 losses: 2 (C(8,0) + C(8,1)) / 2^8 = 18 / 256
    assert verdicts.mcnemar([1] + [0] * 7 + [1, 0], [0] + [1] * 7 + [1, 0]) == pytest.approx(18 / 256)
    # 10 and 25 of 35 discordant
    assert verdicts.mcnemar([1] * 10 + [0] * 25, [0] * 10 + [1] * 25) == pytest.approx(0.0166738, abs=1e-7)
    assert verdicts.mcnemar([1, 0], [1, 0]) == 1.0
    assert verdicts.mcnemar([1, 0], [0, 1]) == 1.0
    assert 0 < verdicts.mcnemar([1] * 900 + [0] * 1100, [0] * 900 + [1] * 1100) < 1e-4  # no overflow
    wins, n = 40, 100
    exact = 2 * sum(math.comb(n, k) for k in range(wins + 1)) / 2**n
    assert verdicts.mcnemar([1] * 40 + [0] * 60, [0] * 40 + [1] * 60) == pytest.approx(exact)


def test_holm_by_hand():
    assert verdicts.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert verdicts.holm([0.5]) == [0.5]
    assert verdicts.holm([0.9, 0.8]) == [1.0, 1.0]


def test_losses_by_hand_and_by_scipy():
    from scipy.stats import ttest_ind, ttest_rel

    # means 2 and 5, variances 1 and 1 with n = 3 each: 4 degrees of freedom, where t is 2.77645
    welch = verdicts.compare_losses({1: 1.0, 2: 2.0, 3: 3.0}, {4: 4.0, 5: 5.0, 6: 6.0})
    assert welch.difference == -3 and welch.how == "Welch, 3 and 3 seeds"
    assert welch.half == pytest.approx(2.77645 * math.sqrt(2 / 3), rel=1e-5)
    assert welch.p == pytest.approx(ttest_ind([1, 2, 3], [4, 5, 6], equal_var=False).pvalue)
    # one seed in common is no pair; three are, whatever the others say
    assert verdicts.compare_losses({1: 1.0, 2: 2.0}, {1: 4.0, 3: 5.0}).how == "Welch, 2 and 2 seeds"
    paired = verdicts.compare_losses({1: 1.0, 2: 2.0, 3: 4.0, 8: 90.0}, {3: 3.5, 1: 0.9, 2: 1.7, 9: 50.0})
    by_scipy = ttest_rel([1.0, 2.0, 4.0], [0.9, 1.7, 3.5])
    assert paired.how == "paired, 3 seeds" and paired.difference == pytest.approx(0.3)
    assert paired.p == pytest.approx(by_scipy.pvalue)
    assert paired.half == pytest.approx(by_scipy.confidence_interval(0.95).high - 0.3)
    one = verdicts.compare_losses({1: 1.0}, {1: 2.0, 2: 3.0})
    assert (one.difference, one.half, one.p) == (-1.5, None, None)
    same = verdicts.compare_losses({1: 2.0, 2: 3.0}, {1: 2.0, 2: 3.0})
    assert (same.difference, same.half, same.p) == (0.0, 0.0, 1.0)


def test_accuracies_of_seeds_that_differ_are_not_told_by_the_items_alone():
    """The items say with certainty that the models differ; three seeds say that it is the seeds."""
    n = 1000
    a = {1: [True] * 900 + [False] * 100, 2: [True] * 500 + [False] * 500, 3: [True] * 850 + [False] * 150}
    b = {4: [True] * 500 + [False] * 500, 5: [True] * 620 + [False] * 380, 6: [True] * 560 + [False] * 440}
    assert verdicts.mcnemar(a[1], b[4]) < 1e-100
    result = verdicts.compare_answers(a, b)
    assert result.difference == pytest.approx(0.19) and result.p > 0.1 and result.half > 0.19
    # paired, with the same difference for each seed: what is left is the items' variance
    b = {seed: right[: n - 100] + [False] * 100 for seed, right in a.items()}
    b = {seed: [False] * 50 + right[50:] for seed, right in b.items()}
    result = verdicts.compare_answers(a, b)
    shares = np.array([1.0] * 50 + [0.0] * 950)
    assert result.difference == pytest.approx(0.05)
    assert result.half == pytest.approx(1.9623 * shares.std(ddof=1) / math.sqrt(n), rel=1e-3)
    assert verdicts.compare_answers(a, {1: [True], 2: [True]}) is None


class Simulated:
    """As much of a Pool as the verdicts need."""

    def __init__(self, by_seed, right):
        self.by_seed = by_seed
        self.right = right

    def losses_by_seed(self):
        return self.by_seed

    def answers(self, key):
        return self.right


def simulate(rng, seeds, shift=0.0, items=0):
    """A study: for each entry of seeds an architecture with these seeds; the first one's loss is shifted.

    Losses have a part that the order of the data gives to all with a seed, and a part of their own with a
    standard deviation of 1. Items are of all difficulties; a seed makes a model 3 points better or worse.
    """
    order = rng.normal(size=1 + max(map(max, seeds)))
    difficulty = rng.uniform(0.2, 0.9, size=items)
    pools = []
    for number, own_seeds in enumerate(seeds):
        losses = {}
        right = {}
        for seed in own_seeds:
            losses[seed] = 100 + order[seed] + rng.normal() + shift * (number == 0)
            skill = np.clip(difficulty + 0.03 * rng.normal(), 0, 1)
            right[seed] = (rng.uniform(size=items) < skill).tolist()
        pools.append(Simulated(losses, right if items else None))
    return pools


@pytest.mark.parametrize("seeds", [
    [(1, 2, 3)] * 5,  # paired
    [(1, 2, 3), (4, 5, 6, 7), (8, 9, 10), (11, 12, 13, 14, 15)],  # no seeds in common: Welch
    [(1, 2, 3), (2, 3, 4), (5, 6, 7)],  # some
])  # fmt: skip
def test_equal_architectures_are_told_apart_in_at_most_one_study_of_twenty(seeds):
    rng = np.random.default_rng(0)
    studies = 400
    by_loss = 0
    by_accuracy = 0
    for _ in range(studies):
        pairs = verdicts.compare_pairs(simulate(rng, seeds, items=200), "score")
        by_loss += any(pair.verdict() != verdicts.UNTOLD for pair in pairs)
        by_accuracy += any(pair.accuracy_p < 0.05 for pair in pairs)
    print(f"false verdicts: {by_loss} of {studies} studies by loss, {by_accuracy} by accuracy")
    assert by_loss <= 0.05 * studies
    assert by_accuracy <= 0.05 * studies


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
        pools = simulate(rng, [range(seeds)] * architectures, shift=-shift)
        pair = verdicts.compare_pairs(pools, None)[0]
        assert pair.verdict() != verdicts.HIGHER
        found += pair.verdict() == verdicts.LOWER
    print(f"power: {found / 200:.0%}")
    assert least <= found / 200 <= most


# ---- the report


def test_one_seed_says_something_of_models_only(tmp_path, run_tool):
    write_run(tmp_path / "a", right=200, n_layer=1, load=1.5)
    write_run(tmp_path / "b", right=260, n_layer=2, losses=(5.0, 4.0, 2.5))
    write_run(tmp_path / "c", right=264, n_layer=3, losses=(5.0, 4.0, 2.4))
    folders = [tmp_path / name for name in "abc"]
    status, said = run_tool(*folders, "--out", tmp_path / "report", pictures=True)
    assert status == 0, said
    pairs = rows(said)
    loss, how, p, verdict, accuracy, accuracy_p = pairs["gpt2, n_layer 2 – gpt2, n_layer 1"]
    assert (loss, how, p) == ("-0.5000", "one seed: no interval", "–")
    assert accuracy.startswith("+15.00 ± ")
    assert verdict == "these two models differ; of the architectures one seed says nothing"
    assert float(accuracy_p) < 1e-10
    *_, verdict, accuracy, accuracy_p = pairs["gpt2, n_layer 3 – gpt2, n_layer 2"]
    assert verdict == "not distinguishable"  # 4 items to none: p = 1/8 even uncorrected
    assert float(accuracy_p) == pytest.approx(0.125)
    assert "better" not in said.replace("Which is better", "") and "lower loss" not in said
    expected = "Of three, gpt2, n_layer 3 has the lowest validation loss, 2.4000 (one seed: no interval)"
    assert expected + "; of the architectures one seed says nothing." in said
    assert [pairs[rank][0] for rank in "123"] == [f"gpt2, n_layer {n}" for n in (3, 2, 1)]
    names = {path.name for path in (tmp_path / "report").iterdir()}
    pictures = {"loss_tokens", "loss_flops", "loss_time", "expert_load"}
    pictures |= {"cloze_nanogpt", "cloze_nanogpt_bars"}
    assert names == {"leaderboard.md", "index.html"} | {f"{picture}.png" for picture in pictures}
    for picture in pictures:
        assert (tmp_path / f"report/{picture}.png").stat().st_size > 5000
    page = (tmp_path / "report/index.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and "http" not in page
    assert page.count("<table>") == 4 and "<strong>gpt2, n_layer 1</strong>" in page
    assert "not distinguishable" in page


def test_seeds_are_pooled(tmp_path, run_tool):
    for seed, (a, b) in enumerate(((3.0, 2.0), (3.1, 2.2), (3.2, 2.1))):
        write_run(tmp_path / f"a{seed}", losses=(5.0, a), seed=seed, n_layer=1, right=100)
        write_run(tmp_path / f"b{seed}", losses=(5.0, b), seed=seed, n_layer=2, right=100 + 40 * (seed == 1))
    folders = sorted(tmp_path.iterdir())
    status, said = run_tool(*folders, "--out", tmp_path / "report")
    # everywhere the half of a 95% interval: t of 2 degrees of freedom is 4.30265
    half = f"{4.30265 * 0.1 / math.sqrt(3):.4f}"
    assert status == 0 and f"3.1000 ± {half}" in said and f"2.1000 ± {half}" in said
    assert said.count("± is half of a 95% interval's width everywhere") == 1
    made = rows(said)
    loss, how, p, verdict, accuracy, accuracy_p = made["gpt2, n_layer 2 – gpt2, n_layer 1"]
    assert (loss, how, verdict) == (f"-1.0000 ± {half}", "paired, 3 seeds", "lower loss")
    assert float(p) == pytest.approx(0.0033, abs=1e-4)
    assert made["1"][-1] == made["2"][-1] == "3"  # seeds
    assert "3" not in made
    # forty items were right in one seed of b and in none of a: that is one seed of three
    assert accuracy.startswith("+3.33 ± ") and float(accuracy_p) > 0.3
    expected = f"Of two, gpt2, n_layer 2 has the lowest validation loss, 2.1000 ± {half} "
    expected += "(95% interval over 3 seeds), and that is lower than the loss of each other one."
    assert expected in said


def test_the_first_line_names_what_can_not_be_told(tmp_path, run_tool):
    for seed in (1, 2, 3):
        own = seed / 100
        write_run(tmp_path / f"a{seed}", losses=(5.0, 2 + own), seed=seed, n_layer=1)
        write_run(tmp_path / f"b{seed}", losses=(5.0, 2.02 + own**2), seed=seed, n_layer=2)
        write_run(tmp_path / f"c{seed}", losses=(5.0, 3 + own**2), seed=seed, n_layer=3)
    write_run(tmp_path / "d", losses=(5.0, 2.3), seed=1, n_layer=4)
    status, said = run_tool(*sorted(tmp_path.iterdir()), "--out", tmp_path / "report")
    first = said.splitlines()[2]
    assert status == 0
    assert first.startswith("Of four, gpt2, n_layer 1 has the lowest validation loss, 2.0200 ± ")
    assert "; it can't be told apart from (gpt2, n_layer 2); one seed says nothing of (gpt2, n_layer 4)." in first


def test_unfair_runs_are_ranked_apart_with_the_reason(tmp_path, run_tool):
    write_run(tmp_path / "a", n_layer=1)
    write_run(tmp_path / "b", n_layer=2)
    write_run(tmp_path / "shorter", losses=(5.0, 1.0))
    write_run(tmp_path / "other", fingerprint="g", losses=(5.0, 4.0, 1.0))
    write_run(tmp_path / "faster", max_lr=1e-2, losses=(5.0, 4.0, 1.0))
    status, said = run_tool(*sorted(tmp_path.iterdir()), "--out", tmp_path / "report")
    assert status == 0
    main, *apart = said.split("## Not comparable with those above")
    assert "gpt2 (a)" in main and "gpt2 (b)" in main  # more differs than a name holds
    assert "(shorter)" not in main and "(other)" not in main
    assert len(apart) == 3
    reasons = " ".join(apart)
    assert "tokens: 5242880, not 10485760" in reasons
    assert "data: g, not f" in reasons
    assert "max_lr is 0.01, not 0.0006" in reasons


def test_an_unfinished_run_is_shown_and_not_ranked(tmp_path, run_tool):
    write_run(tmp_path / "a", n_layer=1)
    write_run(tmp_path / "b", losses=(5.0, 1.0), max_steps=20)
    status, said = run_tool(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "report")
    assert status == 0
    (row,) = [line for line in said.splitlines() if "unfinished: step 10 of 20" in line]
    assert row.startswith("| – |") and "| 1 | gpt2, n_layer 1 |" in said


def test_pooled_seeds_of_which_one_was_not_scored(tmp_path, run_tool):
    for seed in range(3):
        folder = write_run(tmp_path / f"r{seed}", seed=seed)
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(line for line in lines if '"score"' not in line))
    write_run(tmp_path / "other", n_layer=3, seed=1)
    status, said = run_tool(*sorted(tmp_path.iterdir()), "--out", tmp_path / "report")
    assert status == 0 and "not tested" in said


# ---- reading runs


def test_broken_logs_are_named_and_left_out(tmp_path, run_tool):
    write_run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/log.jsonl").write_text("")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/log.jsonl").write_text('{"loss": 3}\n{"loss": 2}\n')
    killed = write_run(tmp_path / "killed")
    with open(killed / "log.jsonl", "a") as f:
        f.write('{"event": "tra')  # a run that was killed while it wrote is fine
    torn = write_run(tmp_path / "torn")
    text = (torn / "log.jsonl").read_text()
    (torn / "log.jsonl").write_text(text[:300] + text[310:400] + "\n" + text[400:])
    status, said = run_tool(*sorted(tmp_path.iterdir()), "--out", tmp_path / "report")
    assert status == 1 and "4 of 6 runs were left out" in said
    reasons = {
        "empty": "is empty", "nothing": "has no log.jsonl", "foreign": "line 1 of", "torn": "line 1 of",
    }  # fmt: skip
    for name, why in reasons.items():
        (line,) = [line for line in said.splitlines() if line.startswith(f"left out: {tmp_path / name}: ")]
        assert why in line
    status, said = run_tool(tmp_path / "empty", "--out", tmp_path / "report")
    assert status == 1 and "there is no run to compare" in said
    status, said = run_tool(tmp_path / "nowhere", "--out", tmp_path / "report")
    (line,) = said.splitlines()
    assert status == 1 and f"there is no run to compare: {tmp_path / 'nowhere'}: isn't there. " in line


def test_a_run_event_without_what_is_compared_is_named(tmp_path):
    folder = write_run(tmp_path / "a", own={"max_steps": 20})
    with pytest.raises(reading.Unreadable, match="line 1 of its log.jsonl is not an event of a run"):
        reading.read_run(folder)


def test_several_scripts_that_are_not_here_are_named_in_a_line(tmp_path, run_tool):
    for number in range(11):
        write_run(tmp_path / "log" / str(number), script=f"train_mine{number}", losses=(5.0, 3.0 + number))
    for count, which in ((2, "mine0, mine1"), (11, "11 of these")):
        folders = [tmp_path / "log" / str(number) for number in range(count)]
        status, said = run_tool(*folders, "--out", tmp_path / "report")
        line = f"{which}: their scripts are not here. So they are compared by their logs alone: what their "
        assert status == 0 and said.count(line) == 1, said


def test_a_script_that_is_not_here_is_compared_by_its_log(tmp_path, run_tool):
    write_run(tmp_path / "mine", script="train_mine")
    write_run(tmp_path / "ours", losses=(5.0, 4.0, 2.5), facts={"parameters": 900, "active_parameters": 800})
    status, said = run_tool(tmp_path / "mine", tmp_path / "ours", "--out", tmp_path / "report")
    assert status == 0, said
    board = rows(said)
    assert board["1"][0] == "gpt2" and board["1"][4:9] == ["900", "–", "800", "–", "–"]
    assert board["2"][0] == "mine" and board["2"][4:9] == ["1,000", "–", "–", "–", "–"]
    (line,) = [line for line in said.splitlines() if "its script" in line]
    assert line.startswith("mine: its script train_mine.py is not here. So it is compared by its log alone")


@pytest.mark.parametrize("name, total, evaluated, active, embedding", [
    ("gpt2", 842_624, 842_624, 842_624, 257 * 128 + 128 * 128),
    ("rwkv", 843_392, 843_392, 843_392, 257 * 128),
    ("deepseek", 927_072, 703_104, 558_432, 257 * 128),
])  # fmt: skip
def test_runs_from_before_fields_were_renamed_are_read(name, total, evaluated, active, embedding):
    runs = [run for run in collection.read(DEMO) if run.folder.name.rstrip("123") == f"{name}-"]
    (pool,) = compare.pool_runs(runs)
    assert pool.name == name and pool.finished
    counts = [total, evaluated, active, embedding, total - embedding]
    assert compare.leaderboard_row(pool, [])[3:8] == [f"{count:,}" for count in counts]


def test_an_evaluation_later_changes_neither_the_run_nor_its_hours(tmp_path):
    folder = write_run(tmp_path / "a")
    before = reading.read_run(folder)
    score = {"task": "hellaswag", "convention": "harness", "n": 4, "acc_norm": 0.5}
    add(folder, {"processes": 8}, {"event": "score", "step": 20, **score},
        {"config": {"val_tokens": 1000}}, {"event": "val", "step": 20, "loss": 9.0})  # fmt: skip
    run = reading.read_run(folder)
    assert (run.facts, run.val, run.train, run.changed) == (before.facts, before.val, before.train, [])
    assert run.scores.keys() - before.scores.keys() == {("hellaswag", "harness")}


def test_a_run_that_was_changed_midway_is_not_ranked_with_the_others(tmp_path, run_tool):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", n_layer=3)
    folder = write_run(tmp_path / "c", n_layer=4)
    add(folder, {"config": {"max_lr": 1e-3}, "processes": 8},
        {"event": "train", "step": 20, "ms": 100.0, "loss": 3.0},
        {"event": "val", "step": 20, "loss": 2.0})  # fmt: skip
    run = reading.read_run(folder)
    assert run.changed == ["max_lr"]
    assert [event["processes"] for event in run.train.values()] == [1] * 20 + [8]
    status, said = run_tool(tmp_path / "a", tmp_path / "b", folder, "--out", tmp_path / "report")
    assert status == 0 and "max_lr changed between its first step and its last" in said


# ---- collections


def write_pairs(folder):
    """Two architectures with three seeds each, every step of another length."""
    for seed in (1, 2, 3):
        for script, loss in (("train_gpt2", 3.0), ("train_llama", 2.0 + 0.1 * seed**2)):
            losses = (5.0, 4.0 + 0.001 * seed, 3.5, loss, loss, loss - 0.1)
            place = folder / f"{script}-{seed}"
            run = write_run(place, losses, 40 + seed, script=script, seed=seed, load=1.5)
            lines = []
            for number, line in enumerate((run / "log.jsonl").read_text().splitlines()):
                event = json.loads(line)
                if event["event"] == "train":
                    event["ms"] += 7.123 * (number * seed % 13)
                lines.append(json.dumps(event) + "\n")
            (run / "log.jsonl").write_text("".join(lines))
    return sorted(folder.iterdir())


def test_of_a_collection_the_same_is_said_as_of_its_folders(tmp_path, run_tool):
    folders = write_pairs(tmp_path / "log")
    collection.add(tmp_path / "kept", [reading.read_run(folder) for folder in folders])
    said = {}
    for name, given in {
        "folders": folders, "folder": [tmp_path / "kept"], "file": [tmp_path / "kept/runs.jsonl"],
    }.items():  # fmt: skip
        status, _ = run_tool(*given, "--out", tmp_path / name)
        assert status == 0
        said[name] = (tmp_path / name / "leaderboard.md").read_text()
    assert "2.3667 ± " in said["folders"] and "11.50 ± " not in said["folders"]
    assert said["folders"] == said["folder"] == said["file"]
    for folder in folders:
        shutil.rmtree(folder)
    bands = []
    for name in ("a.jsonl", "b.jsonl"):
        given = [tmp_path / "kept"] if name == "a.jsonl" else write_pairs(tmp_path / "log")
        status, _ = run_tool(*given, "--only", "gpt2", "--save_reference", tmp_path / name)
        assert status == 0
        bands.append((tmp_path / name).read_text())
    assert bands[0] == bands[1] and bands[0].count("\n") == 6


def test_collections_and_folders_together_and_a_run_that_is_in_both(tmp_path, run_tool):
    folders = write_pairs(tmp_path / "log")
    runs = [reading.read_run(folder) for folder in folders]
    collection.add(tmp_path / "kept", runs[:4])
    status, said = run_tool(tmp_path / "kept", *folders[3:], "--out", tmp_path / "report")
    assert status == 0 and rows(said)["1"][-1] == rows(said)["2"][-1] == "3", said
    twice = f"{tmp_path}/kept/train_llama-1 and {folders[3]} are one run, which counts once."
    assert said.count("are one run") == 1 and twice in said and "no second seed" not in said


def test_what_a_collection_knows_of_a_runs_study_its_folder_gets(tmp_path):
    folder = write_run(tmp_path / "log/a")
    run = reading.read_run(folder)
    run.study = {"name": "s", "size": "0.8M", "entry": "gpt2-rope", "base": None, "rate": 1.0}
    collection.add(tmp_path / "kept", [run])
    for order in ([folder, tmp_path / "kept"], [tmp_path / "kept", folder]):
        runs, _ = collection.read_all(order)
        (kept,), (line,) = reading.without_copies(runs)
        assert kept.folder == folder and len(kept.train) == 20 and kept.study == run.study
        assert line == f"{tmp_path}/kept/a and {folder} are one run, which counts once"


def test_a_damaged_line_of_a_collection_is_left_out(tmp_path, run_tool):
    folders = write_pairs(tmp_path / "log")
    collection.add(tmp_path / "kept", [reading.read_run(folder) for folder in folders])
    file = tmp_path / "kept/runs.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace("flops_per_token", "flops")
    file.write_text("".join(lines[:-1]) + lines[-1][:-200])
    status, said = run_tool(tmp_path / "kept", "--out", tmp_path / "report")
    assert status == 1 and said.endswith("2 of 6 runs were left out, see above\n")
    for number, why in ((2, "it lacks 'flops_per_token'"), (6, "or only part of one")):
        first = f"left out: {file}, line {number}: "
        (line,) = [line for line in said.splitlines() if line.startswith(first)]
        assert why in line
    assert f"| {file}, line 2 | is not a run of a collection: it lacks 'flops_per_token' |" in said


def test_only_some_architectures_are_compared(tmp_path, run_tool):
    folders = write_pairs(tmp_path / "log") + [write_run(tmp_path / "x", script="train_gpt2_rope")]
    status, said = run_tool(*folders, "--only", "llama", "gpt2-rope", "--out", tmp_path / "report")
    assert status == 0 and "| gpt2 |" not in said and "| llama |" in said and "| gpt2_rope |" in said
    assert "Only llama, gpt2-rope: p-values are corrected for the pairs of these alone. If they were" in said
    status, said = run_tool(*folders, "--only", "lama", "--out", tmp_path / "none")
    assert status == 1 and not (tmp_path / "none").exists()
    assert said == "--only lama: no run here has this name; there are gpt2, gpt2-rope, gpt2_rope, llama\n"


def test_the_reference_in_results_is_made_from_the_collections_there(tmp_path, run_tool):
    places = [ROOT / "results/demo", ROOT / "results/band"]
    status, said = run_tool(*places, "--only", "gpt2", "--save_reference", tmp_path / "x.jsonl")
    assert status == 0, said
    assert (tmp_path / "x.jsonl").read_text() == (ROOT / "results/gpt2-tiny.jsonl").read_text()


# ---- bits per byte


class Pieces:
    """As much of GPT-2's tokenizer as is asked for: 50,257 tokens of one to four bytes."""

    n_vocab = 50257
    eot_token = 50256

    def decode_single_token_bytes(self, token):
        return b"<|endoftext|>" if token == self.eot_token else b"x" * (1 + token % 4)


def write_gpt2_shard(folder, tokens):
    """A dataset without a manifest, as llm.c writes it; returns its fingerprint."""
    folder.mkdir()
    for split in ("val", "train"):
        content = fineweb.shard_header(len(tokens)) + np.array(tokens, dtype=np.uint16).tobytes()
        (folder / f"x_{split}_000000.bin").write_bytes(content)
    return fineweb.open_dataset(folder)["fingerprint"]


def test_times_of_two_machines_are_said_not_to_compare(tmp_path, run_tool):
    runs = [reading.read_run(write_run(tmp_path / str(seed), seed=seed)) for seed in (1, 2)]
    for second in ("here", "there"):
        runs[0].machine = "here"
        runs[1].machine = second
        collection.add(tmp_path / second, runs)
    said = run_tool(tmp_path / "there", "--out", tmp_path / "report")[1]
    assert "Not all of these runs were trained on one machine: their tokens/s" in said
    assert "one machine" not in run_tool(tmp_path / "here", "--out", tmp_path / "report")[1]


def test_a_byte_is_a_token_of_a_model_of_bytes(tmp_path, run_tool):
    status, said = run_tool(write_run(tmp_path / "a", losses=(5.0, 2.0)), "--out", tmp_path / "report")
    assert status == 0 and rows(said)["1"][1:3] == ["2.0000", f"{2 / math.log(2):.4f}"]
    assert "Bits per byte of" not in said


def test_the_bytes_of_gpt2s_tokens_are_counted(tmp_path, run_tool, monkeypatch):
    monkeypatch.setattr(fineweb, "get_tokenizer", lambda name: Pieces())
    # two windows of four predictions are validated: all tokens but the first, and the last two
    tokens = [7, 0, 1, 50256, 3, 2, 3, 3, 1, 3, 3]
    fingerprint = write_gpt2_shard(tmp_path / "data", tokens)
    data = {"dataset": "d", "tokenizer": "gpt2", "vocab_size": 50257, "fingerprint": fingerprint}
    fields = dict(data_dir=str(tmp_path / "data"), block_size=4, val_tokens=8)
    folder = write_run(tmp_path / "a", losses=(5.0, 2.0), facts={"data": data}, **fields)
    n_bytes = (1 + 2 + 1 + 4 + 3 + 4 + 4 + 2) / 8
    status, said = run_tool(folder, "--out", tmp_path / "report")
    assert status == 0 and rows(said)["1"][2] == f"{2 / math.log(2) / n_bytes:.4f}"
    # a collection remembers it where the data are no longer
    collection.add(tmp_path / "kept", [reading.read_run(folder)])
    shutil.rmtree(tmp_path / "data")
    reading.count_bytes.cache_clear()
    status, said = run_tool(tmp_path / "kept", "--out", tmp_path / "report")
    assert status == 0 and rows(said)["1"][2] == f"{2 / math.log(2) / n_bytes:.4f}"
    status, said = run_tool(folder, "--out", tmp_path / "report")
    assert status == 0 and rows(said)["1"][2] == "–"
    assert f"Bits per byte of gpt2 are not known: the tokens are not here, in {tmp_path}/data." in said


def test_why_the_bytes_are_not_known_is_said(tmp_path, run_tool, monkeypatch):
    fingerprint = write_gpt2_shard(tmp_path / "data", [1] * 20)
    fields = dict(data_dir=str(tmp_path / "data"), block_size=4, val_tokens=8)
    data = {"dataset": "d", "tokenizer": "gpt2", "vocab_size": 50257}
    other = write_run(tmp_path / "a", facts={"data": data | {"fingerprint": "other"}}, **fields)
    status, said = run_tool(other, "--out", tmp_path / "report")
    assert status == 0 and rows(said)["1"][2] == "–"
    assert f"Bits per byte of gpt2 are not known: {tmp_path}/data holds other tokens than theirs." in said

    def no_network(name):
        raise SystemExit("GPT-2's vocabulary can't be loaded")

    monkeypatch.setattr(fineweb, "get_tokenizer", no_network)
    ours = write_run(tmp_path / "b", facts={"data": data | {"fingerprint": fingerprint}}, **fields)
    status, said = run_tool(ours, "--out", tmp_path / "report")
    assert status == 0 and "Bits per byte of gpt2 are not known: GPT-2's vocabulary can't be loaded." in said


# ---- studies


def make_study(entries, sizes=("0.8M",), seeds=(1, 2, 3), rates=(1.0,)):
    """Runs of a study without files, for each entry: (its name, its script, its base)."""
    runs = []
    for size in sizes:
        for number, (entry, script, base) in enumerate(entries):
            for rate in rates:
                for seed in seeds:
                    loss = 3.0 + 0.1 * number + 0.01 * seed**2 * (number + 1) + 0.2 * abs(rate - 1)
                    folder = f"log/s-{size}-{entry}-x{rate:g}-{seed}"
                    n_layer = 4 if size == "0.8M" else 2
                    run = make_run(script, folder, seed=seed, loss=loss, max_lr=2e-3 * rate,
                                   min_lr=2e-4 * rate, n_layer=n_layer, window=number,
                                   run_name=folder)  # fmt: skip
                    run.study = {"name": "s", "size": size, "entry": entry, "base": base, "rate": rate}
                    runs.append(run)
    return runs


SOME = [("gpt2", "train_gpt2", None), ("wide", "train_gpt2", "gpt2"), ("deep", "train_llama", "gpt2")]


def test_the_pools_of_a_study_have_the_names_of_its_entries():
    runs = make_study(SOME, rates=(0.5, 1.0)) + [make_run("train_gpt2", "log/mine")]
    names = {pool.name: len(pool.runs) for pool in compare.pool_runs(runs)}
    plain = {"gpt2": 3, "wide": 3, "deep": 3}
    slow = {f"{name}, rate x0.5": 3 for name in plain}
    plain["gpt2, 0.8M"] = plain.pop("gpt2")
    assert names == plain | slow | {"gpt2": 1}  # gpt2 alone is that of no study
    # nothing but their place tells these apart
    same = make_study([("a", "train_gpt2", None)], seeds=(1,))
    same += make_study([("b", "train_gpt2", "a")], seeds=(1,))
    assert sorted(pool.name for pool in compare.pool_runs(same)) == ["a", "b"]


def test_a_study_comes_first_and_has_one_leaderboard_for_each_size(tmp_path, monkeypatch):
    drawn = {}

    def draw(folder, pools, keys, prefix):
        drawn[prefix] = sorted(pool.name for pool in pools)
        (folder / f"{prefix}loss.png").write_bytes(b"a picture")
        return [(f"{prefix}loss.png", "the losses")]

    monkeypatch.setattr(compare, "draw", draw)
    runs = make_study(SOME, sizes=("2.7M", "0.8M"), rates=(0.5, 1.0))
    runs += [make_run("train_gpt2", f"log/mine-{seed}", seed=seed) for seed in (1, 2)]
    said = compare.report(tmp_path, runs, [])
    assert said.count("| rank | architecture |") == 3
    places = [said.index(text) for text in (
        "## Study s at 0.8M", "| against gpt2 |", "<summary>s at 0.8M: all of it, ranked</summary>",
        "| rank |", "<summary>s at 2.7M: all of it, ranked</summary>", "## Runs of no study",
        "gpt2 alone is ranked",
    )]  # fmt: skip
    assert places == sorted(places)
    ranked = said.split("<summary>s at 2.7M: all of it, ranked</summary>")[1].split("## Runs of no study")[0]
    board = rows(ranked)
    assert [board[place][0] for place in "123"] == ["gpt2", "wide", "deep"]
    apart = "(gpt2, rate x0.5), (wide, rate x0.5), (deep, rate x0.5)"
    assert f"Not ranked with them: {apart}, because max_lr is 0.001, not 0.002; min_lr is " in ranked
    entries = ["deep", "gpt2", "wide"]
    assert drawn == {"s_at_0.8M_": entries, "s_at_2.7M_": entries, "": ["gpt2"]}
    assert (tmp_path / "effects_s_0.8M.png").stat().st_size > 5000
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == said.count("![") == 7


def test_the_pairs_of_many_entries_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "draw", lambda *given: [("x.png", "x")])
    (tmp_path / "x.png").write_bytes(b"x")
    for count, shown in ((10, True), (11, False)):
        entries = [("base", "train_gpt2", None)]
        entries += [(f"e{number}", "train_llama", "base") for number in range(1, count)]
        said = compare.report(tmp_path, make_study(entries, seeds=(1, 2)), [])
        assert f"Of {verdicts.NUMBERS[count]}, base has the lowest validation loss" in said
        assert ("this one's loss is" in said) == ("All pairs" in said) == ("x.png" in said) == shown
        assert ("more than 10 are too many to be seen" in said) != shown


def test_pictures_of_an_earlier_report_go_and_nothing_else(tmp_path, monkeypatch):
    def draw(folder, pools, keys, prefix):
        (folder / f"{prefix}loss.png").write_bytes(b"a picture")
        return [(f"{prefix}loss.png", "the losses")]

    monkeypatch.setattr(compare, "draw", draw)
    runs = make_study(SOME, sizes=("2.7M", "0.8M"))
    mine = [make_run("train_gpt2", "log/mine-1", seed=1)]
    (tmp_path / "mine.png").write_bytes(b"a user's")
    compare.report(tmp_path, runs + mine, [])
    before = {path.name for path in tmp_path.glob("*.png")}
    assert {"s_at_2.7M_loss.png", "s_at_0.8M_loss.png", "effects_s_0.8M.png", "loss.png"} < before
    compare.report(tmp_path, [run for run in runs if run.study["size"] == "2.7M"], [])
    after = {path.name for path in tmp_path.glob("*.png")}
    assert after == {"s_at_2.7M_loss.png", "effects_s_2.7M.png", "mine.png"}


def test_of_a_study_what_is_folded_away_is_not_printed(tmp_path, run_tool):
    runs = []
    for seed in (1, 2):
        for entry, loss in (("gpt2", 3.0), ("wide", 2.9)):
            layers = 4 if entry == "wide" else 3
            folder = write_run(tmp_path / "log" / f"{entry}-{seed}", (5.0, loss), seed=seed, n_layer=layers)
            run = reading.read_run(folder)
            base = "gpt2" if entry == "wide" else None
            run.study = {"name": "s", "size": "0.8M", "entry": entry, "base": base, "rate": 1.0}
            runs.append(run)
    collection.add(tmp_path / "kept", runs)
    status, said = run_tool(tmp_path / "kept", "--out", tmp_path / "report")
    assert status == 0 and "| against gpt2 |" in said and "| wide |" in said
    assert "| rank |" not in said and "| rank |" in (tmp_path / "report/leaderboard.md").read_text()
    status, said = run_tool(tmp_path / "kept", "--only", "gpt2", "--out", tmp_path / "report")
    assert status == 0 and "| wide |" not in said


def test_sizes_of_a_study_are_not_ranked_together():
    runs = make_study(SOME[:1], sizes=("0.8M", "2.7M"))
    (small, _), (large, reasons) = compare.fair_groups(compare.pool_runs(runs))
    assert [pool.name for pool in small + large] == ["gpt2, 0.8M", "gpt2, 2.7M"]
    assert reasons == ["its size in its study is 2.7M", "the size of those above in their study is 0.8M"]


# ---- equal conditions


def make_run(script, folder="log/x", script_hash=None, seed=1, loss=3.0, **fields):
    """A finished Run without files. fields: of its config, where they are not the shared ones."""
    own = importlib.import_module(script)
    config = {**vars(own.Config(max_steps=20, seed=seed)), **fields}
    facts = {
        "script": script, "config": config, "parameters": 1000, "flops_per_token": 2000.0, "processes": 1,
        "data": {"tokenizer": "bytes", "fingerprint": fields.pop("fingerprint", "f")},
    }  # fmt: skip
    val = {0: 5.0, config["max_steps"]: loss}
    return reading.Run(Path(folder), facts, script_hash, [], {}, val, {}, {})


def names_of(runs):
    """The groups that runs fall into, as lists of sorted names."""
    return [sorted(pool.name for pool in group) for group, _ in compare.fair_groups(compare.pool_runs(runs))]


def test_runs_that_started_from_other_weights_are_ranked_apart(tmp_path, run_tool):
    write_run(tmp_path / "a", n_layer=1)
    write_run(tmp_path / "b", n_layer=2, init_from="")
    write_run(tmp_path / "c", n_layer=3, init_from="log/x/step_000010.pt", losses=(3.0, 2.0, 1.0))
    status, said = run_tool(*sorted(tmp_path.iterdir()), "--out", tmp_path / "report")
    main, apart = said.split("## Not comparable with those above")
    assert status == 0 and "n_layer 1" in main and "n_layer 2" in main and "n_layer 3" not in main
    assert "Ranked apart, because it started from the weights in log/x/step_000010.pt." in apart


def test_logs_from_before_init_from_pool_with_todays(tmp_path):
    today = vars(SCRIPT.Config(max_steps=20, seed=1))
    assert today["init_from"] == ""
    older = {name: value for name, value in today.items() if name != "init_from"} | {"seed": 2}
    tuned = today | {"init_from": "x.pt", "seed": 3}
    folders = []
    for name, config in (("today", today), ("older", older), ("tuned", tuned)):
        folders.append(write_run(tmp_path / name, own=config))
    pools = compare.pool_runs([reading.read_run(folder) for folder in folders])
    assert sorted(len(pool.runs) for pool in pools) == [1, 2]
    assert {pool.name for pool in pools} == {"gpt2, init_from ", "gpt2, init_from x.pt"}


def test_groups_do_not_depend_on_the_order_of_the_runs():
    runs = [
        make_run("train_rwkv", "log/rwkv", **RWKV.RECIPE),
        make_run("train_gpt2", "log/gpt2"),
        make_run("train_llama", "log/llama", weight_decay=0.01),
        make_run("train_gemma", "log/gemma", beta2=0.999),
    ]
    for order in itertools.permutations(runs):
        assert names_of(order) == [["gpt2", "rwkv"], ["gemma"], ["llama"]]


def random_run(rng, number):
    """A run with fields that are the shared ones, its paper's, another paper's or nobody's."""
    script = rng.choice(["train_gpt2", "train_llama", "train_rwkv"])
    fields = {"recipe": rng.choice(["paper", "shared"]), "block_size": rng.choice([128, 128, 256])}
    for name in ("beta2", "adam_eps", "max_lr"):
        shared = getattr(SCRIPT.Config, name)
        fields[name] = rng.choice([shared, shared, RWKV.RECIPE[name], 0.5])
    return make_run(script, f"log/{number}", loss=rng.random(), **fields)


def test_equal_conditions_are_an_equivalence():
    rng = random.Random(0)
    runs = [random_run(rng, number) for number in range(60)]
    alike = {(a, b): not compare.unlike(runs[a], runs[b]) for a in range(60) for b in range(60)}
    assert 60 < sum(alike.values()) < 60 * 60 / 2
    for (a, b), equal in alike.items():
        assert alike[a, a] and equal == alike[b, a]
        for c in range(60):
            if equal and alike[b, c]:
                assert alike[a, c]
    groups = names_of(runs)
    for _ in range(5):
        rng.shuffle(runs)
        assert names_of(runs) == groups
    # the one exemption: a run's own paper's value counts as the shared one
    assert not compare.unlike(make_run("train_rwkv", beta2=0.99), make_run("train_gpt2"))
    assert compare.unlike(make_run("train_rwkv", beta2=0.99, recipe="shared"), make_run("train_gpt2"))
    assert compare.unlike(make_run("train_gpt2", beta2=0.99), make_run("train_rwkv", beta2=0.99))


def test_what_a_paper_prescribes_is_in_the_row(tmp_path, run_tool):
    config = {**vars(RWKV.Config()), **RWKV.RECIPE, "max_lr": 3e-3, "min_lr": 6e-5, "max_steps": 20}
    write_run(tmp_path / "rwkv", script="train_rwkv", own={**config, "warmup_steps": 715})
    write_run(tmp_path / "shared", script="train_rwkv", own={**vars(RWKV.Config()), "max_steps": 20})
    write_run(tmp_path / "gpt2", max_lr=3e-3, min_lr=6e-5)
    status, said = run_tool(*sorted(tmp_path.iterdir()), "--out", tmp_path / "report")
    assert status == 0
    main, apart = said.split("## Not comparable")
    assert "| rwkv (rwkv) (its paper's beta2 0.99, adam_eps 1e-18) |" in main and "| gpt2 |" in main
    assert "| rwkv (shared) |" in apart and "max_lr is 0.0006, not 0.003" in apart
    assert said.count("--recipe shared") == 1


def test_seeds_may_differ():
    runs = [make_run("train_gpt2", f"log/g{seed}", seed=seed) for seed in (1, 2, 3)]
    runs += [make_run("train_llama", f"log/l{seed}", seed=seed) for seed in (4, 5)]
    ((group, _),) = compare.fair_groups(compare.pool_runs(runs))
    (pair,) = verdicts.compare_pairs(group, None)
    assert pair.loss.how == "Welch, 3 and 2 seeds"


def test_names_say_what_differs():
    def names(*runs):
        return sorted(pool.name for pool in compare.pool_runs(runs))

    few = make_run("train_llama", "log/a", n_head=12, n_kv_head=12)
    plain = make_run("train_llama", "log/b", n_head=12, n_kv_head=3)
    assert names(few) == ["llama"]
    assert names(few, plain) == ["llama, n_kv_head 12", "llama, n_kv_head 3"]
    third = make_run("train_llama", "log/c", n_head=12, n_kv_head=3, n_layer=2, n_embd=96)
    assert names(few, plain, third) == ["llama (a)", "llama (b)", "llama (c)"]  # three fields: too long
    today = fineweb.script_hash(ROOT / "train_llama.py")
    edited = make_run("train_llama", "log/d", script_hash="0123")
    assert names(edited) == ["llama"]
    assert names(edited, make_run("train_llama", script_hash=today)) == ["llama", "llama, edited script"]
    # the recipe stands for the fields that it sets
    paper = make_run("train_rwkv", "log/e", **RWKV.RECIPE)
    shared = make_run("train_rwkv", recipe="shared")
    assert names(paper, shared) == ["rwkv, recipe paper", "rwkv, recipe shared"]


# ---- logs of other versions


@pytest.mark.parametrize("field", ["temperature", "top_k", "samples", "prompt"])
def test_a_field_of_sampling_that_was_added_later_orphans_nothing(field, tmp_path, run_tool):
    new = vars(SCRIPT.Config(max_steps=10, seed=1)) | {field: 3}
    old = {name: value for name, value in new.items() if name != field} | {"seed": 2}
    write_run(tmp_path / "new", own=new, losses=(5.0, 3.0))
    write_run(tmp_path / "old", own=old, losses=(5.0, 4.0))
    status, said = run_tool(tmp_path / "old", tmp_path / "new", "--out", tmp_path / "report")
    assert status == 0 and "3.5000 ± " in said and rows(said)["1"][-1] == "2", said


def test_a_log_without_todays_fields_or_with_others_is_ranked(tmp_path, run_tool):
    today = vars(SCRIPT.Config(max_steps=20))
    older = {name: value for name, value in today.items() if name not in ("recipe", "eval_every", "dtype")}
    shape = dict(n_layer=1, n_head=2, n_embd=16, vocab_size=257, block_size=32)
    parameters, _ = count_parameters(SCRIPT, SCRIPT.Config(**shape))
    facts = {"parameters": parameters}
    write_run(tmp_path / "older", own={**older, **shape, "a_field_of_old": 3}, facts=facts)
    write_run(tmp_path / "today", n_layer=3, losses=(5.0, 4.0, 2.9), block_size=32)
    status, said = run_tool(tmp_path / "older", tmp_path / "today", "--out", tmp_path / "report")
    assert status == 0 and "Not comparable" not in said, said
    board = rows(said)
    assert board["1"][0] == "gpt2 (today)" and board["2"][0] == "gpt2 (older)"
    assert board["2"][4:6] == [f"{parameters:,}"] * 2  # known in spite of the other fields


def test_a_script_that_can_not_be_imported_is_named(tmp_path, run_tool, monkeypatch):
    (tmp_path / "train_broken.py").write_text("class Config\n")
    monkeypatch.syspath_prepend(tmp_path)
    write_run(tmp_path / "mine", script="train_broken")
    status, said = run_tool(tmp_path / "mine", "--out", tmp_path / "report")
    assert status == 0 and rows(said)["1"][0] == "broken"
    assert "broken: its script train_broken.py can't be imported: SyntaxError: " in said


# ---- the same items


def set_items(folder, labels):
    """Gives a run's newest predictions other right answers, with as many items as they had."""
    path = folder / "cloze_nanogpt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": labels}))
    return folder


def test_accuracies_are_compared_over_the_same_items_only(tmp_path, run_tool):
    write_run(tmp_path / "a", script="train_gpt2", right=100)
    write_run(tmp_path / "b", script="train_llama", right=150)
    write_run(tmp_path / "c", script="train_mistral", right=250, n=1000)
    set_items(write_run(tmp_path / "d", script="train_gemma", right=150), "01" * 200)
    (write_run(tmp_path / "e", script="train_mta", right=160) / "cloze_nanogpt.json").unlink()
    status, said = run_tool(*sorted(tmp_path.iterdir()), "--out", tmp_path / "report", pictures=True)
    assert status == 0, said
    board = {row[0]: row[3] for row in rows(said).values() if len(row) == 14}
    assert board["gpt2"].startswith("25.00 ± ") and board["llama"].startswith("37.50 ± ")
    assert board["mistral"] == board["gemma"] == "–"
    assert board["mta"].startswith("40.00 ± ")  # 400 items, as far as is known these
    line = ("cloze (nanogpt) acc_norm is compared over the same 400 items; gemma has 400 others, mistral has "
            "1,000 others: hence “–”.")  # fmt: skip
    assert said.count(line) == 1
    pairs = rows(said)
    assert pairs["gpt2 – llama"][-2].startswith("-12.50 ± ")
    assert pairs["gemma – gpt2"][-2:] == pairs["gpt2 – mistral"][-2:] == ["–", "–"]


def test_seeds_with_other_items_have_no_accuracy(tmp_path, run_tool):
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", right=100, seed=seed)
        write_run(tmp_path / f"b{seed}", script="train_llama", right=150, seed=seed)
    set_items(tmp_path / "b2", "01" * 200)
    status, said = run_tool(*sorted(tmp_path.iterdir()), "--out", tmp_path / "report")
    assert status == 0 and "; the seeds of llama have different ones: hence “–”." in said
    assert sorted(row[3] for row in rows(said).values() if len(row) == 14)[-1] == "–"


# ---- edited scripts and repeated runs


def with_script(folder, *texts):
    """Puts copies of a script into a run's folder, the last one as what it ran; returns the folder."""
    for text in texts:
        script = folder.parent / "train_gpt2.py"
        script.write_text(text)
        fineweb.keep_copy(script, folder)
        script_hash = fineweb.script_hash(script)
        script.unlink()
    lines = (folder / "log.jsonl").read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "script_hash": script_hash})
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("has_diff", [True, False])
def test_an_edited_script_is_another_model(has_diff, tmp_path, run_tool, monkeypatch):
    if not has_diff:
        monkeypatch.setattr(compare.shutil, "which", lambda name: None)
    original = (ROOT / "train_gpt2.py").read_text()
    edited = original.replace("import argparse\n", "import argparse\nimport abc\n")
    edited = edited.replace("B batch", "B rows")
    log = tmp_path / "log"
    with_script(write_run(log / "a1", seed=1), original)
    with_script(write_run(log / "a2", seed=2), "something else\n", original)
    with_script(write_run(log / "b", seed=3, losses=(5.0, 4.0, 2.0)), edited)
    with_script(write_run(log / "c", seed=3, n_layer=5), original)
    gone = with_script(write_run(log / "d", seed=4), "no copy of this\n")
    (gone / "train_gpt2.py").unlink()
    write_run(log / "old", seed=5)
    status, said = run_tool(*sorted(log.iterdir()), "--out", tmp_path / "report")
    assert status == 0, said
    board, differs = said.split("## What differs")
    differs = rows(differs)
    name = "gpt2, n_layer 12"
    unknown = "perhaps another script: one of the two logs doesn't say"
    assert differs == {
        "run": ["beside", "what differs", "its folders"],
        "---": ["---"] * 3,
        f"{name}, edited script (b)": [f"{name} (a1)", "edited script, 3 lines", str(log / "b")],
        "gpt2, n_layer 5": [f"{name} (a1)", "n_layer 5, not 12", str(log / "c")],
        f"{name}, edited script (d)": [f"{name} (a1)", "edited script", str(log / "d")],
        f"{name} (old)": [f"{name} (a1)", unknown, str(log / "old")],
    }
    ranked = [line.split("|") for line in board.splitlines()]
    seeds = {cells[2].strip(): cells[-2].strip() for cells in ranked if len(cells) == 17}
    assert seeds[f"{name} (a1)"] == "2" and seeds[f"{name}, edited script (b)"] == "1"


def test_an_older_log_has_its_script_by_the_copy(tmp_path):
    with_script(write_run(tmp_path / "new", seed=1), "one\n")
    old = write_run(tmp_path / "old", seed=2)
    for name, text in (("train_gpt2.py", "two\n"), ("train_gpt2.2.py", "one\n")):
        (old / name).write_text(text)
    (pool,) = compare.pool_runs([reading.read_run(tmp_path / name) for name in ("new", "old")])
    assert pool.name == "gpt2" and len(pool.runs) == 2


def test_a_script_that_was_edited_midway(tmp_path):
    folder = with_script(write_run(tmp_path / "a"), "one\n")
    add(folder, {"config": {}, "script_hash": "another"}, {"event": "train", "step": 20, "ms": 1.0},
        {"event": "val", "step": 20, "loss": 2.0})  # fmt: skip
    run = reading.read_run(folder)
    assert run.changed == ["the script"] and run.script_hash == "another"


def test_a_repeated_seed_is_no_second_seed(tmp_path, run_tool):
    write_run(tmp_path / "a", seed=1, losses=(5.0, 4.0), facts={"time": 1.0}, run_name="a")
    write_run(tmp_path / "again", seed=1, losses=(5.0, 3.0), facts={"time": 2.0}, device="cpu")
    write_run(tmp_path / "begun", seed=1, losses=(5.0,), facts={"time": 3.0}, max_steps=10)
    write_run(tmp_path / "b", seed=2, losses=(5.0, 4.0))
    folders = sorted(tmp_path.iterdir())
    for order in (folders, folders[::-1], [*folders, folders[0]]):
        status, said = run_tool(*order, "--out", tmp_path / "report")
        assert status == 0, said
        for name, why in (("a", "is newer"), ("begun", "finished")):
            line = f"{tmp_path / name} is no second seed: it has seed 1 and all else in common with "
            assert line + f"{tmp_path / 'again'}, which {why}." in said
        assert "3.5000 ± " in said and rows(said)["1"][-1] == "2" and "2" not in rows(said)


# ---- reference bands


def test_inside_and_outside_of_a_reference(tmp_path, run_tool):
    runs = []
    for seed, last in enumerate((3.00, 3.01, 3.02)):
        runs.append(write_run(tmp_path / f"r{seed}", losses=(5.0 + 0.01 * seed, last), seed=seed))
    reference = tmp_path / "results/reference.jsonl"
    assert run_tool(*runs, "--save_reference", reference)[0] == 0
    lines = [json.loads(line) for line in reference.read_text().splitlines()]
    assert lines[1]["loss"] == pytest.approx(3.01) and lines[1]["sd"] == pytest.approx(0.01)
    # t of 2 degrees of freedom at 1 - 0.05 / (2 sides x 2 steps), and the spread of one more run beside three
    assert lines[1]["high"] - 3.01 == pytest.approx(6.20535 * 0.01 * math.sqrt(4 / 3), rel=1e-5)
    mine = write_run(tmp_path / "mine", losses=(5.01, 3.05))
    status, said = run_tool(mine, "--against", reference)
    assert status == 0 and said.startswith(f"{mine}: inside the band at all 2 steps\n")
    # the same with other conditions, which comes first
    faster = write_run(tmp_path / "faster", losses=(5.01, 3.01), max_lr=1e-3, fingerprint="g")
    status, said = run_tool(faster, "--against", reference)
    first, second = said.splitlines()[:2]
    assert status == 0 and second == f"{faster}: inside the band at all 2 steps"
    assert first == (f"{faster} had other conditions than the reference, so that the answer means little: "
                     "data g, not f; max_lr 0.001, not 0.0006")  # fmt: skip
    tuned = write_run(tmp_path / "tuned", losses=(5.01, 3.01), init_from="x.pt")
    for older in (False, True):  # a reference from before there were other weights to start from
        if older:
            reference.write_text(reference.read_text().replace('"weights": "", ', ""))
        status, said = run_tool(tuned, "--against", reference)
        assert status == 0 and said.splitlines()[0].endswith("little: it started from the weights in x.pt")
        assert "other conditions" not in run_tool(mine, "--against", reference)[1]
    bad = write_run(tmp_path / "bad", losses=(5.01, 3.2, 3.1))
    status, said = run_tool(bad, "--against", reference)
    assert status == 1 and f"{bad}: outside at 1 of 2 steps: step 10\n" in said and "OUTSIDE" in said
    (tmp_path / "nonsense").write_text("no")
    status, said = run_tool(tmp_path / "bad", "--against", tmp_path / "nonsense")
    assert status == 1 and "is not a reference" in said


def test_a_reference_of_one_run_says_that_its_band_is_a_guess(tmp_path, run_tool):
    reference = tmp_path / "reference.jsonl"
    status, said = run_tool(write_run(tmp_path / "a"), "--save_reference", reference)
    assert status == 0 and "One run doesn't say how far another seed is from it: the band is 1%" in said
    assert run_tool(write_run(tmp_path / "b", losses=(5.04, 4.0, 3.0)), "--against", reference)[0] == 0
    assert run_tool(write_run(tmp_path / "c", losses=(5.06, 4.0, 3.0)), "--against", reference)[0] == 1


@pytest.mark.parametrize("n, steps", [(3, 5), (3, 20), (5, 20), (8, 20)])
def test_a_fresh_run_is_inside_the_band_at_all_steps(n, steps):
    """Random walks around a mean: a step's loss hangs on those before it, as a run's does."""
    rng = np.random.default_rng(1)
    studies = 400
    inside = 0
    worse_inside = 0
    for _ in range(studies):
        curves = 100 + rng.normal(size=(n + 1, steps)).cumsum(axis=1)
        lines = compare.reference_lines([dict(enumerate(curve)) for curve in curves[:n].tolist()])
        low = np.array([line["low"] for line in lines])
        high = np.array([line["high"] for line in lines])
        fresh = curves[n]
        worse = fresh + 10 * np.sqrt(np.arange(1, steps + 1))  # ten standard deviations
        inside += np.all((low <= fresh) & (fresh <= high))
        worse_inside += np.all((low <= worse) & (worse <= high))
    print(f"inside: {inside / studies:.1%}, of the worse ones {worse_inside / studies:.1%}")
    assert inside >= 0.94 * studies
    assert inside < studies  # a band that all are inside of would say nothing
    if n == 8:
        assert worse_inside == 0


# ---- the README's tables


def test_a_script_of_ones_own_is_not_in_the_readmes_table_and_that_is_said(tmp_path, monkeypatch, capsys):
    for path in (ROOT / "train_gpt2.py", ROOT / "train_deepseek.py"):
        shutil.copy(path, tmp_path / path.name)
    shutil.copy(ROOT / "train_gpt2.py", tmp_path / "train_mine.py")
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    monkeypatch.setattr(table, "siblings", lambda: [tmp_path / "train_deepseek.py"])
    monkeypatch.setattr(table, "DIFFERENCE", {"gpt2": "The reference"})
    made = rows(table.architectures())
    assert "train_mine.py: not in the README's table, which has the 7 of" in capsys.readouterr().err
    assert "train_mine" not in str(made)
    gpt2 = made["[`train_gpt2.py`](train_gpt2.py)"]
    deepseek = made["[`train_deepseek.py`](train_deepseek.py)"]
    assert gpt2[:4] == ["124,475,904", "124.5 M", "124.5 M", "39.4 M"] and gpt2[-1] == "The reference"
    assert deepseek[:4] == ["124,317,312", "116.1 M", "71.2 M", "32.2 M"]
    first_line = importlib.import_module("train_deepseek").__doc__.strip().splitlines()[0]
    assert deepseek[-1] == first_line  # for lack of words on it


def test_the_parameters_and_the_name_of_a_run(tmp_path):
    (deepseek,) = compare.pool_runs([run for run in collection.read(DEMO) if run.architecture == "deepseek"])
    assert compare.parameter_cells(deepseek.first)[:4] == ["927,072", "703,104", "558,432", "32,896"]
    config = {**vars(RWKV.Config()), **RWKV.RECIPE, "max_steps": 20}
    folder = write_run(tmp_path / "rwkv", script="train_rwkv", own=config)
    (rwkv,) = compare.pool_runs([reading.read_run(folder)])
    name = compare.name_cell(rwkv)
    assert name.startswith("rwkv (its paper's ") and "beta2 0.99" in name
    assert compare.parameter_cells(rwkv.first)[:4] == ["1,000", "–", "–", "–"]  # no such model


@pytest.mark.parametrize("program", [compare, findings, table])
def test_help_fits_a_terminal(program, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [program.__name__, "--help"])
    with pytest.raises(SystemExit):
        program.main()
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80
