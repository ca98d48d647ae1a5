"""Each variant is a script that behaves and equals its equations; and tools.vary, which makes them."""
import functools
import importlib
import re
import sys
import types

import pytest
import reference
import test_scripts
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scripts import BUDGET, make, tiny, tokens

import train_deepseek
import train_llama
import train_rwkv
from tools import export, models, sync, vary

NAMES = vary.variants()


@functools.cache
def made(*names):
    """(file name, text, base, all parameters, active ones) of a variant."""
    return vary.make(names)


@functools.cache
def load(*names):
    """The script of a variant, or of several, as a module, without a file."""
    file, text, *_ = made(*names)
    module = types.ModuleType(file.removesuffix(".py"))
    module.__file__ = file
    exec(compile(text, file, "exec"), module.__dict__)
    return module


def base_of(name):
    return importlib.import_module(f"train_{name.split('-')[0]}")


@functools.cache
def count(script, **fields):
    return models.count_parameters(script, script.Config(**fields))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


# ==========================================================================
# Each variant


def test_there_are_those_that_the_studies_ask_for():
    asked = {
        "gpt2": "rope rmsnorm nobias swiglu relu2 qknorm",
        "llama": "learned nope layernorm gelu relu relu2 geglu qknorm mla moe shift",
        "deepseek": "dense dense-active",
        "rwkv": "attention noshift",
        "gemma": "rwkv shift",
    }
    for base, variants in asked.items():
        assert {f"{base}-{variant}" for variant in variants.split()} <= set(NAMES)


def test_size(name):
    """Within the budget, and as large as its base at full size and at --tiny, or the patch says why not."""
    base = base_of(name)
    *_, parameters, active = made(name)
    before, active_before = count(base, **base.RECIPE)
    assert parameters <= BUDGET
    patch = vary.read_patch(name)
    if "unequal" in patch.header:
        assert abs(parameters / before - 1) > 0.01, "nothing to explain"
        assert active == pytest.approx(active_before, rel=0.01)
        return
    assert parameters == pytest.approx(before, rel=0.01)
    script = load(name)
    small = count(script, **script.TINY_MODEL | script.TINY_RUN)[0]
    assert small == pytest.approx(count(base, **base.TINY_MODEL | base.TINY_RUN)[0], rel=0.021)


def test_patch_is_one_readable_change(name):
    file, text, base, parameters, _ = made(name)
    patch = vary.read_patch(name)
    total, known = vary.count_lines(text, base)
    larger = {"rwkv-attention": 55, "llama-moe": 100, "gemma-rwkv": 150}  # which bring a class along
    assert 4 <= total and total - known <= larger.get(name, 40)
    path = vary.VARIANTS / f"{name}.patch"
    assert all(len(line) <= 111 for line in path.read_text().splitlines())
    assert all(len(line) <= 110 for line in text.splitlines())
    docstring = load(name).__doc__
    assert all(len(line) <= 79 for line in docstring.splitlines())
    assert docstring.replace("\n", " ").strip().startswith(patch.header["what"])
    assert f"{parameters:,} parameters" in docstring.replace("\n", " ")
    commands = [line for line in docstring.splitlines() if "    " in line]
    assert len(commands) == 5 and all(file in line for line in commands)
    assert f"python -m tools.vary {name}" in docstring.replace("\n", " ")
    assert patch.header["question"].endswith("?")


def test_what_it_has_from_another_script_is_the_same_to_the_letter(name):
    _, text, base, *_ = made(name)
    for ours, theirs in vary.copies(text, base):
        assert ours == theirs, "run `python -m tools.vary --refresh`"


def test_patches_are_as_refresh_writes_them(name, tmp_path, monkeypatch):
    """But for the line numbers, which may be off."""
    patch = vary.read_patch(name)
    text = vary.apply(patch, vary.read_script(ROOT / patch.base), patch.base)
    before = (vary.VARIANTS / f"{name}.patch").read_text()
    monkeypatch.setattr(vary, "VARIANTS", tmp_path)
    vary.write_patch(name, patch.base, patch.header, text)
    after = (tmp_path / f"{name}.patch").read_text()
    assert re.sub("@@ .* @@", "@@", after) == re.sub("@@ .* @@", "@@", before)


