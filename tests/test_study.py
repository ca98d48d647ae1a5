"""Studies: their files, their plan, and whole studies that fail, are killed and go on."""
import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest
import torch
from conftest import ROOT
from helpers import size as count

import fineweb
import train_gpt2
from tools.compare import runs
from tools.study import __main__ as study
from tools.study import files, jobs, kept, runner, vary

slow = pytest.mark.slow

# ---- the files that are here


def plan(name, size, **given):
    """The Jobs of a study at a size. given: options of the command line."""
    args = argparse.Namespace(**(vars(study.Args()) | given))
    found, problems = jobs.make_plan(files.read_study(name), [size], args)
    assert problems == []
    return found


def entries(name, size, **given):
    """{entry: its Job with one seed, at the shared rate}."""
    found = plan(name, size, seeds=[1], inits=[1], **given)
    return {job.place["entry"]: job for job in found if job.place["rate"] == 1}


def parameters(job):
    with torch.device("meta"):
        return count(job.source.module.Model(job.config))


@slow
@pytest.mark.parametrize("name", files.study_names())
def test_each_entry_is_as_large_as_its_base(name):
    found = files.read_study(name)
    for size in found.sizes:
        here = entries(name, size)
        for entry, job in here.items():
            for base in [] if found.runs[entry].unequal else found.runs[entry].bases():
                # two of the seven scripts are not nearer to each other at the sizes of bytes
                room = 0.02 if job.source.keys[-1] == here[base].source.keys[-1] else 0.08
                assert parameters(job) == pytest.approx(parameters(here[base]), rel=room), (entry, size)


@pytest.mark.parametrize("size", files.read_sizes())
def test_the_seven_are_of_one_size(size):
    numbers = {entry: parameters(job) for entry, job in entries("architectures", size).items()}
    assert len(numbers) == 7
    if size.startswith("w"):
        assert max(numbers.values()) <= (1.04 if size == "w0.25M" else 1.02) * min(numbers.values())
    else:
        assert all(0.92 * numbers["gpt2"] <= number <= numbers["gpt2"] for number in numbers.values())


def test_the_sizes_of_words():
    for size, blocks in (("w0.8M", 0.8e6), ("w3.2M", 3.2e6)):
        job = entries("controls", size)["gpt2"]
        embedding = (4096 + 512) * job.config.n_embd
        assert parameters(job) - embedding == pytest.approx(blocks, rel=0.02)
        assert job.tokens == pytest.approx(8.4e6, rel=0.01)


def test_the_schedule_of_a_size_and_of_another_budget():
    found = plan("controls", "w0.8M", only=["rwkv"], inits=[1])
    assert [job.name[20:] for job in found] == ["1", "x0.5-1", "x2-1", "x4-1"]
    half = found[1].config
    assert (half.max_steps, half.warmup_steps, half.eval_every) == (2048, 102, 1024)
    assert (half.max_lr, half.min_lr, half.recipe, half.beta2) == (1e-3, 1e-4, "shared", 0.95)
    full = entries("architectures", "124M", only=["gpt2", "rwkv"])
    assert full["gpt2"].options.keys() == full["rwkv"].options.keys() == {"seed", "run_name"}
    assert full["rwkv"].config.max_lr == 8e-4  # its paper's
    gpt2 = entries("architectures", "124M", only=["gpt2"], steps=1907)["gpt2"].config
    assert (gpt2.max_steps, gpt2.warmup_steps, gpt2.eval_every) == (1907, 71, 250)


def test_own_rates(monkeypatch):
    monkeypatch.setitem(files.read_sizes()["0.25M"].own_rate, "llama", 2.0)
    found = plan("architectures", "0.25M", only=["gpt2", "llama"], seeds=[1])
    places = [(job.place["entry"], job.place["base"], job.place["rate"]) for job in found]
    assert places == [("gpt2", None, 1), ("llama", "gpt2", 1), ("llama", "gpt2", 2)]
    assert found[2].config.max_lr == 2 * found[1].config.max_lr


