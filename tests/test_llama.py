"""LLaMA against transformers, and its rotary positions."""
import pytest
import torch
from helpers import assert_close, assert_parity, assert_saves_parameters_alone, perturbed, tokens
from reference import rotate_neighbours

import train_llama
from tools.export.weights import interleaved
from train_llama import rope_table, rotate

SMALL = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, vocab_size=300, block_size=24)


@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1, "rope_theta": 100.0}, {"n_kv_head": 4}])
def test_logits_loss_and_gradients_equal_transformers(fields):
    model = perturbed(train_llama, **SMALL | fields)
    assert_parity("llama", model, *tokens(2, 3, 24))
    assert_saves_parameters_alone(model)


def test_rotary_positions_are_the_other_pairing_with_permuted_weights():
    torch.manual_seed(0)
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    rope = rope_table(100.0, 24, 8).double()
    order = interleaved(8)

    def make_heads(weight):
        return (x @ weight.flatten(0, 1).T).view(2, 24, 4, 8).transpose(1, 2)

    q, k = torch.randn(2, 4, 8, 32, dtype=torch.float64)  # 4 heads of 8 rows
    our_q = rotate(make_heads(q), rope)
    our_k = rotate(make_heads(k), rope)
    their_q = rotate_neighbours(make_heads(q[:, order]), 100.0)
    their_k = rotate_neighbours(make_heads(k[:, order]), 100.0)
    assert_close(our_q[..., order], their_q, 1e-14)
    assert_close(our_q @ our_k.mT, their_q @ their_k.mT, 1e-14)
