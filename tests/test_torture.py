"""
Kills training, the writer and the downloads, runs them again, and compares the outcome with that of a
run that was never killed. All kills are SIGKILL to all processes.

    python -m pytest tests/test_torture.py -m slow               # a few of each
    KILLS=50 python -m pytest tests/test_torture.py -m slow -v   # fifty at random, all seven scripts

A program is killed at random times, and just before and after each of its writes gets its name.
"""
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from helpers import SHORT, bytes_of, documents, events, load, write_jsonl, write_parquet
from hub_server import HubServer

import fineweb

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", 2))
SCRIPTS = ["train_gpt2", "train_deepseek"]
if KILLS > 2:
    SCRIPTS += ["train_llama", "train_gemma", "train_mistral", "train_mta", "train_rwkv"]
# a run of some seconds that saves often
SHORT_RUN = [*SHORT, "--n_layer=2", "--max_steps=24", "--eval_every=4", "--run_name=run", "--data_dir=data"]
WRITER = ["--tokenizer=bytes", "--shard_tokens=30000", "--workers=2", "--out=out"]

# Runs the main() of a script, but kills all of its processes at os.replace() number N, with which each
# write ends: before it is in the middle of the write. 0: never.
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


class Torture:
    """A program that is run in new folders, and what of the outcome must be the same."""

    def __init__(self, tmp_path, name, options, prepare, outcome, again=None, environment=None):
        self.tmp_path, self.name, self.options, self.again = tmp_path, name, options, again or options
        self.prepare, self.outcome = prepare, outcome
        self.environment = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
        self.script = tmp_path / "killed_at.py"  # a file, since the workers import the main program
        self.script.write_text(KILLED_AT)
        self.homes = iter(range(1_000_000))

    def new_home(self):
        home = self.tmp_path / f"{next(self.homes)}/home"
        home.mkdir(parents=True)
        self.prepare(home)
        return home

    def start(self, home, options, number=0, moment="never", seconds=None):
        """(exit status, what was said) of the program, which is killed at a write or after some seconds."""
        command = [sys.executable, self.script, number, moment, self.name, *options]
        options = {"cwd": home, "env": self.environment, "start_new_session": True, "text": True}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(list(map(str, command)), **options)
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
        return process.returncode, said

    def finish(self, home, options):
        """The outcome of the program, once it is left alone."""
        status, said = self.start(home, options)
        assert status == 0, said
        return self.outcome(home)

    def run(self):
        """Kills at random, and at each of the first writes, change nothing of the outcome in the end."""
        whole = self.finish(self.new_home(), self.options)
        home = self.new_home()
        n = 0
        while n < KILLS:
            status, _ = self.start(home, self.again if n else self.options, seconds=random.uniform(0, 12))
            n += status == -signal.SIGKILL
            if not n:
                home = self.new_home()  # it was through already
        assert self.finish(home, self.again) == whole, "killed at random"
        for number in range(1, KILLS + 2):
            for moment in ("before", "after"):
                home = self.new_home()
                if self.start(home, self.options, number, moment)[0] == -signal.SIGKILL:
                    assert self.finish(home, self.again) == whole, f"killed {moment} write {number}"


def run_outcome(home):
    """The last event of each kind and step in a run's log, without times, and the last weights."""
    found = {}
    for kind in ("train", "val", "score"):
        for event in events(home / "log/run", kind):
            found[kind, event["step"]] = event | {"ms": 0}
    weights = load(home / "log/run", 24)["model"]
    return found, {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_run_ends_as_one_that_was_not(name, sample, tmp_path):
    def prepare(home):
        (home / "data").symlink_to(sample)
        (home / "log/run").mkdir(parents=True)  # --resume wants to see that somebody began

    Torture(tmp_path, name, SHORT_RUN, prepare, run_outcome, again=[*SHORT_RUN, "--resume"]).run()


# ---- the writer and the downloads


def out_outcome(home):
    return bytes_of(home / "out")


def with_notes(home):
    (home / "out").mkdir()
    (home / "out/notes.txt").write_text("a user's notes")  # which must stay as they are


def test_a_killed_writer_writes_the_same_bytes(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.txt", tmp_path / "c.parquet"]
    write_jsonl(paths[0], documents(100))
    paths[1].write_text("\n".join(documents(100, 1000)))
    write_parquet(paths[2], documents(100, 2000))
    Torture(tmp_path, "fineweb", ["--files", *paths, *WRITER], with_notes, out_outcome).run()


@pytest.mark.parametrize("options", [WRITER, ["--pretokenized", "--out=out"]])
def test_a_killed_download_is_the_same(options, tmp_path):
    content = write_parquet(tmp_path / "c.parquet", documents(100)).read_bytes()
    text_files = {f"sample/10BT/{i:03d}_00000.parquet": content for i in range(3)}
    shard = fineweb.shard_header(5000) + np.arange(5000, dtype=np.uint16).tobytes()
    names = ("val_000000", "train_000001", "train_000002")
    shards = {f"fineweb_{name}.bin": shard for name in names}
    repository, ready_made, _ = fineweb.DATASETS["fineweb"]
    with HubServer({repository: text_files, ready_made: shards}) as hub:
        environment = {**hub.env(), "RETRY_SECONDS": "0.01"}
        Torture(tmp_path, "fineweb", options, with_notes, out_outcome, environment=environment).run()
