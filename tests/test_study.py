"""Studies: their files, their plan, and whole studies that fail, are killed and go on."""
import argparse
import json
import os
import random
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest
import torch
from conftest import ROOT

import fineweb
import train_gpt2
import train_llama
from tools import plan, progress, study, vary
from tools.compare import runs

# ==========================================================================
# The files that are here


def asked(**given):
    """The command line's Namespace."""
    fields = dict(only=None, seeds=None, rates=None, steps=None, data_dir=None, jobs=1, nproc_per_node=1, dry=False, reuse=None)
    return argparse.Namespace(**(fields | given))


def planned(name, size):
    """{entry: its Job with the first seed at the shared rate}, and the study."""
    found = plan.read_study(name)
    jobs, problems = plan.make_plan(found, [size], asked(seeds=[1]))
    assert problems == []
    return {job.place["entry"]: job for job in jobs if job.place["rate"] == 1}, found


@pytest.mark.parametrize("name", plan.study_names() + vary.variants())
def test_each_entry_is_as_large_as_its_base(name):
    for size in plan.read_study(name).sizes:
        jobs, found = planned(name, size)
        for entry, job in jobs.items():
            own = job.parameters
            for base in found.runs[entry].bases():
                if base not in jobs or found.runs[entry].unequal or name == "architectures":
                    continue
                if name == "gpt2-rope" and size in ("0.25M", "0.8M"):
                    continue  # its learned positions are a large part there; the report marks it
                theirs = jobs[base].parameters
                # two of the seven scripts are not nearer to each other
                room = 0.02 if job.source.base == jobs[base].source.base else 0.06
                assert abs(own / theirs - 1) <= room, f"{entry} at {size}: {own:,}, {base}: {theirs:,}"


def test_the_seven_are_as_large_as_gpt2_but_not_larger():
    for size in plan.read_sizes().size:
        jobs, _ = planned("architectures", size)
        sizes = {entry: job.parameters for entry, job in jobs.items()}
        assert len(sizes) == 7
        for entry, number in sizes.items():
            assert 0.92 * sizes["gpt2"] <= number <= sizes["gpt2"], f"{entry} at {size}: {number:,}"


def test_the_learning_rates_follow_their_line():
    for name, size in plan.read_sizes().size.items():
        if size.max_lr:
            rate = 6e-4 * (124e6 / (float(name[:-1]) * 1e6)) ** 0.24
            assert size.max_lr == pytest.approx(rate, rel=0.06), name


def test_the_schedule_of_a_size_and_of_another_budget():
    found = plan.read_study("rates")
    jobs, _ = plan.make_plan(found, ["0.25M"], asked(only=["rwkv"]))
    assert [job.name for job in jobs][:3] == ["rates-0.25M-rwkv-1", "rates-0.25M-rwkv-x0.25-1",
                                              "rates-0.25M-rwkv-x0.5-1"]  # fmt: skip
    quarter = jobs[1].config
    assert (quarter.max_steps, quarter.warmup_steps, quarter.eval_every) == (1000, 50, 500)
    assert (quarter.max_lr, quarter.min_lr, quarter.recipe) == (0.0007, 0.00007, "shared")
    assert quarter.beta2 == 0.95  # the shared recipe's

    found = plan.read_study("architectures")
    jobs, _ = plan.make_plan(found, ["124M"], asked(only=["gpt2", "rwkv"], seeds=[7]))
    assert [job.options for job in jobs] == [{"seed": 7, "run_name": f"architectures-124M-{name}-7"}
                                             for name in ("gpt2", "rwkv")]  # fmt: skip
    assert jobs[1].config.max_lr == 8e-4  # its paper's
    jobs, _ = plan.make_plan(found, ["124M"], asked(only=["gpt2"], steps=1907))
    config = jobs[0].config
    assert (config.max_steps, config.warmup_steps, config.eval_every) == (1907, 71, 250)


