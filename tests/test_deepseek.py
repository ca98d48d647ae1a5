"""DeepSeek-V3 against transformers; its experts, router and auxiliary losses against plain versions."""
import copy
import math

import pytest
import torch
import torch.nn as nn
from helpers import (assert_all_close, assert_close, assert_parity, assert_same, gradients, in_full,
                     perturbed, size, tokens)  # fmt: skip
from reference import balance_loss, experts_by_loop

import train_deepseek
from train_deepseek import Config, Experts, Model, Router

SMALL = dict(
    n_layer=3, n_head=2, n_embd=32, n_inner=40, q_rank=24, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=6,
    n_expert=8, n_active=3, n_group=4, topk_group=2, n_inner_expert=16, route_scale=1.7,
    vocab_size=96, block_size=24, bias_speed=0.01, balance_alpha=0.1, max_steps=148,
)  # fmt: skip


def routers(model):
    return [module for module in model.modules() if isinstance(module, Router)]


def batch(rows=3, length=24, seed=1):
    """idx and targets (rows, length)."""
    both = tokens(rows, length + 1, vocab_size=96, seed=seed)
    return both[:, :-1], both[:, 1:]


# ---- against transformers

OTHER_SHAPES = dict(n_dense=2, n_shared=2, n_group=1, topk_group=1, rope_dim=8, v_dim=12, rope_theta=100.0)


# auto takes grouped here, but for the loss in fp64
@pytest.mark.parametrize("fields", [{"experts": "auto"}, {"experts": "dense"}, OTHER_SHAPES])
def test_logits_loss_and_gradients_equal_transformers(fields):
    model = perturbed(train_deepseek, **SMALL | fields, mtp_depth="0").eval()
    assert_parity("deepseek", model, *batch())
    with torch.no_grad():
        logits, _ = model(batch()[0])
        for router in routers(model):
            router.bias.zero_()
        without_bias, _ = model(batch()[0])
    assert not torch.allclose(without_bias, logits, atol=1e-3)  # the bias did choose


def test_parameters_and_operations_at_the_real_shapes_without_mtp():
    model = in_full(train_deepseek, mtp_depth="0")
    assert size(model) == 116_131_968
    assert model.active_parameters() == pytest.approx(67.5e6, abs=5e4)
    assert model.flops_per_token() == pytest.approx(134.9e6 + 19.7e6, abs=1e5)


@pytest.mark.parametrize("C", [32, 640])
def test_initial_weights(C):
    torch.manual_seed(0)
    model = Model(Config(**SMALL | {"n_embd": C, "q_rank": 96, "n_inner": 200}))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        else:
            assert p.std().item() == pytest.approx(0.006 * (7168 / C) ** 0.5, rel=0.15), name


