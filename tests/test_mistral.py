"""Mistral against transformers, its window, and the two ways to compute it."""
import pytest
import torch
from helpers import (assert_close, assert_flex_equals_mask, assert_norm_rounds_once, assert_parity,
                     assert_real_size, assert_saves_parameters_alone, assert_windows,
                     perturbed, tokens)  # fmt: skip

import train_llama
import train_mistral
from train_mistral import Config, Model, Norm

SMALL = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, vocab_size=300, block_size=24, window=5)


@pytest.mark.parametrize("fields", [{}, {"window": 1}, {"window": 24, "n_kv_head": 1, "rope_theta": 100.0}])
def test_logits_loss_and_gradients_equal_transformers(fields):
    model = perturbed(train_mistral, **SMALL | fields)
    assert_parity("mistral", model, *tokens(2, 3, 24))
    assert_saves_parameters_alone(model)


def test_the_real_model_has_transformers_size():
    assert_real_size("mistral", train_mistral, 123_587_328, 261.3e6)


def test_norm_is_the_reference_in_fp32_rounded_once():
    norms = pytest.importorskip("transformers.models.mistral.modeling_mistral")
    assert_norm_rounds_once(Norm(64), norms.MistralRMSNorm(64, eps=1e-5))


def test_windows_equal_attention_query_by_query():
    assert_windows(train_mistral)


def changed_tokens(n_layer):
    """Positions of 1,024 whose logits depend on token 100, in the real window."""
    fields = dict(n_head=2, n_kv_head=1, n_embd=16, n_inner=8, vocab_size=300)
    model = perturbed(train_mistral, n_layer=n_layer, **fields)
    idx = tokens(1, 1024)
    other = idx.clone()
    other[0, 100] = (other[0, 100] + 1) % 300
    with torch.no_grad():
        differs = model(idx)[0] != model(other)[0]
    return differs.any(-1)[0].nonzero().flatten().tolist()


def test_the_real_window_is_512_tokens_with_the_query_itself():
    changed = changed_tokens(n_layer=1)
    assert changed[0] == 100 and changed[-1] == 100 + 511
    assert len(changed) > 500  # a difference of one token in 512 may round away, but seldom
    assert 100 + 511 < changed_tokens(n_layer=2)[-1] < 100 + 2 * 511  # two layers see further


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


@pytest.mark.parametrize("fields, words", [
    (dict(n_embd=36, n_head=4), "--n_embd 36 .* --n_head 4"),
    (dict(n_kv_head=5), "--n_head 12 .* --n_kv_head 5"),
])  # fmt: skip
def test_shapes_that_can_not_be(fields, words):
    with pytest.raises(SystemExit, match=words):
        Model(Config(**fields))
