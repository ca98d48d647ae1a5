"""RWKV-7 against its recurrence written token by token, its published formulas, and the official inference package."""
import dataclasses
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import train_rwkv
from tools.bench_parts import recurrence_by_token
from tools.mapping_rwkv import to_official
from train_rwkv import CHUNK, Config, Model, Solve, head_loss, recurrence

SMALL = dict(n_layer=3, n_head=2, n_embd=32, n_ffn=88, rank_w=6, rank_a=5, rank_v=4, rank_g=40, vocab_size=300, block_size=40)


def perturbed(config, dtype=torch.float32):
    """A model whose parameters are all far from 0, from 1 and from each other, with decays of all lengths."""
    torch.manual_seed(0)
    model = Model(config).to(dtype)
    for parameter in model.parameters():
        parameter.data += (0.3 if parameter.dim() == 1 else 0.1) * torch.randn_like(parameter)
    return model


def relative_error(ours, theirs):
    return ((ours.double() - theirs).abs().max() / theirs.abs().max()).item()


# ---- the recurrence in chunks against the recurrence


def inputs(kind, T, B=2, H=2, D=16):
    """(r, log_w, k, v, a, b, state) in fp64, as a model makes them. kind is what is hard about them, if anything."""
    torch.manual_seed(T)
    r, key, v, w, rate = torch.randn(5, B, T, H, D, dtype=torch.float64)
    log_w = -math.exp(-0.5) * torch.sigmoid(3 * w - 2)
    if kind == "fastest decay":
        log_w = torch.full_like(log_w, -math.exp(-0.5))
    if kind in ("one key", "four keys"):  # and hardly any decay: every token's correction hits all the earlier ones
        period = 1 if kind == "one key" else 4
        key, log_w, rate = key[:, torch.arange(T) % period], 0.01 * log_w, rate + 4
    rate, kk = torch.sigmoid(rate), F.normalize(key, dim=-1)
    state = torch.randn(B, H, D, D, dtype=torch.float64)
    return r, log_w, key * (1 + (rate - 1) * 1.02), v, -kk, kk * rate, state


def results(function, tensors, seed=1):
    """[y, final state, the gradients with respect to all inputs] under random gradients of both outputs."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*tensors)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, tensors, weights)]


@pytest.mark.parametrize("T", [1, 5, CHUNK, CHUNK + 1, 3 * CHUNK - 7])
@pytest.mark.parametrize("kind", ["typical", "fastest decay", "one key", "four keys"])
def test_chunks_equal_the_recurrence(kind, T):
    tensors = inputs(kind, T)
    exact = results(recurrence_by_token, tensors)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        ours = results(recurrence, [tensor.to(dtype) for tensor in tensors])
        for name, tensor, reference in zip(("y", "state", "dr", "dw", "dk", "dv", "da", "db", "dstate"), ours, exact):
            assert tensor.dtype == dtype and relative_error(tensor, reference) <= limit, (name, dtype)


def test_state_carries_on_where_a_chunk_was_cut():
    *tensors, state = inputs("typical", 75)
    whole, last = recurrence(*tensors, state)
    parts = []
    for start, end in ((0, 1), (1, 2), (2, 41), (41, 75)):
        y, state = recurrence(*(tensor[:, start:end] for tensor in tensors), state)
        parts.append(y)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-13 and relative_error(state, last) < 1e-13


@pytest.mark.parametrize("L", [1, 2, 7, 32])
def test_solve(L):
    torch.manual_seed(0)
    a, y = torch.randn(3, L, L, dtype=torch.float64).tril(-1).requires_grad_(), torch.randn(3, L, 5, dtype=torch.float64)
    y.requires_grad_()
    x = Solve.apply(a, y)
    torch.testing.assert_close(x - a @ x, y)
    if L < 8:
        assert torch.autograd.gradcheck(lambda a, y: Solve.apply(a.tril(-1), y), (a, y))


# ---- the model against a transcription of its equations


def shift(x):
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)


def group_norm(y, weight, bias):
    """Of each head's channels, (B, T, H, D), with the published eps of 64e-5."""
    variance, mean = torch.var_mean(y, -1, keepdim=True, unbiased=False)
    return ((y - mean) / (variance + 64e-5).sqrt()).flatten(2) * weight + bias


