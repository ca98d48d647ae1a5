"""TensorBoard's curves of a run that is followed, by TensorBoard's own reader."""
import json
import sys

import pytest
from helpers import SMALL, read_log

import train_gpt2
from tools import follow


def curve(folder, tag):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder))
    read.Reload()
    return {event.step: event.value for event in read.Scalars(tag)}, len(read.Scalars(tag))


def test_each_step_has_one_value_the_last_that_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def lines(first, last, loss, is_eval=False):
        """What a start logs that goes from one step to another."""
        found = [{"event": "run", "first_step": first, "config": {"eval": is_eval, "batch_tokens": 512}}]
        for step in range(first, last):
            found.append({"event": "train", "step": step, "loss": loss, "lr": 1e-3, "norm": None, "ms": 1e2})
            found.append({"event": "val", "step": step, "loss": loss + 1})
        return "".join("\n" * (event["event"] == "run") + json.dumps(event) + "\n" for event in found)

    log = tmp_path / "log.jsonl"
    started = lines(0, 7, 5.0)
    log.write_text(started[:-30])
    run = follow.follow(tmp_path, SummaryWriter)
    next(run)
    for more in (started[-30:], '{"event": "train", "st', lines(4, 9, 2.0), lines(3, 4, 9.0, is_eval=True)):
        with open(log, "a") as file:
            file.write(more)
        next(run)
    wanted = {step: 5.0 if step < 4 else 2.0 for step in range(9)}
    for _ in range(2):
        assert curve(tmp_path, "train/loss") == (wanted, 9)
        assert curve(tmp_path, "validation/loss") == ({step: loss + 1 for step, loss in wanted.items()}, 9)
        next(follow.follow(tmp_path, SummaryWriter))  # somebody starts it again


def test_a_real_runs_curves(run, sample, tmp_path, monkeypatch):
    def stop(seconds):
        raise KeyboardInterrupt

    pytest.importorskip("tensorboard")
    assert run(train_gpt2, *SMALL, f"--data_dir={sample}", "--max_steps=3", "--run_name=a")[0] == 0
    monkeypatch.setattr(follow.time, "sleep", stop)
    assert run(follow, "log/a")[0] == 0
    folder = tmp_path / "log/a"
    tags = {"train/loss": "loss", "train/norm": "norm", "train/lr": "lr"}
    for tag, figure in tags.items():
        found = {event["step"]: event[figure] for event in read_log(folder) if event["event"] == "train"}
        assert curve(folder, tag)[0] == pytest.approx(found) and len(found) == 3
    assert min(curve(folder, "train/tokens per second")[0].values()) > 0
    for tag in ("validation/loss", "cloze nanogpt/acc_norm"):
        assert curve(folder, tag)[0].keys() == {0, 3}


def test_without_tensorboard_it_says_how_to_get_it(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, said = run(follow, "log/a")
    assert status == 1 and "pip install tensorboard" in said and said.count("\n") == 1
