"""Whole runs of train_gpt2.py: what a user types and what comes of it."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import fineweb
import train_deepseek
import train_gpt2

SMALL = ["--tiny", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_tokens=512", "--val_tokens=1024",
         "--sample_tokens=4", "--log_every=1", "--warmup_steps=1"]  # fmt: skip


def events(folder, kind):
    return [event for event in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if event["event"] == kind]


def losses(folder):
    return [event["loss"] for event in events(folder, "train")]


def weights(folder, step):
    return torch.load(folder / f"step_{step:06d}.pt", weights_only=True)["model"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


CPU = train_gpt2.Machine(0, 1, torch.device("cpu"), "cpu", torch.float32, "as asked for")


@pytest.fixture
def small(run, small_sample):
    """small(*options): a run of train_gpt2.py of a second or two on the offline dataset."""
    return lambda *options: run(train_gpt2, *SMALL, f"--data_dir={small_sample}", *options)


def command(data, *options, launcher=()):
    launcher = launcher or (sys.executable,)
    return [*launcher, str(ROOT / "train_gpt2.py"), *SMALL, f"--data_dir={data}", *options]


def torchrun(processes):
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")


def finish(arguments, folder, **environment):
    result = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# ---- a run and what it leaves


def test_a_run_evaluates_saves_samples_and_logs(small, tmp_path):
    status, said = small("--max_steps=5", "--eval_every=2", "--run_name=a")
    assert status == 0, said
    folder = tmp_path / "log/a"
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".lock")}
    assert names == {"log.jsonl", "train_gpt2.py", "step_000004.pt", "step_000005.pt", "cloze_nanogpt.json"}
    assert (folder / "train_gpt2.py").read_text() == (ROOT / "train_gpt2.py").read_text()
    assert [event["step"] for event in events(folder, "train")] == [0, 1, 2, 3, 4]
    assert [event["step"] for event in events(folder, "val")] == [0, 2, 4, 5]
    assert [event["step"] for event in events(folder, "score")] == [0, 2, 4, 5]
    assert len(events(folder, "sample")) == 8
    # a run that is killed after its last checkpoint is finished, so all must be in the log by then
    assert said.rindex("step 00005 | saved") > said.rindex("step 00005 >")
    (facts,) = events(folder, "run")
    for name in ("git", "torch", "device", "dtype", "parameters", "flops_per_token", "data", "config"):
        assert facts[name], name
    assert facts["config"]["n_embd"] == 16 and facts["data"]["tokenizer"] == "bytes"
    assert re.search(r"    3/5  loss \d\.\d{3}  lr \d\.\de-\d\d  norm \d+\.\d\d  [\d.]+k? tok/s  eta \d+s", said)
    assert "MFU" not in said and "--sample" in said.splitlines()[-1]
    checkpoint = torch.load(folder / "step_000005.pt", weights_only=True)
    assert checkpoint["step"] == 5 and not any(name.startswith(("_orig_mod", "module")) for name in checkpoint["model"])
    score = json.loads((folder / "cloze_nanogpt.json").read_text())
    assert score["step"] == 5 and len(score["predictions"]) == 40


def test_a_run_is_never_overwritten(small, tmp_path):
    assert small("--max_steps=1", "--run_name=a")[0] == 0

    def content():
        files = [path for path in (tmp_path / "log/a").iterdir() if not path.name.startswith(".lock")]
        return {path.name: path.read_bytes() for path in files}

    before = content()
    status, said = small("--max_steps=1", "--run_name=a")
    assert status == 1 and said == "log/a already holds a run: continue it with --resume, or choose another --run_name\n"
    status, said = small("--max_steps=1", "--run_name=a", "--resume")
    assert status == 1 and "is finished at step 1" in said
    assert content() == before


def test_eval_and_sample(small, tmp_path):
    assert small("--max_steps=4", "--run_name=a")[0] == 0
    trained = events(tmp_path / "log/a", "val")[-1]["loss"]
    status, said = small("--run_name=a", "--eval")
    assert status == 0 and f"step 00004 | validation loss {trained:.4f}" in said and "cloze (nanogpt): acc" in said
    assert losses(tmp_path / "log/a") and len(list((tmp_path / "log/a").glob("*.pt"))) == 2
    status, said = small("--run_name=a", "--sample", "The number of")
    assert status == 0 and said.count("The number of") == 2
    assert small("--run_name=a", "--sample", "The number of")[1] == said  # the seed is the run's
    status, other = small("--run_name=a", "--sample", "The number of", "--seed=7", "--samples=3")
    assert status == 0 and other != said and other.count("The number of") == 3
    status, said = small("--run_name=b", "--sample", "x")
    assert status == 1 and said == "log/b holds no checkpoint: train it first, or name another run with --run_name\n"


def test_padded_ids_are_never_sampled():
    class Padding:
        def decode(self, idx, state):
            logits = torch.zeros(len(idx), 384)
            logits[:, 257:] = 100.0  # the padding is by far the likeliest
            return logits, state

    tokenizer = fineweb.get_tokenizer("bytes")
    config = train_gpt2.Config(sample_tokens=300, seed=0, samples=1)
    (text,) = train_gpt2.generate(Padding(), tokenizer, "a", config, CPU)
    assert text.startswith("a") and len(text) > 200


class Fixed:
    """Stands for a model: the same logits at every position."""

    def __init__(self, **logits):
        self.logits = torch.full((257,), -20.0)
        for letter, logit in logits.items():
            self.logits[256 if letter == "end" else ord(letter)] = logit

    def decode(self, idx, state):
        return self.logits.expand(len(idx), -1), state


def generated(model, prompt="x", **fields):
    config = train_gpt2.Config(**{"sample_tokens": 200, "samples": 20, **fields})
    return train_gpt2.generate(model, fineweb.get_tokenizer("bytes"), prompt, config, CPU)


def test_temperature_and_top_k():
    model = Fixed(a=3.0, b=2.0, c=1.0)
    share = "".join(generated(model)).count("b") / 4000
    assert share == pytest.approx(0.245, abs=0.03)  # softmax of 3, 2, 1
    colder = "".join(generated(model, temperature=0.5)).count("b") / 4000
    assert colder == pytest.approx(0.117, abs=0.03)  # of 6, 4, 2
    assert set("".join(generated(model, top_k=2))) == set("xab")
    assert "".join(generated(model, temperature=0)) == ("x" + 200 * "a") * 20
    assert "".join(generated(model, temperature=1e-40)) == ("x" + 200 * "a") * 20  # no overflow
    assert len(set("".join(generated(Fixed(), top_k=0)))) > 100  # of all 257
    assert generated(model, seed=1) != generated(model, seed=2)


def test_a_sample_ends_where_the_text_does():
    texts = generated(Fixed(a=3.0, end=1.0), prompt="Hello")
    assert all(set(text) <= set("Hello" + "a") for text in texts)
    assert len({len(text) for text in texts}) > 5 and min(map(len, texts)) < 15
    assert generated(Fixed(end=3.0), prompt="", samples=2) == ["", ""]


# ---- resume


def test_resume_after_a_kill_is_bit_exact(small, small_sample, tmp_path):
    options = ["--max_steps=12", "--eval_every=4"]
    assert small(*options, "--run_name=straight")[0] == 0
    straight, killed = tmp_path / "log/straight", tmp_path / "log/killed"
    process = subprocess.Popen(command(small_sample, *options, "--run_name=killed"), cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not (killed / "step_000004.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    with open(killed / "log.jsonl", "a") as f:
        f.write('{"event": "train", "step": 11, "loss"')  # what a kill in the middle of a write leaves
    status, said = small("--run_name=killed", "--resume")
    assert status == 0, said
    assert losses(killed) == losses(straight)
    assert [e["loss"] for e in events(killed, "val")] == [e["loss"] for e in events(straight, "val")]
    assert [e["text"] for e in events(killed, "sample")] == [e["text"] for e in events(straight, "sample")]
    assert_same(weights(killed, 12), weights(straight, 12))
    assert_same(*[{f"{i} {name}": tensor for i, state in torch.load(folder / "step_000012.pt", weights_only=True)["optimizer"].items()
                   for name, tensor in state.items()} for folder in (killed, straight)])  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_ends(small, small_sample, tmp_path, number):
    process = subprocess.Popen(command(small_sample, "--max_steps=100000", "--eval_every=100000", "--run_name=a"), cwd=tmp_path,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    for line in process.stdout:
        if line.startswith("    3/"):
            break
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait() == 0
    checkpoint = max((tmp_path / "log/a").glob("step_*.pt"))  # the other one is of step 0
    step = int(checkpoint.stem[5:])
    assert step == len(losses(tmp_path / "log/a")) >= 4 and f"saved {checkpoint.relative_to(tmp_path)}" in rest
    assert rest.splitlines()[-1].endswith("python train_gpt2.py --run_name a --resume")
    assert small("--run_name=a", "--resume", f"--max_steps={step + 2}", "--eval_every=100")[0] == 0
    assert len(losses(tmp_path / "log/a")) == step + 2


@pytest.mark.parametrize("damage", [lambda content: content[:-1000], lambda content: b"", lambda content: bytes(1000)])
def test_a_damaged_checkpoint_is_said_and_the_one_before_used(small, tmp_path, damage):
    assert small("--max_steps=4", "--eval_every=2", "--run_name=a")[0] == 0
    straight = losses(tmp_path / "log/a")
    newest = tmp_path / "log/a/step_000004.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    status, said = small("--run_name=a", "--resume")
    assert status == 0 and said.startswith("log/a/step_000004.pt is damaged"), said
    assert losses(tmp_path / "log/a") == straight and events(tmp_path / "log/a", "run")[-1]["first_step"] == 2


def test_options_on_resume(small, tmp_path):
    assert small("--max_steps=2", "--run_name=a")[0] == 0
    for option, message in (("--n_layer=2", "--n_layer 2: the checkpoint has 1"), ("--seed=1", "--seed 1: the checkpoint has 1337"),
                            ("--recipe=shared", "--recipe shared: the checkpoint has paper"),
                            ("--batch_tokens=1024", "--batch_tokens 1024: the checkpoint has 512")):  # fmt: skip
        status, said = small("--run_name=a", "--resume", "--max_steps=4", option)
        assert status == 1 and said.startswith(message) and said.count("\n") == 1
    status, said = small("--run_name=a", "--resume", "--max_steps=4", "--weight_decay=0.5", "--micro_batch=4")
    assert status == 0
    checkpoint = torch.load(tmp_path / "log/a/step_000004.pt", weights_only=True)
    assert checkpoint["config"]["weight_decay"] == 0.5 and checkpoint["config"]["max_steps"] == 4


def test_resume_needs_no_option_of_the_first_start(small, run, tmp_path):
    assert small("--max_steps=2", "--run_name=a")[0] == 0
    status, said = run(train_gpt2, "--run_name=a", "--resume", "--max_steps=3")
    assert status == 0 and len(losses(tmp_path / "log/a")) == 3, said


def test_a_checkpoint_of_another_version_is_refused(small, tmp_path):
    assert small("--max_steps=1", "--run_name=a")[0] == 0
    folder = tmp_path / "log/a"
    path = tmp_path / "log/a/step_000001.pt"
    checkpoint = torch.load(path, weights_only=True)
    older = {"script_hash": "0123456789abcdef"}
    for change in ({"format": 1}, older | {"config": checkpoint["config"] | {"width": 3}}):
        torch.save(checkpoint | change, path)
        status, said = small("--run_name=a", "--resume", "--max_steps=2")
        assert status == 1 and said == (
            "the checkpoint is of another version of this script: "
            "run its copy, PYTHONPATH=. python log/a/train_gpt2.py\n"
        )
    torch.save(checkpoint | {"script": "train_llama"}, path)
    assert small("--run_name=a", "--eval") == (1, "the checkpoint was made by train_llama.py: use that script\n")
    # the copy that is named is the one that made the checkpoint
    (folder / "train_gpt2.2.py").write_text("second")
    changed = {"format": 1, "script_hash": fineweb.script_hash(folder / "train_gpt2.2.py")}
    torch.save(checkpoint | changed, path)
    assert small("--run_name=a", "--eval")[1].endswith("python log/a/train_gpt2.2.py\n")


def test_a_changed_script_is_said_and_weights_that_do_not_fit_are_one_line(small, tmp_path):
    assert small("--max_steps=1", "--run_name=a")[0] == 0
    path = tmp_path / "log/a/step_000001.pt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"script_hash": "0123456789abcdef"}, path)
    for options in (["--sample", "x"], ["--eval"]):
        status, said = small("--run_name=a", *options)
        assert status == 0 and said.startswith("note: train_gpt2.py has changed since this checkpoint")
        assert "PYTHONPATH=. python log/a/train_gpt2.py\n" in said
    for change in (lambda model: model.pop("wpe.weight"), lambda model: model.update({"wpe.weight": torch.zeros(3)})):
        model = dict(checkpoint["model"])
        change(model)
        torch.save(checkpoint | {"script_hash": "0123456789abcdef", "model": model}, path)
        status, said = small("--run_name=a", "--eval")
        assert status == 1 and said.count("\n") == 2
        assert said.splitlines()[1].startswith("the checkpoint's weights don't fit this script's Model")


# ---- from the weights of another run


@pytest.mark.parametrize("script", [train_gpt2, train_deepseek])  # one with buffers, too
def test_a_run_starts_at_the_loss_of_the_checkpoint_that_it_is_initialised_from(script, run, small_sample, tmp_path):
    shape = ["--n_layer=2", "--block_size=32", "--batch_tokens=512", "--val_tokens=1024", "--sample_tokens=4"]
    common = ["--tiny", f"--data_dir={small_sample}", *shape, "--warmup_steps=1"]
    assert run(script, *common, "--max_steps=3", "--run_name=a", "--max_lr=0.02")[0] == 0
    before, after = (event["loss"] for event in events(tmp_path / "log/a", "val"))
    assert after < before - 0.05
    # the shape comes with the weights, but for what is given; data, schedule and seed are the new run's
    options = [f"--data_dir={small_sample}", "--batch_tokens=512", "--val_tokens=1024", "--sample_tokens=4"]
    options += ["--max_steps=2", "--warmup_steps=0", "--seed=7", "--init_from=log/a/step_000003.pt"]
    status, said = run(script, *options, "--run_name=b")
    assert status == 0, said
    first, _ = (event["loss"] for event in events(tmp_path / "log/b", "val"))
    assert first == after
    (facts,) = events(tmp_path / "log/b", "run")
    config = facts["config"]
    assert config["n_layer"] == 2 and config["n_embd"] == 128 and config["block_size"] == 32
    assert config["seed"] == 7 and config["max_steps"] == 2 and config["batch_tokens"] == 512
    assert config["init_from"] == "log/a/step_000003.pt" and facts["first_step"] == 0
    # it has its own optimizer: the first step is AdamW's first, which moves each weight by about the rate
    start = weights(tmp_path / "log/b", 0)
    assert_same(start, weights(tmp_path / "log/a", 3))
    optimizer = torch.load(tmp_path / "log/b/step_000000.pt", weights_only=True)["optimizer"]
    assert optimizer == {}
    # resumed it doesn't ask for the other run any more
    shutil.rmtree(tmp_path / "log/a")
    status, said = run(script, "--run_name=b", "--resume", "--max_steps=3")
    assert status == 0, said
    assert len(events(tmp_path / "log/b", "train")) == 3


def test_an_initialised_run_resumes_bit_for_bit(small, tmp_path):
    assert small("--max_steps=2", "--run_name=a")[0] == 0
    start = "--init_from=log/a/step_000002.pt"
    assert small(start, "--max_steps=4", "--run_name=whole")[0] == 0
    assert small(start, "--max_steps=4", "--run_name=parts", "--eval_every=2")[0] == 0
    (tmp_path / "log/parts/step_000004.pt").unlink()
    assert small("--run_name=parts", "--resume")[0] == 0
    assert_same(weights(tmp_path / "log/whole", 4), weights(tmp_path / "log/parts", 4))
    status, said = small("--run_name=parts", "--resume", "--max_steps=5", "--init_from=log/whole/step_000004.pt")
    assert status == 1 and said.startswith("--init_from log/whole/step_000004.pt: the checkpoint has log/a/step_000002.pt")


def test_weights_that_a_run_cannot_start_from_are_one_line(small, small_sample, tmp_path):
    assert small("--max_steps=1", "--run_name=a")[0] == 0
    path = "log/a/step_000001.pt"
    (tmp_path / "text.pt").write_text("no checkpoint")
    wrong = {
        "nowhere.pt": "--init_from nowhere.pt is not a whole checkpoint: [Errno 2] No such file",
        "text.pt": "--init_from text.pt is not a whole checkpoint: File is not a zip file",
        "log/a": "--init_from log/a is not a whole checkpoint: [Errno 21] Is a directory",
    }
    for file, expected in wrong.items():
        status, said = small(f"--init_from={file}", "--max_steps=1", "--run_name=b")
        assert status == 1 and said.startswith(expected) and said.count("\n") == 1
    # SMALL gives the width, and this is another one
    status, said = small(f"--init_from={path}", "--n_embd=32", "--max_steps=1", "--run_name=b")
    assert status == 1 and "the checkpoint's weights don't fit this script's Model" in said.splitlines()[-1]
    others = shutil.copytree(small_sample, tmp_path / "others")
    manifest = json.loads((others / "manifest.json").read_text())
    (others / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "gpt2"}))
    status, said = small(f"--init_from={path}", f"--data_dir={others}", "--max_steps=1", "--run_name=b")
    assert status == 1
    assert said == f"--init_from {path} was trained on tokens of bytes, but {others} has those of gpt2\n"
    assert not (tmp_path / "log/b").exists()


# ---- edited scripts


def test_the_copy_of_a_changed_script_is_put_beside_the_first(small, tmp_path, monkeypatch):
    first = (ROOT / "train_gpt2.py").read_bytes()
    assert small("--max_steps=1", "--run_name=a")[0] == 0
    changed = tmp_path / "train_gpt2.py"
    changed.write_bytes(first + b"# changed\n")
    monkeypatch.setattr(train_gpt2, "__file__", str(changed))
    for steps in (2, 3):  # the second time it is there already
        assert small("--run_name=a", "--resume", f"--max_steps={steps}")[0] == 0
    copies = {path.name: path.read_bytes() for path in (tmp_path / "log/a").glob("*.py")}
    assert copies == {"train_gpt2.py": first, "train_gpt2.2.py": first + b"# changed\n"}


def test_a_script_that_is_edited_while_it_runs_is_known_by_the_text_that_runs(small, tmp_path, monkeypatch):
    script = tmp_path / "train_gpt2.py"
    script.write_bytes((ROOT / "train_gpt2.py").read_bytes())
    monkeypatch.setattr(train_gpt2, "__file__", str(script))

    def edited(*arguments):
        with open(script, "a") as f:
            f.write("# edited\n")
        return []

    monkeypatch.setattr(fineweb, "catch_signals", edited)
    assert small("--max_steps=1", "--run_name=a")[0] == 0
    trained = fineweb.script_hash(tmp_path / "log/a/train_gpt2.py")
    assert torch.load(tmp_path / "log/a/step_000001.pt", weights_only=True)["script_hash"] == trained
    assert trained != fineweb.script_hash(script)


def test_the_copy_of_the_script_runs_from_the_runs_folder(small, small_sample, tmp_path):
    assert small("--max_steps=2", "--run_name=a")[0] == 0
    (loss,) = [event["loss"] for event in events(tmp_path / "log/a", "val") if event["step"] == 2]
    arguments = [sys.executable, "log/a/train_gpt2.py", *SMALL, f"--data_dir={small_sample}", "--run_name=a"]
    said = finish([*arguments, "--eval"], tmp_path, PYTHONPATH=str(ROOT))
    assert f"step 00002 | validation loss {loss:.4f}" in said
    said = finish([*arguments, "--resume", "--max_steps=3"], tmp_path, PYTHONPATH=str(ROOT))
    assert "--max_steps 3, no longer 2: this changes the learning rate" in said
    assert [path.name for path in (tmp_path / "log/a").glob("*.py")] == ["train_gpt2.py"]
    assert (tmp_path / "log/a/train_gpt2.py").read_bytes() == (ROOT / "train_gpt2.py").read_bytes()


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (999_999, 1_000_000, 250):
        (tmp_path / f"step_{step:06d}.pt").write_bytes(b"")
    (tmp_path / "step_best.pt").write_bytes(b"")  # somebody's own
    names = [path.name for path in train_gpt2.checkpoint_paths(tmp_path)]
    assert names == ["step_000250.pt", "step_999999.pt", "step_1000000.pt"]


def test_torchruns_own_restart_goes_on_by_itself(small, tmp_path, monkeypatch):
    assert small("--max_steps=4", "--eval_every=2", "--run_name=a")[0] == 0
    straight = losses(tmp_path / "log/a")
    (tmp_path / "log/a/step_000004.pt").unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert small("--max_steps=4", "--eval_every=2", "--run_name=a")[0] == 0
    assert losses(tmp_path / "log/a") == straight and events(tmp_path / "log/a", "run")[-1]["first_step"] == 2
    shutil.rmtree(tmp_path / "log/a")
    (tmp_path / "log/a").mkdir()  # crashed before it saved anything: from the start
    assert small("--max_steps=4", "--eval_every=2", "--run_name=a")[0] == 0
    assert losses(tmp_path / "log/a") == straight


# ---- the same run, cut in other ways


def test_micro_batches_and_processes_change_nothing_but_rounding(small, small_sample, tmp_path):
    options = ["--max_steps=6", "--eval_every=3"]
    assert small(*options, "--run_name=one", "--micro_batch=16")[0] == 0
    assert small(*options, "--run_name=four", "--micro_batch=4")[0] == 0
    finish(command(small_sample, *options, "--run_name=two", "--micro_batch=4", launcher=torchrun(2)), tmp_path, OMP_NUM_THREADS="1")
    one = tmp_path / "log/one"
    for other in (tmp_path / "log/four", tmp_path / "log/two"):
        assert losses(other) == pytest.approx(losses(one), rel=1e-5)
        assert [e["loss"] for e in events(other, "val")] == pytest.approx([e["loss"] for e in events(one, "val")], rel=1e-5)
        assert [e["norm"] for e in events(other, "train")] == pytest.approx([e["norm"] for e in events(one, "train")], rel=1e-3)
        for name, tensor in weights(one, 6).items():
            torch.testing.assert_close(weights(other, 6)[name], tensor, rtol=0, atol=2e-4)
    scores = [json.loads((tmp_path / f"log/{run}/cloze_nanogpt.json").read_text()) for run in ("one", "two")]
    different = sum(a != b for a, b in zip(scores[0]["predictions"], scores[1]["predictions"]))
    assert different <= 2  # the weights differ by rounding; the scoring itself is compared in test_hellaswag.py
    status, said = small("--run_name=two", "--resume", "--max_steps=8", "--eval_every=3")  # on one process now
    assert status == 0 and len(losses(tmp_path / "log/two")) == 8


def test_gradients_are_the_mean_over_the_batch(small, tmp_path):
    """If the division by the number of micro-steps were wrong, the clipped norm would tell."""
    assert small("--max_steps=1", "--run_name=one", "--micro_batch=16")[0] == 0
    assert small("--max_steps=1", "--run_name=sixteen", "--micro_batch=1")[0] == 0
    norms = [events(tmp_path / "log" / run, "train")[0]["norm"] for run in ("one", "sixteen")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_half_precision_with_a_loss_scaler(small, tmp_path):
    status, said = small("--max_steps=30", "--dtype=float16", "--run_name=half", "--max_lr=0.01")
    assert status == 0 and re.search(r"^dtype +torch.float16 \(as asked for\)$", said, re.MULTILINE), said
    assert small("--max_steps=30", "--dtype=float32", "--run_name=full", "--max_lr=0.01")[0] == 0
    half, full = losses(tmp_path / "log/half"), losses(tmp_path / "log/full")
    assert full[-1] < full[0] - 1 and half == pytest.approx(full, rel=0.03)
    checkpoint = torch.load(tmp_path / "log/half/step_000030.pt", weights_only=True)
    assert checkpoint["scaler"]["scale"] > 1


def test_scaler_skips_an_infinite_gradient(small, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0**40, enabled=enabled))
    assert small("--max_steps=40", "--dtype=float16", "--run_name=half", "--eval_every=100")[0] == 0
    norms = [event["norm"] for event in events(tmp_path / "log/half", "train")]
    assert None in norms[:10] and None not in norms[-3:]  # null in the log: a skipped step


def test_the_model_is_told_of_a_skipped_step(small, tmp_path, monkeypatch):
    """after_step() moves biases and counts steps: it must know where the scaler took no step."""
    told = []
    monkeypatch.setattr(train_gpt2.Model, "after_step", lambda self, skipped: told.append(skipped) or {})
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0**40, enabled=enabled))
    assert small("--max_steps=30", "--dtype=float16", "--run_name=half", "--eval_every=100")[0] == 0
    assert told == [event["norm"] is None for event in events(tmp_path / "log/half", "train")]
    assert set(told) == {True, False}


def test_compiled_run_equals_the_plain_one(small, tmp_path):
    assert small("--max_steps=3", "--run_name=plain", "--compile=off")[0] == 0
    status, said = small("--max_steps=3", "--run_name=compiled", "--compile=on")
    assert status == 0, said
    assert losses(tmp_path / "log/compiled") == pytest.approx(losses(tmp_path / "log/plain"), rel=1e-5)
    assert weights(tmp_path / "log/compiled", 3).keys() == weights(tmp_path / "log/plain", 3).keys()


# ---- things that go wrong


def test_a_loss_that_is_not_finite_stops_the_run(small, tmp_path):
    assert small("--max_steps=2", "--eval_every=2", "--run_name=a")[0] == 0
    path = tmp_path / "log/a/step_000002.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["wte.weight"][97] = 3e38  # whose logits are beyond fp32
    torch.save(checkpoint, path)
    status, said = small("--run_name=a", "--resume", "--max_steps=9", "--eval_every=9")
    assert status == 1
    assert said.splitlines()[-1] == "stopped at step 2: loss nan, gradient norm nan; the last good checkpoint, if any, is in log/a"
    assert len(losses(tmp_path / "log/a")) == 2


@pytest.mark.parametrize("options, message", [
    (["--n_lyer=3"], "unknown option --n_lyer=3: did you mean --n_layer? (--help lists them all)"),
    (["--max_step", "3"], "unknown option --max_step: did you mean --max_steps? (--help lists them all)"),
    (["--max_steps=ten"], "argument --max_steps: invalid int value: 'ten'"),
    (["--max_lr=-1"], "--max_lr -1.0: must be more than 0"),
    (["--max_lr=nan"], "--max_lr nan: must be more than 0"),
    (["--max_lr=1e-5"], "--min_lr 0.0002 is more than --max_lr 1e-05"),
    (["--max_steps=5", "--warmup_steps=6"], "--warmup_steps 6 is more than --max_steps 5"),
    (["--beta1=1"], "--beta1 1.0: must be less than 1"),
    (["--seed=99999999999999999999"], "--seed 99999999999999999999: must be at most 4611686018427387904"),
    (["--n_layer=1000000"], "--n_layer 1000000: must be at most 65536"),
    (["--n_embd=65536", "--n_layer=4"], "the model has 206,"),
    (["--run_name=../a"], "--run_name ../a: must be the name of a folder in log/"),
    ([f"--run_name={300 * 'a'}"], f"--run_name {300 * 'a'}: must be the name of a folder in log/"),
    (["--device=tpu"], "argument --device: invalid choice: 'tpu'"),
    (["--n_head=3"], "--n_embd 16 is not a multiple of --n_head 3"),
    (["--batch_tokens=500"], "--batch_tokens 500 can't be split into 1 process(es) x micro-batches of 1 row(s) x --block_size 32"),
    (["--micro_batch=5"], "--batch_tokens 512 can't be split into 1 process(es) x micro-batches of 5 row(s) x --block_size 32"),
    (["--data_dir=nowhere"], "no token shards in nowhere: run `python fineweb.py`"),
    (["--vocab_size=100"], "has a vocabulary of 257, the model one of 100"),
    (["--block_size=512000", "--batch_tokens=512000"], "has no val shard that holds 512001 tokens"),
    (["--resume"], "log/gpt2-tiny holds no checkpoint: train it first, or name another run with --run_name"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(small, tmp_path, options, message):
    status, said = small(*options)
    assert status == 1 and said.startswith(message) or message in said and said.count("\n") == 1, said
    assert said.count("\n") == 1 and "Traceback" not in said
    assert not (tmp_path / "log").exists()


def test_no_cuda_no_traceback(small):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    status, said = small("--device=cuda")
    assert status == 1 and "finds 0 cuda device(s) here" in said and said.count("\n") == 1


def test_more_processes_than_devices_is_one_line(small, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    status, said = small("--device=cuda")
    assert status == 1 and "finds 2 cuda device(s) here: start fewer processes" in said and said.count("\n") == 1


def test_help_names_every_option_with_its_default(run):
    status, said = run(train_gpt2, "--help")
    assert "524288" in said and "--resume" in said
    for name, field in train_gpt2.Config.__dataclass_fields__.items():
        assert f"--{name}" in said and f"[{field.default}]" in " ".join(said.split())


def test_a_shard_damaged_during_the_run_is_said(small, small_sample, tmp_path):
    shutil.copytree(small_sample, tmp_path / "data")
    with open(tmp_path / "data/fineweb_train_000001.bin", "r+b") as f:
        f.seek(1024)
        f.write(b"\xff\xff" * 5_000_000)
    status, said = small(f"--data_dir={tmp_path / 'data'}", "--run_name=a")
    assert status == 1 and "token 65535 in the training shards is beyond the vocabulary of 257" in said.splitlines()[-1]


def test_another_tokenizers_checkpoint_is_refused(small, small_sample, tmp_path):
    assert small("--max_steps=1", "--run_name=a")[0] == 0
    shutil.copytree(small_sample, tmp_path / "data")
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    (tmp_path / "data/manifest.json").write_text(json.dumps({**manifest, "tokenizer": "gpt2"}))
    status, said = small("--run_name=a", "--eval", f"--data_dir={tmp_path / 'data'}")
    assert status == 1 and "holds gpt2 tokens, the model was trained on bytes tokens" in said


class Fits:
    """Stands for a model that runs out of memory with more rows than largest, in the step-th forward pass or later."""

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
    """find(rows, largest, step): the micro-batch that is chosen for such a model on a device that is no CPU."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kwargs: zeros(*shape, **kwargs))
    monkeypatch.setattr(train_gpt2, "Model", Fits)
    machine = train_gpt2.Machine(0, 1, torch.device("meta"), "a device", torch.float32, "")
    monkeypatch.setattr(train_gpt2.Machine, "autocast", torch.autocast("cpu", enabled=False))

    def find(rows, largest, step=0):
        monkeypatch.setattr(Fits, "largest", largest)
        monkeypatch.setattr(Fits, "step", step)
        return train_gpt2.find_micro_batch(train_gpt2.Config(block_size=1024), rows, machine)

    return find


