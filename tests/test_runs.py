"""Whole runs of train_gpt2.py: what a user types and what comes of it."""
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers import (SHORT, SMALL, TORCHRUN, assert_same, command, events, load, losses, make, random_items,
                     read_log, with_own_tokenizer, write_items)  # fmt: skip

import fineweb
import train_gpt2
import train_rwkv


@pytest.fixture
def small(run, sample):
    """small(*options): a run of train_gpt2.py of half a second on the offline dataset."""
    return lambda *options: run(train_gpt2, *SMALL, f"--data_dir={sample}", *options)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def content(folder):
    """{name: bytes} of a folder's files, without the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


def wait_for(process, line):
    """Reads what a process prints up to a line that starts like this."""
    for said in process.stdout:
        if said.startswith(line):
            return
    raise AssertionError(f"the process ended without {line!r}")


def start(folder, *arguments, **options):
    return subprocess.Popen(command(*arguments, **options), cwd=folder, stdout=subprocess.PIPE, text=True)


# ---- a run and what it leaves


def test_a_run_evaluates_saves_samples_and_logs(small, log):
    (log / "a").mkdir(parents=True)
    for name in ("notes.txt", "step_best.pt", "log.jsonl"):
        (log / "a" / name).write_text("mine\n")  # of a user's, and stays
    status, said = small("--max_steps=5", "--eval_every=2", "--run_name=a")
    assert status == 0, said
    names = {"log.jsonl", "train_gpt2.py", "step_00000004.pt", "step_00000005.pt"}
    found = content(log / "a")
    assert found.pop("notes.txt") == found.pop("step_best.pt") == b"mine\n"
    assert found["log.jsonl"].startswith(b"mine\n")
    assert names <= found.keys() and sum(name.startswith("step_") for name in found) == 2
    assert (log / "a/train_gpt2.py").read_bytes() == (ROOT / "train_gpt2.py").read_bytes()
    assert [event["step"] for event in read_log(log / "a") if event["event"] == "train"] == [0, 1, 2, 3, 4]
    for kind, n in (("val", 4), ("score", 4), ("sample", 8)):
        steps = [event["step"] for event in read_log(log / "a") if event["event"] == kind]
        assert sorted({*steps}) == [0, 2, 4, 5] and len(steps) == n
    # a run that is killed after its last checkpoint is finished, so all must be in the log by then
    assert said.rindex("step 00005 >") < said.rindex("step_00000005.pt")
    (facts,) = events(log / "a", "run")
    assert facts["config"]["n_embd"] == 16 and facts["config"]["tiny"]
    assert facts["data"]["tokenizer"] == "bytes"
    assert facts["device"] == "cpu" and facts["dtype"] == "torch.float32" and facts["micro_batch"] == 16
    assert facts["changed"] == {} and facts["first_step"] == 0
    for name in ("device", "dtype", "micro_batch"):  # what is taken, not what was asked for
        assert re.search(rf"^{name} +{facts[name]}$", said, re.MULTILINE), name
    assert load(log / "a", 5)["step"] == 5
    assert said.splitlines()[-1].startswith("Next: python train_gpt2.py --run_name a --sample ")


def test_a_run_with_a_tokenizer_of_ones_own(run, tmp_path, log):
    folder, _, _ = with_own_tokenizer(tmp_path)
    write_items(tmp_path / "items.jsonl", random_items(4))
    options = [f"--data_dir={folder}", "--hellaswag=items.jsonl", "--prompt=the of", "--block_size=64"]
    status, said = run(train_gpt2, *SMALL, *options, "--vocab_size=384", "--max_steps=1", "--run_name=a")
    assert status == 0, said
    assert {event["task"] for event in events(log / "a", "score")} == {"hellaswag"}
    assert all(event["text"].startswith("the of") for event in events(log / "a", "sample"))
    status, said = run(train_gpt2, "--run_name=a", "--sample=the of")
    assert status == 0 and "the of" in said, said
    (copy,) = folder.glob("tokenizer-*.json")
    copy.write_text(copy.read_text() + " ")
    fineweb.get_tokenizer.cache_clear()
    for what in ("--sample=the of", "--eval"):
        status, said = run(train_gpt2, "--run_name=a", what)
        assert status == 1 and copy.name in said and said.count("\n") == 1, said


def test_a_run_is_never_overwritten(small, log):
    assert small("--max_steps=1", "--run_name=a")[0] == 0
    before = content(log / "a")
    status, said = small("--max_steps=1", "--run_name=a")
    assert status == 1 and "log/a" in said and "--resume" in said and said.count("\n") == 1
    assert content(log / "a") == before
    # a finished run is evaluated once more, and its log only added to
    status, said = small("--max_steps=1", "--run_name=a", "--resume")
    assert status == 0, said
    after = content(log / "a")
    assert after.pop("log.jsonl").startswith(before.pop("log.jsonl"))
    assert after.keys() == before.keys() and len(losses(log / "a")) == 1
    torch.save(load(log / "a", 1)["model"], log / "after")
    (log / "a/step_00000001.pt").write_bytes(before["step_00000001.pt"])
    assert_same(load(log / "a", 1)["model"], torch.load(log / "after"))


def test_eval_and_sample(small, log):
    assert small("--max_steps=4", "--run_name=a")[0] == 0
    before = content(log / "a")
    trained = events(log / "a", "val")[-1]["loss"]
    status, said = small("--run_name=a", "--eval")
    assert status == 0 and f"{trained:.4f}" in said
    status, said = small("--run_name=a", "--sample", "The number of")
    assert status == 0 and said.count("The number of") == 2
    assert small("--run_name=a", "--sample", "The number of")[1] == said  # the seed is the run's
    status, other = small("--run_name=a", "--sample", "The number of", "--seed=7", "--samples=3")
    assert status == 0 and other != said and other.count("The number of") == 3
    after = content(log / "a")
    assert after.pop("log.jsonl").startswith(before.pop("log.jsonl"))
    assert after == before
    for options in (["--sample", "x"], ["--eval"], ["--resume"]):
        status, said = small("--run_name=b", *options)
        assert status == 1 and "log/b" in said and said.count("\n") == 1
        assert not (log / "b").exists()


def test_the_papers_recipe_and_the_shared_one(run, sample, log):
    common = [*SHORT, "--n_layer=1", "--n_head=1", "--n_embd=16", f"--data_dir={sample}", "--max_steps=1"]
    assert run(train_rwkv, *common, "--run_name=a")[0] == 0
    assert run(train_rwkv, *common, "--run_name=b", "--recipe=shared")[0] == 0
    paper, shared = (events(log / name, "run")[0]["config"] for name in "ab")
    assert paper["beta2"] == 0.99 and shared["beta2"] == 0.95
    assert paper["max_lr"] == shared["max_lr"] == train_rwkv.TINY_RUN["max_lr"]


class Fixed:
    """Stands for a model: the same logits at every position."""

    def __init__(self, n_vocab=257, **logits):
        self.logits = torch.full((n_vocab,), -20.0)
        self.logits[257:] = 100.0  # padding, by far the likeliest
        for letter, logit in logits.items():
            self.logits[256 if letter == "end" else ord(letter)] = logit

    def decode(self, idx, state):
        return self.logits.expand(len(idx), -1), state


def generated(model, prompt="x", **fields):
    model.config = train_gpt2.Config(**{"sample_tokens": 200, "samples": 20, **fields})
    tokenizer = fineweb.get_tokenizer("bytes")
    return train_gpt2.generate(model, tokenizer, prompt, torch.device("cpu"), contextlib.nullcontext())


def test_temperature_and_top_k():
    model = Fixed(a=3.0, b=2.0, c=1.0, n_vocab=384)
    share = "".join(generated(model)).count("b") / 4000
    assert share == pytest.approx(0.245, abs=0.03)  # softmax of 3, 2, 1
    colder = "".join(generated(model, temperature=0.5)).count("b") / 4000
    assert colder == pytest.approx(0.117, abs=0.03)  # of 6, 4, 2
    assert set("".join(generated(model, top_k=2))) == set("xab")
    assert "".join(generated(model, temperature=0)) == ("x" + 200 * "a") * 20
    assert len(set("".join(generated(Fixed(), top_k=0)))) > 100  # of all 257
    assert generated(model, seed=1) != generated(model, seed=2)


def test_a_sample_ends_where_the_text_does():
    texts = generated(Fixed(a=3.0, end=1.0), prompt="Hello")
    assert all(set(text) <= set("Hello" + "a") for text in texts)
    assert len({len(text) for text in texts}) > 5 and min(map(len, texts)) < 15
    assert generated(Fixed(end=3.0), prompt="", samples=2) == ["", ""]


def test_the_checkpoint_of_the_lowest_validation_loss_is_kept(small, log, monkeypatch):
    given = {0: 5.0, 2: 3.0, 4: 4.0, 6: 3.5, 8: 2.0}
    steps = iter(given)
    monkeypatch.setattr(train_gpt2, "validate", lambda *_: given[next(steps)])
    assert small("--max_steps=6", "--eval_every=2", "--run_name=a")[0] == 0
    best = torch.load(log / "a/best.pt", weights_only=True)
    assert best["step"] == 2 and best["best"] == (3.0, 2)
    steps = iter((6, 8))  # on resume the lowest is remembered
    assert small("--max_steps=8", "--eval_every=2", "--run_name=a", "--resume")[0] == 0
    best = torch.load(log / "a/best.pt", weights_only=True)
    assert best["step"] == 8 and best["best"] == (2.0, 8)
    assert_same(best["model"], load(log / "a", 8)["model"])
    given[0], given[2] = 9.0, 8.0
    steps = iter((0, 2))  # a new run from these weights begins its own record
    assert small("--max_steps=2", "--run_name=b", "--init_from=log/a/best.pt")[0] == 0
    assert load(log / "b", 2)["best"] == (8.0, 2)


# ---- resume


@pytest.mark.slow
@pytest.mark.parametrize("line", ["    2/12", "step 00004 | saved", "    5/12", "step 00008 | validation"])
def test_resume_after_a_kill_is_bit_exact(small, sample, tmp_path, log, line):
    options = ["--max_steps=12", "--eval_every=4"]
    assert small(*options, "--run_name=straight")[0] == 0
    process = start(tmp_path, sample, *options, "--run_name=killed")
    wait_for(process, line)
    process.kill()
    process.communicate()
    killed, straight = log / "killed", log / "straight"
    with open(killed / "log.jsonl", "a") as f:
        f.write('{"event": "train", "step": 11, "loss"')  # what a kill in the middle of a write leaves
    (killed / "step_00000012.pt.123.tmp").write_bytes(b"half")
    before = (killed / "log.jsonl").read_bytes()
    # without a checkpoint there is no run yet: the same command starts it
    more = ["--resume"] if list(killed.glob("step_*.pt")) else options
    status, said = small("--run_name=killed", *more)
    assert status == 0, said
    assert (killed / "log.jsonl").read_bytes().startswith(before)
    assert not list(killed.glob("*.tmp"))
    assert losses(killed) == losses(straight) and len(losses(killed)) == 12
    assert [e["loss"] for e in events(killed, "val")] == [e["loss"] for e in events(straight, "val")]
    ours, theirs = load(killed, 12), load(straight, 12)
    assert_same(ours["model"], theirs["model"])
    for number, state in theirs["optimizer"].items():
        assert_same(ours["optimizer"][number], state)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_finishes_the_step_saves_and_ends(small, log, monkeypatch, request, name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.default_int_handler)  # a background job ignores SIGINT
    request.addfinalizer(lambda: signal.signal(number, before))
    assert small("--max_steps=9", "--eval_every=100", "--run_name=b")[0] == 0
    train_step = train_gpt2.train_step

    def signalled(net, model, optimizer, scaler, step, *more):
        if step == 3:
            signal.raise_signal(number)
        return train_step(net, model, optimizer, scaler, step, *more)

    monkeypatch.setattr(train_gpt2, "train_step", signalled)
    status, said = small("--max_steps=9", "--eval_every=100", "--run_name=a")
    assert status == 0 and said.splitlines()[-1] == "Next: python train_gpt2.py --run_name a --resume"
    assert signal.getsignal(number) == signal.default_int_handler
    assert [path.name for path in (log / "a").glob("step_*.pt")] == ["step_00000004.pt"]
    assert len(losses(log / "a")) == 4 and load(log / "a", 4)["step"] == 4
    assert small("--run_name=a", "--resume", "--eval_every=100")[0] == 0
    assert losses(log / "a") == losses(log / "b")
    assert_same(load(log / "a", 9)["model"], load(log / "b", 9)["model"])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(sys.executable,), TORCHRUN], ids=["python", "torchrun"])
def test_a_signal_to_the_process_does_the_same(sample, tmp_path, log, launcher):
    options = ["--max_steps=100000", "--eval_every=100000", "--run_name=a"]
    process = start(tmp_path, sample, *options, launcher=launcher)
    wait_for(process, "    3/")
    process.terminate()
    process.communicate(timeout=300)  # ends when the last of the processes does
    assert process.returncode == 0 or launcher == TORCHRUN
    (checkpoint,) = (log / "a").glob("step_*.pt")
    assert int(checkpoint.stem[5:]) == len(losses(log / "a")) >= 4


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    lambda path: path.write_bytes(b""),
    lambda path: torch.save([1, 2], path),
], ids=["truncated", "empty", "list"])  # fmt: skip
def test_a_damaged_checkpoint_is_said_and_the_one_before_used(small, log, damage):
    assert small("--max_steps=4", "--eval_every=2", "--run_name=a")[0] == 0
    straight = losses(log / "a")
    damage(log / "a/step_00000004.pt")
    status, said = small("--run_name=a", "--resume")
    assert status == 0 and "log/a/step_00000004.pt" in said.splitlines()[0], said
    assert losses(log / "a") == straight and read_log(log / "a")[-1]["step"] == 4
    assert [event["first_step"] for event in read_log(log / "a") if event["event"] == "run"] == [0, 2]
    for path in (log / "a").glob("step_*.pt"):
        damage(path)
    before = content(log / "a")
    status, said = small("--run_name=a", "--resume")
    assert status == 1 and "log/a/step_00000002.pt" in said.splitlines()[-1]
    assert content(log / "a") == before


def test_options_on_resume_win_and_are_logged(run, small, log):
    assert small("--max_steps=2", "--run_name=a")[0] == 0
    options = ["--max_steps=4", "--weight_decay=0.5", "--seed=1337"]  # the seed is the same as before
    status, said = run(train_gpt2, "--run_name=a", "--resume", *options)
    assert status == 0, said
    first, second = [event for event in read_log(log / "a") if event["event"] == "run"]
    assert first["changed"] == {} and second["changed"] == {"max_steps": 4, "weight_decay": 0.5}
    assert load(log / "a", 4)["config"]["weight_decay"] == second["config"]["weight_decay"] == 0.5
    assert second["config"]["n_embd"] == 16 and second["first_step"] == 2
    # they stay without being given again
    assert run(train_gpt2, "--run_name=a", "--resume", "--max_steps=5")[0] == 0
    assert load(log / "a", 5)["config"]["weight_decay"] == 0.5


def test_a_checkpoint_that_does_not_fit_is_one_line(small, log):
    assert small("--max_steps=1", "--run_name=a")[0] == 0
    path = log / "a/step_00000001.pt"
    checkpoint = load(log / "a", 1)
    smaller = {name: tensor for name, tensor in checkpoint["model"].items() if name != "wpe.weight"}
    for change, fact in (
        ({"script": "train_llama"}, "train_llama.py"),
        ({"config": checkpoint["config"] | {"width": 3}}, "train_gpt2.py"),
        ({"model": smaller}, "wpe.weight"),
    ):
        torch.save(checkpoint | change, path)
        for options in (["--resume", "--max_steps=2"], ["--eval"], ["--sample", "x"]):
            status, said = small("--run_name=a", *options)
            assert status == 1 and fact in said and said.count("\n") == 1, said
    torch.save(checkpoint, path)
    status, said = small("--run_name=a", "--resume", "--n_embd=32")
    assert status == 1 and "shape" in said and said.count("\n") == 1


@pytest.mark.slow
def test_the_copy_of_the_script_runs_from_the_runs_folder(small, sample, tmp_path, log):
    assert small("--max_steps=2", "--run_name=a")[0] == 0
    arguments = [sys.executable, "log/a/train_gpt2.py", "--run_name=a", "--resume", "--max_steps=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert len(losses(log / "a")) == 3
    assert (log / "a/train_gpt2.py").read_bytes() == (ROOT / "train_gpt2.py").read_bytes()


# ---- from the weights of another run


def test_a_run_starts_from_the_weights_and_shape_of_a_checkpoint(small, run, sample, log):
    assert small("--max_steps=3", "--run_name=a", "--max_lr=0.02")[0] == 0
    before, after = (event["loss"] for event in events(log / "a", "val"))
    assert after < before - 0.05
    options = [f"--data_dir={sample}", "--batch_tokens=512", "--val_tokens=512", "--sample_tokens=4"]
    options += ["--max_steps=4", "--eval_every=2", "--warmup_steps=0", "--seed=7"]
    options += ["--init_from=log/a/step_00000003.pt"]
    for name in "bc":
        status, said = run(train_gpt2, *options, f"--run_name={name}")
        assert status == 0, said
    assert events(log / "b", "val")[0]["loss"] == after
    (facts,) = events(log / "b", "run")
    config = facts["config"]
    assert facts["first_step"] == 0 and facts["changed"] == {}
    assert config["n_layer"] == 1 and config["n_embd"] == 16 and config["block_size"] == 32
    assert config["seed"] == 7 and config["max_steps"] == 4 and config["max_lr"] == 6e-4
    # resumed it doesn't ask for the other run any more, and ends at the same bits
    shutil.rmtree(log / "a")
    (log / "c/step_00000004.pt").unlink()
    status, said = run(train_gpt2, "--run_name=c", "--resume")
    assert status == 0, said
    assert_same(load(log / "b", 4)["model"], load(log / "c", 4)["model"])


def test_weights_that_a_run_cannot_start_from_are_one_line(small, sample, tmp_path, log):
    assert small("--max_steps=1", "--run_name=a")[0] == 0
    path = "log/a/step_00000001.pt"
    (tmp_path / "text.pt").write_text("no checkpoint")
    for file in ("nowhere.pt", "text.pt"):
        status, said = small(f"--init_from={file}", "--max_steps=1", "--run_name=b")
        assert status == 1 and file in said.splitlines()[-1]
    status, said = small(f"--init_from={path}", "--n_embd=32", "--max_steps=1", "--run_name=b")
    assert status == 1 and said.count("\n") == 1 and "shape" in said
    others = shutil.copytree(sample, tmp_path / "others")
    manifest = json.loads((others / "manifest.json").read_text())
    (others / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "gpt2"}))
    for more in ([f"--init_from={path}", "--run_name=b"], ["--run_name=a", "--eval"]):
        status, said = small(f"--data_dir={others}", "--max_steps=1", *more)
        last = said.splitlines()[-1]
        assert status == 1 and "gpt2" in last and "bytes" in last and str(others) in last
    assert not list(log.glob("b/*.pt"))


# ---- the same run, computed in other ways


@pytest.mark.slow
def test_compiled_run_equals_the_plain_one(small, log):
    assert small("--max_steps=3", "--run_name=plain", "--compile=off")[0] == 0
    status, said = small("--max_steps=3", "--run_name=compiled", "--compile=on")
    assert status == 0, said
    assert losses(log / "compiled") == pytest.approx(losses(log / "plain"), rel=1e-5)
    assert load(log / "compiled", 3)["model"].keys() == load(log / "plain", 3)["model"].keys()
    assert torch._functorch.config.backward_pass_autocast == "off"


def test_half_precision_with_a_loss_scaler(small, log):
    options = ["--max_steps=30", "--max_lr=0.01", "--eval_every=100"]
    assert small(*options, "--dtype=float16", "--run_name=half")[0] == 0
    assert small(*options, "--dtype=float32", "--run_name=full")[0] == 0
    half, full = losses(log / "half"), losses(log / "full")
    assert full[-1] < full[0] - 1 and half == pytest.approx(full, rel=0.03)
    assert load(log / "half", 30)["scaler"]["scale"] > 1
    assert events(log / "half", "run")[0]["dtype"] == "torch.float16"


def test_the_scaler_skips_an_infinite_gradient_and_the_model_is_told(small, log, monkeypatch):
    told = []
    monkeypatch.setattr(train_gpt2.Model, "after_step", lambda self, skipped: told.append(skipped) or {})
    scaler = torch.amp.GradScaler
    too_large = functools.partial(scaler, init_scale=2.0**22)
    monkeypatch.setattr(torch.amp, "GradScaler", too_large)
    assert small("--max_steps=16", "--dtype=float16", "--run_name=a", "--eval_every=8")[0] == 0
    skipped = [event["norm"] is None for event in events(log / "a", "train")]  # null in the log
    assert told == skipped and True in skipped[:5] and True not in skipped[-3:]
    # the scale is in the checkpoint: the resumed run skips no more than the straight one
    straight = load(log / "a", 16)
    (log / "a/step_00000016.pt").unlink()
    assert small("--run_name=a", "--resume")[0] == 0
    assert_same(load(log / "a", 16)["model"], straight["model"])


class Fits:
    """Stands for a model that has no room for more than largest rows, from forward pass number step on."""

    largest, step, error = 0, 0, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def __init__(self, config):
        self.calls = 0

    def parameters(self):
        return [torch.zeros((), requires_grad=True)]

    def to(self, device):
        return self

    def __call__(self, idx, targets):
        self.calls += 1
        if len(idx) > Fits.largest and self.calls > Fits.step:
            raise Fits.error
        return None, torch.zeros((), requires_grad=True)


@pytest.fixture
def find(monkeypatch):
    """find(rows, largest, step): the micro-batch chosen for such a model on a device that is no CPU."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kwargs: zeros(*shape, **kwargs))
    monkeypatch.setattr(train_gpt2, "Model", Fits)

    def find(rows, largest, step=0):
        monkeypatch.setattr(Fits, "largest", largest)
        monkeypatch.setattr(Fits, "step", step)
        config = train_gpt2.Config(block_size=1024)
        return train_gpt2.find_micro_batch(config, rows, 1, torch.device("meta"), contextlib.nullcontext())

    return find