@pytest.mark.parametrize("check", [
    test_scripts.test_padding_changes_no_score,
    test_scripts.test_every_parameter_learns_and_is_in_one_group,
    test_scripts.test_sixteen_bits,
], ids=lambda check: check.__name__.removeprefix("test_"))  # fmt: skip
def test_behaves_like_any_script(name, check):
    check(load(name))


def editing_a_token_changes_nothing_before_it(script):
    """In fp64, since the rounding of RWKV-7's chunks depends on their later tokens."""
    model = make(script, torch.float64).eval()
    idx = tokens(1, 48)
    with torch.no_grad():
        before = model(idx)[0]
        for t in (0, 1, 31, 32, 47):
            edited = idx.clone()
            edited[:, t] = (edited[:, t] + 1) % 257
            after = model(edited)[0]
            torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-10)
            assert (after[:, t] - before[:, t]).abs().max() > 1e-3


def test_editing_a_token_changes_nothing_before_it(name):
    editing_a_token_changes_nothing_before_it(load(name))


def test_decoding_step_by_step_equals_the_whole(name):
    model = make(load(name)).eval()
    idx = tokens(2, 48)
    with torch.no_grad():
        whole = model(idx)[0]
        state = None
        for n in range(29, 36):
            logits, state = model.decode(idx[:, :n], state)
            torch.testing.assert_close(logits, whole[:, n - 1], rtol=1e-4, atol=2e-4)
        assert model.decode(tokens(1, 60))[0].shape == (1, 257)  # beyond block_size


