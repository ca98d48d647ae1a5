"""What the tests of the models share: above all, for LLaMA, Mistral and Gemma, the comparison with transformers' classes."""
import pytest
import torch
import torch.nn.functional as F

from tools import mapping


def perturbed(script, **fields):
    """A small model whose norms and matrices are far from where they start, so that one left out would show."""
    torch.manual_seed(0)
    model = script.Model(script.Config(**fields))
    for parameter in model.parameters():
        parameter.data += (0.3 if parameter.dim() == 1 else 0.05) * torch.randn_like(parameter)
    return model


def transformers_twin(name, model):
    """transformers' model of architecture name with the same weights, with scaled_dot_product_attention."""
    transformers = pytest.importorskip("transformers")
    classes = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "gemma": "Gemma3ForCausalLM"}
    twin = getattr(transformers, classes[name])(mapping.hf_config(name, model.config)).train()
    assert twin.config._attn_implementation == "sdpa"
    twin.load_state_dict(getattr(mapping, f"to_hf_{name}")(model.state_dict(), model.config))
    return twin


def assert_close(ours, theirs, relative=1e-5, what=""):
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
    assert error <= relative, f"{what}: relative error {error:.1e}"


def assert_parity(name, model, idx, targets):
    """Logits, loss and all gradients are transformers'."""
    twin = transformers_twin(name, model)
    logits, none = model(idx)
    theirs = twin(input_ids=idx, use_cache=False).logits
    assert none is None
    assert_close(logits, theirs, what="logits")
    _, loss = model(idx, targets)
    reference = F.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    assert_close(loss, reference, what="loss")
    loss.backward()
    reference.backward()
    gradients = {key: p.grad for key, p in twin.named_parameters()}
    gradients = getattr(mapping, f"from_hf_{name}")(gradients, model.config)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[key], what=key)


def assert_names_go_there_and_back(name, model):
    state = model.state_dict()
    assert state.keys() == dict(model.named_parameters()).keys()  # nothing that can be recomputed
    again = getattr(mapping, f"from_hf_{name}")(transformers_twin(name, model).state_dict(), model.config)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


def real_size(name, script, monkeypatch):
    """(parameters of the script's real model, of transformers' at the same shape, forward FLOPs per token)."""
    transformers = pytest.importorskip("transformers")
    classes = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "gemma": "Gemma3ForCausalLM"}
    monkeypatch.setattr(script.Model, "init_weights", lambda self: None)
    with torch.device("meta"):
        model = script.Model(script.Config())
        twin = getattr(transformers, classes[name])(mapping.hf_config(name, script.Config()))
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in twin.parameters()), model.flops_per_token()


def gradients(model, idx):
    """{name: gradient} of the mean loss."""
    model.zero_grad()
    _, loss = model(idx, idx.roll(1, 1))
    loss.backward()
    return {"loss": loss.detach()} | {key: p.grad.clone() for key, p in model.named_parameters()}


def kept(model, idx):
    """Bytes that a forward pass keeps for backward, but for the parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, loss = model(idx, idx)
    return sum(storage.nbytes() for storage in storages.values())


def assert_recomputing_pays(script, model, idx, monkeypatch):
    """The same gradients, no matrix product more, and much less kept for backward."""
    from torch.utils.flop_counter import FlopCounterMode

    def measure():
        with FlopCounterMode(display=False) as counter:
            found = gradients(model, idx)
        products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
        return found, products, kept(model, idx)

    found, products, memory = measure()
    monkeypatch.setattr(script, "recompute", lambda function, *inputs: function(*inputs))
    plain, plain_products, plain_memory = measure()
    for key in plain:
        assert torch.equal(found[key], plain[key]), key
    assert products == plain_products > 0
    assert memory < 0.7 * plain_memory, (memory, plain_memory)


def flex_equals_mask(script, model, idx, monkeypatch, **how):
    """Forces the branch of flex_attention, as only CUDA takes it, and compares logits; how: torch.compile's, or nothing."""
    with torch.no_grad():
        expected = model(idx)[0]
        monkeypatch.setattr(script, "can_flex", lambda x: True)
        calls, create = [], script.block_mask
        monkeypatch.setattr(script, "block_mask", lambda *given: (calls.append(given), create(*given))[1])
        torch.compiler.reset()
        net = torch.compile(model, dynamic=False, fullgraph=True, **how) if how else model
        found = net(idx)[0]
    assert calls or how, "the branch was not taken"
    assert_close(found, expected, what="flex_attention")