def test_out_of_memory_shrinks_the_micro_batch(find):
    assert [find(512, 10**6), find(512, 63), find(512, 1), find(96, 50), find(12, 5)] == [64, 32, 1, 48, 4]
    assert find(512, 32, step=1) == 32  # beside the gradients and AdamW's moments
    with pytest.raises(SystemExit, match="1024.*--block_size"):
        find(512, 0)


def test_only_out_of_memory_shrinks_it(find, monkeypatch):
    """A mistake in somebody's model must be seen as what it is."""
    for words in (
        "MPS backend out of memory (MPS allocated: 1 GB)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ):
        monkeypatch.setattr(Fits, "error", RuntimeError(words))
        assert find(512, 8) == 8
    monkeypatch.setattr(Fits, "error", RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        find(512, 8)


# ---- things that go wrong


def test_a_loss_that_is_not_finite_stops_the_run(small, log):
    assert small("--max_steps=2", "--eval_every=2", "--run_name=a")[0] == 0
    checkpoint = load(log / "a", 2)
    checkpoint["model"]["wte.weight"][97] = 3e38  # whose logits are beyond fp32
    torch.save(checkpoint, log / "a/step_00000002.pt")
    before = content(log / "a")
    status, said = small("--run_name=a", "--resume", "--max_steps=9", "--eval_every=9")
    assert status == 1
    last = said.splitlines()[-1]
    assert "step 2" in last and "nan" in last and "log/a" in last
    assert content(log / "a").keys() == before.keys() and len(losses(log / "a")) == 2


@pytest.mark.parametrize("options, facts", [
    (["--max_lr=-1"], ["--max_lr", "-1.0"]),
    (["--max_lr=nan"], ["--max_lr", "nan"]),
    (["--beta1=1"], ["--beta1", "1.0"]),
    (["--max_steps=0"], ["--max_steps", "0"]),
    (["--seed=99999999999999999999"], ["--seed", "99999999999999999999"]),
    (["--n_head=3"], ["--n_embd 16", "--n_head 3"]),
    (["--batch_tokens=500"], ["--batch_tokens 500", "--block_size 32"]),
    (["--micro_batch=5"], ["--batch_tokens 512", "--micro_batch 5"]),
    (["--data_dir=nowhere"], ["nowhere", "python fineweb.py"]),
    (["--vocab_size=100"], ["257", "100", "--vocab_size"]),
    (["--block_size=512000", "--batch_tokens=512000"], ["512001", "--block_size"]),
    (["--resume"], ["log/gpt2-tiny", "--run_name"]),
])  # fmt: skip
def test_a_mistake_is_one_line_and_the_right_command_then_works(small, log, options, facts):
    status, said = small(*options)
    assert status == 1 and said.count("\n") == 1 and all(fact in said for fact in facts), said
    assert not list(log.glob("*/*.jsonl")) and not list(log.glob("*/*.pt"))
    assert small("--max_steps=1")[0] == 0


@pytest.mark.parametrize("devices", [0, 2])
def test_more_processes_than_devices_is_one_line(small, monkeypatch, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(fineweb, "fail", lambda message: pytest.fail(message))
    monkeypatch.setattr(train_gpt2, "fail", lambda message: sys.exit(message))  # as in local rank 0
    monkeypatch.setenv("LOCAL_RANK", str(devices))
    status, said = small("--device=cuda")
    assert status == 1 and f"{devices} cuda" in said and "--device" in said and said.count("\n") == 1


def test_without_the_vocabulary_training_goes_on(small, log, sample, tmp_path, monkeypatch):
    def offline(name):
        raise OSError("no network")

    monkeypatch.setattr(fineweb.tiktoken, "get_encoding", offline)
    data = shutil.copytree(sample, tmp_path / "gpt2")
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "gpt2"}))
    status, said = small(f"--data_dir={data}", "--max_steps=1", "--run_name=a")
    assert status == 0 and "TIKTOKEN_CACHE_DIR" in said and not events(log / "a", "sample")
    status, said = small("--run_name=a", "--sample", "x")
    assert status == 1 and "TIKTOKEN_CACHE_DIR" in said and said.count("\n") == 1


