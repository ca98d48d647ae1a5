"""
The README's table of architectures, measured on the scripts themselves.

    python -m tools.table            # print it
    python -m tools.table --write    # put it into README.md, between its marks
"""
import argparse
import difflib
import importlib
import re
from pathlib import Path

import torch

import fineweb
from tools.sync import ORIGINAL, ROOT, siblings

DIFFERENCE = {  # what a reader of the diff to train_gpt2.py will see, in a sentence
    "gpt2": "The reference: learned positions, LayerNorm, full attention, a GELU MLP, biases.",
    "llama": "LLaMA 3: RMSNorm, rotary positions, four query heads to a key-value head, SwiGLU, no biases.",
    "mistral": "Mistral: LLaMA's block that sees only the last 512 tokens.",
    "gemma": "Gemma 3: narrow and deep, four norms a block, normed queries and keys, five layers that see 256 tokens to one that "
             "sees all, GeGLU.",
    "deepseek": "DeepSeek-V3: latent attention, 4 of 16 fine-grained experts and a shared one, balanced by a bias, and a second "
                "token predicted.",
    "rwkv": "RWKV-7: no attention but a matrix-valued state with a delta rule, constant memory per token.",
    "mta": "Multi-Token Attention: attention maps convolved over queries and keys and mixed between heads.",
}  # fmt: skip
MARKS = "<!-- table: python -m tools.table --write -->\n", "<!-- /table -->\n"


def make_model(script, config):
    """A script's model without memory for its weights."""
    init, script.Model.init_weights = script.Model.init_weights, lambda self: None
    try:
        with torch.device("meta"):
            return script.Model(config)
    finally:
        script.Model.init_weights = init


def count_parameters(script, fields):
    """(total, active per token) of a script's model: of routed experts, n_active of n_expert work on a token."""
    model = make_model(script, script.Config(**fields))
    total = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        routed = "experts" in name
        active += parameter.numel() * model.config.n_active // model.config.n_expert if routed else parameter.numel()
    return total, active


def row(path):
    """One line of the table for a script."""
    script = importlib.import_module(path.stem)
    total, active = count_parameters(script, script.RECIPE)
    diff = difflib.unified_diff(ORIGINAL.read_text().splitlines(), path.read_text().splitlines(), n=0)
    changed = sum(line[0] in "+-" and line[:3] not in ("+++", "---") for line in diff)
    flops = f"{make_model(script, script.Config()).flops_per_token() / 1e6:.0f} M"
    sentence = DIFFERENCE[path.stem.removeprefix("train_")]
    return f"| [`{path.name}`]({path.name}) | {total:,} | {active:,} | {flops} | {changed or '–'} | {sentence} |\n"


def table():
    head = "| script | parameters | active per token | FLOPs per token, forward | lines unlike train_gpt2.py | what is different |\n"
    return head + "|---|--:|--:|--:|--:|---|\n" + "".join(row(path) for path in [ORIGINAL, *siblings()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    args = fineweb.parse_strictly(parser)
    if not args.write:
        return print(table(), end="")
    readme = Path(ROOT / "README.md")
    text = readme.read_text()
    pattern = re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1])
    if not re.search(pattern, text, re.DOTALL):
        fineweb.fail(f"README.md lacks the marks {MARKS[0].strip()} and {MARKS[1].strip()}")
    readme.write_text(re.sub(pattern, lambda _: MARKS[0] + table() + MARKS[1], text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
