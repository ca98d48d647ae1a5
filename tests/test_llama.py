"""LLaMA against transformers, and what transformers doesn't test."""
import math

import pytest
import torch
from parity import (assert_close, assert_names_go_there_and_back, assert_parity,
                    assert_recomputing_pays, perturbed, real_size)  # fmt: skip

import train_llama
from train_llama import Config, Model, Norm

SMALL = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, vocab_size=300, block_size=24)


@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1, "rope_theta": 100.0}, {"n_kv_head": 4}])
def test_logits_loss_and_gradients_equal_transformers(fields):
    model = perturbed(train_llama, **SMALL | fields)
    idx, targets = torch.randint(300, (2, 3, 24))
    assert_parity("llama", model, idx, targets)
    assert_close(model(idx[:, :7])[0], model(idx)[0][:, :7], what="a shorter context")


def test_names_go_there_and_back():
    assert_names_go_there_and_back("llama", perturbed(train_llama, **SMALL))


def test_the_real_model_has_transformers_size(monkeypatch):
    ours, theirs, flops = real_size("llama", train_llama, monkeypatch)
    assert ours == theirs == 123_587_328
    assert f"{ours:,}" in train_llama.__doc__
    assert flops == pytest.approx(266.0e6, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norm_is_rounded_where_the_reference_does(dtype):
    norms = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    ours, theirs = Norm(Config(n_embd=64)).to(dtype), norms.LlamaRMSNorm(64, eps=1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.normal_()
        ours.weight.copy_(theirs.weight)
    x = (500 * torch.randn(40, 64)).to(dtype)  # its square is too large for fp16
    assert torch.equal(ours(x), theirs(x))
    small = (1e-3 * torch.randn(40, 64)).to(dtype)  # its square is below eps
    assert torch.equal(ours(small), theirs(small))


def test_autocast_and_fp64():
    model = perturbed(train_llama, **SMALL)
    idx = torch.randint(300, (2, 24))
    loss = model(idx, idx)[1].item()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(idx, idx)[1].item() == pytest.approx(loss, abs=0.01)
    exact = model.double()(idx, idx)[1]
    assert exact.dtype == torch.float64 and exact.item() == pytest.approx(loss, rel=1e-6)


def test_recomputing_pays(monkeypatch):
    model = perturbed(train_llama, **SMALL)
    assert_recomputing_pays(train_llama, model, torch.randint(300, (8, 24)), monkeypatch)


def test_initial_weights():
    torch.manual_seed(0)
    model = Model(Config(n_layer=8, n_embd=256, n_head=4, n_kv_head=2, n_inner=300, vocab_size=1000, block_size=64))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if "proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03) and abs(p.mean().item()) < std / 20, name


def test_shapes_that_can_not_be():
    with pytest.raises(SystemExit, match="--n_embd 36 is not a multiple of 2 x --n_head 4"):
        Model(Config(n_embd=36, n_head=4))
    with pytest.raises(SystemExit, match="--n_head 12 is not a multiple of --n_kv_head 5"):
        Model(Config(n_kv_head=5))