def test_own_rates(monkeypatch):
    sizes = plan.read_sizes()
    monkeypatch.setitem(sizes.own_rate, "llama", 2.0)
    monkeypatch.setitem(sizes.own_rate, "rwkv", 2.0)
    found = plan.read_study("architectures")
    jobs, _ = plan.make_plan(found, ["0.25M"], asked(only=["gpt2", "llama", "rwkv"], seeds=[1, 2]))
    assert [job.name.removeprefix("architectures-0.25M-") for job in jobs] == [
        "gpt2-1", "llama-1", "rwkv-1", "llama-x2-1", "rwkv-x2-1",
        "gpt2-2", "llama-2", "rwkv-2", "llama-x2-2", "rwkv-x2-2",
    ]  # fmt: skip
    assert jobs[3].config.max_lr == 2 * jobs[1].config.max_lr
    assert jobs[3].place == {"name": "architectures", "size": "0.25M", "entry": "llama", "base": "gpt2",
                             "rate": 2.0}  # fmt: skip
    jobs, _ = plan.make_plan(found, ["124M"], asked(only=["llama", "rwkv"], seeds=[1]))
    assert [job.name for job in jobs] == [
        "architectures-124M-llama-1",
        "architectures-124M-rwkv-1",  # which has its paper's own rate there
        "architectures-124M-llama-x2-1",
    ]
    jobs, _ = plan.make_plan(found, ["0.25M"], asked(only=["llama"], seeds=[3], rates=[0.5, 1.0]))
    assert [job.name for job in jobs] == ["architectures-0.25M-llama-3", "architectures-0.25M-llama-x0.5-3"]


def test_bases_come_first():
    ordered = plan.bases_first("", plan.read_study("ablations"))
    assert ordered[:6] == ["gpt2", "llama", "deepseek", "mistral", "gemma", "mta"]
    assert plan.bases_first("", plan.read_study("hybrids"))[0] == "llama"


def test_the_list(run):
    status, said = run(study, "--list")
    assert status == 0
    for name in ("ablations", "architectures", "hybrids", "rates"):
        assert f"\n{name}: " in "\n" + said
    assert max(map(len, said.splitlines())) <= 90


def test_dry_run_of_a_variant(run, monkeypatch):
    command = ("gpt2-rope", "--size", "0.25M", "--seeds", "4", "--jobs", "2", "--dry")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own, which the runs inherit
    assert run(study, *command)[1].startswith("python train_gpt2.py --tiny ")
    monkeypatch.delenv("OMP_NUM_THREADS")
    status, said = run(study, *command)
    assert status == 0, said
    lines = said.splitlines()
    assert lines[0].startswith("OMP_NUM_THREADS=")
    assert lines[0].endswith("--n_embd 64 --seed 4 --run_name gpt2-rope-0.25M-gpt2-4")
    if not (ROOT / "train_gpt2_rope.py").exists():
        assert lines.pop(1) == "python -m tools.vary gpt2-rope"
    assert "train_gpt2_rope.py --tiny " in lines[1] and "--max_lr 0.0028 " in lines[1]
    assert lines[2].startswith("# 2 of 2 runs to do, 8.19M tokens: about ")
    assert os.listdir() == []  # nothing was started


# ==========================================================================
# Studies of a script that takes no time

MODEL = '''
class Model:
    def __init__(self, config):
        if config.n_embd == 13:
            fail("--n_embd 13 is no good")

    def parameters(self):
        return []

    def flops_per_token(self):
        return 1000.0


def state_after(state, seed, step):
    return (1103515245 * state + 12345 + 7 * seed + step) % 2**31


def main():
    """A run whose every loss depends on all steps before it, with a log and checkpoints as the scripts'."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--resume", action="store_true")
    given, asked = fineweb.parse_options(parser, Config, RECIPE, TINY_MODEL | TINY_RUN)
    config = Config(**(TINY_MODEL | TINY_RUN | given))
    folder = fineweb.run_folder(config.run_name)
    if config.n_head == 7:
        print("loading")
        fail("stopped at step 3: loss nan")
    if asked.resume != folder.exists():
        fail(f"--resume {asked.resume}, but folder {folder.exists()}")
    fineweb.lock_run(folder)
    signals = fineweb.catch_signals()
    first, state = 0, config.seed
    saved = sorted(folder.glob("step_*.pt"))
    if saved:
        first, state = json.loads(saved[-1].read_text())
    log = fineweb.open_log(folder / "log.jsonl", first)

    def save(step):
        text = json.dumps([step, state]).encode()
        fineweb.write_atomic(folder / f"step_{step:06d}.pt", lambda f: f.write(text))

    if not saved:
        save(0)
    data = fineweb.open_dataset(config.data_dir)
    script = Path(__file__)
    event = dict(event="run", script=script.stem, script_hash=fineweb.script_hash(script), processes=1,
                 parameters=100, flops_per_token=1000.0, data=data, config=dataclasses.asdict(config))
    log.write(json.dumps(event) + "\\n")
    for step in range(first, config.max_steps + 1):
        loss = state / 2**31
        last = step == config.max_steps
        due = step % config.eval_every == 0 or last
        stopping = bool(signals)
        if due and not stopping:
            log.write(json.dumps(dict(event="val", step=step, loss=1 + loss)) + "\\n")
        if step > first and (due or stopping):
            time.sleep(0.05)  # in which it may be killed
            save(step)
        if stopping or last:
            print(f"{folder} is at step {step}")
            break
        time.sleep(config.adam_eps if config.adam_eps > 1e-4 else 0)
        log.write(json.dumps(dict(event="train", step=step, loss=loss, ms=2.0)) + "\\n")
        state = state_after(state, config.seed, step)


if __name__ == "__main__":
    main()
'''

