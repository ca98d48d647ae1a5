"""Gemma 3 against transformers, its two kinds of layers, and the two ways to compute a window."""
import pytest
from helpers import assert_flex_equals_mask, assert_parity, changed_by_a_token, perturbed, tokens

import train_gemma
from train_gemma import Config, Model

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


def test_how_far_layers_see():
    fields = dict(n_kv_head=1, head_dim=8)
    one, three, six = (changed_by_a_token(train_gemma, n_layer, **fields)[-1] for n_layer in (1, 3, 6))
    assert one == 100 + 255 < three <= 100 + 3 * 255
    assert six == 1023  # the sixth layer is global


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
