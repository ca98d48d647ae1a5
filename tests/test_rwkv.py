"""RWKV-7 against its recurrence token by token, its authors' formulas, and their package for inference."""
import dataclasses
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers import assert_all_close, assert_close, gradients, perturbed, tokens
from reference import cross_entropy, recurrence_by_token, rwkv_logits
from torch.utils.flop_counter import FlopCounterMode

import train_rwkv
from tools.export.weights import to_official_rwkv
from train_rwkv import CHUNK, Config, Model, recurrence

SMALL = dict(
    n_layer=3, n_head=2, n_embd=32, n_inner=88, rank_w=6, rank_a=5, rank_v=4, rank_g=40,
    vocab_size=300, block_size=40,
)  # fmt: skip


def make(**fields):
    """A perturbed model, with decays of all lengths."""
    return perturbed(train_rwkv, std=0.1, **SMALL | fields)


# ---- the recurrence in chunks


def inputs(kind, T, B=2, H=2, D=16):
    """{name: tensor} of the recurrence's inputs in fp64, as a model makes them; kind says what is hard."""
    torch.manual_seed(T)
    r, key, v, w, rate = torch.randn(5, B, T, H, D, dtype=torch.float64)
    log_w = -math.exp(-0.5) * torch.sigmoid(3 * w - 2)
    if kind == "fastest decay":
        log_w = torch.full_like(log_w, -math.exp(-0.5))
    if kind in ("one key", "four keys"):
        # and hardly any decay: every token's correction hits all the earlier ones
        period = 1 if kind == "one key" else 4
        key = key[:, torch.arange(T) % period]
        log_w = 0.01 * log_w
        rate = rate + 4
    rate = torch.sigmoid(rate)
    removed = F.normalize(key, dim=-1)
    key = key * (1 + (rate - 1) * 1.02)
    state = torch.randn(B, H, D, D, dtype=torch.float64)
    return dict(r=r, log_w=log_w, k=key, v=v, a=-removed, b=removed * rate, state=state)


def results(function, tensors):
    """{name: tensor} of both outputs and of all gradients, under random gradients of both."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = function(**tensors)
    generator = torch.Generator().manual_seed(1)
    upstream = []
    for output in outputs:
        random = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        upstream.append(random.to(output.dtype))
    found = torch.autograd.grad(outputs, list(tensors.values()), upstream)
    found = {f"d{name}": gradient for name, gradient in zip(tensors, found)}
    return {"y": outputs[0], "last state": outputs[1]} | found


@pytest.mark.parametrize("T", [1, 5, CHUNK, CHUNK + 1, 3 * CHUNK - 7])
@pytest.mark.parametrize("kind", ["typical", "fastest decay", "one key", "four keys"])
def test_chunks_equal_the_recurrence(kind, T):
    exact = results(recurrence_by_token, inputs(kind, T))
    for dtype, relative in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        rounded = {name: tensor.to(dtype) for name, tensor in inputs(kind, T).items()}
        ours = results(recurrence, rounded)
        assert all(tensor.dtype == dtype for tensor in ours.values())
        assert_all_close(ours, exact, relative)


INTERPRETED = """
import builtins, functools, sys
import numpy as np
import torch
import triton.language as tl
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import TensorHandle
from fla.ops.generalized_delta_rule.dplr import chunk_A_bwd, chunk_A_fwd, chunk_h_bwd, chunk_h_fwd
import test_rwkv
import train_rwkv

Autotuner._bench = lambda self, *args, **kwargs: 0.0  # there is no device to time configurations on
Autotuner.check_disk_cache = lambda self, key, configs, choose: choose()


def counters(*bounds):  # the interpreter would hand the kernels ints, which have no .to
    values = [bound.handle.data.item() if isinstance(bound, tl.tensor) else int(bound) for bound in bounds]
    for i in builtins.range(*values):
        yield tl.tensor(TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32)


