"""What must hold for every training script: the same text around another model, and a model that behaves."""
import ast
import importlib
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers import (SHORT, SMALL, TORCHRUN, assert_all_learn, assert_close, assert_decodes, assert_same,
                     assert_sees_no_later_token, events, in_full, load, losses, make, size,
                     tiny, tokens)  # fmt: skip

from tools import sync
from tools.common import load_script
from tools.export import weights

PATHS = [ROOT / name for name in sorted(sync.SCRIPTS.values())]  # a user's own script may break the rules
LINES = {  # at most
    "train_gpt2": 600, "train_llama": 630, "train_mistral": 670, "train_gemma": 690, "train_mta": 710,
    "train_deepseek": 860, "train_rwkv": 890,
}  # fmt: skip


@pytest.fixture(params=[path.stem for path in PATHS])
def script(request):
    return importlib.import_module(request.param)


# ---- text


def call_sync(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["sync", *options])
    sync.tyro.cli(sync.main, config=(sync.tyro.conf.FlagCreatePairsOff,))


def test_what_scripts_share_is_the_same_to_the_letter(monkeypatch, capsys):
    call_sync(monkeypatch, "--check")
    assert "@@" not in capsys.readouterr().out


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """The scripts in a folder of their own, which tools.sync works on."""
    for path in PATHS:
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    monkeypatch.setattr(sync, "ORIGINAL", tmp_path / "train_gpt2.py")
    return tmp_path


@pytest.mark.parametrize("name, old, new", [
    ("train_llama.py", "def get_lr(config, step):", "def get_lr(config, step, more):"),
    ("train_gemma.py", "a * cos - b * sin", "a * cos + b * sin"),
])  # fmt: skip
def test_sync_repairs_what_differs_and_nothing_else(copies, monkeypatch, name, old, new):
    path = copies / name
    own = path.read_text().replace("rope_theta", "base")  # this architecture's
    assert own.count(old) == 1
    path.write_text(own.replace(old, new))
    with pytest.raises(SystemExit, match="1 .*python -m tools.sync"):
        call_sync(monkeypatch, "--check")
    assert path.read_text() == own.replace(old, new)
    call_sync(monkeypatch)
    assert path.read_text() == own
    call_sync(monkeypatch, "--check")


MINE = [  # a script of a user's own: a copy of train_gpt2.py with these changes
    ('F.gelu(self.up(x), approximate="tanh")', "F.relu(self.up(x)) ** 2"),
    ("def get_lr(config, step):", "def get_lr(config, step, sharpness=1):"),  # which all seven share
]


def write_mine(folder):
    text = sync.ORIGINAL.read_text()
    for old, new in MINE:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "train_mine.py").write_text(text)
    return folder / "train_mine.py"


@pytest.mark.parametrize("options", [[], ["--check"]])
def test_sync_leaves_a_script_of_ones_own_alone_and_says_so(copies, monkeypatch, capsys, options):
    path = write_mine(copies)
    before = path.read_bytes()
    call_sync(monkeypatch, *options)
    assert capsys.readouterr().out.startswith("train_mine.py") and path.read_bytes() == before


def test_a_script_of_ones_own_trains_and_its_checkpoint_is_not_taken_for_gpt2s(run, sample, tmp_path):
    """Its weights would fit GPT-2's class, which would compute something else with them."""
    path = write_mine(tmp_path)
    folder = tmp_path / "log/mine-tiny"
    options = [*SMALL, f"--data_dir={sample}", "--max_steps=2"]
    mine, _ = load_script("train_mine", tmp_path)
    assert run(mine, *options)[0] == 0
    assert len(losses(folder)) == 2 and (folder / "train_mine.py").read_bytes() == path.read_bytes()
    model = mine.Model(mine.Config(**load(folder, 2)["config"]))
    model.load_state_dict(load(folder, 2)["model"])
    x = torch.randn(3, 16)
    mlp = model.blocks[0].mlp
    torch.testing.assert_close(mlp(x), mlp.proj(F.relu(mlp.up(x)) ** 2))
    assert run(mine, "--tiny", "--resume", "--max_steps=3")[0] == 0
    gpt2 = importlib.import_module("train_gpt2")
    status, said = run(gpt2, *options, "--run_name=mine-tiny", "--resume")
    assert status == 1 and "train_mine.py" in said and said.count("\n") == 1


