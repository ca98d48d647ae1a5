"""What the tools and the tests ask of a script's model without training it."""
import torch


def make_model(script, config):
    """A script's Model on the meta device: shapes without memory, at any size."""
    with torch.device("meta"):
        return script.Model(config)


def count_parameters(script, config):
    """(all parameters of a script's Model, those that work on one token)."""
    model = make_model(script, config)
    return sum(p.numel() for p in model.parameters()), model.active_parameters()
