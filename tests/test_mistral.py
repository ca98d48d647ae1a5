"""Mistral against transformers, its window, and the two ways to compute it."""
import pytest
import torch
from parity import (assert_close, assert_names_go_there_and_back, assert_parity,
                    assert_recomputing_pays, flex_equals_mask, perturbed, real_size)  # fmt: skip

import train_mistral
from train_mistral import Config, Model

SMALL = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, vocab_size=300, block_size=24, window=5)


@pytest.mark.parametrize("queries", [256, 7, 1])  # at a time: all, pieces that don't divide the context, one by one
@pytest.mark.parametrize("fields", [{}, {"window": 1}, {"window": 24, "n_kv_head": 1, "rope_theta": 100.0}])
def test_logits_loss_and_gradients_equal_transformers(fields, queries, monkeypatch):
    monkeypatch.setattr(train_mistral, "QUERIES", queries)
    model = perturbed(train_mistral, **SMALL | fields)
    idx, targets = torch.randint(300, (2, 3, 24))
    assert_parity("mistral", model, idx, targets)
    assert_close(model(idx[:, :9])[0], model(idx)[0][:, :9], what="a shorter context")


def test_names_go_there_and_back():
    assert_names_go_there_and_back("mistral", perturbed(train_mistral, **SMALL))


def test_the_real_model_has_transformers_size(monkeypatch):
    ours, theirs, flops = real_size("mistral", train_mistral, monkeypatch)
    assert ours == theirs == 123_587_328
    assert f"{ours:,}" in train_mistral.__doc__
    assert flops == pytest.approx(261.3e6, rel=1e-3)


def test_the_real_window_is_512_tokens_with_the_own_one():
    fields = dict(n_head=2, n_kv_head=1, n_embd=16, n_inner=8, vocab_size=300)
    idx = torch.randint(300, (1, 1024), generator=torch.Generator().manual_seed(0))
    other = idx.clone()
    other[0, 100] += 1
    with torch.no_grad():
        model = perturbed(train_mistral, n_layer=1, **fields)
        changed = (model(idx)[0] != model(other)[0]).any(-1)[0].nonzero().flatten().tolist()
        assert changed[0] == 100 and changed[-1] == 100 + 511
        assert len(changed) > 500  # a difference of one token in 512 may round away, but seldom
        model = perturbed(train_mistral, n_layer=2, **fields)
        changed = (model(idx)[0] != model(other)[0]).any(-1)[0].nonzero().flatten().tolist()
        assert 100 + 2 * 511 > changed[-1] > 100 + 511  # two layers see further


def test_without_an_effective_window_it_is_llama():
    import train_llama

    fields = {key: value for key, value in SMALL.items() if key != "window"}
    model = perturbed(train_mistral, **fields, window=1000)
    llama = train_llama.Model(train_llama.Config(**fields, rope_theta=10_000.0))
    llama.load_state_dict(model.state_dict())
    idx = torch.randint(300, (2, 24))
    assert_close(model(idx)[0], llama(idx)[0])
    assert model.flops_per_token() == llama.flops_per_token()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flex_attention_computes_the_same(monkeypatch):
    model = perturbed(train_mistral, **SMALL | dict(n_layer=2, block_size=300, window=50))  # more than flex's blocks of 128
    idx = torch.randint(300, (2, 300))
    flex_equals_mask(train_mistral, model, idx, monkeypatch)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flex_attention_compiles_into_one_graph(monkeypatch):
    model = perturbed(train_mistral, **SMALL | dict(n_layer=1, block_size=300, window=50))
    flex_equals_mask(train_mistral, model, torch.randint(300, (2, 300)), monkeypatch, backend="inductor")


def test_autocast_and_fp64():
    model = perturbed(train_mistral, **SMALL)
    idx = torch.randint(300, (2, 24))
    loss = model(idx, idx)[1].item()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(idx, idx)[1].item() == pytest.approx(loss, abs=0.01)
    exact = model.double()(idx, idx)[1]
    assert exact.dtype == torch.float64 and exact.item() == pytest.approx(loss, rel=1e-6)


def test_recomputing_pays(monkeypatch):
    model = perturbed(train_mistral, **SMALL)
    assert_recomputing_pays(train_mistral, model, torch.randint(300, (8, 24)), monkeypatch)


def test_shapes_that_can_not_be():
    with pytest.raises(SystemExit, match="--n_head 12 is not a multiple of --n_kv_head 5"):
        Model(Config(n_kv_head=5))
