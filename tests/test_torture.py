"""
Kills training, the writer and the downloads, runs them again, and compares the outcome with that of a
run that was never killed. All kills are SIGKILL to all processes.

    python -m pytest tests/test_torture.py -m slow               # a few of each
    KILLS=50 python -m pytest tests/test_torture.py -m slow -v   # fifty at random, all seven scripts

A program is killed at random times, and just before and after each of its writes gets its name.
"""
import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, text
from hub_server import HubServer

import fineweb

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", 2))
SCRIPTS = ["train_gpt2", "train_deepseek"]
if KILLS > 2:
    SCRIPTS += ["train_llama", "train_gemma", "train_mistral", "train_mta", "train_rwkv"]
# a run of some seconds that saves often
SHORT_RUN = [
    "--tiny", "--block_size=32", "--batch_tokens=512", "--val_tokens=512", "--sample_tokens=4", "--n_layer=2",
    "--warmup_steps=2", "--max_steps=24", "--eval_every=4", "--run_name=run", "--data_dir=data",
]  # fmt: skip
WRITER = ["--tokenizer=bytes", "--shard_tokens=30000", "--workers=2", "--out=out"]
NOTES = "a user's notes"  # a file in the folder that must stay as it is

# runs the main() of a script, but kills all of its processes at os.replace() number N, with which each
# write ends: before it is in the middle of the write
KILLED_AT = """
import importlib, os, signal, sys

def counted(source, target):
    global left
    left -= 1
    if left == 0 and moment == "before":
        os.killpg(0, signal.SIGKILL)
    replace(source, target)
    if left == 0:
        os.killpg(0, signal.SIGKILL)

if __name__ == "__main__":  # the writer's processes import this file, too
    left, moment, name = int(sys.argv[1]), *sys.argv[2:4]
    sys.argv = [sys.argv[3] + ".py", *sys.argv[4:]]
    replace, os.replace = os.replace, counted
    importlib.import_module(name).main()
"""


def start(words, home, environment):
    """A program in a process group of its own, which a kill can name."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, cwd=home, env=environment, start_new_session=True, **quiet)


def killed_at_random(words, home, environment):
    """Whether the program was still running when it was killed."""
    process = start(words, home, environment)
    try:
        process.communicate(timeout=random.uniform(0, 12))
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True


def killed_at_write(number, moment, name, options, home, environment):
    """Whether the program came as far as its write with this number."""
    script = home.parent / "killed_at.py"  # a file, since the workers import the main program
    script.write_text(KILLED_AT)
    process = start([script, number, moment, name, *options], home, environment)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def finished(name, options, home, environment):
    process = start([ROOT / f"{name}.py", *options], home, environment)
    said, _ = process.communicate()
    assert process.returncode == 0, said


def survives(name, options, again, outcome, make_home, environment=None):
    """Kills at random, and at each of the first writes, change nothing of outcome(home) in the end.

    again: the options with which a killed program is started once more.
    """
    environment = environment or {}
    home = make_home()
    finished(name, options, home, environment)
    whole = outcome(home)

    home = make_home()
    n = 0
    while n < KILLS:
        words = again if n else options
        n += killed_at_random([ROOT / f"{name}.py", *words], home, environment)
        if not n:
            home = make_home()  # it was through already
    finished(name, again, home, environment)
    assert outcome(home) == whole, "killed at random"

    for number in range(1, KILLS + 2):
        for moment in ("before", "after"):
            home = make_home()
            if killed_at_write(number, moment, name, options, home, environment):
                finished(name, again, home, environment)
                assert outcome(home) == whole, f"killed {moment} write {number}"


@pytest.fixture
def make_home(tmp_path):
    """make_home(): a new, empty folder."""
    numbers = iter(range(1_000_000))

    def make_home():
        home = tmp_path / f"{next(numbers)}/home"
        home.mkdir(parents=True)
        return home

    return make_home


# ---- training


def run_outcome(home):
    """The last event of each kind and step in a run's log, without times, and the last weights."""
    events = {}
    for line in (home / "log/run/log.jsonl").read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # half a line, or an empty one
            continue
        if event["event"] not in ("run", "sample"):
            event.pop("ms", None)
            events[event["event"], event["step"]] = event
    newest = max((home / "log/run").glob("step_*.pt"))
    weights = torch.load(newest, weights_only=True)["model"]
    return newest.name, events, {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_run_ends_as_one_that_was_not(name, sample, make_home):
    def home_with_data():
        home = make_home()
        (home / "data").symlink_to(sample)
        (home / "log/run").mkdir(parents=True)  # --resume wants to see that somebody began
        return home

    survives(name, SHORT_RUN, [*SHORT_RUN, "--resume"], run_outcome, home_with_data)


# ---- the writer and the downloads


def folder_outcome(home):
    """{name: bytes} of all that is in the folder but the lock."""
    files = [path for path in (home / "out").rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(home)): path.read_bytes() for path in files}


def texts(n, seed):
    return [text(1 + 7 * i % 100, seed + i) for i in range(n)]


def parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts(300, 2000)}), path, row_group_size=50)
    return path


@pytest.fixture
def home_with_notes(make_home):
    def home_with_notes():
        home = make_home()
        (home / "out").mkdir()
        (home / "out/notes.txt").write_text(NOTES)
        return home

    return home_with_notes


def test_a_killed_writer_writes_the_same_bytes(tmp_path, home_with_notes):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.txt", parquet(tmp_path / "c.parquet")]
    paths[0].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(300, 0)))
    paths[1].write_text("\n".join(texts(300, 1000)))
    options = ["--files", *paths, *WRITER]
    survives("fineweb", options, options, folder_outcome, home_with_notes)


@pytest.mark.parametrize("options", [WRITER, ["--pretokenized", "--out=out"]])
def test_a_killed_download_is_the_same(options, tmp_path, home_with_notes):
    content = parquet(tmp_path / "c.parquet").read_bytes()
    text_files = {f"sample/10BT/{i:03d}_00000.parquet": content for i in range(3)}
    shard = fineweb.shard_header(5000) + np.arange(5000, dtype=np.uint16).tobytes()
    names = ("val_000000", "train_000001", "train_000002")
    shards = {f"fineweb_{name}.bin": shard for name in names}
    repository, ready_made, _ = fineweb.DATASETS["fineweb"]
    with HubServer({repository: text_files, ready_made: shards}) as hub:
        environment = {**hub.env(), "RETRY_SECONDS": "0.01"}
        survives("fineweb", options, options, folder_outcome, home_with_notes, environment)
