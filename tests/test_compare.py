"""The comparison of runs, on logs whose answers are known."""
import functools
import json
import math
import operator
import sys

import pytest
from conftest import ROOT
from helpers import make_entry, make_run, run_facts, score_event, table_rows, write_run

from tools.compare import __main__ as program, comparison, plots, report, runs as reading, tables

BASE = (3.0, 3.1, 2.9)
KEY = ("cloze", "nanogpt")


@pytest.fixture
def undrawn(monkeypatch):
    for name in ("draw_group", "draw_effects", "draw_scaling", "draw_before"):
        monkeypatch.setattr(plots, name, lambda *given: [])


@pytest.fixture
def compare(undrawn, run):
    """compare(*arguments) -> (exit status, what was printed); nothing is drawn."""
    return functools.partial(run, program)


@pytest.fixture
def say(undrawn, tmp_path):
    """say(runs, **options): the report on runs in memory, without pictures."""
    return functools.partial(report.write_report, tmp_path / "report")


def append(folder, *events):
    with open(folder / "log.jsonl", "a") as log:
        log.write("".join(json.dumps(event) + "\n" for event in events))


# ---- logs


def test_a_resumed_and_killed_run_has_the_last_event_of_each_step(tmp_path):
    folder = write_run(tmp_path / "a", losses=(5.0, 4.0, 3.0))
    whole = reading.read_run(folder)
    with open(folder / "log.jsonl", "a") as log:
        log.write('\n\n{"event": "val", "step": 20, "lo\n[1, 2]\n"text"\n')  # it was killed, and went on
    append(folder, run_facts(max_steps=20, processes=1))
    for step in range(5, 10):
        append(folder, {"event": "train", "step": step, "loss": 2.0, "ms": 300.0})
    append(folder, score_event(20, 80, 400), {"event": "val", "step": 20, "loss": 2.5})
    run = reading.read_run(folder)
    assert list(run.train) == list(range(20)) and list(run.val) == [0, 10, 20]  # in order
    assert run.train[4]["loss"] == 3.0 and run.train[5]["loss"] == 2.0
    assert run.val == whole.val | {20: 2.5} and run.finished and run.loss == 2.5
    assert run.score(KEY)["acc_norm"] == 0.2 and run.score(KEY, 10)["acc_norm"] == 0.125
    assert run.changed == [] and run.median_ms == 100.0
    assert run.minutes[20] == pytest.approx((15 * 100 + 5 * 300) / 60_000)


def test_what_is_no_log_of_a_run_is_left_out_and_named(tmp_path, compare):
    write_run(tmp_path / "log/good")
    (tmp_path / "log/nothing").mkdir()
    logs = {"empty": "", "foreign": '{"loss": 3}\n', "short": '{"event": "run"}\n'}
    logs["unvalidated"] = json.dumps(run_facts())
    for name, log in logs.items():
        (tmp_path / "log" / name).mkdir()
        (tmp_path / "log" / name / "log.jsonl").write_text(log)
    status, said = compare(*(tmp_path / "log").iterdir())
    assert status == 1 and table_rows(said)["1"][0] == "made_up"
    for name in ("nothing", *logs):
        assert f"left out: {tmp_path}/log/{name}: " in said
    status, said = compare("nowhere")
    assert status == 1 and "nowhere" in said and said.count("\n") == 1


def test_an_evaluation_later_changes_neither_the_run_nor_its_hours(tmp_path):
    folder = write_run(tmp_path / "a")
    before = reading.read_run(folder)
    append(folder, run_facts(max_steps=20, val_tokens=1000, facts={"processes": 8}))
    append(folder, {"event": "val", "step": 20, "loss": 9.0})
    append(folder, score_event(20, 1, 4) | {"task": "hellaswag", "convention": "harness"})
    run = reading.read_run(folder)
    assert (run.facts, run.val, run.changed) == (before.facts, before.val, [])
    assert run.device_ms == before.device_ms
    assert run.scores.keys() - before.scores.keys() == {("hellaswag", "harness")}


