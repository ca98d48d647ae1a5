"""The suite for a GPU, rehearsed at tiny shapes on a CPU; and tests that need a GPU."""
import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import train_deepseek
import train_gemma
import train_gpt2
import train_mistral
from tools import bench, models, suite

# ==========================================================================
# Whole, with real stages


TESTS = """
import pytest

@pytest.mark.gpu
def test_it():
    pass

def test_other():
    assert 0
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the project that has one architecture and one test, so that a rehearsal is short."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("fineweb.py", "hellaswag.py", "train_gpt2.py", "pytest.ini"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests").mkdir()
    (folder / "tests/test_it.py").write_text(TESTS)
    return folder


def start_suite(project, out):
    return subprocess.Popen(
        [sys.executable, "-m", "tools.bench", "--suite", str(out), "--tiny"],
        cwd=project,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition, seconds=60):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as f:
            return f.read()
    except OSError:  # it has ended, or is no process
        return ""


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_in_the_middle_and_run_again(project, tmp_path):
    out = tmp_path / "out"
    first = start_suite(project, out)
    wait_until(lambda: any("tests.json" in command_line(pid) for pid in os.listdir("/proc")))
    children = [int(pid) for pid in os.listdir("/proc") if str(out) in command_line(pid)]
    assert len(children) >= 2  # the suite and a stage
    first.kill()
    first.communicate()
    wait_until(lambda: not any(is_running(pid) for pid in children))
    before = suite.read(out / "gpt2.json")
    assert before["curve"]["status"] == "done" and "step" not in before

    again = start_suite(project, out)
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    document = suite.read(out / "gpt2.json")
    assert document["curve"] == before["curve"]  # it wasn't made again
    assert document["curve"]["verdict"] == "equal"
    facts = document["facts"]
    assert facts["command"] == f"python -m tools.bench --suite {out} --tiny"
    assert facts["torch"] == torch.__version__ and facts["git"] and facts["date"] and facts["device"] == "cpu"
    step = document["step"]
    assert step["status"] == "done" and step["losses"][-1] < step["losses"][0] - 1
    assert len(step["rates"]) == suite.STEPS - suite.SETTLING and step["memory"] > 1e8
    assert step["mfu"] == 3 * step["flops_per_token"] * step["tokens_per_second"] / step["peak_flops"]
    hours = step["hours_for_10b_tokens"]
    assert hours["1"] == 8 * hours["8"] == 1e10 / step["tokens_per_second"] / 3600
    assert suite.read(out / "tests.json")["tests"]["summary"].startswith("1 passed, 1 deselected")
    assert f"{step['mfu']:.1%}" in said and "tests marked gpu: 1 passed" in said
    assert sorted(path.name for path in out.iterdir()) == ["gpt2.json", "tests.json"]


def job(name, stage, path):
    """What the suite gives to a stage's process."""
    what = dict(name=name, stage=stage, path=str(path), tiny=True)
    return what | dict(threads=0, limit=60, peak_flops=1e12, parent=1)


