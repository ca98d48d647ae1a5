"""Mistral against transformers, its window, and the two ways to compute it."""
import pytest
from helpers import assert_flex_equals_mask, assert_parity, changed_by_a_token, perturbed, tokens

import train_mistral

SMALL = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, vocab_size=300, block_size=24, window=5)


@pytest.mark.parametrize("fields", [{}, {"window": 1}, {"window": 24, "n_kv_head": 1, "rope_theta": 100.0}])
def test_logits_loss_and_gradients_equal_transformers(fields):
    model = perturbed(train_mistral, **SMALL | fields)
    assert_parity("mistral", model, *tokens(2, 3, 24))


def test_the_real_window_is_512_tokens_with_the_query_itself():
    changed = changed_by_a_token(train_mistral, 1, n_kv_head=1)
    assert changed[0] == 100 and changed[-1] == 100 + 511
    assert len(changed) > 500  # a difference of one token in 512 may round away, but seldom
    further = changed_by_a_token(train_mistral, 2, n_kv_head=1)[-1]
    assert 100 + 511 < further < 100 + 2 * 511


@pytest.mark.slow
def test_flex_attention_equals_the_mask_in_one_graph(monkeypatch):
    fields = dict(n_layer=2, block_size=300, window=50)  # more than flex_attention's blocks of 128
    model = perturbed(train_mistral, **SMALL | fields)
    assert_flex_equals_mask(train_mistral, model, tokens(2, 300), monkeypatch)