def test_rates_and_inits_are_varied_one_by_one():
    assert set(jobs.settings([0.5, 1, 2], [0.5, 1])) == {(0.5, 1), (1, 1), (2, 1), (1, 0.5)}
    assert set(jobs.settings([2], [0.5, 2])) == {(2, 0.5), (2, 2)}
    found = {job.name: job for job in plan("controls", "w0.8M", only=["gpt2"])}
    half = found["controls-w0.8M-gpt2-init0.5-1"]
    assert len(found) == 6 and half.place["entry"] == "gpt2-init0.5" and half.place["base"] == "gpt2"
    assert half.source.hash != found["controls-w0.8M-gpt2-1"].source.hash


@pytest.mark.parametrize("name", "gpt2 llama mistral gemma deepseek rwkv mta".split())
def test_scaled_inits_are_the_same_numbers_times_the_factor(name):
    source = jobs.load_source(name, ())
    half = jobs.scaled(source, 0.5)
    models = []
    for text in (source.text, half.text):
        script = vary.load_text(f"train_{name}", text)
        torch.manual_seed(0)
        models.append(script.Model(script.Config(**script.TINY_MODEL | script.TINY_RUN)))
    scaled = 0
    for (key, whole), part in zip(models[0].named_parameters(), models[1].parameters()):
        is_matrix = whole.dim() >= 2 and not any(word in key for word in ("mix", "conv", "r_k"))
        assert torch.equal(part, whole * (0.5 if is_matrix else 1.0)), key
        scaled += whole.numel() * is_matrix
    assert scaled > 0.98 * count(models[0])


def test_dry_run_of_a_variant(run):
    status, said = run(study, "gpt2-rope", "--size", "0.25M", "--seeds", "4", "--dry")
    base, variant, *_ = said.splitlines()
    assert base.startswith("python train_gpt2.py --tiny ") and "--max_lr 0.0028 " in variant
    assert base.endswith("--n_embd 64 --seed 4 --run_name gpt2-rope-0.25M-gpt2-4")
    assert " log/gpt2-rope-0.25M-gpt2-rope-4/train_gpt2_rope.py --tiny " in variant
    assert status == 0 and os.listdir() == []  # nothing was started


# ---- whole studies of small models

STUDY = """
question = "Does it work?"
sizes = ["0.25M"]
seeds = [1, 2]
max_steps = { "0.25M" = STEPS }
options = { n_embd = 16, n_head = 2, block_size = 32, batch_tokens = 256, val_tokens = 96, sample_tokens = 2 }
[runs]
one = { script = "gpt2", options = { n_layer = 1 } }
two = { script = "gpt2", base = "one", options = { n_layer = 2 } }
"""


@pytest.fixture
def write(tmp_path, monkeypatch, sample):
    """A folder with train_gpt2.py, data/sample, and write(steps, more) for st.toml, a study of it."""
    shutil.copy(ROOT / "train_gpt2.py", tmp_path)
    (tmp_path / "data").mkdir()
    os.symlink(sample, tmp_path / "data/sample")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    monkeypatch.setattr(jobs, "load_source", jobs.load_source.__wrapped__)  # which caches a script's text
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_TRIES", 0.5)

    def write(steps=8, more=""):
        (tmp_path / "st.toml").write_text(STUDY.replace("STEPS", str(steps)) + more)

    write()
    return write


def results(collect="report/st"):
    """{run: validation losses} of a collection."""
    return {run.folder.name: run.val for run in runs.read_collection(collect)}


def events(said, kind):
    """The names of the runs that were started, finished, …"""
    return [line.split()[1].rstrip(":") for line in said.splitlines() if line.startswith(kind)]