STUDY = """
question = "Does it work?"
sizes = ["0.25M"]
seeds = [1, 2]
options = {{ val_tokens = 64, batch_tokens = 256, adam_eps = {pause} }}
[max_steps]
"0.25M" = {steps}
[runs]
one = {{ script = "fake" }}
two = {{ script = "fake", base = "one", options = {{ n_layer = 2 }} }}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch, small_sample):
    """A folder with train_fake.py, data/sample, and write(steps, pause, more) for st.toml, a study of it."""
    text = (ROOT / "train_gpt2.py").read_text()
    config = text[text.index("@dataclasses.dataclass\nclass Config") : text.index("# Model: this")]
    config = config.replace("hellaswag.DEFAULT_FILE", '"none"')
    imports = "import argparse, dataclasses, json, time\nfrom pathlib import Path\nimport fineweb\n"
    script = imports + "from fineweb import fail, option\n\n" + config + MODEL
    (tmp_path / "train_fake.py").write_text(script)
    (tmp_path / "data").mkdir()
    os.symlink(small_sample, tmp_path / "data/sample")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(plan, "load_source", plan.load_source.__wrapped__)  # which caches a script's text

    def write(steps=8, pause="1e-8", more=""):
        (tmp_path / "st.toml").write_text(STUDY.format(steps=steps, pause=pause) + more)

    write()
    return write


def results(collect="report/st"):
    """{run: validation losses} of a collection."""
    return {run.folder.name: run.val for run in runs.read_collection(collect)}


def test_a_study_from_start_to_end(fake, run, monkeypatch):
    status, said = run(study, "st.toml")
    assert status == 0, said
    events = [line for line in said.splitlines() if line[:8] in ("started ", "finished")]
    assert [line.split()[1].rstrip(":") for line in events[::2]] == [
        "st-0.25M-one-1", "st-0.25M-two-1", "st-0.25M-one-2", "st-0.25M-two-2",
    ]  # fmt: skip
    assert "0.25M    seed 1   seed 2\none  " in said
    assert said.endswith("Next: python -m tools.compare report/st\n")
    kept = runs.read_collection("report/st")
    assert [run.study for run in kept[::2]] == [
        {"name": "st", "size": "0.25M", "entry": "one", "base": None, "rate": 1.0},
        {"name": "st", "size": "0.25M", "entry": "two", "base": "one", "rate": 1.0},
    ]
    assert f"{kept[0].loss:.4f}   {kept[1].loss:.4f}" in said
    assert sorted(kept[0].val) == [0, 4, 8]
    assert Path("report/st/out/st-0.25M-one-1.txt").read_text().startswith("$ python train_fake.py --tiny ")

    # all is done, by the log as by the collection alone; nothing is started
    monkeypatch.setattr(study, "Child", None)
    status, said = run(study, "st.toml", "--collect", "results/other")
    assert status == 0 and "started" not in said
    assert results("results/other") == results()
    for path in list(Path("log").iterdir()):
        path.rename(f"elsewhere-{path.name}")
    status, said = run(study, "st.toml")
    assert status == 0 and "started" not in said and said.startswith("0.25M    seed 1   seed 2\none ")

    # a script of another text is said, once
    with open("train_fake.py", "a") as file:
        file.write("# edited\n")
    status, said = run(study, "st.toml")
    line = "note: train_fake.py is another text now than when it trained st-0.25M-one-1 and 3 more: "
    assert status == 0 and said.splitlines()[0] == line + "kept as done" and said.count("note:") == 1


def test_more_seeds_and_chosen_runs(fake, run, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    status, said = run(study, "st.toml", "--only", "two", "--seeds", "5", "6", "--steps", "4", "--jobs", "2")
    assert status == 0, said
    assert {name: max(val) for name, val in results().items()} == {"st-0.25M-two-5": 4, "st-0.25M-two-6": 4}
    first = Path("report/st/out/st-0.25M-two-5.txt").read_text()
    assert first.startswith("$ OMP_NUM_THREADS=")


def test_a_chosen_run_without_its_base_is_said(fake, run):
    note = "note: --only leaves out what two is compared with: name one, too\n"
    for chosen in (["two"], ["two", "one"], ["one"]):
        status, said = run(study, "st.toml", "--seeds", "1", "--dry", "--only", *chosen)
        assert status == 0 and said.count(note) == (chosen == ["two"]), said
    assert run(study, "st.toml", "--seeds", "1", "--only", "one")[0] == 0
    status, said = run(study, "st.toml", "--seeds", "1", "--only", "two")  # the collection has its base
    assert status == 0 and "note:" not in said, said
    said = run(study, "st.toml", "--seeds", "1", "2", "--only", "two", "--dry")[1]  # not with this seed
    assert said.count(note) == 1, said


def test_what_fails_is_named_and_the_others_go_on(fake, run):
    more = 'bad = { script = "fake", options = { n_head = 7 } }\n'
    more += 'worse = { script = "fake", options = { n_embd = 13 } }\n'
    more += 'unknown = { script = "fake", options = { windw = 13 } }\n'
    fake(more=more)
    status, said = run(study, "st.toml", "--seeds", "1")
    assert status == 1
    where = "report/st/out/st-0.25M-bad-1.txt"
    assert f"failed    st-0.25M-bad-1: stopped at step 3: loss nan ({where})\n" in said
    assert "failed    worse at 0.25M: --n_embd 13 is no good\n" in said
    assert "failed    unknown at 0.25M: train_fake.py has no option --windw\n" in said
    assert said.endswith("3 failed: the same command tries again, once it is mended\n")
    assert sorted(results()) == ["st-0.25M-one-1", "st-0.25M-two-1"]
    fake(more=more.replace("n_head = 7", "n_head = 2"))  # what was wrong is mended
    status, said = run(study, "st.toml", "--seeds", "1", "--only", "bad")
    assert status == 0 and sorted(results())[0] == "st-0.25M-bad-1"


def test_a_run_of_other_options_is_not_taken_for_this_one(fake, run):
    status, said = run(study, "st.toml", "--seeds", "1", "--only", "one")
    assert status == 0, said
    before = Path("log/st-0.25M-one-1/log.jsonl").read_bytes()
    for collect in ("report/st", "report/new"):
        status, said = run(study, "st.toml", "--seeds", "1", "--steps", "6", "--collect", collect)
        where, cure = "its folder in log/", "move it away"
        if collect == "report/st":
            where, cure = "the run of that name in report/st", "choose another --collect"
        wanted = f"failed    st-0.25M-one-1: {where} has --max_steps 8, but the study asks for 6: "
        wanted += f"{cure}, or give this study's options"
        assert status == 1 and wanted in said, said
        assert Path("log/st-0.25M-one-1/log.jsonl").read_bytes() == before
    assert list(results("report/new")) == ["st-0.25M-two-1"]  # the others went on
    more = ("st.toml", "--seeds", "2", "3", "--only", "one")
    assert run(study, *more)[0] == 0
    status, said = run(study, *more, "--steps", "4")  # those alike are one line
    assert status == 1 and said.count("failed    ") == 1 and "failed    st-0.25M-one-2 and 1 more: " in said, said


def test_other_data_are_said(fake, run, tmp_path):
    run(study, "st.toml", "--seeds", "1", "--only", "one")
    (tmp_path / "more.txt").write_text("Other words than those. " * 2000)
    tokens = ["--files", "more.txt", "--tokenizer", "bytes", "--out", "other", "--workers", "0"]
    run(fineweb, *tokens, "--shard_tokens", "20000")
    status, said = run(study, "st.toml", "--seeds", "1", "--only", "one", "--data_dir", "other")
    assert status == 1 and "has seen other data than that in other: choose another --collect" in said
    status, said = run(study, "st.toml", "--seeds", "9", "--data_dir", "nowhere")
    assert status == 1 and said.startswith("no token shards in nowhere")
    assert not Path("log/st-0.25M-one-9").exists()


def test_equal_runs_of_another_study_are_taken_from_it(fake, run, monkeypatch):
    """Those of the same script, options, seed and data, and no others."""
    assert run(study, "st.toml", "--seeds", "1", "2")[0] == 0
    here = study.this_machine()
    monkeypatch.setattr(study, "this_machine", lambda: "another")
    text = Path("st.toml").read_text()
    text = text.replace("one", "first").replace("two", "second").replace("n_layer = 2", "n_layer = 3")
    Path("other.toml").write_text(text)
    status, said = run(study, "other.toml", "--seeds", "2", "3", "--reuse", "report/st", "--dry")
    assert status == 0 and said.startswith("1 of 4 runs are the same as in report/st, and taken from there\n")
    assert said.count("python train_fake.py") == 3 and not Path("report/other").exists()
    status, said = run(study, "other.toml", "--seeds", "2", "3", "--reuse", "report/st")
    assert status == 0 and said.count("started ") == 3 and "started   other-0.25M-first-2" not in said
    theirs = {kept.folder.name: kept for kept in runs.read_collection("report/st")}["st-0.25M-one-2"]
    others = {kept.folder.name: kept for kept in runs.read_collection("report/other")}
    ours = others["other-0.25M-first-2"]
    assert [ours.machine, theirs.machine] == [here, here]
    assert others["other-0.25M-first-3"].machine == "another"
    assert ours.study == {"name": "other", "size": "0.25M", "entry": "first", "base": None, "rate": 1.0}
    assert (ours.val, ours.train, ours.facts) == (theirs.val, theirs.train, theirs.facts)
    again = run(study, "other.toml", "--seeds", "2", "3", "--reuse", "report/st")[1]
    assert again.startswith("0 of 4 runs are the same") and "started " not in again

    # another text of the script, other data, another budget: nothing is taken
    Path("other.toml").write_text(text)
    for change in ("nothing", "script", "data", "steps"):
        command = ["other.toml", "--seeds", "1", "--only", "first", "--reuse", "report/st", "--dry"]
        if change == "steps":
            command += ["--steps", "4"]
        with monkeypatch.context() as patch:
            if change == "data":
                patch.setattr(study, "look_at_data", lambda jobs, dry: {"data/sample": "other"})
            if change == "script":
                patch.setattr(plan.Source, "hash", "other")
            said = run(study, *command)[1]
        assert said.startswith(f"{int(change == 'nothing')} of 1 runs are the same"), change


def test_a_collection_to_reuse_that_is_not_there_is_said(fake, run):
    status, said = run(study, "st.toml", "--reuse", "results/none")
    assert status == 1 and said.startswith("--reuse results/none: ") and said.count("\n") == 1


def test_a_run_that_another_process_has_is_waited_for(fake, run):
    folder = Path("log/st-0.25M-one-1").resolve()
    folder.mkdir(parents=True)
    lock = filelock.FileLock(folder / ".lock", thread_local=False)
    lock.acquire()
    (folder / ".lock.holder").write_text("process 4711 on here")
    thread = threading.Timer(2, lock.release)
    thread.start()
    status, said = run(study, "st.toml", "--seeds", "1")
    thread.join()
    assert status == 0, said
    assert said.count("st-0.25M-one-1 is in use by process 4711 on here: it has to wait") == 1
    events = [line.split()[1].rstrip(":") for line in said.splitlines() if line.startswith("finished")]
    assert events == ["st-0.25M-two-1", "st-0.25M-one-1"]


def test_a_run_that_the_other_process_ends_is_not_started(fake, run):
    run(study, "st.toml", "--seeds", "1", "--only", "one")
    whole = results()
    folder = Path("log/st-0.25M-one-1")
    log = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text("".join(log.splitlines(keepends=True)[:9]))  # it is still at step 5
    Path("report/st/runs.jsonl").unlink()
    lock = filelock.FileLock(folder.resolve() / ".lock", thread_local=False)
    lock.acquire()

    def end():
        (folder / "log.jsonl").write_text(log)
        lock.release()

    thread = threading.Timer(1, end)
    thread.start()
    status, said = run(study, "st.toml", "--seeds", "1", "--only", "one")
    thread.join()
    assert status == 0 and "finished  st-0.25M-one-1: loss" in said, said
    assert ", by an earlier start\n" in said
    assert results() == whole


def test_one_start_at_a_time(fake, run):
    folder = Path("report/st/out")
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / ".lock"):
        (folder / ".lock.holder").write_text("process 4711 on here")
        status, said = run(study, "st.toml")
    assert status == 1
    assert said == "report/st/out is in use by process 4711 on here: one start of a study at a time\n"


def test_killed_between_the_last_loss_and_the_last_checkpoint(fake, run):
    run(study, "st.toml", "--seeds", "1", "--only", "one")
    whole = results()
    folder = Path("log/st-0.25M-one-1")
    (folder / "step_000008.pt").unlink()
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"event": "score", "st')  # and half a line
    Path("report/st/runs.jsonl").unlink()
    status, said = run(study, "st.toml", "--seeds", "1", "--only", "one")
    assert status == 0 and "resumed   st-0.25M-one-1" in said and results() == whole
    for path in folder.glob("*.pt"):  # somebody has made room
        path.unlink()
    Path("report/st/runs.jsonl").unlink()
    status, said = run(study, "st.toml", "--seeds", "1", "--only", "one")
    assert status == 0 and "resumed" not in said and results() == whole


def fork(*options):
    """Starts a study in a process of its own, without the time to import torch; it prints to said.txt."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        fineweb.locks.clear()
        out = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.argv = ["study", *options]
        study.main()
        status = 0
    except SystemExit as error:
        print(error.code)
    finally:
        os._exit(status)


