"""DeepSeek-V3 against transformers, and its experts, router and auxiliary losses against plain transcriptions."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from parity import assert_close

import train_deepseek
from tools.bench_parts import experts_by_loop
from tools.mapping_deepseek import from_hf_deepseek, hf_config_deepseek, to_hf_deepseek
from train_deepseek import Config, Experts, Model, Router

SMALL = dict(n_layer=3, n_head=2, n_embd=32, q_rank=24, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=6, n_expert=8, n_active=3,
             n_group=4, topk_group=2, expert_width=16, dense_width=40, route_scale=1.7, vocab_size=96, block_size=24,
             bias_speed=0.01, balance_alpha=0.1, max_steps=148)  # fmt: skip


def perturbed(config, dtype=torch.float32):
    """A model none of whose parameters is 0 or 1 and whose routing bias changes choices, so that a missing one shows."""
    torch.manual_seed(0)
    model = Model(config).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for router in routers(model):
        router.bias += 0.3 * torch.randn_like(router.bias)
    return model


def routers(model):
    return [module for module in model.modules() if isinstance(module, Router)]


def batch(rows=3, length=24, seed=1):
    tokens = torch.randint(96, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---- against transformers


@pytest.mark.parametrize("method", ["grouped", "dense"])
def test_logits_loss_and_gradients_equal_transformers(method):
    transformers = pytest.importorskip("transformers")
    model = perturbed(Config(**SMALL, experts=method, mtp_depth="0")).eval()
    twin = transformers.DeepseekV3ForCausalLM(hf_config_deepseek(model.config)).eval()
    twin.set_experts_implementation("eager")
    twin.load_state_dict(to_hf_deepseek(model.state_dict(), model.config))
    idx, targets = batch()
    with torch.no_grad():
        assert_close(model(idx)[0], twin(idx).logits, 1e-5, "logits")
        assert_close(model(idx[:, :7])[0], twin(idx[:, :7]).logits, 1e-5, "logits of a shorter context")
        logits = model(idx)[0]
        biases = [router.bias.clone() for router in routers(model)]
        for router in routers(model):
            router.bias.zero_()
        assert not torch.allclose(model(idx)[0], logits, atol=1e-3)  # it did choose
        for router, bias in zip(routers(model), biases):
            router.bias.copy_(bias)
    _, loss = model(idx, targets)
    reference = F.cross_entropy(twin(idx).logits.flatten(0, 1), targets.flatten())
    assert_close(loss, reference, 1e-5, "loss")
    loss.backward()
    reference.backward()
    ours = to_hf_deepseek({**model.state_dict(), **gradients(model)}, model.config)
    for name, parameter in twin.named_parameters():
        assert_close(ours[name], parameter.grad, 1e-5, name)


def test_the_mapping_can_be_undone():
    model = perturbed(Config(**SMALL))
    there = to_hf_deepseek(model.state_dict(), model.config)
    back = from_hf_deepseek(there, model.config)
    without = Model(Config(**SMALL, mtp_depth="0"))
    without.load_state_dict(back)
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_parameter_counts_and_operations_at_real_shapes():
    with torch.device("meta"):
        counts = {}
        for mtp in ("0", "1"):
            model = Model(Config(mtp_depth=mtp))
            counts[mtp] = sum(p.numel() for p in model.parameters())
            matrices, attention = {"0": (134.9e6, 19.7e6), "1": (206.8e6, 21.3e6)}[mtp]
            assert model.flops_per_token() == pytest.approx(matrices + attention, abs=1e5)
        transformers = pytest.importorskip("transformers")
        twin = transformers.DeepseekV3ForCausalLM(hf_config_deepseek(Config()))
        assert counts["0"] == sum(p.numel() for p in twin.parameters()) == 116_131_968
    assert counts["1"] == 124_317_312


def test_sizes_that_do_not_fit_are_refused():
    for wrong in (dict(n_group=3), dict(n_group=8), dict(n_active=5), dict(topk_group=5), dict(expert_width=12),
                  dict(n_embd=36), dict(rope_dim=3), dict(v_dim=13)):  # fmt: skip
        with pytest.raises(SystemExit, match="--" + next(iter(wrong))):
            Model(Config(**SMALL | wrong))


# ---- experts


def routed(load, dtype, n=40):
    """Inputs of an Experts and a choice that is even, skewed or leaves experts without any token."""
    torch.manual_seed(2)
    experts = Experts(Config(**SMALL)).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    odds = {"even": torch.ones(8), "skewed": 4.0 ** -torch.arange(8), "idle": torch.tensor([1, 1, 1, 1, 0, 1, 0, 0.01])}[load]
    chosen = torch.multinomial(odds.repeat(n, 1), 3)
    return experts, torch.randn(n, 32, dtype=dtype), chosen, torch.rand(n, 3, dtype=dtype)


def values_and_gradients(function, *inputs):
    inputs = [i.detach().clone().requires_grad_(i.is_floating_point()) for i in inputs]
    y = function(*inputs)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y, *(i.grad for i in inputs if i.is_floating_point())]


@pytest.mark.parametrize("load", ["even", "skewed", "idle"])
@pytest.mark.parametrize("method, dtype, relative", [("grouped", torch.float32, 2e-6), ("dense", torch.float32, 2e-6),
                                                     ("dense", torch.float64, 1e-14)])  # fmt: skip
def test_experts_equal_a_loop(load, method, dtype, relative):
    experts, x, chosen, weights = routed(load, dtype)
    inputs = (x, experts.up, experts.down, chosen, weights)
    ours = values_and_gradients(getattr(experts, method), *inputs)
    theirs = values_and_gradients(experts_by_loop, *(i.double() if i.is_floating_point() else i for i in inputs))
    for what, a, b in zip(("y", "x", "up", "down", "weights"), ours, theirs):
        assert_close(a, b, relative, what)
    if load == "idle":
        assert (chosen != 4).all() and (ours[2][4] == 0).all() and (ours[3][4] == 0).all()


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    experts, x, chosen, weights = routed("even", torch.float32)
    chosen = torch.tensor([5, 1, 2]).expand(40, 3)
    for method in (experts.grouped, experts.dense):
        y = method(x, experts.up, experts.down, chosen, weights)
        assert_close(y, experts_by_loop(x, experts.up, experts.down, chosen, weights), 2e-6)
    config = Config(**SMALL)
    model = perturbed(config)
    for router in routers(model):
        router.bias[:3] += 10.0
    model(*batch())
    main, mtp = routers(model)[:-1], routers(model)[-1]
    assert all(router.load.sum() == 3 * 24 * config.n_active for router in main)
    assert mtp.load.sum() == 3 * 23 * config.n_active  # the last token has none after next


@pytest.mark.parametrize("dtype, compiling, method", [
    (torch.float32, False, "grouped"), (torch.bfloat16, False, "grouped"), (torch.bfloat16, True, "grouped"),
    (torch.float32, True, "dense"), (torch.float64, False, "dense")])  # fmt: skip
def test_auto_takes_the_method_that_works(monkeypatch, dtype, compiling, method):
    experts, x, chosen, weights = routed("even", dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    for other in {"grouped", "dense"} - {method}:
        monkeypatch.setattr(experts, other, None)
    assert experts(x, chosen, weights).dtype == dtype


def test_the_model_runs_in_bf16_autocast_and_fp64():
    model = perturbed(Config(**SMALL)).eval()
    _, exact = copy.deepcopy(model).double()(*batch())
    with torch.autocast("cpu", torch.bfloat16):
        _, rounded = model(*batch())
    rounded.backward()
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02) and exact.dtype == torch.float64
    assert model(*batch())[1].item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_compiles_to_one_graph(dtype):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = perturbed(Config(**SMALL | dict(n_layer=1)))  # and MTP's
        net = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager") if compiled else model
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            _, loss = net(*batch())
        loss.backward()
        results.append((loss, gradients(model), [router.load for router in routers(model)]))
    relative = 1e-5 if dtype == torch.float32 else 0.05
    (eager_loss, eager, eager_loads), (loss, ours, loads) = results
    assert_close(loss, eager_loss, relative)
    assert ours.keys() == eager.keys() and all(load.sum() > 0 for load in loads)
    if dtype == torch.float32:  # in bf16 another rounding may choose another expert
        assert all(torch.equal(a, b) for a, b in zip(loads, eager_loads))
        for name in ours:
            assert_close(ours[name], eager[name], 1e-4, name)


# ---- auxiliary losses


def balance_by_hand(scores, alpha, n_active):
    """Equations 17-20 with their sums written out: scores (T, E) of one sequence."""
    T, E = scores.shape
    total = 0.0
    for i in range(E):
        chosen = sum(1.0 for t in range(T) if i in scores[t].topk(n_active).indices.tolist())
        f = E / (n_active * T) * chosen
        p = sum(scores[t, i] / sum(scores[t, j] for j in range(E)) for t in range(T)) / T
        total = total + f * p
    return alpha * total


def test_the_balance_loss_is_that_of_the_paper():
    torch.manual_seed(3)
    router = Router(Config(**SMALL)).double()
    torch.nn.init.normal_(router.weight, std=0.5)
    router.bias += torch.randn(8, dtype=torch.float64)  # takes no part
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    *_, balance = router(x)
    (gradient,) = torch.autograd.grad(balance, router.weight)
    hand = sum(balance_by_hand((row @ router.weight.T).sigmoid(), 0.1, 3) for row in x) / 3
    (by_hand,) = torch.autograd.grad(hand, router.weight)
    assert_close(balance, hand, 1e-13)
    assert_close(gradient, by_hand, 1e-12)
    *_, balance = router.eval()(x)
    assert balance == 0.0


def mtp_by_hand(model, idx, targets):
    """Equations 21-24 token by token, for one sequence, with the model's own block and norms: the loss, and its scores."""
    mtp, cos, sin = model.mtp, model.cos, model.sin
    h = model.wte(idx[None])
    for block in model.blocks:
        h, _ = block(h, cos[: len(idx)], sin[: len(idx)])
    inputs = []
    for i in range(len(idx) - 1):
        both = torch.cat((mtp.norm_embd(model.wte.weight[targets[i]]), mtp.norm_hidden(h[0, i])))
        inputs.append(mtp.merge.weight @ both)
    out, _ = mtp.block(torch.stack(inputs)[None], cos[: len(inputs)], sin[: len(inputs)])
    loss = 0.0
    for i in range(len(idx) - 1):
        logits = model.wte.weight @ mtp.norm(out[0, i])
        loss = loss - logits.log_softmax(-1)[targets[i + 1]]
    return loss / len(idx)


