"""What must hold for every training script: the same text around another model, and a model that behaves."""
import ast
import dataclasses
import difflib
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from tools import sync

PATHS = [ROOT / name for name in sorted(sync.SCRIPTS.values())]  # a user's own script may break the rules
NAMES = [path.stem for path in PATHS]
BUDGET = 124_475_904


@pytest.fixture(params=NAMES)
def script(request):
    return importlib.import_module(request.param)


def tiny(script, **fields):
    return script.Config(**{**script.TINY_MODEL, "vocab_size": 257, "block_size": 48, **fields})


def make(script, dtype=torch.float32, **fields):
    """A small model none of whose parameters is at its special initial value, such as 0."""
    torch.manual_seed(0)
    model = script.Model(tiny(script, **fields))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.to(dtype)


def tokens(*shape, seed=0):
    return torch.randint(257, shape, generator=torch.Generator().manual_seed(seed))


# ---- text


def test_what_scripts_share_is_the_same_to_the_letter(script):
    lines = sync.differences(ROOT / f"{script.__name__}.py")
    assert not lines, "".join(lines[:20]) + "\nrun `python -m tools.sync`"


def test_families_are_declared():
    names = {path.stem.removeprefix("train_"): set(sync.families(path)) for path in PATHS}
    rotary = {"rope_table", "rotate"}
    window = {"window_mask", "can_flex", "attend"}
    assert names == {
        "gpt2": {"Norm"},
        "rwkv": {"Norm"},
        "llama": {"Norm", "MLP"} | rotary,
        "mistral": {"Norm", "MLP"} | rotary | window,
        "gemma": rotary | window,
        "deepseek": {"MLP"} | rotary,
        "mta": {"Norm", "MLP"} | rotary,
    }


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """The scripts in a folder of their own, which tools.sync works on."""
    for path in PATHS:
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    monkeypatch.setattr(sync, "ORIGINAL", tmp_path / "train_gpt2.py")
    return tmp_path


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def call_sync(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["sync", *options])
    sync.main()


def test_sync_repairs_a_section_and_notices_a_missing_one(copies, monkeypatch):
    llama = copies / "train_llama.py"
    change(llama, "def get_lr(config, step):", "def get_lr(config, step, more):")
    change(llama, "rope_theta", "base")  # its own
    assert any("get_lr" in line for line in sync.differences(llama))
    with pytest.raises(SystemExit, match="1 scripts differ"):
        call_sync(monkeypatch, "--check")
    call_sync(monkeypatch)
    assert sync.differences(llama) == []
    repaired = llama.read_text()
    assert "config.base" in repaired and "step, more" not in repaired
    change(llama, "# Set-up: the same in every script", "# Set-up")
    with pytest.raises(SystemExit, match="put back the banners"):
        call_sync(monkeypatch)


def test_sync_repairs_a_definition_and_notices_a_missing_comment(copies, monkeypatch):
    gemma = copies / "train_gemma.py"
    change(gemma, "a * cos - b * sin", "a * cos + b * sin")
    assert any("a * cos + b * sin" in line for line in sync.differences(gemma))
    call_sync(monkeypatch)
    assert gemma.read_text() == (ROOT / "train_gemma.py").read_text()
    change(copies / "train_mta.py", "# The same in LLaMA, Mistral, DeepSeek and MTA.\n", "")
    assert "train_mta.py lacks MLP, or its comment, by train_deepseek.py\n" in sync.differences(copies / "train_deepseek.py")
    with pytest.raises(SystemExit, match="comments that are missing"):
        call_sync(monkeypatch)


def test_the_first_sibling_differs_by_its_paper_alone():
    """What `diff train_gpt2.py train_llama.py | grep -c '^[<>]'` counts, by a diff that finds no shorter one."""
    ours = (ROOT / "train_gpt2.py").read_text().splitlines()
    theirs = (ROOT / "train_llama.py").read_text().splitlines()
    lines = [line for line in difflib.ndiff(ours, theirs) if line[:2] in ("- ", "+ ")]
    assert len(lines) <= 120


def test_same_names_in_the_same_order(script):
    tree = ast.parse((ROOT / f"{script.__name__}.py").read_text())
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    expected = ["Config", "Norm", "Attention", "MLP", "Block", "Model", "HeadLoss"]
    assert [name for name in classes if name in expected] == expected
    methods = {"forward", "decode", "after_step", "flops_per_token", "optimizer_groups", "init_weights"}
    assert methods <= set(dir(script.Model))


def test_length_and_imports(script):
    text = (ROOT / f"{script.__name__}.py").read_text()
    lines = text.splitlines()
    # DeepSeek-V3 and RWKV-7 are the papers with the most equations
    assert len(lines) <= (1115 if script.__name__ in ("train_deepseek", "train_rwkv") else 960)
    assert max(map(len, lines)) <= 110
    filled = [len(line) for line in lines if line.strip()]
    assert sum(filled) / len(filled) <= 58
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "fineweb", "hellaswag"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed


def test_help_and_config_show_the_values_that_run(script, run, monkeypatch):
    """RECIPE replaces defaults: the help must show what it puts there."""
    monkeypatch.setenv("COLUMNS", "200")
    status, said = run(script, "--help")
    said = " ".join(said.split())
    values = {field.name: field.default for field in dataclasses.fields(script.Config)} | script.RECIPE
    for name, value in values.items():
        assert f"--{name}" in said and f"[{value}]" in said, name
    for name, value in script.RECIPE.items():
        default = script.Config.__dataclass_fields__[name].default
        if value != default:
            assert f"[{value}]; --recipe shared: [{default}]" in said, name
    monkeypatch.setattr(sys, "argv", ["train"])
    config, given, asked = script.parse_command_line()
    assert dataclasses.asdict(config) == values and given == {}
    monkeypatch.setattr(sys, "argv", ["train", "--recipe=shared", "--tiny", "--max_steps=7"])
    config, given, asked = script.parse_command_line()
    assert config == script.Config(**script.TINY_MODEL | script.TINY_RUN | given)


# ---- size


def test_parameters_at_the_real_shapes(script, monkeypatch):
    monkeypatch.setattr(script.Model, "init_weights", lambda self: None)
    with torch.device("meta"):
        model = script.Model(script.Config(**script.RECIPE))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 122_000_000 <= total <= BUDGET
    assert f"{total:,}" in script.__doc__
    assert model.active_parameters() == total or script.__name__ == "train_deepseek"
    assert 100e6 < model.flops_per_token() < 330e6


# ---- the model


def test_editing_a_token_changes_nothing_before_it(script):
    model = make(script).eval()
    idx = tokens(2, 48)
    with torch.no_grad():
        before = model(idx)[0]
        for t in (0, 1, 13, 31, 32, 47):
            edited = idx.clone()
            edited[:, t] = (edited[:, t] + 1) % 257
            after = model(edited)[0]
            torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-5, atol=1e-5)
            assert (after[:, t] - before[:, t]).abs().max() > 1e-3


def test_padding_changes_no_score(script):
    model = make(script).eval()
    idx = tokens(3, 48)
    with torch.no_grad():
        for n in (1, 5, 17, 33):
            targets = tokens(3, n, seed=1)
            alone = model(idx[:, :n], targets, "none")[1]
            for fill in (0, 200):
                padded = torch.full((3, 48), fill)
                padded[:, :n] = idx[:, :n]
                goals = torch.full((3, 48), -1)
                goals[:, :n] = targets
                losses = model(padded, goals, "none")[1]
                torch.testing.assert_close(losses[:, :n], alone, rtol=1e-4, atol=1e-5)
                assert (losses[:, n:] == 0).all()


def test_the_losss_value_is_the_cross_entropy_alone(script):
    model = make(script).train()
    idx, targets = tokens(2, 48), tokens(2, 48, seed=1)
    _, loss = model(idx, targets)
    plain = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten())
    each = model(idx, targets, "none")[1]
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(each.mean(), plain, rtol=1e-5, atol=0)


def test_every_parameter_learns_and_is_in_one_group(script):
    model = make(script).train()
    model(tokens(2, 48), tokens(2, 48, seed=1))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    groups = model.optimizer_groups()
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert all("weight_decay" in group for group in groups)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(model.wte.weight)] == model.config.weight_decay
    assert any(decay == 0 for decay in decays.values())


def test_decoding_step_by_step_equals_the_whole(script):
    model = make(script).eval()
    idx = tokens(2, 40)
    with torch.no_grad():
        whole, state = model(idx)[0], None
        for n in range(11, 41):
            logits, state = model.decode(idx[:, :n], state)
            torch.testing.assert_close(logits, whole[:, n - 1], rtol=1e-4, atol=1e-4)
        longer = tokens(2, 60)  # beyond block_size
        assert model.decode(longer)[0].shape == (2, 257)


def test_double_precision(script):
    model = make(script, torch.float64).train()
    loss = model(tokens(2, 20), tokens(2, 20, seed=1))[1]
    loss.backward()
    assert loss.dtype == torch.float64 and model.wte.weight.grad.dtype == torch.float64