chunk_h_fwd.range = chunk_h_bwd.range = counters
chunk_A_fwd.IS_GATHER_SUPPORTED = chunk_A_bwd.IS_GATHER_SUPPORTED = False  # nor can it gather
recurrence = functools.partial(train_rwkv.fla_recurrence, dtype=torch.float16)
inputs = test_rwkv.inputs(sys.argv[2], 100, B=1)
torch.save(test_rwkv.results(recurrence, {name: x.float() for name, x in inputs.items()}), sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs `pip install fla-core triton`")
@pytest.mark.parametrize("kind", ["typical", "one key"])
def test_flas_kernel_is_the_recurrence(tmp_path, kind):
    """Read by Triton's interpreter, in fp16, since it can't do its bf16: both directions over two chunks."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERPRETED, str(tmp_path / "found.pt"), kind]
    result = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    exact = results(recurrence_by_token, inputs(kind, 100, B=1))
    assert_all_close(torch.load(tmp_path / "found.pt"), exact, 4e-3)


def test_a_package_that_cant_be_imported_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla/__init__.py").write_text("import what_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fla", raising=False)
    assert not train_rwkv.can_fla()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="what_is_missing.* --kernel torch"):
        make()
    make(kernel="torch")


def test_flas_kernel_is_taken_in_16_bits_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(train_rwkv, "can_fla", lambda: True)
    monkeypatch.setattr(train_rwkv, "fla_recurrence", None)  # would fail if asked for
    model, idx = make(), tokens(1, 9)
    with torch.autocast("cpu", torch.bfloat16):
        model(idx)
    asked = []

    def kernel(r, log_w, k, v, a, b, state, dtype):
        asked.append(dtype)
        return v, state

    monkeypatch.setattr(train_rwkv, "fla_recurrence", kernel)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    model(idx)
    with torch.autocast("cpu", torch.bfloat16):
        model(idx)
    assert asked == [torch.bfloat16] * 3
    make(kernel="torch")(idx)


# ---- the model


@pytest.mark.parametrize("dtype, relative", [(torch.float64, 1e-11), (torch.float32, 3e-5)])
def test_logits_loss_and_gradients_equal_the_naive_model(dtype, relative):
    model = make()
    idx, targets = tokens(2, 3, 75)
    w = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    logits = rwkv_logits(to_official_rwkv(w, model.config), idx, n_layer=3, n_head=2)
    reference = cross_entropy(logits, targets, l2wrap=True)
    reference.backward()
    model.to(dtype)
    assert_close(model(idx)[0], logits, relative, "logits")
    _, loss = model(idx, targets)
    assert_close(loss, reference, relative, "loss")
    assert_all_close(gradients(model, loss), {name: tensor.grad for name, tensor in w.items()}, relative)


OFFICIAL = """
import sys, torch
from rwkv.model import RWKV
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
tokens = torch.load(sys.argv[2]).tolist()
logits, state = model.forward(tokens[:-1], None, full_output=True)
last, state = model.forward(tokens[-1], state)
torch.save({"logits": torch.cat((logits, last[None])), "state": state}, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("rwkv") is None, reason="needs `pip install rwkv`")
def test_official_package_gives_the_same_logits_and_state(tmp_path):
    model = make()
    idx = tokens(1, 75)
    torch.save(to_official_rwkv(model.state_dict(), model.config), tmp_path / "model.pth")
    torch.save(idx[0], tmp_path / "io.pt")
    flags = {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}  # it reads them when imported
    command = [sys.executable, "-c", OFFICIAL, str(tmp_path / "model"), str(tmp_path / "io.pt")]
    result = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    theirs = torch.load(tmp_path / "io.pt")
    with torch.no_grad():
        logits, _ = model(idx)
        _, state = model.trunk(idx)
    assert_close(logits[0], theirs["logits"])
    for layer, (last1, heads, last2) in enumerate(state):
        their_last1, their_heads, their_last2 = theirs["state"][3 * layer : 3 * layer + 3]
        assert_close(last1[0, 0], their_last1)
        assert_close(heads[0].mT, their_heads)  # our keys are rows
        assert_close(last2[0, 0], their_last2)


# ---- size, initialisation, optimizer


def assert_orthogonal(matrix, gain):
    """Rows or columns, whichever are fewer, are orthogonal and have norm gain."""
    if len(matrix) > matrix.shape[1]:
        matrix = matrix.T
    product = (matrix @ matrix.T).double()
    eye = torch.eye(len(product), dtype=torch.float64)
    torch.testing.assert_close(product, gain**2 * eye, rtol=0, atol=1e-5 * gain**2)


MIXES = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}


def published_vectors(layer, n_layer, C, D):
    """{official name: values} of a layer, as RWKV-LM computes them (train_temp/src/model.py)."""
    ratio_0_to_1 = layer / (n_layer - 1)
    ratio_1_to_almost0 = 1 - layer / n_layer
    names = [f"att.x_{letter}" for letter in MIXES]
    names += ["att.w0", "att.a0", "att.v0", "att.k_k", "att.k_a", "ffn.x_k"]
    vectors = {name: [] for name in names}
    for n in range(C):
        linear = n / (C - 1) - 0.5
        zigzag = ((n % D) - (D - 1) / 2) / ((D - 1) / 2)
        zigzag = zigzag * abs(zigzag)
        www = -6 + 6 * (n / (C - 1)) ** (1 + 1 * ratio_0_to_1**0.3)
        for letter, power in MIXES.items():
            vectors[f"att.x_{letter}"].append(1 - (n / C) ** (power * ratio_1_to_almost0))
        vectors["att.w0"].append(www + 0.5 + zigzag * 2.5)
        vectors["att.a0"].append(-0.19 + zigzag * 0.3 + linear * 0.4)
        vectors["att.v0"].append(0.73 - linear * 0.4)
        vectors["att.k_k"].append(0.71 - linear * 0.1)
        vectors["att.k_a"].append(1.02)
        vectors["ffn.x_k"].append(1 - (n / C) ** ratio_1_to_almost0**4)
    if layer == 0:
        vectors["att.v0"] = [0.0] * C  # nothing uses it
    return vectors