def reference_logits(w, idx, config):
    """RWKV-7's logits by its official forward pass, of weights w in the official names, without chunks."""
    B, T = idx.shape
    C, H, D = config.n_embd, config.n_head, config.n_embd // config.n_head

    def norm(x, name):
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    x, v_first = norm(w["emb.weight"][idx], "blocks.0.ln0"), None
    for layer in range(config.n_layer):
        p = {name.removeprefix(f"blocks.{layer}.att."): tensor for name, tensor in w.items() if f"blocks.{layer}.att." in name}
        h = norm(x, f"blocks.{layer}.ln1")
        xx = shift(h) - h
        xr, xw, xk, xv, xa, xg = (h + xx * p[f"x_{letter}"] for letter in "rwkvag")
        r, k, v = xr @ p["receptance.weight"].T, xk @ p["key.weight"].T, xv @ p["value.weight"].T
        soft = -F.softplus(-(p["w0"] + torch.tanh(xw @ p["w1"]) @ p["w2"])) - 0.5
        if layer == 0:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(p["v0"] + xv @ p["v1"] @ p["v2"])
        a = torch.sigmoid(p["a0"] + xa @ p["a1"] @ p["a2"])
        g = torch.sigmoid(xg @ p["g1"]) @ p["g2"]
        kk = F.normalize((k * p["k_k"]).view(B, T, H, D), dim=-1).view(B, T, C)
        k = k * (1 + (a - 1) * p["k_a"])
        r, log_w, k, v4, minus, b = (t.view(B, T, H, D) for t in (r, -soft.exp(), k, v, -kk, kk * a))
        y, _ = recurrence_by_token(r, log_w, k, v4, minus, b, torch.zeros(B, H, D, D, dtype=x.dtype))
        y = group_norm(y, p["ln_x.weight"], p["ln_x.bias"]) + ((r * k * p["r_k"]).sum(-1, keepdim=True) * v4).flatten(2)
        x = x + (y * g) @ p["output.weight"].T
        h = norm(x, f"blocks.{layer}.ln2")
        k = h + (shift(h) - h) * w[f"blocks.{layer}.ffn.x_k"]
        x = x + torch.relu(k @ w[f"blocks.{layer}.ffn.key.weight"].T) ** 2 @ w[f"blocks.{layer}.ffn.value.weight"].T
    return norm(x, "ln_out") @ w["head.weight"].T


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_logits_loss_and_gradients_equal_the_naive_model(dtype, limit):
    config = Config(**SMALL)
    exact, model = perturbed(config, torch.float64), perturbed(config, torch.float64).to(dtype)
    idx, targets = torch.randint(300, (2, 3, 75))
    parameters = dict(exact.named_parameters())
    logits = reference_logits(to_official(parameters, config), idx, config)
    assert relative_error(model(idx)[0], logits) < limit
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    penalty = 0.5e-4 * logits.max(-1).values.square().mean()  # whose gradient is L2Wrap's
    (loss + penalty).backward()
    ours = model(idx, targets)[1]
    ours.backward()
    assert relative_error(ours, loss) < limit
    assert all(parameter.grad is not None for parameter in parameters.values())
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, parameters[name].grad) < limit, name


OFFICIAL = """
import sys, torch
from rwkv.model import RWKV
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
tokens = torch.load(sys.argv[2]).tolist()
logits, state = model.forward(tokens[:-1], None, full_output=True)
last, state = model.forward(tokens[-1], state)
torch.save({"logits": torch.cat((logits, last[None])), "state": state}, sys.argv[2])
"""


