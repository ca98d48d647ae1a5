"""LLaMA against transformers."""
import pytest
from helpers import assert_parity, perturbed, tokens

import train_llama

SMALL = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, vocab_size=300, block_size=24)


@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1, "rope_theta": 100.0}, {"n_kv_head": 4}])
def test_logits_loss_and_gradients_equal_transformers(fields):
    model = perturbed(train_llama, **SMALL | fields)
    assert_parity("llama", model, *tokens(2, 3, 24))
