"""What the tools and the tests ask of a script's model without training it."""
import dataclasses
import importlib
import subprocess

import torch

from tools.common import ROOT, table


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


def scripts_table():
    """Each training script's size, cost and distance from train_gpt2.py, at full size, as Markdown."""
    original = ROOT / "train_gpt2.py"
    head = ["script", "parameters", "evaluated", "active", "embedding", "FLOPs per token, forward"]
    rows = []
    for path in sorted(ROOT.glob("train_*.py"), key=lambda path: (path != original, path.name)):
        script = importlib.import_module(path.stem)
        config = script.Config()
        found = all_parameters(script, config)
        flops = make_model(script, config).flops_per_token()
        diff = subprocess.run(["diff", original, path], stdout=subprocess.PIPE, encoding="utf-8", check=False)
        row = [f"[`{path.name}`]({path.name})", f"{found.trained:,}"]
        row += [f"{count / 1e6:.1f} M" for count in (found.evaluated, found.active, found.embedding)]
        n_lines = sum(line.startswith(("<", ">")) for line in diff.stdout.splitlines())
        rows.append([*row, f"{flops / 1e6:.0f} M", str(n_lines)])
    return table([*head, "lines unlike train_gpt2.py"], rows)