def wait_for(condition, seconds=300):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, Path("said.txt").read_text()
        time.sleep(0.02)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@needs_fork
def test_killed_again_and_again_and_gone_on_with(fake, run, monkeypatch):
    fake(steps=60, pause="0.01")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_ESTIMATES", 0.2)
    run(study, "st.toml", "--jobs", "4")
    whole = results()
    assert len(whole) == 4
    for path in [*Path("log").iterdir(), Path("report")]:
        path.rename(f"whole-{path.name}")
    random.seed(0)
    ends = 0.0

    def pick():
        return time.monotonic() > ends

    kills = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]
    for number in kills:
        ends = time.monotonic() + random.uniform(0.5, 1.5)
        pid = fork("st.toml", "--jobs", "2")
        wait_for(pick)
        os.kill(pid, number)
        os.waitpid(pid, 0)
    _, status = os.waitpid(fork("st.toml", "--jobs", "2"), 0)
    assert os.waitstatus_to_exitcode(status) == 0, Path("said.txt").read_text()
    assert results() == whole


@needs_fork
def test_nothing_goes_on_without_the_study(fake):
    fake(steps=2000, pause="0.01")
    log = Path("log/st-0.25M-one-1/log.jsonl")
    pid = fork("st.toml")
    wait_for(lambda: log.exists() and log.stat().st_size > 5000)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_for(lambda: not study.user_of(log.parent), 10)
    assert study.last_checkpoint(log.parent) % 500 != 0  # it saved when it ended


