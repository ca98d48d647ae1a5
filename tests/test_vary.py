"""Each variant is a script that behaves and equals its equations; and tools.vary, which makes them."""
import difflib
import functools
import importlib
import math
import re

import pytest
import reference
import torch
import torch.nn.functional as F
import unidiff
from conftest import ROOT
from helpers import (assert_all_learn, assert_decodes, assert_overfits, assert_sees_no_later_token,
                     in_full, make, size, tiny, tokens)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

import train_deepseek
import train_llama
import train_rwkv
from tools import sync
from tools.study import vary

NAMES = vary.variants()
BUDGET = 124_475_904


@functools.cache
def made(*names):
    """(file name, text, base, number of parameters) of a variant."""
    return vary.make(names)


@functools.cache
def load(*names):
    """The script of a variant, or of several, as a module, without a file."""
    file, text, *_ = made(*names)
    return vary.load_text(file.removesuffix(".py"), text)


def base_of(name):
    return importlib.import_module(f"train_{name.split('-')[0]}")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


# ---- each variant


def test_size(name):
    """Within the budget, and as large as its base at full size and at --tiny, or the patch says why not."""
    base = base_of(name)
    script = load(name)
    number = size(in_full(script))
    assert number == made(name)[3] <= BUDGET
    if "unequal" in vary.read_patch(name).header:
        assert number == pytest.approx(in_full(base).active_parameters(), rel=0.01)
        return
    assert number == pytest.approx(size(in_full(base)), rel=0.01)
    small = size(in_full(script, **script.TINY_MODEL | script.TINY_RUN))
    assert small == pytest.approx(size(in_full(base, **base.TINY_MODEL | base.TINY_RUN)), rel=0.021)


def test_flops_are_those_of_its_matrices(name):
    """As many as the base's, but where a token uses other matrices or wider heads."""
    unlike = {"llama-moe": 0.645, "gemma-rwkv": 0.977, "rwkv-attention": 1.01, "deepseek-dense": 1.46,
              "llama-mla": 1.018}  # fmt: skip
    ratio = in_full(load(name)).flops_per_token() / in_full(base_of(name)).flops_per_token()
    assert ratio == pytest.approx(unlike.get(name, 1.0), rel=0.008)


COPY = re.compile(r"^# The same in ([^\n,]*?)(?:, [^\n]*| and [^\n]*)?\.\n"
                  r"((?:class|def) (\w+).*\n(?:(?:    .*)?\n)*)", re.MULTILINE)  # fmt: skip


def test_what_it_has_from_another_script_is_the_same_to_the_letter(name):
    for script, text, word in COPY.findall(made(name)[1]):
        original = (ROOT / sync.SCRIPTS[script]).read_text()
        if word == "TimeMixing":
            text = text.replace("class TimeMixing(", "class Attention(", 1)
        assert text.rstrip("\n") + "\n" in original, f"{word} is not {script}'s"


def test_initial_deviations_go_by_width(name):
    """0.02 at 768 channels, and behind a latent by its own; DeepSeek's and RWKV-7's are their bases'."""
    if name.startswith(("deepseek", "rwkv")):
        return
    script = load(name)
    torch.manual_seed(0)
    model = script.Model(tiny(script, n_embd=192))
    for key, p in model.named_parameters():
        if p.dim() < 2 or ("attention" in key and name == "gemma-rwkv"):
            continue
        inputs = p.shape[1] if key.endswith(("q_b.weight", "kv_b.weight")) else 192
        std = 0.02 * math.sqrt(768 / inputs)
        if "proj" in key and not name.startswith("gemma"):
            std /= math.sqrt(2 * model.config.n_layer)
        assert p.std().item() == pytest.approx(std, rel=0.08), key


@pytest.mark.slow
@pytest.mark.parametrize("names", [*[(name,) for name in NAMES], ("gemma-rwkv", "gemma-shift")], ids="-".join)
def test_behaves(names):
    """Learns with every parameter, sees no later token, decodes as it reads, takes 16 bits."""
    script = load(*names)
    model = make(script, torch.float64).eval()  # the rounding of RWKV-7's chunks sees later tokens
    with torch.no_grad():
        assert_sees_no_later_token(model, 1e-10)
        assert_decodes(model)
    model = make(script)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens(2, 48), tokens(2, 48, seed=1))[1].isfinite()
    assert_all_learn(model)
    assert_overfits(script)


