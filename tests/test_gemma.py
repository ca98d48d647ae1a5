"""Gemma 3 against transformers, its two kinds of layers, and the two ways to compute a window."""
import pytest
import torch
from parity import (assert_close, assert_names_go_there_and_back, assert_parity,
                    assert_recomputing_pays, flex_equals_mask, perturbed, real_size)  # fmt: skip

import train_gemma
from train_gemma import Config, Model, Norm

# seven layers: five local ones, a global one, a local one; heads wider together than the model
SMALL = dict(n_layer=7, n_head=4, n_kv_head=2, head_dim=12, n_embd=30, n_inner=56, vocab_size=300, block_size=24, window=5,
             rope_theta_local=100.0)  # fmt: skip
FIELDS = SMALL | {"n_embd": 32}  # transformers wants a multiple of the heads


@pytest.mark.parametrize("queries", [256, 7])  # at a time: all, pieces that don't divide the context
@pytest.mark.parametrize("fields", [{}, {"n_layer": 4, "global_every": 2, "n_kv_head": 1, "window": 2, "rope_theta": 50.0}])
def test_logits_loss_and_gradients_equal_transformers(fields, queries, monkeypatch):
    monkeypatch.setattr(train_gemma, "QUERIES", queries)
    model = perturbed(train_gemma, **FIELDS | fields)
    idx, targets = torch.randint(300, (2, 3, 24))
    idx[0, 3] = targets[0, 4] = 0  # a token as any other; transformers' default takes it for padding
    assert_parity("gemma", model, idx, targets)
    assert_close(model(idx[:, :9])[0], model(idx)[0][:, :9], what="a shorter context")


def test_names_go_there_and_back():
    assert_names_go_there_and_back("gemma", perturbed(train_gemma, **FIELDS))


def test_the_real_model_has_transformers_size(monkeypatch):
    ours, theirs, flops = real_size("gemma", train_gemma, monkeypatch)
    assert ours == theirs == 123_673_216
    assert f"{ours:,}" in train_gemma.__doc__
    assert flops == pytest.approx(267.3e6, rel=1e-3)


def test_how_far_layers_see():
    fields = dict(n_head=2, n_kv_head=1, head_dim=8, n_embd=16, n_inner=8, vocab_size=300)
    idx = torch.randint(300, (1, 1024), generator=torch.Generator().manual_seed(0))
    other = idx.clone()
    other[0, 100] += 1

    def last_changed(n_layer):
        model = perturbed(train_gemma, n_layer=n_layer, **fields)
        with torch.no_grad():
            return (model(idx)[0] != model(other)[0]).any(-1)[0].nonzero().max().item()

    assert last_changed(1) == 100 + 255
    assert 100 + 255 < last_changed(3) <= 100 + 3 * 255
    assert last_changed(6) == 1023  # the sixth layer is global


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norm_is_rounded_where_the_reference_does(dtype):
    norms = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    torch.manual_seed(0)
    ours, theirs = Norm(64).to(dtype), norms.Gemma3RMSNorm(64, eps=1e-6).to(dtype)
    with torch.no_grad():
        theirs.weight.normal_()
        ours.weight.copy_(theirs.weight)
    x = (500 * torch.randn(40, 64)).to(dtype)  # its square is too large for fp16
    assert torch.equal(ours(x), theirs(x))
    small = (1e-3 * torch.randn(40, 64)).to(dtype)  # its square is near eps
    assert torch.equal(ours(small), theirs(small))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("n_layer, how", [(2, {}), (1, {"backend": "inductor"})])
def test_flex_attention_computes_the_same(n_layer, how, monkeypatch):
    fields = dict(n_layer=n_layer, global_every=2, head_dim=16, block_size=300, window=50)  # more than flex's blocks of 128
    model = perturbed(train_gemma, **FIELDS | fields)
    model.may_flex = True
    flex_equals_mask(train_gemma, model, torch.randint(300, (2, 300)), monkeypatch, **how)


def test_autocast_and_fp64():
    model = perturbed(train_gemma, **FIELDS)
    idx = torch.randint(300, (2, 24))
    loss = model(idx, idx)[1].item()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(idx, idx)[1].item() == pytest.approx(loss, abs=0.03)
    exact = model.double()(idx, idx)[1]
    assert exact.dtype == torch.float64 and exact.item() == pytest.approx(loss, rel=1e-5)


def test_recomputing_pays(monkeypatch):
    model = perturbed(train_gemma, **FIELDS)
    assert_recomputing_pays(train_gemma, model, torch.randint(300, (8, 24)), monkeypatch)


def test_initial_weights():
    torch.manual_seed(0)
    model = Model(Config(n_layer=2, n_embd=256, head_dim=64, n_inner=300, vocab_size=1000, block_size=64))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 0).all(), name  # a gain of 1
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.03) and abs(p.mean().item()) < 0.001, name


def test_norms_do_not_decay():
    model = Model(Config(**SMALL, weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in model.optimizer_groups() for p in group["params"]}
    assert decay == {name: 0.0 if "norm" in name else 0.1 for name in decay} and len(decay) == len(names)


def test_shapes_that_can_not_be():
    with pytest.raises(SystemExit, match="--n_head 4 is not a multiple of --n_kv_head 3"):
        Model(Config(n_kv_head=3))
    with pytest.raises(SystemExit, match="--head_dim 33 is odd"):
        Model(Config(head_dim=33))