@pytest.fixture
def curve(tmp_path, monkeypatch):
    """curve(name, **fields) -> the figures of a curve with these fields of Config changed."""
    monkeypatch.setattr(suite, "end_with", lambda parent: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def curve(name, **fields):
        script = importlib.import_module(f"train_{name}")
        config = dataclasses.replace(suite.small_config(name, script, tiny=True), **fields)
        monkeypatch.setattr(suite, "small_config", lambda name, script, tiny: config)
        path = tmp_path / "out.json"
        suite.work(job(name, "curve", path))
        return suite.read(path)["curve"]

    return curve


@pytest.mark.parametrize("name", ["deepseek", "rwkv"])
def test_a_curve_in_bf16_is_that_in_fp32(name, curve):
    figures = curve(name, dtype="bfloat16")
    assert figures["verdict"] == "equal" and figures["status"] == "done"
    assert len(figures["reference"]) == len(figures["uncompiled"]) == suite.STEPS
    assert 0 < figures["uncompiled_off_by"] < suite.TOLERANCE
    assert 0 < figures["uncompiled_gradients_off_by"] < suite.GRADIENT_TOLERANCE


def test_a_wrong_mask_is_found(curve, monkeypatch):
    def wrongly(model, dynamic):
        model.config.window = model.config.block_size
        return model

    monkeypatch.setattr(torch, "compile", wrongly)
    monkeypatch.setattr(bench, "uses_compile", lambda config, device: config.compile != "off")
    figures = curve("mistral", window=16)
    assert "differs from step" in figures["verdict"] or "gradients of" in figures["verdict"]
    assert figures["uncompiled_gradients_off_by"] == 0 and figures["compiled_gradients_off_by"] > 0.12


@pytest.mark.parametrize("name", bench.names())
def test_the_small_models_have_all_that_the_large_ones_have(name):
    script = importlib.import_module(f"train_{name}")
    small = models.make_model(script, suite.small_config(name, script, tiny=False))
    large = models.make_model(script, script.Config())
    assert small.config.n_embd == large.config.n_embd

    def parts(model):  # with their shapes, but not those that depend on the vocabulary or the context
        found = set()
        for key, p in model.named_parameters():
            words = [word for word in key.split(".") if not word.isdigit()]
            if not key.startswith(("wte", "wpe")):
                found.add((".".join(words), p.shape))
        return found

    assert parts(small) == parts(large)
    assert getattr(small.config, "window", 0) < small.config.block_size


# ==========================================================================
# Judging


def test_a_curve_must_fall_and_be_the_cpus():
    reference = [9 - 0.2 * step for step in range(20)]
    assert suite.judge([loss + 0.01 for loss in reference], reference) == "equal"
    wrong = reference[:7] + [loss + 0.1 for loss in reference[7:]]
    assert suite.judge(wrong, reference) == "differs from step 7 on: 7.700, not 7.600"
    assert suite.judge(reference[:19] + [float("nan")], reference).startswith("differs from step 19 on")
    flat = [9 - 0.01 * step for step in range(20)]
    assert suite.judge(flat, flat).startswith("does not fall")


def tried(fixed, row, room, first, needs_row=None, patience=99):
    """(the size found, those tried) where a row really needs needs_row bytes."""
    sizes = [1, 2, 4, 8, 16, 32, 64]
    tries = []

    def attempt(rows):
        tries.append(rows)
        peak = fixed + rows * (needs_row or row)
        return peak if peak <= room else None

    best = suite.measure_sizes(sizes, first, fixed, room, attempt, lambda: len(tries) < patience)
    return best, tries


def test_the_largest_micro_batch_needs_few_tries():
    assert suite.first_size([1, 2, 4, 8], 10, 45, 8) == 4
    assert suite.first_size([1, 2, 4, 8], 10, 15, 8) == 1
    assert suite.first_size([1, 2, 4, 8], 10, None, 8) == 8
    assert tried(10, 1, 80, 64) == (64, [64])  # the guess is right
    assert tried(10, 1, 80, 4) == (64, [4, 64])  # far too low
    assert tried(10, 1, 80, 64, needs_row=3) == (16, [64, 32, 16])  # too high
    assert tried(10, 1, 80, 16, needs_row=2) == (32, [16, 32])
    assert tried(10, 1, 80, 4, patience=1) == (4, [4])  # no time for another
    assert tried(10, 1, 5, 1) == (None, [1])


def test_memory_that_runs_out_is_a_size_that_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "end_with", lambda parent: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    real = bench.Trainer.step

    def step(self, idx, *arguments):
        if len(idx) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return real(self, idx, *arguments)

    monkeypatch.setattr(bench.Trainer, "step", step)
    path = tmp_path / "gpt2.json"
    suite.work(job("gpt2", "step", path))
    figures = suite.read(path)["step"]
    assert figures["micro_batch"] == 1 and [size["micro_batch"] for size in figures["tried"]] == [2, 1]
    assert figures["tried"][0]["failed"] == "CUDA out of memory. Tried to allocate 1 GiB"


# ==========================================================================
# The first process, with stages that take no time

STAGE = """
import json, os, subprocess, sys, time
job = json.loads(sys.argv[1])
with open(job["path"]) as f:
    document = json.load(f)
figures = document[job["stage"]]
def write():
    with open(job["path"], "w") as f:
        json.dump(document, f)
figures["known"] = 1
write()
print("begun", flush=True)
if job["name"] == "crash":
    raise ValueError("a planted mistake")
if job["name"] == "killed":
    os.kill(os.getpid(), 9)
if job["name"] == "hang":
    figures["pid"] = subprocess.Popen(["sleep", "600"]).pid
    write()
    time.sleep(600)
figures["status"] = "done"
figures |= {"verdict": "equal", "seconds": 1, "uncompiled": [9, 3], "uncompiled_off_by": 0.0}
write()
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """jobs(*names) -> jobs of stages that crash, hang, are killed or end well, by their names."""
    (tmp_path / "stage.py").write_text(STAGE)
    python = [sys.executable, tmp_path / "stage.py"]
    monkeypatch.setattr(suite, "command", lambda job: [*python, json.dumps(job)])

    def jobs(*names):
        return [dict(name=name, stage="curve", path=str(tmp_path / f"{name}.json")) for name in names]

    return jobs


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_one_that_fails_does_not_stop_the_others(stages, tmp_path, capfd):
    names = ("hang", "crash", "killed", "fine")
    suite.run_jobs(stages(*names), 2, time.monotonic() + 60, 2)
    found = {name: suite.read(tmp_path / f"{name}.json")["curve"] for name in names}
    assert found["fine"]["status"] == "done"
    assert found["hang"]["why"] == "no end after 2 s" and found["hang"]["last_lines"] == ["begun"]
    assert not is_running(found["hang"]["pid"])  # nor what it started
    assert found["crash"]["why"] == "exit status 1"
    assert found["crash"]["last_lines"][-1] == "ValueError: a planted mistake"
    assert found["killed"]["why"] == "ended by SIGKILL"
    assert all(figures["known"] == 1 for figures in found.values())  # what was known is kept
    said = capfd.readouterr().out
    assert "crash     curve |    0 s | failed: exit status 1 ValueError: a planted mistake" in said
    suite.print_table(tmp_path, ["crash", "fine", "hang"])
    table = capfd.readouterr().out
    assert "failed: no end after 2 s" in table and "crash curve, the last line: ValueError" in table


def test_what_there_is_no_time_for_is_dropped(stages, tmp_path, capfd):
    (tmp_path / "crash.json").write_text('{"curve": {"status": "failed", "why": "before"}}')
    suite.run_jobs(stages("fine", "crash"), 1, time.monotonic() + suite.LEAST_SECONDS - 1, 2)
    assert suite.read(tmp_path / "fine.json")["curve"] == {"status": "dropped", "why": "no time left"}
    assert suite.read(tmp_path / "crash.json")["curve"]["why"] == "before"
    assert capfd.readouterr().out.count("dropped: no time left, run the same command again") == 2


def test_a_file_of_another_version_is_kept(tmp_path):
    facts = {"git": "1", "script_hash": "a", "torch": "2", "device": "cpu", "tiny": True, "date": "today"}
    path = tmp_path / "gpt2.json"
    suite.begin_file(path, facts, again=False)
    suite.note(path, "step", tokens_per_second=5)
    suite.begin_file(path, facts | {"date": "tomorrow"}, again=False)
    assert suite.read(path)["step"] == {"tokens_per_second": 5}
    suite.begin_file(path, facts | {"git": "2"}, again=False)
    assert "step" not in suite.read(path)
    (old,) = tmp_path.glob("gpt2.until-*.json")
    assert suite.read(old)["step"] == {"tokens_per_second": 5}


def test_sigterm_ends_the_stages_too(stages, tmp_path):
    signal.signal(signal.SIGALRM, suite.stopped)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    with pytest.raises(SystemExit, match="the same command goes on from here"):
        suite.run_jobs(stages("hang"), 1, time.monotonic() + 60, 30)
    assert not is_running(suite.read(tmp_path / "hang.json")["curve"]["pid"])


@pytest.mark.parametrize("options, expected", [
    (["--suite"], "say which folder"),
    (["--suite", "out", "--only", "gpt3"], "there is no gpt3"),
    (["--suite", "out", "--minutes", "0"], "above 0"),
    (["--suite", "out", "--swift"], "--swift"),
])  # fmt: skip
def test_a_mistake_is_one_line(options, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert expected in str(stopped.value) and "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_real_shapes_are_refused_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "find_device", lambda out, ends: {"kind": "cpu", "device": "cpu"})
    monkeypatch.setattr(sys, "argv", ["bench", "--suite", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="needs a GPU: add --tiny"):
        bench.main()


# ==========================================================================
# On a GPU, and where it can be done on a CPU too

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
LARGEST_ERROR = {"cpu": 1e-5, "cuda": 2e-2}  # fp32, and bf16
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])


def faster(function, device):
    """The function as a GPU runs it, compiled."""
    return torch.compile(function, dynamic=False) if device == "cuda" else function


def relative_error(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def outputs_and_gradients(function, tensors):
    """[function(*tensors), the gradients of its sum of squares by each]."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    y.float().square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("script, heads, kv_heads, size", [
    (train_mistral, 12, 3, 64),
    (train_gemma, 4, 1, 256),
])  # fmt: skip
def test_a_window_by_blocks_is_the_window_by_a_mask(script, heads, kv_heads, size, device):
    torch.manual_seed(0)
    T = 512
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.randn(2, heads, T, size, device=device, dtype=dtype)
    k, v = torch.randn(2, 2, kv_heads, T, size, device=device, dtype=dtype)
    may_flex = True
    if device == "cuda" and script is train_gemma:  # as its Model decides
        may_flex = torch.cuda.get_device_capability()[0] in (9, 10)

    def windowed(q, k, v):
        return script.attend(q, k, v, script.window_mask(q[:, 0], 200, may_flex))

    def plain(q, k, v):
        i = torch.arange(T, device=device)
        sees = (i <= i[:, None]) & (i[:, None] - i < 200)
        k = k.repeat_interleave(heads // kv_heads, dim=1)
        v = v.repeat_interleave(heads // kv_heads, dim=1)
        scores = (q @ k.transpose(2, 3) / size**0.5).masked_fill(~sees, -torch.inf)
        return scores.softmax(-1) @ v

    ours = outputs_and_gradients(faster(windowed, device), (q, k, v))
    theirs = outputs_and_gradients(plain, (q.float(), k.float(), v.float()))
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < LARGEST_ERROR[device]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_grouped_experts_are_the_dense_ones(device):
    torch.manual_seed(0)
    config = train_deepseek.Config()
    with torch.device(device):
        experts = train_deepseek.Experts(config)
        for p in experts.parameters():
            p.data.normal_(0.0, 0.05)
        x = torch.randn(192, config.n_embd)
        chosen = torch.rand(192, config.n_expert).topk(config.n_active).indices
        weights = torch.rand(192, config.n_active)
    matrices = (experts.gate.data, experts.up.data, experts.proj.data)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def grouped(x, gate, up, proj):
        halves = (x.to(dtype), gate.to(dtype), up.to(dtype), proj.to(dtype))
        return experts.grouped(*halves, chosen, weights)

    def dense(x, gate, up, proj):
        return experts.dense(x, gate, up, proj, chosen, weights)

    ours = outputs_and_gradients(faster(grouped, device), (x, *matrices))
    theirs = outputs_and_gradients(dense, (x, *matrices))
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < LARGEST_ERROR[device]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_heads_loss_in_parts_is_that_at_once(device):
    torch.manual_seed(0)
    x = torch.randn(1, 1100, 64, device=device)
    weight = 0.1 * torch.randn(512, 64, device=device)
    targets = torch.randint(512, (1, 1100), device=device)

    def in_parts(x, weight):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return train_gpt2.head_loss(x, weight, targets, "mean")

    def at_once(x, weight):
        return F.cross_entropy(F.linear(x, weight)[0], targets[0])

    ours = outputs_and_gradients(faster(in_parts, device), (x, weight))
    theirs = outputs_and_gradients(at_once, (x, weight))
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < LARGEST_ERROR[device]


@pytest.mark.gpu
@no_gpu
def test_the_trial_of_micro_batches_gives_its_memory_back():
    config = train_gpt2.Config(**train_gpt2.TINY_MODEL | train_gpt2.TINY_RUN)
    machine = train_gpt2.start(config, 1)
    before = torch.cuda.memory_allocated()
    assert train_gpt2.find_micro_batch(config, 16, machine) == 16
    assert torch.cuda.memory_allocated() - before < 2**20