def test_a_shard_damaged_during_the_run_is_said(small, sample, tmp_path):
    shutil.copytree(sample, tmp_path / "data")
    with open(tmp_path / "data/fineweb_train_000001.bin", "r+b") as f:
        f.seek(1024)
        f.write(b"\xff\xff" * 5_000_000)
        f.truncate((sample / "fineweb_train_000001.bin").stat().st_size)
    status, said = small(f"--data_dir={tmp_path / 'data'}", "--run_name=a")
    assert status == 1 and "token 65535" in said.splitlines()[-1] and "257" in said.splitlines()[-1]


# ---- nothing lost


@pytest.mark.slow
def test_a_live_run_is_not_touched(small, sample, tmp_path, log):
    """Neither by a second start, nor by --resume; --eval and --sample are welcome, and keep its log."""
    process = start(tmp_path, sample, "--max_steps=100000", "--eval_every=20", "--run_name=a")
    wait_for(process, "   21/")
    for more in ([], ["--resume"]):
        status, said = small("--run_name=a", *more)
        assert status == 1 and "log/a" in said and said.count("\n") == 1
    assert small("--run_name=a", "--eval")[0] == 0
    assert small("--run_name=a", "--sample", "x")[0] == 0
    process.terminate()
    process.communicate()
    assert process.returncode == 0
    steps = [event["step"] for event in read_log(log / "a") if event["event"] == "train"]
    assert steps == list(range(len(steps))) and len(steps) > 20
    assert small("--run_name=a", "--resume", f"--max_steps={len(steps) + 1}")[0] == 0  # the lock went with it


