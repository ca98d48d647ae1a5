"""Gemma 3 against transformers, its two kinds of layers, and the two ways to compute a window."""
import pytest
import torch
from helpers import (assert_flex_equals_mask, assert_norm_rounds_once, assert_parity,
                     assert_real_size, assert_saves_parameters_alone, assert_windows,
                     perturbed, tokens)  # fmt: skip

import train_gemma
from train_gemma import Config, Model, Norm

# seven layers: five local ones, a global one, a local one; heads that are wider together than the model
SMALL = dict(
    n_layer=7, n_head=4, n_kv_head=2, head_dim=12, n_embd=32, n_inner=56, vocab_size=300, block_size=24,
    window=5, rope_theta_local=100.0,
)  # fmt: skip
FOUR_LAYERS = dict(n_layer=4, global_every=2, n_kv_head=1, window=2, rope_theta=50.0)


@pytest.mark.parametrize("fields", [{}, FOUR_LAYERS])
def test_logits_loss_and_gradients_equal_transformers(fields):
    model = perturbed(train_gemma, **SMALL | fields)
    idx, targets = tokens(2, 3, 24)
    idx[0, 3] = 0  # a token as any other; transformers' default takes it for padding
    targets[0, 4] = 0
    assert_parity("gemma", model, idx, targets)
    assert_saves_parameters_alone(model)


def test_the_real_model_has_transformers_size():
    assert_real_size("gemma", train_gemma, 123_673_216, 267.3e6)


def test_norm_is_the_reference_in_fp32_rounded_once():
    norms = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    assert_norm_rounds_once(Norm(64), norms.Gemma3RMSNorm(64, eps=1e-6))


def test_windows_equal_attention_query_by_query():
    assert_windows(train_gemma)


def last_changed(n_layer):
    """The last position of 1,024 whose logits depend on token 100, in the real window."""
    fields = dict(n_head=2, n_kv_head=1, head_dim=8, n_embd=16, n_inner=8, vocab_size=300)
    model = perturbed(train_gemma, n_layer=n_layer, **fields)
    idx = tokens(1, 1024)
    other = idx.clone()
    other[0, 100] = (other[0, 100] + 1) % 300
    with torch.no_grad():
        differs = model(idx)[0] != model(other)[0]
    return differs.any(-1)[0].nonzero().max().item()


def test_how_far_layers_see():
    assert last_changed(1) == 100 + 255
    assert 100 + 255 < last_changed(3) <= 100 + 3 * 255
    assert last_changed(6) == 1023  # the sixth layer is global


@pytest.mark.slow
def test_flex_attention_equals_the_mask_in_one_graph(monkeypatch):
    # more than flex_attention's blocks of 128; a local layer and a global one, which has no mask
    fields = dict(n_layer=2, global_every=2, head_dim=16, block_size=300, window=50)
    model = perturbed(train_gemma, **SMALL | fields)
    model.may_flex = True
    assert_flex_equals_mask(train_gemma, model, tokens(2, 300), monkeypatch)


def test_norms_do_not_decay():
    model = Model(Config(**SMALL, weight_decay=0.1))
    matrices, vectors = model.optimizer_groups()
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0.0
    assert {id(p) for p in vectors["params"]} == {id(p) for p in norms}
    assert len(matrices["params"]) + len(norms) == len(list(model.parameters()))


@pytest.mark.parametrize("fields, words", [
    (dict(n_kv_head=3), "--n_head 4 .* --n_kv_head 3"), (dict(head_dim=33), "--head_dim 33"),
])  # fmt: skip
def test_shapes_that_can_not_be(fields, words):
    with pytest.raises(SystemExit, match=words):
        Model(Config(**fields))