def test_a_run_that_was_changed_midway_gets_no_verdict(tmp_path, compare):
    plain = write_run(tmp_path / "a")
    folder = write_run(tmp_path / "c", n_layer=3)
    append(folder, run_facts(max_steps=20, n_layer=3, max_lr=0.01, facts={"processes": 8}))
    append(folder, {"event": "train", "step": 19, "ms": 100.0, "loss": 3.0})
    run = reading.read_run(folder)
    assert run.changed == ["max_lr"] and run.train[18]["processes"] == 1 and run.train[19]["processes"] == 8
    status, said = compare(plain, folder)
    assert status == 0 and "max_lr 0.01, not 0.002" in said and "**Ranked apart**" in said


# ---- collections


def read_runs(folder, *names):
    """Runs with 120 training steps, with seeds 1, 2, …."""
    losses = [5.0 - 0.123456789 * number for number in range(13)]
    found = []
    for seed, name in enumerate(names, 1):
        found.append(reading.read_run(write_run(folder / name, losses, right=40 + seed, seed=seed)))
    return found


def test_a_collection_has_all_that_is_compared(tmp_path):
    (run,) = read_runs(tmp_path / "log", "a")
    run.study = {"name": "ablations", "size": "0.8M", "entry": "gpt2-rope", "base": "gpt2", "rate": 1.0}
    run.machine = "0123abcd, 2 cores"
    for step, event in run.train.items():
        event |= {"ms": 100.123456 + step, "loss": 3.123456789, "norm": 0.000123456}
    reading.add_to_collection(tmp_path / "kept", [run])
    (kept,) = reading.read_collection(tmp_path / "kept")
    assert kept.folder == tmp_path / "kept/a"
    for name in ("facts", "script_hash", "changed", "val", "labels", "study", "machine", "median_ms",
                 "device_ms", "bytes_per_token"):  # fmt: skip
        assert getattr(run, name) == getattr(kept, name), name
    assert list(kept.train) == [0, 50, 100, 119]
    assert kept.train[50] == {"step": 50, "loss": 3.12346, "norm": 0.0001235, "ms": 150.1, "processes": 1}
    assert kept.minutes.keys() == run.val.keys()
    assert kept.minutes[120] == pytest.approx(run.minutes[120], abs=1e-5)
    ours, theirs = (reading.Group("a", {1: each}) for each in (run, kept))
    assert ours.accuracy(KEY) == theirs.accuracy(KEY) and ours.answers(KEY) == theirs.answers(KEY) != {}
    assert theirs.answers(KEY, 0) == {}  # of the newest score alone
    mean, half = theirs.accuracy(KEY, 0)
    assert mean == ours.accuracy(KEY, 0)[0] and ours.accuracy(KEY, 0)[1] <= 1.01 * half
    assert half == pytest.approx(1.966 * math.sqrt(mean * (1 - mean) / 400), rel=1e-3)


def test_the_collections_in_results_are_read_and_written_the_same(tmp_path):
    def records(path):
        return {record["name"]: record for record in map(json.loads, path.read_text().splitlines())}

    for number, file in enumerate((ROOT / "results").glob("*/runs.jsonl")):
        reading.add_to_collection(tmp_path / str(number), reading.read_collection(file))
        written = records(tmp_path / str(number) / "runs.jsonl")
        # the first lacked some figures
        assert {name: written[name] | record for name, record in records(file).items()} == written != {}