@pytest.mark.parametrize("field, value", [
    ("n_group", 3), ("n_group", 8), ("n_active", 5), ("topk_group", 5), ("n_inner_expert", 12),
    ("n_embd", 36), ("rope_dim", 3), ("v_dim", 13),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(field, value):
    with pytest.raises(SystemExit, match=f"--{field} {value}"):
        Model(Config(**SMALL | {field: value}))


# ---- experts

ODDS = {
    "even": [1.0] * 8,
    "skewed": [4.0**-expert for expert in range(8)],
    "idle": [1, 1, 1, 1, 0, 1, 0, 0.01],
    "the same": [1, 1, 1, 0, 0, 0, 0, 0],  # experts for all tokens
}


def routed(load, dtype):
    """An Experts, its inputs x, chosen and weights of 40 tokens; load: how often each expert is chosen."""
    torch.manual_seed(2)
    experts = Experts(Config(**SMALL)).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    odds = torch.tensor(ODDS[load], dtype=torch.float32)
    chosen = torch.multinomial(odds.repeat(40, 1), 3)
    x = torch.randn(40, 32, dtype=dtype)
    return experts, x, chosen, torch.rand(40, 3, dtype=dtype)


def values_and_gradients(function, x, gate, up, proj, chosen, weights):
    """{name: tensor} of the output y and the gradients."""
    inputs = dict(x=x, gate=gate, up=up, proj=proj, weights=weights)
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    y = function(chosen=chosen, **inputs)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    found = torch.autograd.grad(y, list(inputs.values()), upstream)
    return {"y": y.detach()} | dict(zip(inputs, found))


@pytest.mark.parametrize("load", ODDS)
@pytest.mark.parametrize("method, dtype, relative", [
    ("grouped", torch.float32, 2e-6), ("dense", torch.float32, 2e-6), ("dense", torch.float64, 1e-14),
])  # fmt: skip
def test_experts_equal_a_loop(load, method, dtype, relative):
    experts, x, chosen, weights = routed(load, dtype)
    inputs = [x, experts.gate, experts.up, experts.proj, chosen, weights]
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    ours = values_and_gradients(getattr(experts, method), *inputs)
    theirs = values_and_gradients(experts_by_loop, *exact)
    assert_all_close(ours, theirs, relative)
    if load == "idle":
        assert (chosen != 4).all()
        for name in ("gate", "up", "proj"):
            assert (ours[name][4] == 0).all()


@pytest.mark.parametrize("dtype, compiling, method", [
    (torch.float32, False, "grouped"), (torch.bfloat16, False, "grouped"), (torch.bfloat16, True, "grouped"),
    (torch.float32, True, "dense"), (torch.float64, False, "dense"),
])  # fmt: skip
def test_auto_takes_the_method_that_works(monkeypatch, dtype, compiling, method):
    experts, x, chosen, weights = routed("even", dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(experts, "dense" if method == "grouped" else "grouped", None)
    assert experts(x, chosen, weights).dtype == dtype


# ---- the router and the auxiliary losses


def test_the_balance_loss_is_that_of_the_paper():
    torch.manual_seed(3)
    router = Router(Config(**SMALL)).double()
    nn.init.normal_(router.weight, std=0.5)
    router.bias += torch.randn(8, dtype=torch.float64)  # takes no part
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    _, _, balance = router(x)
    (gradient,) = torch.autograd.grad(balance, router.weight)
    expected = 0.0
    for row in x:
        expected = expected + balance_loss((row @ router.weight.T).sigmoid(), 0.1, 3) / 3
    (expected_gradient,) = torch.autograd.grad(expected, router.weight)
    assert_close(balance, expected, 1e-13)
    assert_close(gradient, expected_gradient, 1e-12)
    _, _, balance = router.eval()(x)
    assert balance == 0.0


def mtp_by_hand(model, idx, targets):
    """Eq. 21-24 for one sequence, token by token, with the model's own blocks and norms: the loss."""
    mtp = model.mtp
    T = len(idx)
    x = model.wte(idx[None])
    for block in model.blocks:
        x, _ = block(x, model.rope[:, :T])
    merged = []
    for i in range(T - 1):
        next_token = mtp.norm_embd(model.wte.weight[targets[i]])
        merged.append(mtp.merge.weight @ torch.cat((next_token, mtp.norm_hidden(x[0, i]))))
    x, _ = mtp.block(torch.stack(merged)[None], model.rope[:, : T - 1])
    loss = 0.0
    for i in range(T - 1):
        logits = model.wte.weight @ mtp.norm(x[0, i])
        loss = loss - logits.log_softmax(-1)[targets[i + 1]]
    return loss / T


# 148 steps stand for 14.8T tokens
@pytest.mark.parametrize("step, weight", [(0, 0.3), (99, 0.3), (100, 0.1)])
def test_the_gradient_is_that_of_the_sum_of_losses_and_the_value_is_the_main_one(step, weight):
    model = perturbed(train_deepseek, **SMALL).double()
    model.step.fill_(step)
    idx, targets = batch(length=9)
    _, loss = model(idx, targets)
    ours = gradients(model, loss)
    balances = []
    hooks = []
    for router in routers(model):
        hooks.append(router.register_forward_hook(lambda module, args, out: balances.append(out[2])))
    model(idx, targets)
    for hook in hooks:
        hook.remove()
    _, main = model.eval()(idx, targets)
    assert loss.item() == main.item() and len(balances) == 3
    mtp = sum(mtp_by_hand(model, row, target) for row, target in zip(idx, targets)) / len(idx)
    whole = main + torch.tensor(weight) * mtp + sum(balances)  # the weight in fp32, as in the script
    theirs = gradients(model, whole)
    assert ours.keys() == dict(model.named_parameters()).keys()
    assert_all_close(ours, theirs, 1e-10)


def test_other_uses_leave_out_mtp_and_balance():
    model = perturbed(train_deepseek, **SMALL)
    without = Model(Config(**SMALL, mtp_depth="0"))
    without.load_state_dict(model.state_dict(), strict=False)
    idx, targets = batch()
    for is_training in (True, False):
        model.train(is_training)
        without.train(is_training)
        assert torch.equal(model(idx)[0], without(idx)[0])
        assert torch.equal(model.decode(idx)[0], without.decode(idx)[0])
    model.mtp = None  # would fail if asked for
    model.eval()(idx, targets)[1].backward()


# ---- the routing bias


def test_known_loads_give_known_biases():
    model = Model(Config(**SMALL))
    assert all((router.bias == 0).all() for router in routers(model))
    loads = [[9, 3, 0, 4, 4, 4, 4, 4], [4] * 8, [32, 0, 0, 0, 0, 0, 0, 0]]
    for router, load in zip(routers(model), loads):
        router.load += torch.tensor(load)
    figures = model.after_step()
    expected = [[-0.01, 0.01, 0.01, 0, 0, 0, 0, 0], [0.0] * 8, [-0.01] + [0.01] * 7]
    for router, bias in zip(routers(model), expected):
        assert torch.equal(router.bias, torch.tensor(bias))
        assert (router.load == 0).all()
    entropies = []
    for load in loads:
        shares = [n / 32 for n in load if n]
        entropies.append(-sum(share * math.log(share) for share in shares) / math.log(8))
    assert figures == pytest.approx({
        "load_max": (9 / 4 + 1 + 8) / 3, "load_worst": 8.0, "load_entropy": sum(entropies) / 3,
    })  # fmt: skip


@pytest.mark.parametrize("step, moves", [(142, True), (143, False)])  # of 148: the last 0.5T of 14.8T tokens
def test_the_bias_stays_at_the_end(step, moves):
    model = Model(Config(**SMALL))
    model.step.fill_(step)
    model(*batch())
    model.after_step()
    for router in routers(model):
        assert (router.bias != 0).any() == moves


def accumulated(size):
    """{name: tensor} after a step on four rows, size at a time: gradients, loads and biases."""
    idx, targets = batch(4)
    model = perturbed(train_deepseek, **SMALL).double()
    for at in range(0, 4, size):
        _, loss = model(idx[at : at + size], targets[at : at + size])
        (loss * size / 4).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for i, router in enumerate(routers(model)):
        found[f"load {i}"] = router.load.clone()
        found[f"bias {i}"] = router.bias
    model.after_step()
    return found


def test_one_batch_of_four_equals_four_of_one():
    assert_all_close(accumulated(1), accumulated(4), 1e-10)


def test_a_skipped_step_moves_and_counts_nothing():
    model = Model(Config(**SMALL))
    model(*batch(seed=1))
    assert model.after_step(skipped=True) == {}
    for router in routers(model):
        assert (router.bias == 0).all() and (router.load == 0).all()


def test_only_training_counts():
    model = perturbed(train_deepseek, **SMALL).eval()
    state = copy.deepcopy(model.state_dict())
    idx, targets = batch()
    model(idx, targets)
    model.decode(idx)
    trial = copy.deepcopy(model).train()  # as find_micro_batch makes one
    trial(idx, targets)
    assert all((router.load > 0).any() for router in routers(trial))
    assert all((router.load == 0).all() for router in routers(model))
    model.after_step()
    assert_same(model.state_dict(), state)
