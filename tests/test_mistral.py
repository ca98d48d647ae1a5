"""Mistral against transformers, its window, and the two ways to compute it."""
import pytest
import torch
from helpers import (assert_close, assert_flex_equals_mask, assert_parity, assert_saves_parameters_alone,
                     changed_by_a_token, perturbed, tokens)  # fmt: skip
from reference import window_attention

import train_llama
import train_mistral

SMALL = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, vocab_size=300, block_size=24, window=5)


@pytest.mark.parametrize("fields", [{}, {"window": 1}, {"window": 24, "n_kv_head": 1, "rope_theta": 100.0}])
def test_logits_loss_and_gradients_equal_transformers(fields):
    model = perturbed(train_mistral, **SMALL | fields)
    assert_parity("mistral", model, *tokens(2, 3, 24))
    assert_saves_parameters_alone(model)


def test_windows_equal_attention_query_by_query():
    """attend() by the mask of window_mask(), in fp64; Gemma's are the same text."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, 12, 6, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, 2, 12, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 4, 12, 6, dtype=torch.float64)
    for window in (1, 2, 5, 12, 100, None):
        mask = None if window is None else train_mistral.window_mask(q[:, 0], window)
        ours = train_mistral.attend(q, k, v, mask)
        theirs = window_attention(q, k, v, window or 12)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
        ours = torch.autograd.grad(ours, (q, k, v), upstream)
        theirs = torch.autograd.grad(theirs, (q, k, v), upstream)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_the_real_window_is_512_tokens_with_the_query_itself():
    changed = changed_by_a_token(train_mistral, 1, n_kv_head=1)
    assert changed[0] == 100 and changed[-1] == 100 + 511
    assert len(changed) > 500  # a difference of one token in 512 may round away, but seldom
    further = changed_by_a_token(train_mistral, 2, n_kv_head=1)[-1]
    assert 100 + 511 < further < 100 + 2 * 511


def test_without_an_effective_window_it_is_llama():
    model = perturbed(train_mistral, **SMALL | {"window": 1000})
    fields = {name: value for name, value in SMALL.items() if name != "window"}
    llama = train_llama.Model(train_llama.Config(**fields, rope_theta=10_000.0))
    llama.load_state_dict(model.state_dict())
    idx = tokens(2, 24)
    assert_close(model(idx)[0], llama(idx)[0])
    assert model.flops_per_token() == llama.flops_per_token()


@pytest.mark.slow
def test_flex_attention_equals_the_mask_in_one_graph(monkeypatch):
    fields = dict(n_layer=2, block_size=300, window=50)  # more than flex_attention's blocks of 128
    model = perturbed(train_mistral, **SMALL | fields)
    assert_flex_equals_mask(train_mistral, model, tokens(2, 300), monkeypatch)