def test_initial_weights_by_the_published_formulas():
    config = Config(**SMALL)
    torch.manual_seed(0)
    model = Model(config)
    weights = to_official_rwkv(model.state_dict(), config)
    for layer in range(3):
        block = f"blocks.{layer}."
        for name, values in published_vectors(layer, n_layer=3, C=32, D=16).items():
            ours = weights[block + name].flatten()
            torch.testing.assert_close(ours, torch.tensor(values), rtol=0, atol=1e-6)
        for name in ("att.receptance", "att.value", "ffn.key"):
            assert_orthogonal(weights[f"{block}{name}.weight"], 1.0)
        assert_orthogonal(weights[f"{block}att.key.weight"], 0.1)
        assert_orthogonal(weights[f"{block}att.w2"], 0.1)
        assert_orthogonal(weights[f"{block}att.a2"], 0.1)
        assert_orthogonal(weights[f"{block}att.g2"], 0.1 * math.sqrt(40 / 32))  # more rows than columns
        if layer > 0:
            assert_orthogonal(weights[f"{block}att.v2"], 0.1)
        zeros = "att.output.weight ffn.value.weight att.w1 att.a1 att.v1 att.g1 att.ln_x.bias".split()
        for name in zeros:
            assert not weights[block + name].any(), name
        assert (weights[f"{block}att.r_k"] == -0.04).all()
        gain = torch.full((32,), ((1 + layer) / 3) ** 0.7)
        torch.testing.assert_close(weights[f"{block}att.ln_x.weight"], gain)
    assert_orthogonal(model.wte.weight, 0.5 * math.sqrt(300 / 32))  # as the head, which it also is
    norms = [name for name in weights if ".ln" in name or name.startswith("ln_out")]
    for name in norms:
        if "ln_x" not in name:
            expected = 1.0 if name.endswith("weight") else 0.0
            assert (weights[name] == expected).all(), name


def test_optimizer_groups():
    model = Model(Config(**SMALL, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {}
    for group in model.optimizer_groups():
        key = group["weight_decay"], group.get("lr_scale", 1.0)
        groups[key] = {names[id(parameter)] for parameter in group["params"]}
    matrices = [f"attention.{name}" for name in ("receptance", "key", "value", "proj")]
    matrices += ["mlp.up", "mlp.proj"]
    decayed = {f"blocks.{i}.{name}.weight" for i in range(3) for name in matrices} | {"wte.weight"}
    fast = {f"blocks.{i}.attention.w0" for i in range(3)}
    rest = set(names.values()) - decayed - fast
    assert groups == {(0.1, 1.0): decayed, (0.0, 2.0): fast, (0.0, 1.0): rest}


# ---- loss, decoding, numbers


def test_decode_equals_forward_beyond_block_size_with_a_state_of_constant_size():
    model = make().eval()
    idx = tokens(2, 2 * 40 + 9)
    sizes = set()
    with torch.no_grad():
        whole, _ = model(idx)
        for prompt in (1, 40 + 21):
            state = None
            for n in range(prompt, idx.shape[1] + 1):
                logits, state = model.decode(idx[:, :n], state)
                assert_close(logits, whole[:, n - 1], what=f"{n} tokens")
                sizes.add(tuple(tuple(tensor.shape) for block in state for tensor in block))
    assert sizes == {((2, 1, 32), (2, 2, 16, 16), (2, 1, 32)) * 3}


def test_states_are_fp32_under_autocast_and_fp64_in_double(monkeypatch):
    seen = set()

    def spy(*tensors):
        y, state = recurrence(*tensors)
        product = y @ y.mT  # would be bf16 if autocast were on
        seen.update(tensor.dtype for tensor in (*tensors, y, state, product))
        return y, state

    monkeypatch.setattr(train_rwkv, "recurrence", spy)
    idx = tokens(1, 9)
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        model(idx)
        _, state = model.decode(idx)
        model.decode(idx, state)
    assert seen == {torch.float32}
    seen.clear()
    model.double()(idx)
    assert seen == {torch.float64}


def test_flops_per_token_against_a_count_of_the_products():
    """The counter sees all of each product; the formula leaves out what masks of maps and inverse hide."""
    config = dataclasses.replace(Config(**SMALL), n_embd=64, n_head=2)
    model = Model(config)
    L = CHUNK
    D = 32
    T = 4 * L
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(1, T))
    masked = 4.5 * L * D + 2 * (int(math.log2(L)) - 1) * L**2 - L**2 / 3
    counted = counter.get_total_flops() / T - 2 * config.n_layer * config.n_head * masked
    assert model.flops_per_token() == pytest.approx(counted, rel=1e-6)