def test_a_run_that_is_added_again_takes_its_own_place_and_an_unfinished_one_none(tmp_path):
    first, second, third = read_runs(tmp_path / "log", "a", "b", "c")
    reading.add_to_collection(tmp_path / "kept", [third, first])
    reading.add_to_collection(tmp_path / "kept/runs.jsonl", [second])
    written = (tmp_path / "kept/runs.jsonl").read_bytes()
    reading.add_to_collection(tmp_path / "kept", reading.read_collection(tmp_path / "kept")[1:])
    assert (tmp_path / "kept/runs.jsonl").read_bytes() == written
    first.val[120] = float("nan")
    reading.add_to_collection(tmp_path / "kept", [first])
    kept = reading.read_collection(tmp_path / "kept")
    assert [run.folder.name for run in kept] == ["a", "b", "c"] and math.isnan(kept[0].loss)
    before = (tmp_path / "kept/runs.jsonl").read_bytes()
    del second.val[120]
    with pytest.raises(reading.Unreadable, match="log/b is at step 110 of 120"):
        reading.add_to_collection(tmp_path / "kept", [second])
    assert [path.read_bytes() for path in (tmp_path / "kept").iterdir()] == [before]


@pytest.mark.parametrize("path, value", [
    (["val"], None),
    (["val"], {}),
    (["val", "loss"], [1.0]),
    (["val", "loss"], ["low"] * 13),
    (["val"], {"step": [0], "loss": [5.0]}),
    (["facts", "config", "max_lr"], None),
    (["facts", "config"], 3),
    (["train", "ms"], None),
    (["scores", 0, "n"], None),
    (["study"], {"name": "x"}),
    (["nonsense"], 1),
])  # fmt: skip
def test_a_damaged_line_is_named_and_nothing_is_lost(path, value, tmp_path):
    runs = read_runs(tmp_path / "log", "a", "b", "c")
    reading.add_to_collection(tmp_path / "kept", runs)
    file = tmp_path / "kept/runs.jsonl"
    lines = file.read_text().splitlines()
    record = json.loads(lines[1])
    *parents, last = path
    place = functools.reduce(operator.getitem, parents, record)
    place[last] = value
    lines[1] = json.dumps(record)
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(reading.Unreadable, match="runs.jsonl, line 2 is not a run of a collection"):
        reading.read_collection(tmp_path / "kept")
    kept, left_out = reading.read_lines(tmp_path / "kept")
    assert [run.folder.name for run in kept] == ["a", "c"] and len(left_out) == 1
    with pytest.raises(reading.Unreadable):
        reading.add_to_collection(tmp_path / "kept", runs[:1])
    assert file.read_text() == "\n".join(lines) + "\n"


def test_of_a_collection_the_same_is_said_as_of_its_folders(tmp_path, compare):
    folders = []
    for seed in (1, 2, 3):
        folders.append(write_run(tmp_path / f"log/a{seed}", (5.0, 3.0), 40 + seed, seed=seed))
        folders.append(write_run(tmp_path / f"log/b{seed}", (5.0, 2.0 + 0.1 * seed**2), seed=seed, n_layer=2))
    assert compare(*folders, "--collect", "kept")[0] == 0
    said = []
    for given in (folders, folders[::-1], ["kept"], ["kept/runs.jsonl"]):
        compare(*given, "--out", "out")
        said.append((tmp_path / "out/leaderboard.md").read_text())
    assert "2.4667 ± " in said[0] and said == [said[0]] * 4
    status, both = compare("kept", *folders)
    assert status == 0 and "repeats" in both and table_rows(both)["1"][-1] == "3"
    file = tmp_path / "kept/runs.jsonl"
    file.write_text(file.read_text()[:-200])
    status, cut = compare("kept")
    assert status == 1 and "kept/runs.jsonl, line 6: " in cut


# ---- seeds, and conditions