@pytest.mark.skipif(importlib.util.find_spec("rwkv") is None, reason="needs the official package: pip install rwkv")
def test_official_package_gives_the_same_logits_and_state(tmp_path):
    config = Config(**SMALL)
    model, tokens = perturbed(config), torch.randint(300, (75,))
    torch.save(to_official(model.state_dict(), config), tmp_path / "model.pth")
    torch.save(tokens, tmp_path / "io.pt")
    flags = {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}  # it reads them when imported
    command = [sys.executable, "-c", OFFICIAL, str(tmp_path / "model"), str(tmp_path / "io.pt")]
    result = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    theirs = torch.load(tmp_path / "io.pt")
    with torch.no_grad():
        logits, (_, state) = model(tokens[None])[0][0], model.trunk(tokens[None])
    assert relative_error(logits, theirs["logits"].double()) < 1e-5
    for layer, (last1, matrices, last2) in enumerate(state):
        for ours, its in zip((last1[0, 0], matrices[0].mT, last2[0, 0]), theirs["state"][3 * layer : 3 * layer + 3]):
            assert relative_error(ours, its.double()) < 1e-5


def test_official_names_and_shapes():
    config = Config(**SMALL)
    model = perturbed(config)
    official, C, V, F_ = to_official(model.state_dict(), config), 32, 300, 88
    expected = {"emb.weight": (V, C), "head.weight": (V, C), "ln_out.weight": (C,), "ln_out.bias": (C,),
                "blocks.0.ln0.weight": (C,), "blocks.0.ln0.bias": (C,)}  # fmt: skip
    for i in range(3):
        for name in ("ln1", "ln2", "att.ln_x"):
            expected |= {f"blocks.{i}.{name}.weight": (C,), f"blocks.{i}.{name}.bias": (C,)}
        for name in "x_r x_w x_k x_v x_a x_g w0 a0 v0 k_k k_a".split():
            expected[f"blocks.{i}.att.{name}"] = (1, 1, C)
        for name, rank in (("w", 6), ("a", 5), ("v", 4), ("g", 40)):
            expected |= {f"blocks.{i}.att.{name}1": (C, rank), f"blocks.{i}.att.{name}2": (rank, C)}
        for name in ("receptance", "key", "value", "output"):
            expected[f"blocks.{i}.att.{name}.weight"] = (C, C)
        expected |= {f"blocks.{i}.att.r_k": (2, 16), f"blocks.{i}.ffn.x_k": (1, 1, C),
                     f"blocks.{i}.ffn.key.weight": (F_, C), f"blocks.{i}.ffn.value.weight": (C, F_)}  # fmt: skip
    assert {name: tuple(tensor.shape) for name, tensor in official.items()} == expected
    assert len({tensor.data_ptr() for tensor in official.values()}) == len(official)


# ---- size, initialisation, optimizer