@slow
def test_a_study_from_start_to_end(write, run, monkeypatch):
    status, said = run(study, "st.toml")
    names = ["st-0.25M-one-1", "st-0.25M-two-1", "st-0.25M-one-2", "st-0.25M-two-2"]
    assert events(said, "started ") == events(said, "finished") == names
    assert status == 0 and "python -m tools.compare report/st" in said
    collected = runs.read_collection("report/st")
    assert [run.study for run in collected[::2]] == [
        {"name": "st", "size": "0.25M", "entry": "one", "base": None, "rate": 1.0},
        {"name": "st", "size": "0.25M", "entry": "two", "base": "one", "rate": 1.0},
    ]
    assert sorted(collected[0].val) == [0, 4, 8] and f"{collected[0].loss:.4f}" in said
    assert Path("report/st/out/st-0.25M-one-1.txt").read_text().startswith("$ python train_gpt2.py --tiny ")

    # all is done, by the log as by the collection alone; nothing is started
    monkeypatch.setattr(runner, "run_jobs", None)
    assert run(study, "st.toml", "--collect", "results/other")[0] == 0
    assert results("results/other") == results()
    Path("log").rename("elsewhere")
    assert run(study, "st.toml")[0] == 0

    # a script of another text is said
    with open("train_gpt2.py", "a") as file:
        file.write("# edited\n")
    status, said = run(study, "st.toml")
    (note,) = [line for line in said.splitlines() if line.startswith("note: ")]
    assert status == 0 and note.endswith(", ".join(names))


def test_a_run_has_the_users_environment_and_what_it_leaves_open(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = runner.environment(os.cpu_count())
    assert found["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "mine"]
    assert found["MALLOC_TRIM_THRESHOLD_"] == "7" and found["MALLOC_MMAP_THRESHOLD_"] == str(2**34)
    assert found["PATH"] == os.environ["PATH"]
    assert found.get("OMP_NUM_THREADS", "1") == "1" and "OMP_NUM_THREADS" not in runner.environment(1)


@slow
def test_what_fails_is_named_and_the_others_go_on(write, run):
    more = 'bad = { script = "gpt2", options = { n_head = 3 } }\n'
    more += 'wrong = { script = "gpt2", options = { n_layer = "x" } }\n'
    more += 'unknown = { script = "gpt2", options = { windw = 13 } }\n'
    write(more=more)
    status, said = run(study, "st.toml", "--seeds", "1")
    failed = {line.split()[1]: line for line in said.splitlines() if line.startswith("failed ")}
    assert status == 1 and "--windw" in failed["unknown"] and "n_layer" in failed["wrong"]
    assert "--n_head 3" in failed["st-0.25M-bad-1:"] and "out/st-0.25M-bad-1.txt" in failed["st-0.25M-bad-1:"]
    assert sorted(results()) == ["st-0.25M-one-1", "st-0.25M-two-1"]
    write(more=more.replace("n_head = 3", "n_head = 2"))  # what was wrong is mended
    status, said = run(study, "st.toml", "--seeds", "1", "--only", "bad")
    assert status == 0 and sorted(results())[0] == "st-0.25M-bad-1"


@slow
def test_a_run_of_other_options_or_data_is_not_taken_for_this_one(write, run, tmp_path):
    assert run(study, "st.toml", "--seeds", "1", "--only", "one")[0] == 0
    log = Path("log/st-0.25M-one-1/log.jsonl")
    before = log.read_bytes()
    for collect, where in (("report/st", "report/st"), ("report/new", "log/")):
        status, said = run(study, "st.toml", "--seeds", "1", "--steps", "6", "--collect", collect)
        (failed,) = [line for line in said.splitlines() if line.startswith("failed")]
        assert status == 1 and f"{where} has --max_steps 8" in failed and log.read_bytes() == before
    assert list(results("report/new")) == ["st-0.25M-two-1"]  # the others went on

    (tmp_path / "more.txt").write_text("Other words than those. " * 2000)
    tokens = ["--files", "more.txt", "--tokenizer", "bytes", "--out", "other", "--workers", "0"]
    run(fineweb, *tokens, "--shard_tokens", "20000")
    status, said = run(study, "st.toml", "--seeds", "1", "--only", "one", "--data_dir", "other")
    assert status == 1 and "other data than those in other" in said
    status, said = run(study, "st.toml", "--seeds", "9", "--data_dir", "nowhere")
    assert status == 1 and "nowhere" in said and not Path("log/st-0.25M-one-9").exists()


@slow
def test_equal_runs_of_another_study_are_taken_from_it(write, run, monkeypatch):
    """Those of the same script, options, seed and data, and no others."""
    assert run(study, "st.toml", "--seeds", "2", "--only", "one")[0] == 0
    text = Path("st.toml").read_text().replace("one", "first").replace("two", "second")
    Path("other.toml").write_text(text)
    monkeypatch.setattr(runner, "run_jobs", lambda *given: False)
    again = ["other.toml", "--seeds", "2", "--only", "first", "--reuse", "report/st"]
    for change in ("script", "data", "steps"):  # then nothing is taken
        with monkeypatch.context() as patch:
            if change == "data":
                patch.setattr(study, "look_at_data", lambda jobs, dry: {"data/sample": "other"})
            if change == "script":
                patch.setattr(jobs.Source, "hash", "other")
            run(study, *again, *(["--steps", "4"] if change == "steps" else []))
        assert not Path("report/other/runs.jsonl").exists(), change
    assert run(study, *again)[0] == 0
    (ours,), (theirs,) = runs.read_collection("report/other"), runs.read_collection("report/st")
    assert ours.folder.name == "other-0.25M-first-2" and ours.study["entry"] == "first"
    assert (ours.val, ours.train, ours.machine) == (theirs.val, theirs.train, theirs.machine)
    status, said = run(study, "st.toml", "--reuse", "results/none")
    assert status == 1 and said.splitlines()[-1].startswith("--reuse results/none: ")


@slow
def test_a_run_that_another_process_has_is_waited_for(write, run):
    folder = Path("log/st-0.25M-one-1").resolve()
    folder.mkdir(parents=True)
    lock = filelock.FileLock(folder / ".lock", thread_local=False)
    lock.acquire()
    out = Path("report/st/out/st-0.25M-one-1.txt").resolve()

    def release():
        wait_for(lambda: out.exists() and "is in use by" in out.read_text())
        lock.release()

    thread = threading.Thread(target=release)
    thread.start()
    status, said = run(study, "st.toml", "--seeds", "1")
    thread.join()
    assert status == 0 and "in use" in said
    assert events(said, "finished") == ["st-0.25M-two-1", "st-0.25M-one-1"]


def test_one_start_at_a_time(write, run):
    folder = Path("report/st/out")
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / ".lock"):
        status, said = run(study, "st.toml")
    assert status == 1 and "report/st/out is in use" in said


@slow
def test_killed_between_the_last_loss_and_the_last_checkpoint(write, run):
    only = ("st.toml", "--seeds", "1", "--only", "one")
    run(study, *only)
    whole = results()
    folder = Path("log/st-0.25M-one-1")
    (folder / "step_00000008.pt").unlink()
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"event": "score", "st')  # and half a line
    Path("report/st/runs.jsonl").unlink()
    status, said = run(study, *only)
    assert status == 0 and events(said, "resumed") == ["st-0.25M-one-1"] and results() == whole
    for path in folder.glob("step_*.pt"):  # somebody has made room
        path.unlink()
    Path("report/st/runs.jsonl").unlink()
    status, said = run(study, *only)
    assert status == 0 and events(said, "resumed") == [] and results() == whole


def start(*options):
    """A study in a process of its own, which prints to said.txt."""
    said = open("said.txt", "a")
    command = [sys.executable, "-m", "tools.study", *options]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=said, stderr=said)