def test_seeds_are_pooled_and_a_repeated_seed_is_none(tmp_path, compare):
    for seed, (a, b) in enumerate(((3.0, 2.0), (3.1, 2.2), (3.2, 2.1))):
        elsewhere = {"data_dir": f"data/{seed}", "temperature": seed}
        write_run(tmp_path / f"log/a{seed}", (5.0, a), seed=seed, n_layer=1, right=100, **elsewhere)
        write_run(tmp_path / f"log/b{seed}", (5.0, b), seed=seed, n_layer=2, right=100 + 40 * (seed == 1))
    write_run(tmp_path / "log/again", (5.0, 9.0), seed=2, n_layer=1, run_name="again", facts={"time": -1.0})
    write_run(tmp_path / "log/script", (5.0, 4.0), seed=3, n_layer=1, facts={"script_hash": "4567"})
    status, said = compare(*sorted((tmp_path / "log").iterdir()))
    # everywhere the half of a 95% interval: t of 2 degrees of freedom is 4.30265
    half = f"{4.30265 * 0.1 / math.sqrt(3):.4f}"
    made = table_rows(said)
    assert status == 0 and made["1"][:2] == ["made_up (b0)", f"2.1000 ± {half}"]
    assert made["2"][:2] == ["made_up (a0)", f"3.1000 ± {half}"] and made["1"][-1] == made["2"][-1] == "3"
    assert made["3"][0] == "made_up (script)" and made["3"][-1] == "1"
    pair = made["made_up (b0) – made_up (a0)"]
    assert pair[0] == f"-1.0000 ± {half}" and pair[2] == "better" and pair[4] == "paired, 3 seeds"
    assert float(pair[3]) == pytest.approx(0.0033, abs=1e-4)
    # forty items were right in one seed of b and in none of a: that is one seed of three
    assert pair[-2].startswith("+3.33 ± ") and float(pair[-1]) > 0.3
    assert "log/again repeats" in said and "n_layer 1, not 2" in said


def test_unfair_runs_are_ranked_apart_with_the_reason(tmp_path, compare):
    better = (5.0, 4.0, 1.0)
    for name, losses, fields in (
        ("a", (5.0, 4.0, 3.0), {"n_layer": 1}), ("b", (5.0, 4.0, 3.0), {"n_layer": 2}),
        ("shorter", (5.0, 1.0), {}), ("other", better, {"fingerprint": "g"}),
        ("faster", better, {"max_lr": 0.01}), ("tuned", better, {"init_from": "x.pt"}),
        ("begun", (5.0, 1.0), {"n_layer": 5, "max_steps": 20}),
    ):  # fmt: skip
        write_run(tmp_path / "log" / name, losses, **fields)
    status, said = compare(*sorted((tmp_path / "log").iterdir()))
    main, *apart = said.split("**Ranked apart**")
    assert status == 0 and len(apart) == 4
    assert "made_up (a)" in main and "made_up (b)" in main and "(shorter)" not in main
    for reason in ("max_steps 10, not 20", "data g, not f", "max_lr 0.01, not 0.002", "x.pt, not none"):
        assert reason in " ".join(apart)
    (row,) = [line for line in main.splitlines() if "unfinished: step 10 of 20" in line]
    assert row.startswith("| – |")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """train_fake.py, whose paper prescribes a beta2 of its own."""
    text = "class Config:\n    beta2 = 0.95\n    max_lr = 0.002\n\nRECIPE = {'beta2': 0.99}\n"
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/train_fake.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "scripts")
    yield
    sys.modules.pop("train_fake", None)


def test_what_a_paper_prescribes_sets_no_run_apart_and_is_in_its_row(fake):
    def differ(**fields):
        ours = make_run("fake", script="train_fake", **fields)
        return comparison.differences(comparison.conditions(ours), comparison.conditions(make_run("gpt2")))

    assert differ(beta2=0.99, recipe="paper") == []
    assert differ(beta2=0.99, recipe="shared") == ["beta2 0.99, not 0.95"]
    assert differ(beta2=0.5, recipe="paper") == ["beta2 0.5, not 0.95"]
    assert differ(max_lr=0.004, min_lr=0.0004, rate=2.0) == []  # as it would be at rate 1
    assert differ(max_lr=0.004, rate=1.0) == ["max_lr 0.004, not 0.002"]
    group = reading.Group("fake", {1: make_run("fake", script="train_fake", beta2=0.99, recipe="paper")})
    assert "beta2 0.99" in tables.name_cell(group)