def learns(script):
    torch.manual_seed(0)
    model = script.Model(tiny(script)).train()
    optimizer = torch.optim.AdamW(model.optimizer_groups(), lr=3e-3, betas=(0.9, 0.95))
    idx, targets = tokens(1, 16), tokens(1, 16, seed=1)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(idx, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.after_step()
        losses.append(loss.item())
    assert losses[0] > 5 and losses[-1] < 2.5


def test_learns(name):
    learns(load(name))


def test_flops_are_those_of_its_matrices(name):
    """As many as the base's, but where a token uses other matrices or wider heads."""
    script = load(name)
    base = base_of(name)
    flops = models.make_model(script, script.Config(**script.RECIPE)).flops_per_token()
    before = models.make_model(base, base.Config(**base.RECIPE)).flops_per_token()
    unlike = {
        "llama-moe": 0.645, "gemma-rwkv": 0.986, "deepseek-dense": 1.46, "llama-mla": 1.018,
        "rwkv-attention": 1.007,
    }  # fmt: skip
    assert flops / before == pytest.approx(unlike.get(name, 1.0), rel=0.008)


# ==========================================================================
# Equations


def heads(x, weight, bias=0.0, n_head=4):
    """A projection, split into heads: x (T, C) -> (H, T, D)."""
    return (x @ weight.T + bias).unflatten(-1, (n_head, -1)).transpose(0, 1)


def turned(x, theta):
    """Su et al., 2021, eq. 34: x (H, T, D), with channels i and i + D / 2 as one complex number."""
    T, D = x.shape[1:]
    angles = torch.arange(T)[:, None] * theta ** (-2 * torch.arange(D // 2).double() / D)
    pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.exp(1j * angles)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def attended(q, k, v):
    """Vaswani et al., 2017, eq. 1, causal: (H, T, D) -> (T, H D)."""
    T, D = q.shape[1:]
    scores = q @ k.transpose(1, 2) / D**0.5
    scores = scores.exp() * torch.ones(T, T).tril()
    return (scores / scores.sum(-1, keepdim=True) @ v).transpose(0, 1).flatten(1)


def part(script, name):
    """A module of the first block, its weights {name: tensor} and an input (T, C), all in fp64."""
    model = make(script, torch.float64)
    for buffer in model.buffers():
        buffer.data = buffer.data.double() if buffer.is_floating_point() else buffer.data
    module = getattr(model.blocks[0], name)
    x = torch.randn(12, model.config.n_embd, dtype=torch.float64)
    return model, module, dict(module.named_parameters()), x


def close(ours, theirs):
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=1e-6)  # rope's table is fp32


def test_gpt2_rope():
    model, attention, w, x = part(load("gpt2-rope"), "attention")
    q, k, v = [heads(x, w[f"{i}.weight"], w[f"{i}.bias"]) for i in "qkv"]
    y = attended(turned(q, 10_000.0), turned(k, 10_000.0), v) @ w["proj.weight"].T + w["proj.bias"]
    close(attention(x[None], model.rope[:, :12])[0], y)


def test_gpt2_qknorm():
    _, attention, w, x = part(load("gpt2-qknorm"), "attention")
    assert "k.bias" not in w

    def normed(x, name):
        deviation = (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        x = (x - x.mean(-1, keepdim=True)) / deviation
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    q = normed(heads(x, w["q.weight"], w["q.bias"]), "q_norm")
    k = normed(heads(x, w["k.weight"]), "k_norm")
    y = attended(q, k, heads(x, w["v.weight"], w["v.bias"])) @ w["proj.weight"].T + w["proj.bias"]
    close(attention(x[None])[0], y)


@pytest.mark.parametrize("name", ["llama-qknorm", "llama-nope", "llama-learned"])
def test_llamas_attentions(name):
    script = load(name)
    torch.manual_seed(0)
    model, attention, w, x = part(script, "attention")
    q = heads(x, w["q.weight"])
    k = heads(x, w["k.weight"], n_head=1)
    v = heads(x, w["v.weight"], n_head=1)
    if name == "llama-qknorm":
        q = turned(reference.rms_norm(q, w["q_norm.weight"]), 500_000.0)
        k = turned(reference.rms_norm(k, w["k_norm.weight"]), 500_000.0)
        ours = attention(x[None], model.rope[:, :12])
    else:
        assert not hasattr(model, "rope") and not hasattr(script, "rotate")
        ours = attention(x[None])
    close(ours[0], attended(q, k, v) @ w["proj.weight"].T)


def test_llama_learned_adds_its_positions():
    model = make(load("llama-learned"))
    idx = tokens(1, 1).expand(1, 8)
    inputs = []
    model.blocks[0].register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    model(idx)
    close(inputs[0][0] - model.wte.weight[idx[0]], model.wpe.weight[:8])


def test_llama_nope_has_no_positions():
    """Without a mask the last token would see a set, so with a mask and one layer it sees a set, too."""
    script = load("llama-nope")
    model = make(script, n_layer=1).eval()
    idx = tokens(1, 20)
    shuffled = torch.cat((idx[:, torch.randperm(19)], idx[:, 19:]), dim=1)
    close(model(shuffled)[0][:, -1], model(idx)[0][:, -1])


ACTIVATIONS = {
    "gpt2-swiglu": (lambda x: x * torch.sigmoid(x), True),
    "gpt2-relu2": (lambda x: x.clamp(min=0) ** 2, False),
    "llama-relu2": (lambda x: x.clamp(min=0) ** 2, False),
    "llama-relu": (lambda x: x.clamp(min=0), False),
    "llama-gelu": (lambda x: F.gelu(x, approximate="tanh"), False),
    "llama-geglu": (lambda x: F.gelu(x, approximate="tanh"), True),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    act, gated = ACTIVATIONS[name]
    _, mlp, w, x = part(load(name), "mlp")
    up = x @ w["up.weight"].T + w.get("up.bias", 0.0)
    h = act(x @ w["gate.weight"].T) * up if gated else act(up)
    close(mlp(x[None])[0], h @ w["proj.weight"].T + w.get("proj.bias", 0.0))
    assert ("gate.weight" in w) == gated and ("up.bias" in w) == name.startswith("gpt2")


def test_norms():
    _, norm, w, x = part(load("gpt2-rmsnorm"), "norm1")
    close(norm(x), reference.rms_norm(x, w["weight"]))
    _, norm, w, x = part(load("llama-layernorm"), "norm1")
    deviation = (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    close(norm(x), (x - x.mean(-1, keepdim=True)) / deviation * w["weight"] + w["bias"])


def test_gpt2_with_four_changes_is_llama():
    """With a head of keys and values for each query head: the same names, the same function."""
    script = load("gpt2-rope", "gpt2-rmsnorm", "gpt2-swiglu", "gpt2-nobias")
    model = make(script).eval()
    llama = tiny(train_llama, n_kv_head=4, n_inner=344, rope_theta=10_000.0)
    twin = train_llama.Model(llama).eval()
    twin.load_state_dict(model.state_dict())
    idx = tokens(2, 48)
    torch.testing.assert_close(model(idx)[0], twin(idx)[0], rtol=0, atol=0)
    assert script.SCRIPT == "train_gpt2_rope_rmsnorm_swiglu_nobias"


def test_gpt2_nobias_has_none_but_the_norms():
    biases = [name for name in make(load("gpt2-nobias")).state_dict() if name.endswith("bias")]
    assert biases and all("norm" in name for name in biases)


def test_llama_mla_keeps_half_of_the_memory():
    config = load("llama-mla").Config()
    base = train_llama.Config()
    assert config.kv_rank + config.rope_dim == 192
    assert 2 * base.n_kv_head * base.n_embd // base.n_head == 384


def test_llama_moe_is_the_sum_of_its_experts():
    model, moe, w, x = part(load("llama-moe"), "mlp")
    moe.eval()
    chosen, weights, _ = moe.router(x[None])
    experts = (w["experts.gate"], w["experts.up"], w["experts.proj"])
    y = reference.experts_by_loop(x, *experts, chosen[0], weights[0])
    h = F.silu(x @ w["shared.gate.weight"].T) * (x @ w["shared.up.weight"].T)
    close(moe(x[None])[0][0], y + h @ w["shared.proj.weight"].T)


def test_llama_moe_balances_its_load():
    test_scripts.test_the_losss_value_is_the_cross_entropy_alone(load("llama-moe"))
    model = make(load("llama-moe")).train()
    model(tokens(2, 48), tokens(2, 48, seed=1))[1].backward()
    before = model.blocks[0].mlp.router.bias.clone()
    assert model.after_step(skipped=True) == {}
    assert torch.equal(model.blocks[0].mlp.router.bias, before)
    model(tokens(2, 48), tokens(2, 48, seed=1))
    figures = model.after_step()
    assert figures["load_max"] >= 1 and model.step == 1
    assert not torch.equal(model.blocks[0].mlp.router.bias, before)


def test_deepseek_dense_is_deepseek_without_experts():
    script = load("deepseek-dense")
    model = make(script).eval()
    assert not any(isinstance(module, script.MoE) for module in model.modules())
    twin = train_deepseek.Model(tiny(train_deepseek, n_dense=4, n_inner=312, mtp_depth="0")).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp")}
    twin.load_state_dict(state)
    idx = tokens(2, 48)
    torch.testing.assert_close(model(idx)[0], twin(idx)[0], rtol=0, atol=0)
    assert model.after_step() == {} and model.step == 1  # MTP's weight goes by it
    assert model.after_step(skipped=True) == {} and model.step == 1


def test_rwkv_attention_has_it_in_each_fourth_block():
    script = load("rwkv-attention")
    model = models.make_model(script, script.Config())
    found = [isinstance(block.attention, script.FullAttention) for block in model.blocks]
    assert found == [False, False, False, True] * 3
    torch.manual_seed(0)
    attention = script.FullAttention(tiny(script)).double()
    w = dict(attention.named_parameters())
    x = torch.randn(12, 128, dtype=torch.float64)
    q, k, v = [heads(x, w[f"{i}.weight"], n_head=2) for i in ("query", "key", "value")]
    close(attention(x[None], None, None, None)[0][0], attended(q, k, v) @ w["proj.weight"].T)


def test_gemma_rwkv_mixes_time_in_its_local_blocks():
    script = load("gemma-rwkv")
    model = script.Model(tiny(script))
    mixed = [isinstance(block.attention, script.TimeMixing) for block in model.blocks]
    assert mixed == [True] * 5 + [False] and not hasattr(script, "window_mask")
    shape = {"n_head": model.config.n_head_local}
    for name in ("n_layer", "n_embd", "rank_w", "rank_a", "rank_v", "rank_g"):
        shape[name] = getattr(model.config, name)
    rwkv = train_rwkv.Model(tiny(train_rwkv, **shape)).state_dict()
    same = 0
    for name, tensor in model.state_dict().items():
        drawn = name.endswith((".weight", "w2", "a2", "v2", "g2")) and "head_norm" not in name
        if "attention" in name and name in rwkv and not drawn:
            assert torch.equal(tensor, rwkv[name]), name
            same += 1
    assert same == 5 * 11 + 4 * 2  # of five layers, all but the first of which have v0 and v1


@pytest.mark.parametrize("name", ["llama-shift", "gemma-shift"])
def test_token_shift_is_that_of_its_equation_and_none_with_a_share_of_0(name):
    script = load(name)
    shift = script.Shift(8).double()
    torch.manual_seed(0)
    (share,) = shift.parameters()
    torch.nn.init.uniform_(share)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    shifted = shift(x)
    for t in range(5):
        before = x[:, t - 1] if t else torch.zeros(2, 8)
        close(shifted[:, t], (1 - share) * x[:, t] + share * before)

    base = base_of(name)
    model = script.Model(tiny(script))
    shares = {name for name, _ in model.named_parameters() if "shift" in name}
    assert len(shares) == 4 * len(model.blocks)  # of queries, keys, values and the MLP
    with torch.no_grad():
        for name in shares:
            model.get_parameter(name).zero_()
    plain = base.Model(tiny(base))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name not in shares})
    idx = tokens(2, 20)
    assert torch.equal(model(idx)[0], plain(idx)[0])


def test_rwkv_noshift_is_rwkv_whose_mixers_are_0():
    script = load("rwkv-noshift")
    whole = train_rwkv.Model(tiny(train_rwkv))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name.endswith("mix"):
                parameter.zero_()
            elif name.endswith("proj.weight"):
                parameter.normal_(0.0, 0.1)  # it begins at 0, where nothing would show
    model = script.Model(tiny(script))
    model.load_state_dict({name: value for name, value in whole.state_dict().items() if not name.endswith("mix")})
    idx = tokens(2, 40)
    close(model(idx)[0], whole(idx)[0])


def test_titan_is_what_its_two_patches_make():
    names = ("gemma-rwkv", "gemma-shift")
    *_, parameters, _ = made(*names)
    assert parameters <= BUDGET
    model = load(*names).Model(tiny(load(*names)))
    shifts = [name for name, _ in model.named_parameters() if "shift" in name]
    assert len(shifts) == 6 + 3  # in each MLP, and in the global layer's attention
    for check in (editing_a_token_changes_nothing_before_it, learns):
        check(load(*names))


# ==========================================================================
# tools.vary


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the seven scripts and the patches, which tools.vary works on."""
    for name in sync.SCRIPTS.values():
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    folder = tmp_path / "tools/variants"
    folder.mkdir(parents=True)
    for path in vary.VARIANTS.glob("*.patch"):
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(vary, "ROOT", tmp_path)
    monkeypatch.setattr(vary, "VARIANTS", folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys):
    """call(*arguments) -> what tools.vary printed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["vary", *map(str, arguments)])
        vary.main()
        return capsys.readouterr().out

    return call


def refuses(call, *arguments):
    """The line with which tools.vary ends."""
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


def scripts(folder):
    return {path.name for path in folder.glob("train_*")}


def test_it_writes_a_script_that_runs_resumes_and_is_exported(here, call, run, small_sample, monkeypatch):
    from safetensors.torch import load_file

    said = call("gpt2-rope")
    assert said.startswith(
        "train_gpt2_rope.py: 123,689,472 parameters, budget 124,475,904; 37 lines differ from train_gpt2.py, "
        "12 of them in definitions of other scripts\nNext: "
    )
    monkeypatch.syspath_prepend(here)
    script = importlib.import_module("train_gpt2_rope")
    try:
        options = [*test_scripts.SHORT, f"--data_dir={small_sample}", "--run_name=a", "--eval_every=2"]
        status, said = run(script, *options, "--max_steps=4")
        assert status == 0, said
        saved = test_scripts.load(here / "log/a", 4)["model"]
        (here / "log/a/step_000004.pt").unlink()
        status, said = run(script, "--tiny", "--run_name=a", "--resume")
        assert status == 0, said
        resumed = test_scripts.load(here / "log/a", 4)["model"]
        monkeypatch.setattr(sys, "argv", ["export", "log/a", "--out", "hf/a"])
        export.main()
    finally:
        del sys.modules["train_gpt2_rope"]
    exported = load_file(here / "hf/a/model.safetensors")
    assert saved.keys() == resumed.keys() == exported.keys() and "wpe.weight" not in saved
    for name, tensor in saved.items():
        assert torch.equal(resumed[name], tensor) and torch.equal(exported[name], tensor), name


def test_existing_files_and_edits_are_kept(here, call):
    call("gpt2-relu2")
    path = here / "train_gpt2_relu2.py"
    whole = path.read_bytes()
    call("gpt2-relu2")
    path.write_bytes(whole + b"# mine\n")
    assert refuses(call, "gpt2-relu2").startswith("train_gpt2_relu2.py is not what this command writes: ")
    assert path.read_bytes() == whole + b"# mine\n"
    call("gpt2-relu2", "--force")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("names, words", [
    (["gpt2-nobias", "gpt2-swiglu"], "gpt2-swiglu doesn't fit train_gpt2.py with gpt2-nobias: nothing"),
    (["gpt2-rope", "gpt2-rope"], "gpt2-rope doesn't fit train_gpt2.py with gpt2-rope: nothing"),
    (["gpt2-rope", "llama-nope"], "llama-nope is a patch of train_llama.py, but gpt2-rope of train_gpt2.py"),
    (["gpt2-rpe"], "there is no variant gpt2-rpe: did you mean gpt2-rope?"),
    (["--save", "gpt2-mine"], "--save NAME wants one script"),
    ([], "which variant?"),
])  # fmt: skip
def test_what_cant_be_made_is_one_line_and_leaves_no_file(names, words, here, call):
    before = scripts(here)
    assert refuses(call, *names).startswith(words)
    assert scripts(here) == before


def test_patches_outlive_edits_elsewhere(here, call):
    """Of the shared loop, and of line numbers."""
    path = here / "train_gpt2.py"
    text = path.read_text()
    text = text.replace("import argparse\n", "import argparse\nimport abc\n\n")
    text = text.replace("scaler.update()", "scaler.update()  # of the loop")
    path.write_text(text)
    call("gpt2-rope", "gpt2-qknorm")
    made = (here / "train_gpt2_rope_qknorm.py").read_text()
    assert "import abc" in made and "# of the loop" in made
    assert vary.body(made) == vary.body(made_by_hand(text, "gpt2-rope", "gpt2-qknorm"))


def made_by_hand(text, *names):
    for name in names:
        for hunk in vary.read_patch(name).hunks:
            old, new = "\n".join(["", *hunk.old, ""]), "\n".join(["", *hunk.new, ""])
            assert text.count(old) == 1
            text = text.replace(old, new)
    return text


@pytest.mark.parametrize("old, new, words", [
    ("F.gelu(self.up(x)", "F.gelu(self.down(x)",
     "nothing there reads as the patch expects at `return self.proj(F.gelu("),
    ("class Block(", "class Old:\n    def forward(self, x):\n"
     '        return self.proj(F.gelu(self.up(x), approximate="tanh"))\n\n\nclass Block(',
     "more than one place there reads"),
])  # fmt: skip
def test_a_base_that_has_changed_there_is_one_line(old, new, words, here, call):
    path = here / "train_gpt2.py"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert words in refuses(call, "gpt2-relu2")
    assert not (here / "train_gpt2_relu2.py").exists()


@pytest.mark.parametrize("edit, words", [
    (lambda text: text.replace("# question:", "# riddle:"), "gpt2-relu2.patch doesn't say its question"),
    (lambda text: text.replace("--- train_gpt2.py", "--- train_gpt9.py"), "gpt2-relu2.patch changes no"),
    (lambda text: text.replace("Primer's", "Primer's \\d"), "gpt2-relu2.patch: its question has"),
    (lambda text: text + "what is this\n", "gpt2-relu2.patch, line 15: 'what is this' is no line"),
])  # fmt: skip
def test_a_broken_patch_is_one_line(edit, words, here, call):
    path = here / "tools/variants/gpt2-relu2.patch"
    path.write_text(edit(path.read_text()))
    assert refuses(call, "gpt2-relu2").startswith(words)


# ---- --save

SAID = ["--what", "GPT-2 with ReLU.", "--question", "Is that worse?", "--paper", "None: a test."]


def edit_gpt2(here, *replacements):
    text = (here / "train_gpt2.py").read_text()
    text = text.replace("GPT-2 (Radford et al.", "Mine (Radford et al.")  # of the docstring, which isn't kept
    for old, new in replacements:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (here / "train_mine.py").write_text(text)
    return text


def test_save_gives_the_same_bytes_back(here, call):
    edited = edit_gpt2(
        here,
        ('F.gelu(self.up(x), approximate="tanh")', "F.relu(self.up(x))"),
        ("def get_lr(config, step):", "def get_lr(config, step):\n    # flat\n"),
        ('if __name__ == "__main__":\n', ""),
    )
    edited = edited.replace("\n    main()\n    if dist", "\nmain_is = main\nif True:\n    if dist")
    (here / "train_mine.py").write_text(edited.replace("\n", "\r\n"), newline="")
    said = call("--save", "gpt2-relu", "train_mine.py", *SAID)
    assert said.startswith("saved tools/variants/gpt2-relu.patch\ntrain_gpt2_relu.py: 124,475,904 ")
    call("gpt2-relu")
    made = (here / "train_gpt2_relu.py").read_bytes()
    assert vary.body(made.decode()) == vary.body(edited)
    assert b"GPT-2 with ReLU." in made and b"\r" not in made
    patch = vary.read_patch("gpt2-relu")
    assert patch.header["parameters"] == "the same" and patch.header["paper"] == "None: a test."


def test_saving_what_a_patch_made_gives_the_patch(here, call):
    for name in ("gpt2-rope", "llama-moe"):
        call(name)
        patch = vary.read_patch(name)
        path = here / f"tools/variants/{name}.patch"
        header = [f"--{field}={patch.header[field]}" for field in vary.FIELDS if field in patch.header]
        file = vary.script_name(patch.base, [name])
        assert "is there already" in refuses(call, "--save", name, file, *header)
        whole = path.read_text()
        call("--save", name, file, "--force", *header)
        assert re.sub("@@ .* @@", "@@", path.read_text()) == re.sub("@@ .* @@", "@@", whole)


@pytest.mark.parametrize("arguments, words", [
    (["--save", "gpt2-relu", "train_mine.py", "--what", "GPT-2 with ReLU."], "give --question, --paper"),
    (["--save", "relu", "train_mine.py", *SAID], "call the variant gpt2-NAME, in small letters"),
    (["--save", "llama-relu9", "train_mine.py", "--base=gpt2", *SAID], "call the variant gpt2-NAME"),
    (["--save", "gpt2-../x", "train_mine.py", *SAID], "call the variant gpt2-NAME"),
    (["--save", "gpt2-relu", "train_mine.py", "--base", "gpt3", *SAID], "--base gpt3 is none of"),
    (["--save", "gpt2-relu", "train_yours.py", *SAID], "train_yours.py can't be read: No such file"),
    (["--save", "gpt2-relu", "tools/variants/gpt2-rope.patch", *SAID], "is no training script"),
    (["--save", "gpt2-same", "train_gpt2.py", *SAID], "there is nothing to save"),
    (["--save", "gpt2-relu", "train_mine.py", *SAID[:-1], 'x"""'], "train_mine.py: its paper has"),
])  # fmt: skip
def test_what_cant_be_saved_is_one_line(arguments, words, here, call):
    edit_gpt2(here, ('F.gelu(self.up(x), approximate="tanh")', "F.relu(self.up(x))"))
    before = {path.name for path in vary.VARIANTS.iterdir()}
    assert words in refuses(call, *arguments)
    assert {path.name for path in vary.VARIANTS.iterdir()} == before


@pytest.mark.parametrize("old, new, words", [
    ("return self.proj(F.gelu(", "return self.proj(F.gelu((", "would not run (SyntaxError"),
    ("self.norm = Norm(config.n_embd)", "self.norm = Norm(config.embd)", "would not run (AttributeError"),
    ("class MLP(", "# The same in RWKV-7.\nclass MLP(", "differs from what `# The same in RWKV-7.` says"),
    ("class MLP(", "# The same in RWKV-8.\nclass MLP(", "names a script that is none of GPT-2, LLaMA"),
    ("4 * config.n_embd)", "5 * config.n_embd)", "138,640,896 parameters, +11.4% against train_gpt2.py"),
])  # fmt: skip
def test_an_edited_script_that_isnt_fit_is_not_saved(old, new, words, here, call):
    edit_gpt2(here, (old, new))
    assert words in refuses(call, "--save", "gpt2-relu", "train_mine.py", *SAID)
    assert not (vary.VARIANTS / "gpt2-relu.patch").exists()


def test_a_base_that_is_not_the_closest_is_said(here, call):
    edit_gpt2(here, ('F.gelu(self.up(x), approximate="tanh")', "F.relu(self.up(x))"))
    said = call("--save", "llama-mine", "train_mine.py", *SAID)
    note = "note: train_mine.py differs from train_gpt2.py in fewer lines than from train_llama.py\n"
    assert said.startswith(note)
    call("llama-mine")
    made, mine = [(here / name).read_text() for name in ("train_llama_mine.py", "train_mine.py")]
    assert vary.body(made) == vary.body(mine)


def test_unequal_parameters_are_said(here, call):
    edit_gpt2(here, ("4 * config.n_embd)", "5 * config.n_embd)"))
    said = call("--save", "gpt2-wide", "train_mine.py", *SAID, "--unequal", "Width is the question.")
    assert "over the budget" in said
    header = vary.read_patch("gpt2-wide").header
    assert header["parameters"] == "+11.38%" and header["unequal"] == "Width is the question."


LINES = st.lists(st.sampled_from(["a", "# b", "    c", "", "def f():", "class G:"]), max_size=12)


@settings(max_examples=200, deadline=None)
@given(LINES, LINES)
def test_a_diff_gives_the_other_text_back(old, new):
    """However often a line occurs."""
    old = "\n".join(["class A:", *old, "end", ""])
    new = "\n".join(["class A:", *new, "end", ""])
    hunks = []
    for line in vary.diff(old, new).splitlines() if old != new else []:
        if line.startswith("@@"):
            hunks.append(vary.Hunk([], []))
        else:
            hunks[-1].old += [line[1:]] * (line[0] != "+")
            hunks[-1].new += [line[1:]] * (line[0] != "-")
    assert vary.apply(vary.Patch("x", "y", {}, hunks), old, "y") == new


# ---- the rest


def change(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_refresh_takes_what_another_script_has_now(here, call):
    change(here / "train_deepseek.py", "+ routed.view_as(x), balance", "+ routed.view(x.shape), balance")
    folder = here / "tools/variants"
    kept = (folder / "gpt2-relu2.patch").read_bytes()
    assert "llama-moe.patch: made anew" in call("--refresh")
    assert "+ routed.view(x.shape), balance" in (folder / "llama-moe.patch").read_text()
    assert (folder / "gpt2-relu2.patch").read_bytes() == kept
    assert "made anew" not in call("--refresh")


def test_refresh_names_what_no_longer_fits(here, call, capsys):
    """rotate is copied by gpt2-rope, and two of LLaMA's variants remove it."""
    change(here / "train_llama.py", "a * cos - b * sin", "a * cos - sin * b")
    said = refuses(call, "--refresh")
    assert said.startswith("2 no longer fit their base and have to be edited by hand: llama-learned doesn't")
    assert "gpt2-rope.patch: made anew" in capsys.readouterr().out
    assert "a * cos - sin * b" in (here / "tools/variants/gpt2-rope.patch").read_text()


def test_list_names_all(call):
    said = call("--list")
    for name in NAMES:
        assert re.search(rf"^{name} +\S", said, re.MULTILINE)
    assert "GPT-2 with rotary positions" in said
    assert all(len(line) <= 79 for line in said.splitlines())


def test_help_fits_80_columns(call, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        call("--help")
    assert all(len(line) <= 79 for line in capsys.readouterr().out.splitlines())


def test_what_it_writes_is_ignored_by_git():
    lines = (ROOT / ".gitignore").read_text().splitlines()
    assert "/train_*_*.py" in lines
    assert not any(name.count("_") > 1 for name in sync.SCRIPTS.values())