def test_parameter_count_and_the_matrices_that_the_first_layer_lacks():
    with torch.device("meta"):
        model = Model(Config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_286_208
    names = {name for name, _ in model.named_parameters()}
    for leaf in ("v0", "v1", "v2"):
        assert f"blocks.0.attention.{leaf}" not in names and f"blocks.1.attention.{leaf}" in names


def is_orthogonal(matrix, gain):
    """Whether rows or columns, whichever are fewer, are orthogonal, with norm gain."""
    product = (matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix).double()
    return torch.allclose(product, gain**2 * torch.eye(len(product), dtype=torch.float64), atol=1e-5 * gain**2)


def test_initial_weights_by_the_published_formulas():
    config = Config(**SMALL)
    torch.manual_seed(0)
    model = Model(config)
    weights, C, N = to_official(model.state_dict(), config), 32, 16
    for layer in range(3):
        ratio_0_to_1, ratio_1_to_almost0 = layer / 2, 1 - layer / 3
        expected = {name: [] for name in "x_r x_w x_k x_v x_a x_g w0 a0 v0 k_k k_a ffn".split()}
        for n in range(C):
            linear = n / (C - 1) - 0.5
            zigzag = ((n % N) - (N - 1) / 2) / ((N - 1) / 2)
            zigzag = zigzag * abs(zigzag)
            www = -6 + 6 * (n / (C - 1)) ** (1 + 1 * ratio_0_to_1**0.3)
            for letter, power in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
                expected[f"x_{letter}"].append(1 - (n / C) ** (power * ratio_1_to_almost0))
            expected["w0"].append(www + 0.5 + zigzag * 2.5)
            expected["a0"].append(-0.19 + zigzag * 0.3 + linear * 0.4)
            expected["v0"].append(0.73 - linear * 0.4)
            expected["k_k"].append(0.71 - linear * 0.1)
            expected["k_a"].append(1.02)
            expected["ffn"].append(1 - (n / C) ** ratio_1_to_almost0**4)
        block = f"blocks.{layer}."
        for name, values in expected.items():
            if name != "v0" or layer > 0:
                tensor = weights[block + ("ffn.x_k" if name == "ffn" else f"att.{name}")].flatten()
                assert torch.allclose(tensor, torch.tensor(values), atol=1e-6), name
        for name in ("att.receptance", "att.value", "ffn.key"):
            assert is_orthogonal(weights[f"{block}{name}.weight"], 1.0), name
        assert is_orthogonal(weights[f"{block}att.key.weight"], 0.1)
        assert is_orthogonal(weights[f"{block}att.w2"], 0.1) and is_orthogonal(weights[f"{block}att.a2"], 0.1)
        assert is_orthogonal(weights[f"{block}att.g2"], 0.1 * math.sqrt(40 / 32))  # more rows than columns
        assert layer == 0 or is_orthogonal(weights[f"{block}att.v2"], 0.1)
        for name in ("att.output.weight", "ffn.value.weight", "att.w1", "att.a1", "att.v1", "att.g1", "att.ln_x.bias"):
            assert not weights[block + name].any(), name
        assert (weights[f"{block}att.r_k"] == -0.04).all()
        assert torch.allclose(weights[f"{block}att.ln_x.weight"], torch.tensor(((1 + layer) / 3) ** 0.7))
    assert is_orthogonal(model.wte.weight, 0.5 * math.sqrt(300 / 32))  # as the head, which it also is
    for name, weight in weights.items():
        if ".ln" in name and "ln_x" not in name or name.startswith("ln_out"):
            assert (weight == (1.0 if name.endswith("weight") else 0.0)).all(), name


def test_unknown_parameter_has_no_initialisation(monkeypatch):
    class Scaled(train_rwkv.MLP):
        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(1))

    monkeypatch.setattr(train_rwkv, "MLP", Scaled)
    with pytest.raises(NotImplementedError, match="blocks.0.mlp.scale"):
        Model(Config(**SMALL))


def test_optimizer_groups():
    model = Model(Config(**SMALL, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {(g["weight_decay"], g["lr_scale"]): {names[id(p)] for p in g["params"]} for g in model.optimizer_groups()}
    matrices = ["attention.receptance", "attention.key", "attention.value", "attention.output", "mlp.key", "mlp.value"]
    decayed = {"wte.weight"} | {f"blocks.{i}.{name}.weight" for i in range(3) for name in matrices}
    fast = {f"blocks.{i}.attention.w0" for i in range(3)}
    assert groups == {(0.1, 1.0): decayed, (0.0, 2.0): fast, (0.0, 1.0): set(names.values()) - decayed - fast}


def test_first_steps_with_the_recipes_tiny_eps_are_finite():
    """Half of the gradients are exactly 0 at first, behind matrices of zeros, and 0 / (0 + eps) must be 0."""
    config = Config(**{**SMALL, **train_rwkv.RECIPE})
    torch.manual_seed(0)
    model, idx, targets = Model(config), torch.randint(300, (2, 9)), torch.randint(300, (2, 9))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.optimizer_groups(), lr=8e-4, betas=(0.9, 0.99), eps=config.adam_eps, fused=True)
    for step in range(3):
        optimizer.zero_grad()
        model(idx, targets)[1].backward()
        if step == 0:
            assert not model.blocks[0].attention.w1.grad.any()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter - before[name]).abs().max() < 3 * 2.1 * 8e-4, name  # never true of nan
    assert config.adam_eps == 1e-18 and config.beta2 == 0.99