# ---- accuracies and bits per byte


def test_accuracies_are_compared_over_the_same_items_only(tmp_path, compare):
    write_run(tmp_path / "a", n_layer=1, right=100)
    write_run(tmp_path / "b", n_layer=2, right=150)
    write_run(tmp_path / "c", n_layer=3, right=250, n=1000)
    write_run(tmp_path / "d", n_layer=4, right=150)
    (tmp_path / "d/cloze_nanogpt.json").write_text(json.dumps({"labels": "01" * 200}))
    status, said = compare(*"abcd")
    assert status == 0 and "not over the same items" in said
    made = table_rows(said)
    pair = made["made_up (a) – made_up (b)"]
    assert pair[-2].startswith("-12.50 ± ") and float(pair[-1]) < 1e-10
    for other in "cd":
        assert made[f"made_up (a) – made_up ({other})"][-2:] == ["–", "–"]


@pytest.mark.parametrize("data, bits", [
    ({"tokenizer": "bytes"}, 2 / math.log(2)),
    ({"tokenizer": "gpt2", "bytes_per_token": 4.5}, 2 / math.log(2) / 4.5),
    ({"tokenizer": "gpt2"}, None),
])  # fmt: skip
def test_bits_per_byte(data, bits, tmp_path, compare):
    write_run(tmp_path / "a", losses=(5.0, 2.0), facts={"data": data | {"fingerprint": "f"}})
    compare("a", "--collect", "kept")
    for given in ("a", "kept"):
        assert table_rows(compare(given)[1])["1"][2] == ("–" if bits is None else f"{bits:.4f}")


# ---- studies


def test_verdicts_of_known_differences_and_what_is_left_out(say):
    runs = make_entry("gpt2", BASE, base=None)
    runs += make_entry("rope", [2.799, 2.9, 2.701], ms=125.0, facts={"flops_per_token": 1.76e6})
    runs += make_entry("nobias", [3.05, 3.08, 2.88], facts={"active_parameters": 400_000})
    runs += make_entry("relu2", [3.2, 3.301, 3.099])
    runs += make_entry("alone", [3.3])
    runs += [make_run("rope", 1.0, 4, at=150), make_run("rope", 1.0, 2, facts={"time": -1.0}, n_layer=9)]
    said = say(runs)
    assert "s-0.8M-rope-x1-4: at step 150" in said and "repeats" in said.split("## Left out")[-1]
    made = table_rows(said)
    head = next(name for name in made if name.startswith("against"))
    names = list(made)[list(made).index(head) + 2 :][:4]
    assert head == "against gpt2" and names == ["alone", "relu2", "nobias", "rope"]  # worst to best
    nats, share, verdict, p, how, _, parameters, flops, speed = made["rope"]
    # differences -0.201, -0.2, -0.199: sd 0.001, t of 2 degrees of freedom is 4.30265
    assert nats == f"-0.2000 ± {4.30265 * 0.001 / math.sqrt(3):.4f}" and share == "-6.67 ± 0.08"
    assert (verdict, how, parameters, flops) == ("better", "paired, 3 seeds", "1.000", "1.100")
    assert speed == "0.80 (0.80 to 0.80)"
    assert made["nobias"][2] == "not significant" and made["nobias"][6] == "1.000, active 0.500"
    assert made["relu2"][2] == "worse" and made["alone"][2:4] == ["one seed: no verdict", "–"]
    pair = comparison.compare([tuple(reading.group_runs(runs[3:6] + runs[:3]))[::-1]])[0]
    assert float(p) == pytest.approx(3 * pair.p, rel=0.1)  # three were tested


