"""What the tools and the tests ask of a script's model without training it."""
import torch


def make_model(script, config):
    """A script's Model on the meta device: shapes without memory, at any size."""
    with torch.device("meta"):
        return script.Model(config)


def count_parameters(script, config):
    """(all parameters of a script's Model, those that work on one token).

    They differ for mixtures of experts: of n_expert routed experts a token uses n_active.
    """
    total = 0
    active = 0
    for name, parameter in make_model(script, config).named_parameters():
        size = parameter.numel()
        total += size
        if ".experts." in name:
            size = size * config.n_active // config.n_expert
        active += size
    return total, active