@pytest.mark.parametrize("step, weight", [(99, 0.3), (100, 0.1)])  # 148 steps stand for 14.8T tokens
def test_the_mtp_loss_is_that_of_the_paper_and_only_in_the_gradient(step, weight):
    model = perturbed(Config(**SMALL | dict(balance_alpha=1e-30)), torch.float64)
    model.step.fill_(step)
    idx, targets = batch()
    _, loss = model(idx, targets)
    loss.backward()
    ours = gradients(model)
    model.zero_grad()
    _, main = model.eval()(idx, targets)
    assert loss.item() == main.item()
    hand = sum(mtp_by_hand(model, idx[row], targets[row]) for row in range(3)) / 3
    (main + float(torch.tensor(weight)) * hand).backward()  # the weight is an fp32 tensor
    theirs = gradients(model)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name in ours:
        assert_close(ours[name], theirs[name], 1e-10, name)


def test_the_whole_gradient_is_the_sum_of_its_parts():
    model = perturbed(Config(**SMALL), torch.float64)
    idx, targets = batch()
    model(idx, targets)[1].backward()
    ours, found = gradients(model), []
    hooks = [router.register_forward_hook(lambda module, args, out: found.append(out[2])) for router in routers(model)]
    model.zero_grad()
    model(idx, targets)
    for hook in hooks:
        hook.remove()
    assert len(found) == 3
    mtp = sum(mtp_by_hand(model.eval(), idx[row], targets[row]) for row in range(3)) / 3
    (model(idx, targets)[1] + float(torch.tensor(0.3)) * mtp + sum(found)).backward()
    for name, gradient in gradients(model).items():
        assert_close(ours[name], gradient, 1e-10, name)