@pytest.mark.parametrize("options, words", [
    (dict(steps=400), "max_steps 400, not 200"),
    (dict(batch_tokens=4096), "batch_tokens 4096, not 2048"),
    (dict(block_size=128), "block_size 128, not 256"),
    (dict(val_tokens=8192), "val_tokens 8192, not 4096"),
    (dict(weight_decay=0.0), "weight_decay 0, not 0.1"),
    (dict(max_lr=0.004), "max_lr 0.004, not 0.002"),
    (dict(init_from="gpt2.pt"), "gpt2.pt, not none"),
    (dict(facts={"torch": "2.11.0"}), "torch 2.11.0, not 2.13.0"),
    (dict(facts={"dtype": "bfloat16 (asked for)"}), "dtype bfloat16, not float32"),
    (dict(fingerprint="g"), "data g, not f"),
    (dict(changed=["grad_clip"]), "grad_clip changed midway in s-0.8M-rope-x1-1"),
])  # fmt: skip
def test_unequal_conditions_get_no_verdict(options, words, say):
    runs = make_entry("gpt2", BASE, base=None) + make_entry("fair", [2.799, 2.9, 2.701])
    alone = comparison.compare([tuple(reading.group_runs(runs))])[0].p
    runs += make_entry("rope", [2.799, 2.9, 2.701], **options)
    said = say(runs)
    made = table_rows(said)
    assert made["rope"][2:4] == ["unequal conditions: no verdict", "–"]
    assert any(words in line for line in said.splitlines() if line.startswith("rope: "))
    assert made["fair"][2] == "better" and float(made["fair"][3]) == pytest.approx(alone, rel=0.1)


def test_seeds_of_one_entry_that_are_no_repetition_get_no_verdict(say):
    runs = make_entry("gpt2", BASE, base=None)
    runs += [make_run("rope", 2.8, 1), make_run("rope", 2.9, 2, n_layer=5)]
    runs += [make_run("nope", 2.8, 1), make_run("nope", 2.9, 2, facts={"script_hash": "45"})]
    runs[-1].script_hash = "45"
    said = say(runs)
    assert "rope: n_layer 5, not 4 in the seeds of rope." in said
    assert "nope: script 45, not 0123 in the seeds of nope." in said
    assert table_rows(said)["rope"][2] == table_rows(said)["nope"][2] == comparison.UNEQUAL


def test_the_last_quarter_of_training_is_beside_the_validation(say, tmp_path):
    (run,) = make_entry("gpt2", [3.0], steps=2000)
    for step, event in run.train.items():
        event["loss"] = 9.0 if step < 1500 else 2.5 + (step - 1745) / 1000
    assert run.last_quarter() == pytest.approx(2.5)  # steps 1,500, 1,510 … 1,990
    reading.add_to_collection(tmp_path, [run])
    (kept,) = reading.read_collection(tmp_path)
    assert kept.last_quarter() == pytest.approx(2.5) and len(kept.train) < len(run.train)
    kept.late_loss = None  # as an old collection's
    assert kept.last_quarter() == pytest.approx(2.5, abs=0.03)
    assert make_run(steps=360).last_quarter() is None
    runs = make_entry("gpt2", BASE, steps=2000, base=None)
    for seed, fresh in ((1, 2.9), (2, 3.0), (3, 3.1)):
        runs.append(make_run("rope", 2.5, seed, fresh=fresh, steps=2000))
    made = table_rows(say(runs))
    assert made["rope"][5] == "+0.0000 ± 0.4303"  # 4.30265 * 0.1 of differences -0.1, -0.1, 0.2
    assert table_rows(say(make_entry("gpt2", BASE, base=None)))["1"][3] == "–"


def test_times_of_two_machines_are_not_compared():
    runs = make_entry("gpt2", BASE, base=None) + make_entry("rope", [2.8, 2.9, 2.7], ms=125.0)
    for run, machine in zip(runs, ["a", "a", "b", "b", "a", "b"], strict=True):
        run.machine = machine
    base, rope = reading.group_runs(runs)
    assert comparison.speeds(rope, base) == [0.8, 0.8]  # seed 1 is left out
    for run in runs[:3]:
        run.machine = "c"
    assert comparison.speeds(rope, base) == []