# ---- equations


def heads(x, weight, bias=0.0, n_head=4):
    """A projection, split into heads: x (T, C) -> (H, T, D)."""
    return (x @ weight.T + bias).unflatten(-1, (n_head, -1)).transpose(0, 1)


def turned(x, theta):
    """x (H, T, D) at its positions. The scripts pair channel i with i + D / 2: the scores are the same."""
    x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return reference.rotate_neighbours(x, theta)


def attended(q, k, v):
    """(H, T, D) -> (T, H D): each query to itself and all tokens before it."""
    return reference.window_attention(q[None], k[None], v[None], q.shape[1])[0].transpose(0, 1).flatten(1)


def part(script, name):
    """A module of the first block, its weights {name: tensor} and an input (T, C), all in fp64."""
    model = make(script, torch.float64)
    module = getattr(model.blocks[0], name)
    return model, module, dict(module.named_parameters()), torch.randn(12, model.config.n_embd).double()


def close(ours, theirs):
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=1e-6)  # rope's table is fp32


def layer_norm(x, weight, bias):
    deviation = (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return (x - x.mean(-1, keepdim=True)) / deviation * weight + bias


@pytest.mark.parametrize("name", ["gpt2-rope", "gpt2-qknorm", "llama-qknorm", "llama-nope", "llama-learned"])
def test_attentions(name):
    model, attention, w, x = part(load(name), "attention")
    n_kv_head = 4 if name.startswith("gpt2") else 1
    q = heads(x, w["q.weight"], w.get("q.bias", 0.0))
    k = heads(x, w["k.weight"], w.get("k.bias", 0.0), n_kv_head)
    v = heads(x, w["v.weight"], w.get("v.bias", 0.0), n_kv_head)
    if name.endswith("qknorm"):
        norm = layer_norm if name == "gpt2-qknorm" else reference.rms_norm
        q = norm(q, *reference.below(w, "q_norm.").values())
        k = norm(k, *reference.below(w, "k_norm.").values())
    if name in ("gpt2-rope", "llama-qknorm"):
        q, k = [turned(x, 10_000.0 if name == "gpt2-rope" else 500_000.0) for x in (q, k)]
        ours = attention(x[None], model.rope[:, :12])
    else:
        assert not hasattr(model, "rope")
        ours = attention(x[None])
    close(ours[0], attended(q, k, v) @ w["proj.weight"].T + w.get("proj.bias", 0.0))


@pytest.mark.parametrize("name, act", [
    ("gpt2-swiglu", F.silu),
    ("gpt2-relu2", lambda x: x.clamp(min=0) ** 2),
    ("llama-relu2", lambda x: x.clamp(min=0) ** 2),
    ("llama-relu", lambda x: x.clamp(min=0)),
    ("llama-gelu", lambda x: F.gelu(x, approximate="tanh")),
    ("llama-geglu", lambda x: F.gelu(x, approximate="tanh")),
])  # fmt: skip
def test_activations(name, act):
    _, mlp, w, x = part(load(name), "mlp")
    up = x @ w["up.weight"].T + w.get("up.bias", 0.0)
    h = act(x @ w["gate.weight"].T) * up if name.endswith("glu") else act(up)
    close(mlp(x[None])[0], h @ w["proj.weight"].T + w.get("proj.bias", 0.0))


def test_norms():
    _, norm, w, x = part(load("gpt2-rmsnorm"), "norm1")
    close(norm(x), reference.rms_norm(x, w["weight"]))
    _, norm, w, x = part(load("llama-layernorm"), "norm1")
    close(norm(x), layer_norm(x, w["weight"], w["bias"]))


def test_a_token_enters_the_first_block_at_unit_size():
    model = make(load("llama-embednorm"))
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.arange(12)[None]
    model(ids)
    close(seen[0], reference.rms_norm(model.wte.weight[ids], model.norm0.weight))


def test_values_are_the_mean_of_a_layers_own_and_the_first_layers():
    model = make(load("llama-vfirst")).eval()
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    model(tokens(2, 48))
    assert seen[0] is None and seen[1] is not None and all(each is seen[1] for each in seen[1:])
    twin = train_llama.Model(model.config).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for each in (model, twin):
            each.blocks[0].attention.v.weight.zero_()
        for block in twin.blocks:
            block.attention.v.weight.mul_(0.5)
    close(model(tokens(2, 48))[0], twin(tokens(2, 48))[0])


def test_gpt2_with_four_changes_is_llama():
    """With a head of keys and values for each query head: the same names, the same function."""
    model = make(load("gpt2-rope", "gpt2-rmsnorm", "gpt2-swiglu", "gpt2-nobias")).eval()
    twin = train_llama.Model(tiny(train_llama, n_kv_head=4, n_inner=344, rope_theta=10_000.0)).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens(2, 48))[0], twin(tokens(2, 48))[0])