def test_other_uses_leave_out_mtp_and_balance():
    model, (idx, targets) = perturbed(Config(**SMALL)), batch()
    without = Model(Config(**SMALL, mtp_depth="0"))
    without.load_state_dict(model.state_dict(), strict=False)
    for mode in (True, False):
        model.train(mode), without.train(mode)
        assert torch.equal(model(idx)[0], without(idx)[0])
        assert torch.equal(model(idx, targets, "none")[1], without(idx, targets, "none")[1])
        assert torch.equal(model.decode(idx)[0], without.decode(idx)[0])
    model.mtp = None  # would fail if asked for
    model.eval()(idx, targets)[1].backward()


def test_every_parameter_gets_a_gradient_however_few_the_tokens():
    for length in (2, 24):
        model = perturbed(Config(**SMALL))
        model(*batch(1, length))[1].backward()
        assert gradients(model).keys() == dict(model.named_parameters()).keys()
    model(*batch(1, 1))[1].backward()  # one token has none after next: the main loss alone


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
        assert torch.equal(router.bias, torch.tensor(bias)) and (router.load == 0).all()
    assert model.step == 1
    entropy = [-sum(n / 32 * math.log(n / 32) for n in load if n) / math.log(8) for load in loads]
    assert figures == pytest.approx({"load_max": (9 / 4 + 1 + 8) / 3, "load_worst": 8.0, "load_entropy": sum(entropy) / 3})


