"""GPT-2 against transformers and plain PyTorch."""
import math

import pytest
import torch
import torch.nn.functional as F
from parity import assert_close

import train_gpt2
from tools import mapping
from train_gpt2 import Config, HeadLoss, Model, head_loss

SMALL = dict(n_layer=3, n_head=4, n_embd=32, vocab_size=300, block_size=24)


def perturbed(config, dtype=torch.float32):
    """A model none of whose parameters is 0 or 1, so that a missing one shows."""
    torch.manual_seed(0)
    model = Model(config).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def transformers_twin(model):
    """transformers' GPT-2 with the same weights, in the same precision."""
    transformers = pytest.importorskip("transformers")
    twin = transformers.GPT2LMHeadModel(mapping.hf_config("gpt2", model.config)).to(model.wte.weight.dtype)
    twin.load_state_dict(mapping.to_hf_gpt2(model.state_dict(), model.config))
    return twin


@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_logits_loss_and_gradients_equal_transformers(dtype, relative):
    model = perturbed(Config(**SMALL), dtype)
    twin = transformers_twin(model)
    idx, targets = torch.randint(300, (2, 3, 24))
    logits, none = model(idx)
    assert none is None
    assert_close(logits, twin(idx).logits, relative, "logits")
    assert_close(model(idx[:, :7])[0], logits[:, :7], 1e-5, "a shorter context")
    _, loss = model(idx, targets)
    reference = F.cross_entropy(twin(idx).logits.flatten(0, 1), targets.flatten())
    assert_close(loss, reference, relative, "loss")
    loss.backward()
    reference.backward()
    gradients = mapping.from_hf_gpt2({name: p.grad for name, p in twin.named_parameters()}, model.config)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], relative, name)


def test_ten_steps_equal_a_plain_loop_over_transformers():
    config = Config(**SMALL, weight_decay=0.1)
    model = perturbed(config)
    twin = transformers_twin(model)
    ours = torch.optim.AdamW(model.optimizer_groups(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    decayed = [p for p in twin.parameters() if p.dim() >= 2]
    others = [p for p in twin.parameters() if p.dim() < 2]
    theirs = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                               lr=1e-3, betas=(0.9, 0.95))  # fmt: skip
    for step in range(10):
        idx, targets = torch.randint(300, (2, 4, 24), generator=torch.Generator().manual_seed(step))
        for net, optimizer, loss in ((model, ours, model(idx, targets)[1]),
                                     (twin, theirs, F.cross_entropy(twin(idx).logits.flatten(0, 1), targets.flatten()))):
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    assert_close(model(idx)[0], twin(idx).logits, 1e-4, "logits after ten steps")


def test_the_real_model_has_the_published_size():
    with torch.device("meta"):
        model = Model.__new__(Model)
        init, Model.init_weights = Model.init_weights, lambda self: None
        try:
            model.__init__(Config())
        finally:
            Model.init_weights = init
    assert sum(p.numel() for p in model.parameters()) == 124_475_904
    assert model.flops_per_token() == pytest.approx(266.0e6, rel=1e-3)


def test_flops_are_what_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = Config(**SMALL)
    model = Model(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the others count differently
        model(torch.zeros(2, 24, dtype=torch.int64))
    attention = config.n_layer * 2 * config.n_embd * config.block_size  # torch counts the masked half too, we don't
    assert counter.get_total_flops() / 48 == model.flops_per_token() + attention


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
            assert p.std().item() == pytest.approx(std, rel=0.03) and abs(p.mean().item()) < std / 20, name
    assert model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))[1].item() < math.log(1000) + 0.5


def test_a_parameter_without_initialisation_is_an_error(monkeypatch):
    block_init = train_gpt2.Block.__init__

    def with_one_more(self, config):
        block_init(self, config)
        self.gate = torch.nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(train_gpt2.Block, "__init__", with_one_more)
    with pytest.raises(NotImplementedError, match="no initialisation for blocks.0.gate"):
        Model(Config(**SMALL))


def test_heads_must_divide_the_width():
    with pytest.raises(SystemExit, match="--n_embd 30 is not a multiple of --n_head 4"):
        Model(Config(n_embd=30, n_head=4))


# ---- the loss


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 1500, 9000])  # around the chunks' edges: 512, then a 16th
def test_chunked_loss_is_the_plain_one(rows):
    torch.manual_seed(0)
    x = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(40, (rows,))
    loss = HeadLoss.apply(x, weight, targets, True)
    ours = torch.autograd.grad(3 * loss, (x, weight))
    plain = F.cross_entropy(x @ weight.T, targets)
    theirs = torch.autograd.grad(3 * plain, (x, weight))
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(x[None], weight, targets[None], "mean"), plain, rtol=1e-12, atol=0)
        each = head_loss(x[None], weight, targets[None], "none")
    torch.testing.assert_close(each.mean(), plain.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_loss_in_sixteen_bits(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(2000, 64), (0.2 * torch.randn(300, 64)).requires_grad_()
    x.requires_grad_()
    targets = torch.randint(300, (2000,))
    with torch.autocast("cpu", dtype):
        loss = HeadLoss.apply(x, weight, targets, True)
    scale = 2.0**12  # the scaler's: without it the gradients of 2,000 rows would vanish in fp16
    ours = torch.autograd.grad(scale * loss, (x, weight))
    theirs = torch.autograd.grad(scale * F.cross_entropy(x @ weight.T, targets), (x, weight))
    for a, b in zip(ours, theirs):
        assert a.dtype == torch.float32 or a.dtype == dtype
        assert (a.float() - b).norm() / b.norm() < 0.02


def test_padding_costs_nothing_and_has_no_loss():
    model = perturbed(Config(**SMALL))
    idx = torch.randint(300, (2, 24))
    targets = torch.full((2, 24), -1)
    targets[0, 5], targets[1, 20] = 7, 8
    losses = model(idx, targets, "none")[1]
    plain = F.cross_entropy(model(idx)[0].transpose(1, 2), targets, ignore_index=-1, reduction="none")
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-6)
    assert (losses != 0).sum() == 2
    assert (model(idx, torch.full((2, 24), -1), "none")[1] == 0).all()
