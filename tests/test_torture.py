"""The torture of the writer and the downloads, a short one."""
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


def test_no_training_is_lost(run):
    status, said = run(torture, "training", "--case=gpt2", "--kills", "1", "--writes", "0")
    assert status == 0 and "| train_gpt2 | at random | 1 | 1 |" in said, said


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