@pytest.mark.parametrize("step, moves", [(142, True), (143, False)])  # of 148: the last 0.5T of 14.8T tokens
def test_the_bias_stays_at_the_end(step, moves):
    model = Model(Config(**SMALL))
    model.step.fill_(step)
    model(*batch())
    model.after_step()
    assert all((router.bias != 0).any() == moves for router in routers(model)) and model.step == step + 1


def test_loads_of_all_processes_are_added(monkeypatch):
    model = Model(Config(**SMALL))
    for router in routers(model):
        router.load += torch.tensor([5, 4, 4, 4, 4, 4, 4, 3])

    def all_reduce(load):  # the other process has the opposite excess, and more of it
        load += torch.tensor([2, 4, 4, 4, 4, 4, 4, 6])

    monkeypatch.setattr(train_deepseek.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train_deepseek.dist, "all_reduce", all_reduce)
    model.after_step()
    for router in routers(model):
        assert torch.equal(router.bias, torch.tensor([0.01, 0, 0, 0, 0, 0, 0, -0.01]))


def test_one_batch_of_four_equals_four_of_one():
    idx, targets = batch(4)
    models = []
    for size in (4, 1):
        model = perturbed(Config(**SMALL), torch.float64)
        for at in range(0, 4, size):
            (model(idx[at : at + size], targets[at : at + size])[1] * size / 4).backward()
        loads = [router.load.clone() for router in routers(model)]
        model.after_step()
        models.append((model, loads))
    (a, loads_a), (b, loads_b) = models
    for one, other, router, twin in zip(loads_a, loads_b, routers(a), routers(b)):
        assert torch.equal(one, other) and torch.equal(router.bias, twin.bias)
    for name, gradient in gradients(a).items():
        assert_close(gradient, gradients(b)[name], 1e-10, name)


def test_only_training_counts():
    model = perturbed(Config(**SMALL)).eval()
    state = copy.deepcopy(model.state_dict())
    model(*batch())
    model(*batch(), "none")
    model.decode(batch()[0])
    trial = copy.deepcopy(model).train()  # as find_micro_batch makes one
    trial(*batch())
    assert all((router.load > 0).any() for router in routers(trial))
    assert all((router.load == 0).all() for router in routers(model))
    model.after_step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) or name == "step", name


def test_checkpoints_hold_the_bias_and_the_step_and_nothing_else_that_is_no_parameter():
    model = perturbed(Config(**SMALL))
    extra = model.state_dict().keys() - dict(model.named_parameters()).keys()
    assert extra == {"step", "blocks.1.router.bias", "blocks.2.router.bias", "mtp.block.router.bias"}
    model.after_step()
    other = Model(model.config)
    other.load_state_dict(model.state_dict())
    assert other.step == 1 and torch.equal(other(batch()[0])[0], model(batch()[0])[0])


def test_two_runs_are_equal_to_the_bit():
    ends = []
    for _ in range(2):
        torch.manual_seed(5)
        model = Model(Config(**SMALL))
        optimizer = torch.optim.AdamW(model.optimizer_groups(), lr=1e-2, fused=True)
        for step in range(4):
            model(*batch(seed=step))[1].backward()
            optimizer.step()
            optimizer.zero_grad()
            model.after_step()
        ends.append(model.state_dict())
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
