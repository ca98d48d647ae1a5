"""
How much of its context does a model use?

    python -m tools.context log/llama-1 log/rwkv-1
    python -m tools.context log/*-1 --json results/context.json

Predicts the same tokens of the validation text over and over, those in the
second half of each window, with less and less of the text before them: at most
2, 4, 8 … tokens, and at least half as many and one. Each column is what is lost
by that: the loss minus that with the whole context, ± half of a 95% interval
over the windows. Where it comes down to nothing, what lies further back is of
no use to the model.

So a study can only tell models apart by what their training has taught them to
use: no window is too narrow for a model that looks no further than 16 tokens.
Reads each run's newest checkpoint and its validation tokens.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch

import fineweb
from tools import verdicts
from tools.export import load_model, open_data, read_checkpoint
from tools.page import table

TOKENS_AT_ONCE = 8192  # of a forward pass


def cut(rows, most):
    """The second half of windows in pieces of so many tokens, the later half of which is to be guessed.

    rows: (n, T + 1) int64. Returns (pieces, most + 1) int64 with the pieces of a window one after the
    other: the last most / 2 tokens of all pieces together are the last T / 2 of all windows.
    """
    T = rows.shape[1] - 1
    starts = range(T // 2 - most // 2, T - most + 1, most // 2)
    return torch.stack([rows[:, start : start + most + 1] for start in starts], dim=1).flatten(0, 1)


@torch.no_grad()
def losses(model, rows, most, device):
    """The mean loss over the second half of each window where a token has at most so many before it: (n,)."""
    pieces = cut(rows, most)
    found = []
    for part in pieces.split(max(1, TOKENS_AT_ONCE // most)):
        part = part.to(device)
        _, loss = model(part[:, :-1], part[:, 1:], reduction="none")
        loss = loss.reshape(len(part), most)
        found.append(loss[:, most // 2 :].mean(dim=1).double().cpu())
    return torch.cat(found).reshape(len(rows), -1).mean(dim=1).numpy()


def read_rows(config, count):
    """Validation windows of a run: (at most count, T + 1) int64 tensor."""
    windows = fineweb.Windows(config.data_dir, "val", config.block_size, max_tokens=config.val_tokens)
    return torch.from_numpy(windows.rows(np.arange(min(count, len(windows)))))


def measure(folder, count, device):
    """What one run says: its name, architecture, data, and of each length of the context the loss.

    Raises SystemExit, with one line, if it has no checkpoint or its data are gone.
    """
    script, config, checkpoint = read_checkpoint(folder)
    T = config.block_size
    if T < 4 or T & (T - 1):
        fineweb.fail(f"{folder}: its context of {T} tokens is no power of two from 4 on")
    data = open_data(folder, config, checkpoint)
    rows = read_rows(config, count)
    if len(rows) < 2:
        fineweb.fail(f"{folder}: one window for validation gives no interval: --windows, or more text")
    model = load_model(script, config, checkpoint, device)
    lengths = [2**power for power in range(1, T.bit_length())]
    by_length = [losses(model, rows, most, device) for most in lengths]
    whole = by_length[-1]
    lost = []
    for each in by_length:
        more = each - whole
        half = verdicts.half_width([verdicts.squared_error(more)], verdicts.LEVEL)
        lost.append([float(more.mean()), half])
    return {
        "run": folder.name,
        "architecture": checkpoint["script"].removeprefix("train_"),
        "step": checkpoint["step"],
        "data": data["fingerprint"],
        "windows": len(rows),
        "lengths": lengths,
        "loss": float(whole.mean()),
        "lost": lost,
    }


def in_a_table(found):
    """Runs of one length of context as a Markdown table, the best first."""
    lengths = found[0]["lengths"]
    head = ["lost with at most", *[f"{most:,} tokens" for most in lengths[:-1]], f"loss with {lengths[-1]:,}"]
    rows = []
    for run in sorted(found, key=lambda run: run["loss"]):
        cells = [f"{more:.3f} ± {half:.3f}" for more, half in run["lost"][:-1]]
        rows.append([run["run"], *cells, f"{run['loss']:.4f}"])
    return table(head, rows, ["---"] + ["--:"] * len(lengths))


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    name = "python -m tools.context"
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=as_written)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, as log/gpt2")
    parser.add_argument("--windows", type=fineweb.positive, default=512, metavar="N", help="of the validation [512]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there too")
    args = fineweb.parse_strictly(parser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for folder in args.runs:
        found.append(measure(folder, args.windows, device))
    for lengths in dict.fromkeys(tuple(run["lengths"]) for run in found):
        print(in_a_table([run for run in found if tuple(run["lengths"]) == lengths]), end="")
    if args.json:
        text = "[\n" + ",\n".join(json.dumps(run) for run in found) + "\n]\n"
        fineweb.make_folder(args.json.parent)
        fineweb.write_atomic(args.json, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