# ==========================================================================
# Studies of real scripts


REAL = """
question = "Does it work?"
sizes = ["0.25M"]
seeds = [1, 2]
[options]
n_layer = 1
block_size = 32
batch_tokens = 256
val_tokens = 256
sample_tokens = 2
eval_every = 50
[max_steps]
"0.25M" = 150
[runs]
gpt2 = {}
llama = { base = "gpt2" }
"""


@needs_fork
def test_real_runs_that_are_killed_end_as_those_of_the_commands(run, tmp_path, small_sample, monkeypatch):
    (tmp_path / "st.toml").write_text(REAL)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(fineweb, "write_sample", lambda folder: None)
    options = ["st.toml", "--data_dir", str(small_sample), "--seeds", "1"]
    _, said = run(study, *options, "--dry")
    torch.set_num_threads(1)
    whole = {}
    commands = [line for line in said.splitlines() if line.startswith("python train_")]
    assert len(commands) == 2
    for line in commands:  # what --dry prints, to copy and paste
        words = shlex.split(line)
        script = {"train_gpt2.py": train_gpt2, "train_llama.py": train_llama}[words[1]]
        status, said = run(script, *words[2:])
        assert status == 0, said
        name = words[-1]
        whole[name] = runs.read_run(Path("log") / name).val
    Path("log").rename("whole")

    def pick():  # once the next run has come a good deal further than where it was
        steps = [study.last_step(path)[0] for path in Path("log").glob("st-*")]
        return sum(steps) > done + 3

    for number in (signal.SIGTERM, signal.SIGKILL):
        done = sum(study.last_step(path)[0] for path in Path("log").glob("st-*"))
        pid = fork(*options)
        wait_for(pick)
        os.kill(pid, number)
        os.waitpid(pid, 0)
    _, status = os.waitpid(fork(*options), 0)
    assert os.waitstatus_to_exitcode(status) == 0, Path("said.txt").read_text()
    assert results() == whole
    told = Path("said.txt").read_text()
    assert "stopped; to go on: python -m tools.study st.toml --data_dir" in told and "resumed   st-" in told