# ---- loss, decoding, numbers


@pytest.mark.parametrize("N, V", [(7, 5), (700, 40)])
def test_l2wrap_is_in_the_gradient_and_not_in_the_value(N, V):
    torch.manual_seed(0)
    x, weight = torch.randn(1, N, 8, dtype=torch.float64), 3 * torch.randn(V, 8, dtype=torch.float64)
    targets = torch.randint(V, (1, N))
    x.requires_grad_(), weight.requires_grad_()
    loss = head_loss(x, weight, targets, "mean")
    ours = torch.autograd.grad(loss, (x, weight))
    logits = x[0] @ weight.T
    plain = F.cross_entropy(logits, targets[0])
    theirs = torch.autograd.grad(plain + 0.5 * 1e-4 * logits.max(-1).values.square().sum() / N, (x, weight), retain_graph=True)
    without = torch.autograd.grad(plain, (x, weight))
    torch.testing.assert_close(loss, plain)
    for a, b, c in zip(ours, theirs, without):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
        assert (a - c).abs().max() > 1e-7


def test_decode_equals_forward_beyond_block_size_with_a_state_of_constant_size():
    config = Config(**SMALL)
    model = perturbed(config).eval()
    idx = torch.randint(300, (2, 2 * config.block_size + 9))
    sizes = set()
    with torch.no_grad():
        whole = model(idx)[0]
        for prompt in (1, 33, config.block_size + 21):
            state = None
            for n in range(prompt, idx.shape[1] + 1, 1):
                logits, state = model.decode(idx[:, :n], state)
                assert relative_error(logits, whole[:, n - 1].double()) < 1e-5, n
                sizes.add(tuple(tuple(tensor.shape) for parts in state for tensor in parts))
    assert sizes == {((2, 1, 32), (2, 2, 16, 16), (2, 1, 32)) * 3}


def test_states_are_fp32_under_autocast_and_fp64_in_double(monkeypatch):
    seen = []

    def spy(*tensors):
        y, state = recurrence(*tensors)
        seen.extend((*(tensor.dtype for tensor in tensors), y.dtype, state.dtype, (y @ y.mT).dtype))
        return y, state

    monkeypatch.setattr(train_rwkv, "recurrence", spy)
    idx = torch.randint(300, (1, 9))
    model = perturbed(Config(**SMALL))
    exact = model(idx)[0]
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(idx)[0]
        model.decode(idx, model.decode(idx)[1])
    assert set(seen) == {torch.float32} and logits.dtype == torch.bfloat16
    assert relative_error(logits, exact.double()) < 0.05
    seen.clear()
    model.double()(idx)
    assert set(seen) == {torch.float64}


def test_flops_per_token_against_a_count_of_the_products():
    """The counter sees all of each product; the formula leaves out the masked half of maps and of the inverse."""
    from torch.utils.flop_counter import FlopCounterMode

    config = dataclasses.replace(Config(**SMALL), n_embd=64, n_head=2)
    model, T, L, D = Model(config), 4 * CHUNK, CHUNK, 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(300, (1, T)))
    masked = 5 * L * D + 2 * (int(math.log2(L)) - 1) * L**2 - L**2 / 3
    counted = counter.get_total_flops() / T - 2 * config.n_layer * config.n_head * masked
    assert model.flops_per_token() == pytest.approx(counted, rel=1e-6)