def test_a_full_disk_is_one_line_and_the_next_command_goes_on(small, log, monkeypatch):
    whole = fineweb.write_atomic

    def full(file):
        raise OSError(28, "No space left on device")

    for victim in ("train_gpt2.py", "step_00000002.pt", "step_00000004.pt"):
        name = victim.split(".")[0]
        options = ["--max_steps=5", "--eval_every=2", f"--run_name={name}"]

        def write(path, write, *more, victim=victim):
            whole(path, full if path.name == victim else write, *more)

        monkeypatch.setattr(fineweb, "write_atomic", write)
        status, said = small(*options)
        last = said.splitlines()[-1]
        assert status == 1 and f"log/{name}/{victim}" in last and "No space left on device" in last
        monkeypatch.setattr(fineweb, "write_atomic", whole)
        assert small(*options, "--resume")[0] == 0
        assert losses(log / name) == losses(log / "train_gpt2") and len(losses(log / name)) == 5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_can_not_be_written_is_one_line(small, log):
    assert small("--max_steps=1", "--run_name=a")[0] == 0
    before = content(log / "a")
    path = log / "a/log.jsonl"
    path.rename(log / "kept")
    path.symlink_to("/dev/full")
    status, said = small("--max_steps=9", "--resume", "--run_name=a")
    last = said.splitlines()[-1]
    assert status == 1 and "log/a/log.jsonl" in last
    assert "No space left on device" in last and "--resume" in last
    path.unlink()
    (log / "kept").rename(path)
    assert content(log / "a") == before


def test_validation_is_the_mean_over_the_windows(sample):
    """With a last micro-batch that is smaller than the others."""
    model = make(train_gpt2).eval()
    windows = fineweb.Windows(sample, "val", 48, max_tokens=48 * 7)
    rows = torch.from_numpy(windows.rows(range(7)))
    with torch.no_grad():
        _, loss = model(rows[:, :-1], rows[:, 1:])
    plain = contextlib.nullcontext()
    found = train_gpt2.validate(model, windows, 3, 0, 1, torch.device("cpu"), plain)
    assert found == pytest.approx(loss.item(), rel=1e-6)