def wait_for(condition, seconds=300):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, Path("said.txt").read_text()
        time.sleep(0.02)


def assert_ends_well(process):
    assert process.wait() == 0, Path("said.txt").read_text()


@slow
def test_killed_again_and_again_it_ends_as_the_commands_by_hand(write, run):
    write(steps=150)
    _, said = run(study, "st.toml", "--dry")
    torch.set_num_threads(1)
    whole = {}
    for line in [line for line in said.splitlines() if line.startswith("python train_")]:  # to copy and paste
        words = shlex.split(line)
        status, said = run(train_gpt2, *words[2:])
        assert status == 0, said
        whole[words[-1]] = runs.read_run(Path("log") / words[-1]).val
    assert len(whole) == 4
    Path("log").rename("whole")

    def steps():
        return sum(runner.last_step(path) for path in Path("log").glob("st-*"))

    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        done = steps()
        process = start("st.toml", "--jobs", "2")
        wait_for(lambda: steps() > done + 3)
        process.send_signal(number)
        process.wait()
    assert_ends_well(start("st.toml", "--jobs", "2"))
    assert results() == whole
    told = Path("said.txt").read_text()
    assert "python -m tools.study st.toml --jobs 2" in told and "resumed   st-" in told


@slow
def test_runs_of_two_processes_end_as_those_of_one(write):
    write(steps=150)
    one = ["st.toml", "--seeds", "1", "--only", "one", "--rates", "0.1"]  # at which rounding stays rounding
    folder = Path("log/st-0.25M-one-x0.1-1")
    two = [*one, "--nproc_per_node", "2", "--collect", "two"]
    process = start(*two)
    wait_for(lambda: runner.last_step(folder) > 3)
    process.terminate()
    process.wait()
    assert 3 < int(max(folder.glob("step_*.pt")).stem[5:]) < 150
    assert_ends_well(start(*two))
    assert [start["processes"] for start in runs.read_log(folder / "log.jsonl")[0]] == [2, 2]
    Path("log").rename("log-of-two")
    assert_ends_well(start(*one, "--collect", "one"))
    assert results("two")[folder.name] == pytest.approx(results("one")[folder.name], rel=1e-4)