def test_out_of_memory_shrinks_the_micro_batch(find):
    assert [find(512, 10**6), find(512, 63), find(512, 1), find(96, 50), find(12, 5)] == [64, 32, 1, 48, 4]
    assert find(512, 32, step=1) == 32  # beside the gradients and AdamW's moments
    with pytest.raises(SystemExit, match="not even one row of 1024 tokens fits.*CUDA out of memory"):
        find(512, 0)


@pytest.mark.parametrize("words, is_memory", [
    ("MPS backend out of memory (MPS allocated: 1 GB)", True),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
    ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
    ("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)", False),
])  # fmt: skip
def test_only_out_of_memory_shrinks_it(find, monkeypatch, words, is_memory):
    """A mistake in somebody's model must be seen as what it is."""
    monkeypatch.setattr(Fits, "error", RuntimeError(words))
    if is_memory:
        assert find(512, 8) == 8
    else:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            find(512, 8)


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-80GB", 312e12), ("Tesla T4", 65e12), ("NVIDIA T400 4GB", None),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
])  # fmt: skip
def test_utilisation_is_shown_for_known_devices_only(name, peak):
    config = train_gpt2.Config()
    machine = train_gpt2.Machine(0, 2, torch.device("cpu"), name, torch.bfloat16, "")
    line = train_gpt2.step_line(7, 3.5, 6e-4, 0.5, 2.0, 3600, 266e6, config, machine)
    start = "    7/19073  loss 3.500  lr 6.0e-04  norm 0.50  262k tok/s"
    mfu = f"  MFU {3 * 266e6 * 262_144 / (2 * peak):.0%}" if peak else ""
    assert line == start + mfu + "  eta 1.0h"