def test_length_order_imports_and_that_nothing_happens_at_import(script):
    text = (ROOT / f"{script.__name__}.py").read_text()
    lines = text.splitlines()
    assert len(lines) <= LINES[script.__name__]
    assert max(map(len, lines)) <= 110
    tree = ast.parse(text)
    _, *body, last = tree.body  # the first is the docstring
    defines = (ast.Import, ast.ImportFrom, ast.Assign, ast.AugAssign, ast.ClassDef, ast.FunctionDef)
    assert all(isinstance(node, defines) for node in body)
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    classes = [node.name for node in body if isinstance(node, ast.ClassDef)]
    expected = ["Config", "Norm", "Attention", "MLP", "Block", "Model"]
    assert [name for name in classes if name in expected] == expected
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "tyro", "fineweb", "hellaswag"}
    allowed |= {"fla"} if script.__name__ == "train_rwkv" else set()  # on CUDA, where it is installed
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed


def test_help_names_every_option_with_the_value_that_runs(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    options = capsys.readouterr().out.split(" --")
    for name, value in vars(script.Config(**script.RECIPE)).items():
        shown = f"(default: {value})" if type(value) in (int, float) else ""
        assert any(option.split()[0] == name and shown in option for option in options), name


@pytest.mark.parametrize("name, parameters, active, flops", [
    ("gpt2", 124_475_904, 124.5e6, 266.0e6), ("llama", 123_587_328, 123.6e6, 266.0e6),
    ("mistral", 123_587_328, 123.6e6, 261.3e6), ("gemma", 123_673_216, 123.7e6, 267.3e6),
    ("deepseek", 124_317_312, 71.2e6, 228.1e6), ("rwkv", 124_286_208, 124.3e6, 255.7e6),
    ("mta", 123_597_084, 123.6e6, 274.4e6),
])  # fmt: skip
def test_parameters_and_operations_at_the_real_shapes(name, parameters, active, flops, monkeypatch):
    script = importlib.import_module(f"train_{name}")
    monkeypatch.setattr(script.Model, "init_weights", lambda self: None)
    model = in_full(script, **script.RECIPE)
    assert size(model) == parameters <= 124_475_904 and f"{parameters:,}" in script.__doc__
    assert model.active_parameters() == pytest.approx(active, abs=5e4)
    assert model.flops_per_token() == pytest.approx(flops, rel=1e-3)
    if name in weights.HF_CLASSES and name != "deepseek":  # transformers has no second token
        with torch.device("meta"):
            assert size(weights.hf_model(name, script.Config())) == parameters


@pytest.mark.parametrize("name, fields, words", [
    ("gpt2", dict(n_embd=30, n_head=4), "--n_embd 30 .* --n_head 4"),
    ("rwkv", dict(n_embd=30, n_head=4), "--n_embd 30 .* --n_head 4"),
    ("llama", dict(n_embd=36, n_head=4), "--n_embd 36 .* --n_head 4"),
    ("llama", dict(n_kv_head=5), "--n_head 12 .* --n_kv_head 5"),
    ("mistral", dict(n_embd=36, n_head=4), "--n_embd 36 .* --n_head 4"),
    ("mistral", dict(n_kv_head=5), "--n_head 12 .* --n_kv_head 5"),
    ("gemma", dict(n_head=4, n_kv_head=3), "--n_head 4 .* --n_kv_head 3"),
    ("gemma", dict(head_dim=33), "--head_dim 33"),
    ("mta", dict(n_embd=27, n_head=3), "--n_embd 27 .* --n_head 3"),
    ("mta", dict(conv_keys=10), "--conv_keys 10"),
    ("mta", dict(conv_queries=33, block_size=32), "--conv_queries 33"),
])  # fmt: skip
def test_shapes_that_can_not_be_are_refused(name, fields, words):
    script = importlib.import_module(f"train_{name}")
    with pytest.raises(SystemExit, match=words):
        script.Model(script.Config(**fields))


@pytest.mark.parametrize("name, theirs, eps", [  # Mistral's and MTA's are the same text as LLaMA's
    ("llama", "llama.modeling_llama.LlamaRMSNorm", 1e-5),
    ("gemma", "gemma3.modeling_gemma3.Gemma3RMSNorm", 1e-6),
    ("deepseek", "deepseek_v3.modeling_deepseek_v3.DeepseekV3RMSNorm", 1e-6),
])  # fmt: skip
def test_norms_are_the_reference_in_fp32_rounded_once(name, theirs, eps):
    """Of 16-bit x with and without autocast; the weights are in fp32."""
    module, _, kind = f"transformers.models.{theirs}".rpartition(".")
    reference = getattr(pytest.importorskip(module), kind)(64, eps=eps)
    torch.manual_seed(0)
    torch.nn.init.normal_(reference.weight)
    norm = importlib.import_module(f"train_{name}").Norm(64)
    norm.load_state_dict(reference.state_dict())
    for scale in (500, 1e-3):  # squares that are too large for fp16, and squares near eps
        x = scale * torch.randn(40, 64)
        assert_close(norm(x), reference(x), 1e-6)
        for dtype in (torch.float16, torch.bfloat16):
            rounded = x.to(dtype)
            y = norm(rounded)
            exact = reference(rounded.float())
            unit = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
            assert y.dtype == dtype
            assert ((y.float() - exact).abs() <= 0.501 * unit).all()
            with torch.autocast("cpu", dtype):
                assert torch.equal(norm(rounded), y)


# ---- the model


@pytest.mark.parametrize("C", [128, 768])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma"])
def test_initial_weights_follow_the_width(name, C):
    """0.02 at GPT-1's 768 channels; less where a block adds to the residual stream without a norm."""
    script = importlib.import_module(f"train_{name}")
    torch.manual_seed(0)
    fields = dict(n_layer=2, n_embd=C, n_head=4, n_kv_head=2, vocab_size=1000, block_size=64)
    fields = {name: value for name, value in fields.items() if hasattr(script.Config, name)}
    model = script.Model(script.Config(**fields))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == (0 if script.__name__ == "train_gemma" else 1)).all(), name
        else:
            std = 0.02 if C == 768 else 0.02 * math.sqrt(768 / C)
            if "proj" in name and script.__name__ != "train_gemma":
                std /= 2  # sqrt(2 * 2)
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < std / 20, name
    idx = tokens(2, 64)
    assert model(idx, idx)[1].item() < math.log(1000) + 3


