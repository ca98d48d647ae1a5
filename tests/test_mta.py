"""MTA against a straight transcription of its equations, written here over queries, keys and heads."""
import math

import pytest
import torch
import torch.nn.functional as F
from parity import assert_close

import train_mta
from train_mta import Attention, Config, Model, convolve, rope_table

SMALL = dict(n_layer=3, n_head=3, n_embd=24, n_inner=40, vocab_size=300, block_size=150)  # block 2 convolves


def perturbed(config, dtype=torch.float32):
    """A model whose kernels, mixers, gates and norms are far from where they start."""
    torch.manual_seed(0)
    model = Model(config).to(dtype)
    for name, parameter in model.named_parameters():
        small = parameter.dim() > 1 and "mix" not in name and "conv" not in name
        parameter.data += (0.05 if small else 0.3) * torch.randn_like(parameter)
    return model


# ---- the equations once more, in fp64 and without a line of the script


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotated(x, theta):
    """x (T, D): neighbouring channels as complex numbers, turned by position times theta^(-2i / D)."""
    T, D = x.shape
    angle = torch.tensor([[t * theta ** (-2 * i / D) for i in range(D // 2)] for t in range(T)], dtype=torch.float64)
    cos, sin = angle.cos().float().double(), angle.sin().float().double()  # the script's table is fp32
    turned = torch.view_as_complex(x.view(T, D // 2, 2)) * torch.complex(cos, sin)
    return torch.view_as_real(turned).reshape(T, D)


def convolved(maps, kernel):
    """out[h, i, j] = sum over a, c of kernel[h, a, c] maps[h, i - (Q - 1) + a, j - K // 2 + c], 0 out of bounds."""
    H, T, _ = maps.shape
    _, Q, K = kernel.shape
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    out = torch.zeros_like(maps)
    for a in range(Q):
        for c in range(K):
            query, key = i - (Q - 1) + a, j - K // 2 + c
            inside = (query >= 0) & (key >= 0) & (key < T)
            out = out + kernel[:, a, c, None, None] * maps[:, query.clamp(0, T - 1), key.clamp(0, T - 1)] * inside
    return out


def attention(x, w, prefix, H, theta):
    T, C = x.shape
    D = C // H
    q, k, v = [m.view(H, D, C) for m in w[prefix + "qkv.weight"].chunk(3)]
    sees = torch.arange(T)[:, None] >= torch.arange(T)[None, :]
    maps = torch.stack([rotated(x @ q[h].T, theta) @ rotated(x @ k[h].T, theta).T / math.sqrt(D) for h in range(H)])
    if prefix + "conv_before" in w:
        maps = convolved(maps * sees, w[prefix + "conv_before"])
    maps = torch.stack([sum(w[prefix + "mix_before"][g, h] * maps[h] for h in range(H)) for g in range(H)])
    weights = maps.exp() * sees
    maps = weights / weights.sum(-1, keepdim=True)
    if prefix + "conv_after" in w:
        maps = convolved(maps, w[prefix + "conv_after"]) * sees
    maps = torch.stack([sum(w[prefix + "mix_after"][h, g] * maps[h] for h in range(H)) for g in range(H)])
    heads = []
    for h in range(H):
        y = rms_norm(maps[h] @ (x @ v[h].T), w[prefix + "norm.weight"])
        heads.append(y / (1 + (-(y @ w[prefix + "gate.weight"].T + w[prefix + "gate.bias"])).exp()))
    return torch.cat(heads, dim=-1) @ w[prefix + "proj.weight"].T


def reference(config, w, idx, targets):
    """(logits, mean loss) of idx (B, T) with the weights w, {name: fp64 tensor}."""
    logits = []
    for row in idx:
        x = w["wte.weight"][row]
        for layer in range(config.n_layer):
            block = f"blocks.{layer}."
            y = rms_norm(x, w[block + "norm1.weight"])
            x = x + attention(y, w, block + "attention.", config.n_head, config.rope_theta)
            y = rms_norm(x, w[block + "norm2.weight"])
            gate = y @ w[block + "mlp.gate.weight"].T
            y = gate / (1 + (-gate).exp()) * (y @ w[block + "mlp.up.weight"].T)
            x = x + y @ w[block + "mlp.proj.weight"].T
        logits.append(rms_norm(x, w["norm.weight"]) @ w["wte.weight"].T)
    logits = torch.stack(logits)
    nats = logits.exp().sum(-1).log() - logits.gather(-1, targets[..., None])[..., 0]
    return logits, nats.mean()


@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows, length", [(128, 150), (128, 3), (16, 41)])  # one block of rows, and several with a rest
def test_logits_loss_and_gradients_equal_the_equations(dtype, relative, rows, length, monkeypatch):
    monkeypatch.setattr(train_mta, "ROWS", rows)
    config = Config(**SMALL)
    model = perturbed(config, dtype)
    idx, targets = torch.randint(300, (2, 2, length))
    w = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    assert sum("conv" in name for name in w) == 2 and sum("mix" in name for name in w) == 6
    logits, nats = reference(config, w, idx, targets)
    nats.backward()
    _, loss = model(idx, targets)
    loss.backward()
    assert_close(model(idx)[0], logits, relative, "logits")
    assert_close(loss, nats, relative, "loss")
    for name, parameter in model.named_parameters():
        ours, theirs = parameter.grad, w[name].grad
        if name.endswith("gate.bias"):  # one number, of terms that cancel: measured together with its weight's
            weight = name.replace("bias", "weight")
            ours = torch.cat((ours, model.get_parameter(weight).grad[0]))
            theirs = torch.cat((theirs, w[weight].grad[0]))
        cancels = "attention.gate" in name  # one row for all tokens and heads: fp32 keeps a digit less of such a sum
        assert_close(ours, theirs, 10 * relative if cancels else relative, name)


@pytest.mark.parametrize("Q, K, keys, top", [(6, 11, 5, 5), (6, 11, 32, 0), (1, 17, 20, 0), (4, 1, 33, 3)])
def test_convolution_by_tiles_is_the_plain_one(Q, K, keys, top):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 9, keys, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(3, Q, K, dtype=torch.float64, requires_grad=True)
    ours = convolve(maps, kernel, top)
    plain = F.conv2d(F.pad(maps, (K // 2, K // 2, top, 0)), kernel[:, None], groups=3)
    assert_close(ours, plain, 1e-13)
    upstream = torch.randn_like(plain)
    ours, plain = [torch.autograd.grad(y, (maps, kernel), upstream) for y in (ours, plain)]
    assert_close(ours[0], plain[0], 1e-13, "maps")
    assert_close(ours[1], plain[1], 1e-13, "kernel")


def attention_inputs(length, dtype=torch.float64):
    torch.manual_seed(1)
    config = Config(**SMALL)
    return torch.randn(2, length, 24, dtype=dtype), rope_table(config.rope_theta, 150, 8)[:, :length].to(dtype)


def test_mixers_take_heads_in_the_released_order():
    """Before the softmax the weights are (out, in), after it (in, out)."""
    module = perturbed(Config(**SMALL), torch.float64).blocks[0].attention
    q, k, v = torch.randn(3, 1, 3, 10, 8, dtype=torch.float64)
    sees = torch.ones(10, 10).tril() == 1

    def softmax(head):
        return (q[0, head] @ k[0, head].T).masked_fill(~sees, -math.inf).softmax(-1)

    with torch.no_grad():
        module.mix_before.copy_(torch.eye(3))
        module.mix_after.zero_()[0, 2] = 1.0  # head 2's output by head 0's map
        y = module.attend(q, k, v, 0)[0]
        assert (y[:2] == 0).all()
        assert_close(y[2], softmax(0) @ v[0, 2], 1e-12)
        module.mix_after.copy_(torch.eye(3))
        module.mix_before.zero_()[2, 1] = 1.0  # head 2's scores by head 1's
        y = module.attend(q, k, v, 0)[0]
        assert_close(y[2], softmax(1) @ v[0, 2], 1e-12)
        assert_close(y[0], v[0, 0].cumsum(0) / torch.arange(1, 11)[:, None], 1e-12)  # scores of zero: the mean


def test_at_first_it_is_plain_attention_with_norm_and_gate():
    torch.manual_seed(0)
    config = Config(**SMALL)
    x, rope = attention_inputs(140)
    for block in Model(config).double().blocks:
        module = block.attention
        y = module.qkv(x).view(2, 140, 3, 3, 8)
        q, k = torch.empty(2, 2, 3, 140, 8, dtype=torch.float64)
        for b in range(2):
            for h in range(3):
                q[b, h], k[b, h] = [rotated(y[b, :, n, h].detach(), config.rope_theta) for n in range(2)]
        y = F.scaled_dot_product_attention(q, k, y[:, :, 2].transpose(1, 2), is_causal=True).transpose(1, 2)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        y = y * torch.sigmoid(y @ module.gate.weight[0])[..., None]
        assert_close(module(x, rope), y.flatten(2) @ module.proj.weight.T, 1e-12)


# ---- blocks of rows, and making the maps again


def loss_and_gradients(model, length):
    generator = torch.Generator().manual_seed(2)
    idx, targets = torch.randint(300, (2, 2, length), generator=generator)
    model.zero_grad()
    loss = model(idx, targets)[1]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("rows", [10, 37, 128, 150])
def test_the_size_of_the_blocks_changes_nothing(rows, monkeypatch):
    model = perturbed(Config(**SMALL), torch.float64)
    monkeypatch.setattr(train_mta, "ROWS", 1000)
    whole = loss_and_gradients(model, 150)
    monkeypatch.setattr(train_mta, "ROWS", rows)
    for a, b in zip(loss_and_gradients(model, 150), whole):
        assert_close(a, b, 1e-12)


def kept_for_backward(model, length):
    """Numbers that a forward pass keeps for its backward pass, those of the parameters aside."""
    sizes, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def count(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(*torch.zeros(2, 1, length, dtype=torch.int64))[1]
    del loss
    return sum(sizes.values())


def test_maps_are_made_again_instead_of_kept(monkeypatch):
    model = perturbed(Config(**SMALL))
    again, little = loss_and_gradients(model, 150), kept_for_backward(model, 150)
    monkeypatch.setattr(Attention, "recompute", False)
    once, much = loss_and_gradients(model, 150), kept_for_backward(model, 150)
    for a, b in zip(again, once):
        assert torch.equal(a, b)
    one_map = 3 * 150 * 150
    assert much > little + 10 * one_map and little < 100 * 150 * 24  # the residual stream, not T x T maps


# ---- what no token may see


@pytest.mark.parametrize("length", [1, 2, 12, 40])
def test_no_token_sees_a_later_one(length, monkeypatch):
    """With kernels far from the identity: at first nothing could leak."""
    monkeypatch.setattr(train_mta, "ROWS", 16)
    model = perturbed(Config(**SMALL | dict(n_layer=2, conv_every=1)), torch.float64)
    idx = torch.randint(300, (1, length))
    with torch.no_grad():
        logits = model(idx)[0]
        assert_close(model.decode(idx)[0], logits[:, -1], 1e-12)
        for at in range(length):
            changed = idx.clone()
            changed[0, at] = (idx[0, at] + 7) % 300
            difference = (model(changed)[0] - logits).abs().amax((0, 2))
            assert (difference[:at] < 1e-12).all() and difference[at] > 1e-3
        assert_close(model(F.pad(idx, (0, 5)))[0][:, :length], logits, 1e-12)


# ---- number formats and compilation


def test_bfloat16_has_its_softmax_in_fp32(monkeypatch):
    model = perturbed(Config(**SMALL))
    exact = loss_and_gradients(model, 150)
    seen, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: seen.append(x.dtype) or softmax(x, dim))
    with torch.autocast("cpu", torch.bfloat16):
        rough = loss_and_gradients(model, 150)
    assert set(seen) == {torch.float32}
    assert_close(rough[0], exact[0], 2e-3)
    assert all(a.dtype == torch.float32 for a in rough)
    rough, exact = [torch.cat([gradient.flatten() for gradient in g[1:]]) for g in (rough, exact)]
    assert (rough - exact).norm() < 0.25 * exact.norm()  # 0.07 and 0.12 were seen, by the initial weights


@pytest.mark.parametrize("enabled", [False, True])
def test_it_compiles_without_graph_breaks(enabled, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(train_mta, "ROWS", 100)
    model = perturbed(Config(**SMALL | dict(n_layer=2, conv_every=2)))
    idx, targets = torch.randint(300, (2, 2, 150))
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    results = []
    for net in (model, compiled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = net(idx, targets)[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results):
        assert (a - b).norm() <= (5e-2 if enabled else 1e-5) * b.norm()


# ---- sizes and initial weights


def test_the_real_model_has_the_published_size(monkeypatch):
    monkeypatch.setattr(Model, "init_weights", lambda self: None)
    config = Config()
    with torch.device("meta"):
        model = Model(config)
    C, H, D, L = 768, 12, 64, 12
    block = 4 * C * C + 3 * C * 2048 + 2 * C + 2 * H * H + D + (D + 1)
    convolutions = 3 * 2 * H * 6 * 11  # in blocks 2, 6 and 10
    assert sum(p.numel() for p in model.parameters()) == 50_304 * C + L * block + C + convolutions == 123_597_084
    assert [n for n, b in enumerate(model.blocks) if b.attention.conv_before is not None] == [2, 6, 10]
    assert [n for n, b in enumerate(model.blocks) if b.attention.conv_after is not None] == [2, 6, 10]
    assert model.flops_per_token() == pytest.approx(274.4e6, rel=1e-3)


def test_initial_weights():
    torch.manual_seed(0)
    config = Config(n_layer=4, n_embd=256, n_head=4, n_inner=704, vocab_size=1000, block_size=64)
    model = Model(config)
    for name, p in model.named_parameters():
        if name.endswith("gate.bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif "mix" in name:
            assert torch.equal(p, torch.eye(4)), name
        elif "conv" in name:
            assert p.sum() == 4 and (p[:, 5, 5] == 1).all(), name
        else:
            std = (704 if name.endswith("mlp.proj.weight") else 256) ** -0.5
            assert p.abs().max() <= 3 * std, name
            if p.numel() > 1000:  # cut off at 3 sigma, 0.987 of it is left
                assert p.std().item() == pytest.approx(0.987 * std, rel=0.02), name
            else:
                assert p.std().item() == pytest.approx(std, rel=0.25), name
    idx, targets = torch.randint(1000, (2, 2, 64))
    assert model(idx, targets)[1].item() == pytest.approx(math.log(1000) + 0.5, abs=0.2)  # logits of variance 1


def test_impossible_shapes_are_refused():
    for wrong, words in (({"n_embd": 27}, "multiple of 2 x"), ({"conv_keys": 10}, "odd"),
                         ({"conv_keys": 19}, "at most 17"), ({"conv_queries": 129}, "at most 128")):  # fmt: skip
        with pytest.raises(SystemExit, match=words):
            Model(Config(**SMALL | wrong))