def test_llama_moe_balances_the_load_of_its_experts_which_are_deepseeks():
    model = make(load("llama-moe")).train()
    idx = tokens(2, 48)
    plain = F.cross_entropy(model(idx)[0].flatten(0, 1), idx.flatten())
    torch.testing.assert_close(model(idx, idx)[1], plain, rtol=1e-5, atol=0)
    before = model.blocks[0].mlp.router.bias.clone()
    assert model.after_step(skipped=True) == {}
    assert torch.equal(model.blocks[0].mlp.router.bias, before)
    model(idx, idx)
    assert model.after_step()["load_max"] >= 1
    assert not torch.equal(model.blocks[0].mlp.router.bias, before)


def test_deepseek_dense_is_deepseek_without_experts():
    model = make(load("deepseek-dense")).eval()
    twin = train_deepseek.Model(tiny(train_deepseek, n_dense=4, n_inner=312, mtp_depth="0")).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp")}
    twin.load_state_dict(state)
    assert torch.equal(model(tokens(2, 48))[0], twin(tokens(2, 48))[0]) and model.after_step() == {}


def test_rwkv_attention_has_it_in_each_fourth_block():
    script = load("rwkv-attention")
    found = [isinstance(block.attention, script.FullAttention) for block in in_full(script).blocks]
    assert found == [False, False, False, True] * 3
    torch.manual_seed(0)
    attention = script.FullAttention(tiny(script)).double()
    w = dict(attention.named_parameters())
    x = torch.randn(12, 128, dtype=torch.float64)
    q, k, v = [heads(x, w[f"{i}.weight"], n_head=2) for i in ("query", "key", "value")]
    close(attention(x[None], None, None, None)[0][0], attended(q, k, v) @ w["proj.weight"].T)


def test_gemma_rwkv_mixes_time_in_its_local_blocks_from_rwkvs_initial_values():
    script = load("gemma-rwkv")
    model = script.Model(tiny(script))
    assert [isinstance(b.attention, script.TimeMixing) for b in model.blocks] == [True] * 5 + [False]
    names = ("n_layer", "n_embd", "rank_w", "rank_a", "rank_v", "rank_g")
    shape = {name: getattr(model.config, name) for name in names}
    rwkv = train_rwkv.Model(tiny(train_rwkv, n_head=model.config.n_head_local, **shape)).state_dict()
    drawn = (".weight", "w2", "a2", "v2", "g2")
    for name, tensor in model.state_dict().items():
        if "attention" in name and name in rwkv and (not name.endswith(drawn) or "head_norm" in name):
            assert torch.equal(tensor, rwkv[name]), name


@pytest.mark.parametrize("name", ["llama-shift", "gemma-shift"])
def test_token_shift_is_that_of_its_equation_and_none_with_a_share_of_0(name):
    script = load(name)
    shift = script.Shift(8).double()
    (share,) = shift.parameters()
    torch.nn.init.uniform_(share)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    before = torch.cat((torch.zeros(2, 1, 8), x[:, :-1]), dim=1)
    close(shift(x), (1 - share) * x + share * before)
    base = base_of(name)
    model = script.Model(tiny(script))
    shares = {name for name, _ in model.named_parameters() if "shift" in name}
    assert len(shares) == 4 * len(model.blocks)  # of queries, keys, values and the MLP
    state = {name: value.zero_() if name in shares else value for name, value in model.state_dict().items()}
    plain = base.Model(tiny(base))
    plain.load_state_dict({name: value for name, value in state.items() if name not in shares})
    assert torch.equal(model(tokens(2, 20))[0], plain(tokens(2, 20))[0])


