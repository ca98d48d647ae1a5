"""MTA against the released code's steps: all maps at once, in fp64."""
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (assert_all_close, assert_close, assert_saves_parameters_alone, gradients, in_full,
                     joined, perturbed, tokens)  # fmt: skip
from reference import convolve_maps, cross_entropy, mta_logits, rms_norm, rotate_neighbours

import train_mta
from tools.export.weights import interleaved
from train_mta import Attention, Config, Model, convolve, rope_table

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
])  # fmt: skip
def test_everything_equals_the_released_steps(dtype, relative, rows, length, fields, monkeypatch):
    monkeypatch.setattr(Attention, "rows", rows)
    model = make(**fields)
    assert_saves_parameters_alone(model)
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


@pytest.mark.parametrize("Q, K, keys, rows_above", [
    (6, 11, 5, 5), (6, 11, 32, 0), (1, 17, 20, 0), (4, 1, 33, 3), (3, 21, 8, 1), (6, 11, 20, 5),
])  # fmt: skip
def test_convolution_equals_a_loop_over_the_kernel(Q, K, keys, rows_above):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 9, keys, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(3, Q, K, dtype=torch.float64, requires_grad=True)
    ours = convolve(maps, kernel, rows_above)
    # the loop has an output for each row of maps, as if Q - 1 rows of zeros were above
    theirs = torch.stack([convolve_maps(each, kernel) for each in maps])[:, :, Q - 1 - rows_above :]
    assert_close(ours, theirs, 1e-13)
    upstream = torch.randn_like(theirs)
    ours = torch.autograd.grad(ours, (maps, kernel), upstream)
    theirs = torch.autograd.grad(theirs, (maps, kernel), upstream)
    assert_close(ours[0], theirs[0], 1e-13, "maps")
    assert_close(ours[1], theirs[1], 1e-13, "kernel")


def test_mixers_take_heads_in_the_released_order():
    """Before the softmax the weights are (out, in), after it (in, out)."""
    module = make().double().blocks[0].attention
    q, k, v = torch.randn(3, 1, 3, 10, 8, dtype=torch.float64)
    sees = torch.ones(10, 10, dtype=torch.bool).tril()

    def softmax(head):
        scores = q[0, head] @ k[0, head].T
        return scores.masked_fill(~sees, -math.inf).softmax(-1)

    with torch.no_grad():
        module.mix_before.copy_(torch.eye(3))
        module.mix_after.zero_()
        module.mix_after[0, 2] = 1.0  # head 2's output by head 0's map
        y = module.attend(q, k, v, 0, 10)[0]
        assert (y[:2] == 0).all()
        assert_close(y[2], softmax(0) @ v[0, 2], 1e-12)
        module.mix_after.copy_(torch.eye(3))
        module.mix_before.zero_()
        module.mix_before[2, 1] = 1.0  # head 2's scores by head 1's
        y = module.attend(q, k, v, 0, 10)[0]
        assert_close(y[2], softmax(1) @ v[0, 2], 1e-12)
        mean = v[0, 0].cumsum(0) / torch.arange(1, 11)[:, None]
        assert_close(y[0], mean, 1e-12)  # of scores of zero


def make_heads(x, weight):
    """x (B, T, 24) -> (B, 3, T, 8)."""
    return (x @ weight.T).unflatten(-1, (3, 8)).transpose(1, 2)


def test_at_first_it_is_plain_attention_with_norm_and_gate():
    torch.manual_seed(1)
    config = Config(**SMALL)
    x = torch.randn(2, 60, 24, dtype=torch.float64)
    rope = rope_table(config.rope_theta, 60, 8).double()
    for block in Model(config).double().blocks:
        module = block.attention
        w = released({f"attention.{name}": p for name, p in module.named_parameters()}, config)
        q = rotate_neighbours(make_heads(x, w["attention.q.weight"]), config.rope_theta)
        k = rotate_neighbours(make_heads(x, w["attention.k.weight"]), config.rope_theta)
        v = make_heads(x, w["attention.v.weight"])
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = rms_norm(y, torch.ones(8, dtype=torch.float64))
        y = y * torch.sigmoid(y @ module.gate.weight[0])[..., None]
        y = y.transpose(1, 2).flatten(2) @ module.proj.weight.T
        assert_close(module(x, rope), y, 1e-12)


# ---- number formats and compilation


def test_bfloat16_has_its_softmax_in_fp32(monkeypatch):
    seen = set()
    softmax = torch.Tensor.softmax

    def spy(*inputs, **options):
        y = softmax(*inputs, **options)
        seen.add(y.dtype)
        return y

    monkeypatch.setattr(torch.Tensor, "softmax", spy)
    with torch.autocast("cpu", torch.bfloat16):
        make()(*tokens(2, 2, 150))
    assert seen == {torch.float32}


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