def test_tuned_learning_rates(say):
    def sweep(entry, by_rate, base):
        found = [make_entry(entry, losses, rate=rate, base=base) for rate, losses in by_rate.items()]
        return sum(found, [])

    runs = sweep("gpt2", {0.5: [3.2], 1.0: [3.0, 3.1, 2.9], 2.0: [2.8, 2.9, 2.7001], 4.0: [2.95]}, None)
    runs += sweep("llama", {0.5: [2.7, 2.8, 2.6], 1.0: [2.72, 2.79, 2.61], 2.0: [2.5]}, "gpt2")
    said = say(runs)
    rates = table_rows(said.split("### Learning rates")[1])
    assert rates["gpt2"][:4] == ["3.2000 (1 of 3 seeds)", "3.0000", "**2.8000**", "2.9500 (1 of 3 seeds)"]
    assert rates["gpt2"][4].startswith("-0.2000 ± ") and rates["gpt2"][4].endswith(", better")
    assert rates["llama"][0] == "**2.7000**" and rates["llama"][4].endswith(", not significant")
    assert "llama: the best rate is at the edge of the sweep" in said and "gpt2: the best rate" not in said
    shared, tuned = said.split("## Study s at 0.8M, tuned lr")
    assert table_rows(shared)["llama"][0].startswith("-0.2933 ± ")
    assert table_rows(tuned)["llama, lr x0.5"][0].startswith("-0.1000 ± ")


def test_runs_that_look_wrong_are_named(say):
    runs = [run for number in range(4) for run in make_entry(f"e{number}", [3.0, 3.01, 2.99], base=None)]
    assert "Look at these" not in say(runs)
    runs[0].val[100] = 2.9
    runs[3].val[200] = 3.2
    said = say(runs).split("### Look at these runs")[1]
    assert "s-0.8M-e0-x1-1: its loss 3.0000 is above its lowest, 2.9000" in said
    assert "s-0.8M-e1-x1-1: its loss is +0.1900 from" in said and said.count("\n- ") == 2


def make_sizes(entry, b, base="gpt2"):
    """Runs of an entry at three sizes, whose loss is 6 x^-b but for noise that adds up to nothing."""
    found = []
    for size, count in (("0.25M", 250_000), ("0.8M", 800_000), ("2.7M", 2_700_000)):
        for seed, shift in ((1, 0.004), (2, -0.005), (3, 0.001)):
            loss = 6 * count**-b * math.exp(shift)
            facts = {"parameters": count, "flops_per_token": 2.0 * count}
            found.append(make_run(entry, loss, seed, base, size=size, facts=facts))
    return found


def test_a_diverged_run_is_ranked_last_and_gets_no_verdict(tmp_path):
    runs = make_entry("gpt2", BASE, base=None) + make_entry("rope", [2.799, 2.9, 2.701])
    runs += make_entry("bad", [3.0, math.nan, 2.9]) + make_entry("worst", [math.nan], base="bad")
    said = report.write_report(tmp_path / "report", runs)
    made = table_rows(said)
    assert made["rope"][2] == "better" and made["bad"][2] == "diverged: no verdict"
    assert [made[place][0] for place in "12"] == ["rope", "gpt2"] and "s-0.8M-bad-x1-2" in said
    assert len(list((tmp_path / "report").glob("*.png"))) == 3


def test_how_the_loss_falls_with_size(say):
    runs = make_sizes("gpt2", 0.06, None) + make_sizes("llama", 0.08)
    assert "how the loss falls with size" in say(runs)
    one = [run for run in runs if run.study["size"] == "2.7M"]
    assert "how the loss falls with size" not in say(one)


