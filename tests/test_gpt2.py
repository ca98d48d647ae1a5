"""GPT-2 against transformers and plain PyTorch, and the loss that all scripts but RWKV-7's share."""
import math

import pytest
import torch
from helpers import (assert_close, assert_head_loss_is_plain, assert_parity, assert_saves_parameters_alone,
                     perturbed, tokens, transformers_twin)  # fmt: skip
from reference import cross_entropy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt2
from tools.models import count_parameters, make_model
from train_gpt2 import Config, HeadLoss, Model

SMALL = dict(n_layer=3, n_head=4, n_embd=32, vocab_size=300, block_size=24)


@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_logits_loss_and_gradients_equal_transformers(dtype, relative):
    model = perturbed(train_gpt2, **SMALL).to(dtype)
    assert_parity("gpt2", model, *tokens(2, 3, 24), relative)
    assert_saves_parameters_alone(model)


def test_ten_steps_equal_a_plain_loop_over_transformers():
    model = perturbed(train_gpt2, **SMALL, weight_decay=0.1)
    twin = transformers_twin("gpt2", model)
    decayed = [p for p in twin.parameters() if p.dim() >= 2]
    others = [p for p in twin.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    ours = torch.optim.AdamW(model.optimizer_groups(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    theirs = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))

    def take_step(net, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    for step in range(10):
        idx, targets = tokens(2, 4, 24, seed=step)
        take_step(model, ours, model(idx, targets)[1])
        take_step(twin, theirs, cross_entropy(twin(idx).logits, targets))
    assert_close(model(idx)[0], twin(idx).logits, 1e-4, "logits after ten steps")


def test_the_real_model_has_the_published_size():
    total, active = count_parameters(train_gpt2, Config())
    assert total == active == 124_475_904
    assert f"{total:,}" in train_gpt2.__doc__
    assert make_model(train_gpt2, Config()).flops_per_token() == pytest.approx(266.0e6, rel=1e-3)


def test_flops_are_what_torch_counts():
    config = Config(**SMALL)
    model = Model(config)
    # the other kernels are counted differently
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens(2, 24))
    masked = config.n_layer * 2 * config.n_embd * config.block_size  # torch counts the masked half, too
    assert counter.get_total_flops() / 48 == model.flops_per_token() + masked


def test_initial_weights():
    torch.manual_seed(0)
    model = Model(Config(n_layer=8, n_embd=256, n_head=4, vocab_size=1000, block_size=64))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if "proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < std / 20, name
    idx = torch.zeros(1, 8, dtype=torch.int64)
    assert model(idx, idx)[1].item() < math.log(1000) + 0.5


def test_a_parameter_without_initialisation_is_an_error(monkeypatch):
    block_init = train_gpt2.Block.__init__

    def with_one_more(self, config):
        block_init(self, config)
        self.scale = torch.nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(train_gpt2.Block, "__init__", with_one_more)
    with pytest.raises(NotImplementedError, match="no initialisation for blocks.0.scale"):
        Model(Config(**SMALL))


def test_heads_must_divide_the_width():
    with pytest.raises(SystemExit, match="--n_embd 30 is not a multiple of --n_head 4"):
        Model(Config(n_embd=30, n_head=4))


# ---- the loss


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 1500, 9000])  # around the chunks' edges: 512, then a 16th
def test_chunked_loss_is_the_plain_one(rows):
    assert_head_loss_is_plain(train_gpt2, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_loss_in_sixteen_bits(dtype):
    torch.manual_seed(0)
    x = torch.randn(2000, 64, requires_grad=True)
    weight = 0.2 * torch.randn(300, 64)
    weight.requires_grad_()
    targets = torch.randint(300, (2000,))
    with torch.autocast("cpu", dtype):
        loss = HeadLoss.apply(x, weight, targets, True)
    scale = 2.0**12  # the scaler's: without it the gradients of 2,000 rows would vanish in fp16
    ours = torch.autograd.grad(scale * loss, (x, weight))
    theirs = torch.autograd.grad(scale * cross_entropy(x @ weight.T, targets), (x, weight))
    for a, b in zip(ours, theirs):
        assert a.dtype in (torch.float32, dtype)
        assert (a.float() - b).norm() / b.norm() < 0.02


def test_padding_costs_nothing_and_has_no_loss():
    model = perturbed(train_gpt2, **SMALL)
    idx = tokens(2, 24)
    targets = torch.full((2, 24), -1)
    targets[0, 5] = 7
    targets[1, 20] = 8
    _, losses = model(idx, targets, "none")
    logits, _ = model(idx)
    expected = torch.zeros(2, 24)
    expected[0, 5] = cross_entropy(logits[0, 5], torch.tensor(7))
    expected[1, 20] = cross_entropy(logits[1, 20], torch.tensor(8))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert (losses != 0).sum() == 2
    assert (model(idx, torch.full((2, 24), -1), "none")[1] == 0).all()
