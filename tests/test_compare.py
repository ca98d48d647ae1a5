"""The comparison of runs, on logs whose answers are known."""
import importlib
import json
import math
import sys

import pytest
from conftest import ROOT

from tools import compare

SCRIPT = importlib.import_module("train_gpt2")
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


def test_sign_test_against_values_worked_by_hand():
    # 1 win, 7 losses: 2 (C(8,0) + C(8,1)) / 2^8 = 18 / 256
    assert compare.sign_test([1] + [0] * 7 + [1, 0], [0] + [1] * 7 + [1, 0]) == pytest.approx(18 / 256)
    # 10 and 25 of 35 discordant
    assert compare.sign_test([1] * 10 + [0] * 25, [0] * 10 + [1] * 25) == pytest.approx(0.0166738, abs=1e-7)
    assert compare.sign_test([1, 0], [1, 0]) == 1.0
    assert compare.sign_test([1, 0], [0, 1]) == 1.0
    assert 0 < compare.sign_test([1] * 900 + [0] * 1100, [0] * 900 + [1] * 1100) < 1e-4  # no overflow
    wins, n = 40, 100
    exact = 2 * sum(math.comb(n, k) for k in range(wins + 1)) / 2**n
    assert compare.sign_test([1] * 40 + [0] * 60, [0] * 40 + [1] * 60) == pytest.approx(exact)


def test_holm_by_hand():
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert compare.holm([0.5]) == [0.5]
    assert compare.holm([0.9, 0.8]) == [1.0, 1.0]