@needs_fork
def test_real_runs_of_two_processes_end_as_those_of_one(run, tmp_path, small_sample, monkeypatch):
    (tmp_path / "st.toml").write_text(REAL)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["st.toml", "--data_dir", str(small_sample), "--only", "gpt2", "--seeds", "1", "--steps", "150"]
    options += ["--rates", "0.1"]  # at which rounding stays rounding
    name = "st-0.25M-gpt2-x0.1-1"
    pid = fork(*options, "--nproc_per_node", "2", "--collect", "two")
    wait_for(lambda: study.last_step(Path("log") / name)[0] > 3)
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
    saved = study.last_checkpoint(Path("log") / name)
    assert 3 < saved < 150
    _, status = os.waitpid(fork(*options, "--nproc_per_node", "2", "--collect", "two"), 0)
    assert os.waitstatus_to_exitcode(status) == 0, Path("said.txt").read_text()
    starts = runs.training_starts(*runs.read_log(Path("log") / name / "log.jsonl"))
    assert [start["processes"] for start in starts] == [2, 2]
    Path("log").rename("log-of-two")
    _, status = os.waitpid(fork(*options, "--collect", "one"), 0)
    assert os.waitstatus_to_exitcode(status) == 0, Path("said.txt").read_text()
    assert results("two")[name] == pytest.approx(results("one")[name], rel=1e-4)


