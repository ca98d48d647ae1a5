"""
What a table gets: the loss of n-grams on what a run was trained on.

    python -m tools.ngram --data_dir data/bytes
    python -m tools.ngram --data_dir data/bytes --steps 1000
    python -m tools.ngram --data_dir data/bytes --json results/ngram.json

A model is worth its name only where it beats a table of which token follows
the last one, two, three … tokens. This counts them in the very batches that a
run of --steps sees, and scores them on its validation windows, so the losses
can be compared with those of tools.study at 0.25M, whose budget is the
default. The entries are the different n-grams that the table has to keep.

Interpolated by Witten and Bell's rule (Bell, Cleary and Witten, Text
Compression, 1990, method C): the more different tokens a history was followed
by, the more weight has the shorter history,

    P(w | h) = (c(hw) + t(h) P(w | h')) / (c(h) + t(h)),

where c counts, t(h) is the number of different tokens after h, and h' is h
without its oldest token; before all a uniform guess.
"""
import argparse
import json
from pathlib import Path

import numpy as np

import fineweb
from fineweb import fail, positive
from tools.page import table

ROWS = 4096  # windows that are read at once


def n_grams(rows, n, vocab_size):
    """A number for each n tokens in a row: (rows, T) int64 to (rows, T - n + 1) int64."""
    length = rows.shape[1] - n + 1
    keys = np.zeros((len(rows), length), dtype=np.int64)
    for place in range(n):
        keys = keys * vocab_size + rows[:, place : place + length]
    return keys


def find(sorted_keys, keys):
    """(where each of keys is in sorted_keys, whether it is there at all)."""
    places = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return places, sorted_keys[places] == keys


def losses(train, val, vocab_size, largest):
    """What n-grams up to 1, 2, … largest tokens long get on all tokens of val but a row's first.

    Returns [nats per token] and [how many different n-grams there are to count, up to that length].
    train, val: (rows, T + 1) int64, as fineweb.Windows has them; nothing is counted across rows.
    """
    chance = np.full((len(val), val.shape[1] - 1), 1 / vocab_size)  # of each token but the first
    found = []
    entries = []
    for n in range(1, largest + 1):
        keys, counts = np.unique(n_grams(train, n, vocab_size), return_counts=True)
        histories, first = np.unique(keys // vocab_size, return_index=True)
        totals = np.add.reduceat(counts, first)
        kinds = np.diff(np.append(first, len(keys)))
        # a row's tokens that have n - 1 others before them; of single tokens the first is no target
        asked = n_grams(val, n, vocab_size)[:, 1 if n == 1 else 0 :]
        target = chance[:, max(0, n - 2) :]
        history, seen = find(histories, asked // vocab_size)
        place, known = find(keys, asked)
        count = np.where(known, counts[place], 0)
        better = (count + kinds[history] * target) / (totals[history] + kinds[history])
        target[:] = np.where(seen, better, target)
        found.append(float(-np.log(chance).mean()))
        entries.append(len(keys) + (entries[-1] if entries else 0))
    return found, entries


def read_rows(windows, ids):
    """The windows with these numbers, read in parts: (len(ids), T + 1) int64."""
    parts = [windows.rows(ids[at : at + ROWS]) for at in range(0, len(ids), ROWS)]
    return np.concatenate(parts)


def parse_command_line():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.ngram", description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--data_dir", default=fineweb.SAMPLE, metavar="DIR", help="folder of token shards [%(default)s]")
    add("--largest", type=positive, metavar="N", default=6, help="the longest n-gram [6]")
    add("--steps", type=positive, metavar="N", default=4000, help="of the run [4000]")
    add("--batch_tokens", type=positive, metavar="N", default=2048, help="of a step [2048]")
    add("--block_size", type=positive, metavar="N", default=256, help="of the run [256]")
    add("--val_tokens", type=positive, metavar="N", default=262_144, help="of the run [262144]")
    add("--seed", type=int, metavar="N", default=1, help="of the run [1]")
    add("--json", type=Path, metavar="FILE", help="write it there too")
    args = fineweb.parse_strictly(parser)
    if args.batch_tokens % args.block_size:
        fail(f"--batch_tokens {args.batch_tokens} is not a multiple of --block_size {args.block_size}")
    if args.largest > args.block_size:
        fail(f"--largest {args.largest} is more than --block_size {args.block_size}")
    return args


def main():
    args = parse_command_line()
    data = fineweb.open_dataset(args.data_dir)
    vocab_size = data["vocab_size"]
    if vocab_size**args.largest > np.iinfo(np.int64).max:
        fail(f"--largest {args.largest}: too long for a vocabulary of {vocab_size:,}, choose a smaller one")
    windows = fineweb.Windows(args.data_dir, "train", args.block_size)
    val = fineweb.Windows(args.data_dir, "val", args.block_size, max_tokens=args.val_tokens)
    loader = fineweb.Loader(windows, args.batch_tokens // args.block_size, args.seed, max_steps=args.steps)
    ids = np.concatenate([loader.ids(step) for step in range(args.steps)])
    train_rows = read_rows(windows, ids)
    found, entries = losses(train_rows, read_rows(val, np.arange(len(val))), vocab_size, args.largest)
    rows = []
    for n, (loss, size) in enumerate(zip(found, entries, strict=True), 1):
        rows.append([str(n), f"{loss:.4f}", f"{size:,}"])
    print(table(["tokens, with the one to guess", "validation loss", "entries"], rows, ["--:"] * 3), end="")
    if args.json:
        options = {name: value for name, value in vars(args).items() if name not in ("json", "data_dir")}
        result = {"data": data["fingerprint"], "options": options, "losses": found, "entries": entries}
        text = json.dumps(result, indent=1) + "\n"
        fineweb.make_folder(args.json.parent)
        fineweb.write_atomic(args.json, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