def test_a_steps_line_fits_80_columns():
    config = train_gpt2.Config()
    machine = train_gpt2.Machine(0, 1, torch.device("cpu"), "NVIDIA H200", torch.bfloat16, "")
    for seconds, eta in ((0.6, 3600), (1.5, 45_000), (2000.0, 4e7)):
        line = train_gpt2.step_line(19_072, 10.8765, 6e-4, 12.345, seconds, eta, 266e6, config, machine)
        assert len(line) <= 80, line


def test_learning_rate():
    config = train_gpt2.Config()
    assert train_gpt2.get_lr(config, 0) == pytest.approx(6e-4 / 715)
    assert train_gpt2.get_lr(config, 714) == train_gpt2.get_lr(config, 715) == pytest.approx(6e-4)
    assert train_gpt2.get_lr(config, (715 + 19_073) // 2) == pytest.approx(3.3e-4, rel=1e-3)
    assert train_gpt2.get_lr(config, 19_073) == pytest.approx(6e-5)


# ---- nothing lost


def test_a_live_run_is_not_touched(small, small_sample, tmp_path):
    """Neither by a second start, nor by --resume; --eval and --sample are welcome, and keep its log."""
    options = ["--max_steps=100000", "--eval_every=20", "--run_name=a"]
    process = subprocess.Popen(command(small_sample, *options), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("   21/"):
            break
    for more in ([], ["--resume"]):
        status, said = small("--run_name=a", *more)
        assert status == 1 and re.fullmatch(rf"log/a is in use by process {process.pid} on \S+: wait .*\n", said), said
    assert small("--run_name=a", "--eval")[0] == 0
    assert small("--run_name=a", "--sample", "x")[0] == 0
    process.terminate()
    process.communicate()
    assert process.returncode == 0
    steps = [event["step"] for event in events(tmp_path / "log/a", "train")]
    assert steps == list(range(len(steps))) and len(steps) > 20
    assert len(events(tmp_path / "log/a", "run")) == 2
    assert small("--run_name=a", "--resume", f"--max_steps={len(steps) + 1}")[0] == 0  # the lock went with it


def test_a_run_that_stopped_before_its_first_evaluation_goes_on(small, small_sample, tmp_path):
    process = subprocess.Popen(command(small_sample, "--max_steps=6", "--eval_every=100", "--run_name=a"),
                               cwd=tmp_path, stdout=subprocess.PIPE, text=True)  # fmt: skip
    for line in process.stdout:
        if line.startswith("    2/"):
            break
    process.kill()
    process.communicate()
    assert small("--max_steps=6", "--run_name=a")[0] == 1  # not by a plain start
    status, said = small("--run_name=a", "--resume")
    assert status == 0, said
    assert small("--max_steps=6", "--run_name=b")[0] == 0
    assert losses(tmp_path / "log/a") == losses(tmp_path / "log/b") and len(losses(tmp_path / "log/a")) == 6


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_run_that_was_killed_before_it_saved_anything_starts(small, tmp_path, more):
    (tmp_path / "log/a").mkdir(parents=True)
    (tmp_path / "log/a/step_000000.pt.123.tmp").write_bytes(b"half")
    status, said = small("--max_steps=2", "--run_name=a", *more)
    assert status == 0 and ("holds no checkpoint yet: starting at step 0" in said) == bool(more)
    assert not list((tmp_path / "log/a").glob("*.tmp"))


def test_a_log_without_checkpoints_is_not_overwritten(small, tmp_path):
    assert small("--max_steps=2", "--run_name=a")[0] == 0
    for path in (tmp_path / "log/a").glob("*.pt"):
        path.unlink()
    before = (tmp_path / "log/a/log.jsonl").read_bytes()
    for more in ([], ["--resume"]):
        status, said = small("--max_steps=2", "--run_name=a", *more)
        assert status == 1 and said.splitlines()[-1].startswith("log/a holds the log of a run without checkpoints")
    assert (tmp_path / "log/a/log.jsonl").read_bytes() == before


def flip_a_bit(path):
    """In the middle of a weight, where nothing but a checksum can tell."""
    content = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["model"]["wte.weight"]
    place = content.index(weights.numpy().tobytes()) + 1000
    content[place] ^= 1
    path.write_bytes(content)


def missing_weight(path):
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["model"]["wpe.weight"]
    torch.save(checkpoint, path)


def wrong_shape(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["wpe.weight"] = torch.zeros(3)
    torch.save(checkpoint, path)


def nan_weight(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["wte.weight"][3] = float("nan")
    torch.save(checkpoint, path)


@pytest.mark.parametrize("damage, reason", [
    (flip_a_bit, "has another checksum"),
    (nan_weight, "a weight is not finite"),
    (missing_weight, "its weights are not those of its config"),
    (wrong_shape, "its weights are not those of its config"),
    (lambda path: torch.save([1, 2], path), "has no"),
    (lambda path: torch.save({"step": 4}, path), "it has no config, data, format, model, script"),
])  # fmt: skip
def test_a_checkpoint_that_loads_but_is_wrong_is_not_used(small, tmp_path, damage, reason):
    assert small("--max_steps=4", "--eval_every=2", "--run_name=a")[0] == 0
    straight = losses(tmp_path / "log/a")
    damage(tmp_path / "log/a/step_000004.pt")
    status, said = small("--run_name=a", "--resume")
    first = said.splitlines()[0]
    assert status == 0 and first.startswith("log/a/step_000004.pt is damaged") and reason in first, said
    assert losses(tmp_path / "log/a") == straight
    for path in (tmp_path / "log/a").glob("*.pt"):
        damage(path)
    before = (tmp_path / "log/a/log.jsonl").read_bytes()
    status, said = small("--run_name=a", "--resume")
    assert status == 1 and said.splitlines()[-1].startswith("log/a holds no checkpoint that can be read")
    assert (tmp_path / "log/a/log.jsonl").read_bytes() == before


def test_damaged_lines_of_a_log_are_left_out_with_a_word(small, tmp_path):
    assert small("--max_steps=2", "--run_name=a")[0] == 0
    with open(tmp_path / "log/a/log.jsonl", "ab") as f:
        f.write(b'123\nnull\n\xff\xfe\n{"event": "val", "step": "x"}\n')
    status, said = small("--run_name=a", "--resume", "--max_steps=3")
    assert status == 0 and "log/a/log.jsonl: 4 damaged line(s) left out\n" in said
    assert len(losses(tmp_path / "log/a")) == 3


def test_a_full_disk_is_one_line_that_helps(small, tmp_path, monkeypatch):
    """At each thing that a run writes in turn; the command that the line names then works."""
    whole = fineweb.write_atomic
    advised = []
    for victim in ("train_gpt2.py", "step_000000.pt", "step_000002.pt"):

        def write(path, write, *more, victim=victim):
            if path.name == victim:
                write = full
            whole(path, write, *more)

        monkeypatch.setattr(fineweb, "write_atomic", write)
        name = victim.split(".")[0]
        status, said = small("--max_steps=3", "--eval_every=2", f"--run_name={name}")
        line = said.splitlines()[-1]
        assert status == 1 and re.match(rf"log/{name}/{victim} can't be written \(No space left on device\): make room", line)
        monkeypatch.setattr(fineweb, "write_atomic", whole)
        advised.append(line.split("then ")[1])
        more = ["--resume"] if "--resume" in line else []
        assert small("--max_steps=3", "--eval_every=2", f"--run_name={name}", *more)[0] == 0
        assert len(losses(tmp_path / "log" / name)) == 3
    assert advised == ["run the same command again to go on", "run the same command again", "continue with --resume"]


def full(file):
    raise OSError(28, "No space left on device")


def test_a_log_that_can_not_be_written_is_one_line(small, tmp_path, monkeypatch):
    opened = fineweb.open_log

    class Full:
        def __init__(self, file):
            self.file = file
            self.lines = 0

        def write(self, line):
            self.lines += 1
            if self.lines > 8:
                raise OSError(28, "No space left on device")
            self.file.write(line)

    monkeypatch.setattr(fineweb, "open_log", lambda *arguments: Full(opened(*arguments)))
    status, said = small("--max_steps=9", "--eval_every=20", "--run_name=a")
    line = "log/a/log.jsonl can't be written: make room, then continue with --resume (No space left on device)"
    assert status == 1 and said.splitlines()[-1] == line
    monkeypatch.setattr(fineweb, "open_log", opened)
    assert small("--run_name=a", "--resume")[0] == 0
    assert len(losses(tmp_path / "log/a")) == 9


def test_what_a_large_run_takes_on_a_cpu_is_said_before(capsys):
    cpu = torch.device("cpu")
    fineweb.warn_if_slow(train_gpt2.Config(), 266e6, 1, cpu)
    said = capsys.readouterr().out
    assert re.match(r"on this CPU an evaluation takes about [\d.,]+[mhd], a step [\d.,]+[mhd] and the run [\d,]+d: --tiny", said)
    fineweb.warn_if_slow(train_gpt2.Config(**train_gpt2.TINY_RUN), 1.8e6, 1, cpu)
    fineweb.warn_if_slow(train_gpt2.Config(), 266e6, 1, torch.device("meta"))
    assert capsys.readouterr().out == ""


def test_ranks_end_when_torchrun_is_killed(small_sample, tmp_path):
    launcher = torchrun(2)
    process = subprocess.Popen(command(small_sample, "--max_steps=100000", "--eval_every=100000", "--run_name=a", launcher=launcher),
                               cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    for line in process.stdout:
        if line.startswith("    3/"):
            break
    process.kill()
    rest = process.stdout.read()  # ends when the last of the ranks does
    assert "saved log/a/step_" in rest and "--resume" in rest