def test_a_parameter_without_initialisation_is_an_error(script, monkeypatch):
    class Scaled(script.MLP):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.scale = torch.nn.Parameter(torch.ones(1))

    monkeypatch.setattr(script, "MLP", Scaled)
    with pytest.raises(NotImplementedError, match="blocks.0.mlp.scale"):
        script.Model(tiny(script))


@torch.no_grad()
def test_a_token_changes_nothing_before_it_and_neither_does_padding(script):
    model = make(script).eval()
    assert_sees_no_later_token(model)
    idx = tokens(2, 48)
    before = model(idx)[0]
    for n in (1, 5, 17, 33):
        padded = F.pad(idx[:, :n], (0, 48 - n), value=200)
        torch.testing.assert_close(model(padded)[0][:, :n], before[:, :n], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(idx[:, :n])[0], before[:, :n], rtol=1e-4, atol=1e-4)


def test_every_parameter_learns_is_in_one_group_and_is_saved_alone(script):
    model = make(script)
    assert_all_learn(model)
    extra = model.state_dict().keys() - dict(model.named_parameters()).keys()
    routing = {f"{block}.mlp.router.bias" for block in ("blocks.1", "blocks.2", "blocks.3", "mtp.block")}
    assert extra == (routing if script.__name__ == "train_deepseek" else set())
    decays = {id(p): group["weight_decay"] for group in model.optimizer_groups() for p in group["params"]}
    assert decays[id(model.wte.weight)] == model.config.weight_decay and 0 in decays.values()


@torch.no_grad()
def test_decoding_step_by_step_equals_the_whole(script):
    assert_decodes(make(script).eval())


