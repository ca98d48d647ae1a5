"""The torture of the writer and the downloads, a short one."""
import pytest
import torch

import fineweb
from tools import torture


def test_nothing_is_lost(run):
    status, said = run(torture, "writer", "--case=--files", "--kills", "0", "--writes", "3")
    assert status == 0, said
    at_random, at_writes = said.splitlines()[-2:]
    assert at_random == "| --files | at random | 0 | 0 |"
    assert at_writes == "| --files | at 3 writes | 6 | 6 |"


def test_no_download_is_lost(run):
    status, said = run(torture, "download", "--case=--pretokenized", "--kills", "1", "--writes", "0")
    assert status == 0 and "| --pretokenized | at random | 1 | 1 |" in said, said


SCRIPT = """
import os, pathlib, shutil, sys, time

def main():
    folder = pathlib.Path("log/run")
    folder.mkdir(parents=True, exist_ok=True)
    time.sleep(0.2)
    with open(folder / "log.jsonl", MODE) as log:
        log.write('{"event": "val", "step": 0, "loss": 5.5, "ms": 3}\\n')
    shutil.copy("data/weights.pt", folder / "partial.tmp")
    os.replace(folder / "partial.tmp", folder / "step_000001.pt")

if __name__ == "__main__":
    main()
"""  # in a training script's place, which takes seconds to start


@pytest.mark.parametrize("mode", ["w", "a"])  # appending to what a killed run left is wrong
def test_kills_of_training(run, tmp_path, monkeypatch, mode):
    (tmp_path / "train_fake.py").write_text(SCRIPT.replace("MODE", repr(mode)))
    (tmp_path / "fineweb.py").write_text("")  # a script that is killed at a write imports it

    def write_data(folder):
        folder.mkdir()
        (folder / "cloze.jsonl").write_text("")
        torch.save({"model": {"weight": torch.ones(3)}}, folder / "weights.pt")

    monkeypatch.setattr(fineweb, "write_sample", write_data)
    monkeypatch.setattr(torture, "ROOT", tmp_path)
    monkeypatch.setattr(torture.random, "uniform", lambda low, high: 0.05)  # before it has done anything
    status, said = run(torture, "training", "--case=fake", "--kills", "2", "--writes", "1")
    # killed before the log, all is well; after it, what was there is doubled
    assert "| train_fake | at random | 2 | 2 |" in said, said
    assert f"| train_fake | at 1 writes | 2 | {2 if mode == 'w' else 0} |" in said, said
    assert status == (0 if mode == "w" else 1)


def test_another_outcome_of_training_is_said():
    whole = [{"event": "val", "step": 0, "loss": 5.5}], {"wte.weight": b"abc"}
    assert torture.difference(whole, whole) == ""
    assert torture.difference(([], whole[1]), whole) == "its log has 0 events, not 1"
    assert "'loss': 5.4" in torture.difference(([{"event": "val", "step": 0, "loss": 5.4}], whole[1]), whole)
    assert torture.difference((whole[0], {"wte.weight": b"abd"}), whole) == "its weights are others"


def test_what_is_lost_is_found(run, monkeypatch):
    """A program that leaves something else each time, and one that fails after each kill."""
    runs = iter(range(100))
    monkeypatch.setattr(torture, "finish", lambda *args: {"a.bin": str(next(runs)).encode()})
    monkeypatch.setattr(torture, "start", lambda *args: None)
    monkeypatch.setattr(torture, "kill_at_random", lambda *args: True)
    options = ["writer", "--case=--files", "--kills", "3", "--writes", "0"]
    status, said = run(torture, *options)
    assert status == 1 and said.splitlines()[-1] == "3 kills lost something"

    def fails(*args):
        if next(runs) >= 50:
            raise SystemExit("--files ended with status 1")
        return {}

    runs = iter(range(49, 100))
    monkeypatch.setattr(torture, "finish", fails)
    status, said = run(torture, *options)
    assert status == 1 and said.splitlines()[-1] == "3 kills lost something"


def test_an_unknown_case_is_one_line(run):
    status, said = run(torture, "writer", "--case=other")
    assert status == 1 and said == "--case other: choose --files or --sample\n"