def test_an_edited_variant_is_not_overwritten(run, tmp_path, monkeypatch, small_sample):
    (tmp_path / "train_gpt2.py").write_bytes((ROOT / "train_gpt2.py").read_bytes())
    edited = tmp_path / "train_gpt2_rope.py"
    edited.write_text((ROOT / "train_gpt2.py").read_text() + "# mine\n")
    before = edited.read_bytes()
    for module in (plan, vary):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(plan, "load_source", plan.load_source.__wrapped__)
    options = ("--size", "0.25M", "--seeds", "1", "--only", "gpt2-rope", "--data_dir", small_sample)
    status, said = run(study, "gpt2-rope", *options)
    assert status == 1
    assert "failed    gpt2-rope-0.25M-gpt2-rope-1: train_gpt2_rope.py is not what this command writes" in said
    assert edited.read_bytes() == before and not Path("log").exists()


# ==========================================================================
# Words


def make_job(entry, seed, state="to come", rate=1.0, step=0, pace=None, flops=1e6, size="0.25M"):
    place = {"name": "st", "size": size, "entry": entry, "base": None, "rate": rate}
    config = train_gpt2.Config(max_steps=100, batch_tokens=1000, eval_every=50, val_tokens=3000)
    name = f"st-{size}-{entry}-{seed}"
    return plan.Job(name, place, seed, None, True, {}, config, 100, flops, state, "", step, 1.5, pace)


def test_estimates():
    done = make_job("gpt2", 1, "done", step=100, pace=0.1)
    again = make_job("gpt2", 2)
    assert progress.seconds_left([again], 1) is None  # nothing is known
    whole = 0.1 * (100 + 3)  # three evaluations cost as much as a step each
    assert progress.seconds_left([done, again], 1) == pytest.approx(whole)
    twice = make_job("llama", 1, flops=2e6)
    assert progress.seconds_left([done, again, twice], 1) == pytest.approx(3 * whole)  # by its FLOPs
    assert progress.seconds_left([done, again, twice], 2) == pytest.approx(2 * whole)  # it alone takes so long
    half = make_job("gpt2", 3, "running", step=50)
    assert progress.seconds_left([done, half], 1) == pytest.approx(whole / 2)
    assert progress.seconds_left([done], 1) == 0
    assert progress.summary([done, again], 1).startswith("1 of 2 runs done, about 10s left, until ")


def test_the_table_fits_whatever_there_is():
    jobs = [make_job("gpt2", 1, "done"), make_job("gpt2", 2, "running", step=25)]
    jobs.append(make_job("gpt2", 3, "failed"))
    assert progress.table(jobs) == ["0.25M    seed 1   seed 2   seed 3", "gpt2     1.5000      25%   failed"]
    rates = [make_job("gpt2", 1, "done", rate=rate) for rate in (1.0, 0.5)]
    assert progress.table(rates)[0] == "0.25M        x1     x0.5"
    both = [make_job("gpt2", seed, rate=rate) for seed in (1, 2, 3, 4) for rate in (1.0, 0.5)]
    rows = [line.split() for line in progress.table(both)]
    assert rows[1:] == [["gpt2", *"––––"], ["gpt2", "x0.5", *"––––"]]
    many = [make_job("a-long-name-of-a-variant", seed, "done", rate=0.25) for seed in range(12)]
    lines = progress.table(many + [make_job("gpt2", 20, size="0.8M")])
    assert lines[1].split() == ["a-long-name-of-a-variant", "x0.25", "12", "0", "0", "0", "1.5000"]
    assert lines[2].startswith("0.8M") and max(map(len, lines)) <= 80