def test_sixteen_bits(script):
    model = make(script).train()
    idx, targets = tokens(4, 48), tokens(4, 48, seed=1)
    exact = model(idx, targets)[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)[1]
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_one_graph_and_no_recompilation(script, dtype, relative):
    """What torch.compile captures, without the slow code generation: no break, and nothing that starts it over."""
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    idx, targets = [tokens(2, 48, seed=step) for step in range(3)], tokens(2, 48, seed=9)

    def train(model, net, first):
        for step in range(3):
            model.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=step >= first):
                with autocast:
                    loss = net.train()(idx[step], targets)[1]
                loss.backward()
                model.after_step()
                with torch.no_grad(), autocast:
                    net.eval()(idx[step], targets)
        return loss.item(), [parameter.grad for parameter in model.parameters()]

    torch._dynamo.reset()
    fewer = {"n_layer": 3, "global_every": 3}  # every kind of layer is among them
    fewer = {name: value for name, value in fewer.items() if hasattr(script.Config, name)}
    plain, model = make(script, **fewer), make(script, **fewer)
    loss, gradients = train(plain, plain, 3)
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    compiled_loss, compiled_gradients = train(model, compiled, 1)
    torch._dynamo.reset()
    assert compiled_loss == pytest.approx(loss, rel=relative / 10)
    for ours, theirs, (name, _) in zip(compiled_gradients, gradients, model.named_parameters()):
        assert (ours - theirs).abs().max() <= relative * theirs.abs().max() + 1e-7, name


def test_overfits_one_batch(script):
    torch.manual_seed(0)
    model = script.Model(tiny(script)).train()
    optimizer = torch.optim.AdamW(model.optimizer_groups(), lr=3e-3, betas=(0.9, 0.95))
    idx, targets = tokens(2, 48), tokens(2, 48, seed=1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(idx, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.after_step()
    assert loss.item() < 0.3


# ---- runs

SHORT = ["--tiny", "--block_size=32", "--batch_tokens=512", "--val_tokens=512", "--sample_tokens=4", "--warmup_steps=2"]


def load(folder, step):
    return torch.load(folder / f"step_{step:06d}.pt", weights_only=True)


def logged(folder, figure):
    """The figure's value at each step."""
    events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [event[figure] for event in events if event["event"] == "train"]


def test_resume_eval_and_sample(script, run, small_sample, tmp_path):
    options = [*SHORT, f"--data_dir={small_sample}", "--run_name=a", "--eval_every=2"]
    status, said = run(script, *options, "--max_steps=4")
    assert status == 0, said
    straight, losses = load(tmp_path / "log/a", 4), logged(tmp_path / "log/a", "loss")
    (tmp_path / "log/a/step_000004.pt").unlink()
    status, said = run(script, *options, "--resume")
    assert status == 0, said
    resumed = load(tmp_path / "log/a", 4)
    assert logged(tmp_path / "log/a", "loss") == losses
    assert resumed["model"].keys() == straight["model"].keys()
    for name, tensor in straight["model"].items():
        assert torch.equal(resumed["model"][name], tensor), name
    status, said = run(script, *options, "--eval")
    assert status == 0 and "validation loss" in said and "cloze (nanogpt)" in said, said
    status, said = run(script, *options, "--sample", "The ")
    assert status == 0 and said.count("The ") >= 2, said


WATCHED = """\
import os, pathlib, runpy, sys, time
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")


def gloo_threads():
    names = []
    for comm in pathlib.Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(comm.read_text().strip())
        except OSError:  # the thread ended between the two
            pass
    return [name for name in names if "gloo" in name]


until = time.monotonic() + 10
while gloo_threads() and time.monotonic() < until:  # the system lists a thread for some ms after it has been joined
    time.sleep(0.01)
pathlib.Path("left" + os.environ["RANK"]).write_text(str(gloo_threads()))
"""  # runs a script and names the threads of its process group that outlive it, where the system tells


def test_two_processes_equal_one(script, run, small_sample, tmp_path):
    # the eps: AdamW's first steps go by the gradient's sign, which is chance where a gradient is nothing but rounding
    options = [*SHORT, f"--data_dir={small_sample}", "--eval_every=9", "--max_steps=3", "--micro_batch=4", "--adam_eps=1e-4"]
    assert run(script, *options, "--run_name=one")[0] == 0
    (tmp_path / "watched.py").write_text(WATCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "watched.py",
               script.__file__, *options, "--run_name=two"]  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert result.returncode == 0 and "FutureWarning" not in result.stderr, result.stdout + result.stderr
    # a thread of the process group that outlives it can abort Python's exit: seen once in some hundred runs
    assert [(tmp_path / f"left{rank}").read_text() for rank in (0, 1)] == ["[]", "[]"]
    for figure in ("loss", "norm"):
        alone = logged(tmp_path / "log/one", figure)
        assert logged(tmp_path / "log/two", figure) == pytest.approx(alone, rel=1e-4), figure
    one, two = (load(tmp_path / "log" / name, 3)["model"] for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=3e-5, msg=lambda said: f"{name}: {said}")


def test_a_tiny_run_learns(script, run, small_sample, tmp_path):
    options = ["--tiny", f"--data_dir={small_sample}", "--max_steps=40", "--warmup_steps=10", "--eval_every=40",
               "--batch_tokens=1024", "--val_tokens=1024", "--sample_tokens=8", "--run_name=a"]  # fmt: skip
    status, said = run(script, *options)
    assert status == 0, said
    losses = logged(tmp_path / "log/a", "loss")
    # 5.5 is chance, and 3.4 what the frequencies of the bytes alone give
    assert losses[0] > 5 and losses[-1] < 3.2