def test_number_formats(script):
    """fp64 throughout; in 16 bits loss and gradients are near, and the weights stay in fp32."""
    idx, targets = tokens(4, 48, seed=2), tokens(4, 48, seed=3)
    # with all experts chosen, since close choices between them go by rounding
    fields = dict(n_active=8, topk_group=4) if script.__name__ == "train_deepseek" else {}

    def step(dtype):
        model = make(script, torch.float64 if dtype == torch.float64 else torch.float32, **fields)
        with torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
            loss = model(idx, targets)[1]
        (1024 * loss).backward()  # as the scaler does for fp16
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        return loss, gradient

    exact, gradient = step(torch.float64)
    assert exact.dtype == gradient.dtype == torch.float64
    for dtype, relative in ((torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        loss, rough = step(dtype)
        assert loss.dtype == rough.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=relative / 10)
        assert (rough - gradient).norm() < relative * gradient.norm(), dtype


@pytest.mark.slow
@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_one_graph_and_no_recompilation(script, dtype, relative):
    """What torch.compile captures, without its slow code generation: nothing breaks it or starts it over."""
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    idx, targets = [tokens(2, 48, seed=step) for step in range(3)], tokens(2, 48, seed=9)

    def train(model, net, first):
        for step in range(3):
            model.zero_grad()
            model.step.fill_(step)
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
    with torch._functorch.config.patch(backward_pass_autocast="off"):  # as the scripts set it
        compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
        compiled_loss, compiled_gradients = train(model, compiled, 1)
    torch._dynamo.reset()
    assert compiled_loss == pytest.approx(loss, rel=relative / 10)
    for ours, theirs, (name, _) in zip(compiled_gradients, gradients, model.named_parameters()):
        assert (ours - theirs).abs().max() <= relative * theirs.abs().max() + 1e-7, name
    if dtype == torch.float32:
        assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))  # DeepSeek's routing biases


# ---- runs


@pytest.mark.slow
def test_resume_eval_and_sample(script, run, sample, tmp_path):
    options = [*SHORT, f"--data_dir={sample}", "--run_name=a", "--eval_every=2"]
    folder = tmp_path / "log/a"
    status, said = run(script, *options, "--max_steps=4")
    assert status == 0, said
    straight, before = load(folder, 4), losses(folder)
    (folder / "step_00000004.pt").unlink()
    status, said = run(script, *options, "--resume")
    assert status == 0, said
    resumed = load(folder, 4)
    assert losses(folder) == before and len(before) == 4
    assert_same(resumed["model"], straight["model"])
    assert not any(name.startswith(("_orig_mod", "module")) for name in resumed["model"])
    status, said = run(script, "--run_name=a", "--eval")
    assert status == 0 and f"{events(folder, 'val')[-1]['loss']:.4f}" in said, said
    status, said = run(script, "--run_name=a", "--sample", "The ")
    assert status == 0 and said.count("The ") >= 2, said


@pytest.mark.slow
def test_two_processes_equal_one(script, run, sample, tmp_path):
    # the eps: AdamW's first steps go by the gradient's sign, which is chance where it is nothing but rounding
    options = [*SHORT, f"--data_dir={sample}", "--eval_every=9", "--max_steps=3", "--micro_batch=4"]
    options += ["--adam_eps=1e-4"]
    assert run(script, *options, "--run_name=one")[0] == 0
    command = [*TORCHRUN, script.__file__, *options, "--run_name=two"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert result.returncode == 0 and "FutureWarning" not in result.stderr, result.stdout + result.stderr
    one, two = tmp_path / "log/one", tmp_path / "log/two"
    for kind, figure in (("train", "loss"), ("train", "norm"), ("val", "loss"), ("score", "acc")):
        alone = [event[figure] for event in events(one, kind)]
        assert len(alone) >= 2
        # a score may differ by two of the 250 answers, since the weights differ by rounding
        near = dict(abs=0.009) if kind == "score" else dict(rel=1e-4)
        assert [event[figure] for event in events(two, kind)] == pytest.approx(alone, **near), figure
    theirs = load(two, 3)["model"]
    for name, tensor in load(one, 3)["model"].items():
        assert (theirs[name] - tensor).abs().max() < 3e-5, name
    assert run(script, "--run_name=two", "--resume", "--max_steps=4")[0] == 0  # on one process now
    assert len(losses(two)) == 4


@pytest.mark.slow
def test_a_tiny_run_learns(script, run, sample, tmp_path):
    options = ["--tiny", f"--data_dir={sample}", "--max_steps=40", "--warmup_steps=10", "--eval_every=40",
               "--batch_tokens=1024", "--val_tokens=1024", "--sample_tokens=8", "--run_name=a"]  # fmt: skip
    status, said = run(script, *options)
    assert status == 0, said
    found = losses(tmp_path / "log/a")
    # 5.5 is chance, and 3.4 what the frequencies of the bytes alone give; measured: 2.58 to 2.87
    assert found[0] > 5 and found[-1] < 3.05