@pytest.mark.parametrize("name, part, off", [("rwkv-noshift", "mix", 0.0), ("rwkv-novfirst", "v0", -1e4)])
def test_rwkv_without_a_part_is_rwkv_with_it_turned_off(name, part, off):
    whole = train_rwkv.Model(tiny(train_rwkv))
    for key, value in whole.state_dict().items():
        if key.endswith("proj.weight"):  # they begin at 0, where nothing would show
            value.normal_(0.0, 0.1)
        elif key.endswith(part):
            value.fill_(off)
    model = load(name).Model(tiny(load(name)))
    model.load_state_dict({key: whole.state_dict()[key] for key in model.state_dict()})
    close(model(tokens(2, 40))[0], whole(tokens(2, 40))[0])


def test_titan_is_what_its_two_patches_make():
    names = ("gemma-rwkv", "gemma-shift")
    shifts = [name for name, _ in make(load(*names)).named_parameters() if "shift" in name]
    # in each MLP, and in the global layer's attention
    assert len(shifts) == 6 + 3 and made(*names)[3] <= BUDGET


# ---- tools.vary


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the scripts and some patches for tools.vary; train_mine.py is GPT-2 with ReLU."""
    for name in sync.SCRIPTS.values():
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "variants").mkdir()
    for name in ("gpt2-rope", "gpt2-relu2", "gpt2-swiglu", "gpt2-nobias", "llama-nope"):
        (tmp_path / f"variants/{name}.patch").write_bytes((vary.VARIANTS / f"{name}.patch").read_bytes())
    monkeypatch.setattr(vary, "ROOT", tmp_path)
    monkeypatch.setattr(vary, "VARIANTS", tmp_path / "variants")
    gelu = 'F.gelu(self.up(x), approximate="tanh")'
    change(tmp_path / "train_gpt2.py", gelu, "F.relu(self.up(x))", "train_mine.py")
    return tmp_path


def change(path, old, new, to=None):
    """Replaces what is in a file once; to: the name of another file that the result goes to."""
    text = path.read_text()
    assert text.count(old) == 1
    path.with_name(to or path.name).write_text(text.replace(old, new))


def test_it_writes_the_script_and_keeps_edits(here, run):
    assert "123,689,472" in run(vary, "gpt2-rope")[1]
    path = here / "train_gpt2_rope.py"
    whole = path.read_bytes()
    assert vary.body(whole.decode()) == vary.body(made("gpt2-rope")[1])
    assert run(vary, "gpt2-rope")[0] == 0
    path.write_bytes(whole + b"# mine\n")
    assert "--force" in run(vary, "gpt2-rope")[1] and path.read_bytes() == whole + b"# mine\n"
    assert run(vary, "gpt2-rope", "--force")[0] == 0 and path.read_bytes() == whole
    docstring = vary.load_text("x", whole.decode()).__doc__
    assert "123,689,472" in docstring and docstring.count("train_gpt2_rope.py") >= 2


@pytest.mark.parametrize("names, words", [
    (["gpt2-nobias", "gpt2-swiglu", "gpt2-swiglu"], "gpt2-swiglu doesn't fit train_gpt2.py with gpt2-nobias"),
    (["gpt2-rope", "llama-nope"], "train_llama.py"),
    (["gpt2-rpe"], "gpt2-rope"),
    (["--save", "gpt2-mine"], "--save"),
    (["--save", "gpt2-mine", "train_mine.py", "--what", "x"], "--question, --paper"),
    (["--save", "mine", "train_mine.py"], "gpt2-mine"),
    (["--save", "gpt2-../x", "train_mine.py"], "gpt2-mine"),
    (["--save", "gpt2-mine", "train_yours.py"], "train_yours.py can't be read"),
    (["--save", "gpt2-rope", "train_mine.py"], "--force"),
    (["--save", "gpt2-mine", "train_gpt2.py"], "nothing to save"),
    ([], "--list"),
])  # fmt: skip
def test_what_cant_be_made_is_one_line_and_leaves_no_file(names, words, here, run):
    before = sorted(here.rglob("*"))
    status, said = run(vary, *names)
    assert status == 1 and words in said and said.count("\n") == 1
    assert sorted(here.rglob("*")) == before


def test_patches_outlive_edits_elsewhere_and_name_what_is_gone(here, run):
    path = here / "train_gpt2.py"
    change(path, "import math\n", "import math\nimport abc\n\n")
    change(path, "scaler.update()", "scaler.update()  # of the loop")
    assert run(vary, "gpt2-relu2")[0] == 0
    text = (here / "train_gpt2_relu2.py").read_text()
    assert "import abc" in text and "# of the loop" in text and "square()" in text
    change(path, "F.gelu(self.up(x)", "F.gelu(self.down(x)")
    assert "`return self.proj(F.gelu(self.up(x)" in run(vary, "gpt2-relu2", "--force")[1]


@pytest.mark.parametrize("old, new, word", [
    ("# question:", "# riddle:", "question"),
    ("--- train_gpt2.py", "--- train_gpt9.py", "train_gpt9.py"),
    ("# what: GPT-2", "# what: \\d GPT-2", "backslash"),
    ("\n-    ", "\n?    ", "no unified diff"),
])  # fmt: skip
def test_a_broken_patch_is_one_line(old, new, word, here, run):
    path = here / "variants/gpt2-relu2.patch"
    path.write_text(path.read_text().replace(old, new))
    status, said = run(vary, "gpt2-relu2")
    assert status == 1 and word in said and said.count("\n") == 1


SAID = ["--what", "GPT-2 with ReLU.", "--question", "Is that worse?", "--paper", "None: a test."]


def test_save_gives_the_same_bytes_back(here, run):
    mine = here / "train_mine.py"
    mine.write_text(mine.read_text().replace("\n", "\r\n"), newline="")
    assert run(vary, "--save", "gpt2-relu", "train_mine.py", *SAID)[0] == 0
    assert run(vary, "gpt2-relu")[0] == 0
    text = (here / "train_gpt2_relu.py").read_bytes()
    assert b"GPT-2 with ReLU." in text and b"\r" not in text
    assert vary.body(text.decode()) == vary.body(mine.read_text())
    patch = (here / "variants/gpt2-relu.patch").read_bytes()
    assert run(vary, "--save", "gpt2-relu", "train_gpt2_relu.py", "--force")[0] == 0  # what is said stays
    assert (here / "variants/gpt2-relu.patch").read_bytes() == patch


def test_an_edited_script_that_isnt_fit_is_not_saved(here, run):
    change(here / "train_gpt2.py", "4 * config.n_embd)", "5 * config.n_embd)", "train_wide.py")
    assert "+11.4%" in run(vary, "--save", "gpt2-wide", "train_wide.py", *SAID)[1]
    change(here / "train_gpt2.py", "self.norm = Norm(config.n_", "self.norm = Norm(config.", "train_bad.py")
    assert "embd" in run(vary, "--save", "gpt2-bad", "train_bad.py", *SAID)[1]
    assert not list((here / "variants").glob("gpt2-[wb]*"))
    assert run(vary, "--save", "gpt2-wide", "train_wide.py", *SAID, "--unequal", "Width is asked.")[0] == 0
    assert vary.read_patch("gpt2-wide").header["parameters"] == "+11.38%"


LINES = st.lists(st.integers(0, 40), max_size=60, unique=True)


@settings(max_examples=100, deadline=None)
@given(LINES, LINES)
def test_a_diff_gives_the_other_text_back(old, new):
    texts = ["".join(f"{line}\n" for line in ("begin", *lines, "end")) for lines in (old, new)]
    lines = difflib.unified_diff(*(text.splitlines() for text in texts), "a", "b", lineterm="")
    hunks = [hunk for file in unidiff.PatchSet("\n".join(lines)) for hunk in file]
    changes = [change for hunk in hunks for change in vary.changes_of(hunk)]
    assert vary.apply(vary.Patch("x", "y", {}, changes), texts[0], "y") == texts[1]