@slow
def test_nothing_goes_on_without_the_study(write):
    write(steps=100_000)
    folder = Path("log/st-0.25M-one-1")
    process = start("st.toml")
    wait_for(lambda: runner.last_step(folder) > 20)
    process.kill()
    process.wait()
    lock = filelock.FileLock(folder.resolve() / ".lock")
    lock.acquire(timeout=60)  # once the run has ended
    assert 20 < int(max(folder.glob("step_*.pt")).stem[5:]) < 50_000  # it saved when it did


# ---- what makes no sense


@pytest.mark.parametrize("change, word", [
    (("question", "qestion"), "qestion"),
    (('["0.25M"]', '["1M"]'), "1M"),
    (('base = "one"', 'base = "on"'), "two, on,"),
    (('"gpt2", options = { n_layer = 1', '"gpt2", base = "two", options = { n_layer = 1'), "one, two"),
    (("[1, 2]", "[]"), "seeds"),
    (("[1, 2]", '[1, "x"]'), "seeds"),
    (("[1, 2]", "[1]\nrates = [0.0]"), "0.0"),
    (("n_layer = 2", "max_lr = 2"), "max_lr"),
    (("two =", '"a b" ='), "'a b'"),
    (("[runs]", "[runs"), "st.toml"),
])  # fmt: skip
def test_a_study_that_makes_no_sense_is_one_line(write, run, change, word):
    text = Path("st.toml").read_text()
    assert change[0] in text
    Path("st.toml").write_text(text.replace(*change))
    status, said = run(study, "st.toml")
    assert status == 1 and said.startswith("st.toml") and word in said and said.count("\n") == 1, said


@pytest.mark.parametrize("options, word", [
    (["ablation"], "ablations"),
    (["none.toml"], "none.toml"),
    (["controls", "--rates", "0"], "--rates"),
    (["controls", "--inits", "-1"], "--inits"),
    (["controls", "--size", "0.8M"], "w0.25M, w0.8M, w3.2M"),
    (["controls", "--only", "gpt3"], "--only gpt3"),
    (["controls", "--jobs", "2", "--nproc_per_node", "2"], "--nproc_per_node"),
    (["controls", "--jobs", "0"], "--jobs"),
    (["controls", "--seeds", "1", "1"], "--seeds"),
    ([], "--list"),
])  # fmt: skip
def test_a_wrong_command_line_is_one_line(run, options, word):
    status, said = run(study, *options)
    assert status == 1 and word in said and said.count("\n") == 1, said


def test_bytes_per_token_are_those_of_the_scored_text(sample):
    ids = fineweb.Windows(sample, "val", 32, max_tokens=1000).rows(range(31))[:, 1:]
    ratio = kept.bytes_per_token(str(sample), 32, 1000, "bytes")
    assert ratio == pytest.approx((ids < 256).mean(), abs=0.01)  # a byte has a byte, <|endoftext|> none
    assert kept.bytes_per_token("moved away", 32, 1000, "bytes") is None
    assert kept.bytes_per_token(str(sample), 32, 1000, "gone.json") is None
