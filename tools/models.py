"""What the tools and the tests ask of a script's model without training it."""
import dataclasses

import torch

from tools.runs import find_script


def make_model(script, config):
    """A script's Model on the meta device: shapes without memory, at any size."""
    with torch.device("meta"):
        return script.Model(config)


def count_parameters(script, config):
    """(all parameters of a script's Model, those that work on one token)."""
    model = make_model(script, config)
    return sum(p.numel() for p in model.parameters()), model.active_parameters()


@dataclasses.dataclass
class Parameters:
    """How many parameters a model has."""

    trained: int
    evaluated: int  # those that a forward pass in evaluation uses
    active: int  # those that work on one token in training
    embedding: int  # of the trained ones, those that are looked up: tokens, and positions if learned

    @property
    def non_embedding(self):
        return self.trained - self.embedding


def leaves(output):
    """The parameters that a tensor was made from, as autograd has recorded it."""
    found = set()
    seen = set()
    todo = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        todo += [before for before, _ in node.next_functions]
    return found


def all_parameters(script, config):
    """The Parameters of a script's Model with a config.

    Runs the model on a few tokens with whatever weights are in memory: what they are used for doesn't
    depend on their values, and so the time to initialise them is saved.
    """
    model = make_model(script, config)
    active = model.active_parameters()
    model = model.to_empty(device="cpu").eval()
    for buffer in model.buffers():
        buffer.zero_()  # one might be an index
    logits, _ = model(torch.zeros((1, min(4, config.block_size)), dtype=torch.int64))
    embedding = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            embedding += module.weight.numel()
    return Parameters(
        trained=sum(p.numel() for p in model.parameters()),
        evaluated=sum(p.numel() for p in leaves(logits)),
        active=active,
        embedding=embedding,
    )


def parameters_of(run):
    """The Parameters of today's model of a run's shape; None if there is no such model."""
    script = find_script(run)
    if script is None:
        return None
    known = {field.name for field in dataclasses.fields(script.Config)}
    fields = {name: value for name, value in run.renamed_config().items() if name in known}
    try:
        config = script.Config(**fields)
        total, _ = count_parameters(script, config)
        if total != run.facts["parameters"]:
            return None  # the script has changed
        found = all_parameters(script, config)
    except (TypeError, ValueError, RuntimeError, AttributeError, SystemExit):
        return None  # a shape that it doesn't take, or a model of one's own with another interface
    found.active = run.facts.get("active_parameters", found.active)
    return found
