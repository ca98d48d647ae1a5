"""LLaMA against transformers, its norm, its rotary positions, and what transformers doesn't test."""
import pytest
import torch
from helpers import (assert_close, assert_norm_rounds_once, assert_parity, assert_real_size,
                     assert_saves_parameters_alone, perturbed, tokens)  # fmt: skip
from reference import rotate_neighbours

import train_llama
from tools.export.weights import interleaved
from train_llama import Config, Model, Norm, rope_table, rotate

SMALL = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, vocab_size=300, block_size=24)


@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1, "rope_theta": 100.0}, {"n_kv_head": 4}])
def test_logits_loss_and_gradients_equal_transformers(fields):
    model = perturbed(train_llama, **SMALL | fields)
    assert_parity("llama", model, *tokens(2, 3, 24))
    assert_saves_parameters_alone(model)


def test_the_real_model_has_transformers_size():
    assert_real_size("llama", train_llama, 123_587_328, 266.0e6)


def test_norm_is_the_reference_in_fp32_rounded_once():
    norms = pytest.importorskip("transformers.models.llama.modeling_llama")
    assert_norm_rounds_once(Norm(64), norms.LlamaRMSNorm(64, eps=1e-5))


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


@pytest.mark.parametrize("fields, words", [
    (dict(n_embd=36, n_head=4), "--n_embd 36 .* --n_head 4"),
    (dict(n_kv_head=5), "--n_head 12 .* --n_kv_head 5"),
])  # fmt: skip
def test_shapes_that_can_not_be(fields, words):
    with pytest.raises(SystemExit, match=words):
        Model(Config(**fields))
