"""GPT-2 against transformers and plain PyTorch, and the training step that all scripts share."""
import contextlib

import pytest
import torch
from helpers import assert_close, assert_parity, perturbed, tokens, transformers_twin
from reference import cross_entropy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt2
from train_gpt2 import Config, Model

SMALL = dict(n_layer=3, n_head=4, n_embd=32, vocab_size=300, block_size=24)


@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_logits_loss_and_gradients_equal_transformers(dtype, relative):
    model = perturbed(train_gpt2, **SMALL).to(dtype)
    assert_parity("gpt2", model, *tokens(2, 3, 24), relative)


@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_ten_training_steps_equal_a_plain_loop_over_transformers(micro_batch):
    settings = dict(weight_decay=0.1, warmup_steps=3, max_steps=10, max_lr=1e-3, min_lr=1e-4)
    model = perturbed(train_gpt2, **SMALL, **settings)
    twin = transformers_twin("gpt2", model)
    decayed = [p for p in twin.parameters() if p.dim() >= 2]
    others = [p for p in twin.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    ours = torch.optim.AdamW(model.optimizer_groups(), betas=(0.9, 0.95), fused=True)
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(10):
        batch = tokens(4, 25, seed=step)
        where = (step, batch, micro_batch, contextlib.nullcontext())
        loss, norm, figures = train_gpt2.train_step(model, model, ours, scaler, *where)
        theirs.zero_grad()
        reference = cross_entropy(twin(batch[:, :-1]).logits, batch[:, 1:])
        reference.backward()
        their_norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for group in theirs.param_groups:
            group["lr"] = train_gpt2.get_lr(model.config, step)
        theirs.step()
        assert loss == pytest.approx(reference.item(), rel=1e-4)
        assert norm == pytest.approx(their_norm.item(), rel=1e-3)
        assert model.step == step and figures == {}
    idx = batch[:, :-1]
    assert_close(model(idx)[0], twin(idx).logits, 1e-4, "logits after ten steps")


def test_flops_are_what_torch_counts():
    config = Config(**SMALL)
    model = Model(config)
    # the other kernels are counted differently
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens(2, 24))
    masked = config.n_layer * 2 * config.n_embd * config.block_size  # torch counts the masked half, too
    assert counter.get_total_flops() / 48 == model.flops_per_token() + masked


def test_learning_rate():
    config = Config()
    assert train_gpt2.get_lr(config, 0) == pytest.approx(6e-4 / 715)
    assert train_gpt2.get_lr(config, 714) == train_gpt2.get_lr(config, 715) == pytest.approx(6e-4)
    assert train_gpt2.get_lr(config, (715 + 19_073) // 2) == pytest.approx(3.3e-4, rel=1e-3)
    assert train_gpt2.get_lr(config, 19_073) == train_gpt2.get_lr(config, 20_000) == pytest.approx(6e-5)
