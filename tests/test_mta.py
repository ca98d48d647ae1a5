"""MTA against the released code's steps: all maps at once, in fp64."""
import math

import pytest
import torch
from helpers import assert_all_close, assert_close, gradients, in_full, joined, perturbed, tokens
from reference import cross_entropy, mta_logits

import train_mta
from tools.export.weights import interleaved
from train_mta import Attention, Config, Model

SMALL = dict(  # block 1 convolves
    n_layer=2, n_head=3, n_embd=24, n_inner=40, conv_every=2, vocab_size=300, block_size=150,
)  # fmt: skip


def make(**fields):
    """A perturbed model. Its matrices are large from the start."""
    return perturbed(train_mta, std=0.05, **SMALL | fields)


def released(w, config):
    """Weights {name: tensor} with the rows of q and k in the order of the released code's rotary channels."""
    size = config.n_embd // config.n_head
    heads = size * torch.arange(config.n_head)[:, None]
    rows = (heads + interleaved(size)).flatten()
    rotary = [name for name in w if name.endswith(("attention.q.weight", "attention.k.weight"))]
    return w | {name: w[name][rows] for name in rotary}


WIDE = dict(n_layer=1, conv_every=1, conv_queries=3, conv_keys=21, rope_theta=100.0)


@pytest.mark.parametrize("dtype, relative", [(torch.float32, 3e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows, length, fields", [
    (256, 60, {}), (256, 3, {}), (16, 48, {}), (16, 41, WIDE),  # one block of rows, several, and a rest
    (16, 33, {"conv_queries": 1, "conv_keys": 17}), (16, 20, {"conv_queries": 4, "conv_keys": 1}),
])  # fmt: skip
def test_everything_equals_the_released_steps(dtype, relative, rows, length, fields, monkeypatch):
    monkeypatch.setattr(Attention, "rows", rows)
    model = make(**fields)
    config = model.config
    idx, targets = tokens(2, 2, length)
    w = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    assert sum("conv" in name for name in w) == 2
    theirs = mta_logits(released(w, config), idx, config.n_layer, config.n_head, config.rope_theta)
    reference = cross_entropy(theirs, targets)
    reference.backward()
    model.to(dtype)
    assert_close(model(idx)[0], theirs, relative, "logits")
    _, loss = model(idx, targets)
    assert_close(loss, reference, relative, "loss")
    ours = gradients(model, loss)
    theirs = {name: tensor.grad for name, tensor in w.items()}
    assert_all_close(joined(ours), joined(theirs), relative)


# ---- number formats and compilation


@pytest.mark.slow
def test_several_blocks_of_rows_compile_to_one_graph(monkeypatch):
    monkeypatch.setattr(Attention, "rows", 16)
    model = make(n_layer=1, conv_every=1)
    idx, targets = tokens(2, 2, 41)
    plain = gradients(model, model(idx, targets)[1])
    torch.compiler.reset()
    net = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    assert_all_close(joined(gradients(model, net(idx, targets)[1])), joined(plain))


# ---- sizes and initial weights


def test_the_blocks_that_convolve():
    for n, block in enumerate(in_full(train_mta).blocks):
        assert (block.attention.conv_before is not None) == (n in (2, 6, 10))
        assert (block.attention.conv_after is not None) == (n in (2, 6, 10))


def test_initial_weights():
    torch.manual_seed(0)
    model = Model(Config(n_layer=4, n_embd=256, n_head=4, n_inner=704, vocab_size=1000, block_size=64))
    for name, p in model.named_parameters():
        if name.endswith("gate.bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif "mix" in name:
            assert torch.equal(p, torch.eye(4)), name
        elif "conv" in name:
            assert p.sum() == 4, name
            assert (p[:, 5, 5] == 1).all(), name
        else:
            std = (704 if name.endswith("mlp.proj.weight") else 256) ** -0.5
            assert p.abs().max() <= 3 * std, name
            if p.numel() > 1000:  # cut off at 3 sigma, 0.987 of it is left
                assert p.std().item() == pytest.approx(0.987 * std, rel=0.02), name
            else:
                assert p.std().item() == pytest.approx(std, rel=0.25), name
    idx, targets = tokens(2, 2, 64, vocab_size=1000)
    _, loss = model(idx, targets)
    assert loss.item() == pytest.approx(math.log(1000) + 0.5, abs=0.2)  # logits of variance 1
