"""Collections: what they keep of runs, and what becomes of a damaged one."""
import json
import sys

import pytest
from test_compare import write_run

from tools import collection, runs as reading

STUDY = {"name": "ablations", "size": "0.8M", "entry": "gpt2-rope", "base": "gpt2", "rate": 1.0}


def read_runs(folder, *names, steps=120, **fields):
    """Runs with 120 training steps, with seeds 1, 2, …."""
    runs = []
    for seed, name in enumerate(names, 1):
        losses = [5.0 - 0.123456789 * step for step in range(steps // 10 + 1)]
        write_run(folder / name, losses=losses, right=40 + seed, seed=seed, load=1.25, **fields)
        runs.append(reading.read_run(folder / name))
    return runs


def same(run, kept):
    """Asserts that a Run and what a collection kept of it say the same."""
    for name in ("facts", "script_hash", "changed", "val", "labels", "study", "machine"):
        assert getattr(run, name) == getattr(kept, name), name
    for name in ("loss", "median_ms", "device_ms", "finished", "seed", "architecture"):
        assert getattr(run, name) == getattr(kept, name), name
    assert run.scores.keys() == kept.scores.keys()
    for key, by_step in run.scores.items():
        assert by_step.keys() == kept.scores[key].keys()
        for step, score in by_step.items():
            assert score["acc_norm"] == kept.scores[key][step]["acc_norm"]
        assert run.right(key) == kept.right(key) is not None
        assert kept.right(key, 0) is None  # of the newest score alone
    minutes = kept.minutes()
    assert minutes.keys() == run.val.keys()
    for step, spent in minutes.items():
        assert spent == pytest.approx(run.minutes()[step], abs=1e-5)


def test_a_collection_has_all_that_is_compared(tmp_path):
    runs = read_runs(tmp_path / "log", "a", "b")
    runs[0].study = STUDY
    runs[0].machine = "0123abcd, 2 cores"
    for step, event in runs[0].train.items():
        event["ms"] = 100.123456 + step
        event["loss"] = 3.123456789
        event["norm"] = 0.000123456
    collection.add(tmp_path / "kept", runs)
    kept = collection.read(tmp_path / "kept")
    assert [run.folder for run in kept] == [tmp_path / "kept/b", tmp_path / "kept/a"]  # of no study first
    same(runs[0], kept[1])
    same(runs[1], kept[0])
    assert list(kept[1].train) == [0, 50, 100, 119]
    assert kept[1].train[50] == {
        "step": 50, "loss": 3.12346, "lr": 1e-3, "norm": 0.0001235, "ms": 150.1, "processes": 1,
        "load_max": 1.25,
    }  # fmt: skip
    assert kept[1].median_ms == pytest.approx(159.623456) and kept[1].study == STUDY
    size = (tmp_path / "kept/runs.jsonl").stat().st_size
    assert size < 0.3 * sum((tmp_path / "log" / name / "log.jsonl").stat().st_size for name in "ab")


def test_a_run_that_is_added_again_takes_its_own_place(tmp_path):
    first, second, third = read_runs(tmp_path / "log", "a", "b", "c")
    collection.add(tmp_path / "kept", [third, first])
    collection.add(tmp_path / "kept/runs.jsonl", [second])
    written = (tmp_path / "kept/runs.jsonl").read_bytes()
    collection.add(tmp_path / "kept", collection.read(tmp_path / "kept")[1:])
    assert (tmp_path / "kept/runs.jsonl").read_bytes() == written, "reading and adding changes nothing"
    first.val[120] = 1.5
    collection.add(tmp_path / "kept", [first])
    kept = collection.read(tmp_path / "kept")
    assert [run.folder.name for run in kept] == ["a", "b", "c"] and kept[0].loss == 1.5
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["runs.jsonl"]


def test_the_order_is_that_of_the_study(tmp_path):
    (run,) = read_runs(tmp_path / "log", "x", steps=10)
    wanted = []
    for size in ("0.25M", "2.7M", "124M", "1B"):
        for entry in ("gpt2", "gpt2-rope"):
            for rate in (0.5, 1.0, 10.0):
                wanted.append((size, entry, rate))
    for number, (size, entry, rate) in enumerate(reversed(wanted)):
        run.study = {**STUDY, "size": size, "entry": entry, "rate": rate}
        run.folder = tmp_path / str(number)
        collection.add(tmp_path / "kept", [run])
    kept = collection.read(tmp_path / "kept")
    assert [(run.study["size"], run.study["entry"], run.study["rate"]) for run in kept] == wanted


def test_a_run_without_training_steps_or_scores_is_kept(tmp_path):
    (run,) = read_runs(tmp_path / "log", "a", steps=10)
    run.train, run.scores, run.labels = {}, {}, {}
    collection.add(tmp_path / "kept", [run])
    (kept,) = collection.read(tmp_path / "kept")
    assert (kept.train, kept.scores, kept.median_ms, kept.device_ms) == ({}, {}, None, 0)


def test_a_diverged_run_is_kept(tmp_path):
    (run,) = read_runs(tmp_path / "log", "a", steps=10)
    run.val[10] = float("nan")
    run.train[9]["loss"] = float("inf")
    collection.add(tmp_path / "kept", [run])
    (kept,) = collection.read(tmp_path / "kept")
    assert kept.loss != kept.loss and kept.train[9]["loss"] == float("inf")


def test_an_unfinished_run_is_refused(tmp_path):
    (run,) = read_runs(tmp_path / "log", "a", steps=10)
    del run.val[10]
    with pytest.raises(reading.Unreadable, match="log/a is at step 0 of 10: a collection is of"):
        collection.add(tmp_path / "kept", [run])
    assert not (tmp_path / "kept").exists()


def changed(line, path, value):
    """A line with another value at a path of keys, without the key for None."""
    record = json.loads(line)
    *parents, last = path
    place = record
    for key in parents:
        place = place[key]
    del place[last]
    if value is not None:
        place[last] = value
    return json.dumps(record)


@pytest.mark.parametrize("path, value, reason", [
    (["val"], None, "missing required field `val`"),
    (["val", "loss"], [1.0], "or only part of one"),
    (["val", "loss"], ["low", 2.0], r"Expected `float`, got `str` - at `\$.val.loss"),
    (["val"], {"step": [0], "loss": [5.0]}, "of a run that has not finished"),
    (["val"], {"step": [], "loss": []}, "of a run that has not finished"),
    (["facts", "config", "max_lr"], None, "it lacks 'max_lr'"),
    (["facts", "config"], 3, "or only part of one"),
    (["train", "ms"], None, "it lacks 'ms'"),
    (["train", "step"], [0, 0, 0], "or only part of one"),
    (["scores", 0, "n"], None, "it lacks 'n'"),
    (["study"], {"name": "x"}, "missing required field `size`"),
])  # fmt: skip
def test_a_damaged_line_is_named_and_nothing_is_lost(path, value, reason, tmp_path):
    runs = read_runs(tmp_path / "log", "a", "b", "c", steps=60)
    collection.add(tmp_path / "kept", runs)
    file = tmp_path / "kept/runs.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = changed(lines[1], path, value)
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(reading.Unreadable, match=f"runs.jsonl, line 2 is .*{reason}"):
        collection.read(tmp_path / "kept")
    kept, left_out = collection.read_lines(tmp_path / "kept")
    assert [run.folder.name for run in kept] == ["a", "c"]
    assert [where for where, _ in left_out] == [f"{file}, line 2"]
    with pytest.raises(reading.Unreadable):
        collection.add(tmp_path / "kept", runs[:1])
    assert file.read_text() == "\n".join(lines) + "\n"


def test_a_line_that_was_cut_is_named(tmp_path):
    collection.add(tmp_path, read_runs(tmp_path / "log", "a", "b", steps=10))
    file = tmp_path / "runs.jsonl"
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(reading.Unreadable, match="line 2 is not a run of a collection, or only part of one"):
        collection.read(tmp_path)


def test_what_is_a_collection(tmp_path):
    collection.add(tmp_path / "kept", read_runs(tmp_path / "log", "a", steps=10))
    assert collection.is_collection(tmp_path / "kept")
    assert collection.is_collection(tmp_path / "kept/runs.jsonl")
    assert not collection.is_collection(tmp_path / "log/a") and not collection.is_collection(tmp_path / "no")
    with pytest.raises(reading.Unreadable, match="can't be read"):
        collection.read(tmp_path / "no")


def test_accuracies_before_the_last_have_a_little_wider_intervals(tmp_path):
    runs = read_runs(tmp_path / "log", "a", "b", "c", steps=20)
    collection.add(tmp_path / "kept", runs)
    (pool,) = reading.pool_runs(runs)
    (kept,) = reading.pool_runs(collection.read(tmp_path / "kept"))
    key = ("cloze", "nanogpt")
    curve = pool.accuracy_curve(key)
    of_kept = kept.accuracy_curve(key)
    assert of_kept[-1] == curve[-1]
    for (step, mean, half), (same_step, same_mean, wider) in zip(curve[:-1], of_kept[:-1], strict=True):
        assert (step, mean) == (same_step, same_mean) and half <= wider < 1.3 * half
    # the seeds are in it: 41, 42 and 80 of 400 right differ by more than the items tell
    runs[2].scores[key][10]["acc_norm"] = 0.2
    runs[2].scores[key][10].pop("predictions_norm")
    _, half = pool.accuracy(key, 10)
    assert half > 2 * of_kept[1][2]


def test_the_program_adds_runs_and_says_what_it_leaves_out(tmp_path, run):
    read_runs(tmp_path / "log", "a", "b", steps=10)
    write_run(tmp_path / "log/begun", losses=(5.0,), max_steps=10)
    status, said = run(collection, tmp_path / "kept", tmp_path / "log/a", tmp_path / "log/b")
    assert status == 0 and said == f"{tmp_path}/kept/runs.jsonl: 2 runs, 2 of them new, 0 replaced\n"
    status, said = run(collection, tmp_path / "more", tmp_path / "kept", *sorted((tmp_path / "log").iterdir())[1:])
    assert status == 1 and said.splitlines() == [
        f"left out: {tmp_path}/log/begun: is at step 0 of 10",
        f"{tmp_path}/more/runs.jsonl: 2 runs, 2 of them new, 0 replaced",
        "1 of 3 runs were left out, see above",
    ]
    status, said = run(collection, tmp_path / "more", tmp_path / "log/b")
    assert status == 0 and said.endswith(": 2 runs, 0 of them new, 1 replaced\n")
    read_runs(tmp_path / "other", "b", steps=20)
    status, said = run(collection, tmp_path / "more", tmp_path / "log/b", tmp_path / "other/b")
    assert status == 1 and said.startswith(f"{tmp_path}/log/b and {tmp_path}/other/b have one name, ")
    (tmp_path / "kept/runs.jsonl").write_text("{}\n")
    status, said = run(collection, tmp_path / "kept", tmp_path / "log/a")
    assert status == 1 and "kept/runs.jsonl, line 1 is not a run of a collection: " in said
    assert said.endswith(": nothing was added\n") and (tmp_path / "kept/runs.jsonl").read_text() == "{}\n"


def test_help_fits_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["collection", "--help"])
    with pytest.raises(SystemExit):
        collection.main()
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80