def test_losses_at_equal_cost(say):
    """A model of twice the FLOPs has half of the tokens: the loss of the shorter runs that had these."""
    wide = {"flops_per_token": 3.2e6}
    runs = make_entry("gpt2", BASE, base=None) + make_entry("wide", (2.9, 3.0, 2.8), ms=200.0, facts=wide)
    shorter = make_entry("gpt2", (3.2, 3.3, 3.1), base=None, steps=100)
    shorter += make_entry("wide", (3.1, 3.25, 3.0), steps=100, facts=wide)
    far = {"base": None, "facts": {"flops_per_token": 16e6}}  # a tenth of the tokens: no loss is near
    runs += make_entry("far", (4.0, 4.1, 4.2), **far)
    shorter += make_entry("far", (4.2, 4.3, 4.4), steps=100, **far)
    said = say(runs, shorter=shorter)
    made = table_rows(said)
    cells = dict(zip(made["rank"], made["1"], strict=True))
    assert cells["at gpt2's FLOPs"] == cells["at gpt2's time"] == "3.1167 ± 0.3126"
    assert made["2"].count("3.0000 ± 0.2484") == 3  # of gpt2 all is its own
    assert made["3"][list(cells).index("at gpt2's FLOPs")] == "–"
    assert made["wide – gpt2"][-2:] == ["+0.1167 ± 0.0717"] * 2  # differences 0.1, 0.15, 0.1


def test_losses_before_a_change_are_beside_those_of_the_same_entries(say):
    runs = make_entry("gpt2", BASE, base=None) + make_entry("rope", (2.9, 3.0, 2.8), rate=4.0)
    before = make_entry("gpt2", (3.2, 3.3, 3.1), base=None) + make_entry("rope", [2.95], rate=4.0, steps=100)
    before += make_entry("rope", [1.0])
    before += make_entry("other", [1.0], base=None) + make_entry("gpt2", [1.0], base=None, size="2.7M")
    assert "before and after" not in say(runs)
    said = say(runs, before=before).split("### s at 0.8M, before and after")[1].split("<details>")[0]
    made = table_rows(said)
    assert made["gpt2"] == ["3.2000 ± 0.2484", "3.0000 ± 0.2484"]
    assert made["rope, lr x4"] == ["2.9500", "2.9000 ± 0.2484"] and not {"rope", "other"} & set(made)
    assert "rope, lr x4 before: max_steps 100, not 200." in said and "gpt2 before" not in said


def test_a_report_of_some_of_the_evidence(compare):
    status, said = compare(ROOT / "results/first-round", "--only", "gpt2", "deepseek", "llama")
    made = table_rows(said)
    assert status == 0 and set(made) >= {"deepseek", "llama"} and "mta" not in made
    pair = made["deepseek"]
    assert pair[0] == "-0.3743 ± 0.0395" and pair[2] == "better" and pair[5] == "-0.4008 ± 0.0297"
    status, said = compare(ROOT / "results/first-round", "--only", "lama")
    assert status == 1 and "--only lama" in said
    status, said = compare(ROOT / "results/letters", "--before", ROOT / "results/budget")
    assert status == 1 and "--before" in said and said.count("\n") == 1


def test_pictures_are_drawn_and_the_report_shows_them(tmp_path, monkeypatch, capsys):
    runs = make_sizes("gpt2", 0.06, None) + make_sizes("llama", 0.08)
    plain = [reading.read_run(write_run(tmp_path / f"log/{seed}", seed=seed)) for seed in (1, 2)]
    markdown = report.write_report(tmp_path / "report", runs + plain, before=runs[:1])
    drawn = list((tmp_path / "report").glob("*.png"))
    assert len(drawn) == markdown.count("![") == 2 + 3 * 3 + 1 + 4
    for path in drawn:
        assert f"]({path.name})" in markdown and path.stat().st_size > 5000
    assert (tmp_path / "report/leaderboard.md").read_text() == markdown
    report.show(markdown, whole=False)
    said = capsys.readouterr().out
    assert "| against gpt2 |" in said and "![" not in said and "All pairs" not in said