def test_the_table_is_drawn_in_place_on_a_terminal(monkeypatch, capsys):
    jobs = [make_job("gpt2", 1, "done"), make_job("llama", 1, "running", step=30)]
    screen = progress.Screen(jobs, 1)
    monkeypatch.setattr(screen, "redraws", True)
    monkeypatch.setattr(os, "get_terminal_size", lambda: os.terminal_size((40, 24)))
    screen.next = 0
    child = argparse.Namespace(job=jobs[1])
    screen.refresh([child])
    screen.refresh([child])  # not twice a second
    first = capsys.readouterr().out
    assert first.count("st-0.25M-llama-1  30/100") == 1 and first.count("\n") == 5 and "\x1b" not in first
    assert max(map(len, first.splitlines())) < 40
    screen.event("failed    something")
    assert capsys.readouterr().out == "\x1b[5F\x1b[Jfailed    something\n"


@pytest.mark.parametrize("change, words", [
    (("question", "qestion"), "unknown field `qestion`"),
    (('["0.25M"]', '["1M"]'), "there is no size 1M, only 0.25M, 0.8M, 2.7M, 124M"),
    (('base = "one"', 'base = "on"'), "the base of two, on, is none of its runs"),
    (('{ script = "fake" }', '{ script = "fake", base = "two" }'), "one, two are each other's bases"),
    (("[1, 2]", "[]"), "needs at least one of sizes, seeds, rates and runs"),
    (("[1, 2]", '[1, "x"]'), "Expected `int`, got `str`"),
    (("[1, 2]", "[1]\nrates = [0]"), "rate 0.0 is neither a positive number"),
    (("n_layer = 2", "max_lr = 2"), "max_lr is no option here"),
    (("two =", '"a b" ='), "'a b' is to be a part of a folder's name"),
    (("[runs]", "[runs"), "can't be read: "),
])  # fmt: skip
def test_a_study_that_makes_no_sense_is_one_line(fake, run, change, words):
    text = Path("st.toml").read_text()
    assert change[0] in text
    Path("st.toml").write_text(text.replace(*change))
    status, said = run(study, "st.toml")
    assert status == 1 and said.startswith("st.toml") and words in said and said.count("\n") == 1, said


@pytest.mark.parametrize("options, words", [
    (["ablation"], "there is no study ablation: did you mean ablations?"),
    (["none.toml"], "there is no file none.toml"),
    (["rates", "--rates", "0"], "--rates must be positive numbers"),
    (["rates", "--size", "0.8M"], "--size 0.8M: rates has 0.25M"),
    (["rates", "--only", "gpt3"], "--only gpt3: rates has gpt2, llama"),
    (["rates", "--jobs", "2", "--nproc_per_node", "2"], "--jobs and --nproc_per_node don't go together"),
    (["rates", "--jobs", "0"], "argument --jobs: must be at least 1"),
    (["rates", "--seeds", "1", "1"], "--seeds must be different numbers"),
    ([], "which study? --list names them all"),
])  # fmt: skip
def test_a_wrong_command_line_is_one_line(run, options, words):
    status, said = run(study, *options)
    assert status == 1 and said.startswith(words) and said.count("\n") == 1, said


def test_a_damaged_collection_is_said(fake, run):
    Path("report/st").mkdir(parents=True)
    Path("report/st/runs.jsonl").write_text('{"name": "x"\n')
    status, said = run(study, "st.toml")
    assert status == 1 and "report/st/runs.jsonl, line 1 " in said and "Traceback" not in said
    assert not Path("log").exists()


def test_progress_of_a_log(tmp_path):
    assert study.last_step(tmp_path) == (0, None)
    lines = [json.dumps({"event": "train", "step": step, "loss": 2.5, "ms": 1}) for step in range(3)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"event": "train", "step": 3, "lo')
    assert study.last_step(tmp_path) == (3, 2.5)