def test_welch_by_hand():
    # means 2 and 5, variances 1 and 1 with n = 3 each: 4 degrees of freedom, where t is 2.77645
    difference, width = compare.welch([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert difference == -3
    assert width == pytest.approx(2.77645 * math.sqrt(2 / 3), rel=1e-5)
    assert compare.welch([1.0], [2.0, 3.0]) == (-1.5, None)
    assert compare.welch([2.0, 2.0], [1.0, 1.0]) == (1.0, 0.0)


# ---- the report


def test_a_real_difference_and_one_that_is_none(tmp_path, run_tool):
    write_run(tmp_path / "a", right=200, n_layer=1)
    write_run(tmp_path / "b", right=260, n_layer=2, losses=(5.0, 4.0, 2.5))
    write_run(tmp_path / "c", right=264, n_layer=3, losses=(5.0, 4.0, 2.4))
    folders = [tmp_path / name for name in "abc"]
    status, said = run_tool(*folders, "--out", tmp_path / "report", pictures=True)
    assert status == 0, said
    pairs = rows(said)
    loss, accuracy, p, verdict = pairs["gpt2 (a) – gpt2 (b)"]
    assert loss == "+0.5000 (one seed: no interval)"
    assert accuracy == "-15.00" and verdict == "worse"
    assert float(p) < 1e-10
    loss, accuracy, p, verdict = pairs["gpt2 (b) – gpt2 (c)"]
    assert verdict == "not distinguishable"  # 4 items to none: p = 1/8 even uncorrected
    assert float(p) == pytest.approx(0.125)
    assert [pairs[rank][0] for rank in "123"] == ["gpt2 (c)", "gpt2 (b)", "gpt2 (a)"]
    names = {path.name for path in (tmp_path / "report").iterdir()}
    pictures = {"loss_tokens", "loss_flops", "loss_time", "cloze_nanogpt", "cloze_nanogpt_bars"}
    assert names == {"leaderboard.md", "index.html"} | {f"{picture}.png" for picture in pictures}
    page = (tmp_path / "report/index.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "http" not in page
    assert page.count("<table>") == 3 and "<strong>gpt2 (a)</strong>" in page
    assert "not distinguishable" in page


def test_seeds_are_pooled(tmp_path, run_tool):
    for seed, (a, b) in enumerate(((3.0, 2.0), (3.1, 2.1), (3.2, 2.2))):
        write_run(tmp_path / f"a{seed}", losses=(5.0, a), seed=seed, n_layer=1, right=100)
        write_run(tmp_path / f"b{seed}", losses=(5.0, b), seed=seed, n_layer=2, right=100 + 40 * (seed == 1))
    folders = sorted(tmp_path.iterdir())
    status, said = run_tool(*folders, "--out", tmp_path / "report")
    assert status == 0 and "3.1000 ± 0.1000" in said and "2.1000 ± 0.1000" in said
    width = 2.77645 * math.sqrt(2 * 0.01 / 3)
    assert f"+1.0000 ± {width:.4f}" in said
    table = rows(said)
    assert table["1"][-1] == table["2"][-1] == "3"  # seeds
    assert "3" not in table
    # forty items were right in one seed of b and in none of a: forty wins to none
    assert f"{2 / 2**40:.3g}" in said


def test_unfair_runs_are_ranked_apart_with_the_reason(tmp_path, run_tool):
    write_run(tmp_path / "a", n_layer=1)
    write_run(tmp_path / "b", n_layer=2)
    write_run(tmp_path / "shorter", losses=(5.0, 1.0))
    write_run(tmp_path / "other", fingerprint="g", losses=(5.0, 4.0, 1.0))
    write_run(tmp_path / "faster", max_lr=1e-2, losses=(5.0, 4.0, 1.0))
    status, said = run_tool(*sorted(tmp_path.iterdir()), "--out", tmp_path / "report")
    assert status == 0
    main, *apart = said.split("## Not comparable with those above")
    assert "(a)" in main and "(b)" in main and "(shorter)" not in main and "(other)" not in main
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
    assert row.startswith("| – |") and "| 1 | gpt2 (a) |" in said


def test_pooled_seeds_of_which_one_was_not_scored(tmp_path, run_tool):
    for seed in range(3):
        folder = write_run(tmp_path / f"r{seed}", seed=seed)
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(line for line in lines if '"score"' not in line))
    write_run(tmp_path / "other", n_layer=3, seed=1)
    status, said = run_tool(*sorted(tmp_path.iterdir()), "--out", tmp_path / "report")
    assert status == 0 and "not tested" in said


def test_expert_load_has_a_picture(tmp_path, run_tool):
    write_run(tmp_path / "moe", load=1.5)
    write_run(tmp_path / "dense", n_layer=3)
    report = tmp_path / "report"
    assert run_tool(tmp_path / "moe", tmp_path / "dense", "--out", report, pictures=True)[0] == 0
    assert (report / "expert_load.png").stat().st_size > 5000


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
    assert status == 1 and "4 of 6 folders were left out" in said
    reasons = {
        "empty": "is empty", "nothing": "has no log.jsonl", "foreign": "line 1 of", "torn": "line 1 of",
    }  # fmt: skip
    for name, why in reasons.items():
        (line,) = [line for line in said.splitlines() if line.startswith(f"left out: {tmp_path / name}: ")]
        assert why in line
    status, said = run_tool(tmp_path / "empty", "--out", tmp_path / "report")
    assert status == 1 and "there is no run to compare" in said


def test_a_run_event_without_what_is_compared_is_named(tmp_path):
    folder = write_run(tmp_path / "a", own={"max_steps": 20})
    with pytest.raises(compare.Unreadable, match="line 1 of its log.jsonl is not an event of a run"):
        compare.read_run(folder)


def test_a_script_that_is_not_here_is_compared_by_its_log(tmp_path, run_tool):
    write_run(tmp_path / "mine", script="train_mine")
    write_run(tmp_path / "ours", losses=(5.0, 4.0, 2.5), facts={"parameters": 900, "active_parameters": 800})
    status, said = run_tool(tmp_path / "mine", tmp_path / "ours", "--out", tmp_path / "report")
    assert status == 0, said
    assert rows(said)["1"][:3] == ["gpt2", "900", "800"]
    assert rows(said)["2"][:3] == ["mine", "1,000", "–"]


@pytest.mark.parametrize("name, total, active", [
    ("gpt2", 842_624, 842_624),
    ("rwkv", 843_392, 843_392),
    ("deepseek", 927_072, 558_432),
])  # fmt: skip
def test_runs_from_before_fields_were_renamed_are_read(name, total, active):
    runs = [compare.read_run(DEMO / f"{name}-{seed}") for seed in (1, 2, 3)]
    (pool,) = compare.pool_runs(runs)
    assert pool.name == name and pool.finished
    assert compare.leaderboard_row(pool, [])[1:3] == [f"{total:,}", f"{active:,}"]


def test_an_evaluation_later_changes_neither_the_run_nor_its_hours(tmp_path):
    folder = write_run(tmp_path / "a")
    before = compare.read_run(folder)
    score = {"task": "hellaswag", "convention": "harness", "n": 4, "acc_norm": 0.5}
    add(folder, {"processes": 8}, {"event": "score", "step": 20, **score},
        {"config": {"val_tokens": 1000}}, {"event": "val", "step": 20, "loss": 9.0})  # fmt: skip
    run = compare.read_run(folder)
    assert (run.facts, run.val, run.train, run.changed) == (before.facts, before.val, before.train, [])
    assert run.scores.keys() - before.scores.keys() == {("hellaswag", "harness")}


def test_a_run_that_was_changed_midway_is_not_ranked_with_the_others(tmp_path, run_tool):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", n_layer=3)
    folder = write_run(tmp_path / "c", n_layer=4)
    add(folder, {"config": {"max_lr": 1e-3}, "processes": 8},
        {"event": "train", "step": 20, "ms": 100.0, "loss": 3.0},
        {"event": "val", "step": 20, "loss": 2.0})  # fmt: skip
    run = compare.read_run(folder)
    assert run.changed == ["max_lr"]
    assert [event["processes"] for event in run.train.values()] == [1] * 20 + [8]
    status, said = run_tool(tmp_path / "a", tmp_path / "b", folder, "--out", tmp_path / "report")
    assert status == 0 and "max_lr changed between its first step and its last" in said


def test_only_what_is_the_papers_is_called_so(tmp_path):
    rwkv = importlib.import_module("train_rwkv")
    fields = {**vars(rwkv.Config()), **rwkv.RECIPE, "max_lr": 3e-3, "max_steps": 20}
    run = compare.read_run(write_run(tmp_path / "rwkv", script="train_rwkv", own=fields))
    recipe = compare.conditions(compare.Pool("rwkv", [run]))["recipe"]
    assert recipe["max_lr"] == 3e-3 and recipe["beta2"] == "the paper's"


# ---- reference bands


def test_inside_and_outside_of_a_reference(tmp_path, run_tool):
    runs = []
    for seed, last in enumerate((3.00, 3.01, 3.02)):
        runs.append(write_run(tmp_path / f"r{seed}", losses=(5.0 + 0.01 * seed, last), seed=seed))
    reference = tmp_path / "results/reference.jsonl"
    assert run_tool(*runs, "--save_reference", reference)[0] == 0
    lines = [json.loads(line) for line in reference.read_text().splitlines()]
    assert lines[1]["loss"] == pytest.approx(3.01)
    # t of 2 degrees of freedom, and the spread of one more run around the mean of three
    assert lines[1]["high"] - 3.01 == pytest.approx(4.30265 * 0.01 * math.sqrt(4 / 3), rel=1e-5)
    write_run(tmp_path / "mine", losses=(5.01, 3.05))
    status, said = run_tool(tmp_path / "mine", "--against", reference)
    assert status == 0 and "inside at 2 of 2 steps" in said and "note" not in said
    write_run(tmp_path / "faster", losses=(5.01, 3.01), max_lr=1e-3)
    status, said = run_tool(tmp_path / "faster", "--against", reference)
    assert status == 0 and "has another recipe than the reference" in said
    write_run(tmp_path / "bad", losses=(5.01, 3.2))
    status, said = run_tool(tmp_path / "bad", "--against", reference)
    assert status == 1 and "OUTSIDE" in said and "inside at 1 of 2 steps" in said
    (tmp_path / "nonsense").write_text("no")
    status, said = run_tool(tmp_path / "bad", "--against", tmp_path / "nonsense")
    assert status == 1 and "is not a reference" in said
